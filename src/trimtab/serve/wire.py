"""What clients receive: OpenAI's response shapes as plain dicts, and as bytes where they are sent once for each token.

`completion` and `chat_completion` build whole answers. `CompletionStream` and `ChatStream` build the events of a stream around
text prepared beforehand, so that a token costs little more than quoting it. `TokenTexts` says how a token is written in
log-probabilities. Log-probabilities are natural; −inf, which JSON does not have, is written as −9999.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, NamedTuple

from trimtab.decode.spelling import Spelling

__all__ = [
    "DONE",
    "ChatStream",
    "CompletionStream",
    "TokenTexts",
    "TopLogprobs",
    "Usage",
    "chat_choice",
    "chat_completion",
    "chat_logprobs",
    "completion",
    "completion_choice",
    "completion_logprobs",
    "dumps",
    "error_body",
    "model_card",
    "model_list",
    "sse",
]

TopLogprobs = Sequence[tuple[int, float]]
"""Ids with their log-probabilities, the best first."""

MIN_LOGPROB = -9999.0
"""What −inf is written as; vLLM and OpenAI do the same."""

_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
"""Not line ends to JSON or to event streams, but to clients that split text with `str.splitlines`."""
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def _json(value: Any) -> str:
    text = _encode(value)
    return text if text.isascii() else text.translate(_LINE_ENDS)


def _quote(text: str) -> str:
    """`_json` of a text, without an encoder's overhead."""
    quoted = encode_basestring(text)
    return quoted if quoted.isascii() else quoted.translate(_LINE_ENDS)


def dumps(value: Any) -> bytes:
    """Compact JSON in UTF-8; a lone surrogate, which UTF-8 does not have, becomes `?`."""
    return _json(value).encode("utf-8", "replace")


def sse(data: Mapping[str, Any] | str) -> bytes:
    """One server-sent event; a `str` is sent as it is, and must be one line."""
    text = data if isinstance(data, str) else _json(data)
    return f"data: {text}\n\n".encode("utf-8", "replace")


DONE = sse("[DONE]")
"""The event that ends a stream."""


