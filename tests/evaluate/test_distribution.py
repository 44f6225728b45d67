"""Traces are exact: on enumerable models their sums are the sequence laws' own KL, entropy and normaliser."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from law_of import EOS, expected_law, probabilities, tempered
from spellings import KINDS
from tiny import CHAT_TEMPLATE, bpe_tokenizer, tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import RULES, Candidates, Product
from trimtab.decode import scoring
from trimtab.decode.pace import Tally
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest
from trimtab.evaluate.distribution import Trace, pieces, summarise, trace
from trimtab.evaluate.speed import throughput
from trimtab.models.table import TableLM

V, LENGTH, PROMPT = 4, 4, [2, 1]
PROPOSAL = TableLM.random(V, order=2, seed=3, zeros=0.15)
ALIGNERS = [TableLM.random(V, order=1, seed=seed) for seed in (4, 5)]
NO_WARPS = (1.0, 1.0, 1.0)
WARPS = (0.8, 0.9, 1.3)
"""Proposal's temperature and top-p, aligners' temperature."""
CASES = [
    ("product", [1.0], NO_WARPS),
    ("product", [0.6], WARPS),
    ("product", [0.7, -0.4], NO_WARPS),
    ("geometric", [0.4], NO_WARPS),
    ("geometric", [0.3, 0.3], WARPS),
    ("nucleus", [1.0], WARPS),
    ("nucleus", [1.0, 0.5], NO_WARPS),
    ("kl_gate(tau=0.3)", [1.0], WARPS),
    ("mixture", [0.4], WARPS),
    ("mixture", [0.3, 0.5], NO_WARPS),
    ("gate(rule=mixture, by=kl, tau=0.2, invert=True)", [0.4], NO_WARPS),
    ("nudge(tau=0.45)", [1.0], WARPS),
]


def aligned_model(rule, weights, warps=NO_WARPS, proposal=PROPOSAL, **settings):
    names = ("proposal_temperature", "proposal_top_p", "aligner_temperature")
    settings |= dict(zip(names, warps, strict=True))
    return AlignedModel(proposal, ALIGNERS[: len(weights)], None, [EOS], rule=rule, weight=weights, **settings)


def law_and_traces(rule, weights, warps, **settings):
    """Every possible completion, its log-probability by the specification in plain Python, and its trace."""
    law = expected_law(PROPOSAL, ALIGNERS[: len(weights)], rule, weights, PROMPT, LENGTH, warps=warps)
    completions = [list(tokens) for tokens in law]
    return law, trace(aligned_model(rule, weights, warps, **settings), [PROMPT] * len(law), completions)


def same(got, expected, **tolerance):
    """Whether traces are equal, number by number."""
    for a, b in zip(got, expected, strict=True):
        assert a.tokens == b.tokens
        for name in ("proposal", "aligned", "kl", "entropy", "log_z"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), **tolerance), name


# ---- exactness


@pytest.mark.parametrize(("rule", "weights", "warps"), CASES)
def test_expected_sums_are_those_of_the_sequence_law(rule, weights, warps):
    """The chain rule, over all completions y with at most 4 tokens, weighted by their probability P(y):

    E Σ_t KL(P(·|y_<t) ‖ P_M(·|y_<t)) = E Σ_t log P(y_t|y_<t)/P_M(y_t|y_<t) = KL(P‖P_M), for the inner mean of each term given
    the prefix is that KL; in the same way E Σ_t H(P(·|y_<t)) = H(P). P_M is the proposal without its warps. And for every
    single y, Σ_t influence = log P(y) − log P_M(y).
    """
    law, traces = law_and_traces(rule, weights, warps)
    proposal = PROPOSAL.enumerate(PROMPT, LENGTH, [EOS])
    kl = math.fsum(math.exp(logp) * (logp - proposal[y]) for y, logp in law.items())
    entropy = -math.fsum(math.exp(logp) * logp for logp in law.values())
    chances = [math.exp(logp) for logp in law.values()]
    assert math.fsum(chances) == pytest.approx(1.0)
    assert math.fsum(p * sum(t.kl) for p, t in zip(chances, traces, strict=True)) == pytest.approx(kl, abs=1e-10)
    assert math.fsum(p * sum(t.entropy) for p, t in zip(chances, traces, strict=True)) == pytest.approx(entropy, abs=1e-10)
    assert kl > 0.02
    for (y, logp), t in zip(law.items(), traces, strict=True):
        assert t.tokens == list(y)
        assert sum(t.influence) == pytest.approx(logp - proposal[y], abs=1e-10)


@pytest.mark.parametrize(("rule", "weights", "warps"), CASES)
def test_log_z_is_the_sum_over_the_vocabulary(rule, weights, warps):
    """Z_t = Σ_v p̃(v)^a Π q_i(v)^λ_i over the support of p̃, in plain Python: a = 1 for `product`, 1 − Σw for `geometric`, 0 for
    `nucleus`; and Σ_v (1−Σw)·p̃(v) + Σ w_i q_i(v) for `mixture`. A gate divides by one of two numbers, so it has none.
    """
    _, traces = law_and_traces(rule, weights, warps)
    if "gate" in rule or "nudge" in rule:
        assert all(t.log_z is None for t in traces)
        return
    power = {"product": 1.0, "geometric": 1 - sum(weights), "nucleus": 0.0, "mixture": None}[rule]
    for t in traces:
        for i, log_z in enumerate(t.log_z):
            prefix = PROMPT + t.tokens[:i]
            p = tempered(probabilities(PROPOSAL, prefix), *warps[:2])
            qs = [tempered(probabilities(q, prefix), warps[2]) for q in ALIGNERS[: len(weights)]]
            if power is None:
                total = sum(weights)
                z = sum((1 - total) * a + sum(w * q[v] for q, w in zip(qs, weights, strict=True)) for v, a in enumerate(p) if a)
            else:
                z = sum(a**power * math.prod(q[v] ** w for q, w in zip(qs, weights, strict=True)) for v, a in enumerate(p) if a)
            assert log_z == pytest.approx(math.log(z), abs=1e-10)


def test_the_product_of_z_leads_to_the_sequence_level_normaliser():
    """With P(y) = Π_t p(y_t) q(y_t) / Z_t: E_P Π_t Z_t = Σ_y P_M(y) Q(y), the Z of the sequence-level target (RAM.md)."""
    law, traces = law_and_traces("product", [1.0], NO_WARPS)
    p, q = (lm.enumerate(PROMPT, LENGTH, [EOS]) for lm in (PROPOSAL, ALIGNERS[0]))
    z = math.fsum(math.exp(p[y] + q[y]) for y in p)
    assert math.fsum(math.exp(logp + sum(t.log_z)) for logp, t in zip(law.values(), traces, strict=True)) == pytest.approx(z)


def test_the_summed_kl_varies_less_except_where_terms_cancel():
    """Given the prefix, a KL does not vary and a log ratio does. But over prefixes the later terms may cancel the first:

    P draws 1 or 2 with ½ each, where P_M has e⁻¹/2 and the rest; then P is sure of 0. After a 1 so is P_M, after a 2 it has
    probability c for it, such that the log ratios 1 + 0 and log ½/(1 − e⁻¹/2) − log c are equal. So the plain estimate is
    exactly 1 = KL for every y, while the sum of KLs is now smaller and now larger: only its mean is the same.
    """
    law, traces = law_and_traces("product", [1.0], NO_WARPS)
    proposal = PROPOSAL.enumerate(PROMPT, LENGTH, [EOS])

    def moments(values, chances):
        mean = math.fsum(p * v for p, v in zip(chances, values, strict=True))
        return mean, math.fsum(p * (v - mean) ** 2 for p, v in zip(chances, values, strict=True))

    chances = [math.exp(logp) for logp in law.values()]
    plain = moments([logp - proposal[y] for y, logp in law.items()], chances)
    summed = moments([sum(t.kl) for t in traces], chances)
    assert plain[0] == pytest.approx(summed[0])
    assert summed[1] < plain[1] / 4

    first = math.exp(-1) / 2
    c = math.exp(math.log(0.5 / (1 - first)) - 1)
    proposal_rows = [[0, first, 1 - first], [1, 0, 0], [c, 1 - c, 0], [1, 1, 1]]  # after 0, 1, 2, and at the start
    aligner_rows = [[0, 0.5, 0.5], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    lms = [TableLM(torch.tensor(rows, dtype=torch.float64).log()) for rows in (proposal_rows, aligner_rows)]
    traces = trace(AlignedModel(lms[0], lms[1:], None, [EOS], rule="nucleus"), [[0], [0]], [[1, 0], [2, 0]])
    assert moments([sum(t.influence) for t in traces], [0.5, 0.5]) == pytest.approx((1.0, 0.0), abs=1e-12)
    mean, variance = moments([sum(t.kl) for t in traces], [0.5, 0.5])
    assert mean == pytest.approx(1.0)
    assert variance == pytest.approx((math.log(c) / 2) ** 2)


@pytest.mark.parametrize("rule", ["product", "nucleus", "geometric", "kl_gate"])
def test_an_aligner_that_agrees_with_everything_moves_nothing(rule):
    """Weight 0 under `product` and `geometric`, the proposal itself as aligner under the others: KL, influence, log Z are 0."""
    own = rule in ("nucleus", "kl_gate")
    proposal = TableLM.random(V, order=2, seed=3)
    aligner, weight = (proposal, 1.0) if own else (TableLM.random(V, seed=4, zeros=0.3), 0.0)
    model = AlignedModel(proposal, [aligner], None, [EOS], rule=rule, weight=weight)
    (t,) = trace(model, PROMPT, [3, 1, 2, 2, 0])
    for values in (t.kl, t.influence, t.log_z or []):
        assert values == pytest.approx([0.0] * len(values), abs=1e-12)
    assert (t.log_z is None) == (rule == "kl_gate")
    assert min(t.kl) >= 0


# ---- zeros


ZEROS = TableLM(torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log())


def test_what_is_impossible_is_minus_infinity_and_counted():
    """Top-p .6 keeps tokens 0 and 1 (.5 < .6). So 2 is forbidden by the rule alone, 3 by the proposal already: no influence.

    Under `nucleus` the aligned row is q(0), q(1) over their sum: KL = Σ a log a/p with p = .5, .3, the row before truncation.
    """
    q = [0.2, 0.2, 0.3, 0.3]
    model = AlignedModel(ZEROS, [TableLM(torch.tensor(q).double().log())], None, [EOS], rule="nucleus", proposal_top_p=0.6)
    (t,) = trace(model, [1], [0, 1, 2, 3])
    assert t.proposal == pytest.approx([math.log(0.5), math.log(0.3), math.log(0.2), -math.inf])
    assert t.aligned == pytest.approx([math.log(0.5), math.log(0.5), -math.inf, -math.inf])
    assert t.influence == pytest.approx([0.0, math.log(0.5 / 0.3), -math.inf, 0.0], abs=1e-12)
    assert t.kl == pytest.approx([0.5 * math.log(0.5 / 0.3)] * 4)
    assert t.entropy == pytest.approx([math.log(2)] * 4)
    assert t.log_z == pytest.approx([math.log(0.4)] * 4)
    report = summarise([t])
    assert report["impossible_tokens"] == 2
    assert report["influence"] == pytest.approx(math.log(0.5 / 0.3) / 2)
    json.dumps(report, allow_nan=False)


def test_models_without_a_common_token_are_an_error():
    only_last = TableLM(torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64).log())
    with pytest.raises(DeadRow, match="no possible token"):
        trace(AlignedModel(ZEROS, [only_last], None, [EOS]), [1], [0, 1])


def test_a_weight_of_zero_removes_an_aligner_from_log_z_even_where_it_says_no():
    """λ = 0 gives log Σ p̃ = 0, and an anti-expert's log Z counts the support of p̃ alone."""
    logp, logq = ZEROS.table, torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    weights = torch.tensor([0.0], dtype=torch.float64)
    assert Product().log_z(logp, [logq], weights).item() == pytest.approx(0.0, abs=1e-12)
    anti = Product().log_z(logp, [logp], torch.tensor([-1.0], dtype=torch.float64))
    assert anti.item() == pytest.approx(math.log(3)), "p̃/p̃ is 1 for each of three tokens, and not 0/0 for the fourth"


