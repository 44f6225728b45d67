"""Chats as texts, by the tokenizer's chat template.

Some templates write today's date. So that a run can be had again, the date may be given; see `pick_date`. transformers offers
templates a function `strftime_now` that reads the clock, and lets nobody replace it. So a date is set by a macro of that name,
written before the template.
"""

import contextlib
import datetime
import json
import re
import string
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes

from trimtab.data.prompts import Chat
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.files import expand_home

__all__ = ["check_date", "pick_date", "read_chat_template", "reads_date", "refuse_idle_date", "render_chat"]

OWN = ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "tokenize", "tools")
"""What a template is always told, and `chat_template_kwargs` may not."""


DIRECTIVES = [f"%{flag}{letter}" for flag in ("", *"-_0^#EO") for letter in string.ascii_letters]
"""What `strftime` may know, with the flags of C libraries."""
MACRO = (
    "{%% macro strftime_now(format) %%}{%% set text = namespace(is=format) %%}{%% for directive, value in %s.items() %%}"
    "{%% set text.is = text.is | replace(directive, value) %%}{%% endfor %%}{{ text.is }}{%% endmacro %%}\n"
)
"""`strftime_now` of a fixed date. The newline at its end is dropped, as behind every block in transformers' templates."""


def render_chat(
    tokenizer: Any, chat: Chat, name: str, *, answer: bool, date: str | None = None, unfinished: bool = False
) -> str:
    """The text of a chat.

    Args:
        tokenizer: has the template.
        chat: the messages and what belongs to them.
        name: what errors call it.
        answer: go on to where the assistant's answer begins.
        date: what the template takes for today, `YYYY-MM-DD`; None takes the clock's.
        unfinished: end inside the last message, so that it can be continued.

    Raises:
        InvalidRequest: there is no template, or it refuses the chat.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest(f"{name} is a chat, but the tokenizer has no chat template: give a text instead")
    if taken := sorted(set(chat.settings) & {*OWN}):
        raise InvalidRequest(f"{name}: chat_template_kwargs cannot set '{taken[0]}'")
    _refuse_idle(tokenizer, chat, name)
    messages, tools = [_plain(message) for message in chat.messages], chat.tools or None
    settings = {**chat.settings, "tools": tools, "add_generation_prompt": answer, "continue_final_message": unfinished}
    try:
        if date is not None and reads_date(tokenizer):
            settings["chat_template"] = _on(date) + tokenizer.get_chat_template(tools=tools)
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except Exception as error:  # a template is a program of its own, and may raise whatever it likes
        raise InvalidRequest(f"{name}: the chat template refuses it: {error}") from error


def _refuse_idle(tokenizer: Any, chat: Chat, name: str) -> None:
    """Refuse what belongs to a chat and does not reach its template."""
    calls = any(message.get("tool_calls") for message in chat.messages)
    if not (chat.tools or chat.settings or calls):
        return
    try:
        variables, names = _read_by(tokenizer.get_chat_template(tools=chat.tools or None))
    except TemplateSyntaxError as error:
        raise InvalidRequest(f"{name}: the chat template is none: {error.message}") from error
    idle = ["tools"] if chat.tools and "tools" not in variables else []
    idle += ["messages: 'tool_calls'"] if calls and "tool_calls" not in names else []
    idle += [f"chat_template_kwargs: '{field}'" for field in chat.settings if field not in variables]
    if idle:
        raise InvalidRequest(f"{idle[0]} would change nothing: the chat template of {name} does not know it; leave it out")


@lru_cache
def _read_by(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """The variables that a template is to be given, and all names of fields in it.

    Raises:
        TemplateSyntaxError: it is no template.
    """
    plain = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # transformers' own block, which only marks what it holds
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    fields = {node.attr for node in tree.find_all(nodes.Getattr)} | {node.value for node in tree.find_all(nodes.Const)}
    return frozenset(meta.find_undeclared_variables(tree)), frozenset(field for field in fields if isinstance(field, str))


def read_chat_template(path: str | None) -> str | None:
    """The chat template in a file; None without one.

    Raises:
        InvalidOption: it cannot be read.
    """
    if path is None:
        return None
    try:
        template = expand_home(path).read_text(encoding="utf-8")
        known, _ = _read_by(template)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidOption(f"chat_template_path: {error}") from error
    except TemplateSyntaxError as error:
        raise InvalidOption(f"chat_template_path: {path}:{error.lineno}: {error.message}") from error
    if "messages" not in known:
        raise InvalidOption(f"chat_template_path: {path} is no chat template: it does not read 'messages'")
    return template


def reads_date(tokenizer: Any) -> bool:
    """Whether the tokenizer's chat template, or one of them, asks for the date."""
    return "strftime_now" in json.dumps(getattr(tokenizer, "chat_template", None))


def check_date(date: str | None) -> None:
    """Refuse a date that is none.

    Raises:
        InvalidOption: it is not `YYYY-MM-DD`.
    """
    try:
        if date is not None and datetime.date.fromisoformat(date).isoformat() != date:
            raise ValueError
    except (ValueError, TypeError):
        raise InvalidOption(f"date must be YYYY-MM-DD, such as 2026-11-29, not {date!r}") from None


def refuse_idle_date(date: str | None, *tokenizers: Any) -> None:
    """Refuse a date that is asked for where nothing writes one.

    Raises:
        InvalidOption: no tokenizer's chat template does.
    """
    if date is not None and not any(map(reads_date, tokenizers)):
        raise InvalidOption(f"date {date} would change nothing: the chat template does not write the date; leave it out")


def pick_date(asked: str | None, kept: Any = None) -> str:
    """The date of a run: the one that was asked for, or the one that the run began with, or today's."""
    check_date(asked)
    return asked or (kept if isinstance(kept, str) else today())


def today() -> str:
    """The clock's date."""
    return datetime.date.today().isoformat()


@lru_cache
def _on(date: str) -> str:
    """What makes `strftime_now` give a date, at midnight."""
    day = datetime.datetime.fromisoformat(date)
    values = {directive: day.strftime(directive) for directive in DIRECTIVES}
    known = {directive: value for directive, value in values.items() if value != directive}
    return MACRO % json.dumps({"%%": "\0", **known, "\0": "%"})


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no empty fields, and arguments of tool calls as objects; OpenAI's are texts of JSON."""
    plain = {key: value for key, value in message.items() if value is not None}
    if plain.get("tool_calls"):
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in plain["tool_calls"]]
    return plain


def _with_parsed_arguments(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    with contextlib.suppress(ValueError):
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    return call
