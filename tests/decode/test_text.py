"""Text as it grows: on a real byte-level BPE vocabulary, whose tokens begin and end inside characters and inside stop texts.

test_spelling.py has the other kinds of tokenizers. `settled` and `certain` below are the specification: what may be shown after
t tokens, computed each time from all of them.
"""

import codecs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tiny import EOS, ScriptedLM, bpe_tokenizer, tiny_model
from trimtab import AlignedModel, Completion, SamplingParams, TokenEvent
from trimtab.decode.text import TextStream

TEXT = (
    "The naïve café in 北京 serves 🙂 to Zoë and 👩‍👩‍👧; the naïve café in 東京 serves 🙃 to Łukasz. "
    "Stop here, stop there; ### Question: and then ### Answer: the café, the 🙂, the 한국어 and the end.\n"
)
TOKENIZER = bpe_tokenizer([TEXT] * 3)
V = len(TOKENIZER)
BROKEN = "\N{REPLACEMENT CHARACTER}"
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def decode(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens, skip_special_tokens=True)


def settled(tokens: list[int]) -> str:
    """The text without a character at its end of which some bytes are still to come."""
    pieces = TOKENIZER.convert_ids_to_tokens([token for token in tokens if token != EOS])
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes(BYTE_OF[char] for char in "".join(pieces)))


def first_stop(text: str, stops: list[str]) -> int | None:
    return min((text.find(stop) for stop in stops if stop in text), default=None)


def certain(tokens: list[int], stops: list[str]) -> str:
    """What may be shown: everything before a stop, or all but the longest end that could still become one."""
    text = settled(tokens)
    if (at := first_stop(text, stops)) is not None:
        return text[:at]
    ends = [text[k:] for k in range(len(text))]
    held = next((end for end in ends if any(stop.startswith(end) for stop in stops)), "")
    return text[: len(text) - len(held)]


def play(script: list[int], **asked) -> tuple[list[TokenEvent], Completion]:
    """Let a model say exactly `script` and then end, and watch the stream of it."""
    model = AlignedModel(ScriptedLM(script, V), tokenizer=TOKENIZER, eos_token_ids=[EOS])
    events = list(model.stream([[1]], SamplingParams(**{"max_tokens": len(script) + 1, **asked})))
    completion = events[-1].completion
    assert completion is not None
    assert "".join(event.text for event in events) == completion.text
    assert [event.token for event in events] == completion.tokens
    assert model.generate([[1]], SamplingParams(**{"max_tokens": len(script) + 1, "seed": completion.seed, **asked})) == [
        completion
    ]
    return events, completion


def pieces(text: str) -> list[str]:
    """The text of each token, where every token is whole characters."""
    return [decode([token]) for token in encode(text)]


def test_the_tokenizer_is_what_these_tests_need():
    """Tokens of several letters, characters of several tokens, and every byte."""
    assert decode(encode(TEXT)) == TEXT
    assert max(map(len, pieces("the café"))) >= 3
    assert len(encode("🚀")) == 3
    assert all(decode([token]) == BROKEN for token in encode("🚀"))
    assert V == 256 + 60 + 1


# ---- without a stop


TEXTS = st.text(
    st.sampled_from("aeZ é北京🙂👩‍🚀한ïŁ\n#.") | st.characters(codec="utf-8", exclude_characters=BROKEN), max_size=25
)
IDS = st.lists(st.integers(0, V - 1), min_size=1, max_size=25)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(IDS | TEXTS.filter(bool).map(encode))
def test_pieces_join_to_the_whole_for_any_tokens(tokens):
    """Also where the bytes are no text at all: broken bytes show as the tokenizer's own decoding shows them."""
    stream = TextStream(TOKENIZER)
    shown = ""
    for t, token in enumerate(tokens):
        shown += stream.push(token)
        assert shown == stream.text == settled(tokens[: t + 1])
    shown += stream.close()
    assert shown == stream.text == decode(tokens)
    assert not stream.stopped


@settings(max_examples=25, deadline=None, derandomize=True)
@given(IDS, st.booleans())
def test_generated_text_is_the_decoding_of_the_tokens(tokens, ignore_eos):
    _, completion = play(tokens, ignore_eos=ignore_eos)
    assert completion.text == TOKENIZER.decode(completion.tokens, skip_special_tokens=True)
    if ignore_eos:
        assert completion.tokens == [*tokens, EOS]
    else:
        assert completion.tokens == [*tokens, EOS][: [*tokens, EOS].index(EOS) + 1]


def test_a_character_is_shown_once_and_whole():
    """🚀 is three tokens here: nothing for two of them, then the character."""
    events, completion = play(encode("🚀"))
    assert [event.text for event in events] == ["", "", "🚀", ""]
    assert (completion.text, completion.finish_reason) == ("🚀", "stop")