def test_which_rules_have_one_normaliser():
    model = AlignedModel(PROPOSAL, ALIGNERS[:1], None, [EOS])
    has = {
        name: trace(model, [1], [2, 0], SamplingParams(rule=name))[0].log_z is not None
        for name in RULES
        if name != "candidates"
    }
    gates = dict.fromkeys(("gate", "kl_gate", "nudge", "confidence", "proposal"), False)
    assert has == {"product": True, "geometric": True, "nucleus": True, "mixture": True, **gates}
    assert trace(model, [1], [2, 0], SamplingParams(rule="nucleus(force_eos=True)"))[0].log_z is None
    assert trace(AlignedModel(PROPOSAL, (), None, [EOS]), [1], [2, 0])[0].log_z is None


# ---- the fast path is the slow path


@pytest.mark.parametrize(("rule", "weights", "warps"), CASES)
def test_rows_in_small_pieces_and_batches_give_the_same(monkeypatch, rule, weights, warps):
    _, whole = law_and_traces(rule, weights, warps, max_num_seqs=1000)
    monkeypatch.setattr(scoring, "ROW_BUDGET", 7 * V)  # with batches of 7, one token at a time
    _, parts = law_and_traces(rule, weights, warps, max_num_seqs=7)
    same(parts, whole, abs=1e-12)


