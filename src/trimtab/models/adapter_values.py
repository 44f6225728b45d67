"""What a slot of an adapter pool may have: a LoRA adapter, or a blend of several, Σ_d λ_d·B_d·A_d.

A blend is a value: the adapters that it is made of, and a weight for each. It has no weights of its own, so that any number of
blends costs no memory; `trimtab.models.adapter_mixing` computes with them.
"""

import hashlib
import math
import weakref
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.models.adapter_layout import Layout, Shape

__all__ = ["Adapter", "Blend"]


class Adapter:
    """The weights of one LoRA adapter for one pool's base; equal only to itself.

    Attributes:
        name: what to call it in messages.
        flat: `[size]` all its weights, in the base's dtype and on its device.
        shape: how they are laid out.
        deltas: the same as pairs for the lean pass, where all slots use it.
        parts: itself, once.
    """

    def __init__(self, name: str, flat: Tensor, shape: Shape, layout: Layout) -> None:
        self.name, self.flat, self.shape = name, flat, shape
        self.deltas = layout.deltas(flat[None], shape)
        self.reference = weakref.ref(self)

    @property
    def parts(self) -> tuple[tuple["Adapter", float], ...]:
        """Itself, once."""
        return ((self, 1.0),)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, zeros of padding and fused blocks included."""
        return self.flat.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of its weights and how they are laid out."""
        digest = hashlib.sha256(repr(self.shape).encode())
        digest.update(self.flat.cpu().view(torch.uint8).numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"


class Blend:
    """Adapters of one pool's base with a weight each; equal to every blend of the same adapters with the same weights.

    Args:
        weighted: adapters and their weights. Of one that comes several times the weights are added, and one of weight 0 is left
            out.

    Attributes:
        parts: what is left, in an order that does not depend on the one given.
    """

    def __init__(self, weighted: Iterable[tuple[Adapter, float]]) -> None:
        given: dict[Adapter, list[float]] = {}
        for adapter, weight in weighted:
            given.setdefault(adapter, []).append(weight)
        summed = [(adapter, math.fsum(weights)) for adapter, weights in given.items()]
        self.parts = tuple(sorted(((a, w) for a, w in summed if w), key=lambda part: (part[0].fingerprint, part[1])))
        self.reference = tuple((adapter.reference, weight) for adapter, weight in self.parts)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Blend) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def num_bytes(self) -> int:
        """Memory that its parts take."""
        return sum(adapter.num_bytes for adapter, _ in self.parts)

    @property
    def shape(self) -> Shape:
        """That of its parts side by side, as one adapter."""
        return Shape.beside(adapter.shape for adapter, _ in self.parts)

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of its parts and their weights."""
        parts = " ".join(f"{weight!r} {adapter.fingerprint}" for adapter, weight in self.parts)
        return f"sha256:{hashlib.sha256(parts.encode()).hexdigest()}"
