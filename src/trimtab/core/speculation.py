"""Lossless speculation: check drafted tokens against their target rows, with one coupled draw for each position.

Where a draft was drawn from a row q, the token at a position is a function of the prefix, the target row p, q and uniforms
that belong to the position: a draft d = icdf_q(u1), kept if u2 < p(d)/q(d), otherwise *recovered* as icdf of the normalised
positive part of p − q at u3. Its law is p: a token v is drafted and kept with min(p, q)(v), and recovered with (p − q)⁺(v)
(Leviathan et al., "Fast inference from transformers via speculative decoding", ICML 2023). For a large vocabulary u3 is four
numbers: `trimtab.core.draw.draw_steadily` says why.

Where a draft is *certain*, looked up somewhere, or nobody drafts, the token is icdf_p(u3), and a draft stays if it is that
token. It stays with p(d), the most that a certain draft can, and nothing that was drafted plays a part in the text.

Every position is decided so, also the *bonus* position behind the last draft, and the only one when decoding token by token.
So the tokens of a seed do not depend on how far anyone drafted ahead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.draw import LEVELS, NO_TOKEN, draw_steadily, inverse_cdf
from trimtab.core.logprobs import gather

__all__ = ["DRAWS", "Verdict", "draft_tokens", "match", "verify"]

DRAWS = 2 + LEVELS
"""Uniforms that a position takes."""


class Verdict(NamedTuple):
    """What became of the drafts of B sequences at P positions."""

    tokens: Tensor
    """`[B, P]`: the drafts, with the token at position `accepted` put right; what stands behind it means nothing."""
    accepted: Tensor
    """`[B]` drafts that stay. With the token behind them, a sequence gains `accepted + 1` tokens."""
    kept: Tensor
    """`[B]` drafts that would stay if none were withheld: the length of the run of kept ones, the bonus position included."""


def draft_tokens(logq: Tensor, uniforms: Tensor) -> Tensor:
    """Draw drafts `[...]` from draft rows `[..., V]` with the positions' uniforms `[..., DRAWS]`."""
    return inverse_cdf(logq, uniforms[..., :1]).squeeze(-1)


def verify(
    logp: Tensor,
    drafts: Tensor | None,
    logq: Tensor | None,
    limits: Tensor,
    uniforms: Tensor,
    alone: Tensor | None = None,
) -> Verdict:
    """Accept the longest run of drafts that stay, and decide the position behind it.

    Args:
        logp: target rows `[B, P, V]`; row j is right if all drafts before j are.
        drafts: `[B, P]`, one for each row, the bonus position included; `NO_TOKEN` where nothing was drafted. Where they are
            certain, as for `match`.
        logq: draft rows `[B, P, V]` that the drafts were drawn from, or None where every draft is certain.
        limits: `[B]` the bonus position of each sequence, at most P − 1: drafts before it may be accepted.
        uniforms: `[B, P, DRAWS]` in [0, 1), float64.
        alone: `[B, P]` positions whose drafts count as certain, though they were drawn; None for nowhere.

    Returns:
        The verdict; `NO_TOKEN` at the decided position if the target has no mass there, or is NaN.
    """
    if logq is None or drafts is None:
        return match(draw_steadily(logp.exp(), uniforms[..., 2:]), drafts, limits)
    at = drafts.clamp(min=0)
    log_ratio = gather(logp, at) - gather(logq, at)
    keep = (drafts != NO_TOKEN) & (uniforms[..., 1] < log_ratio.double().exp())
    if alone is not None:
        own = draw_steadily(logp.exp(), uniforms[..., 2:])
        keep = torch.where(alone, (drafts == own) & (drafts != NO_TOKEN), keep)
    kept = keep.long().cumprod(-1).sum(-1)
    accepted = torch.minimum(kept, limits)
    last = accepted.unsqueeze(-1)
    excess = _excess(_row(logp, accepted).exp(), _row(logq, accepted).exp())
    recovered = draw_steadily(excess, _row(uniforms, accepted)[:, 2:]).unsqueeze(-1)
    if alone is not None:
        recovered = torch.where(alone.gather(-1, last), own.gather(-1, last), recovered)
    token = torch.where(keep.gather(-1, last), drafts.gather(-1, last), recovered)
    return Verdict(drafts.scatter(-1, last, token), accepted, torch.minimum(kept, limits + 1))


def match(tokens: Tensor, drafts: Tensor | None, limits: Tensor) -> Verdict:
    """What becomes of drafts where each position has its token whatever was drafted: a draft stays if it is that token.

    So it is for certain drafts, and where each target row has all its mass on its best token.

    Args:
        tokens: `[B, P]` what each position says if all drafts before it are right; `NO_TOKEN` where its row has no mass.
        drafts: `[B, P]` with `NO_TOKEN` where nothing was drafted, or `[B, P − 1]`: then the bonus position has none, and the
            verdict's `kept` does not count it. None where nobody drafts.
        limits: as for `verify`.

    Returns:
        The verdict, whose tokens are those of all positions.
    """
    if drafts is None:
        none = torch.zeros_like(limits)
        return Verdict(tokens, none, none)
    right = (drafts == tokens[:, : drafts.shape[1]]) & (drafts != NO_TOKEN)
    kept = right.long().cumprod(-1).sum(-1)
    return Verdict(tokens, torch.minimum(kept, limits), torch.minimum(kept, limits + 1))


def _row(rows: Tensor, position: Tensor) -> Tensor:
    """One of the P rows `[B, P, V]` of each sequence: `[B, V]`."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return rows.gather(1, position[:, None, None].expand(-1, 1, rows.shape[-1])).squeeze(1)


def _excess(p: Tensor, q: Tensor) -> Tensor:
    """(p − q)⁺; p itself where rounding leaves nothing of it, which is where p = q but for rounding."""
    excess = (p - q).clamp_(min=0)
    return torch.where(excess.amax(-1, keepdim=True) > 0, excess, p)