TEXTS = ["a naïve café 🚀", "🙂🙂 two", "hello", "x"]
TOKENIZER = bpe_tokenizer(["the naïve café", "hello two", "a rocket"], chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def transformer():
    proposal, aligner = (tiny_model("llama", len(TOKENIZER), seed=seed) for seed in (0, 1))
    return AlignedModel.from_pretrained(proposal, aligner, tokenizer=TOKENIZER, rule="product", weight=0.7, max_num_seqs=3)


def test_batched_is_alone_and_agrees_with_score(transformer):
    prompts = ["hi", "a longer prompt", "é", "two"]
    batched = trace(transformer, prompts, TEXTS)
    same(batched, [trace(transformer, [p], [text])[0] for p, text in zip(prompts, TEXTS, strict=True)], rel=1e-3, abs=1e-4)
    for t, score in zip(batched, transformer.score(prompts, TEXTS), strict=True):
        assert (t.tokens, t.proposal, t.aligned) == (score.tokens, score.proposal, score.aligned)


def test_params_are_those_of_score(transformer):
    params = SamplingParams(rule="geometric", weight=0.2, proposal_temperature=0.5, temperature=0.1)
    (t,), (score,) = (method(["hi"], ["you"], params) for method in (lambda *a: trace(transformer, *a), transformer.score))
    assert t.aligned == score.aligned
    assert t.proposal == score.proposal


@pytest.mark.parametrize(
    ("prompts", "completions"),
    [
        (["a", "b"], ["c"]),
        (["a", "b"], ["c", ""]),
        (["a", ""], ["c", "d"]),
        (["a", [5]], ["c", [1, 10_000]]),
        (["a"], 3),
        (3, ["a"]),
        (["a", "b"], ["c", "d" * 200]),
        ([[5]], [[]]),
        ("hi", "x"),
        ("hi", [4, 5]),
        ([4, 5], [4, 5]),
        ([{"role": "user", "content": "hi"}], {"role": "assistant", "content": "x"}),
        ([], []),
    ],
)
def test_what_is_taken_and_refused_is_as_in_score(transformer, prompts, completions):
    outcomes = []
    for method in (transformer.score, lambda *args: trace(transformer, *args)):
        try:
            outcomes.append([one.tokens for one in method(prompts, completions)])
        except InvalidRequest as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_bad_params_are_refused_as_in_score(transformer):
    for method in (transformer.score, lambda *args: trace(transformer, *args)):
        with pytest.raises(InvalidRequest, match="params must be"):
            method(["a"], ["b"], {"weight": 1})
        with pytest.raises(InvalidOption, match="closed form"):
            method(["a"], ["b"], SamplingParams(rule=Candidates()))


# ---- the summary


def test_the_summary_by_hand():
    """KL sums .6 and .9 over 2 and 1 tokens: .5 a token, .75 a sequence; log Z −1, −2, −3: mean −2, deviation √(2/3)."""
    traces = [
        Trace([1, 0], [-1.0, -2.0], [-1.5, -1.0], [0.2, 0.4], [1.0, 2.0], [-1.0, -2.0]),
        Trace([0], [-1.0], [-1.0], [0.9], [3.0], [-3.0]),
    ]
    report = summarise(traces)
    assert (report["sequences"], report["tokens"], report["impossible_tokens"]) == (2, 3, 0)
    assert report["kl_per_token"] == pytest.approx(0.5)
    assert report["kl_per_sequence"] == pytest.approx(0.75)
    assert report["kl_per_token_interval"] == pytest.approx([0.3, 0.9]), "either prompt twice"
    assert report["kl_per_sequence_interval"] == pytest.approx([0.6, 0.9])
    assert report["log_z_mean"] == pytest.approx(-2.0)
    assert report["log_z_std"] == pytest.approx(math.sqrt(2 / 3))
    assert report["entropy"] == pytest.approx(2.0)
    assert report["influence"] == pytest.approx(0.5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report


@pytest.mark.parametrize(
    "traces",
    [
        [],
        [Trace([0], [-math.inf], [-math.inf], [math.inf], [0.0], None)],
        [Trace([0], [-1.0], [-1.0], [0.0], [0.0], [-math.inf]), Trace([0], [-1.0], [-math.inf], [math.inf], [0.0], None)],
    ],
)
def test_a_summary_has_no_number_that_json_lacks(traces):
    report = summarise(traces)
    json.dumps(report, allow_nan=False)
    assert report["kl_per_token"] is report["kl_per_token_interval"] is report["log_z_mean"] is report["log_z_std"] is None
    assert report["impossible_tokens"] == len(traces[-1:])


def test_one_prompt_has_no_interval():
    report = summarise([Trace([0], [-1.0], [-1.0], [0.5], [0.0], None)])
    assert (report["kl_per_sequence"], report["kl_per_sequence_interval"]) == (0.5, None)


# ---- pieces of text


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def test_pieces_of_a_traced_text_join_to_it(transformer):
    for text, t in zip(TEXTS, trace(transformer, ["a"] * len(TEXTS), TEXTS), strict=True):
        shown = pieces(TOKENIZER, t.tokens, t.influence)
        assert "".join(piece for piece, _ in shown) == text
        assert [influence for _, influence in shown] == t.influence
        assert t.tokens[-1] == EOS
        assert shown[-1][0] == ""


def test_a_character_of_several_tokens_is_the_text_of_the_last():
    ids = TOKENIZER("a🚀b")["input_ids"]
    assert [text for text, _ in pieces(TOKENIZER, [*ids, EOS], [0.0] * (len(ids) + 1))] == ["a", "", "", "", "🚀", "b", ""]


def test_a_character_cut_short_is_shown_by_its_last_token_and_not_by_the_end():
    ids = [*TOKENIZER("a🚀")["input_ids"][:-1], EOS]
    texts = [text for text, _ in pieces(TOKENIZER, ids, [0.0] * len(ids))]
    assert texts[:3] == ["a", "", ""]
    assert texts[3].strip("\N{REPLACEMENT CHARACTER}") == ""
    assert len(texts[3]) >= 1
    assert texts[4] == ""
    assert "".join(texts) == decode(ids)


def test_pieces_go_on_with_a_prompts_text():
    """Llama's decoder drops the space that a text begins with, and this one does not begin."""
    tokenizer = KINDS["llama"]()
    ids = tokenizer.convert_tokens_to_ids(["▁cat", "▁sat"])
    assert pieces(tokenizer, ids, [0.5, 0.25], [tokenizer.bos_token_id, *ids]) == [(" cat", 0.5), (" sat", 0.25)]
    assert pieces(tokenizer, ids, [0.5, 0.25]) == [("cat", 0.5), (" sat", 0.25)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, len(TOKENIZER) - 1) | st.just(EOS) | st.sampled_from(TOKENIZER("🚀é")["input_ids"]), max_size=80)
)
def test_pieces_join_to_the_decoded_text_for_any_tokens(ids):
    shown = pieces(TOKENIZER, ids, list(range(len(ids))))
    assert "".join(text for text, _ in shown) == decode(ids)
    assert [number for _, number in shown] == list(range(len(ids)))
    first = next((i for i, token in enumerate(ids) if token != EOS), len(ids))
    assert all(text == "" for (text, _), token in zip(shown[first:], ids[first:], strict=True) if token == EOS)


# ---- speed


def test_throughput_counts_what_is_kept():
    """The drafter is the proposal itself and accepts all: a first token, and then 4 a call; the answers have 9 each."""
    model = AlignedModel(PROPOSAL, (), None, [EOS], draft=PROPOSAL, num_speculative_tokens=3)
    model.pace.tally = Tally()
    answers = model.generate([[1], [2]], SamplingParams(max_tokens=9, ignore_eos=True, seed=0))
    tokens = sum(len(a.tokens) for a in answers)
    speed = throughput(tokens, model.pace.tally, 2.0)
    assert (tokens, speed.tokens_per_second, speed.acceptance) == (18, 9.0, 1.0)
    assert speed.tokens_per_proposal_call == 3
    assert throughput(0, Tally(), 0.0) == (None, None, None)
