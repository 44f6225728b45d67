"""Where every figure of an evaluation comes from."""

import dataclasses
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.settings import without_password
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.run import NULL_SEED
from trimtab.evaluate.systems import Prompts, System
from trimtab.files import expand_home, json_digest
from trimtab.judges.base import Judge
from trimtab.judges.kinds import options_read
from trimtab.models.environment import describe_environment
from trimtab.models.fingerprint import fingerprint_of
from trimtab.models.huggingface import describe_kernels

__all__ = ["make_record"]


def make_record(
    options: EvalOptions, systems: Sequence[System], prompts: Prompts, model: AlignedModel | None, params: SamplingParams
) -> dict[str, Any]:
    """Where every figure comes from.

    Args:
        options: what was asked for.
        systems: baseline and system.
        prompts: what they were asked.
        model: the models in this process, if there are any.
        params: how they sample.
    """
    asked = {
        field.name: _to_record(getattr(options, field.name))
        for field in dataclasses.fields(options)
        if getattr(options, field.name) != field.default
    }
    path = options.dataset or options.baseline
    shown = zip(prompts.prompts, prompts.references, strict=True)
    data: dict[str, Any] = {"path": path, "sha256": _sha256(path) or json_digest(shown)}
    if any("criterion" in options_read(judge) for judge in options.judge):
        data["criterion"] = options.criterion
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "options": asked,
        "dataset": data,
        "systems": {
            name: {key: _to_record(value) for key, value in dataclasses.asdict(one).items() if value} | _file_hash(one)
            for name, one in zip(("baseline", "system"), systems, strict=True)
        },
        "sampling": {"seed": params.seed, "seed_of_null": (params.seed or 0) + NULL_SEED, "params": repr(params)},
        "environment": describe_environment(),
    }
    if model is not None:
        shaping = model.shaping(params)
        names = options.aligner or [str(i) for i in range(1, len(model.aligners) + 1)]  # they came loaded
        sources = {"proposal": (options.proposal or None, model.proposal)}
        sources |= {
            f"aligner {name}": (name if options.aligner else None, part)
            for name, part in zip(names, model.aligners, strict=True)
        }
        record["models"] = {
            name: {
                "source": source,
                "weights": fingerprint_of(part),
                "revision": _revision(part),
                "kernels": describe_kernels(part),
            }
            for name, (source, part) in sources.items()
        }
        record["decoding"] = {"rule": str(shaping.rule), "weight": list(shaping.weights)}
        record["decoding"] |= {} if shaping.blend is None else {"blend": list(shaping.blend)}
    return record


def _to_record(value: Any) -> Any:
    """An option's value as JSON that anybody may read."""
    if isinstance(value, tuple):
        return list(map(_to_record, value))
    value = value.name if isinstance(value, Judge) else value
    return without_password(value) if isinstance(value, str) else value


def _sha256(path: str) -> str | None:
    """Of a file; None if it is none, but a data set of the hub."""
    file = expand_home(path)
    if not file.is_file():
        return None
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _file_hash(system: System) -> dict[str, Any]:
    return {"sha256": _sha256(system.where)} if system.kind == "file" else {}


def _revision(model: Any) -> str | None:
    """The hub's commit that the weights were loaded from; of an adapter in a pool, its base's."""
    files = getattr(getattr(model, "pool", model), "files", None)
    return None if files is None else files.commit