def test_no_event_shows_a_part_of_a_character():
    text = "a🙂b👩‍👩‍👧é北京🚀 한국"
    events, completion = play(encode(text))
    assert completion.text == text
    assert not any(BROKEN in event.text for event in events)
    assert sum(event.text == "" for event in events) >= 8, "most tokens of these characters are a part of one"


def test_a_character_cut_by_the_limit_shows_what_is_there():
    events, completion = play(encode("a🚀"), max_tokens=3)
    assert [event.text for event in events[:2]] == ["a", ""]
    assert completion.finish_reason == "length"
    assert completion.text == decode(encode("a🚀")[:3])
    assert completion.text.rstrip(BROKEN) == "a" != completion.text


def test_a_real_replacement_character_in_the_text_is_kept():
    text = f"a{BROKEN}b{BROKEN}"
    assert play(encode(text))[1].text == text


def test_special_tokens_have_no_text_even_in_the_middle_of_a_character():
    a, b, c = encode("🚀")
    events, completion = play([a, EOS, b, c, EOS, *encode("x")], ignore_eos=True)
    assert completion.text == "🚀x"
    assert [event.text for event in events] == ["", "", "", "🚀", "", "x", ""]


def test_the_token_of_a_stop_id_has_no_text():
    _, completion = play(encode("ab#cd"), stop_token_ids=encode("#"))
    assert (completion.text, completion.tokens, completion.finish_reason) == ("ab", encode("ab#"), "stop")


def test_without_a_tokenizer_there_is_no_text():
    model = AlignedModel(ScriptedLM([5, 6], V), eos_token_ids=[EOS])
    events = list(model.stream([[1]]))
    assert [event.text for event in events] == ["", "", ""]
    assert events[-1].completion.text == ""


# ---- stop texts


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_stops_at_any_place_in_any_text(data):
    """Stops are cut out of the text itself, or made of its letters: every step shows exactly what is certain."""
    text = data.draw(TEXTS.filter(bool) | st.text("ab ", min_size=1, max_size=20))
    inside = st.integers(0, len(text) - 1).flatmap(lambda i: st.integers(i + 1, len(text)).map(lambda j: text[i:j]))
    stops = data.draw(st.lists(inside | st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3))
    tokens = encode(text)
    stream = TextStream(TOKENIZER, stops)
    shown = ""
    for t, token in enumerate(tokens):
        shown += stream.push(token)
        assert shown == stream.text == certain(tokens[: t + 1], stops)
        assert stream.stopped == (first_stop(settled(tokens[: t + 1]), stops) is not None)
        if stream.stopped:
            break
    shown += stream.close()
    at = first_stop(settled(tokens[: t + 1]), stops)
    assert shown == stream.text == text[:at]
    assert not any(stop in shown for stop in stops)


def test_a_stop_that_starts_and_ends_inside_tokens():
    """The stop shares no border with a token, and spans more than one."""
    text, stop = "in the café, the end", "fé, t"
    borders = {len("".join(pieces(text)[:k])) for k in range(len(pieces(text)) + 1)}
    at = text.index(stop)
    assert at not in borders
    assert at + len(stop) not in borders
    assert any(at < border < at + len(stop) for border in borders)
    events, completion = play(encode(text), stop=stop)
    assert (completion.text, completion.finish_reason) == ("in the ca", "stop")
    last = next(k for k in range(len(pieces(text)) + 1) if len("".join(pieces(text)[:k])) >= at + len(stop))
    assert completion.tokens == encode(text)[:last], "the last token is the one that completes the stop"
    assert [event.finish_reason for event in events] == [None] * (last - 1) + ["stop"]


def test_a_stop_inside_one_token():
    token = encode(" café")
    assert len(token) == 1
    assert play(encode("the café"), stop="f")[1].text == "the ca"


def test_of_several_stops_the_earliest_in_the_text_wins():
    """Both stops come with the same token, and the longer one begins first."""
    text = "x naïve"
    assert pieces(text)[-1] == " naïve"
    for stops in (["ï", "naïv"], ["naïv", "ï"]):
        assert play(encode(text), stop=stops)[1].text == "x "
    assert play(encode("a b c d e"), stop=["e", "c", "d"])[1].text == "a b "


def test_the_beginning_of_a_stop_is_held_back_and_released():
    """### could begin '### Answer', and does not."""
    text = "a ### b"
    events, completion = play(encode(text), stop=["### Answer"])
    assert completion.text == text
    shown = ["".join(event.text for event in events[: k + 1]) for k in range(len(events))]
    assert not any(text.endswith("#") for text in shown), "each # might be the beginning of the stop"
    assert "a " in shown
    assert text in shown[:-1], "it is released by the text that shows what it is not, not by the end"


