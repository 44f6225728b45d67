"""The folder of a PEFT adapter: which model lies under it, and loading the two as one model."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from trimtab.errors import CheckpointError, ModelError
from trimtab.extras import need
from trimtab.files import expand_home
from trimtab.models.loading import check_finite, load_model, readable
from trimtab.models.peft_kinds import check_adapters, check_known
from trimtab.models.weight_files import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["Base", "base_of", "check_weights", "is_adapter", "load_adapter", "read_config"]


class Base(NamedTuple):
    """The model under an adapter."""

    source: str
    """An absolute path of a folder, or a hub id."""
    revision: str | None = None
    """Of the hub; None for the newest, and for a folder."""

    def __str__(self) -> str:
        return self.source if self.revision is None else f"{self.source} at revision {self.revision}"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG_NAME).is_file()


def read_config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` holds."""
    with readable(folder, "aligner"):
        values = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ModelError(f"'{folder}': {CONFIG_NAME} must hold one JSON object")
    return values


def base_of(folder: Path) -> Base:
    """The model under an adapter, as its configuration names it.

    A relative path leads from where the process runs, as PEFT has it, or else from the adapter's folder.

    Raises:
        CheckpointError: the configuration names none.
        ModelError: it cannot be read.
    """
    values = read_config(folder)
    source, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(source, str) or not source:
        raise CheckpointError(f"'{folder}': {CONFIG_NAME} names no base model")
    if not isinstance(revision, str | None):
        raise CheckpointError(f"'{folder}': {CONFIG_NAME}: revision must be a name or null, not {revision!r}")
    path = expand_home(source)
    for found in (path, folder / path):
        if found.is_dir():
            return Base(str(found.resolve()))
    return Base(source, revision or None)


def check_weights(folder: Path) -> None:
    """Refuse an adapter without weights, or with pickled ones."""
    if not (folder / WEIGHTS_NAME).is_file():
        pickled = " (adapter_model.bin is pickled and not loaded)" if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"'{folder}' holds no {WEIGHTS_NAME}{pickled}")


def load_adapter(folder: Path, *, dtype: str | torch.dtype, device: str | torch.device | None, trainable: bool = False) -> Any:
    """A PEFT model around its base, in evaluation mode, and frozen unless it is to be trained.

    Raises:
        UnsupportedModel: an adapter of which a part would be left out, see `trimtab.models.peft_kinds`.
        InvalidOption: PEFT is not installed.
        CheckpointError: weights that are missing, pickled, not finite, of another shape than the adapter's, or without a place.
    """
    base = base_of(folder)
    check_weights(folder)
    need("train", f"'{folder}', an adapter that shares no base with others,", "peft")
    from peft import PeftConfig, PeftModel

    with readable(folder, "aligner"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments", category=UserWarning)  # see `check_known`
        config = PeftConfig.from_pretrained(str(folder))
        check_known(read_config(folder), config, f"'{folder}'")
        check_adapters({"default": config}, f"'{folder}'")
    model = load_model(base.source, dtype=dtype, device=device, revision=base.revision)
    with readable(folder, "aligner"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)  # see `_check_filled`
        model = PeftModel.from_pretrained(
            model, str(folder), config=config, is_trainable=trainable, use_safetensors=True
        ).eval()
        _check_filled(model, folder)
    check_finite(model, folder)
    model.peft_config["default"].base_model_name_or_path = base.source  # what is saved again must find it from anywhere
    return model


def _check_filled(model: Any, folder: Path) -> None:
    """Every tensor of the file must have found its place, and every place of the adapter its tensor. PEFT lets both pass."""
    from peft import get_peft_model_state_dict

    wanted: Mapping[str, Any] = get_peft_model_state_dict(model, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        held = set(file.keys())
    known = {*wanted, *model.state_dict()}  # the base's embeddings, too, which PEFT saves where they were resized
    for problem, keys in (("lacks", set(wanted) - held), ("has no place for", held - known)):
        if keys:
            raise CheckpointError(f"'{folder}' does not fill the adapter: {problem} {len(keys)} keys, such as {min(keys)}")
