"""Drafting from a model's rows: token by token, each drawn from the row behind those before it."""

import torch
from torch import Tensor

from trimtab.decode.drafters.base import Drafted, Step

__all__ = ["draft_from_rows"]


def draft_from_rows(step: Step, place: int) -> Drafted:
    """Drafts by the model at a place, see `Step.rows`.

    An aligner's rows are needed at every position, for the rule. A model that only drafts is left out where nothing can be
    verified. A coupled draw needs a row for the bonus position, too. Best tokens do not; but where nothing else is drafted, a
    draft for it tells whether drafting would pay.
    """
    only = place > step.aligners
    bonus = not (only and step.greedy and step.width > 1)
    may = [able or not only for able in step.able]
    if not any(may):
        return Drafted()
    token: Tensor | None = None
    drafts: list[Tensor] = []
    drawn_from: list[Tensor] = []
    own: list[Tensor] = []
    for j in range(step.width - 1 + bonus):
        counts = [int(able and j < limit + bonus) for able, limit in zip(may, step.limits, strict=True)]
        own.append(step.rows(place, token, counts))
        token, row = step.draw(own[-1], drafts)
        drafts.append(token.squeeze(1))
        if row is not None:
            drawn_from.append(row)
    rows = torch.cat(drawn_from, 1) if drawn_from else None
    return Drafted(torch.stack(drafts, 1), rows, {} if only else {place: torch.cat(own, 1)})
