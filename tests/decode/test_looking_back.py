"""Rules that look at the text before their row keep their law, whatever drafts, whoever is beside them, and however it is read.

Their laws are enumerated by recursion from the definitions (`looking`).
"""

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch

from drafting import alone_and_together
from looking import Handover, Opening, Tiring, looking_law
from statistics_of import fits
from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import Product, Rule
from trimtab.decode.engine import Engine
from trimtab.decode.history import Histories
from trimtab.decode.scoring import score_in_steps
from trimtab.errors import InvalidOption
from trimtab.evaluate.distribution import trace
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM

V = 5
PROPOSAL, *ALIGNERS = [TableLM.random(V, order=2, seed=seed, zeros=0.15 if seed == 0 else 0.0) for seed in range(3)]
DRAFT = TableLM.random(V, order=1, seed=3)
RULES = [Handover(), Handover(tau=-0.9), Tiring(), Tiring(token=3, doubled=False), Opening()]
DRAFTS: list[Any] = ["aligner", "ngram", "none", DRAFT]
IDS = ["aligner", "ngram", "none", "model"]


def model(length: int | None = None, draft: Any = "aligner", aligners: int = 1, **settings: Any) -> AlignedModel:
    given = {"eos_token_ids": [EOS], "num_speculative_tokens": length, "draft": draft} | settings
    return AlignedModel(PROPOSAL, ALIGNERS[:aligners], **given)


@functools.cache
def law_of_three(rule: Rule) -> dict[tuple[int, ...], float]:
    return looking_law(rule, PROPOSAL, ALIGNERS[:1], [1.0], [3, 2], 3)


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_samples_have_the_law_and_the_same_tokens_at_every_draft_length(rule, draft):
    params = SamplingParams(n=1200, seed=5, max_tokens=3, rule=rule, weight=1.0)
    drawn = [c.tokens for c in model(0, draft, max_num_seqs=1000).generate([[3, 2]], params)]
    assert fits(map(tuple, drawn), law_of_three(rule)) > 1e-3
    others = [other for other in RULES if other != rule]
    assert min(fits(map(tuple, drawn), law_of_three(other)) for other in others) < 1e-6, "the test cannot tell laws apart"
    for length in (1, 2, 4):
        params = dataclasses.replace(params, n=200)
        assert [c.tokens for c in model(length, draft).generate([[3, 2]], params)] == drawn[:200], length


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_scores_are_the_law(rule):
    """With two aligners, warps of the rows, and pieces of any size."""
    warps: dict[str, Any] = {"proposal_temperature": 0.8, "proposal_top_p": 0.9, "aligner_temperature": 1.3}
    law = looking_law(rule, PROPOSAL, ALIGNERS, [0.7, -0.4], [1, 2], 3, warps=(0.8, 0.9, 1.3))
    aligned = model(rule=rule, weight=[0.7, -0.4], aligners=2, **warps)
    scores = aligned.score([[1, 2]] * len(law), [list(answer) for answer in law])
    for answer, score in zip(law, scores, strict=True):
        assert sum(score.aligned) == pytest.approx(law[answer], abs=1e-9)
    shaping = aligned.shaping(aligned.defaults)
    pairs = [([1, 2], list(answer)) for answer in law][:40]
    for step in (1, 2):
        pieces = score_in_steps(PROPOSAL, ALIGNERS, shaping, pairs, step=step)
        assert [s.aligned for s in returned(pieces)] == [s.aligned for s in scores[:40]]


