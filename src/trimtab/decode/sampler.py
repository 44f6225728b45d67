"""From the aligned row to the row that is drawn from: the sampling knobs of any model, for requests that differ in them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN
from trimtab.core.logprobs import Warp, log_normalize, warp
from trimtab.core.transfer import to_device
from trimtab.decode.request import SamplingParams
from trimtab.decode.shaping import stack_warps

__all__ = ["Sampler"]


class Sampler:
    """The knobs of B requests as tensors. Those that nobody turned cost nothing, and a neutral row is left bit for bit.

    Order: repetition penalty and logit bias, temperature, top-k, top-p, min-p; temperature 0 takes the best token after
    penalty and bias.

    Args:
        params: one for each request.
        contexts: the tokens each request has so far, for the repetition penalty.
        vocab_size: V.
        device: where the rows are.
        draft_temperatures: one for each request, on top of its own, for the rows that drafts are drawn from.

    Attributes:
        greedy: whether all requests take the best token, so that `best` is all they need.
    """

    def __init__(
        self,
        params: Sequence[SamplingParams],
        contexts: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
        draft_temperatures: Sequence[float] = (),
    ) -> None:
        self._warp, self._draft_warp = (
            stack_warps(
                [
                    Warp(t * (p.temperature or 1.0), max(p.top_k, 0), p.top_p if p.temperature else 1.0, p.min_p)
                    for p, t in zip(params, temperatures, strict=True)
                ],
                device,
            )
            for temperatures in ([1.0] * len(params), draft_temperatures or [1.0] * len(params))
        )
        self._greedy = to_device([[[p.temperature == 0]] for p in params], device)
        self._any_greedy = any(p.temperature == 0 for p in params)
        self.greedy = all(p.temperature == 0 for p in params)
        self._penalty: Tensor | None = None
        self._bias: Tensor | None = None
        if any(p.repetition_penalty != 1 for p in params):
            self._penalty = to_device([[[p.repetition_penalty]] for p in params], device, torch.float64)
            self._seen = torch.zeros(len(params), 1, vocab_size, dtype=torch.bool, device=device)
            for row, context in enumerate(contexts):
                self._seen[row, 0, to_device(list(context), device, torch.long)] = True
        if any(p.logit_bias for p in params):
            self._bias = torch.zeros(len(params), 1, vocab_size, dtype=torch.float64, device=device)
            for row, p in enumerate(params):
                for token, bias in p.logit_bias.items():
                    self._bias[row, 0, token] = bias

    def draft_rows(self, logq: Tensor, drafts: Sequence[Tensor]) -> Tensor:
        """The row `[B, 1, V]` that the next draft is drawn from, from the drafting model's: the same knobs raise acceptance."""
        return self._apply(self._draft_warp, logq, drafts)

    def rows(self, logp: Tensor, drafts: Sequence[Tensor] = ()) -> Tensor:
        """The rows `[B, P, V]` that tokens are drawn from, from aligned rows; all mass on one token where that is wanted.

        Args:
            logp: one row for each of P positions in a run.
            drafts: the tokens `[B]` drafted since the last `note`, in order. Position P − 1 stands behind all of them, P − 2
                behind all but the last, and so on: each position is penalised for what stands before it.
        """
        return self._apply(self._warp, logp, drafts)

    def _apply(self, how: Warp, logp: Tensor, drafts: Sequence[Tensor]) -> Tensor:
        logp = self._adjust(logp, drafts)
        warped = warp(logp, how)
        return torch.where(self._greedy, _only_best(logp), warped) if self._any_greedy else warped

    def best(self, logp: Tensor, drafts: Sequence[Tensor] = ()) -> Tensor:
        """The best token `[B, P]` of each row after penalty and bias, the lowest id among ties; `NO_TOKEN` without mass."""
        logp = self._adjust(logp, drafts)
        return torch.where(torch.isfinite(logp.amax(-1)), logp.argmax(-1), NO_TOKEN)

    def note(self, tokens: Tensor, accepted: Tensor) -> None:
        """Remember that each request just got the first `accepted + 1` `[B]` of its tokens `[B, K]`."""
        if self._penalty is not None:
            got = torch.arange(tokens.shape[1], device=tokens.device) <= accepted[:, None]
            self._seen.scatter_(-1, torch.where(got, tokens, tokens[:, :1]).clamp(min=0).unsqueeze(1), True)

    def _adjust(self, logp: Tensor, drafts: Sequence[Tensor]) -> Tensor:
        adjusted = logp
        if self._penalty is not None:
            seen = self._seen_at(drafts, logp.shape[1])
            adjusted = torch.where(seen, adjusted * self._penalty.to(logp.dtype), adjusted)
        if self._bias is not None:
            adjusted = adjusted + self._bias.to(logp.dtype)
        if adjusted is logp:
            return logp
        touched = (adjusted != logp).any(-1, keepdim=True)
        return torch.where(touched, log_normalize(adjusted), logp)

    def _seen_at(self, drafts: Sequence[Tensor], positions: int) -> Tensor:
        """Which tokens `[B, P, V]` stand before each of the positions."""
        if not drafts:
            return self._seen
        seen = self._seen.repeat(1, positions, 1)
        for i, draft in enumerate(drafts):
            behind = seen[:, max(0, i + positions - len(drafts)) :]
            behind.scatter_(-1, draft[:, None, None].expand(-1, behind.shape[1], 1), True)
        return seen


def _only_best(logp: Tensor) -> Tensor:
    """Rows with all mass on the most probable token, the lowest id among ties; a row without mass stays as it is."""
    best = logp.amax(-1, keepdim=True)
    hot = torch.full_like(logp, -math.inf).scatter_(-1, logp.argmax(-1, keepdim=True), 0.0)
    return torch.where(torch.isfinite(best), hot, logp)
