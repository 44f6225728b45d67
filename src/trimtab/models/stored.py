"""What the files of a loaded model hold, against what the model took of them: every weight, and as the number that it is.

transformers says in its log alone what it left random, left over or cast. A quantised checkpoint that no quantiser reads
becomes a model whose weights are the codes, without their scales.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.models.composite import text_name
from trimtab.models.weight_files import weight_files

__all__ = ["Stored", "check_filled", "is_plain", "plain", "stored_tensors"]

FLOATS = ("F64", "F32", "F16", "BF16")
"""What safetensors calls the dtypes of which each number is a weight; others hold codes of one."""
BLOCK = (128, 128)
"""Of such floats whose configuration does not say it."""
SCALE = "_scale_inv"
"""The end of the name of a weight's scales, of floats of 8 bits that transformers makes weights of, and of no other codes."""
_CURE = (
    "a quantised model needs in config.json the quantization_config it was saved with, of a quant_method that transformers"
    " knows, or must be saved again in bfloat16"
)


class Stored(NamedTuple):
    """A tensor as its file has it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of the files that transformers loads from a folder, by name; nothing but their headers is read.

    Raises:
        SafetensorError: a file is none.
    """
    found = {}
    for name in weight_files(folder):
        if name.endswith(".json"):
            continue
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_slice(key)
                found[key] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
    return found


def check_filled(
    model: Any, report: Mapping[str, Any], source: str | Path, folder: Path, quantization: Mapping[str, Any] | None = None
) -> None:
    """Refuse a model that is not what its files hold.

    A model that a quantiser of transformers has read is that quantiser's business, but for weights that are missing.

    Args:
        model: as loaded.
        report: transformers' own, of the keys that did not fit.
        source: what the user calls it.
        folder: where its files are.
        quantization: the `quantization_config` of its files.

    Raises:
        CheckpointError: weights stayed as they were made, have another shape, are left over, or are no floating-point numbers
            in the files; names one of them.
    """
    if missing := sorted(report.get("missing_keys") or ()):
        raise CheckpointError(f"'{source}' does not fill the model: {len(missing)} missing_keys, such as {missing[0]}")
    if mismatched := sorted(report.get("mismatched_keys") or ()):
        name, held, wanted = mismatched[0]
        raise CheckpointError(
            f"'{source}' does not fill the model: {len(mismatched)} mismatched_keys, such as {name}, which has shape"
            f" {list(held)} in its files and {list(wanted)} in the model"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        return
    tensors = stored_tensors(folder)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left_over = set(report.get("unexpected_keys") or ())
    scales = {name for name in tensors if name.endswith(SCALE) and not left_over & _names(model, name)}
    codes = [
        name
        for name in sorted(tensors)
        if tensors[name].dtype not in FLOATS and parameters & _names(model, name) and name + SCALE not in scales
    ]
    if codes:
        raise CheckpointError(
            f"'{source}' holds codes, not weights: {len(codes)} tensors such as {codes[0]}, which is stored as"
            f" {tensors[codes[0]].dtype}: {_CURE}"
        )
    _check_blocks(sorted(scales), tensors, (quantization or {}).get("weight_block_size") or BLOCK, source)
    if left := sorted(name for name in left_over if _is_part(model, name)):
        stored = f", which is stored as {tensors[left[0]].dtype}" if left[0] in tensors else ""
        raise CheckpointError(
            f"'{source}' holds {len(left)} tensors that its model has no place for, such as {left[0]}{stored}: config.json must"
            f" be that of these weights (model_type, number of layers), and {_CURE}"
        )


def _check_blocks(scales: Sequence[str], tensors: Mapping[str, Stored], block: Sequence[int], source: str | Path) -> None:
    """Refuse scales that are not one for each whole block: transformers stretches whatever there is over the weight."""
    for name in scales:
        scale, weight = tensors[name], tensors.get(name.removesuffix(SCALE))
        if weight is None or weight.dtype in FLOATS:
            continue
        if [size * count for size, count in zip(block, scale.shape, strict=False)] != list(weight.shape):
            raise CheckpointError(
                f"'{source}': {name} has shape {list(scale.shape)}, which is not one scale for each block of {list(block)}"
                f" (weight_block_size) of a weight of {list(weight.shape)}: save the model again in bfloat16"
            )


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is a tensor as any: a quantiser's own kind knows few operators, and may lie nowhere."""
    return type(weight.detach()) is Tensor


def plain(weight: Tensor) -> Tensor:
    """What a weight stands for."""
    return weight.detach() if is_plain(weight) else weight.detach().dequantize()


def _names(model: Any, name: str) -> set[str]:
    """What a tensor of a file may be called in the model.

    Files of a body alone leave the body's name out, those of a composite model name the text model.
    """
    return {name, f"{model.base_model_prefix}.{name}", text_name(name)}


def _is_part(model: nn.Module, name: str) -> bool:
    """Whether a left-over tensor is a part of what a model computes: of a layer, or beside the weight of a module.

    Others are heads for other tasks, which do no harm.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for full in _names(model, name):
        parts = full.split(".")
        parents = [modules.get(".".join(parts[:length])) for length in range(1, len(parts))]
        if any(isinstance(parent, nn.ModuleList) or (parent is not None and not any(parent.children())) for parent in parents):
            return True
    return False
