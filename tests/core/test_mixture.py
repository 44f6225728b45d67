"""`mixture` against its definition, at its ends, and its refusal of weights that are no shares."""

import math

import pytest
import torch
from torch.testing import assert_close

from law_of import expected_row
from rows_of import rows
from trimtab import AlignedModel, SamplingParams
from trimtab.cli.serve import Options
from trimtab.core.logprobs import log_normalize
from trimtab.core.objectives import likelihood
from trimtab.core.rules import Gate, Mixture, Nucleus, parse_rule
from trimtab.decode.options import RowOptions
from trimtab.decode.settings import with_weight
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest, ManifestError
from trimtab.models.aligner import Manifest
from trimtab.models.table import TableLM

V = 6


@pytest.mark.parametrize("weights", [[0.3], [1.0], [0.2, 0.5], [0.0, 1.0], [0.7, 0.2, 0.1]], ids=str)
def test_the_row_is_that_of_the_definition(weights):
    """On probabilities in plain Python, with zeros in every row; what the proposal cannot say stays out."""
    p, qs = rows(1, 20, zeros=0.3), [rows(2 + i, 20, zeros=0.3) for i in range(len(weights))]
    p[:, 0] = 0.0
    p = log_normalize(p)
    qs = [log_normalize(torch.where(torch.arange(V) == 0, 0.0, q)) for q in qs]
    found = Mixture()(p, qs, weights).exp()
    for k in range(20):
        expected = expected_row("mixture", p[k].exp().tolist(), [q[k].exp().tolist() for q in qs], weights)
        assert_close(found[k].tolist(), expected, atol=1e-12, rtol=1e-9)


def test_without_a_share_it_is_the_proposal_to_the_bit_whatever_the_aligner_says():
    p = rows(3, 50, zeros=0.3).float()
    sick = torch.full_like(p, math.nan)
    assert torch.equal(Mixture()(p, [rows(4, 50).float()], [0.0]), p)
    assert torch.equal(Mixture()(p, [sick, sick], [0.0, 0.0]), p)
    with pytest.raises(DeadRow):
        Mixture()(p, [sick], [1e-9])


def test_with_all_the_share_it_is_the_aligner_on_the_support():
    p, q = rows(5, 9, zeros=0.3), rows(6, 9)
    assert_close(Mixture()(p, [q], [1.0]), Nucleus()(p, [q], [1.0]))