def returned(pieces: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(pieces)
        except StopIteration as done:
            return done.value


MIXED = [
    ([1], {"rule": Handover(), "max_tokens": 12, "logprobs": True}),
    ([2, 3, 4, 1, 2, 1], {"rule": Tiring(), "max_tokens": 9, "n": 3}),
    ([1, 1], {"rule": "product", "max_tokens": 15, "logprobs": True}),
    ([4], {"rule": Handover(tau=-0.5), "max_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.3, "logprobs": True}),
    ([4, 4], {"rule": Tiring(token=3), "max_tokens": 14, "ignore_eos": True, "temperature": 0, "n": 2}),
    ([3], {"rule": Opening(), "max_tokens": 11, "ignore_eos": True, "proposal_top_p": 0.8, "logprobs": True}),
    ([2], {"rule": "kl_gate(tau=0.3)", "max_tokens": 8, "logprobs": True}),
    ([2, 2, 2], {"rule": "candidates(n=3)", "max_tokens": 8, "n": 2}),
    ([3, 1, 4, 1], {"rule": Handover(), "max_tokens": 20, "weight": 0.3, "ignore_eos": True, "n": 2, "temperature": 0.7}),
]
ASKED = [(prompt, SamplingParams(seed=i, **asked)) for i, (prompt, asked) in enumerate(MIXED)]


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
def test_a_mixed_batch_is_each_request_alone_bit_for_bit(draft):
    """In any order of coming, with prompts that are read in pieces, few at a time, and with some that are cancelled."""
    expected = alone_and_together(lambda length, **settings: model(length, draft, **settings), ASKED)
    draw = random.Random(1)
    for length in (0, 3):
        base = model(length, draft)
        engine = Engine(base.proposal, base.pace, max_num_seqs=5, max_num_batched_tokens=3)
        groups = []
        for i, (prompt, params) in enumerate(ASKED):
            groups.append(base.prepare(prompt, params, i))
            passing = base.prepare([3, 1], SamplingParams(rule=Tiring(), max_tokens=30, ignore_eos=True, seed=1))
            engine.submit([*groups[-1], *passing])
            for _ in range(draw.randrange(1, 4)):
                engine.step()
            engine.cancel(passing)
        while engine:
            engine.step()
            assert engine.failed == []
        assert [[s.tokens for s in group] for group in groups] == [[c.tokens for c in group] for group in expected]


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_what_is_generated_scores_as_it_was_drawn_and_streams_alike(rule, length):
    params = SamplingParams(max_tokens=25, seed=2, ignore_eos=True, rule=rule, weight=0.8, logprobs=True)
    aligned = model(length)
    (drawn,) = aligned.generate([[2, 1]], params)
    (score,) = aligned.score([[2, 1]], [drawn.tokens], params)
    assert (score.proposal, score.aligner, score.aligned) == (
        drawn.logprobs.proposal,
        drawn.logprobs.aligner,
        drawn.logprobs.aligned,
    )
    events = list(aligned.stream([[2, 1]], params))
    assert [event.token for event in events] == drawn.tokens
    assert [event.aligned for event in events] == drawn.logprobs.aligned


def test_a_mark_is_counted():
    """Once the base has taken over, every further token is its own; rules without a mark have no count."""
    for length in (0, 1, 4):
        params = SamplingParams(max_tokens=20, seed=4, ignore_eos=True, rule=Handover(), logprobs=True)
        (drawn,) = model(length).generate([[1]], params)
        logps = drawn.logprobs.proposal
        over = next(i for i in range(1, 20) if (logps[i - 1] + logps[i]) / 2 >= -1.5)
        assert drawn.fallbacks == 19 - over
        assert drawn.logprobs.aligned[over + 1 :] == logps[over + 1 :]
        (before,) = model(rule="nucleus").score([[1]], [drawn.tokens])
        assert drawn.logprobs.aligned[: over + 1] == before.aligned[: over + 1]
        assert model(length).generate([[1]], dataclasses.replace(params, rule=Tiring()))[0].fallbacks is None


@pytest.mark.parametrize("rule", [Tiring(), Opening()], ids=str)
def test_weight_0_and_no_aligner_are_the_proposal(rule):
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, rule=rule)
    nobody = model(0, "none", aligners=0)
    bare = nobody.generate([[1]], dataclasses.replace(params, rule="product"))[0].tokens
    assert nobody.generate([[1]], params)[0].tokens == bare
    for length in (0, 3):
        assert model(length, DRAFT).generate([[1]], dataclasses.replace(params, weight=0.0))[0].tokens == (
            model(0, DRAFT, aligners=0).generate([[1]], dataclasses.replace(params, rule="product"))[0].tokens
        )


def test_log_z_of_a_rule_that_weighs_tokens():
    """It is what log weight and log target differ by, and what the engine observes of it."""
    params = SamplingParams(max_tokens=12, seed=3, ignore_eos=True, rule=Tiring(), logprobs=True)
    (drawn,) = model(2).generate([[1]], params)
    (seen,) = trace(model(), [[1]], [drawn.tokens], params)
    state = 0
    for j, token in enumerate(drawn.tokens):
        before = [1, *drawn.tokens][j]
        factor = (2 if before == 2 else 1) / (1 + state)
        state += token == 1
        logw = drawn.logprobs.proposal[j] + factor * drawn.logprobs.aligner[j]
        assert seen.log_z[j] == pytest.approx(logw - drawn.logprobs.aligned[j], abs=1e-9)
    aligned = model(2)
    engine = Engine(aligned.proposal, aligned.pace, log_z_every=1)
    (sequence,) = aligned.prepare([1], params)
    engine.submit([sequence])
    while engine:
        engine.step()
    assert sequence.log_z
    assert all(any(value == pytest.approx(known, abs=1e-9) for known in seen.log_z) for value in sequence.log_z)


@pytest.mark.parametrize("draft", ["aligner", "ngram", "model"])
def test_float32_models_give_the_same_tokens_at_every_draft_length_and_with_prefixes(draft, monkeypatch):
    monkeypatch.setattr(HuggingFaceLM, "immutable", True)
    loaded = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(3)]
    requests = [
        ("the quick brown", {"max_tokens": 24, "rule": Handover(tau=-3.1)}),
        ("of", {"max_tokens": 20, "rule": Tiring(token=7)}),
        ("a long text that is taken over from what was read", {"max_tokens": 22, "rule": Opening(), "n": 2}),
        ("zz top", {"max_tokens": 24, "rule": "product"}),
        ("lazy dog", {"max_tokens": 24, "rule": Handover(tau=-3.2), "temperature": 0}),
    ]
    texts = [text for text, _ in requests]
    params = [SamplingParams(seed=i, ignore_eos=True, **asked) for i, (_, asked) in enumerate(requests)]
    found = []
    for length in (0, 1, 4, 7, None):
        aligned = AlignedModel.from_pretrained(
            loaded[0],
            loaded[1],
            tokenizer=tiny_tokenizer(),
            draft=loaded[2] if draft == "model" else draft,
            num_speculative_tokens=length,
        )
        found += [[(c.tokens, c.fallbacks) for c in aligned.generate(texts, params)] for _ in range(2)]
        assert aligned.prefixes.num_tokens > 0, "the second time, prompts are taken over"
    assert all(other == found[0] for other in found[1:])
    assert 0 < found[0][0][1] < 24


def test_keeping_what_rejected_drafts_led_to_is_caught(monkeypatch):
    """The planted mistake: the memory goes on behind all drafts, as if they had stayed."""
    params = SamplingParams(max_tokens=30, seed=5, ignore_eos=True, rule=Tiring(), n=8)
    right = [c.tokens for c in model(0).generate([[1]], params)]
    go_on = Histories.move_on
    monkeypatch.setattr(
        Histories, "move_on", lambda self, c, logp, tokens, n: go_on(self, c, logp, tokens, torch.full_like(n, tokens.shape[1]))
    )
    assert [c.tokens for c in model(3).generate([[1]], params)] != right


def test_rules_that_do_not_look_back_make_nothing(monkeypatch):
    def refuse(*args: Any) -> Any:
        raise AssertionError("no context is wanted")

    for name in ("first_context", "unroll", "follow_run"):
        monkeypatch.setattr(f"trimtab.decode.history.{name}", refuse)
    for length in (0, 3):
        assert len(model(length, rule=Product()).generate([[1]], SamplingParams(max_tokens=9, seed=0))) == 1
    with pytest.raises(AssertionError, match="no context is wanted"):
        model(3, rule=Tiring()).generate([[1]])


def test_without_a_text_there_is_nothing_to_look_at():
    logp, logq = PROPOSAL.row([1]), ALIGNERS[0].row([1])
    with pytest.raises(InvalidOption, match=r"rule 'tiring' looks at the text before a row, which is not to be had here"):
        Tiring()(logp, [logq], [1.0])
