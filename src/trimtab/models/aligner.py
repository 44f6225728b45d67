"""`Aligner`: the small model that turns the proposal, with a manifest that says how to decode with it.

On disk an aligner is an ordinary transformers or PEFT repository (safetensors, tokenizer, model card) plus `trimtab.json`.
"""

import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from trimtab.core.rules import parse_rule
from trimtab.errors import InvalidOption, ManifestError, VocabularyMismatch
from trimtab.files import atomic_folder, atomic_write, write_json
from trimtab.knobs import KNOBS
from trimtab.models.adapter_folder import Base, base_of, is_adapter, load_adapter
from trimtab.models.fingerprint import Files
from trimtab.models.head import Head
from trimtab.models.loading import expand, load_model, load_tokenizer, readable
from trimtab.models.parts import Parts
from trimtab.models.peft_saving import embeddings_of, unasked
from trimtab.models.reduced import REDUCED_NAME
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.options import Range

__all__ = [
    "DRAFT_NAME",
    "MANIFEST_NAME",
    "SUPERSEDED",
    "TOKENIZER_FILES",
    "Aligner",
    "Description",
    "Manifest",
    "describe",
    "is_head",
    "load_files",
    "load_weights",
    "manifest_of",
    "rewrite_manifest",
    "save_model",
]

MANIFEST_NAME = "trimtab.json"
DRAFT_NAME = "draft"
"""The folder in an aligner's folder that may hold its drafter: an ordinary transformers model, or a head's, see `reduced`."""
FORMAT_VERSION = 1
_OF_MODELS = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "generation_config.json")
WEIGHT_FILES = (*_OF_MODELS, REDUCED_NAME)
TOKENIZER_FILES = (
    *("tokenizer*.json", "tokenizer.model", "chat_template.*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt"),
)
_MODEL_FILES = WEIGHT_FILES + TOKENIZER_FILES
SUPERSEDED = _MODEL_FILES + tuple(f"{DRAFT_NAME}/{pattern}" for pattern in _MODEL_FILES)
"""What another aligner leaves in a folder that a new one is written to, its drafter included."""
OF_SOME = ("head", "blended", "rewriter_template")
"""What only manifests of some aligners say."""


@dataclass(frozen=True)
class Manifest:
    """How an aligner wants to be decoded. Explicit options override it.

    Attributes:
        vocabulary: fingerprint of the tokenizer it was trained with.
        proposal: `{"id": …, "revision": …}` of the proposal it was trained against, if any.
        rule: a decoding rule as `parse_rule` reads it.
        weight: λ; None stands for the rule's default.
        proposal_temperature, proposal_top_p, aligner_temperature: the warps before the rule.
        objective: the name of what it was trained with, if we know; it need not be installed here.
        head: for a head (`trimtab.models.head`), `{"tap": …, "layers": …, "proposal": …}`.
        blended: for a blend, what it was made of (`trimtab.models.parts`).
        rewriter_template: for a rewriter, how it is asked (`trimtab.data.rewrite_template`).
    """

    vocabulary: str
    proposal: dict[str, str | None] | None = None
    rule: str = "product"
    weight: float | None = None
    proposal_temperature: float = 1.0
    proposal_top_p: float = 1.0
    aligner_temperature: float = 1.0
    objective: str | None = None
    head: dict[str, Any] | None = None
    blended: dict[str, Any] | None = None
    rewriter_template: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Check every field, for a manifest may come from anywhere."""
        if self.format_version != FORMAT_VERSION:
            raise ManifestError(f"format_version is {self.format_version!r}, but this Trimtab reads {FORMAT_VERSION}")
        try:
            parse_rule(self.rule)
        except (InvalidOption, AttributeError) as error:
            raise ManifestError(str(error)) from None
        for name, knob in KNOBS.items():
            if not knob.said.get("manifest") or knob.range == Range():
                continue
            value, neutral = getattr(self, name), knob.said.get("neutral")
            if value is None and neutral is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ManifestError(f"{name} must be a finite number, not {value!r}")
            if not knob.range.holds(value):
                raise ManifestError(f"{name} must be {knob.range}, not {value}")
        if self.weight is not None:
            try:
                parse_rule(self.rule).check_weights([self.weight])
            except InvalidOption as error:
                raise ManifestError(str(error)) from None
        proposal = self.proposal
        if proposal is not None and not (
            isinstance(proposal, Mapping)
            and isinstance(proposal.get("id"), str)
            and set(proposal) <= {"id", "revision"}
            and isinstance(proposal.get("revision"), (str, type(None)))
        ):
            raise ManifestError(f"proposal must be {{'id': …, 'revision': …}}, not {proposal!r}")
        if self.objective is not None and not (isinstance(self.objective, str) and self.objective.isidentifier()):
            raise ManifestError(f"objective must be the name of one, not {self.objective!r}")
        _ = self.parsed_head, self.parts  # raises where one cannot be
        if "{answer}" not in (self.rewriter_template or "{answer}"):
            raise ManifestError(f"rewriter_template must have {{answer}} in it, not {self.rewriter_template!r}")
        if not isinstance(self.vocabulary, str) or not self.vocabulary.startswith("sha256:"):
            raise ManifestError(f"vocabulary must be a fingerprint 'sha256:…', not {self.vocabulary!r}")

    @property
    def parsed_head(self) -> Head | None:
        """What it says of a head, if it is one."""
        return None if self.head is None else Head.from_dict(self.head)

    @property
    def parts(self) -> Parts | None:
        """What it was blended of, if it is a blend."""
        return None if self.blended is None else Parts.from_dict(self.blended)

    @property
    def is_residual(self) -> bool:
        """Whether the aligner was trained as what the proposal lacks under `product`, and so is no language model."""
        return self.objective in ("likelihood", "tb", "subtb", "soft_q", "grpo") and parse_rule(self.rule).name == "product"

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Self:
        """Read what `trimtab.json` holds; unknown keys are errors."""
        if not isinstance(values, Mapping):
            raise ManifestError(f"{source}: must hold one JSON object")
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise ManifestError(f"{source}: unknown key '{unknown[0]}'; known are {', '.join(names)}")
        if missing := sorted({"vocabulary", "format_version"} - set(values)):
            raise ManifestError(f"{source}: key '{missing[0]}' is missing")
        try:
            return cls(**values)
        except ManifestError as error:
            raise ManifestError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """What `trimtab.json` holds; `OF_SOME` for those that have it alone, so that earlier versions read all others."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in OF_SOME or value is not None}


