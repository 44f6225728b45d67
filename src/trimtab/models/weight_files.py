"""Where the weights of a model or an adapter lie, and which files of its folder the loaders read for them."""

import json
from pathlib import Path
from typing import Any

from trimtab.files import expand_home
from trimtab.models.gguf import is_gguf, unpack_gguf

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "commit_of", "expand", "folder_of", "weight_files"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"


def expand(source: str | Path) -> str | Path:
    """The folder that a source is: with `~` resolved, or what a GGUF file was converted to; a hub id as it is."""
    if is_gguf(source):
        return unpack_gguf(source)
    folder = expand_home(source)
    return folder if folder.is_dir() else source


def folder_of(source: str | Path, revision: str | None = None) -> Path:
    """Where the files of a loaded model are: its own folder, or its snapshot in the hub's cache."""
    from huggingface_hub import snapshot_download

    folder = Path(expand(source))
    return folder if folder.is_dir() else Path(snapshot_download(str(source), revision=revision, local_files_only=True))


def commit_of(folder: Path) -> str | None:
    """The hub's commit, if the folder is a snapshot in the hub's cache."""
    return folder.name if folder.parent.name == "snapshots" else None


def weight_files(folder: Path) -> list[str]:
    """The files of a folder's weights by their names in it, an index before its parts, as PEFT and transformers choose them.

    Other files may lie beside them, such as the same weights in another format.
    """
    if (folder / CONFIG_NAME).is_file():
        return [WEIGHTS_NAME]
    name = _read(folder / "config.json").get("transformers_weights") or "model.safetensors"
    if not (folder / name).is_file():
        name = "model.safetensors.index.json"
    if not name.endswith(".index.json"):
        return [name]
    return [name, *sorted(set(_read(folder / name)["weight_map"].values()))]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
