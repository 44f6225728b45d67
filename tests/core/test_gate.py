"""`gate` against its definition, around any rule, and its cases `kl_gate` and `nudge`; how rules within rules are written."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from law_of import expected_row
from looking import Handover, Opening, Tiring, looking_row
from rows_of import rows
from statistics_of import fits
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import entropy, kl_divergence, log_normalize
from trimtab.core.rules import Candidates, Gate, Geometric, KLGate, Mixture, Nucleus, Nudge, Product, Rule, parse_rule
from trimtab.core.rules.text import MAX_TEXT
from trimtab.errors import DeadRow, InvalidOption
from trimtab.models.table import TableLM, enumerate_sequences

V, EOS = 6, 0


# ---- the law

CASES = [
    f"gate(rule={rule}, by={by}, tau={tau}{invert})"
    for rule in ("product", "geometric", "nucleus", "mixture")
    for by, tau in (("kl", 0.7), ("entropy", 1.1), ("max_p", 0.5))
    for invert in ("", ", invert=True")
]


@pytest.mark.parametrize("text", [*CASES, "kl_gate(tau=0.7)", "nudge(tau=0.5)", "gate(rule=nudge(tau=0.5), by=kl, tau=0.9)"])
def test_the_row_is_that_of_the_definition(text):
    """On probabilities in plain Python; the gate is open for some rows and shut for others, which the marks say."""
    weights = [0.4, 0.3]
    p, qs = rows(1, 60, zeros=0.2), [rows(2, 60), rows(3, 60)]
    rule = parse_rule(text)
    found, marked = rule(p, qs, weights).exp(), rule.marked(p, qs, torch.tensor(weights).double())
    assert 5 < marked.sum() < 55, "the test needs both"
    for k in range(60):
        ps = p[k].exp().tolist()
        expected = expected_row(text, ps, [q[k].exp().tolist() for q in qs], weights)
        assert_close(found[k].tolist(), expected, atol=1e-12, rtol=1e-9)
        assert expected == ps or not marked[k]


def test_open_and_shut_are_the_two_rows_to_the_bit():
    p, q = rows(4, 50, zeros=0.2).float(), rows(5, 50).float()
    gate = Gate(Mixture(), "entropy", 1.1)
    found, marked = gate(p, [q], [0.4]), gate.marked(p, [q], torch.tensor([0.4]))
    assert torch.equal(found[marked], p[marked])
    assert torch.equal(found[~marked], Mixture()(p, [q], [0.4])[~marked])


def test_where_it_opens_and_where_inverted_it_does_not():
    p, q = rows(6, 80), rows(7, 80)
    for by in ("kl", "entropy", "max_p"):
        opens = Gate(by=by).marked(p, [q], torch.ones(1).double())
        assert torch.equal(~opens, Gate(by=by, invert=True).marked(p, [q], torch.ones(1).double()))
    ones = torch.ones(1).double()
    assert torch.equal(Gate(by="entropy", tau=1.2).marked(p, [q], ones), entropy(p) < 1.2)
    assert torch.equal(Gate(by="max_p", tau=0.5).marked(p, [q], ones), p.amax(-1).exp() >= 0.5)
    assert torch.equal(Gate(by="kl", tau=0.5).marked(p, [q], ones), kl_divergence(p, q) > 0.5)


def test_the_discrepancy_is_from_what_the_aligners_say_together():
    """Powers multiply; shares add, so a small share of an aligner that agrees is no discrepancy."""
    p, q = rows(8, 40), [rows(9, 40), rows(10, 40)]
    weights = torch.tensor([0.2, 0.1]).double()
    mean = torch.logaddexp(q[0] + math.log(2 / 3), q[1] + math.log(1 / 3))
    assert torch.equal(Gate(Mixture(), tau=0.5).marked(p, q, weights), kl_divergence(p, mean) > 0.5)
    product = log_normalize(0.2 * q[0] + 0.1 * q[1])
    assert torch.equal(Gate(Nucleus(), tau=0.5).marked(p, q, weights), kl_divergence(p, product) > 0.5)
    assert not Gate(Mixture(), tau=1e-9).marked(p, [p], weights[:1]).any()


@pytest.mark.parametrize("by", ["kl", "entropy", "max_p"])
def test_what_opens_by_the_proposal_needs_no_aligner(by):
    gate, p = Gate(by=by, tau=0.8), rows(11, 60)
    one, other = (gate.marked(p, [rows(seed, 60)], torch.ones(1).double()) for seed in (12, 13))
    assert torch.equal(one, other) == gate.opens_by_proposal


@pytest.mark.parametrize("by", ["kl", "entropy", "max_p"])
@pytest.mark.parametrize("invert", [False, True])
def test_a_shut_gate_hides_no_broken_aligner(by, invert):
    p, q = rows(14, 30), rows(15, 30)
    broken = q.clone()
    broken[:, 2] = math.nan
    for tau in (0.0, 1.0):
        with pytest.raises(DeadRow):
            Gate(by=by, tau=tau, invert=invert)(p, [q, broken], [0.5, 1.0])
        assert Gate(by=by, tau=tau, invert=invert)(p, [q, broken], [0.5, 0.0]).isfinite().all()


# ---- its cases


def test_kl_gate_and_nudge_are_cases_that_keep_their_names():
    p, q = rows(16, 50, zeros=0.2), rows(17, 50)
    weights = torch.ones(1).double()
    for case, gate in ((KLGate(0.6), Gate(Nucleus(), "kl", 0.6)), (Nudge(0.6), Gate(Nucleus(), "max_p", 0.6))):
        assert torch.equal(case(p, [q], [1.0]), gate(p, [q], [1.0]))
        assert torch.equal(case.marked(p, [q], weights), gate.marked(p, [q], weights))
        assert case.marks == gate.marks
        assert case != gate
    assert [f.name for f in dataclasses.fields(KLGate) if f.init] == ["tau"]
    assert (KLGate(), Nudge()) == (KLGate(tau=0.1), Nudge(tau=0.4))
    for text in ("kl_gate", "kl_gate(tau=0.3)", "nudge", "nudge(tau=0.3)"):
        assert str(parse_rule(text)) == text
    with pytest.raises(InvalidOption, match="'kl_gate' has no setting 'by'; it has: tau"):
        parse_rule("kl_gate(by=entropy)")


# ---- around rules that look back


@pytest.mark.parametrize("gated", [Handover(tau=-1.6), Tiring(), Opening()], ids=str)
@pytest.mark.parametrize("by", ["kl", "entropy", "max_p"])
def test_a_gate_around_a_rule_that_looks_back_has_the_law(gated, by):
    """By recursion over all texts from the definitions. What the rule remembers goes on while the gate is shut."""
    proposal, aligner = TableLM.random(5, order=2, seed=0), TableLM.random(5, order=2, seed=1)
    tau = {"kl": 0.4, "entropy": 1.1, "max_p": 0.5}[by]
    rule = Gate(gated, by, tau)
    said = set()

    def row(prefix):
        p, q = proposal.row(prefix), aligner.row(prefix)
        value = {"kl": -kl_divergence(p, q), "entropy": entropy(p), "max_p": -p.amax().exp()}[by].item()
        is_open = value >= tau if by == "entropy" else value >= -tau
        said.add(is_open)
        inner = looking_row(gated, proposal, [aligner], [1.0], [3, 2], prefix)
        return torch.tensor(inner, dtype=torch.float64).log() if is_open else p

    law = enumerate_sequences(row, [3, 2], 3, [EOS])
    assert said == {True, False}
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], max_num_seqs=1000, rule=rule)
    for text, score in zip(law, model.score([[3, 2]] * len(law), [list(text) for text in law]), strict=True):
        assert sum(score.aligned) == pytest.approx(law[text], abs=1e-9)
    drawn = [tuple(c.tokens) for c in model.generate([[3, 2]], SamplingParams(n=1000, seed=5, max_tokens=3))]
    assert fits(drawn, law) > 1e-3
    for length in (1, 3):
        other = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], rule=rule, num_speculative_tokens=length)
        again = other.generate([[3, 2]], SamplingParams(n=200, seed=5, max_tokens=3))
        assert [tuple(c.tokens) for c in again] == drawn[:200]


def test_completions_count_the_rows_that_are_left_to_the_proposal():
    proposal, aligner = TableLM.random(5, order=1, seed=2), TableLM.random(5, order=1, seed=3)
    model = AlignedModel(proposal, [aligner], draft="none")
    for text in ("gate(rule=mixture, by=entropy, tau=1.3)", "nudge(tau=0.45)"):
        (c,) = model.generate([[1]], SamplingParams(rule=text, max_tokens=40, seed=0, weight=0.5))
        before = [[1], *[[token] for token in c.tokens[:-1]]]
        p = torch.stack([proposal.row(prefix) for prefix in before])
        shut = (entropy(p) < 1.3) if "entropy" in text else (p.amax(-1).exp() >= 0.45)
        assert 0 < c.fallbacks == int(shut.sum()) < 40
    everything = model.generate([[1]], SamplingParams(rule="gate(by=max_p, tau=0)", max_tokens=40, seed=0))[0]
    assert everything.fallbacks == 40
    bare = AlignedModel(proposal).generate([[1]], SamplingParams(max_tokens=40, seed=0))
    assert everything.tokens == bare[0].tokens


# ---- how it is written


@pytest.mark.parametrize(
    "rule",
    [
        Gate(),
        Gate(by="entropy"),
        Gate(by="max_p", tau=0.1),
        Gate(tau=0.4, invert=True),
        Gate(Product(), "entropy", 1.0),
        Gate(Nucleus(force_eos=True)),
        Gate(Gate(KLGate(0.3), "max_p"), "entropy", 2.0, invert=True),
        Gate(Nudge(0.2), tau=1e300),
    ],
    ids=str,
)
def test_what_is_written_is_read(rule: Rule):
    assert parse_rule(str(rule)) == rule


def test_how_gates_are_spelled():
    assert parse_rule("gate(rule=product, by=entropy, tau=1.0)") == Gate(Product(), "entropy", 1.0)
    assert parse_rule("gate(rule=nucleus(force_eos=True), by=kl)") == Gate(Nucleus(force_eos=True), "kl", 0.1)
    assert parse_rule(" gate( rule = gate(rule= geometric ,by=max_p) , tau=2 ) ") == Gate(Gate(Geometric(), "max_p"), "kl", 2.0)
    assert parse_rule("gate(rule=gate(by=entropy;tau=2);by=max_p)") == Gate(Gate(by="entropy", tau=2.0), "max_p")
    assert parse_rule("gate(by='entropy')") == Gate(by="entropy", tau=1.0)
    assert str(Gate(Mixture(), "entropy")) == "gate(rule=mixture, by=entropy)"
    assert str(Gate()) == "gate"
    assert Gate(Nucleus(force_eos=True)).bind([3]).rule == Nucleus(force_eos=True, eos_token_ids=(3,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gate(rule=par)", "there is no rule 'par'"),
        ("gate(rule=)", "there is no rule ''"),
        ("gate(rule=kl_gate(tau=0.2)", "lacks its closing bracket"),
        ("gate(rule=kl_gate(tau=0.2)))", "a closing bracket too many"),
        ("gate(rule=nucleus(force_eos=maybe))", "'nucleus' wants force_eos as bool, not 'maybe'"),
        ("gate(rule=kl_gate(tau='0.2), by=kl)", "lacks a closing quote"),
        ("gate(rule=candidates)", "gate: rule 'candidates' has no row in closed form"),
        ("gate(rule=candidates(n=4), by=kl)", r"gate: rule 'candidates\(n=4\)' has no row"),
        ("gate(by=mood)", "gate: by must be one of kl, entropy, max_p, not 'mood'"),
        ("gate(tau=-1)", "gate: tau must be at least 0, not -1"),
        ("gate(by=max_p, tau=1.5)", "gate: tau is a probability by max_p: it must be from 0 to 1, not 1.5"),
        ("nudge(tau=1.5)", "nudge: tau is a probability"),
        ("candidates(rule=gate)", "'candidates' has no setting 'rule'"),
        ("gate(rule=product, rule=nucleus)", "gives rule twice"),
        (f"gate(rule={'gate(rule=' * 40}product{')' * 41}", f"no rule is longer than {MAX_TEXT}"),
    ],
)
def test_what_is_no_gate_is_named(text, message):
    with pytest.raises(InvalidOption, match=message):
        parse_rule(text)


def test_from_python_a_rule_within_is_a_rule():
    with pytest.raises(InvalidOption, match="gate: rule 'confidence' hands over, which a gate would hide: put gates into it"):
        parse_rule("confidence(before=gate(rule=confidence))")
    with pytest.raises(InvalidOption, match="gate: rule must be a rule, such as Product"):
        Gate("product")
    with pytest.raises(InvalidOption, match="no row in closed form"):
        Gate(Candidates())
