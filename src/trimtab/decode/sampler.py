"""From the aligned row to a token: the sampling knobs that every model has, for a batch of requests that differ in them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.draw import NO_TOKEN, greedy, inverse_cdf
from trimtab.core.logprobs import Warp, log_normalize, warp
from trimtab.decode.request import SamplingParams
from trimtab.decode.shaping import stack_warps

__all__ = ["Sampler"]


class Sampler:
    """The knobs of B requests as tensors. Those that nobody turned cost nothing, and a neutral row is left bit for bit.

    Order: repetition penalty and logit bias, temperature, top-k, top-p, min-p, draw; temperature 0 takes the best token
    after penalty and bias.

    Args:
        params: one for each request.
        contexts: the tokens each request has so far, for the repetition penalty.
        vocab_size: V.
        device: where the rows are.
    """

    def __init__(
        self, params: Sequence[SamplingParams], contexts: Sequence[Sequence[int]], vocab_size: int, device: torch.device
    ) -> None:
        self._warp = stack_warps(
            [Warp(p.temperature or 1.0, max(p.top_k, 0), p.top_p if p.temperature else 1.0, p.min_p) for p in params], device
        )
        self._greedy = torch.tensor([[p.temperature == 0] for p in params], device=device)
        self._any_greedy = any(p.temperature == 0 for p in params)
        self._all_greedy = all(p.temperature == 0 for p in params)
        self._penalty: Tensor | None = None
        self._bias: Tensor | None = None
        if any(p.repetition_penalty != 1 for p in params):
            self._penalty = torch.tensor([[[p.repetition_penalty]] for p in params], dtype=torch.float64, device=device)
            self._seen = torch.zeros(len(params), 1, vocab_size, dtype=torch.bool, device=device)
            for row, context in enumerate(contexts):
                self._seen[row, 0, torch.tensor(list(context), device=device)] = True
        if any(p.logit_bias for p in params):
            self._bias = torch.zeros(len(params), 1, vocab_size, dtype=torch.float64, device=device)
            for row, p in enumerate(params):
                for token, bias in p.logit_bias.items():
                    self._bias[row, 0, token] = bias

    def draw(self, logp: Tensor, uniform: Tensor) -> Tensor:
        """A token `[B, K]` from each aligned row `[B, K, V]` with `uniform` `[B, K]`; `NO_TOKEN` where a row has no mass."""
        logp = self._adjust(logp)
        if self._all_greedy:
            return greedy(logp)
        drawn = inverse_cdf(warp(logp, self._warp), uniform.unsqueeze(-1)).squeeze(-1)
        return torch.where(self._greedy, greedy(logp), drawn) if self._any_greedy else drawn

    def note(self, tokens: Tensor) -> None:
        """Remember the token `[B, 1]` that each request just got."""
        if self._penalty is not None:
            self._seen.scatter_(-1, tokens.clamp(min=NO_TOKEN + 1).unsqueeze(-1), True)

    def _adjust(self, logp: Tensor) -> Tensor:
        adjusted = logp
        if self._penalty is not None:
            adjusted = torch.where(self._seen, adjusted * self._penalty.to(logp.dtype), adjusted)
        if self._bias is not None:
            adjusted = adjusted + self._bias.to(logp.dtype)
        if adjusted is logp:
            return logp
        touched = (adjusted != logp).any(-1, keepdim=True)
        return torch.where(touched, log_normalize(adjusted), logp)
