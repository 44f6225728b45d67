"""Scored answers in files as samples: their ids, their ends, which of them count; and what a sample says of a chat."""

from types import SimpleNamespace

import pytest

from spellings import KINDS
from tiny import tiny_tokenizer
from tiny_task import write_rows
from trimtab.data.encoding import Encoder
from trimtab.data.records import read_records
from trimtab.data.scored import read_scored
from trimtab.decode.text import text_of
from trimtab.errors import DataError
from trimtab.train.online.filed import filed_samples, read_filed, with_answers
from trimtab.train.online.rounds import Rounds, Schedule
from trimtab.train.online.samples import Prompt, Sample, read_samples, write_samples

CHAT = [{"role": "user", "content": "the"}]
EOS = 0


def prompts_of(rows, encoder, path):
    """The prompts of rows, which the file has then."""
    write_rows(path, rows)
    return [Prompt(record, encoder.prompt(record.prompt)) for record in read_records(str(path), need="prompt", answers=False)]


def tiny_encoder():
    return Encoder(tiny_tokenizer(), 28, [EOS])


def found(tmp_path, rows, encoder, max_tokens=9):
    """The samples of all rows, each as to a prompt of its own."""
    prompts = prompts_of(rows, encoder, tmp_path / "answers.jsonl")
    return filed_samples(read_filed(str(tmp_path / "answers.jsonl")), prompts, encoder, max_tokens)


