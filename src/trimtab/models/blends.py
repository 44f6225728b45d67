"""LoRA aligners of one base as one aligner, θ = θ_0 + Σ_d λ_d (θ_d − θ_0): MEAV's arithmetic (arXiv 2410.19206), per request.

The base is θ_0, and an adapter is θ_d − θ_0. So a blend of any number of adapters is a slot of the pool like any other, and one
pass of the base. Heads are adapters of the proposal's own layers: those with one tap blend, too.
"""

from collections.abc import Sequence
from typing import Any

from trimtab.errors import InvalidRequest
from trimtab.models.adapter_values import Blend
from trimtab.models.adapters import Adapted
from trimtab.models.base import LanguageModel

__all__ = ["blended"]

_WAY_OUT = "blend whole models into a folder with `trimtab blend`, or leave blend out, which mixes their rows"


def blended(aligners: Sequence[LanguageModel], weights: Sequence[float]) -> LanguageModel:
    """The blend of aligners as one language model over their base; the base itself where all weights are 0.

    Args:
        aligners: LoRA adapters on one pool, at least one.
        weights: λ of each.

    Raises:
        InvalidRequest: one of them is no such adapter, or they are on different bases; names its place in the list.
    """
    first: Any = aligners[0]
    for i, one in enumerate(aligners):
        if not isinstance(one, Adapted) or isinstance(one.adapter, Blend):
            raise InvalidRequest(f"blend: aligners[{i}] is no LoRA adapter on a base that adapters share: {_WAY_OUT}")
        if one.pool is not first.pool:
            raise InvalidRequest(
                f"blend: aligners[0] and aligners[{i}] are adapters of different bases, or heads of different taps: {_WAY_OUT}"
            )
    blend = Blend(zip((one.adapter for one in aligners), weights, strict=True))  # type: ignore[attr-defined]
    if not blend.parts:
        return first.pool  # type: ignore[no-any-return]
    adapter, weight = blend.parts[0]
    return Adapted(first.pool, adapter if len(blend.parts) == 1 and weight == 1 else blend)
