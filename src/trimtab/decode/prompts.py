"""From what users write (texts, chat messages, token ids) to token ids, checked before any model runs."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trimtab.decode.request import Prompt
from trimtab.errors import InvalidRequest

__all__ = ["as_list", "encode_chat", "encode_completion", "encode_prompt", "encode_text", "is_chat"]


def as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or several; tensors and arrays count as the lists they hold."""
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if isinstance(prompts, (str, Mapping)):
        return [prompts] if isinstance(prompts, str) else [[prompts]]
    if not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts must be texts, messages or token ids, not {prompts!r}")
    items: list[Any] = list(prompts)
    if items and isinstance(items[0], (Mapping, int)):
        return [items]
    return items


def is_chat(prompt: object) -> bool:
    """Whether a prompt is a list of messages; one message makes it one, and `render_chat` names what is none."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(item, Mapping) for item in prompt)


def encode_prompt(tokenizer: Any, prompt: Prompt, vocab_size: int, name: str) -> list[int]:
    """Ids of a prompt, with the special tokens that the tokenizer puts first.

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
        ids = encode_text(tokenizer, prompt, name, special=True)
    elif is_chat(prompt):
        ids = encode_chat(tokenizer, prompt, name)
    else:
        ids = list(prompt)
    if not ids:
        raise InvalidRequest(f"{name} is empty: give at least one message or token id")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequest(f"{name} must be a text, messages, or ids from 0 to {vocab_size - 1}, not {token!r}")
    return ids


def encode_text(tokenizer: Any, text: str, name: str, *, special: bool) -> list[int]:
    """Ids of a text; never empty."""
    if tokenizer is None:
        raise InvalidRequest(f"{name} is a text, but this model was made without a tokenizer: give token ids")
    ids = _tokenize(tokenizer, text, name, special=special)
    if not ids:
        raise InvalidRequest(f"{name} has no tokens")
    return ids


def encode_chat(tokenizer: Any, messages: Any, name: str, *, answer: bool = True) -> list[int]:
    """Ids of a conversation by the tokenizer's chat template; with `answer`, up to where the assistant begins."""
    return _tokenize(tokenizer, render_chat(tokenizer, messages, name, answer=answer), name, special=False)


def _tokenize(tokenizer: Any, text: str, name: str, *, special: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"{name} is no valid Unicode: a lone surrogate at character {error.start}") from None
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def render_chat(tokenizer: Any, messages: Any, name: str, *, answer: bool) -> str:
    """The text of a conversation by the tokenizer's chat template."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise InvalidRequest(f"{name}[{i}] must be a message with 'role' and 'content', not {message!r}")
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise InvalidRequest(f"{name} is a chat, but the tokenizer has no chat template: give a text instead")
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer))
    except Exception as error:  # a template is a program of its own, and may raise whatever it likes
        raise InvalidRequest(f"{name}: the chat template refuses it: {error}") from error


def encode_completion(
    tokenizer: Any, prompt: Prompt, completion: Any, eos_token_ids: Sequence[int], name: str, *, ended: bool = True
) -> list[int]:
    """Ids of a completion as it follows its prompt; if it `ended`, with the end of sequence, if there is one, last.

    A text after a text is encoded by itself, as decoding would produce it after the prompt's last token. A message (or a list
    with one, or a text after a chat, which is the assistant's) is what the chat template adds to the prompt's messages, up to
    the first end of sequence, which is the template's own.
    """
    end = list(eos_token_ids[:1])
    if isinstance(completion, str) and is_chat(prompt):
        completion = {"role": "assistant", "content": completion}
    if isinstance(completion, str):
        ids = encode_text(tokenizer, completion, name, special=False) if completion else []
    else:
        if not isinstance(completion, Iterable) or isinstance(completion, (bytes, bytearray)):
            raise InvalidRequest(f"{name} must be a text, a message, or token ids, not {completion!r}")
        if not is_chat(prompt):
            raise InvalidRequest(f"{name} is a message, but its prompt is no chat")
        answer = [completion] if isinstance(completion, Mapping) else list(completion)
        if len(answer) != 1:
            raise InvalidRequest(f"{name} must be one message, not {len(answer)}: end the prompt before the last answer")
        before = render_chat(tokenizer, prompt, name, answer=True)
        after = render_chat(tokenizer, [*prompt, *answer], name, answer=False)
        if not after.startswith(before):
            raise InvalidRequest(f"{name}: the chat template does not continue the prompt with the answer")
        ids = _tokenize(tokenizer, after[len(before) :], name, special=False)
        length = next((i for i, token in enumerate(ids) if token in eos_token_ids), len(ids))
        ids, end = ids[:length], ids[length : length + 1] or end
    ids += end if ended else []
    if not ids:
        raise InvalidRequest(f"{name} is empty, and there is no end-of-sequence token to stand for that")
    return ids
