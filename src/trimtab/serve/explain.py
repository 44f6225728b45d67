"""Pydantic's errors about a request as one sentence that names the field and the fix."""

import difflib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trimtab.serve.bodies import Feedback, LoadAligner, Preference, UnloadAligner
from trimtab.serve.schema import (
    CONTENT,
    Call,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Function,
    ResponseFormat,
    StreamOptions,
    TextPart,
    Tool,
    ToolCall,
)
from trimtab.serve.values import MAX_STOPS

__all__ = ["explain"]

_ROUTES: dict[type[BaseModel], str] = {
    CompletionRequest: "/v1/completions",
    ChatRequest: "/v1/chat/completions",
    LoadAligner: "/v1/load_aligner",
    UnloadAligner: "/v1/unload_aligner",
    Preference: "/v1/users/NAME/preferences",
    Feedback: "/v1/feedback",
}
_INNER: dict[str, type[BaseModel]] = {
    "stream_options": StreamOptions,
    "response_format": ResponseFormat,
    "messages": ChatMessage,
    "messages.content": TextPart,
    "messages.tool_calls": ToolCall,
    "messages.tool_calls.function": Call,
    "tools": Tool,
    "tools.function": Function,
}
"""Where objects stand within a body."""


def _nulls(model: type[BaseModel]) -> list[str]:
    """Fields that may be null and nothing else: there is nothing here that they could ask for."""
    return [name for name, field in model.model_fields.items() if field.annotation is type(None)]


_SHOWN = 40
"""Characters of the user's own input that a message repeats."""
_NAME = "a name of at most 128 letters, digits, '.', '_' and '-', the first a letter or digit"
_WORDS = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of lists of token ids",
    "stop": f"a text or a list of at most {MAX_STOPS} texts, none of them empty",
    "logit_bias": "an object from token ids to numbers from -1e+06 to 1e+06",
    "metadata": "an object whose values are texts",
    "stop_token_ids": "a list of token ids",
    "aligner": "the name of an aligner, a list of names, or an object from names to numbers from -1e+06 to 1e+06",
    "blend": "'logits' or 'weights'",
    "weight": "a number from -1e+06 to 1e+06, or a list with one for each aligner",
    "presence_penalty": "0 or null: it is not supported, use repetition_penalty",
    "frequency_penalty": "0 or null: it is not supported, use repetition_penalty",
    "best_of": "1 or null: choosing among completions is not supported",
    "store": "false or null: nothing is stored",
    "suffix": "empty or null: it is not supported",
    "messages": "a list of at least one message with 'role' and 'content'",
    "messages.role": "'system', 'developer', 'user', 'assistant' or 'tool'",
    "messages.tool_calls": 'a list of calls, {"type": "function", "function": {"name": …, "arguments": …}}',
    "tools": 'a list of functions, {"type": "function", "function": {"name": …}}, in a chat; elsewhere empty or null',
    **dict.fromkeys(("tools.type", "messages.tool_calls.type"), "'function': there are no other kinds"),
    **dict.fromkeys(("tools.function.name", "messages.tool_calls.function.name"), "a text that is not empty"),
    **dict.fromkeys(("tools.function", "messages.tool_calls.function"), "an object with 'name'"),
    "tools.function.strict": "false or null: nothing constrains what is written",
    "tools.function.parameters": "a JSON schema or null",
    "messages.tool_calls.function.arguments": "a text, of JSON",
    "functions": "empty or null: give tools",
    "messages.annotations": "empty or null: it is not supported",
    **dict.fromkeys(("tool_choice", "function_call"), "'none', 'auto' or null: no call can be forced"),
    "chat_template_kwargs": "an object or null",
    "modalities": "['text'] or null: there are only texts",
    "service_tier": "'auto', 'default' or null: there are no tiers",
    "verbosity": "'medium' or null: it is not supported",
    **dict.fromkeys(_nulls(ChatRequest), "null: it is not supported"),
    **{f"messages.{name}": "null: it is not supported" for name in _nulls(ChatMessage)},
    "messages.content": CONTENT,
    "messages.name": "a text or null",
    "messages.content.text": "a text",
    "messages.content.type": "'text': parts of other types are not supported",
    "stream_options": "an object with 'include_usage'",
    "stream_options.include_usage": "true or false",
    "stream_options.include_obfuscation": "false or null: chunks are not padded",
    "response_format.type": "'text': other formats are not supported",
    "response_format": 'null or {"type": "text"}',
    "name": _NAME,
    "aligner_name": _NAME,
    "path": "a text that is not empty",
    "aligner_path": "a text that is not empty",
}
"""What fields must be, where their JSON schema does not say it well."""


