"""Tell models apart by all that decides their numbers: every byte of their weights, their configuration, dtype and adapters.

`Files` is for models that are loaded from files, which are read once (`trimtab.models.digests`); `fingerprint_model` for models
that are in memory already. The two never agree: a folder and the model that somebody loaded from it are told apart.
"""

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.models.digests import Seen, digest_file

__all__ = ["Files", "commit_of", "fingerprint_model", "fingerprint_of"]

PIECE = 2**26
"""Elements of a weight that are brought to the host at once."""
_OF_NO_EFFECT = {
    *("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"),  # of a model
    *("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type"),  # of an adapter
}
"""Keys of configurations that change no number, or that the weights themselves say."""


class Files:
    """The files that a model's weights were loaded from, as they were then. They are read when the fingerprint is first wanted.

    Args:
        model: the loaded model, whose configuration, dtype and adapters count, too.
        folders: where its weights are: a model's folder, or an adapter's and its base's.
    """

    def __init__(self, model: Any, folders: Iterable[Path]) -> None:
        folders = list(folders)
        self._described = _describe(model)
        self.commit = commit_of(folders[-1])
        """The hub's commit of a model, or of an adapter's base, that came from the hub."""
        self._seen = [[Seen.at(file) for file in sorted(folder.glob("*.safetensors"))] for folder in folders]

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of every byte of the files, and of the model's description.

        Raises:
            ModelError: a file has changed since.
        """
        files = [seen for folder in self._seen for seen in folder]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            known = dict(zip(files, pool.map(digest_file, files), strict=True))
        # Neither how files are called nor where they lie changes a model.
        digests = [sorted(known[seen] for seen in folder) for folder in self._seen]
        return _named(hashlib.sha256(json.dumps(["files", self._described, digests]).encode()))


def commit_of(folder: Path) -> str | None:
    """The hub's commit, if the folder is a snapshot in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def fingerprint_model(model: Any) -> str:
    """`sha256:…` over every byte of the parameters and buffers of a torch module, its configuration and its adapters.

    Raises:
        ModelError: weights that are on no device, as accelerate's offloading leaves them.
    """
    digest = hashlib.sha256(_describe(model).encode())
    tensors = {**dict(model.named_buffers(remove_duplicate=False)), **model.state_dict()}
    known: dict[Any, bytes] = {}  # a tied weight is read once
    for name, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):  # what a module keeps as its extra state
            digest.update(f"{name} {value!r}".encode())
            continue
        if value.is_meta:
            raise ModelError(f"{name} is offloaded, so this model cannot be told from others: name its folder instead")
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        key = value.data_ptr(), value.shape, value.stride(), value.dtype, value.device
        if key not in known:
            known[key] = _digest(value.detach())
        digest.update(known[key])
    return _named(digest)


def _digest(tensor: Tensor) -> bytes:
    digest, flat = hashlib.sha256(), tensor.reshape(-1)
    for start in range(0, len(flat), PIECE):
        digest.update(flat[start : start + PIECE].cpu().view(torch.uint8).numpy().data)
    return digest.digest()


def fingerprint_of(part: Any) -> str:
    """What a language model says of itself; one that says nothing is taken for no other object, here or elsewhere."""
    known = getattr(part, "fingerprint", None)
    return f"{type(part).__name__} {id(part)} of {_process()}" if known is None else str(known)


@functools.cache
def _process() -> str:
    """What no other process has."""
    return str(uuid.uuid4())


def _describe(model: Any) -> str:
    """What decides a model's numbers beside its weights, as text."""
    described: dict[str, Any] = {"class": type(model).__name__, "dtype": str(getattr(model, "dtype", None))}
    if (config := getattr(model, "config", None)) is not None:
        described["config"] = _of_effect(config.to_dict())
    adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
    if adapters:
        described["adapters"] = {name: _of_effect(config.to_dict()) for name, config in adapters.items()}
        described["layers"] = [
            (
                name,
                [
                    str(getattr(layer, key, None))
                    for key in ("scaling", "active_adapters", "disable_adapters", "merged_adapters")
                ],
            )
            for name, layer in model.named_modules()
            if hasattr(layer, "active_adapters") and hasattr(layer, "disable_adapters")
        ]
    return json.dumps(described, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value))


def _of_effect(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _OF_NO_EFFECT}


def _named(digest: Any) -> str:
    return f"sha256:{digest.hexdigest()}"
