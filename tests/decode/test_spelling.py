"""Texts of tokenizers of every kind: where a completion goes on with its prompt, bytes that are no text, special tokens."""

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders

from spellings import KINDS, SPECIAL, TEXT, byte_tokens
from tiny import ScriptedLM
from trimtab import AlignedModel, Completion, SamplingParams
from trimtab.decode.text import TextStream

TOKENIZERS = {name: make() for name, make in KINDS.items()}
BYTES = [name for name in TOKENIZERS if name not in ("wordpiece", "word_ends")]
SPACED = [name for name in BYTES if name != "byte_level"]
BROKEN = "\N{REPLACEMENT CHARACTER}"

each = pytest.mark.parametrize("kind", TOKENIZERS)
each_with_bytes = pytest.mark.parametrize("kind", BYTES)


def encode(kind: str, text: str) -> list[int]:
    return list(TOKENIZERS[kind](text, add_special_tokens=False)["input_ids"])


def decode(kind: str, tokens: list[int]) -> str:
    return TOKENIZERS[kind].decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def one(kind: str, piece: str) -> int:
    token = TOKENIZERS[kind].convert_tokens_to_ids(piece)
    assert token != TOKENIZERS[kind].unk_token_id
    return token


def shown(kind: str, tokens: list[int], prompt: Sequence[int] = ()) -> list[str]:
    """What each token adds, and last what the end adds."""
    stream = TextStream(TOKENIZERS[kind], prompt=prompt)
    texts = [stream.push(token) for token in tokens]
    texts.append(stream.close())
    assert "".join(texts) == stream.text
    return texts


def said(kind: str, prompt, script: list[int], length: int, **asked) -> Completion:
    """What a model says that writes `script` after a prompt of `length` tokens, the same whole, streamed and twice."""
    size = len(TOKENIZERS[kind])
    model = AlignedModel(
        ScriptedLM([0] * (length - 1) + script, size), tokenizer=TOKENIZERS[kind], eos_token_ids=[one(kind, "</s>")]
    )
    params = SamplingParams(**{"max_tokens": len(script), "seed": 0, "n": 2, **asked})
    whole = model.generate([prompt], params)
    pieces = ["", ""]
    for event in model.stream([prompt], params):
        pieces[event.index] += event.text
        if event.completion is not None:
            assert event.completion == whole[event.index]
    assert pieces == [completion.text for completion in whole]
    assert pieces[0] == pieces[1]
    return whole[0]


# ---- the beginning of a completion


@each
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.sampled_from("  thecatonm,.é")), st.data())
def test_a_prompt_and_its_completion_decode_as_one_text(kind, text, data):
    """Wherever the border is: the completion is what the whole has after the prompt's text."""
    tokens = encode(kind, f"the{text}")
    at = data.draw(st.integers(0, len(tokens)))
    prompt, completion = tokens[:at], tokens[at:]
    before = "".join(shown(kind, prompt)[:-1])  # an incomplete character at the end is the completion's
    assert before + "".join(shown(kind, completion, prompt)) == decode(kind, tokens)


@pytest.mark.parametrize("kind", SPACED)
def test_the_first_space_of_a_completion_is_kept(kind):
    prompt, word = "the", one(kind, "▁cat")
    ids = encode(kind, prompt)
    for asked in (prompt, ids):
        assert said(kind, asked, [word], len(ids)).text == " cat"
        assert said(kind, asked, [word, word], len(ids), stop=" cat cat").text == ""
        assert said(kind, asked, [word, word], len(ids), stop="t c").text == " ca"


@each
def test_the_answer_of_a_chat_is_a_text_of_its_own(kind):
    """As the decoder has it alone, without the space that a text's beginning loses."""
    chat = [{"role": "user", "content": "the cat"}]
    length = len(encode(kind, "the cat</s>"))
    script = encode(kind, "sat on")
    assert said(kind, chat, script, length).text == decode(kind, script)
    assert decode(kind, script).lstrip() == "sat on"


