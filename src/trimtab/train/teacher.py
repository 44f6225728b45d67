"""A prompt that is to become an aligner: what is put before every prompt, and what a run that learns from it cannot be told.

The *teacher* is the proposal itself behind these messages or this text. The aligned model without them learns the proposal's
rows with them, so what a prompt costs at every request is paid once.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

from trimtab.data.prompts import CHAT_FIELDS, check_messages, is_chat, join_chat
from trimtab.data.records import Record
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.files import expand_home, json_digest
from trimtab.train.plan import Plan

__all__ = ["Parts", "Teacher", "lack_answers", "teach"]

Parts: TypeAlias = tuple[list[Record], list[Record]]
"""Training and development records."""


@dataclass(frozen=True)
class Teacher:
    """What is put before every prompt.

    Attributes:
        path: the file it came from, for messages to the user.
        before: a text, or messages.
    """

    path: str
    before: str | list[Mapping[str, Any]]

    @classmethod
    def read(cls, path: str) -> Self:
        """From a file: messages in `.json` (a list) or `.jsonl` (one in a line); a text in any other.

        Raises:
            InvalidOption: it cannot be read, is empty, or holds what is no message.
        """
        try:
            text = expand_home(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"teacher_prompt: {error}") from error
        if not text.strip():
            raise InvalidOption(f"teacher_prompt: {path} is empty")
        if not path.endswith((".json", ".jsonl")):
            return cls(path, text)
        try:
            lines = [line for line in text.splitlines() if line.strip()]
            messages = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in lines]
            if not isinstance(messages, list) or not messages:
                raise InvalidOption(f"teacher_prompt: {path} must hold a list of messages; name a plain text otherwise")
            check_messages(messages, "messages")
        except (ValueError, InvalidRequest) as error:
            raise InvalidOption(f"teacher_prompt: {path}: {error}") from None
        return cls(path, messages)

    @property
    def digest(self) -> str:
        """`sha256:…` of what is put before, wherever it is kept."""
        return f"sha256:{json_digest([self.before])}"

    def put_before_all(self, records: Iterable[Record]) -> list[Record]:
        """The records without unwanted answers, each with its prompt as the teacher gets it.

        Raises:
            DataError: names the record that the teacher cannot be put before, and the fix.
        """
        return [
            dataclasses.replace(record, rejected=None, teacher=self.put_before(record.prompt, record.source))
            for record in records
        ]

    def put_before(self, prompt: Any, source: str) -> Any:
        """A prompt behind the teacher's: a text behind a text; a chat behind messages, of which a text is the system's."""
        if not is_chat(prompt):
            if isinstance(self.before, str):
                return self.before + prompt
            raise DataError(
                f"{source}: 'prompt' is a text, but teacher_prompt {self.path} holds messages: give it as a plain text, or the"
                " data as messages"
            )
        before = [{"role": "system", "content": self.before.strip()}] if isinstance(self.before, str) else self.before
        if not isinstance(prompt, Mapping):
            return _joined(before, prompt, source)
        fields = {field: prompt[field] for field in CHAT_FIELDS if field in prompt}
        return join_chat(_joined(before, prompt["messages"], source), fields)


def _joined(before: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]], source: str) -> list[Mapping[str, Any]]:
    """One conversation of two, whose system message says what the first ones of both say."""
    systems = [part[0] for part in (before, messages) if part and part[0]["role"] == "system"]
    rest = [message for part in (before, messages) for message in part[bool(part) and part[0]["role"] == "system" :]]
    if len(systems) < 2:
        return [*systems, *rest]
    said = [message["content"] for message in systems]
    if not all(isinstance(content, str) for content in said):
        raise DataError(
            f"{source}: the system messages of 'prompt' and of teacher_prompt become one, and one of them is no text: write"
            " both as texts, or leave one out"
        )
    return [{**systems[0], "content": "\n\n".join(said)}, *rest]


def teach(plan: Plan, parts: Parts) -> Parts:
    """The records with their prompts as the teacher of the options gets them; as they are, if there is none.

    Raises:
        InvalidOption: the teacher cannot be read; or drawn answers are spoken of and all are given, or the other way around.
        DataError: the teacher cannot be put before a record, or only some records have answers.
    """
    if plan.asked.teacher_prompt is None:
        return parts
    teacher = Teacher.read(plan.asked.teacher_prompt)
    drawn = lack_answers(parts)
    if not drawn and plan.asked.teacher_max_tokens is not None:
        raise InvalidOption("teacher_max_tokens would change nothing: the records have answers; leave it out")
    if drawn and plan.asked.cut_answers != "auto":
        raise InvalidOption(
            "cut_answers would change nothing: of answers that are drawn it is known how they end; leave it out"
        )
    return teacher.put_before_all(parts[0]), teacher.put_before_all(parts[1])


def lack_answers(parts: Parts) -> bool:
    """Whether the answers are to be drawn, because no record has one.

    Raises:
        DataError: some have one, and some have not.
    """
    records = [*parts[0], *parts[1]]
    lacking = [record for record in records if record.chosen is None]
    if lacking and len(lacking) < len(records):
        raise DataError(
            f"{lacking[0].source}: has no answer, but other records have: give all of them answers, or none, and the proposal"
            " draws them behind teacher_prompt"
        )
    return bool(lacking)
