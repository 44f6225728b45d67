"""Drafts from a corpus: the table is what was counted, it is mapped and not read, and no seed notices what it says."""

import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from drafting import Cycle, corpus_of
from tiny import EOS
from tiny_task import make_task
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.decode.drafters import CorpusDrafter, TextDrafter
from trimtab.decode.drafters.corpus import RECENT, Recent
from trimtab.decode.drafters.table import LONGEST, DraftTable, count_runs, write_table
from trimtab.decode.pace import Tally
from trimtab.errors import DataError
from trimtab.models.table import TableLM

texts_of_ids = st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=12), st.integers(0, 4)), min_size=1, max_size=4)


def counted_by_hand(texts) -> dict[tuple[int, ...], Counter[int]]:
    """What followed each run of one to three tokens, among the tokens that count."""
    found: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for ids, first in texts:
        for at in range(max(first, 1), len(ids)):
            for n in range(1, min(at, LONGEST) + 1):
                found[tuple(ids[at - n : at])][ids[at]] += 1
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(texts_of_ids)
def test_a_table_is_what_was_counted(tmp_path_factory, texts):
    expected = counted_by_hand(texts)
    if not expected:
        with pytest.raises(DataError, match="nothing to draft from"):
            count_runs(texts)
        return
    path = tmp_path_factory.mktemp("tables") / "t"
    counted = count_runs(texts)
    assert write_table(path, counted, {"a": "b"}) == path.stat().st_size
    table = DraftTable(path)
    assert table.facts["a"] == "b"
    for run, followers in expected.items():
        token, count = min(followers.items(), key=lambda item: (-item[1], item[0]))
        assert table.best(run) == (token, count / (followers.total() + 1))
    for run in ([0, 3, 2], [3, 3], [2], [0, 0, 0]):
        if tuple(run) not in expected:
            assert table.best(run) is None
    assert sum(len(one.runs) for one in counted) == len(expected)


def test_ids_of_the_largest_vocabularies_fit_into_a_run(tmp_path):
    ids = [2**21 - 1, 2**21 - 2, 2**21 - 1, 5]
    write_table(tmp_path / "t", count_runs([(ids, 1)]), {})
    assert DraftTable(tmp_path / "t").best(ids[:3]) == (5, 0.5)


def test_a_table_is_mapped_and_not_read():
    """Processes that draft from one file share its pages."""
    drafter = corpus_of([[1, 2, 3]], "mapped.table")
    assert str(drafter.path) in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert drafter.shared is CorpusDrafter(drafter.path).shared, "and so do all models of a process"


def no_file(folder: Path) -> Path:
    return folder / "none"


