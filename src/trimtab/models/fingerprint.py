"""Tell models apart by all that decides their numbers: every byte of their weights, their configuration, dtype and adapters.

`Files` is for models that are loaded from files, which are read once (`trimtab.models.digests`); `fingerprint_model` for models
that are in memory already. The two never agree: a folder and the model that somebody loaded from it are told apart.
"""

import contextlib
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from trimtab.errors import ModelError
from trimtab.models.digests import Seen, digest_file
from trimtab.models.stored import is_plain, plain
from trimtab.models.weight_files import commit_of, folder_of, weight_files

__all__ = ["Files", "digest_model", "fingerprint_model", "fingerprint_of"]

PIECE = 2**26
"""Elements of a weight that are brought to the host at once."""
DIGEST_ROWS = 8
"""Of a matrix, about so many rows tell a model from others in every dtype."""
FLOAT16_EXACT = 2.0**-14
"""From here on float16 holds what bfloat16 does, up to its largest number."""
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

    Attributes:
        commit: the hub's commit of a model, or of an adapter's base, that came from the hub.
    """

    def __init__(self, model: Any, folders: Sequence[Path]) -> None:
        self._described = _describe(model)
        self.commit = commit_of(folders[-1])
        self._seen = [_look(folder) for folder in folders]

    @classmethod
    def of(cls, load: Callable[[], Any], *sources: tuple[str | Path, str | None]) -> tuple[Any, Self]:
        """Load a model, and say from which files.

        Args:
            load: loads it.
            sources: folders or hub ids with their revisions: the model's, or an adapter's and its base's.

        Raises:
            ModelError: a file has changed meanwhile, so nobody knows which weights were read.
        """
        before: dict[Path, dict[str, Seen]] = {}
        for source, revision in sources:
            # What is not there, or is no index, is for loading to say; what is on the hub, for it to fetch.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
                folder = folder_of(source, revision)
                before[folder] = _look(folder)
        model = load()
        folders = [folder_of(source, revision) for source, revision in sources]
        made = cls(model, folders)
        for folder, seen in zip(folders, made._seen, strict=True):
            fetched = seen if commit_of(folder) else None
            if before.get(folder, fetched) != seen:
                raise ModelError(f"the weights in '{folder}' have changed while they were loaded: load the model again")
        return model, made

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:…` of every byte of the files, and of the model's description.

        Raises:
            ModelError: a file has changed since.
        """
        files = [seen for folder in self._seen for seen in folder.values()]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            known = dict(zip(files, pool.map(digest_file, files), strict=True))
        # Where files lie changes no model; how they are called says what is read.
        digests = [{name: known[seen] for name, seen in folder.items()} for folder in self._seen]
        return _named(hashlib.sha256(json.dumps(["files", self._described, digests]).encode()))


def _look(folder: Path) -> dict[str, Seen]:
    """How the files of a folder's weights are now."""
    return {name: Seen.at(folder / name) for name in weight_files(folder)}


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
        if not is_plain(value):
            digest.update(_digest(plain(value)))
            continue
        lies = value.data_ptr(), value.shape, value.stride(), value.is_conj(), value.is_neg()
        key = *lies, value.dtype, value.device
        if key not in known:
            known[key] = _digest(value.detach())
        digest.update(known[key])
    return _named(digest)


@torch.no_grad()
def digest_model(model: Any) -> str:
    """`sha256:…` of what tells a model from others, fine-tuned ones included, and is the same in whatever dtype it is loaded.

    It reads every vector and a few rows of every matrix, in bfloat16, without what float16 cannot hold as exactly. So weights
    that are stored in bfloat16 or float16 have one digest in every dtype; stored in float32, another one in float16.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        few = weight.detach() if weight.ndim == 1 else weight.detach()[:: -(-len(weight) // DIGEST_ROWS)]
        few = few.to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(_digest(few.masked_fill(few.abs() < FLOAT16_EXACT, 0)))
    return _named(digest)


def _digest(tensor: Tensor) -> bytes:
    digest, flat = hashlib.sha256(), tensor.reshape(-1)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE].cpu().resolve_conj().resolve_neg()
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)  # every second element of a vector is a view, too
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
