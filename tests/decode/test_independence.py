"""A request's completions do not depend on its neighbours: bit for bit on tables, the same tokens on float32 models.

Noise is a function of (seed, completion, position), and every step of decoding works row by row. So what a request gets in
any batch, in any order and under any `max_num_seqs` must *equal* what it gets alone: tokens, text and log-probabilities.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Completion, SamplingParams, TokenEvent
from trimtab.models.table import TableLM

V = 7
PROPOSAL = TableLM.random(V, order=2, seed=0, zeros=0.15)
ALIGNERS = [TableLM.random(V, order=2, seed=1), TableLM.random(V, order=1, seed=2)]


def table_model(max_num_seqs: int = 32) -> AlignedModel:
    return AlignedModel(PROPOSAL, ALIGNERS, eos_token_ids=[EOS], max_num_seqs=max_num_seqs)


MIXED: list[tuple[list[int], SamplingParams]] = [
    ([1], SamplingParams(seed=0, max_tokens=12, logprobs=True)),
    ([2, 3, 4, 5, 6, 1], SamplingParams(seed=0, max_tokens=12)),
    ([1], SamplingParams(seed=1, max_tokens=30, ignore_eos=True, rule="nucleus", proposal_top_p=0.8, logprobs=True)),
    ([4, 4], SamplingParams(seed=-5, max_tokens=9, rule="geometric", weight=[0.3, 0.3], n=3, temperature=0.7)),
    ([6] * 10, SamplingParams(seed=2, max_tokens=20, rule="kl_gate(tau=0.6)", top_p=0.9, aligner_temperature=0.5)),
    ([3, 1], SamplingParams(seed=2, max_tokens=20, temperature=0, repetition_penalty=1.5, logprobs=True)),
    ([3, 1], SamplingParams(seed=3, max_tokens=8, rule="candidates(n=2)", weight=[1.0, -0.5], n=2)),
    (
        [5],
        SamplingParams(seed=3, max_tokens=25, ignore_eos=True, top_k=3, logit_bias={2: 1.0, 0: -1.0}, repetition_penalty=1.2),
    ),
    ([5], SamplingParams(seed=4, max_tokens=1, min_p=0.2, proposal_top_k=4, proposal_temperature=1.7, logprobs=True)),
    ([2, 2], SamplingParams(seed=2**50, max_tokens=15, weight=[0.0, 2.0], top_k=5, top_p=0.95, min_p=0.01, n=2, logprobs=True)),
    ([6], SamplingParams(seed=5, max_tokens=60, ignore_eos=True, repetition_penalty=4.0)),
    ([1, 2, 3], SamplingParams(seed=9, max_tokens=70, ignore_eos=True, stop_token_ids=[4], temperature=1.3)),
]


def together(model: AlignedModel, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[list[Completion]]:
    """The completions of each request when all are in one call."""
    flat = iter(model.generate([prompt for prompt, _ in requests], [params for _, params in requests]))
    return [[next(flat) for _ in range(params.n)] for _, params in requests]


def alone(model: AlignedModel, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[list[Completion]]:
    return [model.generate([prompt], params) for prompt, params in requests]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5, 100])
def test_a_mixed_batch_of_tables_is_each_request_alone_bit_for_bit(max_num_seqs):
    assert together(table_model(max_num_seqs), MIXED) == alone(table_model(1), MIXED)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_prompts_changes_nothing(seed):
    order = random.Random(seed).sample(range(len(MIXED)), len(MIXED))
    shuffled = together(table_model(6), [MIXED[i] for i in order])
    expected = together(table_model(6), MIXED)
    assert shuffled == [expected[i] for i in order]


def test_candidates_of_different_number_share_a_batch():
    requests = [([1], SamplingParams(seed=i, max_tokens=10, rule=f"candidates(n={n})")) for i, n in enumerate([1, 2, 5, 8])]
    assert together(table_model(), requests) == alone(table_model(), requests)


@st.composite
def a_request(draw: st.DrawFn) -> tuple[list[int], SamplingParams]:
    """Any prompt with any settings: those of the row only where there is a row."""
    prompt = draw(st.lists(st.integers(1, V - 1), min_size=1, max_size=6))
    wanted: dict[str, Any] = {
        "seed": draw(st.integers(-(2**64), 2**64)),
        "max_tokens": draw(st.integers(1, 12)),
        "n": draw(st.integers(1, 3)),
        "ignore_eos": draw(st.booleans()),
        "stop_token_ids": draw(st.lists(st.integers(0, V - 1), max_size=1)),
        "weight": draw(st.none() | st.lists(st.floats(-1, 2), min_size=2, max_size=2)),
        "proposal_temperature": draw(st.none() | st.floats(0.3, 3)),
        "proposal_top_k": draw(st.none() | st.integers(-1, V + 2)),
        "proposal_top_p": draw(st.none() | st.floats(0.05, 1)),
        "aligner_temperature": draw(st.none() | st.floats(0.3, 3)),
    }
    rules = ["product", "geometric", "nucleus", "nucleus(force_eos=True)", "kl_gate(tau=0.4)", "kl_gate", "candidates(n=3)"]
    rules += ["mixture", "nudge(tau=0.5)", "gate(rule=mixture, by=entropy)"]
    wanted["rule"] = draw(st.none() | st.sampled_from(rules))
    if "mixture" in (wanted["rule"] or ""):
        wanted["weight"] = draw(st.none() | st.lists(st.floats(0, 0.5), min_size=2, max_size=2))
    if wanted["rule"] != "candidates(n=3)":
        wanted |= {
            "temperature": draw(st.sampled_from([0, 0.5, 1.0, 1.7])),
            "top_k": draw(st.integers(-1, V)),
            "top_p": draw(st.sampled_from([0.3, 0.9, 1.0])),
            "min_p": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "repetition_penalty": draw(st.sampled_from([0.7, 1.0, 4.0])),
            "logit_bias": draw(st.dictionaries(st.integers(0, V - 1), st.floats(-5, 5), max_size=2)),
            "logprobs": draw(st.booleans()),
        }
    return prompt, SamplingParams(**wanted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(a_request(), min_size=2, max_size=5), st.integers(1, 8))
def test_any_batch_of_tables_is_each_request_alone_bit_for_bit(requests, max_num_seqs):
    assert together(table_model(max_num_seqs), requests) == alone(table_model(), requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_rows_are_independent_too(dtype):
    """Long sums and sorts are vectorised, and must be so in the same way for one row as for many."""
    proposal, aligner = (TableLM(TableLM.random(600, seed=seed, scale=2).table.to(dtype)) for seed in (0, 1))
    shapes = [
        {"top_p": 0.9},
        {"rule": "nucleus", "proposal_top_p": 0.7},
        {"rule": "kl_gate(tau=1.7)", "temperature": 0.8},
        {"rule": "gate(rule=mixture, by=entropy, tau=5.0)", "weight": 0.4},
        {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.3},
        {"weight": 0.5, "proposal_temperature": 0.7},
    ]
    requests = [([i + 1], SamplingParams(seed=i, max_tokens=20, logprobs=True, **shape)) for i, shape in enumerate(shapes * 3)]
    batched = together(AlignedModel(proposal, [aligner]), requests)
    assert batched == alone(AlignedModel(proposal, [aligner], max_num_seqs=1), requests)
    assert batched[0][0].logprobs is not None


def test_completions_together_are_the_completions_alone():
    """Completion i is the same whether it is the last of i + 1 or one of many, and whatever is asked beside it."""
    params = SamplingParams(seed=3, max_tokens=15, logprobs=True, temperature=0.8)
    many = table_model().generate([[1, 2]], dataclasses.replace(params, n=6))
    for count in range(1, 7):
        assert table_model(2).generate([[1, 2]], dataclasses.replace(params, n=count)) == many[:count]
    beside = table_model().generate([[4], [1, 2], [1]], dataclasses.replace(params, n=6))
    assert beside[6:12] == many


def test_equal_requests_get_equal_completions():
    first, second = together(table_model(), [MIXED[3], MIXED[3]])
    assert first == second


def test_a_completion_does_not_depend_on_how_long_it_may_get():
    short, long = (table_model().generate([[1]], SamplingParams(seed=0, max_tokens=m, ignore_eos=True))[0] for m in (5, 200))
    assert short.tokens == long.tokens[:5]
    assert len(set(long.tokens[100:])) > 1, "noise goes on beyond one block"


def test_what_is_asked_for_does_not_change_what_is_drawn():
    """Log-probabilities, later stops and the end of sequence: none of them is a knob of the law."""
    params = SamplingParams(seed=6, max_tokens=40, ignore_eos=True)
    plain = table_model().generate([[1]], params)[0].tokens
    assert table_model().generate([[1]], dataclasses.replace(params, logprobs=True))[0].tokens == plain
    stopped = table_model().generate([[1]], dataclasses.replace(params, ignore_eos=False))[0].tokens
    assert stopped == plain[: len(stopped)]
    assert stopped[-1] == EOS


def by_completion(events: Iterable[TokenEvent]) -> dict[tuple[int, int], list[TokenEvent]]:
    """Events of each completion, in order; whose turn it is when is a matter of speed."""
    sorted_out: dict[tuple[int, int], list[TokenEvent]] = {}
    for event in events:
        sorted_out.setdefault((event.prompt_index, event.index), []).append(event)
    return sorted_out


def test_streams_do_not_disturb_each_other():
    model = table_model()
    prompts, params = zip(*MIXED, strict=True)
    expected = by_completion(model.stream(list(prompts), list(params)))
    first, second = model.stream(list(prompts), list(params)), model.stream(list(prompts), list(params))
    abandoned = model.stream([[1]], SamplingParams(seed=0))
    next(abandoned)
    pairs = list(itertools.zip_longest(first, second))
    abandoned.close()
    assert by_completion(a for a, _ in pairs if a) == expected
    assert by_completion(b for _, b in pairs if b) == expected


def test_torchs_global_generator_is_neither_read_nor_moved():
    before = torch.random.get_rng_state()
    out = together(table_model(), MIXED)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    random.seed(123)
    try:
        assert together(table_model(), MIXED) == out
    finally:
        torch.random.set_rng_state(before)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest) -> AlignedModel:
    return AlignedModel.from_pretrained(
        tiny_model(request.param, 28, spread=0.3),
        tiny_model("llama", 28, seed=1, spread=0.3),
        tokenizer=tiny_tokenizer(),
    )


TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("a", {"max_tokens": 20}),
    ("the quick brown fox jumps over", {"max_tokens": 5, "rule": "geometric", "weight": 0.4}),
    ("of", {"max_tokens": 25, "rule": "nucleus", "proposal_top_p": 0.8, "n": 2}),
    ("lazy dog", {"max_tokens": 12, "temperature": 0, "repetition_penalty": 1.2}),
    ("zz top", {"max_tokens": 18, "rule": "kl_gate(tau=0.5)", "top_k": 5, "stop": ["e", "ab"]}),
    ("no", {"max_tokens": 9, "rule": "candidates(n=4)"}),
]


def test_float32_models_give_the_same_tokens_alone_and_in_a_batch(pair):
    requests = [(text, SamplingParams(seed=i, ignore_eos=True, **asked)) for i, (text, asked) in enumerate(TEXTS)]
    expected = alone(pair, requests)
    for order in (range(6), (3, 5, 0, 2, 4, 1)):
        got = together(pair, [requests[i] for i in order])
        assert [[(c.tokens, c.text) for c in group] for group in got] == [
            [(c.tokens, c.text) for c in expected[i]] for i in order
        ]
    assert max(len(c.tokens) for group in expected for c in group) == 25


def test_float32_completions_are_the_same_alone_and_together(pair):
    params = SamplingParams(seed=8, max_tokens=16, ignore_eos=True, logprobs=True)
    many = pair.generate("some text", dataclasses.replace(params, n=5))
    for count in (1, 3):
        fewer = pair.generate("some text", dataclasses.replace(params, n=count))
        assert [c.tokens for c in fewer] == [c.tokens for c in many[:count]]
        for one, other in zip(fewer, many, strict=False):
            assert one.logprobs.aligned == pytest.approx(other.logprobs.aligned, abs=5e-5)