def explain(error: ValidationError) -> tuple[str, str | None]:
    """One sentence that names the field and the fix, and the body's field that it is about, if it is about one.

    Args:
        error: from `model_validate_json` of a model of this module.
    """
    details = error.errors(include_url=False)[:256]  # a hostile body has one for every unknown key
    first = details[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}", None
    if first["type"] == "conflict":
        return ".".join(filter(None, [_place(_steps(first)), first["msg"]])), first["ctx"]["field"]
    if not first["loc"]:
        return f"the body must be a JSON object, not {_show(first['input'])}", None
    param = str(first["loc"][0])
    # A union reports each of its branches: the one that got furthest is what was meant, and of a part its type.
    first = max((d for d in details if d["loc"][0] == param), key=lambda d: (d["loc"][-1] == "type", len(_steps(d))))
    model = next(model for model in _ROUTES if model.__name__ == error.title)
    steps = _steps(first)
    place = _place(steps)
    if first["type"] == "extra_forbidden":
        return f"unknown field {place!r}: {_hint(steps, model)}", _cut(param)
    while not (expected := _expected(steps, model)):  # then say what must be the nearest thing around it
        steps = steps[:-1]
    if first["type"] == "missing":
        return f"{place} is missing: it must be {expected}", param
    around, shown = _place(steps), _show(first["input"])
    return f"{around} must be {expected}" + (f", not {shown}" if around == place else f"; {place} is {shown}"), param


_NESTED = {name for model in _INNER.values() for name in model.model_fields}


def _steps(detail: ErrorDetails) -> list[int | str]:
    """Where in the body: pydantic's location without its names for the branches of unions."""
    loc, unknown = detail["loc"], detail["type"] == "extra_forbidden"
    ends = (0, len(loc) - 1) if unknown else (0,)
    return [step for i, step in enumerate(loc) if i in ends or isinstance(step, int) or step in _NESTED]


def _place(steps: Sequence[int | str]) -> str:
    return _cut("".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)[1:])


def _expected(steps: Sequence[int | str], model: type[BaseModel]) -> str:
    """What the field at `steps` must be; empty if there is nothing to say of it."""
    if isinstance(steps[-1], int):
        return ""
    name = ".".join(step for step in steps if isinstance(step, str))
    return _WORDS.get(name) or _phrase(_properties(model).get(name, {}))


@functools.cache
def _properties(model: type[BaseModel]) -> dict[str, Any]:
    properties: dict[str, Any] = model.model_json_schema()["properties"]
    return properties


def _phrase(schema: Mapping[str, Any]) -> str:
    """A JSON schema of a number, a text or a truth value in words; empty for others."""
    if "anyOf" in schema:
        return " or ".join(filter(None, map(_phrase, schema["anyOf"])))
    kind = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}.get(
        schema.get("type", ""), ""
    )
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most"}
    limits = [f"{word} {schema[key]}" for key, word in bounds.items() if key in schema]
    return f"{kind} {' and '.join(limits)}" if limits else kind


def _hint(steps: Sequence[int | str], model: type[BaseModel]) -> str:
    """What to do about an unknown field: where it belongs, what was meant, or nothing."""
    *outer, name = [step for step in steps if isinstance(step, str)]
    level = ".".join(outer)
    homes = {"the request itself": model} if level else {}
    homes |= {f"'{place}'": inner for place, inner in _INNER.items() if place.partition(".")[0] in model.model_fields}
    homes |= {route: other for other, route in _ROUTES.items()}
    if home := next((home for home, other in homes.items() if name in _fields(other)), None):
        return f"it belongs to {home}"
    near = difflib.get_close_matches(name, _fields(_INNER.get(level, model)), n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else "this server does not have it; leave it out"


def _fields(model: type[BaseModel]) -> list[str]:
    """Fields that are of use, in order."""
    return sorted(set(model.model_fields) - set(_nulls(model)))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _show(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return repr(_cut(value))
    return _cut(str(value)) if not isinstance(value, int) or abs(value) < 10**_SHOWN else "a larger integer"
