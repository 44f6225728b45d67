"""Random rows for tests of rules."""

import math

import torch

from trimtab.core.logprobs import log_normalize

V = 6
"""Tokens of a row."""


def rows(seed: int, *shape: int, zeros: float = 0.0) -> torch.Tensor:
    """Random log-probabilities `[*shape, V]` in float64, some of them −inf."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(*shape, V, generator=generator, dtype=torch.float64) * 2
    gone = (torch.rand(*shape, V, generator=generator) < zeros) & (logits < logits.amax(-1, keepdim=True))
    return log_normalize(logits.masked_fill(gone, -math.inf))
