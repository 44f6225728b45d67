"""Speculation changes no token: every draft length and every rule, with drafts from an aligner, a model and the text.

The reference is written here from the definitions: one request at a time, one position at a time, rows recomputed from the
whole prefix, no cache, no batch, and the coupled draw in plain Python.
"""

import dataclasses
import math
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import pytest
import torch

from statistics_of import fits
from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.noise import uniforms
from trimtab.core.rules import parse_rule
from trimtab.models.aligner import Manifest
from trimtab.models.table import TableLM, enumerate_sequences

V = 7
PROPOSAL = TableLM.random(V, order=2, seed=0, zeros=0.1)
ALIGNERS = [TableLM.random(V, order=2, seed=1), TableLM.random(V, order=1, seed=2)]
DRAFT = TableLM.random(V, order=2, seed=3)
RULES = ["product", "geometric", "nucleus", "kl_gate(tau=0.5)", "mixture", "gate(rule=mixture, by=entropy, tau=1.2)"]
DRAFTS: list[Any] = ["aligner", "ngram", "none", DRAFT]
IDS = ["aligner", "ngram", "none", "model"]


def model(length: int | None, draft: Any = "aligner", aligners: int = 1, **settings: Any) -> AlignedModel:
    given = {"eos_token_ids": [EOS], "num_speculative_tokens": length, "draft": draft} | settings
    return AlignedModel(PROPOSAL, ALIGNERS[:aligners], **given)


def icdf(mass: list[float], u: float) -> int:
    cumulative = list(accumulate(mass))
    return min(bisect_right(cumulative, u * cumulative[-1]), max(i for i, m in enumerate(mass) if m > 0))


def reference(
    prompt: list[int], seed: int, count: int, rule: str, draft: Any, aligners: int = 1, temperature: float = 1.0
) -> list[int]:
    """Tokens by the definition of the coupled draw (RAM.md), from probabilities in plain Python."""
    tokens: list[int] = []
    parsed = parse_rule(rule)
    weights = list(parsed.default_weights(aligners))
    while len(tokens) < count and (not tokens or tokens[-1] != EOS):
        prefix = prompt + tokens
        logqs = [table.row(prefix) for table in ALIGNERS[:aligners]]
        row = parsed(PROPOSAL.row(prefix), logqs, weights) / temperature
        p = row.softmax(-1).tolist()
        u = uniforms([seed], [0], [len(tokens)], 1, 3)[0, 0].tolist()
        if draft in ("ngram", "none"):  # what is looked up plays no part
            tokens.append(icdf(p, u[2]))
            continue
        drafting = ALIGNERS[0] if draft == "aligner" else draft
        sharpness = parsed.draft_temperature if draft == "aligner" else 1.0
        q = (drafting.row(prefix) / (sharpness * temperature)).softmax(-1).tolist()
        drafted = icdf(q, u[0])
        if u[1] < p[drafted] / q[drafted]:
            tokens.append(drafted)
            continue
        excess = [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]
        tokens.append(icdf(excess if any(excess) else p, u[2]))
    return tokens


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_tokens_are_those_of_the_definition_for_every_draft_length(rule, draft):
    prompts = [[1], [2, 3], [6, 5, 4, 6, 5]]
    expected = [reference(prompt, 40 + i, 14, rule, draft) for i, prompt in enumerate(prompts)]
    params = [SamplingParams(max_tokens=14, seed=40 + i, rule=rule) for i in range(3)]
    for length in (0, 1, 2, 3, 5, 16, None):
        got = model(length, draft).generate(prompts, params)
        assert [c.tokens for c in got] == expected, length


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_several_aligners_and_a_temperature(temperature):
    expected = reference([3], 8, 12, "product", "aligner", aligners=2, temperature=temperature)
    for length in (0, 4):
        params = SamplingParams(max_tokens=12, seed=8, temperature=temperature)
        assert model(length, aligners=2).generate([[3]], params)[0].tokens == expected


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.6},
    {"repetition_penalty": 3.0, "ignore_eos": True},
    {"repetition_penalty": 0.6, "temperature": 0.7, "top_p": 0.9},
    {"logit_bias": {2: 1.5, EOS: -2.0}, "top_k": 4},
    {"min_p": 0.15, "proposal_top_p": 0.8, "aligner_temperature": 0.6},
    {"stop_token_ids": [4], "ignore_eos": True},
    {"rule": "nucleus", "proposal_top_p": 0.7},
    {"rule": "nucleus(force_eos=True)", "proposal_temperature": 0.5},
    {"rule": "kl_gate(tau=0.4)", "top_p": 0.95},
    {"rule": "candidates(n=3)"},
    {"rule": "mixture", "weight": 0.3, "proposal_top_p": 0.9},
    {"rule": "gate(rule=product, by=max_p, tau=0.4)", "temperature": 0.8},
    {"weight": -0.7},
    {"weight": 0.0},
]


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
def test_every_knob_gives_the_same_tokens_at_every_draft_length_in_any_batch(draft):
    """History-dependent processors see each draft position's own prefix; stops inside a run discard the rest."""
    params = [SamplingParams(seed=i, max_tokens=20, n=2, **s) for i, s in enumerate(SETTINGS)]
    prompts = [[1 + i % 6] * (1 + i % 3) for i in range(len(params))]
    expected = [c.tokens for c in model(0, draft).generate(prompts, params)]
    for length in (1, 3, 6, None):
        assert [c.tokens for c in model(length, draft).generate(prompts, params)] == expected, length
        alone = [c.tokens for p, s in zip(prompts, params, strict=True) for c in model(length, draft).generate([p], s)]
        assert alone == expected, length


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
def test_greedy_requests_alone_get_the_same_tokens_at_every_draft_length(draft):
    """Among themselves they need no rows and no draft for the bonus position; beside one that samples they do."""
    settings: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.6}, {"logit_bias": {2: 1.5}, "rule": "nucleus"}]
    params = [
        SamplingParams(seed=i, max_tokens=15 + i, n=2, temperature=0, ignore_eos=True, **s) for i, s in enumerate(settings)
    ]
    prompts = [[1], [2, 3], [6, 5, 4, 6, 5]]
    samples, prompt = SamplingParams(seed=7, max_tokens=9, ignore_eos=True), [4, 4]
    expected = [reference(prompts[0], 0, 15, "product", draft, temperature=1e-9)] * 2
    for length in (0, 1, 2, 5, None):
        found = [c.tokens for c in model(length, draft, max_num_seqs=4).generate(prompts, params)]
        assert found[:2] == expected
        beside = [c.tokens for c in model(length, draft).generate([*prompts, prompt], [*params, samples])]
        assert beside[:-1] == found, length


