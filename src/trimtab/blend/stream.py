"""Safetensors files that are written tensor by tensor: whoever writes them holds one tensor in memory, not all of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from trimtab.models.stored import Stored

__all__ = ["DTYPES", "write_tensors"]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By safetensors' names, those of weights."""
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1, "I8": 1} | {
    **dict.fromkeys(("I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
}
"""Bytes of a number."""


def write_tensors(path: Path, layout: Mapping[str, Stored], make: Callable[[str], Tensor]) -> None:
    """Write a file.

    Args:
        path: where.
        layout: each tensor by name.
        make: a tensor by name, asked for each once, with the dtype and shape that the layout says.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    names = sorted(layout, key=lambda name: (-_SIZES[layout[name].dtype], name))  # so that each is aligned
    for name in names:
        start, end = end, end + layout[name].size * _SIZES[layout[name].dtype]
        header[name] = {"dtype": layout[name].dtype, "shape": list(layout[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(make(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)
