"""`SamplingParams`: what is refused, what each knob does to the law, and how a request overrides the model.

The laws are enumerated here in plain Python from the definitions in the docstring of `SamplingParams`: penalty and bias first,
then temperature, top-k, top-p and min-p, each followed by normalisation. Nothing of `trimtab` takes part in the expectation
but the tables.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from statistics_of import chi_square
from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import Geometric
from trimtab.errors import InvalidOption, InvalidRequest, VocabularyMismatch
from trimtab.models.table import TableLM

V = 5
SAMPLES = 4000
Row = list[float]


def tables(aligners: int = 1) -> list[TableLM]:
    return [TableLM.random(V, order=1, seed=seed, scale=1.2) for seed in range(aligners + 1)]


def aligned(*, eos: Sequence[int] = (EOS,), aligners: int = 1, **settings: Any) -> AlignedModel:
    proposal, *rest = tables(aligners)
    return AlignedModel(proposal, rest, eos_token_ids=eos, **{"max_num_seqs": 1000, **settings})


def probabilities(table: TableLM, prefix: Sequence[int]) -> Row:
    return [math.exp(x) for x in table.table[prefix[-1]].tolist()]


def unit(row: Sequence[float]) -> Row:
    return [x / math.fsum(row) for x in row]


def product_row(prefix: Sequence[int]) -> Row:
    p, q = (probabilities(table, prefix) for table in tables())
    return unit([a * b for a, b in zip(p, q, strict=True)])


def enumerated(
    next_row: Callable[[list[int]], Row], prompt: list[int], length: int, eos: Sequence[int]
) -> dict[tuple[int, ...], float]:
    """Every completion with its probability."""
    law, growing = {}, {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for done, probability in growing.items():
            for token, step in enumerate(next_row([*prompt, *done])):
                (law if token in eos else longer)[(*done, token)] = probability * step
        growing = longer
    return law | growing


def knobs(
    row: Row,
    seen: Sequence[int] = (),
    *,
    penalty: float = 1.0,
    bias: dict[int, float] | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Row:
    """The sampling knobs on one row of probabilities: a log-probability times c is a power c, plus b is a factor exp(b)."""
    row = unit([x ** (penalty if v in seen else 1.0) * math.exp((bias or {}).get(v, 0.0)) for v, x in enumerate(row)])
    row = unit([x ** (1 / temperature) for x in row])
    if top_k > 0:
        row = unit([x if sum(y > x for y in row) < top_k else 0.0 for x in row])
    row = unit([x if math.fsum(y for y in row if y > x) < top_p else 0.0 for x in row])
    return unit([x if x >= min_p * max(row) else 0.0 for x in row])


def samples(model: AlignedModel, prompt: list[int], **settings: Any) -> Counter[tuple[int, ...]]:
    params = SamplingParams(**{"n": SAMPLES, "seed": 11, "max_tokens": 2, **settings})
    return Counter(tuple(c.tokens) for c in model.generate([prompt], params))


# ---- what is refused


BAD = [
    ("max_tokens", [0, -1, 1.0, "5", True, None]),
    ("n", [0, -3, 2.0, False, None]),
    ("temperature", [-0.1, math.nan, math.inf, 10**400, "1", None, True]),
    ("top_p", [0, 0.0, -0.5, 1.01, math.nan, None]),
    ("top_k", [-2, 1.5, "3", None]),
    ("min_p", [-0.01, 1.5, math.nan, None]),
    ("repetition_penalty", [0, -1.0, math.inf, None]),
    ("seed", [1.0, "7", True]),
    ("stop", ["", ["a", ""], [5], 5, b"x"]),
    ("stop_token_ids", [[-1], ["3"], [1.0], [True], 5]),
    ("logit_bias", [{-1: 1.0}, {"3": 1.0}, {3: math.inf}, {3: math.nan}, {3: "1"}, {3: None}, [3]]),
    ("ignore_eos", ["no", None]),
    ("logprobs", ["yes", 5]),
    ("rule", ["no_such_rule", "product(x=1)", "candidates(n=0)", "kl_gate(tau=-1)", "kl_gate(tau=0.1", 5]),
    ("weight", [math.nan, math.inf, True, "1", [1.0, None], [math.inf]]),
    ("proposal_temperature", [0, -1.0, math.inf, "1"]),
    ("proposal_top_k", [-2, 1.5, True]),
    ("proposal_top_p", [0, 1.2, math.nan]),
    ("aligner_temperature", [0.0, -2, math.nan]),
]


CASES = [(name, value) for name, values in BAD for value in values]


@pytest.mark.parametrize(("name", "value"), CASES, ids=lambda x: repr(x)[:20])
def test_a_bad_value_is_refused_by_the_name_of_its_field(name, value):
    with pytest.raises(InvalidRequest, match=f"^{name}"):
        SamplingParams(**{name: value})


def test_the_edges_of_every_range_are_allowed():
    SamplingParams(max_tokens=1, n=1, temperature=0, top_p=1, top_k=-1, min_p=1, repetition_penalty=0.01, seed=-(2**70))
    SamplingParams(top_k=0, min_p=0, stop_token_ids=[0], logit_bias={0: -100}, weight=-1, stop=["a", "b"], rule=Geometric())
    SamplingParams(weight=[0.0, 2], proposal_top_k=-1, proposal_top_p=1.0, proposal_temperature=0.01, aligner_temperature=9)
    assert SamplingParams(stop="ab").stop == ("ab",), "a text is one stop, not one for each letter"


def test_params_do_not_change_afterwards():
    with pytest.raises(AttributeError):
        SamplingParams().temperature = 2.0


def test_what_depends_on_the_model_is_checked_by_the_model():
    model = aligned()
    for field, settings in {
        "logit_bias": {"logit_bias": {V: 1.0}},
        "stop_token_ids": {"stop_token_ids": [1, V]},
        "stop": {"stop": "a"},
        "weight": {"weight": [1.0, 1.0]},
    }.items():
        with pytest.raises(InvalidRequest, match=field):
            model.generate([[1]], SamplingParams(**settings))
    model.generate([[1]], SamplingParams(logit_bias={V - 1: 1.0}, stop_token_ids=[V - 1], weight=[1.0]))


def test_there_is_one_params_for_all_prompts_or_one_for_each():
    model = aligned()
    each = [SamplingParams(max_tokens=m, ignore_eos=True, seed=0) for m in (2, 5)]
    assert [len(c.tokens) for c in model.generate([[1], [2]], each)] == [2, 5]
    assert [len(c.tokens) for c in model.generate([[1], [2]], each[1])] == [5, 5]
    assert len(model.generate([[1], [2]])) == 2
    for wrong in (each[:1], [*each, each[0]], []):
        with pytest.raises(InvalidRequest, match=f"2 prompts, but {len(wrong)} sampling parameters"):
            model.generate([[1], [2]], wrong)


# ---- n and seed


def test_n_completions_stand_together_in_order_and_differ():
    out = aligned().generate([[1], [2]], [SamplingParams(n=3, seed=1), SamplingParams(n=2, seed=1)])
    assert [(c.index, c.prompt_tokens) for c in out] == [(0, 1), (1, 1), (2, 1), (0, 1), (1, 1)]
    long = aligned().generate([[1, 2]], SamplingParams(n=20, seed=1, max_tokens=20, ignore_eos=True))
    assert len({tuple(c.tokens) for c in long}) == 20, "20 completions of 20 tokens coincide with probability below 1e-6"


def test_a_seed_reproduces_and_another_one_does_not():
    model = aligned()
    first, again, other = (
        [c.tokens for c in model.generate([[1]], SamplingParams(seed=seed, n=4, max_tokens=20, ignore_eos=True))]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_seeds_may_be_zero_negative_or_large():
    out = [
        aligned().generate([[1]], SamplingParams(seed=seed, max_tokens=30, ignore_eos=True))[0]
        for seed in (0, -1, -2, 2**40, 2**63 + 5)
    ]
    assert [c.seed for c in out] == [0, -1, -2, 2**40, 2**63 + 5]
    assert len({tuple(c.tokens) for c in out}) == 5


def test_without_a_seed_the_completion_says_how_to_have_it_again():
    model = aligned()
    params = SamplingParams(n=2, max_tokens=30, ignore_eos=True)
    (first, second), others = model.generate([[1]], params), model.generate([[1]], params)
    assert first.seed == second.seed, "one request has one seed"
    assert first.seed != others[0].seed
    assert first.tokens != others[0].tokens
    again = model.generate([[1]], SamplingParams(n=2, max_tokens=30, ignore_eos=True, seed=first.seed))
    assert again == [first, second]


def test_each_prompt_without_a_seed_draws_its_own():
    out = aligned().generate([[1], [1]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert out[0].seed != out[1].seed
    assert out[0].tokens != out[1].tokens


# ---- where a completion ends


def test_max_tokens_counts_the_end_of_sequence():
    """A chain that steps 1 → 2 → 3 → 0: with an end at 0 the third token is the last, and it counts."""
    steps = TableLM(table_of({1: 2, 2: 3, 3: 0, 0: 1}))
    model = AlignedModel(steps, eos_token_ids=[0])
    for limit, tokens, reason in [
        (1, [2], "length"),
        (2, [2, 3], "length"),
        (3, [2, 3, 0], "stop"),
        (4, [2, 3, 0], "stop"),
    ]:
        out = model.generate([[1]], SamplingParams(max_tokens=limit))[0]
        assert (out.tokens, out.finish_reason) == (tokens, reason)


def table_of(steps: dict[int, int]) -> torch.Tensor:
    """The logits of a chain in which `steps[v]` always follows v, with nothing else possible."""
    logits = torch.full((V + 1, V), -math.inf, dtype=torch.float64)
    for v in range(V + 1):
        logits[v, steps.get(v, 0)] = 0.0
    return logits


def test_any_end_of_sequence_id_ends_and_so_does_any_stop_id():
    steps = TableLM(table_of({1: 2, 2: 3, 3: 4, 4: 0, 0: 1}))

    def ends(eos: Sequence[int], **settings: Any) -> tuple[list[int], str]:
        out = AlignedModel(steps, eos_token_ids=eos).generate([[1]], SamplingParams(max_tokens=6, **settings))[0]
        return out.tokens, out.finish_reason

    assert ends([0, 3]) == ([2, 3], "stop")
    assert ends([0, 4]) == ([2, 3, 4], "stop")
    assert ends([0]) == ([2, 3, 4, 0], "stop")
    assert ends([]) == ([2, 3, 4, 0, 1, 2], "length")
    assert ends([0], stop_token_ids=[3, 4]) == ([2, 3], "stop")
    assert ends([0], ignore_eos=True) == ([2, 3, 4, 0, 1, 2], "length")
    assert ends([0], ignore_eos=True, stop_token_ids=[1]) == ([2, 3, 4, 0, 1], "stop")
    assert ends([0], ignore_eos=True, stop_token_ids=[0]) == ([2, 3, 4, 0], "stop"), "asked for by name, it ends"


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_context_of_the_smaller_model_is_the_limit(kind):
    places = {"gpt2": "n_positions"}.get(kind, "max_position_embeddings")
    model = AlignedModel.from_pretrained(tiny_model("llama", V), tiny_model(kind, V, seed=1, **{places: 12}))
    assert model.max_length == 12
    out = model.generate([[1] * 9], SamplingParams(max_tokens=50, ignore_eos=True, seed=0))[0]
    assert (len(out.tokens), out.finish_reason) == (3, "length")
    out = model.generate([[1] * 11], SamplingParams(max_tokens=50, ignore_eos=True, seed=0))[0]
    assert (len(out.tokens), out.finish_reason) == (1, "length")
    for length in (12, 13, 40):
        with pytest.raises(InvalidRequest, match=rf"prompts\[1\] has {length} tokens.*context holds 12"):
            model.generate([[1], [1] * length])


# ---- the law of each knob


LAWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # what is asked for, and what that is in `knobs`
    "temperature": ({"temperature": 0.6}, {"temperature": 0.6}),
    "hot": ({"temperature": 3.0}, {"temperature": 3.0}),
    "top_k": ({"top_k": 2}, {"top_k": 2}),
    "top_p": ({"top_p": 0.7}, {"top_p": 0.7}),
    "min_p": ({"min_p": 0.3}, {"min_p": 0.3}),
    "logit_bias": ({"logit_bias": {2: 1.5, 0: -2.0}}, {"bias": {2: 1.5, 0: -2.0}}),
    "all at once": (
        {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "logit_bias": {3: 0.7}, "repetition_penalty": 1.3},
        {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.05, "bias": {3: 0.7}, "penalty": 1.3},
    ),
    "repetition_penalty": ({"repetition_penalty": 1.8}, {"penalty": 1.8}),
    "repetition_bonus": ({"repetition_penalty": 0.4}, {"penalty": 0.4}),
}


@pytest.mark.parametrize("name", LAWS)
def test_a_knob_gives_the_law_of_its_definition(name):
    """The prompt repeats tokens 1 and 3, so that the penalty counts a token once, prompt included."""
    asked, meant = LAWS[name]
    prompt = [3, 1, 3, 1]
    law = enumerated(lambda prefix: knobs(product_row(prefix), prefix, **meant), prompt, 2, [EOS])
    seen = samples(aligned(), prompt, **asked)
    assert chi_square(seen, law) > 1e-3
    plain = enumerated(product_row, prompt, 2, [EOS])
    assert chi_square(seen, plain) < 1e-6, "the test cannot tell the knob from its absence"


def test_the_penalty_sees_the_text_as_it_grows():
    """A strong penalty on what was generated: under the law that penalises the prompt alone the samples are impossible."""
    law = enumerated(lambda prefix: knobs(product_row(prefix), prefix, penalty=4.0), [2], 3, [])
    prompt_alone = enumerated(lambda prefix: knobs(product_row(prefix), [2], penalty=4.0), [2], 3, [])
    seen = samples(aligned(eos=[]), [2], max_tokens=3, repetition_penalty=4.0)
    assert chi_square(seen, law) > 1e-3
    assert chi_square(seen, prompt_alone) < 1e-6


def test_a_bias_of_100_forces_and_minus_100_bans():
    """exp(±100) is 1e±43: no draw of a test will ever see the other side."""
    model = aligned(eos=[])
    forced = model.generate([[1]], SamplingParams(logit_bias={3: 100}, max_tokens=50, seed=0, n=4))
    assert all(c.tokens == [3] * 50 for c in forced)
    banned = model.generate([[1]], SamplingParams(logit_bias={3: -100, 0: -100}, max_tokens=200, seed=0, n=4))
    assert {token for c in banned for token in c.tokens} == {1, 2, 4}
    best = model.generate([[1]], SamplingParams(logit_bias={3: 100}, max_tokens=50, temperature=0))[0]
    assert best.tokens == [3] * 50, "greedy decoding sees the bias too"


def test_a_bias_cannot_bring_back_what_the_proposal_excludes():
    model = AlignedModel(TableLM(table_of({1: 2, 2: 1})), eos_token_ids=[EOS])
    assert model.generate([[1]], SamplingParams(logit_bias={3: 100}, max_tokens=4, seed=0))[0].tokens == [2, 1, 2, 1]


def test_neutral_knobs_change_nothing():
    model, plain = aligned(), {"seed": 3, "max_tokens": 20, "n": 5}
    neutral = {"top_k": -1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 1, "logit_bias": {2: 0}}
    assert model.generate([[1]], SamplingParams(**plain, **neutral)) == model.generate([[1]], SamplingParams(**plain))


def test_temperature_0_takes_the_best_token_of_every_aligned_row():
    model = aligned(eos=[])
    out = model.generate([[1, 4], [2]], SamplingParams(temperature=0, max_tokens=12, n=2, top_p=0.01, seed=None))
    for completion, prompt in zip(out, [[1, 4], [1, 4], [2], [2]], strict=True):
        prefix = list(prompt)
        for token in completion.tokens:
            row = product_row(prefix)
            assert token == row.index(max(row))
            prefix.append(token)
        assert len(completion.tokens) == 12


def test_temperature_0_takes_the_best_token_after_the_penalty():
    model = aligned(eos=[])
    out = model.generate([[1]], SamplingParams(temperature=0, max_tokens=6, repetition_penalty=3.0))[0]
    prefix = [1]
    for token in out.tokens:
        row = knobs(product_row(prefix), prefix, penalty=3.0)
        assert token == row.index(max(row))
        prefix.append(token)
    assert out.tokens != model.generate([[1]], SamplingParams(temperature=0, max_tokens=6))[0].tokens


def test_among_ties_temperature_0_takes_the_lowest_id():
    model = AlignedModel(TableLM(torch.zeros(V, dtype=torch.float64)))
    assert model.generate([[3]], SamplingParams(temperature=0, max_tokens=3))[0].tokens == [0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-60])
def test_a_temperature_that_vanishes_approaches_greedy(temperature):
    """Rows of a transformers model are float32, where 1e-60 is 0 and a quotient overflows: still the best token."""
    model = AlignedModel.from_pretrained(tiny_model("llama", V), tiny_model("llama", V, seed=1))
    settings = {"max_tokens": 5, "seed": 0, "ignore_eos": True}
    greedy = model.generate([[1, 2]], SamplingParams(temperature=0, **settings))[0]
    assert model.generate([[1, 2]], SamplingParams(temperature=temperature, **settings))[0].tokens == greedy.tokens


# ---- a request overrides the model


OVERRIDES: list[dict[str, Any]] = [
    {"rule": "nucleus"},
    {"rule": Geometric(), "weight": 0.3},
    {"weight": -0.5},
    {"weight": [2.0]},
    {"weight": 0.0},
    {"proposal_temperature": 0.5},
    {"proposal_top_k": 2},
    {"proposal_top_p": 0.6},
    {"aligner_temperature": 0.4},
    {"rule": "candidates(n=3)", "proposal_top_p": 0.9},
]


@pytest.mark.parametrize("settings", OVERRIDES, ids=str)
def test_a_setting_of_the_request_is_that_setting_of_the_model(settings):
    params = {"n": 40, "seed": 2, "max_tokens": 10}
    asked = aligned().generate([[1]], SamplingParams(**params, **settings))
    made = aligned(**settings).generate([[1]], SamplingParams(**params))
    assert asked == made
    assert [c.tokens for c in asked] != [c.tokens for c in aligned().generate([[1]], SamplingParams(**params))]


def test_the_request_wins_over_the_model():
    params = {"n": 20, "seed": 2, "max_tokens": 10}
    stubborn = aligned(rule="nucleus", weight=2.0, proposal_temperature=0.5, proposal_top_p=0.6, aligner_temperature=2.0)
    neutral = {
        "rule": "product",
        "weight": 1.0,
        "proposal_temperature": 1.0,
        "proposal_top_p": 1.0,
        "aligner_temperature": 1.0,
    }
    assert stubborn.generate([[1]], SamplingParams(**params, **neutral)) == aligned().generate([[1]], SamplingParams(**params))
    assert aligned(proposal_top_k=2).generate([[1]], SamplingParams(**params, proposal_top_k=0)) == aligned().generate(
        [[1]], SamplingParams(**params)
    ), "0 is a value, not the absence of one"


def test_a_weight_of_0_is_the_proposal_bit_for_bit():
    params = {"n": 20, "seed": 2, "max_tokens": 10}
    bare = aligned(aligners=0, draft="ngram").generate([[1]], SamplingParams(**params))
    same = aligned(draft="ngram").generate([[1]], SamplingParams(**params, weight=0.0))  # the same draws need the same drafts
    assert [c.tokens for c in same] == [c.tokens for c in bare]


def test_several_aligners_have_a_weight_each():
    model = aligned(aligners=2)
    law = enumerated(
        lambda prefix: unit(
            [p * a**0.5 * b**-0.7 for p, a, b in zip(*(probabilities(table, prefix) for table in tables(2)), strict=True)]
        ),
        [1],
        2,
        [EOS],
    )
    assert chi_square(samples(model, [1], weight=[0.5, -0.7]), law) > 1e-3
    assert chi_square(samples(model, [1], weight=[-0.7, 0.5]), law) < 1e-6, "the order of the weights matters"


@pytest.mark.parametrize("weight", [1.0, [1.0], [1.0, 1.0, 1.0], []])
def test_a_wrong_number_of_weights_is_refused(weight):
    count = 1 if isinstance(weight, float) else len(weight)
    with pytest.raises((InvalidRequest, InvalidOption), match=f"weight has {count} numbers, but there are 2 aligners"):
        aligned(aligners=2, weight=weight)
    with pytest.raises(InvalidRequest, match=f"weight has {count} numbers, but there are 2 aligners"):
        aligned(aligners=2).generate([[1]], SamplingParams(weight=weight))


def test_a_weight_without_an_aligner_is_refused():
    with pytest.raises(InvalidRequest, match="weight has 1 numbers, but there are 0 aligners"):
        aligned(aligners=0).generate([[1]], SamplingParams(weight=0.5))


ROW_KNOBS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "logit_bias": {1: 1.0},
    "logprobs": True,
}


@pytest.mark.parametrize("name", ROW_KNOBS)
def test_candidates_refuse_what_acts_on_a_row(name):
    params = SamplingParams(rule="candidates(n=4)", **{name: ROW_KNOBS[name]})
    with pytest.raises(InvalidRequest, match=f"^{name} acts on the aligned row.*'candidates\\(n=4\\)'"):
        aligned().generate([[1]], params)


def test_candidates_accept_neutral_values_and_what_acts_elsewhere():
    plain = {"rule": "candidates(n=4)", "seed": 1, "max_tokens": 20, "n": 3}
    neutral = {
        "temperature": 1,
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "logit_bias": {},
        "logprobs": False,
    }
    model = aligned()
    assert model.generate([[1]], SamplingParams(**plain, **neutral)) == model.generate([[1]], SamplingParams(**plain))
    out = model.generate([[1]], SamplingParams(**plain, stop_token_ids=[2, 3], proposal_top_k=3, aligner_temperature=2.0))
    assert all(c.tokens[-1] in (0, 2, 3) or len(c.tokens) == 20 for c in out)


def test_fallbacks_count_the_rows_that_the_gate_leaves_to_the_proposal():
    """KL(p̃‖q) is taken here on probabilities, row by row along each completion."""
    tau = 0.9
    model = aligned(rule=f"kl_gate(tau={tau})")
    out = model.generate([[1], [2, 3]], SamplingParams(n=10, seed=4, max_tokens=15))
    counts = []
    for completion, prompt in zip(out, [[1]] * 10 + [[2, 3]] * 10, strict=True):
        shut = 0
        for t in range(len(completion.tokens)):
            p, q = (probabilities(table, [*prompt, *completion.tokens[:t]]) for table in tables())
            shut += math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) > tau
        assert completion.fallbacks == shut
        counts.append((shut, len(completion.tokens)))
    assert any(0 < shut < length for shut, length in counts), "the gate must open and shut within a completion"


@pytest.mark.parametrize(("rule", "fallbacks"), [("product", None), ("nucleus", None), ("kl_gate(tau=1000)", 0)])
def test_only_a_gate_counts_fallbacks(rule, fallbacks):
    """Also beside a neighbour whose gate is always shut."""
    shut = SamplingParams(rule="kl_gate(tau=0)", seed=0, max_tokens=7, ignore_eos=True)
    out = aligned().generate([[1], [1]], [SamplingParams(rule=rule, seed=0), shut])
    assert [c.fallbacks for c in out] == [fallbacks, 7]


# ---- log-probabilities on request


def test_logprobs_are_those_of_the_three_rows():
    model = aligned(aligner_temperature=0.5, proposal_temperature=2.0)
    out = model.generate([[1]], SamplingParams(seed=0, max_tokens=8, ignore_eos=True, logprobs=True, temperature=0.3, top_k=2))
    prefix = [1]
    assert out[0].logprobs is not None
    for t, token in enumerate(out[0].tokens):
        p, q = (probabilities(table, prefix) for table in tables())
        target = unit([a**0.5 * b**2.0 for a, b in zip(p, q, strict=True)])
        rows = out[0].logprobs
        for got, expected in [(rows.proposal[t], p), (rows.aligner[t], q), (rows.aligned[t], target)]:
            assert got == pytest.approx(math.log(expected[token]), abs=1e-12)
        prefix.append(token)


def test_logprobs_come_only_where_they_were_asked_for_and_with_a_list_for_each_aligner():
    params = [SamplingParams(seed=0, max_tokens=4, ignore_eos=True, logprobs=wanted) for wanted in (True, False)]
    one, none = aligned().generate([[1], [1]], params)
    assert none.logprobs is None
    assert none.tokens == one.tokens
    assert (len(one.logprobs.proposal), len(one.logprobs.aligner), len(one.logprobs.aligned)) == (4, 4, 4)
    two = aligned(aligners=2).generate([[1]], params[0])[0].logprobs
    assert [len(column) for column in two.aligner] == [4, 4]
    bare = aligned(aligners=0).generate([[1]], params[0])[0].logprobs
    assert bare.aligner == []
    assert bare.aligned == bare.proposal


def test_the_events_of_a_stream_are_the_completion():
    params = SamplingParams(n=3, seed=0, max_tokens=10, logprobs=True)
    model = aligned()
    events = list(model.stream([[1], [2]], params))
    out = iter(model.generate([[1], [2]], params))
    for prompt_index in range(2):
        for index in range(3):
            mine = [e for e in events if (e.prompt_index, e.index) == (prompt_index, index)]
            completion = next(out)
            assert [e.token for e in mine] == completion.tokens
            assert [e.finish_reason for e in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]
            assert [e.completion for e in mine] == [None] * (len(mine) - 1) + [completion]
            assert [[e.proposal for e in mine], [e.aligner for e in mine], [e.aligned for e in mine]] == [
                completion.logprobs.proposal,
                completion.logprobs.aligner,
                completion.logprobs.aligned,
            ]


# ---- rows without a token


def test_rows_without_mass_end_a_completion_and_say_where():
    proposal, aligner = TableLM(table_of({1: 2, 2: 3})), TableLM(table_of({1: 2, 2: 4}))
    model = AlignedModel(proposal, [aligner])
    (dead,) = model.generate([[1]], SamplingParams(max_tokens=5))
    assert (dead.finish_reason, dead.tokens) == ("error", [2])
    assert dead.error.startswith("rule 'product' leaves no possible token after 1 tokens: ")
    assert model.generate([[1]], SamplingParams(max_tokens=1))[0].tokens == [2]


# ---- making the model


def test_unknown_options_are_refused_by_name():
    with pytest.raises(InvalidOption, match="there is no option 'temprature'"):
        AlignedModel.from_pretrained(tables()[0], temprature=0.5)
    with pytest.raises(InvalidOption, match="there is no option 'temperature'"):
        AlignedModel.from_pretrained(tables()[0], temperature=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "no_such_rule"}, "there is no rule 'no_such_rule'"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"weight": math.nan}, "weight"),
        ({"proposal_temperature": 0}, "proposal_temperature"),
        ({"proposal_top_p": 2.0}, "proposal_top_p"),
        ({"proposal_top_k": -2}, "proposal_top_k"),
        ({"aligner_temperature": -1.0}, "aligner_temperature"),
    ],
)
def test_bad_settings_show_when_the_model_is_made(settings, message):
    with pytest.raises((InvalidOption, InvalidRequest), match=message):
        aligned(**settings)


def test_models_of_different_size_are_refused():
    with pytest.raises(VocabularyMismatch, match="aligner 1 has 6 tokens, the proposal 5"):
        AlignedModel(tables()[0], [tables()[1], TableLM.random(6, seed=0)])


def test_a_text_stop_needs_a_tokenizer_and_works_with_one():
    loaded = tiny_model("llama", 28)
    with pytest.raises(InvalidRequest, match="stop needs a tokenizer"):
        AlignedModel.from_pretrained(loaded).generate([[1]], SamplingParams(stop=["a"]))
    model = AlignedModel.from_pretrained(loaded, tokenizer=tiny_tokenizer())
    plain = model.generate("ab", SamplingParams(seed=0, max_tokens=30, ignore_eos=True))[0]
    letter = plain.text[5]
    out = model.generate("ab", SamplingParams(seed=0, max_tokens=30, ignore_eos=True, stop=letter))[0]
    assert out.text == plain.text.partition(letter)[0]
    assert out.finish_reason == "stop"
