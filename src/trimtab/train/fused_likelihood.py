"""`core.objectives.likelihood` straight from an aligner's logits and a proposal's compressed rows: the same losses, less work.

`fused_distillation` is the same for a teacher's rows.

For `product` and `geometric` the target is softmax(a·log p̃ + b·s) of the aligner's logits s, whose own normaliser cancels. So
two `[N, V]` buffers are made where the plain composition makes many, log p̃ is never rebuilt, and the gradient goes directly to
the logits of a whole padded batch. Where the tail was drawn, k+1+S logits of a row count, and only the gradient has width V.

For `mixture` the target of the wanted token is (1−w)·p̃ + w·q of that token, so of p̃ one number a token is read. That is the
decoded law where p̃ is nowhere 0, as a softmax is; elsewhere it is less, by the share that the aligner wastes where p̃ is 0.
`tests/train/test_fused_likelihood.py` holds it to the plain composition.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import gather, impossible, log_normalize
from trimtab.core.objectives import sampled_distillation
from trimtab.core.rules import Geometric, Mixture, Product, Rule, log_power
from trimtab.errors import InvalidOption
from trimtab.train.rows import CachedRows, TaughtRows

__all__ = ["fused_distillation", "fused_likelihood", "fused_sft"]


def fused_likelihood(
    rule: Rule, cached: CachedRows, logits: Tensor, positions: Tensor, weight: float, temperature: float, vocab_size: int
) -> Tensor:
    """Negative log-likelihood of each token under the rule's target, in nats: `[N]`.

    Args:
        rule: `product`, `geometric` or `mixture`.
        cached: the proposal's rows of N tokens, and the tokens.
        logits: the aligner's, `[M, W]` with W ≥ V, in any precision; computed in float32 or better.
        positions: `[N]`, which of the M rows predicts each token.
        weight: λ.
        temperature: the aligner's.
        vocab_size: V.

    Raises:
        InvalidOption: another rule, or `geometric` with rows whose tail was drawn.
    """
    if isinstance(rule, Mixture):
        return _mixed(cached, logits, positions, weight, temperature, vocab_size)
    share = _share(rule, weight)
    logits, positions, scale = _powered(logits, positions, weight / temperature, vocab_size)
    if cached.samples.shape[-1]:
        if not isinstance(rule, Product):
            raise InvalidOption(f"rule: '{rule}' raises the proposal to a power, for which draws from its tail are biased")
        return _drawn(cached, logits, positions, scale)
    tokens = cached.token.long()
    ids = torch.cat([cached.ids.long(), tokens.unsqueeze(-1)], -1)
    kept = torch.cat([cached.logp, cached.token_logp.unsqueeze(-1)], -1)
    losses: Tensor = _Likelihood.apply(  # type: ignore[no-untyped-call]
        logits, positions, ids, _scaled(kept, share), _scaled(cached.spread(vocab_size), share), tokens,
        scale, vocab_size,
    )  # fmt: skip
    return losses


def fused_distillation(
    rule: Rule, taught: TaughtRows, logits: Tensor, positions: Tensor, weight: float, temperature: float, vocab_size: int
) -> Tensor:
    """KL(teacher‖rule's target) of each row in nats `[N]`, estimated where the rows are compressed.

    Args:
        rule: `product` or `geometric`; draws are right for both, as it is known how likely each is.
        taught: the teacher's rows and the proposal's of N tokens.
        logits: the aligner's; this and what follows as in `fused_likelihood`.
        positions: which of them predict the tokens.
        weight: λ.
        temperature: the aligner's.
        vocab_size: V.

    Raises:
        InvalidOption: another rule.
    """
    share = _share(rule, weight)
    logits, positions, scale = _powered(logits, positions, weight / temperature, vocab_size)
    exact = torch.promote_types(logits.dtype, torch.float32)
    some = logits[positions.unsqueeze(-1), taught.ids.long()].to(exact)
    return sampled_distillation(taught.logt, _scaled(taught.logp, share) + scale * some, taught.logc)


def fused_sft(logits: Tensor, positions: Tensor, tokens: Tensor, vocab_size: int) -> Tensor:
    """`core.objectives.sft` from logits: the negative log-likelihood of each token under the aligner alone, in nats `[N]`."""
    return _alone(logits, positions, tokens, 1.0, vocab_size)


def _alone(logits: Tensor, positions: Tensor, tokens: Tensor, scale: float, vocab_size: int) -> Tensor:
    """−log softmax(scale·logits)[token]."""
    none = tokens.new_empty(len(tokens), 0)
    alike = logits.new_zeros(len(tokens), dtype=torch.promote_types(logits.dtype, torch.float32))
    losses: Tensor = _Likelihood.apply(  # type: ignore[no-untyped-call]
        logits, positions, none, alike.new_empty(none.shape), alike, tokens.long(), scale, vocab_size
    )
    return losses


def _mixed(cached: CachedRows, logits: Tensor, positions: Tensor, weight: float, temperature: float, vocab_size: int) -> Tensor:
    """−log((1−w)·p̃ + w·q)[token]; +inf for a token that p̃ cannot say, which no share makes possible."""
    logp = cached.token_logp
    both = torch.stack([logp, -_alone(logits, positions, cached.token, 1 / temperature, vocab_size).to(logp.dtype)])
    shares = both.new_tensor([1 - weight, weight]).log().unsqueeze(-1)
    return torch.where(impossible(logp), torch.inf, -(shares + both).logsumexp(0))


def _share(rule: Rule, weight: float) -> float:
    """The proposal's exponent."""
    if not isinstance(rule, (Product, Geometric)):
        raise InvalidOption(f"rule: '{rule}' is no product of powers, as product and geometric are")
    return 1.0 if isinstance(rule, Product) else 1.0 - weight


def _powered(logits: Tensor, positions: Tensor, scale: float, vocab_size: int) -> tuple[Tensor, Tensor, float]:
    """The same, where the aligner's exponent is not above 0: a power of its rows that is more than a product."""
    if scale > 0:
        return logits, positions, scale
    rows = logits[positions, :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))  # they may be masked
    return log_power(rows, rows.new_tensor([scale])), torch.arange(len(rows), device=rows.device), 1.0