@pytest.mark.parametrize("kind", SPACED)
def test_after_nothing_but_special_tokens_a_text_begins(kind):
    begin = one(kind, "<s>")
    script = [one(kind, "▁cat"), one(kind, "▁sat")]
    assert said(kind, [begin], script, 1).text == decode(kind, [begin, *script])
    assert decode(kind, script) == (" cat sat" if kind in ("gemma", "metaspace_never") else "cat sat")


@each
def test_special_tokens_at_the_border_change_nothing(kind):
    end = one(kind, SPECIAL)
    prompt, script = encode(kind, "the cat"), encode(kind, "the cat sat")[-2:]
    plain = said(kind, prompt, script, len(prompt))
    assert said(kind, [*prompt, end, end], [end, *script], len(prompt) + 2).text == plain.text
    assert "".join(shown(kind, prompt)) + plain.text == decode(kind, [*prompt, *script])


@each_with_bytes
def test_a_character_that_the_prompt_begins_is_the_completions(kind):
    """And where it never becomes one, the broken bytes are: prompt and completion are one text in either case."""
    raw = "北".encode()
    prompt = [*encode(kind, "the cat"), *byte_tokens(TOKENIZERS[kind], raw[:2])]
    assert said(kind, prompt, byte_tokens(TOKENIZERS[kind], raw[2:] + b"x"), len(prompt)).text == "北x"
    assert said(kind, prompt, byte_tokens(TOKENIZERS[kind], b"x"), len(prompt)).text == f"{BROKEN}x"


def test_a_long_prompt_is_not_decoded_again_at_each_token(monkeypatch):
    """Nothing longer than a few tokens is ever decoded."""
    tokenizer = KINDS["llama"]()
    lengths, whole = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **settings: lengths.append(len(ids)) or whole(ids, **settings))
    word = one("llama", "▁cat")
    stream = TextStream(tokenizer, ["zz"], [word] * 5000)
    text = "".join(stream.push(word) for _ in range(300)) + stream.close()
    assert text == " cat" * 300
    assert max(lengths) < 12
    assert len(lengths) < 5 * 300 + 50


# ---- bytes


RUNS = st.lists(
    st.binary(min_size=1, max_size=4)
    | st.sampled_from(["é".encode(), "北京".encode(), "🙂".encode(), "▁".encode(), b" ", "🙂".encode()[:3], b"\xe4\xbd"]),
    max_size=8,
).map(b"".join)


@each_with_bytes
@settings(max_examples=120, deadline=None, derandomize=True)
@given(RUNS, st.data())
def test_bytes_are_read_as_utf8_whatever_they_are(kind, raw, data):
    """Each character once, as soon as it is whole, and one broken character for each maximal part of what is none."""
    tokenizer, reader = TOKENIZERS[kind], codecs.getincrementaldecoder("utf-8")("replace")
    cut = data.draw(st.integers(0, len(raw)))
    tokens = byte_tokens(tokenizer, raw)
    prompt = encode(kind, "the cat")
    texts = shown(kind, [*tokens[:cut], one(kind, SPECIAL), *tokens[cut:]], prompt)
    assert texts.pop(cut) == ""
    assert texts == [*(reader.decode(bytes([byte])) for byte in raw), reader.decode(b"", final=True)]
    assert "".join(texts) == raw.decode("utf-8", "replace")


@each_with_bytes
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(RUNS | st.sampled_from([" cat", "the", ",", "é"]), max_size=8))
def test_bytes_among_other_tokens(kind, parts):
    """What is no byte of its own is spelled by the decoder, whatever the bytes before it are."""
    prompt, tokens, expected = encode(kind, "the"), [], b""
    for part in parts:
        raw = part if isinstance(part, bytes) else part.encode()
        tokens += byte_tokens(TOKENIZERS[kind], raw) if isinstance(part, bytes) else encode(kind, f"a{part}")[-1:]
        expected += raw if isinstance(part, bytes) else TOKENIZERS[kind].decode([*encode(kind, "a"), tokens[-1]])[1:].encode()
    assert "".join(shown(kind, tokens, [*prompt, *encode(kind, "a")])) == expected.decode("utf-8", "replace")


