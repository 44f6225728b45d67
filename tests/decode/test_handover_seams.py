"""Where hand-overs meet what else is there: drafters of other packages, memory, prefixes, aligners that break."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tiny import EOS
from trimtab import AlignedModel, SamplingParams
from trimtab.decode.drafters import Drafted, Drafter, Step, TextDrafter
from trimtab.models.table import TableLM

V = 5
PROPOSAL, ALIGNER, DRAFT = (TableLM.random(V, order=2, seed=seed) for seed in (0, 1, 3))
OVER = "confidence(window=2, threshold=0.0)"
"""After two tokens."""


def params(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "seed": 3, "ignore_eos": True, "handover": OVER, **more})


@dataclass(frozen=True)
class Sure(TextDrafter):
    """Looks tokens up, and has a model that is read with each prompt."""

    name: ClassVar[str] = "sure"
    model: Any = DRAFT

    @property
    def models(self) -> tuple[Any, ...]:
        return (self.model,)

    def guess(self, memory: Any, count: int) -> Sequence[int]:
        return [1] * count


@dataclass(frozen=True)
class Best(Drafter):
    """Says the aligner's best tokens for certain."""

    name: ClassVar[str] = "best"
    has_rows: ClassVar[bool] = False

    def draft(self, step: Step) -> Drafted:
        rows: list[torch.Tensor] = []
        token = None
        for _ in range(step.width):
            rows.append(step.rows(1, token, [1] * len(step.limits)))
            token = rows[-1].argmax(-1)
        read = torch.cat(rows, 1)
        return Drafted(read.argmax(-1), read={1: read})


@pytest.mark.parametrize("draft", [Sure(), Best()], ids=["lookup with a model", "certain by rows"])
@pytest.mark.parametrize("length", [0, 3])
def test_whoever_drafts_with_models_stays_behind_with_them(draft, length):
    """What is certain changes no token, before the switch or after it."""
    found, plain = (
        AlignedModel(PROPOSAL, [ALIGNER], eos_token_ids=[EOS], draft=one, num_speculative_tokens=length).generate([[1]], params())
        for one in (draft, "none")
    )
    assert found == plain