def error_body(message: str, type: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": type, "param": param, "code": code}}


class Usage(NamedTuple):
    """Tokens of a request: each prompt once, those of prompts that were read before, and all that was generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's usage object."""
        prompt, completed, cached = self
        counts = {"prompt_tokens": prompt, "completion_tokens": completed, "total_tokens": prompt + completed}
        return counts | {"prompt_tokens_details": {"cached_tokens": cached}}


def model_card(
    name: str, created: int, *, root: str, parent: str | None = None, max_model_len: int | None = None
) -> dict[str, Any]:
    """One entry of `/v1/models`.

    As in vLLM, `root` is where it was loaded from, `parent` an aligner's base, and `max_model_len` the tokens that a context
    holds, if that is known: not of an aligner that is not in memory.
    """
    card = {"id": name, "object": "model", "created": created, "owned_by": "trimtab", "root": root, "parent": parent}
    return card | {"max_model_len": max_model_len}


def model_list(cards: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer of `/v1/models`."""
    return {"object": "list", "data": list(cards)}


# ---- whole answers


def beside(error: str | None, handover_at: int | None = None) -> dict[str, Any]:
    """What a choice has that OpenAI's do not: why, with the finish reason `error`; where it was handed over, if it was."""
    found = {} if error is None else error_body(error, "invalid_request_error", code="dead_row")
    return found if handover_at is None else found | {"handover_at": handover_at}


def completion_choice(index: int, text: str, finish_reason: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One choice of a completion; `logprobs` from `completion_logprobs`."""
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish_reason}


def completion(id: str, created: int, model: str, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
    """The answer of `/v1/completions`; `created` in seconds since 1970."""
    return _answer(id, "text_completion", created, model, choices, usage)


def chat_choice(index: int, text: str, finish_reason: str, logprobs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One choice of a chat completion; `logprobs` from `chat_logprobs`."""
    message = {"role": "assistant", "content": text, "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def chat_completion(id: str, created: int, model: str, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
    """The answer of `/v1/chat/completions`; `created` in seconds since 1970."""
    return _answer(id, "chat.completion", created, model, choices, usage)


def _answer(id: str, kind: str, created: int, model: str, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
    head = {"id": id, "object": kind, "created": created, "model": model}
    return head | {"choices": list(choices), "usage": usage.as_dict()}


# ---- streams


class _Stream:
    """Events of one answer: what is the same in all of them is made once."""

    def __init__(self, kind: str, id: str, created: int, model: str, include_usage: bool) -> None:
        self._head = f"data: {_json({'id': id, 'object': kind, 'created': created, 'model': model})[:-1]},"
        self._end = "]%s}\n\n" % (',"usage":null' if include_usage else "")
        self._plain = '"logprobs":null,"finish_reason":null}' + self._end

    def usage(self, usage: Usage) -> bytes:
        """The last event, without choices; only for `include_usage`."""
        return f'{self._head}"choices":[],"usage":{_json(usage.as_dict())}}}\n\n'.encode("utf-8", "replace")

    def _tail(
        self,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        error: str | None = None,
        handover_at: int | None = None,
    ) -> str:
        """What follows a choice's text."""
        if logprobs is None and finish_reason is None:
            return self._plain
        tail = {"logprobs": logprobs, "finish_reason": finish_reason, **beside(error, handover_at)}
        return f"{_json(tail)[1:]}{self._end}"


class CompletionStream(_Stream):
    """Events of a streamed `/v1/completions`.

    Args:
        id, created, model: the same on each event.
        include_usage: events have a null `usage`, and `usage` is to be sent last.
    """

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        super().__init__("text_completion", id, created, model, include_usage)

    def text(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        error: str | None = None,
        handover_at: int | None = None,
    ) -> bytes:
        """More text of a choice; the last event of a choice has a finish reason, and what `beside` has."""
        tail = self._tail(logprobs, finish_reason, error, handover_at)
        return f'{self._head}"choices":[{{"index":{index},"text":{_quote(text)},{tail}'.encode("utf-8", "replace")


class ChatStream(_Stream):
    """Events of a streamed `/v1/chat/completions`: for each choice `start`, then `text` any number of times, then `end`.

    Args:
        id, created, model: the same on each event.
        include_usage: events have a null `usage`, and `usage` is to be sent last.
    """

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool = False) -> None:
        super().__init__("chat.completion.chunk", id, created, model, include_usage)

    def start(self, index: int) -> bytes:
        """The role, before any text."""
        return self._event(index, '{"role":"assistant","content":""}', self._plain)

    def text(self, index: int, text: str, logprobs: Mapping[str, Any] | None = None) -> bytes:
        """More text of a choice."""
        return self._event(index, f'{{"content":{_quote(text)}}}', self._tail(logprobs, None))

    def end(self, index: int, finish_reason: str, error: str | None = None, handover_at: int | None = None) -> bytes:
        """Nothing more follows in this choice; it has what `beside` has."""
        return self._event(index, "{}", self._tail(None, finish_reason, error, handover_at))

    def _event(self, index: int, delta: str, tail: str) -> bytes:
        return f'{self._head}"choices":[{{"index":{index},"delta":{delta},{tail}'.encode("utf-8", "replace")


# ---- log-probabilities


class TokenTexts:
    r"""How tokens are written where they stand alone.

    A token of a byte-level vocabulary may be part of a character. It has right bytes all the same, and its text is written as
    OpenAI writes it: `bytes:\\xe2\\x96`.

    Args:
        tokenizer: a transformers tokenizer, or None where there is no text: a token is then `token_id:7`, without bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._spelling = None if tokenizer is None else Spelling(tokenizer)
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def text(self, token: int) -> str:
        """The token's text, with the space in front of it that many vocabularies have."""
        return self._look_up(token)[0]

    def utf8(self, token: int) -> list[int] | None:
        """The token's bytes; None if it has none."""
        raw = self._look_up(token)[1]
        return None if raw is None else list(raw)

    def _look_up(self, token: int) -> tuple[str, bytes | None]:
        if token not in self._known:
            self._known[token] = self._describe(token)
        return self._known[token]

    def _describe(self, token: int) -> tuple[str, bytes | None]:
        piece = None if self._spelling is None else self._spelling.piece(token)
        if self._spelling is None or piece is None:
            return f"token_id:{token}", None
        raw = piece.encode() if self._spelling.is_special(token) else self._spelling.bytes_of(token)
        if raw is None:  # the first of a text loses its space in some vocabularies, the second does not
            raw = self._spelling.after([token], [token]).encode(errors="replace")
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return f"bytes:{repr(raw)[2:-1]}", raw


def completion_logprobs(
    texts: TokenTexts,
    tokens: Sequence[int],
    logprobs: Sequence[float | None],
    tops: Sequence[TopLogprobs | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """`logprobs` of a completion's choice.

    Args:
        texts: how tokens are written.
        tokens: the ids.
        logprobs: of each; None for the first token of an echoed prompt, which nothing predicts.
        tops: the best tokens of each position; None where `logprobs` is. The token itself is added if it is not among them,
            and a token with the text of a better one is called by its id, such as `token_id:7`.
        offsets: where each token begins in the choice's text, in characters.
    """
    return {
        "text_offset": list(offsets),
        "token_logprobs": [None if logprob is None else _finite(logprob) for logprob in logprobs],
        "tokens": [texts.text(token) for token in tokens],
        "top_logprobs": [
            None if logprob is None else _by_text(texts, {**dict(top or ()), token: logprob})
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        ],
    }


def _by_text(texts: TokenTexts, top: Mapping[int, float]) -> dict[str, float]:
    named: dict[str, float] = {}
    for token, logprob in top.items():
        text = texts.text(token)
        named[f"token_id:{token}" if text in named else text] = _finite(logprob)
    return named


def chat_logprobs(
    texts: TokenTexts, tokens: Sequence[int], logprobs: Sequence[float], tops: Sequence[TopLogprobs]
) -> dict[str, Any]:
    """`logprobs` of a chat completion's choice or event: tokens with their log-probabilities and the best of each position."""
    return {
        "content": [
            _token(texts, token, logprob) | {"top_logprobs": [_token(texts, *other) for other in top]}
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True)
        ],
        "refusal": None,
    }


def _token(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": _finite(logprob), "bytes": texts.utf8(token)}


def _finite(logprob: float) -> float:
    return max(logprob, MIN_LOGPROB)
