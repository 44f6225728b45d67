"""A blend of aligners as a folder: read and check the parts, settle how the blend is decoded with, write it."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.blend.lora import Adapters
from trimtab.blend.options import BlendOptions
from trimtab.blend.whole import Wholes
from trimtab.core.rules import parse_rule
from trimtab.errors import InvalidOption
from trimtab.files import atomic_folder, check_writable, expand_home, write_json
from trimtab.models.adapter_folder import Base
from trimtab.models.aligner import MANIFEST_NAME, SUPERSEDED, TOKENIZER_FILES, Description, Manifest, describe, model_card
from trimtab.models.digests import Seen, digest_file
from trimtab.models.parts import Part, Parts
from trimtab.models.vocabulary import check_same_vocabulary, fingerprint_vocabulary
from trimtab.models.weight_files import commit_of, weight_files

__all__ = ["run"]


class _Named(NamedTuple):
    """A part that was found."""

    name: str
    source: str
    found: Description


def run(options: BlendOptions) -> dict[str, Any]:
    """Write the blend that the options describe; what `trimtab.blend.call.blend` says of it holds."""
    vectors = options.vectors
    check_writable(options.out, folder=True)
    _refuse_replacing(options.out, [source for source in (options.base, *(one.source for one in vectors)) if source])
    base = None if options.base is None else _Named("base", options.base, describe(options.base))
    parts = [_Named(one.name, one.source, describe(one.source)) for one in vectors]
    everyone = [*([base] if base else []), *parts]
    for one in everyone[1:]:
        check_same_vocabulary(everyone[0].found.tokenizer, one.found.tokenizer, one.source)
    kinds = {one.found.is_adapter for one in parts}
    if len(kinds) > 1:
        odd = next(one for one in parts if one.found.is_adapter)
        raise InvalidOption(f"--vector {odd.name} is an adapter, and others are models: merge it into its base first")
    weights = [one.weight for one in vectors]
    folders = [(one.name, one.found.folder) for one in parts]
    blend: Adapters | Wholes
    if kinds == {True}:
        blend = Adapters(None if base is None else base.found.folder, options.base, folders, weights)
        under = blend.base
    elif base is None:
        raise InvalidOption("--base is required: the model that all of these began as, whose weights are θ_0")
    else:
        blend, under = Wholes(base.found.folder, folders, weights), None
    manifest = _manifest(options, everyone, parts, Parts(_part(base, under), _vectors(parts, weights)))
    with atomic_folder(options.out, superseded=SUPERSEDED) as folder:
        blend.write(folder)
        _write_tokenizer(everyone, folder)
        (folder / "README.md").write_text(model_card(manifest), encoding="utf-8")
        write_json(folder / MANIFEST_NAME, manifest.to_dict())
    told = ("rule", "weight", "proposal_temperature", "proposal_top_p", "aligner_temperature")
    return {
        "out": options.out,
        **blend.report,
        "parts": manifest.blended,
        **{name: getattr(manifest, name) for name in told},
    }


def _refuse_replacing(out: str, sources: Sequence[str]) -> None:
    """Refuse to write where a part is."""
    for source in sources:
        folder = expand_home(source)
        if folder.is_dir() and folder.resolve() in (Path(out).resolve(), *Path(out).resolve().parents):
            raise InvalidOption(f"--out {out} is, or is in, a part of the blend, '{source}': name another folder")


def _part(base: _Named | None, under: Base | None) -> Part:
    """θ_0: what was named, or the base of adapters."""
    if base is None or (under is not None and not base.found.is_adapter):
        assert under is not None
        return Part(under.source, under.revision, None)
    return Part(base.source, commit_of(base.found.folder), _digest(base.found.folder))


def _vectors(parts: Sequence[_Named], weights: Sequence[float]) -> dict[str, tuple[Part, float]]:
    found = {one.name: Part(one.source, commit_of(one.found.folder), _digest(one.found.folder)) for one in parts}
    return {name: (part, weight) for (name, part), weight in zip(found.items(), weights, strict=True)}


def _digest(folder: Path) -> str:
    """`sha256:…` of a folder's files of weights."""
    files = {name: digest_file(Seen.at(folder / name)) for name in weight_files(folder)}
    return f"sha256:{hashlib.sha256(json.dumps(files).encode()).hexdigest()}"


def _manifest(options: BlendOptions, everyone: Sequence[_Named], vectors: Sequence[_Named], parts: Parts) -> Manifest:
    """The blend's: what flags say, or else the parts' manifests together.

    Raises:
        InvalidOption: those disagree on something that no flag says.
        ModelError: they are heads of different proposals or taps, or some are heads and others are none.
    """
    told = {one.name: one.found.manifest for one in everyone if one.found.manifest is not None}
    heads = {one.name: one.found.manifest.head if one.found.manifest else None for one in everyone if one.found.is_adapter}
    head = _agreed("head", heads, "a head and what is none, or heads of two taps or proposals, are no parts of one blend")
    manifest = Manifest(fingerprint_vocabulary(everyone[0].found.tokenizer), head=head, blended=parts.to_dict())
    settled: dict[str, Any] = {}
    for name in ("rule", "proposal_temperature", "proposal_top_p", "aligner_temperature"):
        said = getattr(options, name)
        values = {part: getattr(one, name) for part, one in told.items()}
        settled[name] = said if said is not None else _agreed(name, values, f"say which with --{name}", getattr(manifest, name))
    rule = parse_rule(settled["rule"])
    of_rule = {part: one.weight for part, one in told.items() if parse_rule(one.rule) == rule}
    (own,) = rule.default_weights(1)
    weights = {part: own if weight is None else weight for part, weight in of_rule.items()}
    said = options.weight
    settled["weight"] = said if said is not None else _agreed("weight", weights, "say which with --weight")
    for name in ("objective", "proposal"):  # what nothing depends on but words, and who drafts
        trained = [getattr(one.found.manifest, name, None) for one in vectors]
        settled[name] = trained[0] if all(value == trained[0] for value in trained) else None
    return dataclasses.replace(manifest, **settled)


def _agreed(name: str, values: Mapping[str, Any], cure: str, unsaid: Any = None) -> Any:
    """What all parts say, or the value of a setting of which none says anything."""
    first = next(iter(values.values()), unsaid)
    for part, value in values.items():
        if value != first:
            other = next(iter(values))
            raise InvalidOption(f"{name}: the parts disagree: {first!r} in {other}, {value!r} in {part}; {cure}")
    return first


def _write_tokenizer(everyone: Sequence[_Named], folder: Path) -> None:
    """The base's files as they are, or the first part's; of a part without any, what its base's tokenizer writes."""
    for one in everyone:
        if (one.found.folder / "tokenizer_config.json").is_file():
            for pattern in TOKENIZER_FILES:
                for file in one.found.folder.glob(pattern):
                    shutil.copyfile(file, folder / file.name)
            return
    everyone[0].found.tokenizer.save_pretrained(folder)
