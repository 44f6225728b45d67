"""Objectives of rewards on tables: what they are at, and lead to, is the target that enumeration gives."""

import functools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from trimtab.core.rewards import (
    advantages,
    group_means,
    pick_beta,
    reverse_kl,
    soft_q,
    subtrajectory_balance,
    trajectory_balance,
)
from trimtab.core.rules import Geometric, Product, Rule
from trimtab.models.table import TableLM, enumerate_sequences

V, EOS, LIMIT, PROMPT, BETA = 3, 0, 3, (1,), 0.7
PROPOSAL = TableLM.random(V, order=2, seed=3)
TEXTS = {tuple(y): logp for y, logp in enumerate_sequences(lambda s: PROPOSAL.row(tuple(s)), PROMPT, LIMIT, [EOS]).items()}
LOGP = torch.tensor(list(TEXTS.values()), dtype=torch.float64)
PREFIXES = sorted({text[:i] for text in TEXTS for i in range(len(text))})
GROUPS = torch.zeros(len(TEXTS), dtype=torch.long)
SETTINGS: list[tuple[Rule, float]] = [(Product(), 1.0), (Product(), 0.5), (Geometric(), 1.0), (Geometric(), 0.6)]


def reward(text: tuple[int, ...]) -> float:
    """Of whole texts alone: no sum over tokens has it."""
    return float(len(set(text)) == len(text)) + 0.3 * (sum(text) % 2) - 0.2 * (text[-1] == EOS)


REWARDS = torch.tensor([reward(text) for text in TEXTS], dtype=torch.float64)


def target_law(rewards: Tensor, beta: float = BETA) -> Tensor:
    """By brute force."""
    return (LOGP + rewards / beta).softmax(0)


class Aligner:
    """A free row for every prefix, as what is decoded sees it.

    Args:
        rule, weight: how it is decoded.
        logits: `[prefixes, V]`.
    """

    def __init__(self, rule: Rule, weight: float, logits: Tensor) -> None:
        self.rule, self.weight, self.logits = rule, weight, logits

    def gains_of_tokens(self) -> list[Tensor]:
        """log P_θ − log P_M of each token of each text, in the order of `TEXTS`."""
        gained = self._gained()
        return [gained[self._places(text), list(text)] for text in TEXTS]

    def gains_of_ends(self) -> list[Tensor]:
        """The same of an end in each token's place."""
        gained = self._gained()
        return [gained[self._places(text), EOS] for text in TEXTS]

    def _gained(self) -> Tensor:
        rows = self.logits.log_softmax(-1)
        proposal = torch.stack([PROPOSAL.row((*PROMPT, *prefix)) for prefix in PREFIXES])
        return self.rule.target(proposal, [rows], rows.new_tensor([self.weight])) - proposal

    def _places(self, text: tuple[int, ...]) -> list[int]:
        """Of everything that is before one of its tokens."""
        return [PREFIXES.index(text[:i]) for i in range(len(text))]

    def gains(self) -> Tensor:
        return torch.stack([each.sum() for each in self.gains_of_tokens()])

    def law(self) -> Tensor:
        return (LOGP + self.gains()).exp()


def looking_ahead(rule: Rule, weight: float, rewards: Tensor) -> Aligner:
    """By a recursion from the ends: the value of a prefix is log of what P_M·e^{r/β} gives all that follows it."""
    known = dict(zip(TEXTS, rewards.tolist(), strict=True))

    @functools.cache
    def value(prefix: tuple[int, ...]) -> float:
        if prefix in known:
            return known[prefix] / BETA
        ahead = torch.tensor([value((*prefix, v)) for v in range(V)], dtype=torch.float64)
        return float((PROPOSAL.row((*PROMPT, *prefix)) + ahead).logsumexp(0))

    ahead = torch.tensor([[value((*prefix, v)) for v in range(V)] for prefix in PREFIXES], dtype=torch.float64)
    proposal = torch.stack([PROPOSAL.row((*PROMPT, *prefix)) for prefix in PREFIXES])
    own = 0.0 if isinstance(rule, Product) else weight * proposal  # geometric takes a share of the proposal's away
    return Aligner(rule, weight, (own + ahead) / weight)


