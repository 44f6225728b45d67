"""What attention with a mask costs where several heads share a key: as torch groups heads, and as the lean pass folds them.

OMP_NUM_THREADS=1 python benchmarks/attention_cost.py
"""

import torch
import torch.nn.functional as F
from row_cost import least

from trimtab.hardware import describe_hardware
from trimtab.models.lean import _fold, _repeat, _unfold

HEADS, GROUP, HEAD_DIM = 32, 4, 64

SHAPES = ((1, 1, 200), (1, 5, 200), (1, 1, 4000), (1, 5, 4000), (8, 5, 500), (1, 256, 512))
"""Slots, queries of each, and columns."""


def main() -> None:
    print(f"{HEADS} heads, {HEADS // GROUP} keys of {HEAD_DIM}; microseconds, the least of nine: enable_gqa / folded")
    for dtype in (torch.float32, torch.bfloat16):
        for slots, width, used in SHAPES:
            grouped, folded = measure(slots, width, used, dtype)
            print(f"{dtype!s:15} {slots} slots, {width:3} queries, {used:4} columns {grouped:8.0f} / {folded:.0f}")
    print(describe_hardware())


def measure(slots: int, width: int, used: int, dtype: torch.dtype) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(slots, width, HEADS, HEAD_DIM, generator=generator).to(dtype)
    keys, values = (torch.randn(slots, HEADS // GROUP, used, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    mask = None if slots == width == 1 else torch.zeros(slots, 1, width, used, dtype=dtype)

    def grouped() -> torch.Tensor:
        mixed = F.scaled_dot_product_attention(queries.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(slots * width, -1)

    def folded() -> torch.Tensor:
        wide = None if mask is None else _repeat(mask, GROUP)
        mixed = F.scaled_dot_product_attention(_fold(queries, GROUP), keys, values, attn_mask=wide)
        return _unfold(mixed, GROUP).reshape(slots * width, -1)

    torch.testing.assert_close(grouped(), folded(), atol=2e-2, rtol=0)
    return least(grouped), least(folded)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
