"""`--dry_run`: flags that several commands share, and the words for models, bytes and times."""

import math
from dataclasses import dataclass
from typing import Any

from trimtab.files import expand_home
from trimtab.hardware import in_bytes
from trimtab.options import option

__all__ = [
    "DryRunOptions",
    "aligner_weights",
    "describe_model",
    "describe_size",
    "in_time",
    "model_weights",
]


@dataclass(frozen=True)
class DryRunOptions:
    """Check and estimate, and do nothing else; the others say what is not there yet."""

    dry_run: bool = option(False, "check everything and say what the run will take; reads no weights and writes nothing")
    expected_proposal: str | None = option(
        None, "for --dry_run, where an earlier command will make --proposal: a model of its shape", metavar="P", kept=True
    )
    expected_examples: int | None = option(
        None, "for --dry_run, where --dataset is not at hand: how many records it has", kept=True, low=2
    )

    def idle(self) -> dict[str, str]:
        """What is for a dry run alone, the further flags of commands included, or for none."""
        names = ("expected_proposal", "expected_aligner", "expected_examples", "assume_tflops")
        if self.dry_run:
            return {"backend": "is not for --dry_run, which counts what torch would take"}
        return dict.fromkeys(names, "is for --dry_run")


def in_time(seconds: float | None) -> str:
    """As people read it."""
    if seconds is None:
        return "not known"
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def model_weights(name: str, expected: str | None, dtype: str, *, revision: str | None = None) -> dict[str, Any]:
    """What a model is and what its weights take, from its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.models.loading import attention_for, loading_arguments
    from trimtab.models.shapes import find_config
    from trimtab.models.supported import check_supported

    loading_arguments(dtype, "cpu", None)
    found = find_config(name, expected, revision=revision)
    check_supported(found.config)
    with torch.device("meta"):
        parameters = sum(
            parameter.numel()
            for parameter in AutoModelForCausalLM.from_config(
                found.config, attn_implementation=attention_for(found.config)
            ).parameters()
        )
    own = getattr(found.config, "dtype", None) or torch.float32
    named = own if dtype == "auto" else dtype
    loaded = getattr(torch, named) if isinstance(named, str) else named
    return {
        "name": name,
        "shape_of": found.source,
        "shape_from": found.origin,
        "parameters": parameters,
        "dtype": str(loaded).removeprefix("torch."),
        "weights": parameters * loaded.itemsize,
    }


def aligner_weights(name: str, expected: str | None, dtype: str) -> dict[str, Any]:
    """The same of an aligner; an adapter comes with the base that it adapts."""
    from safetensors import safe_open

    from trimtab.models.adapter_folder import base_of, check_weights, is_adapter
    from trimtab.models.loading import readable
    from trimtab.models.weight_files import WEIGHTS_NAME

    folder = expand_home(name)
    if not is_adapter(folder):
        return model_weights(name, expected, dtype)
    base = base_of(folder)
    found = model_weights(base.source, expected, dtype, revision=base.revision)
    check_weights(folder)
    with readable(folder, "aligner"), safe_open(folder / WEIGHTS_NAME, "pt") as file:
        adapter = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 - it is no mapping
    each = found["weights"] // found["parameters"]
    return found | {
        "name": name,
        "parameters": found["parameters"] + adapter,
        "weights": found["weights"] + each * adapter,
    }


def describe_model(model: dict[str, Any]) -> str:
    """One line about a model."""
    like = "" if model["shape_of"] == model["name"] else f", like {model['shape_of']}"
    return f"{model['name']}{like} (shape from {model['shape_from']})"


def describe_size(model: dict[str, Any]) -> str:
    """One line about its weights."""
    return f"{model['parameters']:,} parameters, {in_bytes(model['weights'])} in {model['dtype']}"
