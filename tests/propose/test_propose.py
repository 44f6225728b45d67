"""Proposal samples: the layout, a seed for each prompt, and the same file from an interrupted run."""

import json
import logging

import pytest

from tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tiny_task import V, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.data.examples import encode_records
from trimtab.data.records import Record, read_records
from trimtab.endpoints.completions import Sample
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.base import Reward
from trimtab.propose.local import propose
from trimtab.propose.ranking import Ranking
from trimtab.propose.writing import write_samples

PARAMS = SamplingParams(max_tokens=4, n=2, seed=5)
TEXTS = [Record(prompt, None, None, "") for prompt in ("abc", "de", "fgh", "i", "jklm")]


@pytest.fixture(scope="module")
def model():
    return AlignedModel.from_pretrained(
        tiny_model("llama", V, seed=1), tokenizer=tiny_tokenizer(chat_template=CHAT_TEMPLATE), eos_token_ids=[0]
    )


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_are_those_of_generate_with_a_seed_for_each_prompt(model, tmp_path):
    assert propose(model, TEXTS, tmp_path / "out.jsonl", PARAMS, batch_size=2) == (10, 0)
    alone = [
        {"prompt": record.prompt, "completion": completion.text}
        | ({"unfinished": ["completion"]} if completion.finish_reason == "length" else {})
        for i, record in enumerate(TEXTS)
        for completion in model.generate(record.prompt, SamplingParams(max_tokens=4, n=2, seed=5 + i))
    ]
    assert rows(tmp_path / "out.jsonl") == alone
    assert len({row["completion"] for row in alone}) > 5


def test_an_answer_becomes_chosen_and_the_sample_rejected(model, tmp_path):
    chat = [{"role": "user", "content": "abc"}]
    answer = [{"role": "assistant", "content": "xyz"}]
    propose(model, [Record(chat, answer, None, ""), Record("ab", "xy", None, "")], tmp_path / "o", PARAMS, batch_size=2)
    first, _, second, _ = rows(tmp_path / "o")
    assert (first["prompt"], first["chosen"]) == (chat, answer)
    assert first["rejected"][0]["role"] == "assistant"
    assert second.keys() - {"unfinished"} == {"prompt", "chosen", "rejected"}


