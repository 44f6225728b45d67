"""What clients send that is no request to generate: of aligners, of users, and of answers."""

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from trimtab.serve.schema import ChatMessage
from trimtab.serve.values import AlignerName, Strict, Text, conflict

__all__ = ["Feedback", "LoadAligner", "Preference", "UnloadAligner"]


_ONE_PROMPT: dict[str, Any] = {
    "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
    ]
}
"""JSON schema of a prompt that is either a text or a chat."""

Unfinished = Annotated[list[Literal["chosen", "rejected"]], Field(max_length=2, fail_fast=True)]


class _Answered(Strict):
    """Something that was asked, whatever was answered."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt, a text, or messages, a chat")
        return self

    @property
    def asked(self) -> Any:
        """The prompt that was answered."""
        return self.prompt if self.messages is None else [message.for_template for message in self.messages]


class Preference(_Answered):
    """`POST /v1/users/NAME/preferences`."""

    model_config = ConfigDict(json_schema_extra=_ONE_PROMPT)

    chosen: str = Field(description="The answer that the user prefers.")
    rejected: str = Field(description="The other one.")
    unfinished: Unfinished | None = Field(None, description="Which of them were cut, and so do not end.")


_KINDS = ({"chosen", "rejected"}, {"completion", "correction"}, {"completion", "rating"})
"""The fields of each kind of feedback."""


def _kind(fields: set[str]) -> dict[str, Any]:
    """JSON schema of one kind: its fields, and none of the others'."""
    kinds = {name: {"type": "string" if name in fields else "null"} for name in sorted(set.union(*_KINDS))}
    return {"required": sorted(fields), "properties": kinds}


class Feedback(_Answered):
    """`POST /v1/feedback`: a vote between two answers, a correction of one, or a thumb."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_ONE_PROMPT, {"oneOf": [_kind(fields) for fields in _KINDS]}]})

    chosen: str | None = Field(None, description="Of a vote: the better answer.")
    rejected: str | None = Field(None, description="Of a vote: the other one.")
    completion: str | None = Field(None, description="Of a correction or a thumb: the answer that was given.")
    correction: str | None = Field(None, description="What it should have been.")
    rating: Literal["up", "down"] | None = Field(None, description="A thumb.")
    model: Text | None = Field(None, description="Who answered, as the answer's `model` says; it is kept.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        told = {name for name in set.union(*_KINDS) if getattr(self, name) is not None}
        if told not in _KINDS:
            raise conflict("chosen", "give chosen and rejected, or completion and correction, or completion and rating")
        return self


class LoadAligner(Strict):
    """`POST /v1/load_aligner`."""

    name: AlignerName = Field(validation_alias=AliasChoices("name", "aligner_name"))
    path: Text = Field(validation_alias=AliasChoices("path", "aligner_path"), description="Relative to the server's root.")
    pin: bool | None = Field(False, description="Never evict it.")


class UnloadAligner(Strict):
    """`POST /v1/unload_aligner`."""

    name: AlignerName = Field(validation_alias=AliasChoices("name", "aligner_name"))
