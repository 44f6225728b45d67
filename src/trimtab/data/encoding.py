"""The one place where texts become token ids: prompts, answers after their prompts, chats.

A prompt and its answer are tokenised as one text and split where the prompt ends. So a tokenizer that treats the beginning of a
text apart (SentencePiece puts a space before it) gives the answer the ids that it has behind the prompt. The prompt's part is
what the ids of the whole and of the prompt alone have in common from the beginning. It is nearly always all of the prompt: only
where the prompt's last characters and the answer's first share a token, as after a space at the prompt's end, that token is the
answer's.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from trimtab.data.prompts import Chat, Prompt, are_ids, is_chat, read_chat
from trimtab.data.template import check_date, reads_date, render_chat
from trimtab.errors import InvalidRequest

__all__ = ["Encoded", "Encoder", "common_length"]

SETTLED = ("\n", ".", "a")
"""Texts behind which a text is encoded as behind another, where the other's own end would merge with it."""
MARK = "\ue000answer\ue000"
"""Stands for an answer where what a template writes around it is wanted: characters that nobody uses."""


class Encoded(NamedTuple):
    """A prompt and its answers."""

    prompt: list[int]
    answers: list[list[int]]
    shares_token: bool
    """Whether an answer begins inside the prompt's last token, which is then the answer's."""


