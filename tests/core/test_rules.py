"""The contract of every rule, and the law of each, worked out independently on small rows."""

import dataclasses
import enum
import itertools
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from brought import bring, look_again
from law_of import expected_row, powers
from looking import LOOKING, Tiring
from rows_of import rows
from statistics_of import chi_square
from trimtab import AlignedModel, SamplingParams
from trimtab.cli.options import add_options
from trimtab.cli.parser import Parser
from trimtab.core.draw import NO_TOKEN
from trimtab.core.logprobs import Warp, kl_divergence, log_normalize, warp
from trimtab.core.noise import uniforms
from trimtab.core.objectives import likelihood
from trimtab.core.rules import (
    RULES,
    Candidates,
    Confidence,
    Context,
    Gate,
    Geometric,
    KLGate,
    Mixture,
    Nucleus,
    Product,
    Rule,
    check_rule,
    log_power,
    parse_rule,
)
from trimtab.core.rules.context import first_context, follow, follow_run, unroll
from trimtab.decode.options import RULE_NAMES, RowOptions
from trimtab.errors import DeadRow, InvalidOption
from trimtab.models.table import TableLM

V = 6


EVERY: list[Rule] = [rule() for rule in RULES.values()]
ROW_RULES = [rule for rule in EVERY if rule.has_row and not rule.looks_back]
ROW_RULES += [KLGate(tau=1.0), KLGate(tau=math.inf), Nucleus(force_eos=True, eos_token_ids=(1, 2))]
ROW_RULES += [
    Gate(Mixture(), tau=0.5, invert=True),
    Gate(Geometric(), "entropy", 1.2),
    Gate(Nucleus(force_eos=True, eos_token_ids=(1, 2)), "max_p", 0.6, invert=True),
    Gate(Gate(Product(), "entropy"), "max_p", 0.7),
]


@pytest.fixture(params=ROW_RULES, ids=str)
def rule(request: pytest.FixtureRequest) -> Rule:
    return request.param


def has_law(rule: Rule, weights: list[float]) -> bool:
    """Whether the rule has a law for these weights; where it has none, it must say so."""
    try:
        rule.check_weights(weights)
    except InvalidOption:
        with pytest.raises(InvalidOption, match=r"^weight"):
            rule(rows(1), [rows(2 + i) for i in range(len(weights))], weights)
        return False
    return True


# ---- the contract of all rules


@pytest.mark.parametrize("weights", [[1.0], [0.4], [0.7, 0.2], [1.5, -0.5]])
def test_target_is_normalised_within_the_support_and_row_by_row(rule, weights):
    if not has_law(rule, weights):
        return
    logp, logqs = rows(1, 3, 4, zeros=0.3), [rows(2 + i, 3, 4) for i in range(len(weights))]
    before = [logp.clone(), *(logq.clone() for logq in logqs)]
    target = rule(logp, logqs, weights)
    assert_close(target.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert target[logp.isneginf()].isneginf().all()
    for b, k in itertools.product(range(3), range(4)):
        assert_close(rule(logp[b, k], [logq[b, k] for logq in logqs], weights), target[b, k], atol=0, rtol=0)
    assert all(torch.equal(old, new) for old, new in zip(before, [logp, *logqs], strict=True)), "inputs were changed"


@pytest.mark.parametrize("weights", [[1.0], [0.4], [0.7, 0.3], [1.5, -0.5]])
def test_rows_of_the_proposal_that_are_not_read_change_nothing(rule, weights):
    if not has_law(rule, weights):
        return
    logqs = [rows(20 + i, 40) for i in range(len(weights))]
    one, other = (rule(rows(seed, 40), logqs, weights) for seed in (1, 2))
    assert torch.equal(one, other) or rule.reads_proposal(weights)


def test_who_does_not_read_the_proposal():
    assert not Geometric().reads_proposal([1.0])
    assert not Geometric().reads_proposal([0.25, 0.75])
    assert Geometric().reads_proposal([0.999])
    assert not Nucleus().reads_proposal([0.5])
    assert not Mixture().reads_proposal([1.0])
    assert not Mixture().reads_proposal([0.25, 0.75])
    assert Mixture().reads_proposal([0.999])
    assert Gate(Nucleus(), "entropy").reads_proposal([1.0]), "it opens by the proposal"
    assert all(rule.reads_proposal([]) for rule in ROW_RULES)


def test_weights_may_differ_by_row(rule):
    logp, logqs = rows(3, 2, 3), [rows(4, 2, 3), rows(5, 2, 3)]
    different = [[1.0, 0.5], [0.2, -0.1]] if has_law(rule, [1.0, 0.5]) else [[0.2, 0.5], [0.0, 0.0]]
    weights = torch.tensor(different, dtype=torch.float64).unsqueeze(1)
    together = rule(logp, logqs, weights)
    for b in range(2):
        assert_close(together[b], rule(logp[b], [logq[b] for logq in logqs], weights[b, 0].tolist()), atol=0, rtol=0)


def test_without_aligners_every_rule_is_the_proposal(rule):
    logp = rows(6, 4, zeros=0.3)
    assert torch.equal(rule(logp, [], []), logp)


def test_without_aligners_the_definition_is_the_proposal():
    """vLLM's tests ask it for the law of bare requests."""
    assert expected_row("product", [0.5, 0.3, 0.2], [], []) == [0.5, 0.3, 0.2]


@pytest.mark.parametrize("rule", [Product(), Geometric(), Nucleus(), KLGate(tau=math.inf)], ids=str)
def test_rows_without_common_support_are_an_error(rule):
    logp = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    logq = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.5, 0.5]]).log()
    with pytest.raises(DeadRow, match="leaves no token"):
        rule(logp, [logq], [1.0])