def test_a_drafter_reads_a_draft_that_stayed_with_the_next_one():
    """Greedily it drafts for no bonus position, and so has not read its last draft. Where nothing else is drafted, it does."""
    read: list[int] = []

    class Counting(TableLM):
        def extend(self, state, tokens, counts):
            read.append(sum(counts))
            return super().extend(state, tokens, counts)

    for length, passes in ((0, [1, 1, 1]), (1, [1, 2, 2]), (3, [1, 1, 1, 2, 1, 1, 2, 1, 1])):
        drafter = Counting(PROPOSAL.table)
        same = AlignedModel(PROPOSAL, [], draft=drafter, num_speculative_tokens=length)
        same.generate([[1, 2]], SamplingParams(max_tokens=1 + 3 * (length + 1), temperature=0, ignore_eos=True))
        assert same.pace.tally.acceptance == (1.0 if length else None)
        assert read == [2, *passes], "the prompt, then a pass for each draft"
        read.clear()


def test_log_probabilities_do_not_depend_on_the_draft_length():
    params = SamplingParams(seed=3, max_tokens=25, ignore_eos=True, logprobs=True, rule="kl_gate(tau=0.5)")
    stepwise, drafted = (model(length).generate([[1]], params)[0] for length in (0, 4))
    assert drafted == stepwise
    assert 0 < stepwise.fallbacks < 25


def test_a_draft_that_is_the_target_is_always_accepted():
    """The proposal aligned by nobody, drafted for by itself: every draft stays; after the first token, k + 1 come at a time."""
    same = AlignedModel(PROPOSAL, [], draft=PROPOSAL, num_speculative_tokens=3)
    same.generate([[1]], SamplingParams(max_tokens=1 + 5 * 4, seed=0))
    assert same.pace.tally.acceptance == 1.0
    assert (same.pace.tally.calls, same.pace.tally.tokens) == (1 + 5, 1 + 5 * 4)
    worse = AlignedModel(PROPOSAL, [], draft=DRAFT, num_speculative_tokens=3)
    worse.generate([[1]], SamplingParams(max_tokens=200, seed=0))
    assert 0.2 < worse.pace.tally.acceptance < 0.9


def law(rule: str) -> dict[tuple[int, ...], float]:
    parsed = parse_rule(rule)
    return enumerate_sequences(
        lambda prefix: parsed(PROPOSAL.row(prefix), [ALIGNERS[0].row(prefix)], parsed.default_weights(1)), [5], 3, [EOS]
    )


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_law_of_samples_is_the_rules(rule, draft):
    drawn = model(3, draft, max_num_seqs=1000).generate([[5]], SamplingParams(n=6000, seed=1, max_tokens=3, rule=rule))
    assert fits([tuple(c.tokens) for c in drawn], law(rule)) > 1e-3


