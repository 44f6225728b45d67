"""What the operator configures and what a request may ask for, read and checked without loading a model.

The operator says, under the key `trimtab` of vLLM's `additional_config`:

    {"aligners": {"docs": "path/or/hub-id", "terse": {"path": "…", "weight": 0.5}}, "rule": "product", …}

A request says, in `SamplingParams.extra_args` or over HTTP in `vllm_xargs`:

    {"aligner": "docs", "weight": 0.5, "rule": "geometric", …}
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.decode.request import SamplingParams
from trimtab.decode.settings import settle, with_weight
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import KNOBS, SHAPING, check_number
from trimtab.models.adapter_folder import Base, is_adapter
from trimtab.models.adapter_mixing import FEW
from trimtab.models.aligner import Manifest, describe
from trimtab.models.blocks import LEAN
from trimtab.models.loading import load_configs
from trimtab.models.lora_folder import poolable
from trimtab.models.vocabulary import check_same_vocabulary, fingerprint_vocabulary

__all__ = ["FIELDS", "KEY", "Arguments", "Catalog", "Settings", "as_lists", "field_of", "read_settings"]

KEY = "trimtab"
"""Where `additional_config` holds our settings."""

FIELDS = ("aligner", *SHAPING)
"""What a request may say."""

VLLM_FIELDS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id")
"""What vLLM itself looks for among `extra_args`."""


@dataclass(frozen=True)
class Settings:
    """The operator's.

    Attributes:
        aligners: path or hub id of each aligner, by the name that requests use.
        weights: default weights of some of them.
        aligner: what requests get that name none; nothing unless the operator says so.
        defaults: of requests' other fields.
        dtype: of the aligners' weights, `"auto"` for each checkpoint's own.
        max_aligners: the most that one request may combine.
        memory: bytes that aligners and their caches may take on each rank, or None for what is free.
        ignore: further names in `extra_args`, which other plugins look for.
    """

    aligners: Mapping[str, str]
    weights: Mapping[str, float] = field(default_factory=dict)
    aligner: tuple[str, ...] = ()
    defaults: SamplingParams = field(default_factory=SamplingParams)
    dtype: str = "auto"
    max_aligners: int = 2
    memory: int | None = None
    ignore: tuple[str, ...] = ()


def field_of(error: Exception) -> str | None:
    """The field that an error about a request begins with."""
    first = re.match(r"\w*", str(error))
    return first[0] if first and first[0] in FIELDS else None


class Arguments(NamedTuple):
    """A request's, settled."""

    names: tuple[str, ...]
    """Of its aligners, at least one."""
    shaping: Shaping


def read_settings(additional_config: Any) -> Settings | None:
    """The operator's settings, or None if there are none.

    Raises:
        InvalidOption: names the key that is unknown or wrong.
    """
    if not isinstance(additional_config, Mapping) or KEY not in additional_config:
        return None
    given = additional_config[KEY]
    if not isinstance(given, Mapping):
        raise InvalidOption(f"additional_config: '{KEY}' must hold an object, not {given!r}")
    known = ("aligners", *FIELDS, "dtype", "max_aligners", "memory_gib", "ignore")
    if unknown := sorted(set(given) - set(known)):
        raise InvalidOption(f"additional_config: '{KEY}' has no key '{unknown[0]}'; it has {', '.join(known)}")
    settings = Settings(**_aligners(given.get("aligners")), **_options(given))
    try:
        shaping: dict[str, Any] = {name: given.get(name) for name in SHAPING}
        defaults = SamplingParams(**shaping)
        default_aligners = _names(given.get("aligner"), settings)
    except InvalidRequest as error:
        raise InvalidOption(f"{KEY}.{error}") from None
    return dataclasses.replace(settings, defaults=defaults, aligner=default_aligners)


class Catalog:
    """The configured aligners: their manifests, and what a request makes of them.

    Args:
        settings: the operator's.
        tokenizer: the proposal's, which each aligner's must equal.
        eos_token_ids: ids that end a completion.

    Raises:
        ModelError: an aligner's folder cannot be read, or has another vocabulary.
        InvalidOption: the defaults contradict an aligner.
    """

    def __init__(self, settings: Settings, tokenizer: Any, eos_token_ids: Sequence[int]) -> None:
        self.settings, self._eos = settings, tuple(eos_token_ids)
        self._manifests: dict[str, Manifest | None] = {}
        self._bases: dict[str, Base | None] = {}
        """Of aligners that can be blended, what they adapt."""
        for name, path in settings.aligners.items():
            found = describe(path)
            check_same_vocabulary(tokenizer, found.tokenizer, name)
            vocabulary = fingerprint_vocabulary(found.tokenizer)
            rule = settings.defaults.asked_rule
            self._bases[name] = _blendable(found.folder)
            try:
                self._manifests[name] = with_weight(found.manifest, settings.weights.get(name), rule, vocabulary)
            except InvalidOption as error:
                raise InvalidOption(f"{KEY}.aligners.{name}: {error}") from None
            several = isinstance(settings.defaults.weight, Sequence) and settings.aligner
            try:
                self.read({"aligner": list(settings.aligner) if several else name})
            except InvalidRequest as error:
                raise InvalidOption(f"{KEY}: aligner '{name}': {error}") from None
        try:
            self.read(None)
        except InvalidRequest as error:
            raise InvalidOption(f"{KEY}.aligner: {error}") from None

    def _check_blend(self, names: Sequence[str]) -> None:
        """Refuse to blend what is no adapter of one base, or one of too many."""
        base = self._bases[names[0]]
        for name in names:
            if self._bases[name] is None:
                raise InvalidRequest(
                    f"blend: aligner '{name}' is no LoRA adapter on a base that adapters share: leave blend out"
                )
            if self._bases[name] != base:
                raise InvalidRequest(
                    f"blend: aligners '{names[0]}' and '{name}' are adapters of different bases: leave blend out"
                )
        if list(self._bases.values()).count(base) > FEW:
            raise InvalidRequest(
                f"blend: more than {FEW} aligners adapt '{base}', which is the most for blends: leave blend out"
            )

    def read(self, extra_args: Mapping[str, Any] | None) -> Arguments | None:
        """What a request asks for; None if it wants no aligner.

        Raises:
            InvalidRequest: names the field that is wrong.
        """
        given = as_lists({name: value for name, value in (extra_args or {}).items() if name not in self.settings.ignore})
        names = _names(given["aligner"], self.settings) if "aligner" in given else self.settings.aligner
        asked = {name: value for name, value in given.items() if name in SHAPING and value is not None}
        if not names:
            if asked:
                raise InvalidRequest(f"{min(asked)} needs an aligner: name one of {', '.join(self.settings.aligners)}")
            return None
        if unknown := sorted(set(given) - {*FIELDS, *VLLM_FIELDS}):
            raise InvalidRequest(
                f"{unknown[0]}: an aligned request has no such field; it may have {', '.join(FIELDS)} "
                f"(fields of other plugins belong into {KEY}.ignore)"
            )
        params = SamplingParams(**asked)
        try:
            shaping = settle(params, self.settings.defaults, [self._manifests[name] for name in names], self._eos)
        except InvalidOption as error:
            raise InvalidRequest(str(error)) from None
        if shaping.blend is not None:
            self._check_blend(names)
        if not shaping.rule.has_row:
            raise InvalidRequest(f"rule: '{shaping.rule}' has no row in closed form, and vLLM samples from rows: use product")
        return Arguments(names, shaping)


