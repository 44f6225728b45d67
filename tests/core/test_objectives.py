"""Each objective against its definition, and the two that have an exact optimum against it."""

import math

import pytest
import torch
from torch.testing import assert_close

from trimtab.core.logprobs import gather, log_normalize
from trimtab.core.objectives import acceptance, distillation, likelihood, per_example, preference, ram, sft
from trimtab.core.rules import Geometric, Product, Rule
from trimtab.models.table import TableLM

V = 5


def random_rows(seed: int, *shape: int) -> torch.Tensor:
    return log_normalize(torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_tokens_are_summed_by_their_owners():
    logp, logq = random_rows(0, 5), random_rows(1, 5)
    tokens, owner = torch.tensor([1, 2, 3, 4, 4]), torch.tensor([0, 0, 0, 2, 2])
    losses = likelihood(Product(), logp, logq, 0.7, tokens)
    by_hand = torch.stack([-Product()(logp[i], [logq[i]], [0.7])[tokens[i]] for i in range(5)])
    assert_close(losses, by_hand)
    assert_close(per_example(losses, owner, 3), torch.stack([by_hand[:3].sum(), by_hand[:0].sum(), by_hand[3:].sum()]))
    assert_close(sft(logq, tokens), torch.stack([-logq[i, tokens[i]] for i in range(5)]))


@pytest.mark.parametrize(("rule", "weight"), [(Product(), 1.0), (Product(), 0.5), (Geometric(), 0.4)])
def test_likelihood_reaches_the_token_level_optimum(rule: Rule, weight: float):
    """The aligned model can be any distribution with p's support, so maximum likelihood makes it the data's.

    A free table q is trained on the exact law of a target model after every context. At the optimum the rule's row equals
    the target's row, and for `product` at λ that means q ∝ (target/p)^(1/λ).
    """
    proposal, target = TableLM.random(V, seed=1).table, TableLM.random(V, seed=2).table
    logits = torch.zeros(V + 1, V, dtype=torch.float64, requires_grad=True)
    contexts = V + 1
    # One example per context and token, weighted by the target's probability: the population's loss, not a sample's.
    logp = proposal.repeat_interleave(V, 0)
    tokens = torch.arange(V).repeat(contexts)
    chance = target.exp().flatten()
    optimiser = torch.optim.LBFGS(
        [logits], lr=1, max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        logq = log_normalize(logits).repeat_interleave(V, 0)
        total = (chance * likelihood(rule, logp, logq, weight, tokens)).sum()
        total.backward()
        return total

    optimiser.step(loss)
    logq = log_normalize(logits.detach())
    assert_close(rule(proposal, [logq], [weight]), target, atol=1e-5, rtol=0)
    if isinstance(rule, Product):
        assert_close(logq, log_normalize((target - proposal) / weight), atol=1e-5, rtol=0)


def test_likelihood_of_an_unaligned_proposal_is_its_own():
    logp, tokens = random_rows(3, 3), torch.tensor([0, 1, 2])
    own = -gather(logp, tokens)
    assert_close(likelihood(Product(), logp, torch.full_like(logp, -math.log(V)), 1.0, tokens), own)
    assert_close(likelihood(Geometric(), logp, random_rows(4, 3), 0.0, tokens), own)


def test_ram_is_supervised_learning_plus_alpha_times_the_samples():
    wanted, sampled = torch.tensor([-3.0, -2.0]), torch.tensor([-5.0, -1.0])
    assert ram(wanted, sampled, 0.5).tolist() == [0.5, 1.5]
    assert torch.equal(ram(wanted, sampled, 0.0), -wanted)


def test_preference_is_dpo_of_the_sequence_level_product_against_the_proposal():
    """DPO's loss is −log σ(β[log π(y_w)/ref(y_w) − log π(y_l)/ref(y_l)]) (arXiv 2305.18290, eq. 7).

    With π(y|x) = P_M(y|x)·Q(y|x)/Z(x) over whole sequences, enumerated here with its Z, and ref = P_M, the ratio is Q/Z and Z
    cancels between the two answers to one prompt.
    """
    proposal, aligner, beta = TableLM.random(3, order=2, seed=5), TableLM.random(3, order=1, seed=6), 0.7
    p, q = proposal.enumerate([], 3, eos=[0]), aligner.enumerate([], 3, eos=[0])
    log_z = torch.tensor([p[y] + q[y] for y in p], dtype=torch.float64).logsumexp(0).item()
    policy = {y: p[y] + q[y] - log_z for y in p}
    assert math.isclose(sum(map(math.exp, policy.values())), 1.0)
    answers = list(p)
    for chosen, rejected in ((answers[0], answers[7]), (answers[9], answers[2])):
        margin = beta * ((policy[chosen] - p[chosen]) - (policy[rejected] - p[rejected]))
        dpo = -math.log(1 / (1 + math.exp(-margin)))
        ours = preference(torch.tensor([q[chosen]]).double(), torch.tensor([q[rejected]]).double(), beta)
        assert_close(ours.item(), dpo)


def test_distillation_is_the_divergence_and_acceptance_its_share_of_common_mass():
    """Against sums over tokens; and a free row that minimises KL(target‖draft) is the target, of which all drafts stay."""
    target, draft = random_rows(7, 3), random_rows(8, 3)
    p, q = target.exp(), draft.exp()
    assert_close(distillation(target, draft), torch.stack([sum(p[i] * (p[i] / q[i]).log()) for i in range(3)]))
    assert_close(acceptance(target, draft), 1 - (p - q).abs().sum(-1) / 2)
    logits = torch.zeros(3, V, dtype=torch.float64, requires_grad=True)
    distillation(target, log_normalize(logits)).sum().backward()
    assert_close(logits.grad, 1 / V - p)  # softmax(draft) − target
    assert_close(acceptance(target, target), torch.ones(3, dtype=torch.float64))


def test_what_the_target_cannot_say_costs_a_drafter_nothing_infinite():
    target = torch.tensor([[0.5, 0.5, 0.0]]).log()
    logits = torch.zeros(1, 3, requires_grad=True)
    loss = distillation(target, log_normalize(logits))
    loss.sum().backward()
    assert_close(loss, torch.tensor([math.log(1.5)]))
    assert bool(torch.isfinite(logits.grad).all())
