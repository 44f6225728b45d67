"""Which modules a plain LoRA adapter adapts, by its configuration, as PEFT would choose them.

So decoding with adapters on a shared base, and with heads, needs no PEFT. What is not plain is left to PEFT, and to its errors.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trimtab.errors import CheckpointError
from trimtab.extras import need
from trimtab.models.blocks import FAMILIES, products_of, sparse_layers

__all__ = ["check_keys", "key_of", "plan_of", "plan_or_peft"]

RANK, ALPHA = 8, 8
"""What PEFT takes where the file says nothing."""


def plan_of(values: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[int, float]] | None:
    """Rank and scaling of each adapted module, by its path; None where only PEFT knows.

    Args:
        values: what `trimtab.models.lora_folder.read_plain` gives.
        model: a stock model, or one of its shape without weights.
    """
    config: Any = model.config
    if config.model_type not in FAMILIES or not _is_plain(values, config):
        return None
    ranks, alphas = values.get("rank_pattern", {}), values.get("alpha_pattern", {})
    plan = {}
    for path, module in model.named_modules():
        if not path or not _is_chosen(path, values):
            continue
        rank = ranks.get(_pattern_of(path, ranks), values.get("r", RANK))
        alpha = alphas.get(_pattern_of(path, alphas), values.get("lora_alpha", ALPHA))
        if not isinstance(module, nn.Linear) or type(rank) is not int or rank <= 0 or type(alpha) not in (int, float):
            return None
        plan[path] = (rank, alpha / math.sqrt(rank) if values.get("use_rslora") else alpha / rank)
    return plan or None


def plan_or_peft(folder: Path, values: Mapping[str, Any], skeleton: nn.Module) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each adapted module. Where only PEFT knows, it lays them out around a base without weights.

    Args:
        folder: the adapter's.
        values: what `trimtab.models.lora_folder.read_plain` gives.
        skeleton: a model of the base's shape without weights, which PEFT may wrap.

    Raises:
        InvalidOption: PEFT is wanted and not installed.
    """
    if (plan := plan_of(values, skeleton)) is not None:
        return plan
    need("train", f"'{folder}', an adapter whose adapter_config.json does not name its modules,", "peft")
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora.layer import LoraLayer

    config = LoraConfig.from_peft_type(**values)
    inject_adapter_in_model(config, skeleton, low_cpu_mem_usage=True)
    layers = [(path, module) for path, module in skeleton.named_modules() if isinstance(module, LoraLayer)]
    return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers}


def key_of(path: str, half: str) -> str:
    """What the file of an adapter calls the A or the B of a module."""
    return f"base_model.model.{path}.lora_{half}.weight"


def check_keys(folder: Path, plan: Collection[str], held: Collection[str]) -> None:
    """Refuse a file that lacks a tensor of its adapter, or has another one.

    Raises:
        CheckpointError: names one.
    """
    keys = {key_of(path, half) for path in plan for half in "AB"}
    for problem, wrong in (("lacks", keys - set(held)), ("has no place for", set(held) - keys)):
        if wrong:
            raise CheckpointError(f"'{folder}' does not fill the adapter: {problem} {len(wrong)} keys, such as {min(wrong)}")


def _is_plain(values: Mapping[str, Any], config: Any) -> bool:
    """Whether the modules are named in a way that needs no look at more than their paths."""
    targets, layers, pattern = (values.get(name) for name in ("target_modules", "layers_to_transform", "layers_pattern"))
    if isinstance(targets, str):
        plain = targets.lower() != "all-linear" and layers is None and pattern is None
    else:
        plain = _are_texts(targets) and bool(targets)
    family = FAMILIES[config.model_type]
    if any(sparse_layers(family, config)):  # PEFT gives some names of experts to the tensors that hold them
        outside = {path.rpartition(".")[2] for paths in products_of(family, sparse=True) for path in paths}
        plain = plain and not isinstance(targets, str) and {name.rpartition(".")[2] for name in targets or ()} <= outside
    excluded = values.get("exclude_modules")
    return (
        plain
        and (not excluded or isinstance(excluded, str) or _are_texts(excluded))
        and (layers is None or type(layers) is int or (isinstance(layers, list) and all(type(i) is int for i in layers)))
        and (not pattern or (layers is not None and (isinstance(pattern, str) or _are_texts(pattern))))
        and all(isinstance(values.get(name, {}), dict) for name in ("rank_pattern", "alpha_pattern"))
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_chosen(path: str, values: Mapping[str, Any]) -> bool:
    targets, excluded = values["target_modules"], values.get("exclude_modules")
    if excluded and _is_named(path, excluded):
        return False
    named, layers = _is_named(path, targets), values.get("layers_to_transform")
    if not named or path in targets or layers is None or layers == []:
        return named
    layer = _layer_of(path, values.get("layers_pattern"))
    return layer is not None and layer in ([layers] if isinstance(layers, int) else layers)


def _is_named(path: str, names: str | Collection[str]) -> bool:
    """Whether a regular expression matches a path, or one of several names is it or its end."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return path in names or path.endswith(tuple(f".{name}" for name in names))


def _layer_of(path: str, pattern: str | Sequence[str] | None) -> int | None:
    """The number of a module's layer: the first in its path, or behind what `layers_pattern` calls the layers."""
    named = [pattern] if isinstance(pattern, str) else pattern
    starts = [rf"(?:^|.*?\.){name}" for name in named] if named else [r".*?\.[^.]*"]
    found = next(filter(None, (re.match(rf"{start}\.(?P<layer>\d+)\.", path) for start in starts)), None)
    return None if found is None else int(found["layer"])


def _pattern_of(path: str, patterns: Mapping[str, Any]) -> str:
    """The first pattern that matches the end of a path; the path itself if none does."""
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), path)