def as_lists(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """A request's fields, an `aligner` that maps names to weights as a list of names and one of weights.

    Raises:
        InvalidRequest: the weights are said twice.
    """
    aligner = given.get("aligner")
    if not isinstance(aligner, Mapping):
        return given
    if given.get("weight") is not None:
        raise InvalidRequest("weight: aligner says the weights already; give them in one of the two")
    return {**given, "aligner": list(aligner), "weight": list(aligner.values())}


def _blendable(folder: Path) -> Base | None:
    """What an adapter adapts that shares its base with others; None for other aligners."""
    base = poolable(folder) if is_adapter(folder) else None
    if base is None:
        return None
    config, _ = load_configs(base.source, revision=base.revision)
    return base if config.model_type in LEAN and not getattr(config, "quantization_config", None) else None


def _aligners(given: Any) -> dict[str, Any]:
    """Paths and weights of the aligners."""
    shape = f"{KEY}.aligners must map names to folders or hub ids, like {{'docs': 'path'}}"
    if not isinstance(given, Mapping) or not given:
        raise InvalidOption(f"{shape}, not {given!r}")
    aligners: dict[str, str] = {}
    weights: dict[str, float] = {}
    for name, value in given.items():
        described = value if isinstance(value, Mapping) else {"path": value}
        path, weight = described.get("path"), described.get("weight")
        if (
            not isinstance(name, str)
            or not name
            or not isinstance(path, str)
            or not path
            or set(described) - {"path", "weight"}
        ):
            raise InvalidOption(f"{shape} or to {{'path': …, 'weight': …}}, not {name!r} to {value!r}")
        aligners[name] = path
        if weight is not None:
            try:
                KNOBS["weight"].check(weight)
            except InvalidRequest as error:
                raise InvalidOption(f"{KEY}.aligners.{name}: {error}") from None
            weights[name] = weight
    return {"aligners": aligners, "weights": weights}


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those keys that are not a request's fields."""
    options: dict[str, Any] = {}
    if "dtype" in given:
        if given["dtype"] not in ("auto", "float32", "bfloat16", "float16"):
            raise InvalidOption(f"{KEY}.dtype must be auto, float32, bfloat16 or float16, not {given['dtype']!r}")
        options["dtype"] = given["dtype"]
    if "max_aligners" in given:
        if type(given["max_aligners"]) is not int or given["max_aligners"] < 1:
            raise InvalidOption(f"{KEY}.max_aligners must be an integer of at least 1, not {given['max_aligners']!r}")
        options["max_aligners"] = given["max_aligners"]
    if given.get("memory_gib") is not None:
        try:
            check_number("memory_gib", given["memory_gib"], above=0)
        except InvalidRequest as error:
            raise InvalidOption(f"{KEY}.{error}") from None
        options["memory"] = int(given["memory_gib"] * 2**30)
    ignore = given.get("ignore", ())
    if not isinstance(ignore, (list, tuple)) or not all(isinstance(name, str) for name in ignore):
        raise InvalidOption(f"{KEY}.ignore must be a list of names, not {ignore!r}")
    return options | {"ignore": tuple(ignore)}


def _names(value: Any, settings: Settings) -> tuple[str, ...]:
    """The aligners that a field `aligner` names."""
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InvalidRequest(f"aligner must be a name or a list of names, not {value!r}")
    for i, name in enumerate(names):
        if name not in settings.aligners:
            raise InvalidRequest(f"aligner: there is no aligner '{name}'; there are {', '.join(settings.aligners)}")
        if name in names[:i]:
            raise InvalidRequest(f"aligner: '{name}' is named twice; give it twice the weight instead")
    if len(names) > settings.max_aligners:
        raise InvalidRequest(f"aligner: {len(names)} aligners, but at most {settings.max_aligners} are allowed")
    return tuple(names)
