"""A text or messages that are put before prompts, read from a file: a teacher's, or one that a reward compares by."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from trimtab.data.prompts import CHAT_FIELDS, check_messages, is_chat, join_chat
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.files import expand_home, json_digest

__all__ = ["Preamble"]


@dataclass(frozen=True)
class Preamble:
    """What is put before every prompt.

    Attributes:
        path: the file it came from, for messages to the user.
        before: a text, or messages.
        option: the option that names the file, for the same.
    """

    path: str
    before: str | list[Mapping[str, Any]]
    option: str

    @classmethod
    def read(cls, path: str, option: str) -> Self:
        """From a file: messages in `.json` (a list) or `.jsonl` (one in a line); a text in any other.

        Raises:
            InvalidOption: it cannot be read, is empty, or holds what is no message.
        """
        try:
            text = expand_home(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"{option}: {error}") from error
        if not text.strip():
            raise InvalidOption(f"{option}: {path} is empty")
        if not path.endswith((".json", ".jsonl")):
            return cls(path, text, option)
        try:
            lines = [line for line in text.splitlines() if line.strip()]
            messages = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in lines]
            if not isinstance(messages, list) or not messages:
                raise InvalidOption(f"{option}: {path} must hold a list of messages; name a plain text otherwise")
            check_messages(messages, "messages")
        except (ValueError, InvalidRequest) as error:
            raise InvalidOption(f"{option}: {path}: {error}") from None
        return cls(path, messages, option)

    @property
    def digest(self) -> str:
        """`sha256:…` of what is put before, wherever it is kept."""
        return f"sha256:{json_digest([self.before])}"

    def put_before(self, prompt: Any, source: str) -> Any:
        """A prompt behind it: a text behind a text; a chat behind messages, of which a text is the system's.

        Args:
            prompt: a text or a chat.
            source: where it comes from, for messages.

        Raises:
            DataError: a text cannot stand behind messages, or two system messages cannot become one.
        """
        if not is_chat(prompt):
            if isinstance(self.before, str):
                return self.before + prompt
            raise DataError(
                f"{source}: 'prompt' is a text, but {self.option} {self.path} holds messages: give it as a plain text, or the"
                " data as messages"
            )
        before = [{"role": "system", "content": self.before.strip()}] if isinstance(self.before, str) else self.before
        if not isinstance(prompt, Mapping):
            return self._joined(before, prompt, source)
        fields = {field: prompt[field] for field in CHAT_FIELDS if field in prompt}
        return join_chat(self._joined(before, prompt["messages"], source), fields)

    def _joined(
        self, before: Sequence[Mapping[str, Any]], messages: Sequence[Mapping[str, Any]], source: str
    ) -> list[Mapping[str, Any]]:
        """One conversation of two, whose system message says what the first ones of both say."""
        systems = [part[0] for part in (before, messages) if part and part[0]["role"] == "system"]
        rest = [message for part in (before, messages) for message in part[bool(part) and part[0]["role"] == "system" :]]
        if len(systems) < 2:
            return [*systems, *rest]
        said = [message["content"] for message in systems]
        if not all(isinstance(content, str) for content in said):
            raise DataError(
                f"{source}: the system messages of 'prompt' and of {self.option} become one, and one of them is no text: write"
                " both as texts, or leave one out"
            )
        return [{**systems[0], "content": "\n\n".join(said)}, *rest]
