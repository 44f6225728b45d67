"""Aligned rows take the place of the proposal's logits, and nothing else changes."""

import math
import random
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from law_of import expected_row, possible, probabilities, tempered
from looking import Handover, Opening, Tiring
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import Warp
from trimtab.core.rules import parse_rule
from trimtab.decode.shaping import Shaping
from trimtab.models.table import TableLM
from trimtab.vllm.cache import Request
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
    shaping("mixture", 0.2, 0.5, p=(0.9, 0.8)),
    shaping("gate(rule=mixture, by=entropy, tau=1.1)", 0.2, 0.5),
    shaping("gate(rule=geometric, by=max_p, tau=0.5)", 1.0, -0.5),
    shaping("nudge(tau=0.6)", 1.0, 0.5),
]


@pytest.mark.parametrize("rows", [[*range(9)], [10, 0, 3, 2, 5, 1, 9, 7, 4], [*range(1, 10)]])
def test_each_row_is_as_its_own_rule_specifies(rows):
    logits = make_logits(11 if rows[0] else 9)
    before, logqs = logits.clone(), [make_rows(9, 1), make_rows(9, 2)]
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
    for rule in ("product", "geometric", "nucleus", "kl_gate(tau=9.0)", "mixture"):
        mixed = logits.clone()
        Mixer(V).mix(mixed, [0, 1], [make_rows(2, 1)], [shaping(rule, 0.5 if rule == "mixture" else 1.5)] * 2)
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


# ---- rules that look back: vLLM draws, and we see it a step later

LOOKING = [Handover(tau=-1.2), Tiring(token=2), Opening(), parse_rule("product"), Handover(tau=-0.8)]


def run_vllm(steps: int, chosen: random.Random, mixer: Mixer, models: list[TableLM]) -> None:
    """Requests of rules that look back in a batch that changes, each row checked against `score` of its whole text.

    Some are preempted and come back as new objects; sometimes what was drawn last does not count, and is drawn anew.
    """
    texts = [([1 + i % 5] * (1 + i % 3), []) for i in range(len(LOOKING))]
    alive = [Request(prompt, output) for prompt, output in texts]
    scorer = AlignedModel(models[0], models[1:])
    for _ in range(steps):
        here = [i for i in range(len(alive)) if chosen.random() < 0.8]
        chosen.shuffle(here)
        if not here:
            continue
        rows = [probabilities(models[0], [*alive[i].prompt, *alive[i].output]) for i in here]
        logits = torch.tensor([[*row, *[0.0] * PADDING] for row in rows]).log()
        logqs = [
            torch.stack([torch.tensor(probabilities(q, [*alive[i].prompt, *alive[i].output])).log() for i in here])
            for q in models[1:]
        ]
        hows = [Shaping(LOOKING[i], (0.8,), Warp(0.9, 0, 1.0), (Warp(1.1),)) for i in here]
        mixer.mix(logits, range(len(here)), logqs, hows, [alive[i] for i in here])
        for j, i in enumerate(here):
            how = SamplingParams(rule=LOOKING[i], weight=0.8, proposal_temperature=0.9, aligner_temperature=1.1)
            answer = [*alive[i].output, 0]  # the last token stands for any
            expected = torch.tensor(row_by_scoring(scorer, how, alive[i].prompt, answer), dtype=torch.float32)
            assert_close(possible(logits[j])[:V], expected, atol=2e-5, rtol=0)
            drawn = chosen.choices(range(V), possible(logits[j])[:V].exp().tolist())[0]
            if alive[i].output and (fate := chosen.random()) < 0.2:  # what was drawn last did not count
                alive[i].output.pop()
                alive[i].output += [drawn] * (fate < 0.1)
            else:
                alive[i].output.append(drawn)
            if chosen.random() < 0.2:
                alive[i].gone = True
                alive[i] = Request(alive[i].prompt, list(alive[i].output))


def row_by_scoring(model: AlignedModel, params: SamplingParams, prompt: list[int], answer: list[int]) -> list[float]:
    """The whole row behind all but the last token of an answer, by scoring each token in its place."""
    scores = model.score([prompt] * V, [[*answer[:-1], token] for token in range(V)], params)
    return [score.aligned[-1] for score in scores]


@pytest.mark.parametrize("seed", range(3))
def test_rules_that_look_back_have_their_rows_however_requests_come_and_go(seed):
    models = [TableLM.random(V, order=2, seed=10 + seed, zeros=0.1), TableLM.random(V, order=2, seed=20 + seed)]
    run_vllm(25, random.Random(seed), Mixer(V), models)


@pytest.mark.parametrize(("rule", "rows"), [(Handover(), 2), (Tiring(token=2), 0)])
def test_a_memory_holds_no_more_than_its_own_rows(rule, rows):
    """And none for a rule that does not read log p̃: a view would keep the rows of a whole batch alive, on the device."""
    mixer, requests = Mixer(V), [Request([1], []) for _ in range(8)]
    for _ in range(3):
        hows = [Shaping(rule, (1.0,), Warp(), (Warp(),))] * 8
        mixer.mix(make_logits(8), range(8), [make_rows(1, 8)], hows, requests)
        for request in requests:
            request.output.append(1)
    for memory in mixer._recall._memories:
        held = [part for row in memory.rows for part in (row.logp, *row.context)]
        assert sum(part.untyped_storage().nbytes() for part in held) <= rows * V * 8 + 200


def test_a_memory_that_was_lost_is_said_and_begun_anew(caplog):
    how = Shaping(Tiring(token=2, doubled=False), (1.0,), Warp(), (Warp(),))
    first = Request([1], [2])
    logits, logq = make_logits(1), make_rows(1, 1)
    expected = torch.log_softmax(logits[:, :V] + logq / 2, -1)
    Mixer(V).mix(logits, [0], [logq], [how], [first])
    assert "log p̃ of 1 tokens is not known" in caplog.text
    assert_close(logits[:, :V], expected, atol=1e-5, rtol=0)
