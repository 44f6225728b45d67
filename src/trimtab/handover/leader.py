"""Load a model that leads: a plain one, an aligner, or an adapter with the base that it names."""

import logging
from pathlib import Path
from typing import Any

import torch

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.assemble import Loader
from trimtab.errors import UnsupportedModel
from trimtab.models.aligner import describe, load_files
from trimtab.models.gguf import is_gguf
from trimtab.models.vocabulary import find_eos_token_ids

__all__ = ["load_leader"]

logger = logging.getLogger(__name__)


def load_leader(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    cuda_graphs: bool | None = None,
    quantize: str | None = None,
    backend: str | None = None,
    **settings: Any,
) -> AlignedModel:
    """A model that begins answers alone, for `TextHandover`.

    Args:
        source: the folder or hub id of a model, of an aligner, or of a PEFT adapter, which comes with its base; or a GGUF file.
        dtype: of what is loaded, as for `AlignedModel.from_pretrained`.
        device: where to put it.
        cuda_graphs: whether to replay short passes.
        quantize: how to keep its weights.
        backend: who runs a GGUF file.
        settings: the further arguments of `AlignedModel`.

    Raises:
        ModelError: it cannot be loaded, see `trimtab.errors`, or is a head, which has no text of its own.
    """
    how: dict[str, Any] = {"dtype": dtype, "device": device, "cuda_graphs": cuda_graphs, "quantize": quantize}
    if is_gguf(source):
        return AlignedModel.from_pretrained(source, draft="none", backend=backend, **how, **settings)
    found = describe(source)
    if (manifest := found.manifest) is not None and manifest.head is not None:
        raise UnsupportedModel(f"'{source}' is a head, which reads what its proposal has read, and cannot begin a text alone")
    if manifest is not None and manifest.is_residual:
        logger.warning("the leader '%s' is a residual, and no language model: what it writes will make little sense", source)
    if not found.is_adapter:
        return AlignedModel.from_pretrained(source, draft="none", backend=backend, **how, **settings)
    model, files = load_files(found, dtype=dtype, device=device)
    wrapped = Loader(found.tokenizer, **how).wrap(model, files)
    return AlignedModel(wrapped, (), found.tokenizer, find_eos_token_ids(model, found.tokenizer), draft="none", **settings)