def test_kl_gate_leaves_rows_without_common_support_to_the_proposal():
    logp, logq = torch.tensor([1.0, 0.0, 0.0]).log(), torch.tensor([0.0, 0.5, 0.5]).log()
    assert torch.equal(KLGate()(logp, [logq], [1.0]), logp)


@pytest.mark.parametrize("weight", [1.0, -0.5])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_distribution_is_an_error_wherever_it_comes_from(rule, number, weight):
    """NaN and +inf at one token, here one that the other model cannot say; −inf at all of them."""
    if not has_law(rule, [weight]):
        return
    where = slice(None) if number == -math.inf else slice(0, 1)
    sick, sound = rows(7, 2), rows(8, 2)
    sick[1, where], sound[:, 0] = number, -math.inf
    with pytest.raises(DeadRow):
        rule(sick, [sound], [weight])
    with pytest.raises(DeadRow):
        rule(sound, [sick], [weight])
    assert_close(rule(sound, [rows(9, 2), sick], [weight, 0.0]), rule(sound, [rows(9, 2)], [weight]))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_candidates_of_what_is_no_distribution_are_no_tokens(number):
    sick, sound = rows(7), rows(8)
    sick[:] = number
    for logp, logq in ((sick, sound), (sound, sick)):
        assert set(draw_candidates(Candidates(n=3), logp, [logq], [-1.0], 20)) == {NO_TOKEN}


# ---- anti-experts and what they cannot say

SIGNS = [[-1.0], [-0.3], [1.0, -1.0], [-0.4, -0.7], [0.5, 0.0, -2.0], [1.7], [-1.0, 1.7]]


@pytest.mark.parametrize("weights", SIGNS, ids=str)
@pytest.mark.parametrize("name", ["product", "geometric", "nucleus", "kl_gate(tau=0.8)", "kl_gate(tau=inf)"])
def test_impossible_tokens_have_the_law_of_the_definition(name, weights):
    """In plain Python on probabilities: with λ < 0 an impossible token has the factor of the least likely possible one.

    Proposal and aligners are 0 here and there, apart and together, and each row has a token that all can say.
    """
    logp, logqs = rows(60, 30, zeros=0.3), [rows(61 + i, 30, zeros=0.4) for i in range(len(weights))]
    logp[:, 0] = 0.0
    logp = log_normalize(logp)
    logqs = [log_normalize(torch.where(torch.arange(V) == 0, 0.0, logq)) for logq in logqs]
    target = parse_rule(name.replace("inf", "1e999"))(logp, logqs, weights)
    for k in range(30):
        expected = expected_row(name, logp[k].exp().tolist(), [logq[k].exp().tolist() for logq in logqs], weights)
        assert_close(target[k].exp().tolist(), expected, atol=1e-12, rtol=1e-9)
        assert all(t == 0 for t, p in zip(target[k].exp().tolist(), logp[k].tolist(), strict=True) if p == -math.inf)


