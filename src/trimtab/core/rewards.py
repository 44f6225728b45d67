"""Objectives of rewards as pure functions: samples of some prompts in, a loss for each out. They know no models.

The target is the sequence-level law P(y|x) ∝ P_M(y|x)·e^{r(x,y)/β}. It maximises E[r] − β·KL(P‖P_M), and a decoder that works
token by token reaches it with an aligner that looks ahead (docs/rules.md). B samples stand side by side. `groups` `[B]` says
which of them share a prompt, by numbers from 0 on.

    trajectory_balance  the variance over a prompt's samples of c(y) = log P_θ(y) − log P_M(y) − r(y)/β. It is 0 if and only if
                        P_θ is the target, where c is −log Z. Samples may come from any policy. (Richter et al., arXiv
                        2010.10436; of language models, with a learnt log Z: Hu et al., arXiv 2310.04363)
    subtrajectory_balance
                        the same of everything that a prompt's samples begin with, each as an answer that ends there: c is the
                        same for all answers, and these are answers, too. It takes their rewards. (Madan et al., arXiv
                        2209.12782; with the law of the end in the place of a learnt flow: Hu et al.)
    advantages          reward minus the group's mean, perhaps over the group's standard deviation (GRPO, arXiv 2402.03300)
    soft_q              the soft Bellman residuals of an answer (arXiv 2402.06700), which add up to c and the first value
"""

import math

import torch
from torch import Tensor

from trimtab.core.objectives import per_example

__all__ = ["advantages", "group_means", "pick_beta", "reverse_kl", "soft_q", "subtrajectory_balance", "trajectory_balance"]

LEAST_SPREAD = 1e-4
"""Added to standard deviations, as in TRL."""

HALVINGS = 60
"""Of the interval that a β is looked for in."""

STEEPEST, FLATTEST = 20.0, 0.01
"""Nats that the largest difference of a reward from its group's mean is worth at the ends of that interval: one answer is as
good as impossible beside another, or all are as good as alike."""


def group_means(values: Tensor, groups: Tensor) -> Tensor:
    """The mean of each sample's group `[B]`, of values `[B]`."""
    count = int(groups.max()) + 1 if len(groups) else 0
    sizes = per_example(torch.ones_like(values), groups, count)
    return (per_example(values, groups, count) / sizes)[groups]


def trajectory_balance(gains: Tensor, rewards: Tensor, beta: Tensor | float, groups: Tensor) -> Tensor:
    """Each sample's part of its group's variance of c, in nats²: `[B]`, whose mean over a group is the unbiased variance.

    A group of one has none. A constant that is added to a group's rewards changes nothing.

    Args:
        gains: log P_θ(y|x) − log P_M(y|x) `[B]` in nats, through which the gradient flows.
        rewards: r(x, y) `[B]`, constants, in float64 where they are large beside their differences.
        beta: β, one for all or `[B]`.
        groups: `[B]`.
    """
    c = gains.to(rewards.dtype) - rewards / beta
    apart = c - group_means(c, groups)
    sizes = per_example(torch.ones_like(c), groups, int(groups.max()) + 1)[groups]
    return (apart**2 * sizes / (sizes - 1).clamp(min=1)).to(gains.dtype)


def subtrajectory_balance(
    gains: Tensor,
    endings: Tensor,
    prefix_rewards: Tensor,
    rewards: Tensor,
    cut: Tensor,
    beta: Tensor,
    owner: Tensor,
    groups: Tensor,
) -> Tensor:
    """Each sample's part of the variance of c over all that its group's samples begin with, in nats²: `[B]`.

    Before each of its tokens, an answer could have ended. For the answer that it then was, c is Σ gains so far + the gain of
    the end − r/β. Where it did end, the end is its own, if a model knows several. An answer that was cut at its limit ends
    there for certain, so of it as a whole there is one c more, without an end. The mean over a group's samples is the unbiased
    variance over all of them.

    Args:
        gains: log P_θ − log P_M of each token `[N]` in nats, of samples that stand end to end; the gradient flows through them.
        endings: the same of an end of sequence in that token's place `[N]`.
        prefix_rewards: the reward of the answer that ends there `[N]`; NaN where there is none, which is left out.
        rewards: of the samples `[B]`, in float64.
        cut: which of them were cut `[B]`.
        beta: `[B]`.
        owner: which sample a token is of `[N]`, in order.
        groups: `[B]`.
    """
    total = gains.to(rewards.dtype).cumsum(0)
    so_far = total - gains  # before each token, of all samples
    first = torch.searchsorted(owner, torch.arange(len(rewards), device=owner.device))
    so_far = so_far - so_far[first][owner]
    last = torch.cat([first[1:], first.new_tensor([len(gains)])]) - 1
    did_end = torch.zeros_like(owner, dtype=torch.bool).index_fill(0, last[~cut], True)
    c = torch.cat(
        [so_far + torch.where(did_end, gains, endings) - prefix_rewards / beta[owner], (so_far + gains)[last] - rewards / beta]
    )
    owners = torch.cat([owner, torch.arange(len(rewards), device=owner.device)])
    known = torch.cat([~prefix_rewards.isnan(), cut])
    c, owners = c[known], owners[known]
    apart = c - group_means(c, groups[owners])
    ones, count = torch.ones_like(c), int(groups.max()) + 1
    sizes = per_example(ones, groups[owners], count)[groups]
    samples = per_example(torch.ones_like(rewards), groups, count)[groups]
    squares = per_example(apart**2, owners, len(rewards))
    return (squares * samples / (sizes - 1).clamp(min=1)).to(gains.dtype)


