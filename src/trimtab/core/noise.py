"""The only place that draws random numbers, and it remembers nothing.

Every uniform is a pure function of (request seed, completion index, position, draw), computed by the counter-based generator
Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So a request's noise does not depend
on its neighbours, on the order of work, on the device, or on what was drawn before; and several draws per position are as
cheap to address as one.
"""

import hashlib
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.transfer import to_device

__all__ = ["fresh_seed", "philox", "seed_after", "uniforms"]

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def fresh_seed() -> int:
    """A seed nobody asked for, from the operating system."""
    return secrets.randbits(63)


def seed_after(seed: int, index: int) -> int:
    """A seed for what follows completion `index` of a request of this seed, with noise of its own."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold 32-bit words; the arguments broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(
    seeds: Sequence[int],
    indices: Sequence[int],
    starts: Sequence[int],
    length: int,
    draws: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniforms in [0, 1) for a block of positions of each row, `[B, length, draws]` in float64 with 53 random bits each.

    Args:
        seeds: the request's seed, one per row: any integers; they count modulo 2**64.
        indices: which of the request's `n` completions each row is.
        starts: the first position of each row's block; position 0 is the first generated token.
        length: number of positions.
        draws: number of uniforms at each position.
        device: where the result lives.
    """
    key_low = torch.tensor([seed & _MASK for seed in seeds], dtype=torch.int64)[:, None, None]
    key_high = torch.tensor([(seed >> 32) & _MASK for seed in seeds], dtype=torch.int64)[:, None, None]
    index = torch.tensor(list(indices), dtype=torch.int64)[:, None, None]
    start = torch.tensor(list(starts), dtype=torch.int64)[:, None, None]
    position = start + torch.arange(length, dtype=torch.int64)[None, :, None]
    pair = torch.arange((draws + 1) // 2, dtype=torch.int64)[None, None, :]
    words = philox((position & _MASK, pair, index & _MASK, position >> 32), (key_low, key_high))
    first, second = _uniform(words[0], words[1]), _uniform(words[2], words[3])
    return to_device(torch.stack([first, second], dim=-1).flatten(-2)[..., :draws], device)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    product = word * constant  # wraps modulo 2**64; the bits are those of the unsigned product
    return (product >> 32) & _MASK, product & _MASK


def _uniform(high: Tensor, low: Tensor) -> Tensor:
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53
