"""The processes of a training run: how they agree, wait for one another and add up.

They talk over a group of their own, through gloo, on tensors in main memory. It has no time limit that a long cache could run
into; a process that dies closes its connections, which ends the others at once.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch.distributed
from torch import Tensor

from trimtab.errors import TrimtabError

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")

FOREVER = timedelta(days=30)


class Ranks:
    """Which process this is, and of how many.

    Args:
        index: from 0; 0 is the one that writes.
        count: how many there are; before they first talk, all of them have initialised `torch.distributed`.
    """

    def __init__(self, index: int = 0, count: int = 1) -> None:
        self.index, self.count = index, count

    @cached_property
    def _group(self) -> Any:
        return torch.distributed.new_group(backend="gloo", timeout=FOREVER)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.index == 0

    def first_does(self, work: Callable[[], T]) -> T:
        """Let the first process do something while the others wait; all get its result, or raise its error."""
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except (TrimtabError, OSError) as error:  # what a user can mend; anything else ends the process, and so all
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until all are here."""
        self.total(torch.zeros(1))

    def total(self, values: Tensor) -> Tensor:
        """Sums over all processes of a tensor in main memory."""
        if self.count > 1:
            values = values.clone()
            torch.distributed.all_reduce(values, group=self._group)
        return values


ALONE = Ranks()
