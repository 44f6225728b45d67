"""What rules that look beyond their rows remember of the texts of a batch; nothing is made for rules that do not.

A text's memory is the `Context` of its next row, on the device. A step makes contexts for all its rows out of it, drafts among
them, and moves it on by what was decided: what rejected drafts led to is dropped. A text takes its memory along from one batch
to the next by its `Place`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.rules import Context, Rule
from trimtab.core.rules.context import first_context, follow_run, unroll
from trimtab.core.transfer import to_device

__all__ = ["Histories", "Place"]


class Place(NamedTuple):
    """Where a text's memory is."""

    histories: "Histories"
    row: int
    """Of that batch."""


class Histories:
    """The memories of B texts.

    Args:
        members: which of them have which rule, see `BatchShaping.members`.
        prompts: ids; those of texts whose rules do not look back are not looked at.
        device: where rows are.
        places: where the memories of texts that are under way are; None for one that begins.
    """

    def __init__(
        self,
        members: Mapping[Rule, Sequence[int]],
        prompts: Sequence[Sequence[int]],
        device: torch.device,
        places: Sequence[Place | None] = (),
    ) -> None:
        self._index: dict[Rule, Tensor] = {}
        self._next: dict[Rule, Context] = {}
        self._within: dict[int, int] = {}
        for rule, rows in members.items():
            if not rule.looks_back:
                continue
            self._index[rule] = to_device(rows, device)
            self._next[rule] = _gather(
                rule, [places[row] if places else None for row in rows], [prompts[r] for r in rows], device
            )
            self._within |= {row: i for i, row in enumerate(rows)}

    def __bool__(self) -> bool:
        """Whether any of the rules looks back."""
        return bool(self._index)

    def place(self, row: int) -> Place | None:
        """Where the memory of a text is; None if its rule does not look back."""
        return Place(self, row) if row in self._within else None

    def at(self, rule: Rule, rows: Sequence[int]) -> Context:
        """The contexts `[b]` of the next rows of some texts of a rule."""
        state = self._next[rule]
        index = to_device([self._within[row] for row in rows], state.state.device)
        return Context(*(part[index] for part in state))

    def contexts(self, logp: Tensor, tokens: Tensor) -> dict[Rule, Context]:
        """The contexts of the next P rows of each text, by rule: `[b, P]` for the texts of a rule that looks back.

        Args:
            logp: log p̃ `[B, P, V]` of those rows.
            tokens: `[B, P − 1]` what follows each but the last, drafts among them.
        """
        return {
            rule: unroll(rule, self._next[rule], tokens[index], _weigh(rule, logp[:, :-1], tokens)[index])
            for rule, index in self._index.items()
        }

    def move_on(self, contexts: Mapping[Rule, Context], logp: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Go on behind the first `counts[b]` of what was decided.

        Args:
            contexts: those of the step: of drafts that are the `tokens`, as far as they stand before the last one counted.
            logp: as for `contexts`.
            tokens: `[B, P]` what was decided at each row.
            counts: `[B]` from 0 to P.
        """
        for rule, index in self._index.items():
            weighed = _weigh(rule, logp, tokens)[index]
            self._next[rule] = follow_run(rule, self._next[rule], contexts[rule], tokens[index], weighed, counts[index])


def _gather(rule: Rule, places: Sequence[Place | None], prompts: Sequence[Sequence[int]], device: torch.device) -> Context:
    """The contexts `[b]` of the next rows of texts, wherever their memories are; of those that begin, after their prompts."""
    sources: dict[Histories | None, list[int]] = {}
    for i, place in enumerate(places):
        sources.setdefault(place and place.histories, []).append(i)
    parts = []
    for source, mine in sources.items():
        rows = [place.row for i in mine if (place := places[i]) is not None]
        parts.append(source.at(rule, rows) if source else first_context(rule, [prompts[i] for i in mine], device))
    if len(parts) == 1:
        return parts[0]
    order = [i for mine in sources.values() for i in mine]
    index = to_device(sorted(range(len(order)), key=order.__getitem__), device)
    return Context(*(torch.cat(part)[index] for part in zip(*parts, strict=True)))


def _weigh(rule: Rule, logp: Tensor, tokens: Tensor) -> Tensor:
    """Log p̃ `[B, K]` of tokens in float64, if a rule asks for it; NaN otherwise, and where there is no token."""
    if not rule.reads_logp:
        return torch.full_like(tokens, torch.nan, dtype=torch.float64)
    return torch.where(tokens < 0, torch.nan, gather(logp, tokens.clamp(min=0)).double())
