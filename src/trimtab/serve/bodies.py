"""What clients send that is no request to generate: of aligners, and of users."""

from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, ConfigDict, Field, model_validator

from trimtab.serve.schema import ChatMessage
from trimtab.serve.values import AlignerName, Strict, Text, conflict

__all__ = ["LoadAligner", "Preference", "UnloadAligner"]


class Preference(Strict):
    """`POST /v1/users/NAME/preferences`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}},
                {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": {"type": "null"}}},
            ]
        }
    )

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)] | None = None
    chosen: str = Field(description="The answer that the user prefers.")
    rejected: str = Field(description="The other one.")
    unfinished: Annotated[list[Literal["chosen", "rejected"]], Field(max_length=2, fail_fast=True)] | None = Field(
        None, description="Which of them were cut, and so do not end."
    )

    @model_validator(mode="after")
    def _asks_once(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise conflict("prompt", "give either prompt, a text, or messages, a chat")
        return self

    @property
    def asked(self) -> Any:
        """The prompt that was answered."""
        return self.prompt if self.messages is None else [message.for_template for message in self.messages]


class LoadAligner(Strict):
    """`POST /v1/load_aligner`."""

    name: AlignerName = Field(validation_alias=AliasChoices("name", "aligner_name"))
    path: Text = Field(validation_alias=AliasChoices("path", "aligner_path"), description="Relative to the server's root.")
    pin: bool | None = Field(False, description="Never evict it.")


class UnloadAligner(Strict):
    """`POST /v1/unload_aligner`."""

    name: AlignerName = Field(validation_alias=AliasChoices("name", "aligner_name"))
