"""What an aligner was blended of, as its manifest and its card say it: θ = θ_0 + Σ_d λ_d (θ_d − θ_0)."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from trimtab.errors import ManifestError

__all__ = ["Part", "Parts"]


class Part(NamedTuple):
    """One of the folders that a blend was made of."""

    id: str
    """As it was named: a folder or a hub id."""
    revision: str | None
    """The hub's commit, or None."""
    digest: str | None
    """`sha256:…` of its files of weights; None for the base of adapters, which is not read."""


class Parts(NamedTuple):
    """θ_0, and each θ_d by its name with its λ_d."""

    base: Part
    vectors: Mapping[str, tuple[Part, float]]

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read the `blended` of a manifest.

        Raises:
            ManifestError: it is not whole, or cannot be.
        """
        if not isinstance(values, Mapping) or set(values) != {"base", "vectors"} or not isinstance(values["vectors"], Mapping):
            raise ManifestError(f"blended must be {{'base': …, 'vectors': {{NAME: …}}}}, not {values!r}")
        return cls(
            _part(values["base"], "base"),
            {name: (_part(one, name, ("weight",)), _weight(one, name)) for name, one in values["vectors"].items()},
        )

    def to_dict(self) -> dict[str, Any]:
        """What the manifest holds."""
        vectors = {name: {**part._asdict(), "weight": weight} for name, (part, weight) in sorted(self.vectors.items())}
        return {"base": self.base._asdict(), "vectors": vectors}

    @property
    def table(self) -> str:
        """The card's: a line for each part."""
        rows = [("base", self.base, "1 − the others"), *((name, *one) for name, one in sorted(self.vectors.items()))]
        lines = [f"| {name} | {part.id}{_at(part)} | {weight} |" for name, part, weight in rows]
        return "\n".join(["| part | of | weight |", "|---|---|---|", *lines])


def _at(part: Part) -> str:
    return f" at {part.revision}" if part.revision else ""


def _part(values: Any, name: str, more: tuple[str, ...] = ()) -> Part:
    if not isinstance(values, Mapping) or set(values) != {*Part._fields, *more}:
        raise ManifestError(f"blended: {name} must have {', '.join((*Part._fields, *more))}, not {values!r}")
    part = Part(*(values[field] for field in Part._fields))
    if not isinstance(part.id, str) or not all(isinstance(value, str | None) for value in part):
        raise ManifestError(f"blended: {name} must have texts as its id, revision and digest, not {values!r}")
    return part


def _weight(values: Any, name: str) -> float:
    weight = values["weight"]
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise ManifestError(f"blended: the weight of {name} must be a finite number, not {weight!r}")
    return float(weight)