@each_with_bytes
def test_a_bad_byte_takes_no_character_back(kind):
    """The run of bytes 你 好 E4: the decoder of byte fallback would break all seven."""
    tokens = byte_tokens(TOKENIZERS[kind], "你好".encode() + b"\xe4")
    texts = shown(kind, [*tokens, *encode(kind, "thez")[-1:]], encode(kind, "the"))
    assert texts == ["", "", "你", "", "", "好", "", f"{BROKEN}z", ""]
    assert said(kind, "the", tokens, len(encode(kind, "the"))).text == f"你好{BROKEN}"


@each_with_bytes
def test_a_text_that_begins_with_bytes(kind):
    """Without a prompt's text; a space that a byte spells is dropped there if a space is."""
    tokenizer = TOKENIZERS[kind]
    for raw in (b"\xe4\xbd\xa0", b"a b", b"\xff a", b" a"):
        tokens = byte_tokens(tokenizer, raw)
        text = "".join(shown(kind, tokens))
        assert text == raw.decode("utf-8", "replace") or text == decode(kind, tokens)
    assert "".join(shown(kind, [*byte_tokens(tokenizer, b"\xe4"), *encode(kind, "the cat")[-1:]])).startswith(BROKEN + " ca")


def test_a_vocabulary_whose_bytes_cannot_be_known():
    """A decoder of bytes in front of another: characters wait for all of their tokens."""
    tokenizer = KINDS["byte_level"]()
    tokens = byte_tokens(tokenizer, "a北🙂".encode() + b"\xe4")
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "A")])
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in tokens] == ["A", "", "", "北", "", "", "", "🙂", ""]
    assert stream.close() == BROKEN


# ---- special tokens in stop texts


@each
@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("piece", [SPECIAL, "</s>", "<|user|>"])
def test_a_stop_text_that_is_an_added_token(kind, piece, ignore_eos):
    """Special, or the end of sequence, or an added token that is part of the text."""
    prompt = encode(kind, "the")
    words = encode(kind, "the cat sat on")[len(prompt) :]
    script = [*words[:2], one(kind, piece), *words[2:]]
    completion = said(kind, prompt, script, len(prompt), stop=piece, ignore_eos=ignore_eos)
    assert completion.finish_reason == "stop"
    assert completion.tokens == script[:3]
    assert completion.text.rstrip(" ") == "".join(shown(kind, words[:2], prompt))
    without = said(kind, prompt, script, len(prompt), stop="zz", ignore_eos=True)
    assert without.tokens == script
    assert (piece in without.text) == (piece == "<|user|>")


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "word_ends"])  # the text after a mark depends on it
@pytest.mark.parametrize("piece", [SPECIAL, "</s>"])
def test_a_stop_text_that_contains_a_special_token(kind, piece):
    """Text before it, after it and on both sides; what only begins like it is shown, but for the special token."""
    prompt = encode(kind, "the")
    before, after = encode(kind, "the,")[-1], encode(kind, "the.")[-1]
    alone = {token: "".join(shown(kind, [token], prompt)) for token in (before, after)}
    script = [before, one(kind, piece), after]
    # A word of WordPiece begins with a space, and so does a special token there.
    written = TOKENIZERS[kind].decode([*prompt, *script], skip_special_tokens=False)[len(decode(kind, prompt)) :]
    at = written.index(piece)
    for start, stop in ((0, len(written)), (0, at + len(piece)), (at, len(written)), (at, at + len(piece))):
        completion = said(kind, prompt, script, len(prompt), stop=written[start:stop], ignore_eos=True)
        assert (completion.text, completion.finish_reason) == ("" if start == 0 else alone[before], "stop")
    for stop in (f"{written}!", f"{written[at:]}!", f"{written[:at]}{piece}!"):
        completion = said(kind, prompt, script, len(prompt), stop=stop, ignore_eos=True)
        assert completion.text == decode(kind, [*prompt, *script])[len(decode(kind, prompt)) :]
        assert completion.finish_reason == "length"


