"""The shapes are OpenAI's: exact dicts, and parsed by the types of OpenAI's own client where that is installed."""

import json
import math
from types import SimpleNamespace

import openai.types
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tiny import bpe_tokenizer, tiny_tokenizer
from trimtab.serve import wire
from trimtab.serve.wire import ChatStream, CompletionStream, TokenTexts, Usage

LETTERS = TokenTexts(tiny_tokenizer())
A, B, C = 1, 2, 3


def parsed(event):
    """The JSON of one event."""
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert b"\r" not in event
    return json.loads(event[6:])


def openai_type(name):
    return getattr(openai.types if hasattr(openai.types, name) else openai.types.chat, name)


def check(name, body):
    """OpenAI's type takes it and has no field that it does not know."""
    value = openai_type(name).model_validate(body)
    assert value.model_dump(exclude_unset=True) == body
    assert not value.model_extra


def test_an_error():
    assert wire.error_body("m", "invalid_request_error", "n", "c") == {
        "error": {"message": "m", "type": "invalid_request_error", "param": "n", "code": "c"}
    }


def test_the_models():
    card = wire.model_card("polite", 5, root="/aligners/polite", parent="base", max_model_len=64)
    assert card["max_model_len"] == 64
    assert wire.model_list([card]) == {"object": "list", "data": [card]}
    model = openai_type("Model").model_validate(card)
    assert (model.id, model.object, model.created, model.owned_by) == ("polite", "model", 5, "trimtab")


def test_a_completion():
    choices = [wire.completion_choice(i, "ab", "stop") for i in range(2)]
    body = wire.completion("cmpl-1", 5, "m", choices, Usage(3, 4, 2))
    assert body == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 5,
        "model": "m",
        "choices": [{"text": "ab", "index": i, "logprobs": None, "finish_reason": "stop"} for i in range(2)],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        | {"prompt_tokens_details": {"cached_tokens": 2}},
    }
    check("Completion", body)


def test_a_chat_completion():
    body = wire.chat_completion("chatcmpl-1", 5, "m", [wire.chat_choice(0, "ab", "length")], Usage(3, 4, 2))
    message = {"role": "assistant", "content": "ab", "refusal": None}
    assert body == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 5,
        "model": "m",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
        | {"prompt_tokens_details": {"cached_tokens": 2}},
    }
    check("ChatCompletion", body)


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_events_of_a_chat(include_usage):
    stream = ChatStream("chatcmpl-1", 5, 'm"é', include_usage=include_usage)
    events = [stream.start(1), stream.text(1, "a\n"), stream.end(1, "stop")]
    deltas = [({"role": "assistant", "content": ""}, None), ({"content": "a\n"}, None), ({}, "stop")]
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": 'm"é'}
    null = {"usage": None} if include_usage else {}
    for event, (delta, reason) in zip(events, deltas, strict=True):
        choice = {"index": 1, "delta": delta, "logprobs": None, "finish_reason": reason}
        assert parsed(event) == head | {"choices": [choice]} | null
        check("ChatCompletionChunk", parsed(event))
    last = parsed(stream.usage(Usage(1, 2)))
    assert last == head | {"choices": [], "usage": Usage(1, 2).as_dict()}
    check("ChatCompletionChunk", last)


@pytest.mark.parametrize("include_usage", [False, True])
def test_the_events_of_a_completion(include_usage):
    stream = CompletionStream("cmpl-1", 5, "m", include_usage=include_usage)
    head = {"id": "cmpl-1", "object": "text_completion", "created": 5, "model": "m"}
    null = {"usage": None} if include_usage else {}
    logprobs = wire.completion_logprobs(LETTERS, [A], [-1.0], [[(A, -1.0)]], [0])
    for event, lp, reason in (
        (stream.text(0, "a"), None, None),
        (stream.text(0, "a", None, "stop"), None, "stop"),
        (stream.text(0, "a", logprobs), logprobs, None),
        (stream.text(0, "a", logprobs, "length"), logprobs, "length"),
    ):
        assert parsed(event) == head | {"choices": [{"index": 0, "text": "a", "logprobs": lp, "finish_reason": reason}]} | null
    check("Completion", parsed(stream.text(0, "a", logprobs, "length")))
    assert parsed(stream.usage(Usage(1, 2)))["choices"] == []


def test_chat_events_carry_log_probabilities():
    logprobs = wire.chat_logprobs(LETTERS, [A], [-1.0], [[(B, -0.5), (A, -1.0)]])
    body = parsed(ChatStream("c", 5, "m").text(0, "a", logprobs))
    assert body["choices"][0]["logprobs"] == logprobs
    check("ChatCompletionChunk", body)


def test_a_plain_event():
    assert wire.sse({"a": "é"}) == 'data: {"a":"é"}\n\n'.encode()
    assert wire.DONE == b"data: [DONE]\n\n"


@given(st.text())
def test_any_text_survives_a_stream(text):
    """Also through clients that split lines wherever Unicode has one; a lone surrogate becomes a question mark."""
    want = text.encode("utf-8", "replace").decode()
    for event in (ChatStream("c", 5, text).text(0, text), wire.sse({"model": text, "choices": [{"delta": {"content": text}}]})):
        assert parsed(event)["choices"][0]["delta"]["content"] == want
        assert parsed(event)["model"] == want
        assert len(event.decode().splitlines()) == 2
    assert json.loads(wire.dumps([text])) == [want]


