"""From what users name (folders, hub ids, loaded models) to models that can be decoded with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.decode.draft import DRAFTS
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Aligner, Manifest
from trimtab.models.base import LanguageModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.models.vocabulary import check_same_vocabulary, find_eos_token_ids, vocabulary_size

__all__ = ["AlignerLike", "Parts", "load_parts"]

AlignerLike = Any
"""A folder, a hub id, an `Aligner`, a transformers or PEFT model, or a `LanguageModel`."""


class Parts(NamedTuple):
    """What an `AlignedModel` is made of."""

    proposal: LanguageModel
    aligners: list[LanguageModel]
    manifests: list[Manifest | None]
    draft: str | LanguageModel | None
    tokenizer: Any
    eos_token_ids: Sequence[int]


def load_parts(
    proposal: Any,
    aligner: AlignerLike | Sequence[AlignerLike] | None,
    draft: Any,
    tokenizer: Any,
    eos_token_ids: Sequence[int] | None,
    *,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    revision: str | None,
) -> Parts:
    """Load what is named and check that it fits together; the arguments are those of `AlignedModel.from_pretrained`.

    Raises:
        ModelError: something cannot be loaded, see `trimtab.errors`.
        VocabularyMismatch: an aligner's tokenizer is not the proposal's.
        InvalidOption: something is of the wrong kind.
    """
    if eos_token_ids is not None and not isinstance(eos_token_ids, (list, tuple)):
        raise InvalidOption(f"eos_token_ids must be a list of token ids, not {eos_token_ids!r}")
    given = [] if aligner is None else list(aligner) if isinstance(aligner, (list, tuple)) else [aligner]
    names_a_model = draft is not None and not (isinstance(draft, str) and draft in DRAFTS)
    sources: list[Any] = [*given, draft] if names_a_model else given
    ours = [isinstance(source, (str, Path)) for source in (proposal, *sources)]
    if ours[0]:
        tokenizer = load_tokenizer(proposal, revision=revision) if tokenizer is None else tokenizer
        proposal = load_model(proposal, dtype=dtype, device=device, revision=revision)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise InvalidOption(f"tokenizer must be a tokenizer, or where to load one, not {tokenizer!r}")
    items = [
        Aligner.from_pretrained(source, dtype=dtype, device=device) if named else source
        for source, named in zip(sources, ours[1:], strict=True)
    ]
    for item in items:
        if isinstance(item, Aligner) and tokenizer is not None:
            check_same_vocabulary(tokenizer, item.tokenizer, item.name)
    size = vocabulary_size(tokenizer) if tokenizer is not None else None
    modules = [proposal, *(item.model if isinstance(item, Aligner) else item for item in items)]
    backends = [_backend(module, size, owned) for module, owned in zip(modules, ours, strict=True)]
    return Parts(
        backends[0],
        backends[1 : 1 + len(given)],
        [item.manifest if isinstance(item, Aligner) else None for item in items[: len(given)]],
        backends[-1] if names_a_model else draft,
        tokenizer,
        find_eos_token_ids(proposal, tokenizer) if eos_token_ids is None else eos_token_ids,
    )


def _backend(module: Any, vocab_size: int | None, owned: bool) -> LanguageModel:
    if isinstance(module, torch.nn.Module):
        return HuggingFaceLM(module, vocab_size, owned=owned)
    if not hasattr(module, "vocab_size") or not hasattr(module, "extend"):
        raise InvalidOption(f"proposal and aligner must be folders, hub ids or models, not {module!r}")
    return module  # type: ignore[no-any-return]
