"""From what users name (folders, hub ids, loaded models) to models that can be decoded with."""

import logging
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab.decode.drafters import Drafter, Given, as_drafter, source_of
from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models.adapter_folder import Base
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.aligner import Aligner, Description, Manifest, describe, load_files
from trimtab.models.base import LanguageModel
from trimtab.models.blocks import LEAN
from trimtab.models.fingerprint import Files
from trimtab.models.gguf import is_gguf, load_gguf_tokenizer
from trimtab.models.graphs import CudaCapture
from trimtab.models.head import Head, HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.llamacpp import LlamaCppLM
from trimtab.models.loading import check_dtype, load_model, load_tokenizer, pick_device
from trimtab.models.lora_folder import poolable
from trimtab.models.reduced import is_reduced, load_reduced
from trimtab.models.vocabulary import check_same_vocabulary, find_eos_token_ids, vocabulary_size

__all__ = ["AlignerLike", "Loaded", "Loader", "Parts", "check_graphs", "load_parts", "make_capture", "runs_by_llamacpp"]

logger = logging.getLogger(__name__)

BACKENDS = ("llamacpp",)
"""What runs GGUF files, other than torch."""

AlignerLike = Any
"""A folder, a hub id, an `Aligner`, a transformers or PEFT model, or a `LanguageModel`."""


class Parts(NamedTuple):
    """What an `AlignedModel` is made of."""

    proposal: LanguageModel
    aligners: list[LanguageModel]
    manifests: list[Manifest | None]
    draft: Drafter | LanguageModel | None
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
    cuda_graphs: bool | None,
    quantize: str | None,
    aligner_dtype: str | torch.dtype | None,
    backend: str | None,
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
    source, files = proposal, None
    if revision is not None and isinstance(source, (str, Path)) and is_gguf(source):
        raise InvalidOption(f"revision: '{source}' is a file, which has none: leave it out")
    if backend is not None:
        what = {"dtype": dtype != "auto", "device": device is not None, "cuda_graphs": cuda_graphs, "quantize": quantize}
        _check_llamacpp(backend, [source, *given, source_of(draft)], [name for name, said in what.items() if said])
    if cuda_graphs:
        check_graphs(device)
    if isinstance(source, (str, Path)) and tokenizer is None:
        by_llamacpp = runs_by_llamacpp(source, backend)
        tokenizer = load_gguf_tokenizer(source) if by_llamacpp else load_tokenizer(source, revision=revision)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None and not hasattr(tokenizer, "get_vocab"):
        raise InvalidOption(f"tokenizer must be a tokenizer, or where to load one, not {tokenizer!r}")
    how: dict[str, Any] = {"device": device, "cuda_graphs": cuda_graphs, "quantize": quantize, "backend": backend}
    loader = Loader(tokenizer, dtype=aligner_dtype or dtype, **how)
    given = [loader.find(source) for source in given]
    drafting = source_of(draft)
    if drafting is not None:
        drafting = loader.find(drafting)
    else:
        draft = as_drafter(draft, Given(tokenizer, loader.load_draft))
    found = [one for one in (*given, drafting) if isinstance(one, Found)]
    if aligner_dtype is not None:
        _check_aligner_dtype(aligner_dtype, found)
    if quantize is not None and not found and not isinstance(source, (str, Path)):
        raise InvalidOption("quantize is for what is loaded here, and all of this was given as models: leave it out")
    if runs_by_llamacpp(source, backend):
        proposal = LlamaCppLM(source, loader.vocab_size)
    elif isinstance(source, (str, Path)):  # only now, for it takes longest
        load = partial(load_model, source, dtype=dtype, device=device, revision=revision)
        proposal, files = Files.of(load, (source, revision))
    loader.proposal = frozen = loader.wrap(proposal, files)
    loaded = [loader.load(source) for source in given]
    if draft is None and loaded and loaded[0].draft is not None:
        drafting = loaded[0].draft
    if drafting is not None:
        draft = loader.load_draft(drafting)
    return Parts(
        frozen,
        [item.model for item in loaded],
        [item.manifest for item in loaded],
        draft,
        tokenizer,
        find_eos_token_ids(proposal, tokenizer) if eos_token_ids is None else eos_token_ids,
    )


def _check_aligner_dtype(dtype: str | torch.dtype, found: Sequence["Found"]) -> None:
    """Refuse one that cannot be, or that nothing would have."""
    check_dtype(dtype, "aligner_dtype")
    heads = (one.folder.manifest is not None and one.folder.manifest.head is not None for one in found)
    if all(reduced or head for head, reduced in zip(heads, (is_reduced(one.folder.folder) for one in found), strict=True)):
        what = "heads and their drafters have the proposal's" if found else "nothing is loaded here beside the proposal"
        raise InvalidOption(f"aligner_dtype has no effect: {what}; leave it out")


