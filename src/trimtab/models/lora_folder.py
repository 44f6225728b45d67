"""The folder of a LoRA adapter that can share a base with others: what it may hold, and how to tell."""

import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trimtab.errors import ModelError, UnsupportedModel
from trimtab.files import expand_home
from trimtab.models.adapter_folder import Base, base_of, check_weights, read_config
from trimtab.models.blocks import FAMILIES, products_of
from trimtab.models.loading import readable
from trimtab.models.weight_files import WEIGHTS_NAME

__all__ = ["PROJECTIONS", "poolable", "read_plain"]

PROJECTIONS = tuple(
    dict.fromkeys(
        path.rpartition(".")[2] for block in FAMILIES.values() for paths in products_of(block, sparse=False) for path in paths
    )
)
"""The names of linear layers that adapters of one family or another adapt."""

_HARMLESS = {
    *("peft_type", "bias", "init_lora_weights"),  # looked at by themselves
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("lora_dropout", "megatron_core", "qalora_group_size"),  # without a meaning here
}
"""Keys of adapter_config.json that may have a value. PEFT writes what a newer version can do as further keys, and any of
those with a value makes an adapter that is not plain."""
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal")
"""`init_lora_weights` that leave the base's weights alone; PiSSA, OLoRA and others change them."""


def poolable(folder: str | Path) -> Base | None:
    """The base model of a LoRA adapter that a pool over that base can run.

    None where the folder holds anything else, or what cannot be read: load it as a model of its own, which says what is wrong.
    Whether the base is of a kind that can be shared, `AdapterPool` says.
    """
    folder = expand_home(folder)
    try:
        read_plain(folder)
        return base_of(folder)
    except ModelError:
        return None


def read_plain(folder: Path) -> dict[str, Any]:
    """What adapter_config.json sets, if it describes plain LoRA of the projections and the weights are there and no others."""
    values = read_config(folder)
    check_weights(folder)
    with readable(folder, "aligner"), safe_open(folder / WEIGHTS_NAME, "pt") as file:
        keys = list(file.keys())
    further = [key for key, value in values.items() if value and key not in _HARMLESS]
    if values.get("peft_type") != "LORA":
        further.append("peft_type")
    if values.get("bias", "none") != "none":
        further.append("bias")
    if values.get("init_lora_weights") not in _HARMLESS_STARTS:
        further.append("init_lora_weights")
    if further:
        what = f"{further[0]} is {values.get(further[0])!r}"
        raise UnsupportedModel(f"'{folder}' is no plain LoRA adapter, as adapters in a pool must be: {what}")
    for key in keys:
        if not re.search(rf"\.({'|'.join(PROJECTIONS)})\.lora_[AB]\.weight$", key):
            raise UnsupportedModel(f"'{folder}' holds {key}, but adapters in a pool adapt {', '.join(PROJECTIONS)} only")
    return {key: value for key, value in values.items() if key in _HARMLESS}  # the others are off, or not even known here
