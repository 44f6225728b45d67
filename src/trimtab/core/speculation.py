"""Lossless speculation: check drafted tokens against their target rows, with one coupled draw for each position.

The token at a position is a function of the prefix, the target row p, the draft row q and three uniforms that belong to the
position: a draft d = icdf_q(u1), kept if u2 < p(d)/q(d), otherwise *recovered* as icdf of the normalised positive part of
p − q at u3. Its law is p: a token v is drafted and kept with min(p, q)(v), and recovered with (p − q)⁺(v) (Leviathan et al.,
"Fast inference from transformers via speculative decoding", ICML 2023).

Every position is decided so, also the *bonus* position behind the last draft, and the only one when decoding token by token.
So the tokens of a seed do not depend on how far anyone drafted ahead.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN, draw_by_mass, inverse_cdf
from trimtab.core.logprobs import gather

__all__ = ["DRAWS", "Verdict", "draft_tokens", "verify", "verify_greedy"]

DRAWS = 3
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
    """Draw drafts `[...]` from draft rows `[..., V]` with the positions' uniforms `[..., 3]`."""
    return inverse_cdf(logq, uniforms[..., :1]).squeeze(-1)


def verify(logp: Tensor, drafts: Tensor | None, logq: Tensor | None, limits: Tensor, uniforms: Tensor) -> Verdict:
    """Accept the longest run of drafts that stay, and decide the position behind it.

    Args:
        logp: target rows `[B, P, V]`; row j is right if all drafts before j are.
        drafts: `[B, P]`, one for each row, the bonus position included; `NO_TOKEN` where nothing was drafted. None where
            nobody drafts, and P is 1: the same as a `NO_TOKEN` in each place.
        logq: draft rows `[B, P, V]` that the drafts were drawn from, or None where every draft is certain (looked up in the
            text, say): then it is kept with p(d).
        limits: `[B]` the bonus position of each sequence, at most P − 1: drafts before it may be accepted.
        uniforms: `[B, P, 3]` in [0, 1), float64.

    Returns:
        The verdict; `NO_TOKEN` at the decided position if the target has no mass there, or is NaN.
    """
    if drafts is None:
        none = torch.zeros_like(limits)
        return Verdict(draw_by_mass(_row(logp, none).exp(), uniforms[:, 0, 2:]), none, none)
    drafted = drafts != NO_TOKEN
    at = drafts.clamp(min=0)
    log_ratio = gather(logp, at) - (0 if logq is None else gather(logq, at))
    keep = drafted & (uniforms[..., 1] < log_ratio.double().exp())
    kept = keep.long().cumprod(-1).sum(-1)
    accepted = torch.minimum(kept, limits)
    last = accepted.unsqueeze(-1)
    p = _row(logp, accepted).exp()
    q = torch.zeros_like(p) if logq is None else _row(logq, accepted).exp()
    if logq is None:
        q.scatter_(-1, at.gather(-1, last), drafted.gather(-1, last).to(q.dtype))
    recovered = draw_by_mass(_excess(p, q), uniforms[..., 2].gather(-1, last))
    token = torch.where(keep.gather(-1, last), drafts.gather(-1, last), recovered)
    return Verdict(drafts.scatter(-1, last, token), accepted, torch.minimum(kept, limits + 1))


def verify_greedy(best: Tensor, drafts: Tensor | None, limits: Tensor) -> Verdict:
    """`verify` where each target row has all its mass on one token, and each draft row, too: no rows and no draws are needed.

    A draft stays if it is that token. The verdict's `tokens` are the best ones throughout, and where the bonus position has no
    draft, `kept` does not count it.

    Args:
        best: `[B, P]` those tokens of the target rows; `NO_TOKEN` where there is none.
        drafts: as for `verify`, or `[B, P − 1]`: the bonus position has none.
        limits: as for `verify`.
    """
    if drafts is None:
        none = torch.zeros_like(limits)
        return Verdict(best, none, none)
    right = (drafts == best[:, : drafts.shape[1]]) & (drafts != NO_TOKEN)
    kept = right.long().cumprod(-1).sum(-1)
    return Verdict(best, torch.minimum(kept, limits), torch.minimum(kept, limits + 1))


def _row(rows: Tensor, position: Tensor) -> Tensor:
    """One of the P rows `[B, P, V]` of each sequence: `[B, V]`."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return rows.gather(1, position[:, None, None].expand(-1, 1, rows.shape[-1])).squeeze(1)


def _excess(p: Tensor, q: Tensor) -> Tensor:
    """(p − q)⁺; p itself where rounding leaves nothing of it, which is where p = q but for rounding."""
    excess = (p - q).clamp_(min=0)
    return torch.where(excess.amax(-1, keepdim=True) > 0, excess, p)
