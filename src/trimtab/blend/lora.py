"""Blends of LoRA adapters of one base: Σ λ_d·s_d·B_d·A_d is a LoRA adapter again, of rank Σ r_d.

The A of a module stand below each other, the B beside each other with λ and scale folded in: the blend has the scale 1. Of the
base nothing is read but its configuration.
"""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trimtab.blend.arithmetic import factors
from trimtab.blend.stream import DTYPES, write_tensors
from trimtab.errors import CheckpointError, InvalidOption, UnsupportedModel
from trimtab.files import write_json
from trimtab.models.adapter_folder import base_of, is_adapter, read_config
from trimtab.models.loading import attention_for, load_configs, readable
from trimtab.models.lora_folder import read_plain
from trimtab.models.lora_plan import check_keys, key_of, plan_or_peft
from trimtab.models.stored import Stored, stored_tensors
from trimtab.models.weight_files import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["Adapters"]


class _Adapter(NamedTuple):
    """One part with what it is multiplied by."""

    name: str
    folder: Path
    factor: float
    plan: dict[str, tuple[int, float]]
    """Rank and scale of each module."""
    tensors: dict[str, Stored]


class Adapters:
    """Plain LoRA adapters of one base.

    Args:
        start: the folder of θ_0, where it was named: the base's, or that of an adapter of the same base.
        named: what it was called.
        vectors: name and folder of each.
        weights: their λ.

    Attributes:
        base: what they adapt.

    Raises:
        InvalidOption: they adapt different bases, or all weights are 0.
        UnsupportedModel: one is no plain LoRA adapter.
        CheckpointError: a file does not fill its adapter.
        ModelError: a folder cannot be read.
    """

    def __init__(
        self, start: Path | None, named: str | None, vectors: Sequence[tuple[str, Path]], weights: Sequence[float]
    ) -> None:
        given = [(name, folder, weight) for (name, folder), weight in zip(vectors, weights, strict=True)]
        if start is not None and is_adapter(start):
            given.insert(0, ("base", start, factors(weights)[0]))
        self.base = base_of(given[-1][1])
        for name, folder, _ in given:
            if base_of(folder) != self.base:
                raise InvalidOption(
                    f"--vector: {name} adapts '{base_of(folder)}', and {given[-1][0]} '{self.base}': they need one base"
                )
        if start is not None and not is_adapter(start) and self.base.source not in (str(start.resolve()), named):
            raise InvalidOption(f"--base '{named}' is not what the adapters adapt, '{self.base}': leave it out, or name that")
        self._config, _ = load_configs(self.base.source, revision=self.base.revision)
        self._skeleton = _skeleton(self._config)
        read = [self._read(name, folder, factor) for name, folder, factor in given]
        self._parts = [part for part in read if part.factor]
        if not self._parts:
            raise InvalidOption(f"--vector: all weights are 0, and the blend is the base itself, '{self.base}': use that")

    @property
    def report(self) -> dict[str, Any]:
        """What is told of it."""
        return {"kind": "lora", "base": str(self.base), "rank": max(self._ranks.values())}

    @property
    def _ranks(self) -> dict[str, int]:
        """Of the blend, by module."""
        paths = sorted({path for part in self._parts for path in part.plan})
        return {path: sum(part.plan[path][0] for part in self._parts if path in part.plan) for path in paths}

    def write(self, folder: Path) -> None:
        """Write configuration and weights; a blend that is one of its parts has the part's own."""
        if len(self._parts) == 1 and self._parts[0].factor == 1:
            own = self._parts[0].folder
            shutil.copyfile(own / WEIGHTS_NAME, folder / WEIGHTS_NAME)
            write_json(folder / CONFIG_NAME, read_config(own) | self._based)
            return
        write_json(folder / CONFIG_NAME, self._settings())
        dtypes = (DTYPES[stored.dtype] for part in self._parts for stored in part.tensors.values())
        dtype = functools.reduce(torch.promote_types, dtypes)  # the narrowest that loses nothing of any
        name_of = {value: name for name, value in DTYPES.items()}
        layout = {}
        for path, rank in self._ranks.items():
            for half, shape in self._shapes(path, rank).items():
                layout[key_of(path, half)] = Stored(name_of[dtype], shape)
        write_tensors(folder / WEIGHTS_NAME, layout, lambda name: self._make(name, dtype))

    @property
    def _based(self) -> dict[str, Any]:
        return {"base_model_name_or_path": self.base.source, "revision": self.base.revision}

    def _settings(self) -> dict[str, Any]:
        """adapter_config.json: the modules by their full paths, the scale of each 1."""
        ranks = self._ranks
        usual = max(ranks.values(), key=list(ranks.values()).count)
        odd = {path.replace(".", r"\."): rank for path, rank in ranks.items() if rank != usual}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            **self._based,
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "bias": "none",
            "init_lora_weights": True,
            "fan_in_fan_out": False,
            "modules_to_save": None,
            "rank_pattern": odd,
            "alpha_pattern": odd,
            "target_modules": list(ranks),
        }

    def _make(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor of the blend."""
        half, path = ("A" if name.endswith("lora_A.weight") else "B"), _path_of(name)
        blocks = []
        for part in self._parts:
            if path in part.plan:
                with readable(part.folder, "aligner"), safe_open(part.folder / WEIGHTS_NAME, "pt") as tensors:
                    block = tensors.get_tensor(name).double()
                blocks.append(block if half == "A" else block * (part.factor * part.plan[path][1]))
        whole = torch.cat(blocks, 0 if half == "A" else 1).to(dtype)
        if not bool(torch.isfinite(whole).all()):
            raise CheckpointError(f"{name} of the blend is not finite: a part's is not, or weights are too large")
        return whole

    def _shapes(self, path: str, rank: int) -> dict[str, tuple[int, int]]:
        """Of the A and the B of a module."""
        linear: Any = self._skeleton.get_submodule(path)
        return {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}

    def _read(self, name: str, folder: Path, factor: float) -> _Adapter:
        """A part, checked without its weights."""
        try:
            values = read_plain(folder)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{name}: {error}; merge it into its base, and blend the whole models") from None
        with readable(folder, "aligner"):
            plan, tensors = plan_or_peft(folder, values, _skeleton(self._config)), stored_tensors(folder)
        check_keys(folder, plan, tensors)
        for path, (rank, _) in plan.items():
            for half, shape in self._shapes(path, rank).items():
                stored = tensors[key_of(path, half)]
                if stored.shape != shape or stored.dtype not in DTYPES:
                    raise CheckpointError(
                        f"{name}: '{folder}': {key_of(path, half)} is {stored.dtype} of shape {list(stored.shape)}, and should"
                        f" be floating-point numbers of shape {list(shape)}"
                    )
        return _Adapter(name, folder, factor, plan, tensors)


def _skeleton(config: Any) -> nn.Module:
    """The base without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config))
    return model


def _path_of(key: str) -> str:
    return key.removeprefix("base_model.model.").rpartition(".lora_")[0]
