"""What stands in the bodies that clients send: JSON's types with our bounds, and the decoding knobs as fields of them."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from trimtab.core.rules.text import MAX_TEXT
from trimtab.knobs import KNOBS, MAX_FACTOR, Knob
from trimtab.names import NAME
from trimtab.options import Range

__all__ = [
    "MAX_ALIGNERS",
    "MAX_INT",
    "MAX_STOPS",
    "SAMPLING",
    "AlignerName",
    "Count",
    "Empty",
    "OnlyFalse",
    "OnlyOne",
    "OnlyZero",
    "Shares",
    "Strict",
    "Text",
    "TokenIds",
    "Whole",
    "conflict",
]

MAX_N = 128
MAX_STOPS = 16
MAX_ALIGNERS = 8
MAX_BIASES = 4096
MAX_INT = 2**31 - 1
"""The largest count or token id: they end up in tensors, where a JSON integer of any size would not fit."""


def conflict(field: str, message: str) -> PydanticCustomError:
    """What two fields say that cannot both be."""
    return PydanticCustomError("conflict", message, {"field": field})


class Strict(BaseModel):
    """A body: fields that it does not have are refused, and values of other types than JSON says."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, regex_engine="rust-regex")


def _only_false(value: bool) -> bool:
    if value:
        raise PydanticCustomError("only_false", "only false or null is supported here")
    return value


def _whole(value: Any) -> Any:
    """To JSON, 5.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = BeforeValidator(_whole)
# Not `Literal[False]`, which takes 0 for false.
OnlyFalse = Annotated[bool, AfterValidator(_only_false), Field(json_schema_extra={"const": False})]
OnlyOne = Annotated[int, Field(ge=1, le=1), Whole]
OnlyZero = Annotated[float, Field(ge=0, le=0)]
Count = Annotated[int, Field(ge=1, le=MAX_INT), Whole]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT), Whole]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Factor = Annotated[float, Field(ge=-MAX_FACTOR, le=MAX_FACTOR)]
Biases = Annotated[dict[TokenKey, Factor], Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False})]
Text = Annotated[str, Field(min_length=1)]
Empty = Annotated[list[Any], Field(max_length=0)]
Shares = Annotated[dict[Text, Factor], Field(min_length=1, max_length=MAX_ALIGNERS)]
AlignerName = Annotated[str, Field(pattern=f"^{NAME.pattern}$")]

_SHAPES: dict[str, Any] = {
    "stop": Text | Annotated[list[Text], Field(max_length=MAX_STOPS, fail_fast=True)],
    "stop_token_ids": Annotated[list[TokenId], Field(fail_fast=True)],
    "logit_bias": Biases,
    "rule": Annotated[str, Field(max_length=MAX_TEXT)],
    "handover": Annotated[str, Field(max_length=MAX_TEXT)],
    "blend": Literal["logits", "weights"],
    "weight": Factor | Annotated[list[Factor], Field(min_length=1, max_length=MAX_ALIGNERS, fail_fast=True)],
}
"""Knobs whose values are neither numbers nor truth values: what they are in JSON."""
_MOST = {"n": MAX_N}
"""Ends of ranges that are the server's own."""


def _type_of(knob: Knob) -> Any:
    """What a knob's value is in JSON: within the bounds that `SamplingParams` has, and where it has none, 32 bits, or 64."""
    if knob.kind is None:
        return _SHAPES[knob.name]
    if knob.kind is bool:
        return bool
    low, above, high, below = knob.range
    ends: dict[str, Any] = {"ge": low, "gt": above, "le": high, "lt": below}
    if knob.kind is float:
        return Annotated[float, Field(**ends)]
    if knob.range == Range():
        return Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole]
    return Annotated[int, Field(**ends | {"le": min(high or MAX_INT, _MOST.get(knob.name, MAX_INT))}), Whole]


def _field(knob: Knob) -> tuple[Any, Any]:
    """A knob's type, null too; its default, null for an empty collection; and as description its flag's help as a sentence."""
    text = knob.said["help"].partition(" [default")[0]
    default = None if knob.kind is None else knob.default
    return _type_of(knob) | None, Field(default, description=f"{text[0].upper()}{text[1:]}.")


SAMPLING = {name: _field(knob) for name, knob in KNOBS.items() if knob.said.get("http", True)}
"""The knobs that bodies have under their own names, as pydantic takes fields."""