@each_with_bytes
def test_a_stop_text_is_seen_across_special_tokens(kind):
    """What is delivered never has a stop text in it, whatever was left out; what only begins like one is all shown."""
    prompt = encode(kind, "the")
    a, b, c = byte_tokens(TOKENIZERS[kind], b"abc")
    script = [c, a, one(kind, SPECIAL), one(kind, "</s>"), b, c]
    for stop, text in (("ab", "c"), (f"a{SPECIAL}</s>b", "c"), ("</s>b", "ca"), (["abd", f"a{SPECIAL}b"], "cabc")):
        completion = said(kind, prompt, script, len(prompt), stop=stop, ignore_eos=True)
        assert completion.text == text
        assert completion.tokens == (script if text == "cabc" else script[:5])


@each
def test_the_end_of_sequence_is_seen_by_stop_texts_though_it_ends_anyhow(kind):
    """`,</s>` is cut from the text as any stop text is, and a comma without the end is not."""
    prompt = encode(kind, "the")
    comma, end = encode(kind, "the,")[-1], one(kind, "</s>")
    written = TOKENIZERS[kind].decode([*prompt, comma, end], skip_special_tokens=False)[len(decode(kind, prompt)) :]
    completion = said(kind, prompt, [comma, comma, end], len(prompt), stop=written)
    assert completion.text == "".join(shown(kind, [comma], prompt))
    assert (completion.tokens, completion.finish_reason) == ([comma, comma, end], "stop")


@each_with_bytes
def test_a_special_token_that_is_spelled_in_letters_stops_too(kind):
    """A model may write its characters one by one."""
    prompt, letters = encode(kind, "the"), byte_tokens(TOKENIZERS[kind], b"ab" + SPECIAL.encode() + b"c")
    completion = said(kind, prompt, letters, len(prompt), stop=["</s>", SPECIAL])
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert completion.tokens == letters[:-1]


@each_with_bytes
def test_a_special_token_stops_behind_an_incomplete_character(kind):
    """Nothing follows, so what is there is shown as broken; without the stop it would become whole."""
    prompt = encode(kind, "the")
    first, *rest = byte_tokens(TOKENIZERS[kind], "é".encode())
    script = [first, one(kind, SPECIAL), *rest]
    assert said(kind, prompt, script, len(prompt), stop=SPECIAL).text == BROKEN
    assert said(kind, prompt, script, len(prompt), stop="zz").text == "é"


def test_an_added_token_is_written_as_it_is():
    """The decoder takes é for a byte, and would break it."""
    tokenizer = KINDS["byte_level"]()
    tokenizer.add_tokens(["café<x>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<｜é｜>"]})
    plain, special = tokenizer.convert_tokens_to_ids(["café<x>", "<｜é｜>"])
    stream = TextStream(tokenizer, ["<｜é｜>"])
    assert [stream.push(plain), stream.push(special), stream.stopped] == ["café<x>", "", True]


def test_what_is_special_is_left_out_whatever_it_looks_like():
    """A space that a decoder would drop alone, as a byte or as a mark: special or not."""
    tokenizer = KINDS["llama"]()
    byte, mark, word = tokenizer.convert_tokens_to_ids(["<0x20>", "▁", "▁cat"])
    assert TextStream(tokenizer, prompt=[word]).push(mark) == TextStream(tokenizer, prompt=[word]).push(byte) == " "
    tokenizer = KINDS["llama"]()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<0x20>", "▁"]})
    stream = TextStream(tokenizer, prompt=[word])
    assert [stream.push(token) for token in (byte, mark, word)] == ["", "", " cat"]


def test_the_kinds_are_what_these_tests_need():
    for kind in BYTES:
        assert decode(kind, encode(kind, TEXT)) == TEXT
    assert decode("llama", [one("llama", "▁cat")]) == "cat"
    assert decode("metaspace_first", [one("metaspace_first", "▁cat")]) == "cat"
    assert decode("gemma", [one("gemma", "▁cat")]) == " cat"
    run = byte_tokens(TOKENIZERS["llama"], "你".encode() + b"\xe4")
    assert decode("llama", run) == BROKEN * 4