class Encoder:
    """Turns prompts and answers into ids.

    Args:
        tokenizer: a transformers tokenizer; None where prompts and answers are ids already.
        vocab_size: V; ids are below it.
        eos_token_ids: ids that end an answer; the first of them is put at the end of texts.
        date: what chat templates take for today, `YYYY-MM-DD`; None takes the clock's.

    Raises:
        InvalidOption: the date is none.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Sequence[int] = (), date: str | None = None) -> None:
        check_date(date)
        self.tokenizer, self.vocab_size, self.date = tokenizer, vocab_size, date
        self.ends = tuple(eos_token_ids)

    def prompt(self, prompt: Prompt, name: str = "prompt", *, special: bool = True) -> list[int]:
        """Ids of a prompt: of a text see `text`, of a chat up to where the answer begins.

        Raises:
            InvalidRequest: it is empty or malformed; the message calls it `name`.
        """
        if hasattr(prompt, "tolist"):
            prompt = prompt.tolist()
        if not isinstance(prompt, (str, Iterable)) or isinstance(prompt, (bytes, bytearray)):
            raise InvalidRequest(f"{name} must be a text, messages, or token ids, not {prompt!r}")
        if isinstance(prompt, str) and not prompt:
            raise InvalidRequest(f"{name} is empty: give at least one character, or the ids of a start token")
        ids: list[Any]
        if isinstance(prompt, str):
            ids = self.text(prompt, name, special=special)
        elif is_chat(prompt):
            ids = self.tokenize(self.render(read_chat(prompt, name), name, answer=True), name)
        else:
            ids = list(prompt)
        if not ids:
            raise InvalidRequest(f"{name} is empty: give at least one message or token id")
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise InvalidRequest(f"{name} must be a text, messages, or ids from 0 to {self.vocab_size - 1}, not {token!r}")
        return ids

    def pair(
        self,
        prompt: Prompt,
        answer: Any,
        names: tuple[str, str] = ("prompt", "completion"),
        *,
        ended: bool = True,
        special: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Ids of a prompt and of one answer to it, see `answers`; an answer of ids is as it is. `special` as in `text`."""
        if are_ids(answer):
            return self.prompt(prompt, names[0], special=special), self.prompt(list(answer), names[1])
        encoded = self.answers(prompt, [answer], names[0], [names[1]], [ended], special=special)
        return encoded.prompt, encoded.answers[0]

    def answers(
        self,
        prompt: Prompt,
        answers: Sequence[Any],
        name: str,
        names: Sequence[str],
        ended: Sequence[bool],
        *,
        special: bool = True,
    ) -> Encoded:
        """Ids of a prompt and of several answers to it.

        Args:
            prompt: a text, a chat or ids.
            answers: a text each; for a chat also the assistant's message, or a list with it.
            name: what errors call the prompt.
            names: what they call each answer.
            ended: whether each answer is whole, and so has the end of sequence last; the others were cut. What the chat
                template writes behind an answer, up to its own end of sequence, belongs to the answer.
            special: as in `text`.

        Raises:
            InvalidRequest: one of them is malformed or has no ids; or an answer goes on behind an end of sequence.
        """
        head = self.prompt(prompt, name, special=special)
        kinds = zip(answers, names, ended, strict=True)
        wholes = [self._whole(prompt, head, answer, a, whole, special) for answer, a, whole in kinds]
        border, wholes = self._border(prompt, head, wholes, answers, names)
        parts = zip(wholes, answers, names, ended, strict=True)
        return Encoded(
            head[:border],
            [self._end(ids[border:], prompt, answer, a, whole) for ids, answer, a, whole in parts],
            border < len(head),
        )

    def end_of(self, prompt: Prompt) -> int:
        """The id that an answer to the prompt ends with: a chat template may have another one than texts.

        Raises:
            InvalidRequest: the prompt is malformed, or there is no end of sequence.
        """
        return self.pair(prompt, "a")[1][-1]

    def split(self, prompt: str | list[int], text: str, *, special: bool = True) -> tuple[list[int], list[int]]:
        """Ids of a prompt, and of the text behind it as it stands: an end of sequence in it is a token like others.

        Raises:
            InvalidRequest: one of them is malformed or has no ids.
        """
        head = self.prompt(prompt, special=special)
        wholes = [self._whole(prompt, head, text, "a text", True, special)]
        border, (whole,) = self._border(prompt, head, wholes, [text], ["a text"])
        return head[:border], whole[border:]

    def _border(
        self, prompt: Prompt, head: list[int], wholes: list[list[int]], answers: Sequence[Any], names: Sequence[str]
    ) -> tuple[int, list[list[int]]]:
        """How many of a prompt's ids begin all of the wholes, and these."""
        border = min((common_length(head, whole) for whole in wholes), default=len(head))
        if border:
            return border, wholes
        # The prompt's first token goes over its end.
        alone = [self._behind(str(prompt), _text(answer), name) for answer, name in zip(answers, names, strict=True)]
        return len(head), [[*head, *ids] for ids in alone]

    def text(self, text: str, name: str, *, special: bool = True) -> list[int]:
        """Ids of a text; with `special`, behind the tokens that the tokenizer puts first, unless the text begins with them.

        Raises:
            InvalidRequest: it has no ids.
        """
        ids = self.tokenize(text, name)
        if special:
            ids = self.around[0] + ids[common_length(self.around[0], ids) :]
        if not ids:
            raise InvalidRequest(f"{name} has no tokens")
        return ids

    def tokenize(self, text: str, name: str) -> list[int]:
        """Ids of a text as it stands.

        Raises:
            InvalidRequest: there is no tokenizer, or the text is no valid Unicode.
        """
        if self.tokenizer is None:
            raise InvalidRequest(f"{name} is a text, but this model was made without a tokenizer: give token ids")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"{name} is no valid Unicode: a lone surrogate at character {error.start}") from None
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def render(self, chat: Chat, name: str, *, answer: bool, unfinished: bool = False) -> str:
        """The text of a chat, see `trimtab.data.template.render_chat`."""
        return render_chat(self.tokenizer, chat, name, answer=answer, date=self.date, unfinished=unfinished)

    @property
    def chat_settings(self) -> dict[str, Any]:
        """What decides how chats become texts: a hash of the template, and the date if the template writes one."""
        template = json.dumps(getattr(self.tokenizer, "chat_template", None))
        date = self.date if self.tokenizer is not None and reads_date(self.tokenizer) else None
        return {"chat_template": hashlib.sha256(template.encode()).hexdigest(), "date": date}

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before a text and behind it.

        Those behind it are no part of a prompt: some tokenizers end every text with an end of sequence, and nothing follows.
        """
        plain = self.tokenize("a", "a text")
        ids = list(self.tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"])
        starts = (i for i in range(len(ids) - len(plain) + 1) if ids[i : i + len(plain)] == plain)
        start = next(starts, 0)
        return ids[:start], ids[start + len(plain) :]

    def _whole(self, prompt: Prompt, head: list[int], answer: Any, name: str, ended: bool, special: bool) -> list[int]:
        """Ids of a prompt, which alone has the ids `head`, with its answer, and what the template writes behind a whole one."""
        if is_chat(prompt):
            text = self._answered(prompt, answer, name)
            return self.tokenize(text if ended else text.removesuffix(self._tail(prompt, answer, name)), name)
        self._check_kind(answer, name)
        if not isinstance(answer, str):
            raise InvalidRequest(f"{name} is a message, but its prompt is no chat")
        if isinstance(prompt, str):
            return self.text(prompt + answer, name, special=special) if answer else head
        if not answer:
            return head
        before = "" if self.tokenizer is None else self.tokenizer.decode(head, clean_up_tokenization_spaces=False)
        return [*head, *self._behind(before, answer, name)]

    def _behind(self, before: str, text: str, name: str) -> list[int]:
        """Ids of a text behind another one whose tokens are settled: encoded behind as much of it as does not merge with it."""
        for start in (before, before[-1:], *SETTLED):
            alone, whole = self.tokenize(start, name), self.tokenize(start + text, name)
            if alone and whole[: len(alone)] == alone:
                return whole[len(alone) :]
        return self.tokenize(text, name)

    def _tail(self, prompt: Any, answer: Any, name: str) -> str:
        """What the chat template writes behind the content of an answer."""
        message = {} if isinstance(answer, str) else answer if isinstance(answer, Mapping) else answer[0]
        marked = self._answered(prompt, {"role": "assistant", **message, "content": MARK}, name)
        return marked.rpartition(MARK)[2]

    def _answered(self, prompt: Any, answer: Any, name: str) -> str:
        """The text of a chat with its answer."""
        message = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
        self._check_kind(message, name)
        messages = [message] if isinstance(message, Mapping) else list(message)
        if len(messages) != 1:
            raise InvalidRequest(f"{name} must be one message, not {len(messages)}: end the prompt before the last answer")
        chat = read_chat(prompt, name)
        last = read_chat(messages, name)
        before = self.render(chat, name, answer=True)
        after = self.render(chat._replace(messages=[*chat.messages, *last.messages]), name, answer=False)
        if not after.startswith(before):
            raise InvalidRequest(
                f"{name}: the chat template does not continue the prompt with the answer; some templates drop reasoning from "
                "earlier turns, or write the last turn in another way: give one that does not, with --chat_template_path"
            )
        return after

    @staticmethod
    def _check_kind(answer: Any, name: str) -> None:
        if not isinstance(answer, Iterable) or isinstance(answer, (bytes, bytearray)):
            raise InvalidRequest(f"{name} must be a text, a message, or token ids, not {answer!r}")

    def _end(self, ids: list[int], prompt: Prompt, answer: Any, name: str, whole: bool) -> list[int]:
        """An answer's ids up to its end of sequence, and with one if it is `whole`."""
        length = next((i for i, token in enumerate(ids) if token in self.ends), None)
        if length is not None and (rest := self._visible(ids[length + 1 :])):
            # A template may write something behind an end. Nothing else may follow it: what is decoded ends there.
            tail = self.tokenize(self._tail(prompt, answer, name), name) if is_chat(prompt) else []
            behind = next((i + 1 for i, token in enumerate(tail) if token in self.ends), 0)
            if rest not in (self._visible(tail[behind:]), self._visible(tail)):
                end = self.tokenizer.decode([ids[length]])
                raise InvalidRequest(f"{name} goes on behind an end of sequence, '{end}', with {rest[:40]!r}: end it there")
        end_ids = ([*self.ends[:1]] if length is None else [ids[length]]) if whole else []
        ids = ids[:length] + end_ids
        if not ids:
            raise InvalidRequest(f"{name} is empty, and there is no end-of-sequence token to stand for that")
        return ids

    def _visible(self, ids: Sequence[int]) -> str:
        """The text of some ids without ends of sequence, and without spaces around it."""
        return str(self.tokenizer.decode([token for token in ids if token not in self.ends])).strip() if ids else ""


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements are alike from the beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _text(answer: Any) -> str:
    """The text that an answer says; '' of one that only calls tools, or whose content is in parts."""
    if isinstance(answer, str):
        return answer
    message = answer if isinstance(answer, Mapping) else answer[0]
    content = message.get("content")
    return content if isinstance(content, str) else ""
