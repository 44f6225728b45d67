"""Training objectives as pure functions: log-probabilities in, unreduced losses out. They know no models.

Only tokens that count are here: the answers of a batch stand end to end, N tokens in all, and `owner` `[N]` says which example
each belongs to.

    likelihood   −Σ_t log rule(p̃, q)(y_t): the exact negative log-likelihood of what that rule decodes
    sft          −log q(y|x): the aligner as a language model of the wanted text
    ram          −log q(y|x) + α·log q(y'|x), y' drawn from the proposal (arXiv 2505.19700, equation 7)
    preference   −log σ(β(log q(y_w|x) − log q(y_l|x))): DPO of the product model against the proposal, which cancels; of
                 sequence-level targets, while on log P_θ − log P_M it is that of what is decoded, normalisers and all; on means
                 over tokens, which no longer answer wins by its length, it is the length-normalised one (arXiv 2411.15124)
    distillation KL(target‖row): a drafter learns what the rule decodes, and `acceptance` says how many of its drafts stay; or
                 what the rule decodes learns a teacher's rows, from all of their entries or, `sampled_distillation`, from some

What learns from rewards of samples is in `trimtab.core.rewards`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.core.logprobs import gather, kl_divergence
from trimtab.core.rules import Rule

__all__ = ["acceptance", "distillation", "likelihood", "per_example", "preference", "ram", "sampled_distillation", "sft"]


def per_example(values: Tensor, owner: Tensor, examples: int) -> Tensor:
    """Sum values `[N]` of tokens by the example that owns them: `[examples]`."""
    return values.new_zeros(examples).index_add(0, owner, values)


def likelihood(rule: Rule, logp: Tensor, logq: Tensor, weight: float, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token under the rule's target, in nats: `[N]`, to be summed `per_example`.

    Args:
        rule: a rule with a closed-form row that is differentiable in the aligner.
        logp: the proposal's rows `[N, V]`, constants.
        logq: the aligner's rows `[N, V]`, through which the gradient flows.
        weight: λ, the weight that will be decoded with.
        tokens: the wanted tokens `[N]`.
    """
    return -gather(rule.target(logp, [logq], logq.new_tensor([weight])), tokens)


def sft(logq: Tensor, tokens: Tensor) -> Tensor:
    """Negative log-likelihood of each token under the aligner alone, in nats: `[N]`."""
    return -gather(logq, tokens)


def distillation(target: Tensor, logd: Tensor) -> Tensor:
    """KL(target‖draft) of each token's row in nats: `[N]`; +inf where the drafter lacks a token that the target has.

    Args:
        target: the rows that are decoded `[N, V]`, constants.
        logd: the drafter's rows `[N, V]`, through which the gradient flows.
    """
    return kl_divergence(target, logd)


def sampled_distillation(logt: Tensor, logw: Tensor, logc: Tensor) -> Tensor:
    """KL(t‖w/Σw) of each row in nats `[N]`, from E of its entries, each of which stands for c tokens.

    With counts c for which Σ_u c_u f(u) is an unbiased estimate of Σ_v f(v), as those of draws from m, 1/m, are, so is

        Σ_u c_u t_u (log t_u − log w_u + log Z) − Σ_u c_u t_u + 1,    Z = Σ_u c_u w_u,

    for a Z that is right; where every token is an entry and stands for itself, it is the divergence. It is never below 0: it
    is the generalised divergence between two measures on the same entries. So wherever w can be anything, t is where it is
    least, whatever was drawn, and no token can be made likely at no cost because Z has not seen it.

    Args:
        logt: the teacher's log-probabilities `[N, E]`, constants.
        logw: log weights `[N, E]` of the row that learns, up to a constant for each row; the gradient flows through them.
        logc: log counts `[N, E]`; −inf for entries that do not count.
    """
    mass = (logt + logc).exp()
    log_z = (logw + logc).logsumexp(-1, keepdim=True)
    return (mass * torch.where(mass > 0, logt - logw + log_z, 0.0)).sum(-1) - mass.sum(-1) + 1


def acceptance(target: Tensor, logd: Tensor) -> Tensor:
    """The probability that a draft from each row is accepted: Σ_v min(target, draft) `[N]`, of rows as in `distillation`.

    It is 1 − the total variation between them (Leviathan et al., arXiv 2211.17192, theorem 3.5).
    """
    return torch.minimum(target, logd).exp().sum(-1)


def ram(wanted: Tensor, sampled: Tensor, alpha: float) -> Tensor:
    """The paper's loss from log q(y|x) `[B]` of wanted and log q(y'|x) `[B]` of sampled completions: `[B]` nats.

    It comes from bounding log Z from below, so it bounds nothing, and for large α nothing stops it from diverging.
    """
    return -wanted + alpha * sampled


def preference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO from log P_θ(y|x) − log P_M(y|x) `[B]` of the chosen and of the rejected completion: `[B]`.

    With the sequence-level target P_θ ∝ P_M·Q as the policy and P_M as the reference, that difference is log Q(y|x) up to a
    constant of the prompt: neither P_M nor the normaliser is needed (Rafailov et al., arXiv 2305.18290, equation 7). What is
    decoded has a normaliser at each token, which does not cancel: there the whole difference must be given.
    """
    return -logsigmoid(beta * (chosen - rejected))