def test_a_planted_wrong_residual_is_caught(monkeypatch):
    """Recovering from p instead of (p − q)⁺: the chi-square sees it at once."""
    monkeypatch.setattr("trimtab.core.speculation._excess", lambda p, q: p)
    drawn = model(3, max_num_seqs=1000).generate([[5]], SamplingParams(n=6000, seed=1, max_tokens=3))
    assert fits([tuple(c.tokens) for c in drawn], law("product")) < 1e-9


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("draft", ["aligner", "ngram", "model"])
def test_float32_models_give_the_same_tokens_at_every_draft_length(kind, draft):
    loaded = [tiny_model(kind, 28, seed=seed, spread=0.3) for seed in range(3)]
    requests = [
        ("the quick brown", {"max_tokens": 24}),
        ("of", {"max_tokens": 20, "rule": "geometric", "temperature": 0.8}),
        ("zz top", {"max_tokens": 22, "rule": "nucleus", "proposal_top_p": 0.8, "repetition_penalty": 1.2}),
        ("a", {"max_tokens": 30, "rule": "kl_gate(tau=1.0)", "stop": ["e", "ab"]}),
        ("lazy dog", {"max_tokens": 24, "temperature": 0}),
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
        found.append([(c.tokens, c.text, c.finish_reason) for c in aligned.generate(texts, params)])
    assert all(other == found[0] for other in found[1:])
    assert max(len(tokens) for tokens, _, _ in found[0]) >= 24


def test_a_request_that_fills_the_context_drafts_no_further():
    """The last tokens of a 64-token context: drafts would have no place to stand."""
    pair = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(2)]
    params = SamplingParams(max_tokens=500, seed=0, ignore_eos=True)
    whole = [
        AlignedModel.from_pretrained(*pair, tokenizer=tiny_tokenizer(), num_speculative_tokens=k).generate("abc", params)[0]
        for k in (0, 8)
    ]
    assert whole[0].tokens == whole[1].tokens
    assert len(whole[0].tokens) == 61


def test_a_stop_text_inside_an_accepted_run_ends_it_there():
    proposal = tiny_model("llama", 28, seed=0, spread=0.3)
    aligned = AlignedModel.from_pretrained(proposal, draft=proposal, tokenizer=tiny_tokenizer(), num_speculative_tokens=8)
    params = SamplingParams(max_tokens=30, seed=0, ignore_eos=True)
    free = aligned.generate("abc", params)[0]
    stop = free.text[4:6]
    last = next(
        t for t in range(len(free.tokens)) if stop in aligned.tokenizer.decode(free.tokens[: t + 1]).replace("<eos>", "")
    )
    events = list(aligned.stream("abc", dataclasses.replace(params, stop=[stop])))
    assert events[-1].completion.text == free.text[: free.text.find(stop)]
    assert [event.token for event in events] == events[-1].completion.tokens == free.tokens[: last + 1]


def test_a_sick_draft_model_is_no_reason_to_fail_but_a_sick_aligner_is():
    nan = TableLM(torch.zeros(V + 1, V, dtype=torch.float64))
    nan.table = torch.full_like(nan.table, math.nan)
    drafted = AlignedModel(PROPOSAL, [], draft=nan, num_speculative_tokens=3).generate(
        [[1]], SamplingParams(max_tokens=9, seed=0)
    )
    assert len(drafted[0].tokens) == 9
    (dead,) = AlignedModel(PROPOSAL, [nan], num_speculative_tokens=3).generate([[1]], SamplingParams(max_tokens=9, seed=0))
    assert (dead.finish_reason, dead.tokens) == ("error", [])
    assert dead.error.startswith("aligner 0 gives NaN probabilities after 0 tokens")


def residual_manifest(**fields):
    return Manifest(vocabulary="sha256:x", **{"objective": "likelihood", "rule": "product"} | fields)


@pytest.mark.parametrize(
    ("manifests", "draft", "drafter"),
    [
        (None, None, "aligner"),
        ([None, None], None, "aligner"),
        ([residual_manifest(), None], None, "ngram"),
        ([None, residual_manifest()], None, "aligner"),
        ([residual_manifest(rule="geometric"), None], None, "aligner"),
        ([residual_manifest(objective="sft"), None], None, "aligner"),
        ([residual_manifest(), None], "aligner", "aligner"),
    ],
)
def test_the_text_drafts_for_a_residual_unless_somebody_is_named(manifests, draft, drafter):
    """Its own drafts are rarely accepted; the law is the same either way, and so are the tokens of whoever drafts."""
    proposal, *aligners = (TableLM.random(5, seed=i) for i in range(3))
    model = AlignedModel(proposal, aligners, manifests=manifests, draft=draft, rule="product", weight=[1.0, 0.5])
    assert model.models.drafter.name == drafter
    assert model.drafter == ("none" if drafter == "ngram" else drafter)
    again = AlignedModel(proposal).with_aligners(aligners, manifests) if draft is None else model
    assert again.models.drafter.name == drafter
