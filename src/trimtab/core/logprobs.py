"""Rows of log-probabilities: normalise them, warp them, look things up in them.

A *row* is a tensor `[..., V]` of natural-log weights over a vocabulary of V tokens. `logp` names a normalised row, `logw` an
unnormalised one, `log_z` a normaliser. −inf is an ordinary value: a token that cannot be drawn. No function here writes to
its arguments, draws random numbers or waits for the device.

The nucleus has one definition, used everywhere: a token belongs to the top-p nucleus of a row if and only if the total
probability of the tokens *strictly* more probable than it is below p. Tied tokens are in or out together, and the most
probable token is always in.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.transfer import to_device

__all__ = [
    "Warp",
    "entropy",
    "gather",
    "impossible",
    "in_nucleus",
    "is_distribution",
    "kl_divergence",
    "log_normalize",
    "nucleus_mask",
    "row_from_logits",
    "warp",
]

FLOOR = -1e4
"""Nats below which a log-probability is a mask: models also write one as the least number of a format, such as −65,504.

No belief lies there: the probability is 0 in every float from −746 on.
"""
LIMIT = 1e30
"""Nats beyond which a log weight is no number to reckon with."""

_INT_VIEW = {torch.float32: torch.int32, torch.float64: torch.int64}


def log_normalize(logw: Tensor) -> Tensor:
    """Normalise rows `[..., V]`; a row that is −inf throughout becomes NaN, which whoever draws from it reports."""
    return torch.log_softmax(logw, dim=-1)


def row_from_logits(logits: Tensor, vocab_size: int) -> Tensor:
    """Turn a model's logits `[..., W]`, W ≥ `vocab_size`, into log-probabilities `[..., V]` in float32 or better.

    Columns from `vocab_size` on are padding of the embedding matrix: no tokenizer produces them, so they get no mass.
    """
    logits = logits[..., :vocab_size]
    return log_normalize(logits if logits.dtype == torch.float64 else logits.float())


def impossible(logp: Tensor) -> Tensor:
    """Which entries stand for tokens that cannot be drawn: −inf, and masks that are as good as that."""
    return logp < FLOOR


def is_distribution(logw: Tensor) -> Tensor:
    """Whether each row `[..., V]` can be normalised, `[..., 1]`: nothing in it is NaN or +inf, and some token is possible."""
    best = logw.amax(-1, keepdim=True)  # NaN if anything is
    return (best > -LIMIT) & (best < LIMIT)


def gather(rows: Tensor, tokens: Tensor) -> Tensor:
    """The entries of `rows` `[..., V]` at `tokens` `[...]`."""
    return rows.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy(logp: Tensor) -> Tensor:
    """Entropy of each row in nats, `[...]`."""
    return -torch.where(logp.isneginf(), 0.0, logp.exp() * logp).sum(-1)


def kl_divergence(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p‖q) of each row in nats, `[...]`; +inf where p has mass that q lacks."""
    p = logp.exp()
    return (p * torch.where(p == 0, 0.0, logp - logq)).sum(-1)


class Warp(NamedTuple):
    """How a row is reshaped before use; each field is one number for every row, or a tensor with one per row `[...]`.

    Applied in the order of the fields. `None` leaves a step out, and so do the neutral values 1, 0, 1 and 0: a row with
    them comes through bit for bit, whatever its neighbours want. Temperatures are above 0; `top_k` 0 keeps all tokens.
    `max_top_k` bounds a `top_k` tensor, so that the largest of them need not be fetched from the device.
    """

    temperature: float | Tensor | None = None
    top_k: int | Tensor | None = None
    top_p: float | Tensor | None = None
    min_p: float | Tensor | None = None
    max_top_k: int = 0

    @property
    def cuts(self) -> bool:
        """Whether it may take a token's mass away; of a warp in plain numbers."""
        return bool(self.top_k) or self.top_p not in (None, 1) or bool(self.min_p)