def runs_by_llamacpp(source: Any, backend: str | None) -> bool:
    """Whether something that is to be loaded is for llama.cpp to run."""
    return backend is not None and isinstance(source, (str, Path)) and is_gguf(source)


def _check_llamacpp(backend: str, sources: Sequence[Any], said: Sequence[str]) -> None:
    """Refuse a backend that is none or would run nothing, and options that only others heed."""
    if backend not in BACKENDS:
        raise InvalidOption(f"backend must be {' or '.join(BACKENDS)}, not {backend!r}")
    loaded = [one for one in sources if isinstance(one, (str, Path))]
    if not any(map(is_gguf, loaded)):
        raise InvalidOption(f"backend: {backend} runs GGUF files, and none is named: leave it out")
    if said and all(map(is_gguf, loaded)):
        raise InvalidOption(f"{said[0]} has no effect on what llama.cpp runs: leave it out")


def check_graphs(device: str | torch.device | None) -> None:
    """Refuse CUDA graphs where there is not one GPU."""
    if device == "auto":
        raise InvalidOption("cuda_graphs needs models on one GPU, and 'auto' may spread them: leave it out, or say device cuda")
    chosen = pick_device(device)
    if chosen.type != "cuda":
        raise InvalidOption(f"cuda_graphs needs models on a GPU, and these are on {chosen}: leave it out, or say device cuda")


def make_capture(cuda_graphs: bool | None, device: str | torch.device | None) -> CudaCapture | None:
    """What captures the passes of models: on one GPU, unless CUDA graphs are not wanted."""
    if cuda_graphs is False or device == "auto" or (chosen := pick_device(device)).type != "cuda":
        return None
    return CudaCapture(chosen)


class Loaded(NamedTuple):
    """An aligner that can be decoded with."""

    model: LanguageModel
    manifest: Manifest | None
    num_bytes: int
    """What its weights take; for an adapter on a shared base, the adapter alone."""
    draft: Path | None = None
    """Where the drafter is that a residual or a head was saved with; it is not loaded."""
    drafter: LanguageModel | None = None
    """It, where somebody has loaded it."""


class Found(NamedTuple):
    """An aligner's folder, checked as far as it can be without its weights."""

    name: str
    folder: Description


