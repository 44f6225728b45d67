"""What `trimtab blend` and `trimtab.blend` can be told."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import MAX_FACTOR, ShapingKnobs, check_number
from trimtab.names import NAME
from trimtab.options import check_ranges, option, same

__all__ = ["BlendOptions", "Vector", "parse_vector"]


class Vector(NamedTuple):
    """A part of a blend, θ_d, and its weight."""

    name: str
    source: str
    """A folder or a hub id."""
    weight: float


def parse_vector(text: str) -> Vector:
    """Read `NAME=FOLDER:WEIGHT`.

    Raises:
        InvalidOption: it is not of that form.
    """
    name, _, rest = text.partition("=")
    source, _, number = rest.rpartition(":")
    try:
        weight = float(number)
        check_number("the weight", weight, low=-MAX_FACTOR, high=MAX_FACTOR)
    except (ValueError, InvalidRequest):
        weight = math.nan
    if not NAME.fullmatch(name) or not source or math.isnan(weight):
        raise InvalidOption(
            f"--vector must be NAME=FOLDER:WEIGHT, such as med=med_aligner:0.7, with a name of letters, digits, '.', '_' and"
            f" '-' and a weight from -{MAX_FACTOR:g} to {MAX_FACTOR:g}, not '{text}'"
        )
    return Vector(name, source, weight)


def _manifests(name: str) -> object:
    """A setting of the blend's manifest: the knob of that name."""
    (knob,) = (field for field in ShapingKnobs.__dataclass_fields__.values() if field.name == name)
    text = str(knob.metadata["help"]).partition(" [default")[0]
    return same(ShapingKnobs, name, help=f"{text}, in the blend's manifest [default: that of the parts, if they agree]")


@dataclass(frozen=True)
class BlendOptions:
    """Options of `trimtab blend` and `trimtab.blend`."""

    vector: tuple[str, ...] = option(
        (),
        "an aligner and its weight, as NAME=FOLDER:WEIGHT, where FOLDER may be a hub id; repeat the flag for several",
        required=True,
        metavar="V",
    )
    base: str | None = option(
        None,
        "what all of them began as: a folder or a hub id [default: for LoRA adapters their base; others need it]",
        metavar="A0",
    )
    out: str = option("", "the folder of the blend", required=True, metavar="A")
    rule: str | None = _manifests("rule")  # type: ignore[assignment]
    weight: float | None = option(
        None,
        "the aligner's strength under the rule, in the blend's manifest [default: that of the parts, if they agree]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    proposal_temperature: float | None = _manifests("proposal_temperature")  # type: ignore[assignment]
    proposal_top_p: float | None = _manifests("proposal_top_p")  # type: ignore[assignment]
    aligner_temperature: float | None = _manifests("aligner_temperature")  # type: ignore[assignment]

    def __post_init__(self) -> None:
        """Refuse what cannot be before anything is read."""
        from trimtab.core.rules import parse_rule

        check_ranges(self)
        if self.rule is not None:
            parse_rule(self.rule)
        names = [one.name for one in self.vectors]
        if again := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise InvalidOption(f"--vector: two are called '{again}': give each its own name")

    @property
    def vectors(self) -> list[Vector]:
        """The parts, by their names: whatever order they come in, the blend is the same."""
        return sorted(parse_vector(text) for text in self.vector)