def test_what_an_aligner_cannot_say_the_proposal_says():
    """p = (.5, .3, .2), q = (1, 0, 0), w = .4: (.7, .18, .12)."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([1.0, 0.0, 0.0]).double().log()
    assert_close(Mixture()(p, [q], [0.4]).exp().tolist(), [0.7, 0.18, 0.12])


def test_an_aligner_that_agrees_changes_nothing():
    p = rows(7, 9, zeros=0.3)
    assert_close(Mixture()(p, [p, p], [0.3, 0.4]), p)


def test_it_survives_what_underflows_outside_log_space():
    p = log_normalize(torch.tensor([0.0, -300.0, -500.0]))
    q = log_normalize(torch.tensor([-400.0, 0.0, -400.0]))
    weight = 0.25
    assert_close(Mixture()(p, [q], [weight]), torch.tensor([math.log(0.75), math.log(0.25), math.log(0.25) - 400]))


def test_drafts_of_the_aligner_are_accepted_as_often_as_the_law_says():
    """Σ min(target, q) = 1 − (1 − w)·TV(p̃, q), for the target is q but for the share of p̃."""
    p, q = rows(8, 30), rows(9, 30)
    for weight in (0.0, 0.3, 0.8, 1.0):
        target = Mixture()(p, [q], [weight])
        distance = (p.exp() - q.exp()).abs().sum(-1) / 2
        assert_close(torch.minimum(target, q).exp().sum(-1), 1 - (1 - weight) * distance)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_masked_rows_have_gradients(weight):
    """A token that nobody can say, and one that the aligner alone cannot say: gradients are those of finite differences."""
    p, mask = rows(10, 2), torch.tensor([0.0, 0, 0, 0, -math.inf, -math.inf])
    p[:, 5] = -math.inf
    tokens = torch.tensor([0, 3])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return likelihood(Mixture(), log_normalize(p), log_normalize(x + mask), weight, tokens)

    assert torch.autograd.gradcheck(loss, rows(11, 2).requires_grad_())


def test_by_default_proposal_and_aligners_share_alike():
    assert Mixture().default_weights(1) == (0.5,)
    assert Mixture().default_weights(3) == (0.25,) * 3
    assert Gate(Mixture()).default_weights(1) == (0.5,)


# ---- weights that are no shares

WRONG = {
    "an anti-expert": ([-0.5], "weight must be at least 0 under mixture"),
    "more than all": ([1.5], "weight: under mixture the aligner's share is 1.5"),
    "more than all together": ([0.7, 0.7], "weight: under mixture the aligners' shares sum to 1.4"),
}


@pytest.mark.parametrize("rule", ["mixture", "gate(rule=mixture)", "gate(rule=gate(rule=mixture), by=max_p)"])
@pytest.mark.parametrize("case", WRONG)
def test_weights_that_are_no_shares_are_refused_before_any_work(case, rule):
    weights, message = WRONG[case]
    proposal, *aligners = [TableLM.random(5, seed=seed) for seed in range(1 + len(weights))]
    model = AlignedModel(proposal, aligners)
    for call in (
        lambda: model.generate([[1]], SamplingParams(rule=rule, weight=weights)),
        lambda: model.score([[1]], [[2]], SamplingParams(rule=rule, weight=weights)),
        lambda: AlignedModel(proposal, aligners, rule=rule, weight=weights),
    ):
        with pytest.raises(InvalidRequest, match=f"^{message}"):
            call()
    with pytest.raises(InvalidOption, match=f"^{message}"):
        RowOptions(proposal="p", aligner=("a",) * len(weights), rule=rule, weight=tuple(weights))
    with pytest.raises(InvalidOption, match=f"^{message}"):
        parse_rule(rule)(rows(1, 2), [rows(2 + i, 2) for i in range(len(weights))], weights)


def test_a_manifest_may_not_have_them_either():
    with pytest.raises(ManifestError, match="weight must be at least 0 under mixture"):
        Manifest(vocabulary="sha256:x", rule="mixture", weight=-0.5)
    manifest = Manifest(vocabulary="sha256:x", rule="product", weight=1.5)
    with pytest.raises(InvalidOption, match="weight: under mixture"):
        with_weight(manifest, 1.2, "mixture", "sha256:x")
    assert with_weight(manifest, 0.4, "mixture", "sha256:x").weight == 0.4


def test_a_servers_aligners_are_weighed_each_by_itself():
    """A request says which of them it wants; what it gets is checked then."""
    two = {"proposal": "p", "aligner": ("a=x", "b=y"), "rule": "mixture"}
    assert Options(**two, weight=(0.7, 0.7)).weight == (0.7, 0.7)
    with pytest.raises(InvalidOption, match="under mixture the aligner's share is"):
        Options(**two, weight=(0.7, 1.7))


def test_manifests_that_ask_for_more_than_all_together_need_a_request_that_says():
    proposal, *aligners = [TableLM.random(5, seed=seed) for seed in range(3)]
    manifests = [Manifest(vocabulary="sha256:x", rule="mixture", weight=0.7)] * 2
    with pytest.raises(InvalidRequest, match="the aligners' shares sum to"):
        AlignedModel(proposal, aligners, manifests=manifests)
    assert AlignedModel(proposal, aligners, manifests=manifests, weight=[0.5, 0.5]).generate([[1]])


def test_shares_that_sum_to_one_but_for_rounding_are_shares():
    for count in range(1, 30):
        Mixture().check_weights([1 / count] * count)
        row = Mixture()(rows(1).float(), [rows(2 + i).float() for i in range(count)], [1 / count] * count)
        assert_close(row.exp().sum().item(), 1.0)
