"""What to watch while an aligner learns: sums over a development batch, and their means."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.logprobs import gather, in_nucleus, kl_divergence
from trimtab.core.rules import Product, Rule

__all__ = ["Diagnostics", "measure"]


@dataclass
class Diagnostics:
    """Means over tokens, in nats where they are log-probabilities.

    Attributes:
        nll_proposal, nll_aligner, nll_aligned: of the wanted answers, each model as it decodes.
        log_z_mean, log_z_std: of log Σ_v p̃(v) q(v)^λ + λ log V, which is 0 for a uniform aligner.
        kl_aligned_proposal: KL(aligned‖p̃), how far the aligner moves the proposal.
        kl_proposal_aligner: KL(p̃‖q).
        in_nucleus: share of wanted tokens in p̃'s top-p nucleus.
    """

    nll_proposal: float
    nll_aligner: float
    nll_aligned: float
    log_z_mean: float
    log_z_std: float
    kl_aligned_proposal: float
    kl_proposal_aligner: float
    in_nucleus: float


def measure(
    rule: Rule,
    logp: Tensor,
    logq: Tensor,
    weight: float,
    tokens: Tensor,
    top_p: float,
    even: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Sums over a batch, to be added up and handed to `summarise`: `[9]` float64.

    Args:
        rule: the decoding rule.
        logp: log p̃ `[N, V]`.
        logq: log q `[N, V]`.
        weight: λ.
        tokens: the wanted answers `[N]`.
        top_p: the nucleus to look in.
        even: log p̃ `[N, V]` with the tail spread evenly, where `logp` has draws in its place. KL(p̃‖q) and the nucleus need the
            log-probability of tokens that were not drawn, so they are taken from these; the rest is a sum over p̃.
        counts: how often each token counts `[N]`; once, where nobody says.
    """
    even = logp if even is None else even
    weights = logq.new_tensor([weight])
    aligned = rule.target(logp, [logq], weights) if rule.has_row else logp
    log_z = Product().log_z(logp, [logq], weights) + weight * math.log(logp.shape[-1])
    ones = torch.ones_like(log_z)
    columns = [
        ones,
        -gather(logp, tokens),
        -gather(logq, tokens),
        -gather(aligned, tokens),
        log_z,
        log_z**2,
        kl_divergence(aligned, logp),
        kl_divergence(even, logq),
        in_nucleus(even, tokens, top_p),
    ]
    often = (ones if counts is None else counts).double()
    return torch.stack([(column.double() * often).sum() for column in columns]).cpu()


def summarise(sums: Iterable[Tensor]) -> Diagnostics:
    """Means from the sums of all batches."""
    count, *totals = torch.stack(list(sums)).sum(0).tolist()
    p, q, aligned, z, z2, moved, apart, inside = (total / count for total in totals)
    return Diagnostics(p, q, aligned, z, math.sqrt(max(z2 - z * z, 0.0)), moved, apart, inside)