def no_table(folder: Path) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def torn(folder: Path) -> Path:
    whole = corpus_of([[1, 2, 3]], "torn.table").path.read_bytes()
    (folder / "torn").write_bytes(whole[: len(whole) // 2])
    return folder / "torn"


@pytest.mark.parametrize(
    ("make", "message"), [(no_file, "there is no file"), (no_table, "is no table of"), (torn, "cannot be read as a table")]
)
def test_what_is_no_table_is_refused(tmp_path, make, message):
    with pytest.raises(DataError, match=f"draft: .*{message}"):
        CorpusDrafter(make(tmp_path))


def test_what_was_said_lately_drafts_for_other_texts_and_changes_none():
    """The same request again: its words are known now, in whichever text they stand; the text is the same."""
    proposal = TableLM.random(40, order=1, seed=0)
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True)
    plain = AlignedModel(proposal, draft="none").generate([[1]], params)
    model = AlignedModel(proposal, draft=corpus_of([[39, 38]], "lately.table"), num_speculative_tokens=6)
    calls = []
    for _ in range(2):
        model.pace.tally = Tally()
        assert model.with_prefix_cache(0).generate([[1]], params) == plain
        calls.append(model.pace.tally.calls)
    assert calls[1] < calls[0] / 2


def test_the_oldest_runs_are_forgotten(monkeypatch):
    monkeypatch.setattr("trimtab.decode.drafters.corpus.RECENT", 2)
    recent = Recent()
    for token in range(3):
        recent.learn([token, token, token], 9, None)
    assert [recent.find([token] * 3, 0) is None for token in range(3)] == [True, False, False]
    assert RECENT > 10_000


def drafters(draw: random.Random, size: int) -> list[Any]:
    """Ways to draft certainly: by nothing, by the text, by two tables, by whatever another package says."""
    texts = [[draw.randrange(size) for _ in range(draw.randrange(2, 40))] for _ in range(6)]
    tables = [corpus_of(texts[:3], f"a{draw.random()}"), corpus_of(texts[3:], f"b{draw.random()}")]
    return ["none", "ngram", *tables, Cycle(tuple(draw.randrange(size) for _ in range(5)))]


RULES = ["product", "geometric", "nucleus", "kl_gate(tau=0.4)", "nucleus(force_eos=True)", "candidates(n=3)"]


@pytest.mark.parametrize("part", range(8))
def test_no_seed_notices_who_drafts_over_two_hundred_random_setups(part):
    """25 of them each: another vocabulary, pair, rule, batch, knobs; every way to draft at every length gives one text."""
    draw = random.Random(part)
    for _ in range(25):
        size = draw.randrange(4, 30)
        proposal = TableLM.random(size, order=draw.choice([1, 2]), seed=draw.randrange(1000), zeros=draw.choice([0, 0.2]))
        aligners = [TableLM.random(size, order=1, seed=draw.randrange(1000)) for _ in range(draw.randrange(3))]
        prompts = [[draw.randrange(1, size) for _ in range(draw.randrange(1, 6))] for _ in range(draw.randrange(1, 5))]
        params = []
        for _ in prompts:
            rule = draw.choice(RULES) if aligners else "product"
            knobs = {"temperature": draw.choice([0, 0.6, 1, 1.4]), "top_p": draw.choice([1, 0.8])}
            knobs["repetition_penalty"] = draw.choice([1, 1, 1.5])
            knobs = {} if rule.startswith("candidates") else knobs
            params.append(
                SamplingParams(
                    rule=rule,
                    seed=draw.randrange(10**6),
                    n=draw.choice([1, 1, 3]),
                    max_tokens=draw.randrange(1, 24),
                    ignore_eos=draw.choice([True, False]),
                    logprobs=draw.choice([True, False]) and not rule.startswith("candidates"),
                    **knobs,
                )
            )
        found = []
        for draft in drafters(draw, size):
            length, room = draw.choice([0, 1, 2, 5, 16, None]), draw.choice([1, 3, 32])
            how: dict[str, Any] = {"draft": draft, "num_speculative_tokens": length, "max_num_seqs": room}
            found.append(AlignedModel(proposal, aligners, eos_token_ids=[EOS], **how).generate(prompts, params))
        assert all(other == found[0] for other in found)


class Wild(TextDrafter):
    """Guesses otherwise each time it is asked."""

    name = "wild"
    draw = random.Random(0)

    def guess(self, memory, count):
        return [self.draw.randrange(6) for _ in range(count)]


def test_not_even_a_drafter_without_any_order_is_noticed():
    pair = TableLM.random(6, order=2, seed=0), TableLM.random(6, order=2, seed=1)
    params = SamplingParams(max_tokens=40, n=6, seed=0)
    none = AlignedModel(pair[0], [pair[1]], draft="none").generate([[1], [2]], params)
    assert AlignedModel(pair[0], [pair[1]], draft=Wild(), num_speculative_tokens=3).generate([[1], [2]], params) == none


def test_the_commands_make_a_table_and_draft_from_it(tmp_path, capsys):
    task = make_task(tmp_path)
    out = tmp_path / "t"
    data = next(task.glob("*.jsonl"))
    make = ["draft-table", "--proposal", str(task / "proposal"), "--dataset", str(data), "--out", str(out)]
    assert main([*make, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["bytes"] == out.stat().st_size
    assert made["records"] > 0 < made["tokens"]
    assert main(make) == 0
    assert f"draft from it with --draft corpus:{out}" in capsys.readouterr().out
    words = ["--proposal", str(task / "proposal"), "--aligner", str(task / "start"), "--prompt", "ab", "--seed", "1", "--json"]
    texts = []
    for draft in ("none", "ngram", f"corpus:{out}"):
        assert main(["generate", *words, "--draft", draft]) == 0
        texts.append(json.loads(capsys.readouterr().out)["completions"])
    assert texts[0] == texts[1] == texts[2]
    assert main(["generate", *words, "--draft", "corpus:nowhere"]) == 1
    assert "draft: there is no file" in capsys.readouterr().err
    assert main([*make[:-1], str(data)]) == 2
    assert "would replace the data that it is made from" in capsys.readouterr().err
    other = corpus_of([[1, 2]], "foreign.table").path
    assert main(["generate", *words, "--draft", f"corpus:{other}"]) == 1
    assert "was made with another tokenizer" in capsys.readouterr().err