def random_aligner(rule: Rule, weight: float) -> Aligner:
    logits = torch.randn(len(PREFIXES), V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Aligner(rule, weight, logits.requires_grad_())


def tb_of(aligner: Aligner, rewards: Tensor = REWARDS) -> Tensor:
    return trajectory_balance(aligner.gains(), rewards, BETA, GROUPS).mean()


def distance(aligner: Aligner, rewards: Tensor = REWARDS) -> float:
    return float((aligner.law().detach() - target_law(rewards)).abs().sum() / 2)


def descend(aligner: Aligner, loss, steps: int) -> None:
    optimizer = torch.optim.Adam([aligner.logits], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize(("rule", "weight"), SETTINGS)
def test_it_is_zero_at_the_aligner_that_looks_ahead_and_there_alone(rule, weight):
    there = looking_ahead(rule, weight, REWARDS)
    assert float(tb_of(there)) < 1e-25
    assert distance(there) < 1e-12
    elsewhere = random_aligner(rule, weight)
    loss = tb_of(elsewhere)
    loss.backward()
    assert loss.item() > 0.1
    assert float(elsewhere.logits.grad.abs().max()) > 0.1


@pytest.mark.parametrize(("rule", "weight"), SETTINGS)
def test_a_random_table_is_trained_to_the_target(rule, weight):
    aligner = random_aligner(rule, weight)
    assert distance(aligner) > 0.1
    descend(aligner, lambda: tb_of(aligner), 300)
    assert distance(aligner) < 0.02


def test_samples_of_any_policy_lead_there():
    """Drawn from the proposal, evenly, and from what is trained, in turn."""
    aligner = random_aligner(Product(), 1.0)
    draws = torch.Generator().manual_seed(1)
    rounds = iter(range(10_000))

    def loss() -> Tensor:
        policies = (LOGP.exp(), torch.ones_like(LOGP), aligner.law().detach())
        some = policies[next(rounds) % 3].multinomial(16, replacement=True, generator=draws)
        return trajectory_balance(aligner.gains()[some], REWARDS[some], BETA, torch.zeros_like(some)).mean()

    descend(aligner, loss, 600)
    assert distance(aligner) < 0.02


def test_a_constant_reward_gives_the_proposal():
    aligner = random_aligner(Geometric(), 1.0)
    descend(aligner, lambda: tb_of(aligner, torch.full_like(REWARDS, 5.0)), 300)
    assert float((aligner.law().detach() - LOGP.exp()).abs().sum() / 2) < 0.02


def test_a_constant_of_a_prompt_changes_nothing():
    gains = random_aligner(Product(), 1.0).gains().detach()
    groups = torch.arange(len(TEXTS)) % 3
    shifted = REWARDS + torch.tensor([10.0, -4.0, 0.5], dtype=torch.float64)[groups]
    assert_close(
        trajectory_balance(gains, shifted, BETA, groups), trajectory_balance(gains, REWARDS, BETA, groups), atol=1e-9, rtol=1e-9
    )
    assert_close(advantages(shifted, groups, scale=True), advantages(REWARDS, groups, scale=True))


def test_its_mean_over_a_group_is_the_unbiased_variance():
    c, groups = torch.randn(7, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 2, 0])
    losses = trajectory_balance(c, torch.zeros_like(c), 1.0, groups)
    for group in (0, 1):
        assert_close(losses[groups == group].mean(), c[groups == group].var())
    assert losses[5] == 0
    assert_close(group_means(c, groups)[[0, 1, 5]], torch.stack([c[groups == g].mean() for g in (0, 1, 2)]))


def test_advantages_are_those_of_trl():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 3.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    assert_close(advantages(rewards, groups, scale=False), torch.tensor([2 / 3, -1 / 3, -1 / 3, 0.0, 0.0]))
    std = torch.tensor([1.0, 0.0, 0.0]).std()
    expected = torch.tensor([2 / 3, -1 / 3, -1 / 3]) / (std + 1e-4)
    assert_close(advantages(rewards, groups, scale=True), torch.cat([expected, torch.zeros(2)]))


def test_the_estimate_of_the_divergence_is_unbiased_and_never_below_zero():
    aligner = random_aligner(Product(), 1.0)
    gains, law = aligner.gains().detach(), aligner.law().detach()
    each = reverse_kl(gains)
    assert float(each.min()) >= 0
    assert_close((law * each).sum(), (law * gains).sum())


def prefix_rewards(text: tuple[int, ...]) -> Tensor:
    """Of the answers that end before each token."""
    return torch.tensor([reward((*text[:i], EOS)) for i in range(len(text))], dtype=torch.float64)


def subtb_of(aligner: Aligner, some: Tensor | None = None, known: float = 1.0) -> Tensor:
    """Of some texts, with repetitions; of so many of their beginnings the reward is known."""
    texts = list(TEXTS) if some is None else [list(TEXTS)[i] for i in some]
    endings = dict(zip(TEXTS, aligner.gains_of_ends(), strict=True))
    gains = dict(zip(TEXTS, aligner.gains_of_tokens(), strict=True))
    lengths = torch.tensor([len(text) for text in texts])
    rewards = torch.tensor([reward(text) for text in texts], dtype=torch.float64)
    before = torch.cat([prefix_rewards(text) for text in texts])
    if known < 1:
        before[torch.rand(len(before), generator=torch.Generator().manual_seed(5)) > known] = torch.nan
    return subtrajectory_balance(
        torch.cat([gains[text] for text in texts]),
        torch.cat([endings[text] for text in texts]),
        before,
        rewards,
        torch.tensor([text[-1] != EOS for text in texts]),
        torch.full_like(rewards, BETA),
        torch.arange(len(texts)).repeat_interleave(lengths),
        torch.zeros(len(texts), dtype=torch.long),
    )


@pytest.mark.parametrize(("rule", "weight"), SETTINGS)
def test_subtrajectories_balance_at_the_aligner_that_looks_ahead_and_there_alone(rule, weight):
    there = looking_ahead(rule, weight, REWARDS)
    assert float(subtb_of(there).abs().max()) < 1e-25
    assert float(subtb_of(there, known=0.5).abs().max()) < 1e-25
    elsewhere = random_aligner(rule, weight)
    subtb_of(elsewhere).mean().backward()
    assert float(elsewhere.logits.grad.abs().max()) > 0.1
    descend(elsewhere, lambda: subtb_of(elsewhere).mean(), 300)
    assert distance(elsewhere) < 0.02


def test_subtrajectories_are_the_answers_that_end_earlier():
    """The mean is the variance of tb's c over all of them, each counted as often as samples begin so."""
    aligner, some = random_aligner(Product(), 1.0), torch.tensor([3, 0, 7, 7, len(TEXTS) - 1])
    c = {text: gain - reward(text) / BETA for text, gain in zip(TEXTS, aligner.gains().detach(), strict=True)}
    texts = [list(TEXTS)[i] for i in some]
    everything = [c[(*text[:i], EOS)] for text in texts for i in range(len(text))]
    everything += [c[text] for text in texts if text[-1] != EOS]
    assert any(text[-1] != EOS for text in texts)
    assert_close(subtb_of(aligner, some).detach().mean(), torch.stack(everything).var())


def test_groups_of_subtrajectories_are_apart():
    gains, endings, before = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    owner, cut = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([True, False, True])
    rewards, beta = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    both = subtrajectory_balance(gains, endings, before, rewards, cut, beta, owner, torch.tensor([0, 0, 1]))
    first = subtrajectory_balance(
        gains[:3], endings[:3], before[:3], rewards[:2], cut[:2], beta[:2], owner[:3], torch.tensor([0, 0])
    )
    last = subtrajectory_balance(
        gains[3:], endings[3:], before[3:], rewards[2:], cut[2:], beta[2:], owner[3:] - 2, torch.tensor([0])
    )
    assert_close(both, torch.cat([first, last]))


def test_the_end_of_an_answer_is_its_own_where_a_model_knows_several():
    """What an end of the other kind would gain in its place is not looked at."""
    gains, endings, before = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    owner, cut, groups = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([False, True]), torch.zeros(2, dtype=torch.long)
    before[1] = 2.0
    rewards, beta = torch.tensor([2.0, 3.0], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    c = torch.stack([endings[0] - before[0] / 0.5, gains[:2].sum() - 4.0, endings[2] - before[2] / 0.5])
    c = torch.cat([c, gains[2:4].cumsum(0) + endings[3:] - before[3:] / 0.5, (gains[2:].sum() - 6.0)[None]])
    endings[1] = torch.nan
    found = subtrajectory_balance(gains, endings, before, rewards, cut, beta, owner, groups)
    assert_close(found.mean(), c.var())


@pytest.mark.parametrize("stepwise", [False, True])
@pytest.mark.parametrize(("rule", "weight"), SETTINGS[:3])
def test_soft_bellman_residuals_have_the_same_target(rule, weight, stepwise):
    """0 at the aligner that looks ahead with its values; a random table with free values is trained to the target.

    Also where rewards come in steps: by how much a token changes what the answer would be worth if it ended.
    """
    so_far = {prefix: reward((*prefix, EOS)) if stepwise else 0.0 for prefix in PREFIXES}
    aligner = random_aligner(rule, weight)
    values = torch.zeros(len(PREFIXES), dtype=torch.float64, requires_grad=True)
    places = {prefix: i for i, prefix in enumerate(PREFIXES)}

    def residuals(found: Aligner, at: Tensor, target: Tensor) -> Tensor:
        parts = []
        for text, gains, r in zip(TEXTS, found.gains_of_tokens(), REWARDS, strict=True):
            before = [places[text[:i]] for i in range(len(text))]
            known = [so_far[text[:i]] for i in range(len(text))] + [float(r)]
            steps = torch.tensor(known, dtype=torch.float64).diff() / BETA
            if not stepwise:
                assert_close(steps, torch.eye(len(text), dtype=torch.float64)[-1] * r / BETA)
            ends = torch.arange(len(text)) == len(text) - 1
            parts.append(soft_q(gains, at[before], torch.cat([target[before[1:]], target[:1]]), steps, ends))
        return torch.cat(parts)

    ahead = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for prefix, place in places.items():
        following = [i for i, text in enumerate(TEXTS) if text[: len(prefix)] == prefix]
        before = sum(float(PROPOSAL.row((*PROMPT, *prefix[:i]))[v]) for i, v in enumerate(prefix))
        ahead[place] = (LOGP[following] - before + REWARDS[following] / BETA).logsumexp(0) - so_far[prefix] / BETA
    assert float(residuals(looking_ahead(rule, weight, REWARDS), ahead, ahead).max()) < 1e-25
    optimizer = torch.optim.Adam([aligner.logits, values], lr=0.1)
    target = values.detach().clone()
    for _ in range(400):
        optimizer.zero_grad()
        residuals(aligner, values, target).mean().backward()
        optimizer.step()
        target.lerp_(values.detach(), 0.1)
    assert distance(aligner) < 0.02


@pytest.mark.parametrize("sampled", ["proposal", "elsewhere"])
def test_a_budget_picks_its_beta(sampled):
    """From samples of the proposal, and of another policy; KL of the target at that β is the budget."""
    logs = LOGP if sampled == "proposal" else (LOGP + 0.5 * REWARDS).log_softmax(0)
    some = logs.exp().multinomial(40_000, replacement=True, generator=torch.Generator().manual_seed(2))
    gains = (logs - LOGP)[some]
    beta = pick_beta(gains, REWARDS[some], torch.zeros_like(some), 0.2)
    law = target_law(REWARDS, beta)
    assert float((law * (law.log() - LOGP)).sum()) == pytest.approx(0.2, rel=0.03)


def test_rewards_that_do_not_differ_allow_any_beta():
    groups = torch.tensor([0, 0, 1, 1])
    assert pick_beta(torch.zeros(4), torch.tensor([1.0, 1.0, 2.0, 2.0]), groups, 0.1) == math.inf
