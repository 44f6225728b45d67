"""How a rewriter is asked: a prompt and an answer to it, as one prompt whose answer is the better answer.

aligner        Aligner's (arXiv 2402.02416), a text
chat           a user's message with both, for a model that follows instructions
FILE           a text with {prompt} and {answer} in it
chat:FILE      the same as a user's message
"""

from dataclasses import dataclass
from typing import Any

from trimtab.data.prompts import show_prompt
from trimtab.errors import InvalidOption
from trimtab.files import expand_home

__all__ = ["PRESETS", "RewriteTemplate", "read_template"]

PROMPT, ANSWER = "{prompt}", "{answer}"

PRESETS = {
    "aligner": "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and harmless: "
    "{prompt} | {answer} ASSISTANT:",
    "chat": "chat:Here is a question, and an answer to it. Write a better answer, and nothing else.\n\n"
    "Question: {prompt}\n\nAnswer: {answer}",
}
"""By name. What begins with `chat:` is a user's message."""


@dataclass(frozen=True)
class RewriteTemplate:
    """A text with {prompt} and {answer} in it.

    Attributes:
        text: of the prompt, or of the user's message.
        chat: whether it is a message.
    """

    text: str
    chat: bool = False

    def __post_init__(self) -> None:
        """Refuse what does not say where an answer goes.

        Raises:
            InvalidOption: it has no {answer}, or one of the two more than once.
        """
        if self.text.count(ANSWER) != 1 or self.text.count(PROMPT) > 1:
            raise InvalidOption("a rewriter's template must have {answer} once, and {prompt} at most once")
        if self.text.startswith("chat:"):
            raise InvalidOption("a rewriter's template must not begin with 'chat:': say chat:FILE for a message")

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"chat:{self.text}" if self.chat else self.text

    @classmethod
    def parse(cls, text: str) -> "RewriteTemplate":
        """From what a manifest says."""
        return cls(text.removeprefix("chat:"), text.startswith("chat:"))

    def ask(self, prompt: Any, answer: str) -> Any:
        """The rewriter's prompt: a text, or a chat of one message.

        Args:
            prompt: a text or a chat, whose messages are told by their roles.
            answer: to be rewritten.
        """
        before, after = self.text.split(ANSWER)
        told = show_prompt(prompt)
        text = before.replace(PROMPT, told) + answer + after.replace(PROMPT, told)
        return [{"role": "user", "content": text}] if self.chat else text

    def wanted(self, answer: str) -> Any:
        """A better answer, of the kind that the prompt has."""
        return [{"role": "assistant", "content": answer}] if self.chat else answer


def read_template(text: str) -> RewriteTemplate:
    """The template that a user names.

    Raises:
        InvalidOption: there is no preset and no file of that name, or the file is no template.
    """
    if text in PRESETS:
        return RewriteTemplate.parse(PRESETS[text])
    path = expand_home(text.removeprefix("chat:"))
    try:
        content = path.read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(PRESETS)
        raise InvalidOption(f"rewriter_template '{text}' is none of {known}, and no file with a template: {error}") from None
    try:
        return RewriteTemplate(content, text.startswith("chat:"))
    except InvalidOption as error:
        raise InvalidOption(f"rewriter_template {path}: {error}") from None