def interrupt_the_second_batch(model, monkeypatch):
    """Once; what is returned counts the batches."""
    generate, calls = model.generate, iter(range(9))

    def failing(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(model, "generate", failing)
    return calls


def test_an_interrupted_run_gives_the_same_file(model, tmp_path, monkeypatch):
    propose(model, TEXTS, tmp_path / "whole", PARAMS, batch_size=2)
    calls = interrupt_the_second_batch(model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        propose(model, TEXTS, tmp_path / "halves", PARAMS, batch_size=2)
    assert not (tmp_path / "halves").exists()
    with pytest.raises(InvalidOption, match="other sampling"):
        propose(model, TEXTS, tmp_path / "halves", SamplingParams(max_tokens=4, n=2, seed=6), batch_size=2)
    propose(model, TEXTS, tmp_path / "halves", PARAMS, batch_size=2)
    assert next(calls) == 4  # one done, one interrupted, and the two that were left: the first was not drawn again
    assert (tmp_path / "halves").read_bytes() == (tmp_path / "whole").read_bytes()


def test_samples_that_were_cut_do_not_learn_to_end(model, tmp_path):
    """What `max_tokens` cut is marked, and becomes token ids without an end of sequence; what ended has one."""
    propose(model, TEXTS, tmp_path / "out.jsonl", PARAMS, batch_size=5)
    each = [SamplingParams(max_tokens=4, n=2, seed=5 + i) for i in range(len(TEXTS))]
    reasons = [one.finish_reason for one in model.generate([record.prompt for record in TEXTS], each)]
    assert {"stop", "length"} == set(reasons)
    assert [row.get("unfinished", []) for row in rows(tmp_path / "out.jsonl")] == [
        ["completion"] * (reason == "length") for reason in reasons
    ]
    examples = encode_records(read_records(str(tmp_path / "out.jsonl"), need="chosen"), model.encoder, 64)
    assert [example.chosen[-1] == 0 for example in examples] == [reason == "stop" for reason in reasons]


def test_only_names_of_answers_are_read_as_unfinished(tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for said, expected in ((["rejected"], {"rejected"}), (["prompt"], set()), (True, set()), ("chosen", set()), (None, set())):
        write_rows(tmp_path / "data.jsonl", [pair | {"unfinished": said}])
        (record,) = read_records(str(tmp_path / "data.jsonl"), need="rejected")
        assert record.unfinished == expected


class Wordiness(Reward):
    """The reward of a text is how many of its letters are vowels; counts what it is asked."""

    name = "wordiness"

    def __init__(self, fingerprint="vowels"):
        self.fingerprint, self.asked = fingerprint, []

    def score(self, prompts, answers, columns):
        self.asked += zip(prompts, answers, strict=True)
        return [sum(text.count(letter) for letter in "aeiou") for text in answers]


def test_ranked_samples_are_the_best_against_the_worst(model, tmp_path):
    params, scorer = SamplingParams(max_tokens=6, n=5, seed=5), Wordiness()
    assert propose(model, TEXTS, tmp_path / "out", params, batch_size=2, ranking=Ranking(scorer, 2)) == (10, 0)
    propose(model, TEXTS, tmp_path / "all", params, batch_size=2)
    samples = [(row["prompt"], row["completion"]) for row in rows(tmp_path / "all")]
    assert scorer.asked == samples
    for i, record in enumerate(TEXTS):
        texts = [text for _, text in samples[5 * i : 5 * i + 5]]
        scores = dict(zip(texts, Wordiness().score([record.prompt] * 5, texts, [{}] * 5), strict=True))
        pairs, ordered = rows(tmp_path / "out")[2 * i : 2 * i + 2], sorted(scores[text] for text in texts)
        assert all(pair["prompt"] == record.prompt for pair in pairs)
        assert [scores[pair["chosen"]] for pair in pairs] == ordered[::-1][:2]
        assert [scores[pair["rejected"]] for pair in pairs] == ordered[:2]


def test_ranked_chats_are_messages_and_an_interrupted_run_of_other_pairs_is_refused(model, tmp_path, monkeypatch):
    chat = Record([{"role": "user", "content": "abc"}], None, None, "")
    params, scorer = SamplingParams(max_tokens=4, n=4, seed=5), Wordiness()
    propose(model, [chat], tmp_path / "chat", params, batch_size=1, ranking=Ranking(scorer))
    (pair,) = rows(tmp_path / "chat")
    assert [pair[which][0]["role"] for which in ("chosen", "rejected")] == ["assistant", "assistant"]
    propose(model, TEXTS, tmp_path / "whole", params, batch_size=2, ranking=Ranking(scorer, 2))
    interrupt_the_second_batch(model, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        propose(model, TEXTS, tmp_path / "halves", params, batch_size=2, ranking=Ranking(scorer, 2))
    for other in (None, Ranking(scorer, 1), Ranking(Wordiness("consonants"), 2)):
        with pytest.raises(InvalidOption, match="ranking"):
            propose(model, TEXTS, tmp_path / "halves", params, batch_size=2, ranking=other)
    propose(model, TEXTS, tmp_path / "halves", params, batch_size=2, ranking=Ranking(scorer, 2))
    assert (tmp_path / "halves").read_bytes() == (tmp_path / "whole").read_bytes()


def test_tools_reach_the_template_and_are_written_beside_the_prompt(tmp_path):
    """The template of this tokenizer spells the tools' names before the messages, so other tools mean other samples."""
    template = "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT_TEMPLATE
    aligned = AlignedModel.from_pretrained(
        tiny_model("llama", V, seed=1), tokenizer=tiny_tokenizer(chat_template=template), eos_token_ids=[0]
    )
    messages, params = [{"role": "user", "content": "abc"}], SamplingParams(max_tokens=12, seed=5)
    records = [Record({"messages": messages, "tools": [{"name": name}]}, None, None, "") for name in ("look", "see")]
    propose(aligned, [*records, Record(messages, None, None, "")], tmp_path / "out", params, batch_size=3)
    look, see, none = rows(tmp_path / "out")
    assert (look["prompt"], look["tools"], see["tools"]) == (messages, [{"name": "look"}], [{"name": "see"}])
    assert "tools" not in none
    (expected,) = aligned.generate(["looku abc<eos>a "], params)
    assert look["completion"] == [{"role": "assistant", "content": expected.text}]


def test_pairs_of_equal_samples_are_counted_and_another_drafter_is_another_run(tmp_path, caplog):
    lms = tiny_model("llama", V, seed=1), tiny_model("llama", V, seed=2, spread=0.5)
    aligned = AlignedModel.from_pretrained(*lms, tokenizer=tiny_tokenizer(), eos_token_ids=[0])
    cold = SamplingParams(max_tokens=4, n=4, seed=5, temperature=0.0)
    caplog.set_level(logging.WARNING, "trimtab")  # commands that were run before leave it at INFO
    propose(aligned, TEXTS, tmp_path / "out", cold, batch_size=5, ranking=Ranking(Wordiness(), 2))
    assert [record.getMessage()[:36] for record in caplog.records] == ["10 pairs are of two equal answers, f"]
    header = {"weights": aligned.fingerprints, "draft": "aligner", "shaping": repr(aligned.shaping(PARAMS))}
    undrafted = AlignedModel.from_pretrained(*lms, tokenizer=tiny_tokenizer(), eos_token_ids=[0], draft="none")
    assert (aligned.drafter, undrafted.drafter) == (header["draft"], "none")
    with pytest.raises(KeyboardInterrupt):
        write_samples(header, interrupted, TEXTS, tmp_path / "left", PARAMS)
    with pytest.raises(InvalidOption, match="other proposal"):
        propose(undrafted, TEXTS, tmp_path / "left", PARAMS, batch_size=5)


def interrupted(start):
    yield [[Sample("a", True)] * 2]
    raise KeyboardInterrupt


def test_an_aligned_model_proposes_what_it_generates(tmp_path):
    aligned = AlignedModel.from_pretrained(
        tiny_model("llama", V, seed=1),
        tiny_model("llama", V, seed=2, spread=0.5),
        tokenizer=tiny_tokenizer(),
        eos_token_ids=[0],
    )
    propose(aligned, TEXTS, tmp_path / "out", PARAMS, batch_size=5)
    each = [SamplingParams(max_tokens=4, n=2, seed=5 + i) for i in range(len(TEXTS))]
    texts = [completion.text for completion in aligned.generate([record.prompt for record in TEXTS], each)]
    assert [row["completion"] for row in rows(tmp_path / "out")] == texts
