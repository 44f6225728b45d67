"""Training objectives as pure functions: log-probabilities in, one loss per example out.

They know no models and reduce nothing but time. Lengths differ: `mask` `[B, T]` is True on the tokens that count.

    likelihood   −Σ_t log rule(p̃, q)(y_t): the exact negative log-likelihood of what that rule decodes
    sft          −log q(y|x): the aligner as a language model of the wanted text
    ram          −log q(y|x) + α·log q(y'|x), y' drawn from the proposal (arXiv 2505.19700, equation 7)
    preference   −log σ(β(log q(y_w|x) − log q(y_l|x))): DPO of the product model against the proposal, which cancels
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trimtab.core.logprobs import gather
from trimtab.core.rules import Rule

__all__ = ["likelihood", "preference", "ram", "sequence_logprob", "sft"]


def sequence_logprob(token_logp: Tensor, mask: Tensor) -> Tensor:
    """Σ_t of token log-probabilities `[B, T]` where `mask` `[B, T]` is True: `[B]`."""
    return torch.where(mask, token_logp, 0.0).sum(-1)


def likelihood(rule: Rule, logp: Tensor, logq: Tensor, weight: float, tokens: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of `tokens` `[B, T]` under the rule's target: `[B]` nats.

    Args:
        rule: a rule with a closed-form row that is differentiable in the aligner.
        logp: the proposal's rows `[B, T, V]`, constants. Positions outside `mask` are ignored, whatever they hold.
        logq: the aligner's rows `[B, T, V]`, through which the gradient flows.
        weight: λ, the weight that will be decoded with.
        tokens: the completion's tokens.
        mask: which positions count.
    """
    ignored = ~mask.unsqueeze(-1)
    target = rule.target(logp.masked_fill(ignored, -math.log(logp.shape[-1])), [logq], logq.new_tensor([weight]))
    return -sequence_logprob(gather(target, tokens), mask)


def sft(token_logq: Tensor, mask: Tensor) -> Tensor:
    """Negative log-likelihood of the completion under the aligner alone, from `log q(y_t)` `[B, T]`: `[B]` nats."""
    return -sequence_logprob(token_logq, mask)


def ram(wanted: Tensor, sampled: Tensor, alpha: float) -> Tensor:
    """The paper's loss from log q(y|x) `[B]` of wanted and log q(y'|x) `[B]` of sampled completions: `[B]` nats.

    It comes from bounding log Z from below, so it bounds nothing, and for large α nothing stops it from diverging.
    """
    return -wanted + alpha * sampled


def preference(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """DPO from log q(y|x) `[B]` of the chosen and of the rejected completion: `[B]`.

    The policy is P_θ ∝ P_M·Q and the reference P_M, so the implicit reward β·log(P_θ/P_M) is β·log Q up to a constant of the
    prompt: neither P_M nor the normaliser is needed (Rafailov et al., arXiv 2305.18290, equation 7).
    """
    return -logsigmoid(beta * (chosen - rejected))
