"""`text_offset` and `echo`: a token is the text from its offset to the next one's, whole, streamed and with the prompt."""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving import running, table_service
from spellings import KINDS, SPECIAL, byte_tokens
from trimtab.decode.text import TextStream
from trimtab.models.table import TableLM
from trimtab.serve.offsets import Offsets, echo_ids, echo_text
from trimtab.serve.wire import TokenTexts

TOKENIZERS = {name: make() for name, make in KINDS.items()}
BROKEN = "\N{REPLACEMENT CHARACTER}"
each = pytest.mark.parametrize("kind", TOKENIZERS)


def slices(text: str, offsets: list[int]) -> list[str]:
    """Each token's part of a text."""
    assert offsets == sorted(offsets)
    return [text[start:end] for start, end in pairwise([*offsets, len(text)])]


@each
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_offsets_run_on_from_chunk_to_chunk(kind, data):
    """Of any tokens after any prompt: each slice is what the token added to the text."""
    tokenizer = TOKENIZERS[kind]
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=8)
    prompt, chunks = data.draw(ids), data.draw(st.lists(ids, max_size=4))
    stream, offsets = TextStream(tokenizer, prompt=prompt), Offsets(tokenizer, prompt, start=10)
    found, added = [], []
    for chunk in chunks:
        found += offsets.add(chunk)
        added += [stream.push(token) for token in chunk]
    stream.close()
    if added:
        assert slices("." * 10 + stream.text, found)[:-1] == added[:-1]
        assert found[0] == 10
        assert found[-1] == 10 + sum(map(len, added[:-1]))


@each
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["the", " cat", " sat", "é", ",", "</s>", SPECIAL, "<|user|>", "  ", " "]), min_size=1).map(
        "".join
    )
)
def test_an_echoed_text_has_the_tokens_that_it_was_made_of(kind, text):
    """Special tokens that are written there included, and a space that the tokenizer adds or the decoder drops is not there."""
    tokenizer = TOKENIZERS[kind]
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    texts, shown = TokenTexts(tokenizer), slices(text, echo_text(tokenizer, ids, text))
    assert "".join(shown) == text
    assert shown[0] == "" or kind in ("wordpiece", "word_ends")
    if kind in ("wordpiece", "word_ends"):
        return  # they know no spaces but single ones
    for token, mine in zip(ids[1:], shown[1:], strict=True):
        if not texts.text(token).startswith("bytes:"):
            assert mine.strip(" ") == texts.text(token).strip(" ")


def test_offsets_in_an_echoed_text_by_hand():
    tokenizer = TOKENIZERS["llama"]
    text = f"the cat{SPECIAL} sat"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "▁cat", SPECIAL, "▁sat"]
    assert echo_text(tokenizer, [tokenizer.bos_token_id, *ids], text) == [0, 0, 3, 7, 14]
    assert echo_ids(tokenizer, [tokenizer.bos_token_id, *ids], last=True) == ("the cat sat", [0, 0, 3, 7, 7])


def test_offsets_in_a_text_that_tokenizing_changed_stay_inside_it():
    tokenizer = TOKENIZERS["wordpiece"]
    ids = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    assert echo_text(tokenizer, ids, "THE CAT") == [0, 3]
    assert echo_text(tokenizer, ids * 3, "the") == [0, 3, 3, 3, 3, 3]


def test_bytes_at_the_end_of_echoed_ids_are_broken_only_if_nothing_follows():
    tokenizer = TOKENIZERS["llama"]
    ids = byte_tokens(tokenizer, b"a" + "北".encode()[:2])
    assert echo_ids(tokenizer, ids, last=False) == ("a", [0, 1, 1])
    assert echo_ids(tokenizer, ids, last=True) == (f"a{BROKEN}", [0, 1, 1])


# ---- over HTTP


