"""The blends of a model's aligners that requests ask for, and what each of them is decoded with."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from trimtab.decode.draft import Models
from trimtab.models.base import LanguageModel
from trimtab.models.blends import blended

__all__ = ["Blends"]

MOST = 1024
"""Blends that are remembered, so that requests for the same one share what was read; each is a few hundred bytes."""


class Blends:
    """Makes blends of these aligners; may be asked from any thread.

    Args:
        aligners: what is blended.
        choose: the models of a request with this one aligner.
    """

    def __init__(self, aligners: Sequence[LanguageModel], choose: Callable[[list[LanguageModel]], Models]) -> None:
        self._aligners, self._choose = aligners, choose
        self._made: OrderedDict[tuple[float, ...], tuple[LanguageModel, Models]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, weights: tuple[float, ...]) -> tuple[LanguageModel, Models]:
        """The blend with these weights as an aligner, and all that is run with it.

        Raises:
            InvalidRequest: the aligners cannot be blended.
        """
        with self._lock:
            if weights not in self._made:
                aligner = blended(self._aligners, weights)
                self._made[weights] = aligner, self._choose([aligner])
                if len(self._made) > MOST:
                    self._made.popitem(last=False)
            self._made.move_to_end(weights)
            return self._made[weights]