def test_held_text_step_by_step():
    """Stop 'aab' in 'aaab': at each letter, hold the longest end that may begin it."""
    stream = TextStream(TOKENIZER, ["aab"])
    a, b = encode("a")[0], encode("b")[0]
    assert [stream.push(a), stream.push(a), stream.push(a), stream.push(b)] == ["", "", "a", ""]
    assert stream.stopped
    assert (stream.text, stream.close()) == ("a", "")


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_held_text_is_released_at_the_end(reason):
    """Neither the end of sequence nor the limit loses the beginning of a stop that never came."""
    script = encode("ab##")
    limit = len(script) + (reason == "stop")
    events, completion = play(script, stop="### Answer", max_tokens=limit)
    assert (completion.text, completion.finish_reason) == ("ab##", reason)
    assert events[-1].text.endswith("#")


def test_a_stop_completed_by_the_last_token_allowed_is_a_stop():
    _, completion = play(encode("ab#c"), stop="#", max_tokens=len(encode("ab#")))
    assert (completion.text, completion.finish_reason) == ("ab", "stop")


def test_a_stop_beside_a_broken_character_is_found_at_the_end():
    """One token is a space and the first bytes of 🚀: the limit comes before the character is whole, and the space stops."""
    script = encode("ab 🚀")
    cut = next(k for k in range(len(script)) if decode([script[k]]).startswith(" ")) + 1
    assert decode(script[:cut]).endswith(f" {BROKEN}")
    events, completion = play(script, stop=" ", max_tokens=cut)
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert completion.tokens == script[:cut]
    assert [event.finish_reason for event in events] == [None] * (cut - 1) + ["stop"]


def test_a_stop_of_a_character_that_is_split_over_tokens():
    _, completion = play(encode("ab🚀cd"), stop="🚀")
    assert (completion.text, completion.finish_reason) == ("ab", "stop")
    assert completion.tokens == encode("ab🚀")


def test_the_prompt_takes_no_part_in_stops():
    """The stop is half in the prompt: it is not in the completion."""
    prompt = encode("a")
    model = AlignedModel(ScriptedLM(encode("bc"), V), tokenizer=TOKENIZER, eos_token_ids=[EOS])
    assert model.generate([prompt], SamplingParams(stop=["ab", "a"]))[0].text == "bc"


def test_a_stop_at_the_very_beginning_leaves_nothing():
    _, completion = play(encode("abc"), stop="ab")
    assert (completion.text, completion.finish_reason) == ("", "stop")


# ---- a real pair


@pytest.fixture(scope="module")
def pair() -> AlignedModel:
    return AlignedModel.from_pretrained(tiny_model("llama", V + 3), tiny_model("llama", V + 7, seed=1), tokenizer=TOKENIZER)


def test_a_pair_of_models_streams_what_it_generates(pair):
    """Random models say random bytes: the hardest text there is."""
    params = SamplingParams(max_tokens=40, n=4, seed=0, temperature=1.5)
    events = list(pair.stream(["the café", "北京"], params))
    for completion, (prompt_index, index) in zip(
        pair.generate(["the café", "北京"], params), [(p, i) for p in range(2) for i in range(4)], strict=True
    ):
        mine = [event for event in events if (event.prompt_index, event.index) == (prompt_index, index)]
        assert "".join(event.text for event in mine) == completion.text == decode(completion.tokens)
        assert mine[-1].completion == completion


def test_stops_of_each_request_are_its_own(pair):
    plain = pair.generate(["the"] * 3, [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True) for seed in range(3)])
    stops = [[c.text[len(c.text) // 2]] for c in plain]
    params = [SamplingParams(max_tokens=40, seed=seed, ignore_eos=True, stop=stops[seed]) for seed in range(3)]
    for stopped, full, (stop,) in zip(pair.generate(["the"] * 3, params), plain, stops, strict=True):
        assert stopped.text == full.text[: full.text.index(stop)]
        assert stopped.tokens == full.tokens[: len(stopped.tokens)]
        assert stopped.finish_reason == "stop"


def test_a_stop_is_seen_in_a_token_that_also_begins_a_character():
    """The token is "A" and the first byte of "é": the stop is met there, though the text ends in an incomplete character."""
    vocab = {"<eos>": 0, "A\u00c3": 1, "\u00a9": 2}  # byte-level spelling of b"A\\xc3" and b"\\xa9"
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    tokenizer.decoder = decoders.ByteLevel()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"), ["A"])
    assert stream.push(1) == ""
    assert stream.stopped
    plain = TextStream(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"))
    assert [plain.push(1), plain.push(2), plain.close()] == ["A", "é", ""]


def test_bytes_that_never_become_characters_hold_nothing_up():
    """Each is shown as soon as it is known to be none, and what follows is as it was."""
    bad = TOKENIZER.convert_tokens_to_ids(bytes_to_unicode()[0xC3])
    stream = TextStream(TOKENIZER)
    tokens = [*encode("a"), *[bad] * 500, *encode("b")]
    assert [stream.push(token) for token in tokens] == ["a", "", *[BROKEN] * 499, f"{BROKEN}b"]
    assert stream.text == TOKENIZER.decode(tokens)