# ---- tokens


def sentencepiece_like():
    """Llama's way: a mark for spaces, the first of which is dropped, and bytes as pieces of their own."""
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, "<0xE2>": 3, "<0x41>": 4, "▁": 5}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_bytes_of_byte_level_tokens_join_to_those_of_the_text():
    tokenizer = bpe_tokenizer(["naïve 日本 🙂 naïve"])
    texts = TokenTexts(tokenizer)
    text = "a naïve 日本語 🙂\n\t ▁ \x00"
    tokens = tokenizer(text)["input_ids"]
    assert bytes(byte for token in tokens for byte in texts.utf8(token)) == text.encode()
    for token in tokens:
        raw = bytes(texts.utf8(token))
        if texts.text(token).startswith("bytes:"):
            with pytest.raises(UnicodeDecodeError):
                raw.decode()
        else:
            assert texts.text(token) == raw.decode()


def test_every_byte_has_a_token_and_every_token_its_bytes():
    tokenizer = bpe_tokenizer(["a"], merges=0)
    texts = TokenTexts(tokenizer)
    found = sorted(texts.utf8(token)[0] for token in range(1, 257))
    assert found == list(range(256))


def test_a_part_of_a_character_is_written_as_its_bytes():
    tokenizer = bpe_tokenizer(["a"], merges=0)
    texts = TokenTexts(tokenizer)
    tokens = tokenizer("▁")["input_ids"]
    assert [texts.text(token) for token in tokens] == ["bytes:\\xe2", "bytes:\\x96", "bytes:\\x81"]
    assert [texts.utf8(token) for token in tokens] == [[0xE2], [0x96], [0x81]]


def test_tokens_of_other_vocabularies_keep_their_space():
    texts = TokenTexts(sentencepiece_like())
    assert [texts.text(token) for token in (1, 2, 3, 4, 5)] == [" a", "b", "bytes:\\xe2", "A", " "]
    assert texts.utf8(3) == [0xE2]


def test_added_tokens_are_written_as_they_are():
    tokenizer = bpe_tokenizer(["a"])
    tokenizer.add_tokens(["Ġé <x>"])
    token = tokenizer.convert_tokens_to_ids("Ġé <x>")
    assert TokenTexts(tokenizer).text(token) == "Ġé <x>"
    assert TokenTexts(tokenizer).text(0) == "<eos>"


def test_an_id_without_a_token_is_called_by_its_number():
    assert (TokenTexts(None).text(7), TokenTexts(None).utf8(7)) == ("token_id:7", None)
    assert (LETTERS.text(99), LETTERS.utf8(99)) == ("token_id:99", None)


# ---- log-probabilities


def test_log_probabilities_of_a_completion():
    tops = [None, [(A, -0.1), (B, -2.0)], [(A, -0.1), (B, -2.0)]]
    assert wire.completion_logprobs(LETTERS, [C, A, C], [None, -0.1, -math.inf], tops, [4, 5, 6]) == {
        "text_offset": [4, 5, 6],
        "token_logprobs": [None, -0.1, -9999.0],
        "tokens": ["c", "a", "c"],
        "top_logprobs": [None, {"a": -0.1, "b": -2.0}, {"a": -0.1, "b": -2.0, "c": -9999.0}],
    }


def test_without_alternatives_there_is_the_token_itself():
    assert wire.completion_logprobs(LETTERS, [A], [-1.0], [None], [0])["top_logprobs"] == [{"a": -1.0}]
    assert wire.completion_logprobs(LETTERS, [A], [-1.0], [[]], [0])["top_logprobs"] == [{"a": -1.0}]


def test_tokens_of_the_same_text_do_not_hide_each_other():
    vocab = {"b": 1, "x": 2, "x ": 3}
    names = {index: name.strip() for name, index in vocab.items()}
    tokenizer = SimpleNamespace(
        convert_ids_to_tokens=names.get, decode=lambda ids, **settings: "".join(names[index] for index in ids)
    )
    found = wire.completion_logprobs(TokenTexts(tokenizer), [3], [-2.0], [[(2, -0.5), (1, -1.0)]], [0])
    assert found["top_logprobs"] == [{"x": -0.5, "b": -1.0, "token_id:3": -2.0}]
    assert max(found["top_logprobs"][0], key=found["top_logprobs"][0].get) == "x"


def test_log_probabilities_of_a_chat():
    found = wire.chat_logprobs(LETTERS, [B], [-2.0], [[(A, -0.1), (C, -math.inf)]])
    assert found == {
        "content": [
            {
                "token": "b",
                "logprob": -2.0,
                "bytes": [98],
                "top_logprobs": [
                    {"token": "a", "logprob": -0.1, "bytes": [97]},
                    {"token": "c", "logprob": -9999.0, "bytes": [99]},
                ],
            }
        ],
        "refusal": None,
    }
    check("ChatCompletion", wire.chat_completion("c", 5, "m", [wire.chat_choice(0, "b", "stop", found)], Usage(1, 1)))


def test_lists_of_different_lengths_are_a_mistake():
    with pytest.raises(ValueError, match="zip"):
        wire.completion_logprobs(LETTERS, [A], [-1.0], [], [0])
