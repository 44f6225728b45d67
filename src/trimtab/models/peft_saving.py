"""Saving adapters without a question to the hub.

PEFT saves the embeddings with an adapter if their size is not its base's. For a base on the hub it asks the hub for that, each
time: about the base's newest state, whichever was loaded, and for many seconds where the network does not answer. The hub's
cache says it, too, and of the right revision.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.models.loading import load_configs
from trimtab.models.shapes import is_here

__all__ = ["embeddings_of", "unasked"]


@contextlib.contextmanager
def unasked() -> Iterator[None]:
    """PEFT saves without asking the hub, as if the embeddings had their base's size."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # which PEFT looks at then, and huggingface_hub only when it is imported
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Could not find a config file", category=UserWarning)
            yield
    finally:
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def embeddings_of(model: Any) -> dict[str, bool]:
    """What to tell PEFT's `save_pretrained` of a model's embeddings: that they are to be saved where they were resized."""
    config = getattr(model, "peft_config", {}).get("default")
    source, revision = getattr(config, "base_model_name_or_path", None), getattr(config, "revision", None)
    if not source or Path(source).is_dir() or not is_here(source, revision=revision):
        return {}
    base, _ = load_configs(source, revision=revision, local_only=True)
    return {"save_embedding_layers": True} if base.vocab_size != model.config.vocab_size else {}
