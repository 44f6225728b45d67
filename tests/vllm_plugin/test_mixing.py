"""Aligned rows take the place of the proposal's logits, and nothing else changes."""

import math
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from law_of import expected_row, possible, tempered
from trimtab.core.logprobs import Warp
from trimtab.core.rules import parse_rule
from trimtab.decode.shaping import Shaping
from trimtab.vllm.mixing import Mixer

V, PADDING = 6, 3


def make_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, V + PADDING, generator=torch.Generator().manual_seed(seed))


def make_rows(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(rows, V, generator=generator), -1).to(dtype)


def shaping(rule: str, *weights: float, p: tuple[float, float] = (1.0, 1.0), q: float = 1.0) -> Shaping:
    return Shaping(parse_rule(rule), weights, Warp(p[0], 0, p[1]), (Warp(q),) * len(weights))


def specified(logits: torch.Tensor, logqs: list[torch.Tensor], how: Shaping) -> torch.Tensor:
    """The row in plain Python."""
    temperature, top_p, aligners = how.proposal.temperature, how.proposal.top_p, how.aligners[0].temperature
    p = tempered(torch.softmax(logits[:V].double(), -1).tolist(), temperature, top_p)  # type: ignore[arg-type]
    qs = [tempered(logq.double().exp().tolist(), aligners) for logq in logqs]  # type: ignore[arg-type]
    row = expected_row(str(how.rule), p, qs, list(how.weights))
    return torch.tensor([*row, *[0.0] * PADDING], dtype=torch.float64).log().float()


DIFFERENT = [
    shaping("product", 1.0, 0.5),
    shaping("geometric", 0.3, -0.2),
    shaping("nucleus", 2.0, 0.0, p=(0.7, 0.8)),
    shaping("kl_gate(tau=0.4)", 1.0, 1.0, q=1.5),
    shaping("product", -1.0, 1.0, p=(1.3, 0.9), q=0.5),
]


@pytest.mark.parametrize("rows", [[0, 1, 2, 3, 4], [6, 0, 3, 2, 5], [1, 2, 3, 4, 5]])
def test_each_row_is_as_its_own_rule_specifies(rows):
    logits = make_logits(7 if rows[0] else 5)
    before, logqs = logits.clone(), [make_rows(5, 1), make_rows(5, 2)]
    Mixer(V).mix(logits, rows, logqs, DIFFERENT)
    for i, row in enumerate(rows):
        assert_close(
            possible(logits[row]), specified(before[row], [logq[i] for logq in logqs], DIFFERENT[i]), atol=1e-5, rtol=0
        )
        assert (logits[row, V:] == -math.inf).all()
    for row in set(range(len(logits))) - set(rows):
        assert torch.equal(logits[row], before[row])


def test_what_the_batch_before_wanted_is_forgotten():
    mixer = Mixer(V)
    for step, hows in enumerate([DIFFERENT[:2], DIFFERENT[:2], DIFFERENT[2:4], DIFFERENT[1::-1], DIFFERENT[:1]]):
        logits, logqs = make_logits(2, step), [make_rows(len(hows), 10 + step), make_rows(len(hows), 20 + step)]
        before = logits.clone()
        mixer.mix(logits, range(len(hows)), logqs, hows)
        for i, how in enumerate(hows):
            assert_close(possible(logits[i]), specified(before[i], [logq[i] for logq in logqs], how), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_aligners_in_another_precision(dtype):
    """Two rules in one batch are put together row by row, where the precisions must agree."""
    hows = [shaping("product", 1.0), shaping("nucleus", 1.0)]
    logits, logq = make_logits(2), make_rows(2, 1, dtype)
    before = logits.clone()
    Mixer(V).mix(logits, [0, 1], [logq], hows)
    for i, how in enumerate(hows):
        assert_close(possible(logits[i]), specified(before[i], [logq[i]], how), atol=1e-5, rtol=0)


def test_what_the_proposal_cannot_say_stays_impossible():
    """A grammar's mask stands in the logits before the aligner does."""
    logits = make_logits(2)
    logits[:, [1, 4]] = -math.inf
    for rule in ("product", "geometric", "nucleus", "kl_gate(tau=9.0)"):
        mixed = logits.clone()
        Mixer(V).mix(mixed, [0, 1], [make_rows(2, 1)], [shaping(rule, 1.5)] * 2)
        assert (mixed[:, [1, 4]] == -math.inf).all()
        assert_close(mixed.exp().sum(-1), torch.ones(2))


@pytest.mark.parametrize("rule", ["product", "geometric", "nucleus", "kl_gate(tau=0.9)"])
def test_an_anti_expert_may_have_tokens_that_it_cannot_say(rule):
    logits, logqs = make_logits(3), [make_rows(3, 1), make_rows(3, 2)]
    logqs[1][:, [0, 3]] = -math.inf
    logqs[1] = torch.log_softmax(logqs[1], -1)
    before, how = logits.clone(), shaping(rule, 0.4, -1.3)
    Mixer(V).mix(logits, range(3), logqs, [how] * 3)
    for i in range(3):
        assert_close(possible(logits[i]), specified(before[i], [logq[i] for logq in logqs], how), atol=1e-5, rtol=0)


def test_nothing_is_written_to_the_aligners_rows():
    logits, logq = make_logits(2), make_rows(2, 1)
    given: Any = logq.clone()
    Mixer(V).mix(logits, [0, 1], [logq], [shaping("product", 1.0)] * 2)
    assert torch.equal(logq, given)


def test_without_padding():
    logits, logq = make_logits(1)[:, :V].clone(), make_rows(1, 1)
    before = logits.clone()
    Mixer(V).mix(logits, [0], [logq], [shaping("product", 1.0)])
    assert_close(logits, torch.log_softmax(before + logq, -1), atol=1e-5, rtol=0)


def test_what_a_cut_leaves_out_comes_before_what_vllm_forbids():
    """Under a nucleus of one token that must not come, the proposal's best of the others does; forbidden ones stay so."""
    logits = torch.tensor([[4.0, 1.0, 2.0, -math.inf, 0.0]])
    one = Shaping(parse_rule("nucleus"), (1.0,), Warp(top_p=0.05), (Warp(),))
    Mixer(4).mix(logits, [0], [torch.log_softmax(torch.zeros(1, 4), -1)], [one])
    assert torch.softmax(logits, -1).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]]
    assert torch.softmax(logits / 100, -1).tolist() == [[1.0, 0.0, 0.0, 0.0, 0.0]], "at any temperature"
    logits[0, 0] = -math.inf  # as `min_tokens` does
    assert torch.softmax(logits, -1)[0].argmax() == 2
    assert logits[0, 3:].isneginf().all()
