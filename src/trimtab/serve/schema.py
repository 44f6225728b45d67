"""What clients send: OpenAI's fields, some of vLLM's, and Trimtab's own; what we do not know is refused by its name.

Bodies are parsed with `Model.model_validate_json(body)`, by JSON's own types: `"1"` is no number and `true` no integer. The
bounds in the schema are those of `SamplingParams`, so that the OpenAPI document tells the truth. `null` means the default.
Clients send much unasked: what names the user or asks for nothing (`tools: []`, `service_tier: "auto"`) is accepted and
ignored; nothing else is.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, create_model, model_validator

from trimtab.data.prompts import join_chat
from trimtab.serve.values import (
    MAX_ALIGNERS,
    MAX_INT,
    SAMPLING,
    Count,
    Empty,
    OnlyFalse,
    OnlyOne,
    OnlyZero,
    Shares,
    Strict,
    Text,
    TokenIds,
    Whole,
    conflict,
)

__all__ = [
    "Call",
    "ChatMessage",
    "ChatRequest",
    "CompletionRequest",
    "Function",
    "ResponseFormat",
    "StreamOptions",
    "TextPart",
    "Tool",
    "ToolCall",
]


MAX_TOP_LOGPROBS = 20
MAX_TOOLS = 128


class StreamOptions(Strict):
    """`stream_options`: whether a last chunk with the usage is sent. Chunks are never padded."""

    include_usage: bool | None = False
    include_obfuscation: OnlyFalse | None = False


def _needs(field: str, given: Mapping[str, Any], other: str, value: Any) -> dict[str, Any]:
    """JSON schema of a bond between fields: where `field` is like `given`, `other` must be `value`."""
    condition = {"required": [field], "properties": {field: given}}
    return {"if": condition, "then": {"required": [other], "properties": {other: {"const": value}}}}


_STREAM_OPTIONS = _needs("stream_options", {"type": "object"}, "stream", True)
_TEXTS_ALONE: dict[str, Any] = {
    "if": {"required": ["rewrite"], "properties": {"rewrite": {"const": True}}},
    "then": {
        "properties": {
            **{name: {"enum": [False, None]} for name in ("stream", "return_token_ids", "echo")},
            "logprobs": {"enum": [False, None]},
        }
    },
}
"""JSON schema of another: what is rewritten are texts."""
_WEIGHED = {"aligner": {"type": "object"}, "weight": {"type": ["number", "array"]}}
_WEIGHTS_ONCE: dict[str, Any] = {"not": {"required": ["aligner", "weight"], "properties": _WEIGHED}}
"""JSON schema of another: an `aligner` that says the weights, and `weight`."""
_ALWAYS = (_STREAM_OPTIONS, _WEIGHTS_ONCE, _TEXTS_ALONE)


class _Asked(Strict):
    """Of whom, and how the answer comes."""

    model: str = Field(description="An aligner's name, BASE:ALIGNER, or the base, which is then unaligned.")
    stream: bool | None = False
    stream_options: StreamOptions | None = Field(None, description="Only with `stream`.")

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise conflict("stream_options", "stream_options is allowed only when stream is true")
        return self


if TYPE_CHECKING:

    class _Sampled(_Asked):
        n: int | None
        logit_bias: dict[str, float] | None
else:
    _Sampled = create_model("_Sampled", __base__=_Asked, __module__=__name__, **SAMPLING)


class _Request(_Sampled):
    """What both kinds of request have."""

    presence_penalty: OnlyZero | None = Field(None, description="Not supported; use `repetition_penalty`.")
    frequency_penalty: OnlyZero | None = Field(None, description="Not supported; use `repetition_penalty`.")
    user: str | None = Field(
        None,
        description="Where the server keeps users' preferences, and the request names no aligner, their weights decode it.",
    )
    store: OnlyFalse | None = Field(None, description="Ignored: nothing is stored.")
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(None, description="Ignored.")

    # OpenAI's fields for what there is not here, as far as they ask for nothing.
    functions: Empty | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    prompt_cache_retention: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    return_token_ids: bool | None = Field(False, description="Each choice also has `token_ids`; not with `stream`.")
    rewrite: bool | None = Field(
        False,
        description="The server's rewriter rewrites each choice; not with `stream`, nor with what is of its tokens.",
    )
    aligner: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_ALIGNERS, fail_fast=True)] | Shares | None = Field(
        None, description="One aligner or several, where `model` is the base; or an object from their names to their weights."
    )

    @model_validator(mode="after")
    def _weights_are_given_once(self) -> Self:
        if isinstance(self.aligner, dict) and getattr(self, "weight", None) is not None:
            raise conflict("weight", "weight: aligner says the weights already; give them in one of the two")
        return self

    @model_validator(mode="after")
    def _ids_are_of_whole_answers(self) -> Self:
        if self.return_token_ids and self.stream:
            raise conflict("return_token_ids", "return_token_ids is for whole answers: leave out stream")
        return self

    @model_validator(mode="after")
    def _rewritten_are_texts(self) -> Self:
        of_tokens = {name: bool(getattr(self, name, None)) for name in ("stream", "return_token_ids", "echo")}
        of_tokens["logprobs"] = getattr(self, "logprobs", None) not in (None, False)
        if self.rewrite and (name := next((name for name, asked in of_tokens.items() if asked), None)):
            raise conflict("rewrite", f"rewrite is of whole texts, and {name} is not: leave out one of the two")
        return self

    @property
    def aligners(self) -> str | list[str] | None:
        """Whom `aligner` names."""
        return list(self.aligner) if isinstance(self.aligner, dict) else self.aligner

    @property
    def completions(self) -> int:
        """How many completions of each prompt are asked for."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that has the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: bool, top_logprobs: int) -> dict[str, Any]:
        """Keyword arguments for `SamplingParams`; what is null is left out, and so has its default there."""
        given = {name: value for name in SAMPLING if (value := getattr(self, name)) is not None}
        if isinstance(self.aligner, dict):
            given["weight"] = list(self.aligner.values())
        if self.logit_bias:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return given | {"max_tokens": max_tokens, "logprobs": logprobs, "top_logprobs": top_logprobs}