def test_an_anti_expert_holds_an_impossible_token_back_no_more_than_any_other():
    """p = (.5, .3, .2), q = (.8, .2, 0), λ = −1: factors 1/.8, 1/.2 and, for what is impossible, 1/.2 again.

    So p·q^λ = (.625, 1.5, 1) / 3.125. Where q is less, the factor is never less.
    """
    p, q = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.8, 0.2, 0.0]).double().log()
    assert_close(Product()(p, [q], [-1.0]).exp().tolist(), [0.2, 0.48, 0.32])
    assert_close(Product().log_z(p, [q], torch.tensor([-1.0]).double()).item(), math.log(3.125))
    factors = Product()(p, [q], [-1.0]) - p
    assert factors[0] < factors[1]
    assert factors[1].item() == pytest.approx(factors[2].item())


def test_an_anti_expert_that_cannot_say_what_the_proposal_cannot_say_is_as_if_it_could():
    p, q = torch.tensor([0.5, 0.5, 0.0]).double().log(), torch.tensor([0.7, 0.3, 0.0]).double().log()
    small = torch.tensor([0.7, 0.3, 1e-300]).double().log()
    assert_close(Product()(p, [q], [-1.5]), Product()(p, [small], [-1.5]))


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -65504.0, -1e9, -math.inf])
@pytest.mark.parametrize("weights", [[-2.0, -1.0], [2.0, -1.0], [-1e6, 0.5], [-1e-9, 1e-9], [0.0, 0.3]], ids=str)
def test_a_mask_is_impossible_however_it_is_written(rule, mask, weights):
    """Models write −inf, or the least number of a format, whose double overflows."""
    if not has_law(rule, weights):
        return
    logp, logqs = rows(70, 4).float(), [rows(71, 4).float(), rows(72, 4).float()]
    logp[:, 5] = logqs[0][:, 5] = logqs[1][:, 4] = mask
    logqs[1][:, 5] = mask
    expected = [torch.where(row < -1e4, -math.inf, row) for row in (logp, *logqs)]
    target = rule(logp, logqs, weights)
    assert torch.equal(target.exp(), rule(expected[0], expected[1:], weights).exp())
    assert target[:, 5].isneginf().all()


def test_the_power_of_a_row_that_is_not_normalised_differs_by_a_constant():
    logits = rows(73, 3, zeros=0.4) + 7.0
    for weight in (0.6, -0.6):
        scaled = log_power(logits, torch.tensor([weight]))
        assert_close(log_normalize(scaled), log_normalize(log_power(log_normalize(logits), torch.tensor([weight]))))