@pytest.mark.parametrize("prompt", ["the", CHAT], ids=["text", "chat"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_were_drawn_are_those_of_the_text_that_was_written_of_them(tmp_path, kind, prompt):
    """Whatever the tokenizer makes of a space that an answer begins with."""
    tokenizer = KINDS[kind]()
    encoder = Encoder(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens = encoder.tokenize(" cat sat", "a text")
    before = () if prompt is CHAT else encoder.prompt(prompt)
    row = {"prompt": prompt, "completion": text_of(tokenizer, tokens, before), "score": 1.0, "tokens": tokens}
    [[sample]] = found(tmp_path, [row], encoder).values()
    assert sample.tokens == [*tokens, tokenizer.eos_token_id]
    assert sample.finish_reason == "stop"


def test_ids_end_as_their_answer_does(tmp_path):
    encoder, row = tiny_encoder(), {"prompt": "de", "completion": "ab", "score": 1.0}
    ab = encoder.tokenize("ab", "a text")
    for tokens, reason, wanted in (
        (ab, "stop", [*ab, EOS]), ([*ab, EOS], "stop", [*ab, EOS]), (ab, "length", ab), (ab, None, [*ab, EOS]),
    ):  # fmt: skip
        [[sample]] = found(tmp_path, [{**row, "tokens": tokens, "finish_reason": reason}], encoder).values()
        assert sample.tokens == wanted
    for tokens, reason in (([ab[0], EOS, ab[1]], "stop"), ([*ab, EOS], "length"), ([*ab, EOS, EOS], "stop")):
        with pytest.raises(DataError, match=r"answers.jsonl:1: 'tokens' go on behind an end of sequence"):
            found(tmp_path, [{**row, "tokens": tokens, "finish_reason": reason}], encoder)


def test_a_chat_ends_as_its_template_says(tmp_path):
    """And not with the first end that a model knows."""
    tokenizer = KINDS["gemma"]()
    end, other = tokenizer.eos_token_id, tokenizer.bos_token_id
    encoder = Encoder(tokenizer, len(tokenizer), [other, end])
    row = {"completion": "cat", "score": 1.0, "tokens": encoder.tokenize("cat", "a text")}
    [[of_chat], [of_text]] = found(tmp_path, [{**row, "prompt": CHAT}, {**row, "prompt": "the"}], encoder).values()
    assert (of_chat.tokens[-1], of_text.tokens[-1]) == (end, other)


def test_what_failed_has_no_score(tmp_path):
    encoder, row = tiny_encoder(), {"prompt": "de", "completion": "ab", "finish_reason": "error"}
    good = {"prompt": "de", "completion": "c", "score": 2.0}
    samples = found(tmp_path, [good, {**row, "score": None}], encoder)
    assert [sample.score for sample in samples[0]] == [2.0]
    with pytest.raises(
        DataError, match=r"answers\.jsonl:2: 'finish_reason' must be stop or length, not 'error': leave the row out"
    ):
        found(tmp_path, [good, {**row, "score": 1.0}], encoder)


def test_prompts_with_answers_are_counted_and_not_those_before_them(tmp_path):
    encoder = tiny_encoder()
    answers = [
        {"prompt": p, "completion": text, "score": float(len(text))} for p in ("de", "df") for text in ("a", "ab", "abc")
    ]
    write_rows(tmp_path / "answers.jsonl", answers)
    rows = [{"prompt": p} for p in ("zz", "de", "zy", "de", "df")]
    prompts = prompts_of(rows, encoder, tmp_path / "prompts.jsonl")
    filed = read_filed(str(tmp_path / "answers.jsonl"))
    kept, samples = with_answers("development", prompts, filed, encoder, 9, 2)
    assert [prompt.record.prompt for prompt in kept] == ["de", "df"]
    assert [len(some) for some in samples.values()] == [3, 3]
    kept, samples = with_answers("development", prompts, filed, encoder, 9, 1)
    assert [prompt.record.prompt for prompt in kept] == ["de"]
    assert list(samples) == [0]


def test_prompts_that_are_kept_must_differ_in_score(tmp_path):
    encoder = tiny_encoder()
    rows = [
        {"prompt": p, "completion": text, "score": float(p == "df" and text == "a")}
        for p in ("de", "df")
        for text in ("a", "b")
    ]
    prompts = prompts_of(rows, encoder, tmp_path / "answers.jsonl")
    filed = read_filed(str(tmp_path / "answers.jsonl"))
    assert len(with_answers("development", prompts, filed, encoder, 9, 2)[0]) == 2
    with pytest.raises(DataError, match="no development prompt has two answers with different scores"):
        with_answers("development", prompts, filed, encoder, 9, 1)


def test_a_look_and_a_group_have_so_many_answers_and_each_group_others(tmp_path):
    prompt = Prompt(SimpleNamespace(prompt="de", columns={}), [4])
    many = {0: [Sample(0, 0, [i + 1], "", "stop", 1.0, float(i)) for i in range(64)]}
    schedule = Schedule(4, 8, 4, 0)
    rounds = Rounds(tmp_path, [prompt], [prompt], schedule, None, tokenizer=None, filed=many, filed_development=many)
    assert [len(some) for some in rounds.filed_development] == [8]
    groups = [frozenset(sample.tokens[0] for sample in group) for group in rounds.groups(0, [])]
    assert [len(group) for group in groups] == [8] * 4
    assert len(set(groups)) == 4, "one prompt four times in an update"


TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
WITH_TOOLS = {"messages": CHAT, "tools": TOOLS, "chat_template_kwargs": {"enable_thinking": False}}


@pytest.mark.parametrize("prompt", ["the", CHAT, WITH_TOOLS], ids=["text", "chat", "tools"])
def test_rounds_are_read_as_answers_to_the_very_same_prompts(tmp_path, prompt):
    path, sample = tmp_path / "round.jsonl", Sample(0, 0, [3, 2], "cat", "stop", 1.0, 0.5)
    write_samples(path, [sample], [Prompt(SimpleNamespace(prompt=prompt), [4])])
    assert read_samples(path, [0], [1], prefixes=False) == [sample]
    [row] = read_scored(path)
    assert row.prompt == prompt


@pytest.mark.parametrize(("prompt", "said"), [("the", " cat"), (CHAT, "cat")], ids=["text", "chat"])
def test_an_answer_in_a_chat_is_a_text_of_its_own(tmp_path, prompt, said):
    """As it is for whoever chats, and so for its reward: a tokenizer of Llama 2's kind drops the space that it begins with."""
    tokenizer = KINDS["llama"]()
    encoder = Encoder(tokenizer, len(tokenizer), [tokenizer.eos_token_id])
    tokens = [tokenizer.convert_tokens_to_ids("▁cat"), tokenizer.eos_token_id]
    seen = []

    def score(prompts, answers, columns, ids):
        seen.extend(answers)
        return [1.0] * len(answers)

    drawn = SimpleNamespace(tokens=tokens, text=" cat", finish_reason="stop", error=None, logprobs=None)
    policy = SimpleNamespace(generate=lambda prompts, params: [drawn] * params[0].n)
    reward = SimpleNamespace(score_drawn=score, called="the reward")
    prompts = [Prompt(SimpleNamespace(prompt=prompt, columns={}), encoder.prompt(prompt))]
    rounds = Rounds(tmp_path, prompts, [], Schedule(1, 2, 4, 0), reward, tokenizer=tokenizer)
    assert {sample.completion for sample in rounds.draw(0, policy, gains=False)} == {said}
    assert set(seen) == {said}
