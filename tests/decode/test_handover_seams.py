"""Where hand-overs meet what else is there: drafters of other packages, memory, prefixes, aligners that break."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from tiny import EOS
from trimtab import AlignedModel, SamplingParams
from trimtab.decode import engine as engine_module
from trimtab.decode.drafters import Drafted, Drafter, Step, TextDrafter
from trimtab.decode.engine import Engine
from trimtab.decode.sequence import Sequence as Growing
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
        AlignedModel(PROPOSAL, [ALIGNER], eos_token_ids=[EOS], draft=one, num_speculative_tokens=length).generate(
            [[1]], params()
        )
        for one in (draft, "none")
    )
    assert found == plain


class Failing(TableLM):
    """Gives NaN from the sixth token of a text on."""

    def extend(self, state: Any, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        places = torch.tensor(state.lengths[: len(counts)])[:, None] + torch.arange(tokens.shape[1])
        rows = super().extend(state, tokens, counts)
        return torch.where((places >= 5).unsqueeze(-1), math.nan, rows)


@pytest.mark.parametrize("draft", ["aligner", "none"])
def test_an_aligner_that_breaks_when_it_has_had_its_say_is_not_noticed(draft):
    """Whether it was read once more depends on the draft length and on `logprobs`; the text does not."""
    found = [
        AlignedModel(
            PROPOSAL, [Failing(ALIGNER.table)], eos_token_ids=[EOS], draft=draft, num_speculative_tokens=length
        ).generate([[1, 2]], params(handover="confidence(window=3, threshold=0.0)", logprobs=logprobs))[0]
        for length in (0, 1, 3, 6)
        for logprobs in (False, True)
    ]
    assert [one.tokens for one in found] == [found[0].tokens] * 8
    assert {one.finish_reason for one in found} == {"length"}


# ---- what is kept, and what it takes


def told(model: AlignedModel, prompt: list[int], **more: Any) -> Growing:
    (sequence,) = model.prepare(prompt, params(**more))
    list(Engine(model.proposal, model.pace, prefixes=model.prefixes).run([sequence]))
    return sequence


def test_what_all_models_have_read_is_kept_when_some_of_them_leave():
    """A further turn takes over the prompt and the answer up to the switch; what stands behind it they have not read."""
    model = AlignedModel(PROPOSAL, [ALIGNER], eos_token_ids=[EOS], num_speculative_tokens=0)
    prompt = [1 + i % 4 for i in range(30)]
    first = told(model, prompt)
    assert (first.handover_at, first.has_aligners) == (2, False)
    assert model.prefixes.num_tokens == 30 + 2
    assert told(model, [*prompt, *first.tokens, 3]).cached_tokens == 30 + 2
    assert told(model, [*prompt, 3], handover=None).cached_tokens == 30


def test_who_comes_after_its_siblings_have_left_reads_its_prompt_and_that_counts(monkeypatch):
    model = AlignedModel(PROPOSAL, [ALIGNER], eos_token_ids=[EOS], num_speculative_tokens=0)
    counted = []
    monkeypatch.setattr(engine_module, "reading_bytes", lambda coming: counted.append(len(list(coming))) or 0)
    engine = Engine(model.proposal, model.pace, max_num_seqs=2, max_cache_bytes=2**30)
    longer, shorter = model.prepare([1], params(n=2, seed=1))
    third = Growing(0, 2, longer.prompt, longer.models, longer.params, longer.shaping, 5, [EOS], None)
    shorter.limit = 6
    engine.submit([longer, shorter, third])
    while not shorter.finish_reason:
        engine.step()
    assert not longer.has_aligners
    counted.clear()
    engine.step()
    assert counted == [1]
    while engine:
        engine.step()
    assert len(third.tokens) == 5