def _drawn(cached: CachedRows, logits: Tensor, positions: Tensor, scale: float) -> Tensor:
    """−log softmax(scale·logits + log p̃)[token], where each draw is an entry of its own: equal ones add up in the sum."""
    tokens = cached.token.unsqueeze(-1)
    best = cached.logp.masked_fill(cached.ids == tokens, -torch.inf)  # the token's own entry is the first
    ids = torch.cat([tokens, cached.ids, cached.samples], -1).long()
    logp = torch.cat([cached.token_logp.unsqueeze(-1), best, cached.each_draw().unsqueeze(-1).expand_as(cached.samples)], -1)
    exact = torch.promote_types(logits.dtype, torch.float32)
    return -log_normalize(scale * logits[positions.unsqueeze(-1), ids].to(exact) + logp)[:, 0]


def _scaled(logp: Tensor, share: float) -> Tensor:
    """Times the proposal's exponent; what is impossible stays so."""
    return torch.where(logp.isneginf(), logp, share * logp)


class _Likelihood(torch.autograd.Function):
    """−log softmax(rows)[token] of rows = `scale`·logits + (`kept` at `ids`, `base` elsewhere)."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, positions: Tensor, ids: Tensor, kept: Tensor, base: Tensor, tokens: Tensor, scale: float,
        vocab_size: int,
    ) -> Tensor:  # fmt: skip
        exact = torch.promote_types(logits.dtype, torch.float32)
        rows = logits.index_select(0, positions)[:, :vocab_size].to(exact)  # a copy: what follows is in place
        if scale != 1:
            rows.mul_(scale)
        special = rows.gather(1, ids) + kept
        target = log_normalize(rows.add_(base.unsqueeze(-1)).scatter_(1, ids, special.to(exact)))
        ctx.save_for_backward(target, positions, tokens)
        ctx.scale, ctx.shape, ctx.dtype = scale, logits.shape, logits.dtype
        return -gather(target, tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        target, positions, tokens = ctx.saved_tensors
        rows = target.exp()
        rows.scatter_add_(1, tokens.unsqueeze(-1), rows.new_full((len(tokens), 1), -1.0))
        rows.mul_((grad * ctx.scale).unsqueeze(-1))
        whole = rows.new_zeros(ctx.shape, dtype=ctx.dtype)
        whole[:, : rows.shape[-1]].index_copy_(0, positions, rows.to(ctx.dtype))
        return whole, *[None] * 7