@pytest.fixture(scope="module", params=["byte_level", "llama", "metaspace_first", "wordpiece"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def server(kind):
    """A model that says anything: parts of characters, special tokens, spaces."""
    table = TableLM.random(len(TOKENIZERS[kind]), order=1, seed=3)
    with running(table_service([table], tokenizer=TOKENIZERS[kind])) as running_server:
        yield running_server


def streamed(server, **body):
    """Texts, log-probabilities and offsets of each choice of a stream, joined."""
    lines = server.post("/v1/completions", **body, stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    choices = {}
    for line in lines[:-2]:
        (choice,) = json.loads(line.removeprefix("data: "))["choices"]
        joined = choices.setdefault(choice["index"], {"text": "", "text_offset": [], "tokens": [], "token_logprobs": []})
        joined["text"] += choice["text"]
        for name in ("text_offset", "tokens", "token_logprobs"):
            joined[name] += (choice["logprobs"] or {name: []})[name]
    return [choices[index] for index in sorted(choices)]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["the cat", f"the{SPECIAL} cat", "ids", "cut"])
def test_a_choices_tokens_are_its_text(server, kind, prompt, echo):
    """Whole or streamed, with the prompt or without; a token's slice is its text, but for what is no whole character."""
    tokenizer = TOKENIZERS[kind]
    if prompt == "cut" and kind == "wordpiece":
        prompt = "ids"
    if prompt == "ids":
        prompt = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    elif prompt == "cut":
        prompt = [*tokenizer("the", add_special_tokens=False)["input_ids"], *byte_tokens(tokenizer, "🙂".encode()[:3])]
    body = {
        "model": "base",
        "prompt": prompt,
        "n": 2,
        "logprobs": 0,
        "max_tokens": 40,
        "seed": 1,
        "ignore_eos": True,
        "echo": echo,
    }
    whole = server.complete(**body)["choices"]
    asked = prompt if isinstance(prompt, str) else echo_ids(tokenizer, prompt, last=False)[0]
    for choice, stream in zip(whole, streamed(server, **body), strict=True):
        scores = choice["logprobs"]
        assert stream == {"text": choice["text"], **{name: scores[name] for name in stream if name != "text"}}
        assert choice["text"].startswith(asked if echo else "")
        parts = slices(choice["text"], scores["text_offset"])
        assert "".join(parts) == choice["text"]
        plain = [(token, part) for token, part in zip(scores["tokens"], parts, strict=True) if not token.startswith("bytes:")]
        special = {added.content for added in tokenizer.added_tokens_decoder.values() if added.special}
        for token, part in plain[:-1]:
            if token in special:
                assert part in ("", token)
            else:
                assert part.lstrip(BROKEN).lstrip(" ") == token.lstrip(" ")
        assert sum(token not in special for token, _ in plain) >= 10
    alone = server.complete(**body | {"echo": False})["choices"]
    assert [choice["text"] for choice in whole] == [(asked if echo else "") + choice["text"] for choice in alone]


def test_a_prompt_alone_is_echoed_as_it_was_sent(server, kind):
    for prompt in ("the cat", f"the{SPECIAL} cat", " the  cat"):
        body = {"model": "base", "prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1}
        (choice,) = server.complete(**body)["choices"]
        assert choice["text"] == prompt
        assert "".join(slices(prompt, choice["logprobs"]["text_offset"])) == prompt
        (stream,) = streamed(server, **body)
        assert (stream["text"], stream["text_offset"]) == (prompt, choice["logprobs"]["text_offset"])


def test_a_special_token_stops_over_http(server, kind):
    """What comes before the first of them is the text."""
    likely = {TOKENIZERS[kind].convert_tokens_to_ids(SPECIAL): 3.0}
    body = {
        "model": "base",
        "prompt": "the",
        "logprobs": 0,
        "max_tokens": 200,
        "seed": 5,
        "ignore_eos": True,
        "logit_bias": likely,
    }
    (free,) = server.complete(**body)["choices"]
    at = free["logprobs"]["tokens"].index(SPECIAL)
    (stopped,) = server.complete(**body, stop=[SPECIAL])["choices"]
    assert stopped["finish_reason"] == "stop"
    assert stopped["logprobs"]["tokens"] == free["logprobs"]["tokens"][: at + 1]
    assert stopped["text"].rstrip(BROKEN) == free["text"][: free["logprobs"]["text_offset"][at]].rstrip(BROKEN)
    (stream,) = streamed(server, **body, stop=[SPECIAL])
    assert stream["text"] == stopped["text"]
    assert stream["text_offset"] == stopped["logprobs"]["text_offset"]