def is_head(folder: Path) -> bool:
    """Whether a folder holds a head with its tokenizer, for which nothing is read from anywhere else.

    Raises:
        ManifestError: its manifest cannot be read.
    """
    manifest = manifest_of(folder) if (folder / "tokenizer_config.json").is_file() else None
    return manifest is not None and manifest.head is not None


def manifest_of(folder: Path) -> Manifest | None:
    """What `trimtab.json` in a folder says; None where there is none.

    Raises:
        ManifestError: it cannot be read.
    """
    path = folder / MANIFEST_NAME
    return _read_manifest(path, str(path)) if path.is_file() else None


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Change what `trimtab.json` of an aligner's folder says, and its card, which says it in words.

    Args:
        folder: that has a manifest.
        changes: its attributes.
    """
    old = manifest_of(folder)
    assert old is not None
    new = dataclasses.replace(old, **changes)
    with atomic_write(folder / "README.md") as stream:
        stream.write(model_card(new))
    write_json(folder / MANIFEST_NAME, new.to_dict())


def _read_manifest(path: Path, source: str) -> Manifest:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ManifestError(f"{source}: not JSON ({error})") from None
    return Manifest.from_dict(values, source)


@dataclass
class Aligner:
    """A small causal language model, full or as a PEFT adapter, that shares a vocabulary with its proposals.

    Attributes:
        model: the transformers model, or the PEFT model around it.
        tokenizer: its tokenizer.
        manifest: how it wants to be decoded; None for a plain repository, which does not say.
        name: what to call it in messages.
        draft: the folder of its drafter, which is saved and pushed with it; None for none.
    """

    model: Any
    tokenizer: Any
    manifest: Manifest | None = None
    name: str = "aligner"
    draft: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        revision: str | None = None,
    ) -> Self:
        """Load an aligner from a folder or a hub id; a plain transformers or PEFT repository will do.

        Raises:
            ManifestError: `trimtab.json` has unknown keys or bad values.
            VocabularyMismatch: the tokenizer in the folder is not the one the manifest was written for.
            CheckpointError: missing, pickled, incomplete, corrupt or non-finite weights.
        """
        found = describe(path, revision=revision)
        weights = load_weights(found, dtype=dtype, device=device)
        return cls(weights, found.tokenizer, found.manifest, name=str(path), draft=found.draft)

    def save_pretrained(self, path: str | Path, *, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the aligner's folder; what stood there before stays whole until everything new is on disk.

        Args:
            path: the folder.
            weights: the model's, by name, where it does not hold them whole itself.
        """
        config = getattr(self.model, "peft_config", {}).get("default")
        base = getattr(config, "base_model_name_or_path", None)
        if base and Path(base).is_dir() and Path(base).resolve() == Path(path).resolve():
            raise InvalidOption(f"'{path}' holds the base model of this adapter: save the adapter to another folder")
        stays = self.draft is not None and self.draft.resolve() == (Path(path) / DRAFT_NAME).resolve()
        with atomic_folder(path, superseded=_MODEL_FILES if stays else SUPERSEDED) as folder:
            _write_model(self.model, self.tokenizer, folder, weights)
            if self.draft is not None and not stays:
                shutil.copytree(self.draft, folder / DRAFT_NAME)
            manifest = self.manifest or Manifest(vocabulary=fingerprint_vocabulary(self.tokenizer))
            (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
            write_json(folder / MANIFEST_NAME, manifest.to_dict())

    def push_to_hub(self, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
        """Upload the aligner's folder to the hub and return its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(api.upload_folder(folder_path=folder, repo_id=repo_id, revision=revision))


def save_model(model: Any, tokenizer: Any, path: str | Path, *, weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write a plain transformers folder; the arguments are those of `Aligner` and its `save_pretrained`."""
    with atomic_folder(path, superseded=_MODEL_FILES) as folder:
        _write_model(model, tokenizer, folder, weights)


class Description(NamedTuple):
    """All of an aligner's folder but its weights."""

    folder: Path
    is_adapter: bool
    tokenizer: Any
    manifest: Manifest | None
    draft: Path | None = None
    """The folder of its drafter, if it has one."""


def describe(path: str | Path, *, revision: str | None = None) -> Description:
    """Read an aligner's tokenizer and manifest; the arguments and errors are those of `Aligner.from_pretrained`."""
    folder = _fetch(path, revision)
    adapts = is_adapter(folder)
    where = Base(str(folder)) if (folder / "tokenizer_config.json").is_file() or not adapts else base_of(folder)
    tokenizer = load_tokenizer(where.source, revision=where.revision)
    manifest = None
    if (folder / MANIFEST_NAME).is_file():
        source = str(Path(path) / MANIFEST_NAME)
        manifest = _read_manifest(folder / MANIFEST_NAME, source)
        if manifest.vocabulary != fingerprint_vocabulary(tokenizer):
            raise VocabularyMismatch(f"{source}: the tokenizer beside it has another vocabulary than the manifest says")
    draft = folder / DRAFT_NAME
    return Description(folder, adapts, tokenizer, manifest, draft if (draft / "config.json").is_file() else None)


def load_weights(
    found: Description, *, dtype: str | torch.dtype, device: str | torch.device | None, trainable: bool = False
) -> Any:
    """The model in an aligner's folder; an adapter comes as a PEFT model around its base, frozen unless it is to be trained."""
    if found.is_adapter:
        return load_adapter(found.folder, dtype=dtype, device=device, trainable=trainable)
    return load_model(found.folder, dtype=dtype, device=device)


def load_files(
    found: Description, *, dtype: str | torch.dtype, device: str | torch.device | None, trainable: bool = False
) -> tuple[Any, Files]:
    """`load_weights`, and the files that it has read, those of an adapter's base included."""
    under = [base_of(found.folder)] if found.is_adapter else []
    load = partial(load_weights, found, dtype=dtype, device=device, trainable=trainable)
    return Files.of(load, (found.folder, None), *under)


def _write_model(model: Any, tokenizer: Any, folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
    given = {} if weights is None else {"state_dict": weights}
    with unasked():
        model.save_pretrained(folder, **given, **embeddings_of(model))
    tokenizer.save_pretrained(folder)


def model_card(manifest: Manifest) -> str:
    """The README.md of an aligner's folder."""
    proposal = (manifest.proposal or {}).get("id")
    weight = parse_rule(manifest.rule).default_weights(1)[0] if manifest.weight is None else manifest.weight
    base = f"base_model: {proposal}\nbase_model_relation: adapter\n" if proposal and not _is_local(proposal) else ""
    return f"""---
library_name: trimtab
tags: [trimtab, residual-alignment-model, alignment]
{base}---

# A Trimtab aligner

This small language model steers a frozen one at decoding time: it is an aligner Q in P ∝ P_M·Q
([arXiv 2505.19700](https://arxiv.org/abs/2505.19700)), not a model to be used alone.

| | |
|---|---|
| proposal it was trained against | {proposal or "not recorded"} |
| objective | {manifest.objective or "not recorded"} |
| rule, weight | `{manifest.rule}`, {weight} |
| proposal temperature, top-p | {manifest.proposal_temperature}, {manifest.proposal_top_p} |
| aligner temperature | {manifest.aligner_temperature} |

```python
from trimtab import AlignedModel, SamplingParams

model = AlignedModel.from_pretrained({proposal or "PROPOSAL"!r}, "THIS_FOLDER")
print(model.generate(["..."], SamplingParams(max_tokens=64, seed=0))[0].text)
```

{_FITS_ONE if manifest.head else _FITS_ANY}
{"" if manifest.parts is None else _BLEND + manifest.parts.table}
"""


_BLEND = """
It is a blend: its weights are θ_0 + Σ_d λ_d (θ_d − θ_0), of these parts.

"""
_FITS_ANY = "It works with any proposal of the same vocabulary."
_FITS_ONE = """It is a head: a LoRA adapter of the proposal's layers, or of the upper ones, which Trimtab decodes together with
the proposal. It fits this proposal only. PEFT loads it into the proposal as an ordinary adapter: that is the aligned model at
weight 1."""


def _is_local(model: str) -> bool:
    """Whether a model's name is a path, which means nothing to anybody else, and no hub id."""
    return Path(model).exists() or Path(model).is_absolute() or model.startswith((".", "~")) or model.count("/") != 1


def _fetch(path: str | Path, revision: str | None) -> Path:
    """The local folder of a path or hub id."""
    path = expand(path)
    folder = Path(path)
    with readable(path, "aligner"):
        if folder.is_dir():
            return folder
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=wanted))
