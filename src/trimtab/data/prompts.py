"""What users write for a prompt: a text, a chat, or token ids.

A chat is a list of messages. With tools, or with settings of the template, it is what an OpenAI request says:

    {"messages": [...], "tools": [...], "chat_template_kwargs": {...}}
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from trimtab.errors import InvalidRequest

__all__ = [
    "CHAT_FIELDS",
    "Chat",
    "Message",
    "Prompt",
    "answer_text",
    "are_ids",
    "as_list",
    "as_pairs",
    "chat_columns",
    "check_messages",
    "is_chat",
    "join_chat",
    "read_chat",
    "show_prompt",
]

Message: TypeAlias = Mapping[str, Any]
Prompt: TypeAlias = str | Sequence[Message] | Sequence[int] | Mapping[str, Any]
"""A text, a list of chat messages (`{"role": …, "content": …}`), token ids, or a chat as `{"messages": …, "tools": …}`."""

CHAT_FIELDS = ("tools", "chat_template_kwargs")
"""What a chat may have beside its messages."""


class Chat(NamedTuple):
    """A chat, checked."""

    messages: list[Mapping[str, Any]]
    tools: list[Any]
    """Functions that the model may call, as JSON schemas; empty without any."""
    settings: Mapping[str, Any]
    """Variables for the template."""


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several; tensors and arrays count as the lists they hold."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, str) or (isinstance(prompts, Mapping) and "messages" in prompts):
        return [prompts]
    if isinstance(prompts, Mapping):
        return [[prompts]]
    if not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts must be texts, messages or token ids, not {prompts!r}")
    items: list[Any] = list(prompts)
    if items and (isinstance(items[0], int) or (isinstance(items[0], Mapping) and "messages" not in items[0])):
        return [items]
    return items


def as_pairs(prompts: Prompt | Iterable[Prompt], completions: Any) -> list[tuple[Prompt, Any]]:
    """Each prompt with its completion: a text, a message, or ids.

    Raises:
        InvalidRequest: there are not as many of one as of the other.
    """
    items = as_list(prompts)
    if not isinstance(completions, Iterable):
        raise InvalidRequest(f"completions must be texts, messages or token ids, not {completions!r}")
    answers = [completions] if isinstance(completions, (str, Mapping)) else list(completions)
    if len(items) == 1 and answers and isinstance(answers[0], int):
        answers = [answers]
    if len(items) != len(answers):
        raise InvalidRequest(f"there are {len(items)} prompts, but {len(answers)} completions")
    return list(zip(items, answers, strict=True))


def are_ids(answer: object) -> bool:
    """Whether a completion is token ids; none at all are, too."""
    return isinstance(answer, (list, tuple)) and all(isinstance(token, int) for token in answer)


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a chat; one message makes a list one, and `read_chat` names what is none."""
    if isinstance(prompt, Mapping):
        return "messages" in prompt
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt)


def read_chat(prompt: Any, name: str) -> Chat:
    """A chat from what `is_chat` takes for one.

    Raises:
        InvalidRequest: it is malformed; the message calls it `name`.
    """
    if not isinstance(prompt, Mapping):
        check_messages(prompt, name)
        return Chat(list(prompt), [], {})
    if unknown := set(prompt) - {"messages", *CHAT_FIELDS}:
        raise InvalidRequest(f"{name} has an unknown field '{min(unknown)}': a chat has messages, {' and '.join(CHAT_FIELDS)}")
    messages, tools, settings = prompt["messages"], prompt.get("tools") or [], prompt.get("chat_template_kwargs") or {}
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InvalidRequest(f"{name}: messages must be a list, not {messages!r}")
    check_messages(messages, f"{name}: messages")
    if not isinstance(tools, Sequence) or isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InvalidRequest(f"{name}: tools must be a list of JSON schemas, not {tools!r}")
    if not isinstance(settings, Mapping):
        raise InvalidRequest(f"{name}: chat_template_kwargs must map names to values, not {settings!r}")
    return Chat(list(messages), list(tools), settings)


def check_messages(messages: Iterable[Any], name: str) -> None:
    """Refuse what is no message; one that calls tools needs no content.

    Raises:
        InvalidRequest: names the first that is none.
    """
    for i, message in enumerate(messages):
        spoken = isinstance(message, Mapping) and (message.get("content") is not None or message.get("tool_calls"))
        if not spoken or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{name}[{i}] must be a message with 'role' and 'content', not {message!r}")


def join_chat(messages: Any, fields: Mapping[str, Any]) -> Any:
    """The prompt that messages are with those of `CHAT_FIELDS` that are given: just the messages, if none is."""
    given = {field: fields[field] for field in CHAT_FIELDS if fields.get(field)}
    return {"messages": messages, **given} if given else messages


def chat_columns(prompt: Prompt) -> dict[str, Any]:
    """A prompt as the columns of a data set in TRL's layout: `prompt`, and what a chat has beside its messages."""
    if isinstance(prompt, Mapping):
        return {"prompt": prompt["messages"], **{field: prompt[field] for field in CHAT_FIELDS if field in prompt}}
    return {"prompt": prompt}


def answer_text(answer: Any) -> str:
    """An answer, a text or messages, as a text."""
    return show_prompt(answer) if is_chat(answer) else str(answer)


def show_prompt(prompt: Any) -> str:
    """A prompt as a text, for judges and reports."""
    if not is_chat(prompt):
        return str(prompt)
    messages = read_chat(prompt, "prompt").messages
    if len(messages) == 1:
        return _content(messages[0])
    return "\n\n".join(f"{message['role'].capitalize()}: {_content(message)}" for message in messages)


def _content(message: Mapping[str, Any]) -> str:
    """What a message says; one that says nothing calls tools."""
    said = message.get("content")
    if isinstance(said, list):
        return "".join(_part(part) for part in said)
    return str(said) if said is not None else json.dumps(message["tool_calls"], ensure_ascii=False)


def _part(part: Any) -> str:
    """A part of a message's content: its text, or as it is if it has none."""
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else json.dumps(part, ensure_ascii=False)