def advantages(rewards: Tensor, groups: Tensor, *, scale: bool) -> Tensor:
    """Rewards minus their group's mean `[B]`; scaled, divided by the group's standard deviation, as TRL does it."""
    apart = rewards - group_means(rewards, groups)
    if not scale:
        return apart
    sizes = per_example(torch.ones_like(apart), groups, int(groups.max()) + 1)[groups]
    variance = group_means(apart**2, groups) * sizes / (sizes - 1).clamp(min=1)
    return apart / (variance.sqrt() + LEAST_SPREAD)


def reverse_kl(gains: Tensor) -> Tensor:
    """An estimate of KL(P_θ‖P_M) of each token `[N]`, never below 0, from samples of P_θ: e^−g − 1 + g, Schulman's k3.

    Args:
        gains: log P_θ(y_t) − log P_M(y_t) `[N]`, through which the gradient flows.
    """
    return torch.expm1(-gains) + gains


def soft_q(gains: Tensor, values: Tensor, following: Tensor, steps: Tensor, ends: Tensor) -> Tensor:
    """Squared soft Bellman residuals in nats² `[N]`, of the tokens of some answers that stand end to end.

    With Q(s, v) = β(log-weight of v that is decoded) and V(s) = β log Σ_v p̃(v) e^{Q(s,v)/β}, the residual of a step is
    Q(s, v)/β − r_t/β − V(sv)/β = g + V(s)/β − r_t/β − V(sv)/β, where g = log P_θ(v|s) − log P_M(v|s) and r_t is the reward of
    the step. Behind an answer's end V is 0. However an answer's reward is split into steps, the target is the same.

    Args:
        gains: g of each token `[N]`.
        values: V/β before each token `[N]`.
        following: V/β behind each token `[N]`; what it says at ends is not looked at. The gradient may flow through it, for a
            token's successor is certain.
        steps: r_t/β of each token `[N]`; all of r/β at the last one where an answer has a reward as a whole.
        ends: which tokens are the last ones of answers `[N]`.
    """
    return (gains + values - steps - following.masked_fill(ends, 0.0)) ** 2


def pick_beta(gains: Tensor, rewards: Tensor, groups: Tensor, budget: float) -> float:
    """The β at which KL(target‖P_M), averaged over prompts, is the budget in nats an answer; from samples of any P_θ.

    Of a prompt's samples y_i the target has the weights w_i ∝ e^{r_i/β − g_i}, and its divergence is estimated as
    Σ w_i r_i/β − log mean_i e^{r_i/β − g_i}. It falls as β rises. No more than log n can be seen with n samples far from the
    target; near it, the estimate is exact.

    Args:
        gains: log P_θ(y) − log P_M(y) `[B]`, P_θ being what the samples were drawn from.
        rewards: `[B]`.
        groups: `[B]`.
        budget: above 0.

    Returns:
        β, between the differences of rewards over 20 nats and over .01; the nearer end where the budget is beyond it, as with
        samples none of which is far from what the others are worth. +inf where no reward differs within a group: any β has the
        same target.
    """
    gains, rewards = gains.double(), rewards.double()
    spread = float((rewards - group_means(rewards, groups)).abs().max()) if len(rewards) else 0.0
    if spread == 0:
        return math.inf
    parts = [(gains[groups == g], rewards[groups == g]) for g in range(int(groups.max()) + 1)]

    def divergence(beta: float) -> float:
        total = 0.0
        for some, r in parts:
            logw = r / beta - some
            log_z = logw.logsumexp(0) - math.log(len(r))
            total += float((logw.softmax(0) * r / beta).sum() - log_z)
        return total / len(parts)

    low, high = math.log(spread / STEEPEST), math.log(spread / FLATTEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(math.exp(middle)) > budget else (low, middle)
    return math.exp(high)