def warp(logp: Tensor, how: Warp) -> Tensor:
    """Apply temperature, top-k, top-p and min-p to rows `[..., V]` and normalise again.

    A top-k or top-p cut never separates tied tokens, so it may keep a few more than k.
    """
    if how.temperature is not None:
        temperature = _per_row(how.temperature, logp)
        # The best token stays at 0 however small the temperature: no quotient of a normal row can be NaN or all -inf.
        cooled = (logp - logp.amax(-1, keepdim=True)) / temperature.clamp(min=torch.finfo(logp.dtype).tiny)
        logp = torch.where(temperature == 1, logp, log_normalize(cooled))
    if how.top_k is not None:
        top_k = how.top_k if isinstance(how.top_k, Tensor) else to_device(how.top_k, logp.device)
        logp = _keep(logp, _top_k_mask(logp, top_k, max(how.max_top_k, how.top_k if isinstance(how.top_k, int) else 0)))
    if how.top_p is not None:
        logp = _keep(logp, nucleus_mask(logp, how.top_p))
    if how.min_p is not None:
        floor = _per_row(how.min_p, logp).log()
        logp = _keep(logp, logp >= logp.amax(-1, keepdim=True) + floor)
    return logp


def nucleus_mask(logp: Tensor, top_p: float | Tensor) -> Tensor:
    """Which tokens of each row `[..., V]` are in its top-p nucleus, without sorting.

    The nucleus is every token at or above some log-probability, so we bisect for that threshold over the bit patterns of
    the floats, which are ordered like the floats: 31 passes for float32, 63 for float64, each the sum that `in_nucleus`
    takes. The answer is therefore exactly `in_nucleus` of every token, and no value has to come back from the device.
    """
    ranks = _rank(logp)
    probs = logp.exp()
    goal = _per_row(top_p, logp)
    # Invariant: the mass ranked before `low` is below top_p, the mass ranked before `high` is not (or `high` is past the end).
    low = torch.zeros_like(ranks[..., :1])
    high = torch.full_like(low, torch.iinfo(ranks.dtype).max)
    for _ in range(torch.iinfo(ranks.dtype).bits - 1):
        middle = low + ((high - low) >> 1)
        inside = _mass(probs, ranks < middle) < goal
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return ((ranks <= low) | (goal >= 1)) & ~logp.isneginf()  # top_p = 1 keeps all, however the sum was rounded


def in_nucleus(logp: Tensor, tokens: Tensor, top_p: float | Tensor) -> Tensor:
    """Whether `tokens` `[...]` are in the top-p nucleus of rows `logp` `[..., V]`: one sum a row, no sort."""
    ranks = _rank(logp)
    own = ranks.gather(-1, tokens.unsqueeze(-1))
    goal = _per_row(top_p, logp)
    inside = (_mass(logp.exp(), ranks < own) < goal) | (goal >= 1)
    return inside.squeeze(-1) & ~gather(logp, tokens).isneginf()


def _rank(logp: Tensor) -> Tensor:
    """Integers `[..., V]` that order tokens from most to least probable; equal log-probabilities share a rank."""
    distance = (logp.amax(-1, keepdim=True) - logp).abs()  # ≥ 0, and the bits of a float ≥ 0 are ordered as it is
    return distance.view(_INT_VIEW[logp.dtype])


def _mass(probs: Tensor, which: Tensor) -> Tensor:
    return torch.where(which, probs, 0.0).sum(-1, keepdim=True)


def _top_k_mask(logp: Tensor, top_k: Tensor, max_top_k: int) -> Tensor:
    best = logp.topk(min(max(max_top_k, 1), logp.shape[-1]), dim=-1).values
    last = top_k.unsqueeze(-1).expand(*logp.shape[:-1], 1).clamp(1, best.shape[-1]) - 1
    return (logp >= best.gather(-1, last)) | (top_k.unsqueeze(-1) == 0)


def _per_row(value: float | Tensor, logp: Tensor) -> Tensor:
    """One number for every row, or one for each, as `[..., 1]` in the rows' precision."""
    if isinstance(value, Tensor):
        return value.to(logp.dtype).unsqueeze(-1)
    return torch.full((1,), value, dtype=logp.dtype, device=logp.device)


def _keep(logp: Tensor, which: Tensor) -> Tensor:
    """Cut to some tokens and normalise; a row that keeps all it had is left as it is."""
    unchanged = (which | logp.isneginf()).all(-1, keepdim=True)
    return torch.where(unchanged, logp, log_normalize(torch.where(which, logp, -math.inf)))
