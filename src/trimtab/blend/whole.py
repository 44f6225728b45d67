"""Blends of whole models: every tensor of the base's files anew, one at a time, under the same names and in the same dtype."""

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from trimtab.blend.arithmetic import factors, weighted_sum
from trimtab.blend.stream import DTYPES, write_tensors
from trimtab.errors import CheckpointError, UnsupportedModel
from trimtab.models.loading import attention_for, load_configs, readable
from trimtab.models.stored import Stored, stored_tensors
from trimtab.models.weight_files import weight_files

__all__ = ["Wholes"]

_OF_NO_EFFECT = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}
"""Keys of config.json that change no number."""


class Wholes:
    """θ_0 and each θ_d as folders of one architecture.

    Args:
        base: θ_0's folder.
        vectors: name and folder of each θ_d.
        weights: their λ.

    Raises:
        UnsupportedModel: their configurations or dtypes do not allow it; names the part.
        CheckpointError: their tensors are not the base's; names the part and the tensor.
        ModelError: a folder cannot be read.
    """

    def __init__(self, base: Path, vectors: Sequence[tuple[str, Path]], weights: Sequence[float]) -> None:
        self._base = _Folder("base", base)
        self._parts = [self._base, *(_Folder(name, folder) for name, folder in vectors)]
        self._factors = factors(weights)
        for part in self._parts:
            part.check(self._base)

    @property
    def report(self) -> dict[str, Any]:
        """What is told of it."""
        return {"kind": "weights", "parameters": sum(one.size for one in self._base.tensors.values())}

    def write(self, folder: Path) -> None:
        """Write configuration and weights.

        Raises:
            CheckpointError: a sum is not finite in the base's dtype, or a tensor of other numbers differs.
        """
        for name in ("config.json", "generation_config.json"):
            if (self._base.folder / name).is_file():
                shutil.copyfile(self._base.folder / name, folder / name)
        for file in weight_files(self._base.folder):
            if file.endswith(".json"):
                shutil.copyfile(self._base.folder / file, folder / file)
                continue
            held = {name: self._base.tensors[name] for name, home in self._base.files.items() if home == file}
            write_tensors(folder / file, held, self._make)

    def _make(self, name: str) -> Tensor:
        """The blend's tensor of a name."""
        stored = self._base.tensors[name]
        reads = [partial(part.read, name) for part in self._parts]
        if stored.dtype not in DTYPES:
            first = reads[0]()
            if odd := next(
                (p.name for p, read in zip(self._parts, reads, strict=True) if not torch.equal(read(), first)), None
            ):
                raise CheckpointError(f"{odd}: {name} holds {stored.dtype}, no weights, and differs from the base's")
            return first
        total = weighted_sum(reads, self._factors).to(DTYPES[stored.dtype])
        if not bool(torch.isfinite(total).all()):
            raise CheckpointError(
                f"{name} of the blend is not finite in {stored.dtype}: a part's is not, or weights are too large"
            )
        return total


class _Folder:
    """One part."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        with readable(folder, "model"):
            config, _ = load_configs(folder, local_only=True)
            self.config: dict[str, Any] = config.to_dict()
            self.tied = _tied(config)
            self.files: dict[str, str] = {}
            for file in weight_files(folder):
                if not file.endswith(".json"):
                    with safe_open(folder / file, "pt") as tensors:
                        self.files |= dict.fromkeys(tensors.keys(), file)
            self.tensors: dict[str, Stored] = stored_tensors(folder)

    def check(self, base: "_Folder") -> None:
        """Refuse what cannot be added to the base."""
        if self.config.get("quantization_config"):
            raise UnsupportedModel(f"{self.name}: '{self.folder}' is quantised, and codes cannot be added: name the original")
        keys = sorted((self.config.keys() | base.config.keys()) - _OF_NO_EFFECT)
        for key in keys:
            mine, its = self.config.get(key), base.config.get(key)
            if mine != its:
                raise UnsupportedModel(
                    f"{self.name}: config.json has {key} {mine!r}, and the base's {its!r}: parts of a blend are of one"
                    " architecture"
                )
        extra = sorted(name for name in self.tensors if self._home(name, base.tensors) is None)
        lacking = sorted(name for name in base.tensors if self._home(name, self.tensors) is None)
        for problem, names in (("lacks", lacking), ("has beside the base's", extra)):
            if names:
                raise CheckpointError(f"{self.name}: '{self.folder}' {problem} {len(names)} tensors, such as {names[0]}")
        for name, stored in base.tensors.items():
            mine_stored = self.tensors[self._home(name, self.tensors) or name]
            if mine_stored.shape != stored.shape:
                shapes = f"{list(mine_stored.shape)}, and the base's {list(stored.shape)}"
                raise CheckpointError(f"{self.name}: {name} has shape {shapes}")
            if (mine_stored.dtype in DTYPES) != (stored.dtype in DTYPES) or stored.dtype.startswith("F8"):
                kinds = f"{mine_stored.dtype}, and the base's as {stored.dtype}"
                raise CheckpointError(f"{self.name}: {name} is stored as {kinds}: only floating-point numbers can be added")

    def read(self, name: str) -> Tensor:
        """A tensor of the base's names."""
        own = self._home(name, self.tensors)
        assert own is not None
        with readable(self.folder, "model"), safe_open(self.folder / self.files[own], "pt") as tensors:
            return tensors.get_tensor(own)  # type: ignore[no-any-return]

    def _home(self, name: str, names: dict[str, Stored]) -> str | None:
        """Under which name these have a tensor: its own, or that of the one it is tied to."""
        if name in names:
            return name
        group = {name, self.tied.get(name), *(other for other, source in self.tied.items() if source == name)}
        return next((other for other in sorted(filter(None, group)) if other in names), None)


def _tied(config: Any) -> dict[str, str]:
    """Which parameters are others under a second name."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_for(config))
    return dict(model.all_tied_weights_keys)