class CompletionRequest(_Request):
    """`POST /v1/completions`."""

    model_config = ConfigDict(json_schema_extra={"allOf": [*_ALWAYS, _needs("max_tokens", {"const": 0}, "echo", True)]})

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_INT), Whole] | None = Field(
        None, description="16 unsaid; 0 only with `echo`."
    )
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Whole] | None = None
    echo: bool | None = False
    best_of: OnlyOne | None = Field(None, description="Not supported: 1 or null. Choosing among `n` is up to the client.")
    suffix: Annotated[str, Field(max_length=0)] | None = Field(None, description="Not supported: empty or null.")
    tools: Empty | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise conflict("max_tokens", "max_tokens may be 0 only with echo; otherwise it must be at least 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt."""
        prompt: Any = self.prompt
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if single else list(prompt)


CONTENT = 'a text or a list of parts {"type": "text", "text": …}'
"""What a message says."""


def _needs_content(schema: dict[str, Any]) -> None:
    """JSON schema of `ChatMessage`: whoever is no assistant says something, and calls nothing."""
    given = {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}, "tool_calls": {"maxItems": 0}}}
    schema["anyOf"] = [{"required": ["role"], "properties": {"role": {"const": "assistant"}}}, given]


class Function(Strict):
    """A function that the model may call: its name, and its parameters as a JSON schema."""

    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: OnlyFalse | None = Field(None, description="Not supported: nothing constrains what is written.")


class Tool(Strict):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class Call(Strict):
    """What a function was called with: `arguments` is JSON as a text."""

    name: Text
    arguments: str


class ToolCall(Strict):
    """One of the calls in an assistant's message."""

    id: str | None = None
    type: Literal["function"]
    function: Call
    index: None = None


class TextPart(Strict):
    """A part of a message's content; there are only texts."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One message. The null and empty fields are those that clients send back with an answer of ours."""

    model_config = ConfigDict(json_schema_extra=_needs_content)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description="Null for an assistant only."
    )
    name: str | None = None
    annotations: Empty | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = Field(None, description="An assistant's.")
    tool_call_id: str | None = Field(None, description="Which call a `tool` answers.")
    audio: None = None
    function_call: None = None
    reasoning: None = None
    reasoning_content: None = None
    refusal: None = None

    @model_validator(mode="after")
    def _only_an_assistant_says_nothing(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise conflict("messages", f"tool_calls are an assistant's, not a message's of role '{self.role}'")
        if self.content is None and self.role != "assistant":
            given = "content" in self.model_fields_set
            said = f"content must be {CONTENT}, not null" if given else f"content is missing: it must be {CONTENT}"
            raise conflict("messages", said)
        return self

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates want it."""
        calls = [call.model_dump(exclude_none=True) for call in self.tool_calls or []]
        fields = {
            "role": "system" if self.role == "developer" else self.role,
            "content": None if calls and self.content is None else self.text,
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls or None,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def text(self) -> str:
        """The content; parts are joined by newlines, as vLLM joins them."""
        content = self.content or ""
        return content if isinstance(content, str) else "\n".join(part.text for part in content)


_BOTH: dict[str, Any] = {name: {"type": "integer"} for name in ("max_tokens", "max_completion_tokens")}


class ResponseFormat(Strict):
    """`response_format`: plain text, which is what there is without it."""

    type: Literal["text"]


class ChatRequest(_Request):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                *_ALWAYS,
                _needs("top_logprobs", {"type": "integer", "minimum": 1}, "logprobs", True),
                {"not": {"required": ["max_tokens", "max_completion_tokens"], "properties": _BOTH}},
            ]
        }
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_tokens: Count | None = Field(None, description="The former name of `max_completion_tokens`.", deprecated=True)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), Whole] | None = Field(None, description="Needs `logprobs`.")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="The chat template writes them into the prompt. A call comes back as text."
    )
    tool_choice: Literal["none", "auto"] | None = Field(None, description="`none` leaves the tools out of the prompt.")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables for the chat template, as in vLLM.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise conflict("top_logprobs", "top_logprobs needs logprobs to be true")
        old, new = self.__dict__["max_tokens"], self.max_completion_tokens  # reading a deprecated attribute warns
        if None not in (old, new) and old != new:  # the schema is simpler, and does not allow both
            raise conflict("max_tokens", "max_tokens and max_completion_tokens differ: give only max_completion_tokens")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens to generate, or None for as many as fit."""
        old: int | None = self.__dict__["max_tokens"]
        return old if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def chat(self) -> Any:
        """The messages as chat templates want them, with the tools and variables that are given.

        A developer is OpenAI's newer word for the system, and most templates know only that one: many drop the messages of
        roles that they do not know.
        """
        tools = [] if self.tool_choice == "none" else self.tools or []
        given = {
            "tools": [tool.model_dump(exclude_none=True) for tool in tools],
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return join_chat([message.for_template for message in self.messages], given)