class Loader:
    """Turns what users call an aligner into a language model; plain LoRA adapters over one base share it.

    Args:
        tokenizer: the proposal's, which every aligner's must equal; None to trust the caller.
        dtype, device: of what is loaded here.
        cuda_graphs: whether to replay short passes of what is loaded here as CUDA graphs, adapters on a shared base apart; None
            for where that is possible.
        quantize: how to keep the weights of what is loaded here, see `HuggingFaceLM`.
        backend: `"llamacpp"` lets llama.cpp run GGUF files; None for torch.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        dtype: str | torch.dtype,
        device: str | torch.device | None,
        cuda_graphs: bool | None = None,
        quantize: str | None = None,
        backend: str | None = None,
    ) -> None:
        self.vocab_size = vocabulary_size(tokenizer) if tokenizer is not None else None
        self._tokenizer, self._dtype, self._device, self._backend = tokenizer, dtype, device, backend
        self._capture, self._must_capture, self._quantize = make_capture(cuda_graphs, device), bool(cuda_graphs), quantize
        self._pools: weakref.WeakValueDictionary[Base, AdapterPool] = weakref.WeakValueDictionary()
        self._unfit: set[Base] = set()
        self.proposal: LanguageModel | None = None
        """The proposal, as soon as it is known: heads need it."""
        self._heads: weakref.WeakValueDictionary[int, HeadPool] = weakref.WeakValueDictionary()

    def find(self, source: AlignerLike) -> AlignerLike:
        """What `load` will take of a folder or a hub id, checked without reading weights; anything else as it is.

        Raises:
            ModelError: it is not there, or cannot be an aligner, see `trimtab.errors`.
            VocabularyMismatch: its tokenizer is not the proposal's.
        """
        if not isinstance(source, (str, Path)):
            return source
        if runs_by_llamacpp(source, self._backend):
            self._check(load_gguf_tokenizer(source), str(source))
            return source
        found = describe(source)
        self._check(found.tokenizer, str(source))
        return Found(str(source), found)

    def load(self, source: AlignerLike) -> Loaded:
        """Load an aligner, or what `find` found of it, or wrap one that is loaded.

        Raises:
            ModelError: it cannot be loaded, see `trimtab.errors`.
            VocabularyMismatch: its tokenizer is not the proposal's.
        """
        manifest, draft, files = None, None, None
        source = self.find(source)
        if runs_by_llamacpp(source, self._backend):
            source = LlamaCppLM(source, self.vocab_size)
        if isinstance(source, Aligner):
            self._check(source.tokenizer, source.name)
            source, manifest, draft = source.model, source.manifest, source.draft
        elif isinstance(source, Found):
            name, found = source
            if is_reduced(found.folder):
                raise UnsupportedModel(f"'{name}' is a head's drafter, which can draft and nothing else: give it as --draft")
            manifest, draft = found.manifest, found.draft
            if manifest is not None and (head := manifest.parsed_head) is not None:
                on_proposal = self._take_head(head, found.folder, name)
                return Loaded(on_proposal, manifest, on_proposal.adapter.num_bytes, draft)
            if found.is_adapter and (adapted := self._adapt(found.folder, name)) is not None:
                return Loaded(adapted, manifest, adapted.adapter.num_bytes, _default_draft(manifest, draft))
            source, files = load_files(found, dtype=self._dtype, device=self._device)
        model = self.wrap(source, files)
        return Loaded(model, manifest, getattr(model, "num_bytes", 0), _default_draft(manifest, draft))

    def load_draft(self, source: AlignerLike) -> LanguageModel:
        """Load what drafts; a head's drafter shares the proposal's embedding.

        Raises:
            ModelError: it cannot be loaded, see `trimtab.errors`, or is the drafter of another proposal.
            VocabularyMismatch: its tokenizer is not the proposal's.
        """
        source = self.find(source)
        if isinstance(source, Found) and is_reduced(source.folder.folder):
            return load_reduced(source.folder.folder, self.proposal, source.name)
        return self.load(source).model

    def wrap(self, model: Any, files: Files | None) -> LanguageModel:
        """A model as it is given, or one that was loaded here from files.

        Raises:
            ModelError: it cannot be decoded with, or not with CUDA graphs, if those must be.
        """
        if isinstance(model, torch.nn.Module):
            if files is None:
                return HuggingFaceLM(model, self.vocab_size)
            how: dict[str, Any] = {"capture": self._capture, "quantize": self._quantize}
            found = HuggingFaceLM(model, self.vocab_size, owned=True, files=files, **how)
            if self._must_capture and not found.has_graphs:
                kind = found.model.config.model_type
                plain = f"plain {', '.join(LEAN)} models"
                raise UnsupportedModel(
                    f"cuda_graphs: only {plain} can be captured, without adapters of their own; this is a '{kind}'"
                )
            return found
        if not hasattr(model, "vocab_size") or not hasattr(model, "extend"):
            raise InvalidOption(f"proposal and aligner must be folders, hub ids or models, not {model!r}")
        return model  # type: ignore[no-any-return]

    def _take_head(self, head: Head, folder: Path, name: str) -> Adapted:
        """A head on the layers of the proposal, which heads of the same tap share."""
        if self.proposal is None:
            raise UnsupportedModel(
                f"'{name}' is a head: it reads the hidden states of its proposal, which are not to be had here. Use it as a"
                " LoRA adapter of the proposal instead: the folder is one, and that is the aligned model at weight 1"
            )
        proposal = head.check(self.proposal, name)
        pool = self._heads.get(head.tap)
        if pool is None:
            pool = self._heads[head.tap] = HeadPool(proposal, head.tap)
        return Adapted(pool, pool.store.read(folder, name))

    @property
    def shared_bytes(self) -> int:
        """What the bases of adapters take."""
        return sum(pool.num_bytes for pool in list(self._pools.values()))

    def _check(self, tokenizer: Any, name: str) -> None:
        if self._tokenizer is not None:
            check_same_vocabulary(self._tokenizer, tokenizer, name)

    def _adapt(self, folder: Path, name: str) -> Adapted | None:
        """An adapter on the base that it shares, or None if it needs a model of its own."""
        base = poolable(folder)
        if base is None or base in self._unfit:
            return None
        pool = self._pools.get(base)
        if pool is None:
            try:
                load = partial(load_model, base.source, dtype=self._dtype, device=self._device, revision=base.revision)
                model, files = Files.of(load, base)
                pool = AdapterPool(model, self.vocab_size, owned=True, files=files, quantize=self._quantize)
            except UnsupportedModel as error:
                logger.info("adapters of '%s' get a model each: %s", base, error)
                self._unfit.add(base)
                return None
            self._pools[base] = pool
        return pool.read(folder, name)


def _default_draft(manifest: Manifest | None, draft: Path | None) -> Path | None:
    """The drafter beside an aligner that says how it was trained: training makes one for residuals and heads alone."""
    return draft if manifest is not None and (manifest.objective is not None or manifest.head is not None) else None