@pytest.mark.parametrize("weight", [1.0, 0.0, -1.0])
def test_masked_aligners_have_gradients(weight):
    """−inf in a row, and none of it in the gradient, which is that of finite differences: the least possible token's counts."""
    logits = rows(74, 2)[:, :5]
    mask = torch.tensor([0.0, 0, 0, -math.inf, -math.inf])
    tokens = torch.tensor([0, 1] if weight > 0 else [3, 0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return likelihood(Product(), log_normalize(rows(75, 2)[:, :5]), log_normalize(x + mask), weight, tokens)

    assert torch.autograd.gradcheck(loss, logits.clone().requires_grad_())


# ---- rules that look back

LOOKING_BACK = [*(rule for rule in EVERY if rule.looks_back), *(rule() for rule in LOOKING), Tiring(token=3, doubled=False)]


def some_context(rule: Rule, seed: int, *shape: int) -> Context:
    """Contexts of rows `[*shape]`, as a decoder might have them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(-1, V, (*shape, rule.window), generator=generator)
    logp = -torch.rand(*shape, rule.window, generator=generator, dtype=torch.float64) * 4
    logp = torch.where((tokens < 0) | (torch.rand(logp.shape, generator=generator) < 0.2), math.nan, logp)
    length = torch.randint(1, 5, shape, generator=generator)
    state = torch.randint(0, 3, (*shape, rule.state_size), generator=generator).double()
    return Context(tokens, logp, length + torch.randint(0, 9, shape, generator=generator), length, state)


def at(context: Context, *place: int) -> Context:
    return Context(*(part[place] for part in context))


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.2], [1.5, -0.5]])
@pytest.mark.parametrize("rule", LOOKING_BACK, ids=str)
def test_rules_that_look_back_keep_the_contract(rule, weights):
    """Normalised, in the support, pure, and row by row: of rows, of contexts, and of what a state becomes."""
    logp, logqs = rows(1, 3, 4, zeros=0.3), [rows(2 + i, 3, 4) for i in range(len(weights))]
    context = some_context(rule, 5, 3, 4)
    before = [part.clone() for part in (logp, *logqs, *context)]
    target = rule(logp, logqs, weights, context=context)
    tokens, drawn = torch.randint(0, V, (3, 4), generator=torch.Generator().manual_seed(6)), -torch.ones(3, 4).double()
    state = rule.advance(context, tokens, drawn) if rule.state_size else context.state
    assert state.shape == (3, 4, rule.state_size)
    assert_close(target.exp().sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert target[logp.isneginf()].isneginf().all()
    for b, k in itertools.product(range(3), range(4)):
        mine = at(context, b, k)
        alone = rule(logp[b, k], [logq[b, k] for logq in logqs], weights, context=mine)
        assert_close(alone, target[b, k], atol=0, rtol=0)
        if rule.state_size:
            assert torch.equal(rule.advance(mine, tokens[b, k], drawn[b, k]), state[b, k])
        if rule.marks:
            marked = rule.marked(logp, logqs, torch.tensor(weights).double(), context=context)
            assert marked.shape == (3, 4)
    after = (logp, *logqs, *context)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True)), "inputs were changed"
    assert parse_rule(str(rule)) == rule if rule.name in RULES else True
    assert torch.equal(rule.target(logp, [], torch.zeros(0)), logp), "without aligners it is the proposal"
    with pytest.raises(DeadRow):
        rule(torch.full_like(logp, math.nan), logqs, weights, context=context)


@pytest.mark.parametrize("rule", LOOKING_BACK, ids=str)
def test_a_run_of_rows_is_one_row_after_the_other(rule):
    """`unroll` and `follow_run` against `follow`, for texts that go on by different numbers of tokens."""
    prompts = [[3], [1, 2, 3, 4], [2, 2]]
    tokens = torch.tensor([[1, 2, 1, 4], [4, 1, 1, 1], [2, 3, 2, 0]])
    logp = -torch.arange(12).double().view(3, 4) / 3 if rule.reads_logp else torch.full((3, 4), math.nan).double()
    first = first_context(rule, prompts, torch.device("cpu"))
    run = unroll(rule, first, tokens[:, :-1], logp[:, :-1])
    steps = [first]
    for j in range(4):
        steps.append(follow(rule, steps[-1], tokens[:, j], logp[:, j]))
    for j in range(4):
        for part, one in zip(run, steps[j], strict=True):
            assert_close(part[:, j], one, equal_nan=True)
    counts = torch.tensor([0, 4, 2])
    for part, *ones in zip(follow_run(rule, first, run, tokens, logp, counts), *steps, strict=True):
        for b, count in enumerate(counts.tolist()):
            assert_close(part[b], ones[count][b], equal_nan=True)
    text = [*prompts[1], *tokens[1].tolist()]
    seen = steps[4]
    assert seen.tokens[1].tolist() == text[len(text) - rule.window :]
    assert (seen.position[1].item(), seen.prompt_length[1].item()) == (8, 4)
    assert first.logp.isnan().all()


def test_rules_are_values_that_read_as_they_are_written():
    for name in RULES:
        assert str(parse_rule(name)) == name
        assert parse_rule(name) == RULES[name]()
    assert parse_rule("candidates(n=8)") == Candidates(n=8)
    assert parse_rule(" kl_gate( tau = 1 ) ") == KLGate(tau=1.0)
    assert parse_rule("nucleus(force_eos=true)") == Nucleus(force_eos=True)
    for rule in (Candidates(n=3), KLGate(tau=0.5), Nucleus(force_eos=True), Geometric()):
        assert parse_rule(str(rule)) == rule
        assert parse_rule(rule) is rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("par", "there is no rule 'par'; choose one of candidates, confidence, gate, geometric"),
        ("candidates(n=8", "closing bracket"),
        ('product(")', "lacks a closing quote"),
        ("kl_gate(tau='0.2)", "lacks a closing quote"),
        ("candidates(m=8)", "'candidates' has no setting 'm'; it has: n"),
        ("product(n=8)", "'product' has no setting 'n'; it has: none"),
        ("candidates(n=many)", "wants n as int"),
        ("candidates(n=2.5)", "wants n as int"),
        ("nucleus(eos_token_ids=(1,))", "has no setting 'eos_token_ids'"),
        ("candidates(n=0)", "n must be from 1"),
        ("kl_gate(tau=-1)", "tau must be at least 0"),
    ],
)
def test_what_is_no_rule_is_named(text, message):
    with pytest.raises(InvalidOption, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse_rule(text)


# ---- the registry

THEIRS = """
import dataclasses
from typing import ClassVar

from trimtab.core.rules import Rule, weighted_sum


@dataclasses.dataclass(frozen=True)
class Leaning(Rule):
    name: ClassVar[str] = "leaning"
    share: float = 0.5
    times: int = 1
    loud: bool = False
    way: str = "up, or down"

    def log_weights(self, logp, logqs, weights):
        return logp + self.share * weighted_sum(logqs, weights)
"""
POINTS = {"trimtab.rules": {"leaning": "their_rules:Leaning"}}


def test_a_rule_of_another_package_is_found_read_and_decoded_like_ours(tmp_path, monkeypatch):
    """q at half its weight, by its definition; a rule that does not look back need not know of contexts."""
    look_again(RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "their_rules", THEIRS, POINTS)
    assert sorted(RULES) == sorted({*RULE_NAMES, "leaning"})
    rule = parse_rule("leaning")
    p, q = rows(80, 5, zeros=0.2), rows(81, 5)
    assert_close(rule(p, [q], [0.8]), Product()(p, [q], [0.4]))
    model = AlignedModel(TableLM.random(5, seed=0), [TableLM.random(5, seed=1)], rule="leaning(share=1.0)")
    plain = AlignedModel(model.proposal, model.aligners)
    assert model.score([[1]], [[2, 3]])[0].aligned == plain.score([[1]], [[2, 3]])[0].aligned
    assert len(model.generate([[1]], SamplingParams(max_tokens=9, seed=3))[0].tokens) == 9


@pytest.mark.parametrize("way", ["up", "up, or down", "a=b", "(x)", "it's", 'say "no"', "3", "true", "", " ", "back\\slash"])
def test_a_setting_of_text_is_read_as_it_is_written(tmp_path, monkeypatch, way):
    look_again(RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "their_rules", THEIRS, POINTS)
    rule = RULES["leaning"](way=way, times=3, loud=True, share=0.25)
    assert parse_rule(str(rule)) == rule
    assert str(RULES["leaning"](way="up")) == "leaning(way=up)"
    assert parse_rule("leaning(way='up', times=2)").way == "up"
    with pytest.raises(InvalidOption, match="lacks a closing quote"):
        parse_rule("leaning(way='up)")


def test_the_help_of_the_rule_names_what_is_installed(tmp_path, monkeypatch):
    look_again(RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "their_rules", THEIRS, POINTS)
    parser = Parser("trimtab generate")
    add_options(parser, RowOptions)
    shown = " ".join(parser.format_help().split())
    assert f"decoding rule: {', '.join(sorted(RULES))}; settings in brackets" in shown
    assert sorted({*RULE_NAMES, "leaning"}) == sorted(RULES)


def bad_rules():
    """What cannot be a rule, and the reason."""

    class Bare(Rule):
        name = "bare"

    @dataclasses.dataclass
    class Thawed:
        name = "thawed"

    @dataclasses.dataclass(frozen=True)
    class Nameless(Rule):
        pass

    @dataclasses.dataclass(frozen=True)
    class Spaced(Rule):
        name = "two words"

    @dataclasses.dataclass(frozen=True)
    class Wanting(Rule):
        name = "wanting"
        tau: float

    @dataclasses.dataclass(frozen=True)
    class Listing(Rule):
        name = "listing"
        ids: tuple = (1, 2)

    @dataclasses.dataclass(frozen=True)
    class Rowless(Rule):
        name = "rowless"

    @dataclasses.dataclass(frozen=True)
    class Standing(Product):
        name = "standing"
        state_size = 2

    @dataclasses.dataclass(frozen=True)
    class Unmarked(Product):
        name = "unmarked"
        marks = "loud"

    @dataclasses.dataclass(frozen=True)
    class Silent(Product):
        name = "silent"
        hands_over = True

    @dataclasses.dataclass(frozen=True)
    class Leaving(Product):
        name = "leaving"
        lets_go = True

    return {
        "that hands over without a mark": (Silent, "Silent hands over, and lacks marks"),
        "that lets go without a hand-over": (Leaving, "Leaving lets aligners go, and does not say that it hands over"),
        "that does not say what it marks": (Unmarked, "Unmarked says what it marks, and lacks marked"),
        "without a row": (Rowless, "Rowless lacks log_weights"),
        "with a state that never goes on": (Standing, "Standing keeps a state, and lacks advance"),
        "needs to be a class": (Product(), "a rule is a class that inherits"),
        "of another kind": (Thawed, "a rule is a class that inherits"),
        "not frozen": (Bare, r"Bare must be a frozen dataclass: put @dataclass\(frozen=True\) above it"),
        "without a name": (Nameless, "Nameless needs a name of small letters"),
        "with a name that text cannot say": (Spaced, "Spaced needs a name of small letters"),
        "without a default": (Wanting, "Wanting.tau needs a default"),
        "with a setting that text cannot say": (
            Listing,
            r"Listing.ids must have one of bool, int, float, str, or a rule, for a default",
        ),
    }


@pytest.mark.parametrize("case", bad_rules())
def test_what_cannot_be_a_rule_is_refused_with_the_reason(case):
    rule, message = bad_rules()[case]
    with pytest.raises(InvalidOption, match=message):
        check_rule(rule)


def test_a_row_of_another_length_is_no_row():
    """One number would be spread over the vocabulary, and be another law."""

    @dataclasses.dataclass(frozen=True)
    class Narrow(Product):
        name = "narrow"

        def log_weights(self, logp, logqs, weights, *, context=None):
            return logp[..., :1]

    with pytest.raises(InvalidOption, match=f"rule 'narrow': log_weights gives 1 numbers a row, and not {V}"):
        Narrow()(rows(70, 2), [rows(71, 2)], [1.0])


def test_a_state_of_another_shape_is_no_state():
    """Of one text it would be taken for the text's own, and of several for each other's."""

    @dataclasses.dataclass(frozen=True)
    class Flat(Product):
        name = "flat"
        state_size = 1

        def advance(self, context, tokens, logp):
            return context.state[..., 0] + 1

    rule, first = Flat(), first_context(Flat(), [[1, 2], [3]], torch.device("cpu"))
    for run in (lambda: follow(rule, first, torch.tensor([1, 2]), torch.zeros(2)),
                lambda: unroll(rule, first, torch.tensor([[1], [2]]), torch.zeros(2, 1))):  # fmt: skip
        with pytest.raises(
            InvalidOption, match=r"rule 'flat': advance gives a state of shape \[2\], and must give one of \[2, 1\]"
        ):
            run()


def test_a_rule_that_cannot_be_used_is_refused_by_its_package(tmp_path, monkeypatch):
    look_again(RULES, monkeypatch)
    bring(tmp_path, monkeypatch, "their_rules", THEIRS.replace("frozen=True", "frozen=False"), POINTS)
    with pytest.raises(InvalidOption, match="rule: 'leaning' of their_rules cannot be"):
        parse_rule("leaning")


# ---- product


def test_product_is_the_renormalised_product():
    p, q1, q2 = rows(10, 5, zeros=0.3), rows(11, 5), rows(12, 5)
    raw = p.exp() * q1.exp() ** 0.8 * q2.exp() ** -0.3
    assert_close(Product()(p, [q1, q2], [0.8, -0.3]).exp(), raw / raw.sum(-1, keepdim=True))


def test_product_with_weight_zero_or_a_uniform_aligner_is_the_proposal():
    p, q = rows(13, 5, zeros=0.3), rows(14, 5, zeros=0.5)  # weight 0 also where the aligner says never
    assert_close(Product()(p, [q], [0.0]), p)
    uniform = torch.full_like(p, -math.log(V))
    for weight in (1.0, 0.3, -2.0):
        assert_close(Product()(p, [uniform], [weight]), p)


def test_product_survives_what_underflows_outside_log_space():
    p = log_normalize(torch.tensor([-500.0, -600.0, -2000.0]))
    q = log_normalize(torch.tensor([-3000.0, -800.0, 0.0]))
    assert_close(Product()(p, [q], [1.0]), log_normalize(torch.tensor([-3500.0, -1400.0, -2000.0])))


def test_an_expert_against_an_antiexpert_is_proxy_tuning():
    p, tuned, base = rows(15, 4), rows(16, 4), rows(17, 4)
    assert_close(Product()(p, [tuned, base], [1.0, -1.0]), log_normalize(p + tuned - base))


# ---- geometric


def test_geometric_interpolates_from_proposal_to_aligner():
    p, q = rows(20, 5), rows(21, 5)
    assert_close(Geometric()(p, [q], [0.0]), p)
    assert_close(Geometric()(p, [q], [1.0]), q)
    assert_close(Geometric()(p, [q], [0.3]), log_normalize(0.7 * p + 0.3 * q))
    assert_close(Geometric()(p, [p], [0.3]), p)


def test_geometric_stays_in_the_support_when_the_proposal_has_no_weight_left():
    p, q = rows(22, 5, zeros=0.4), rows(23, 5)
    assert_close(Geometric()(p, [q], [1.0]), log_normalize(torch.where(p.isneginf(), -math.inf, q)))


def test_default_weights_share_equally_under_geometric_and_are_one_elsewhere():
    assert Geometric().default_weights(1) == (0.5,)
    assert Geometric().default_weights(3) == (0.25,) * 3
    assert Product().default_weights(2) == (1.0, 1.0)


# ---- nucleus and kl_gate


def test_nucleus_is_the_aligner_on_the_proposals_support():
    p, q = warp(rows(30, 5), Warp(top_p=0.8)), rows(31, 5)
    inside = (~p.isneginf()).double()
    raw = q.exp() * inside
    assert_close(Nucleus()(p, [q], [1.0]).exp(), raw / raw.sum(-1, keepdim=True))


def test_nucleus_of_one_token_is_that_token():
    p = warp(rows(32, 5), Warp(top_p=1e-9))
    assert_close(Nucleus()(p, [rows(33, 5)], [1.0]), p)


def test_force_eos_ends_where_the_proposals_best_token_ends():
    rule = Nucleus(force_eos=True).bind([1, 2])
    q = rows(34, 3)
    p = torch.tensor([[0.1, 0.7, 0.2, 0, 0, 0], [0.4, 0.3, 0.3, 0, 0, 0], [0.1, 0.2, 0.7, 0, 0, 0]]).double().log()
    target = rule(p, [q], [1.0]).exp()
    assert target[0].tolist() == [0, 1, 0, 0, 0, 0]
    assert_close(target[1], Nucleus()(p, [q], [1.0])[1].exp())
    assert target[2].tolist() == [0, 0, 1, 0, 0, 0]
    assert Nucleus().bind([1, 2]) == Nucleus()


def test_kl_gate_is_nucleus_below_tau_and_the_proposal_above():
    p, q = rows(35, 40, zeros=0.2), rows(36, 40)
    tau = 1.5
    near = kl_divergence(p, q) <= tau
    assert 0 < near.sum() < 40
    target = KLGate(tau=tau)(p, [q], [1.0])
    assert_close(target[near], Nucleus()(p, [q], [1.0])[near])
    assert_close(target[~near], p[~near])
    assert torch.equal(KLGate(tau=tau).marked(p, [q], torch.ones(1)), ~near)


# ---- candidates


def candidates_law(p: torch.Tensor, q: torch.Tensor, n: int, weight: float) -> torch.Tensor:
    """The exact law by running through all V^n draws: weight each by q^λ, normalise, draw one; multiplicity is kept."""
    law = torch.zeros(V, dtype=torch.float64)
    for draw in itertools.product(range(V), repeat=n):
        chance = math.prod(p[v].item() for v in draw)
        factors = powers(q.tolist(), weight)
        weights = [factors[v] for v in draw]
        for v, w in zip(draw, weights, strict=True):
            law[v] += chance * w / sum(weights)
    return law


def draw_candidates(
    rule: Candidates, p: torch.Tensor, logqs: list[torch.Tensor], weights: list[float], count: int
) -> list[int]:
    noise = uniforms([4], [0], [0], count, rule.draws)[0]
    expand = [row.expand(count, V) for row in (p, *logqs)]
    return rule.sample(expand[0], expand[1:], torch.tensor(weights, dtype=torch.float64), noise).tolist()


@pytest.mark.parametrize(("n", "weight", "zeros"), [(1, 1.0, 0), (2, 1.0, 0), (3, 0.5, 0), (4, 1.0, 0), (3, -1.0, 0.5)])
def test_candidates_follow_their_enumerated_law(n, weight, zeros):
    p, q = rows(40, zeros=0.2), rows(41, zeros=zeros)
    law = candidates_law(p.exp(), q.exp(), n, weight)
    counts = torch.bincount(torch.tensor(draw_candidates(Candidates(n=n), p, [q], [weight], 30_000)), minlength=V)
    assert chi_square(dict(enumerate(counts.tolist())), dict(enumerate(law.tolist()))) > 1e-3


def test_candidates_law_starts_at_the_proposal_and_approaches_product():
    """n = 1 is p̃. The distance to `product` falls like 1/n, and it falls towards `product`, not towards q."""
    p, q = rows(42).exp(), rows(43).exp()
    assert_close(candidates_law(p, q, 1, 1.0), p)
    product = p * q / (p * q).sum()
    gaps = [(candidates_law(p, q, n, 1.0) - product).abs().sum().item() / 2 for n in (1, 2, 4, 6)]
    assert gaps == sorted(gaps, reverse=True)
    many = draw_candidates(Candidates(n=200), p.log(), [q.log()], [1.0], 10_000)
    shares = torch.bincount(torch.tensor(many), minlength=V) / 10_000
    assert (shares - product).abs().sum() / 2 < 0.03
    assert (q - product).abs().sum() / 2 > 0.1


def test_candidates_have_no_row():
    with pytest.raises(InvalidOption, match="closed form"):
        Candidates()(rows(44), [rows(45)], [1.0])


@pytest.mark.parametrize("tau", ["1" + "0" * 170, "-" * 150 + "1", "0x" + "f" * 150, "1e999", "((((1))))" * 9, "-" * 10**6])
def test_settings_out_of_all_bounds_are_refused_in_few_words(tau):
    with pytest.raises(InvalidOption) as refused:
        parse_rule(f"candidates(n={tau})")
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Confidence(window=2.5), "confidence: window must be an integer, not 2.5"),
        (lambda: Confidence(window=True), "confidence: window must be an integer, not True"),
        (lambda: Confidence(threshold="a"), "confidence: threshold must be a number, not 'a'"),
        (lambda: Confidence(before="product"), "confidence: before must be a rule, such as Product(), not 'product'"),
        (lambda: Candidates(n=2.0), "candidates: n must be an integer, not 2.0"),
        (lambda: Gate(tau=None), "gate: tau must be a number, not None"),
        (lambda: Gate(by=3), "gate: by must be a text, not 3"),
        (lambda: Nucleus(force_eos=1), "nucleus: force_eos must be true or false, not 1"),
    ],
)
def test_settings_of_another_kind_are_refused_in_python_as_in_text(make, said):
    with pytest.raises(InvalidOption) as refused:
        make()
    assert str(refused.value) == said


def test_a_whole_number_may_stand_for_a_float():
    assert parse_rule(str(Confidence(threshold=1))) == Confidence(threshold=1.0)


def test_numbers_and_texts_of_other_types_become_plain_ones():
    class By(enum.StrEnum):
        KL = "kl"

    made = [
        Confidence(window=np.int64(4), threshold=np.float64(0.5)),
        Candidates(n=np.int32(3)),
        Gate(by=By.KL, tau=1),
    ]
    assert made == [Confidence(window=4, threshold=0.5), Candidates(n=3), Gate(by="kl", tau=1.0)]
    assert [parse_rule(str(rule)) for rule in made] == made
