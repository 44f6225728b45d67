"""The contract of every drafter: no law changes, a seed has the same tokens at every draft length, and it is told what came."""

import json
from collections import Counter
from typing import Any

import pytest
import torch

from brought import bring, look_again
from drafting import FIXED, Cycle, Even, Recorder, corpus_of
from serving import running
from statistics_of import fits
from tiny import EOS
from tiny_task import make_task
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.cli.options import add_options
from trimtab.cli.parser import Parser
from trimtab.core.rules import parse_rule
from trimtab.decode.assemble import Loader
from trimtab.decode.drafters import (
    DRAFTERS,
    AlignerDrafter,
    CorpusDrafter,
    Drafted,
    Drafter,
    ModelDrafter,
    NgramDrafter,
    NoDrafter,
    check_drafter,
    read_draft,
)
from trimtab.decode.engine import Engine
from trimtab.decode.options import DRAFTER_NAMES, ModelOptions
from trimtab.errors import InvalidOption
from trimtab.models.table import TableLM, enumerate_sequences
from trimtab.serve.registry import Registry
from trimtab.serve.service import Opened, Service, Settings

V = 5
PROPOSAL, ALIGNER, DRAFT = (TableLM.random(V, order=2, seed=seed) for seed in (0, 1, 3))
CORPUS = corpus_of([[1, 2, 3, 4, 1, 2, 3, 3], [4, 4, 2, 1, 3]])
EVERY: list[Drafter] = [AlignerDrafter(), ModelDrafter(DRAFT), NgramDrafter(), CORPUS, NoDrafter(), Cycle(), Even()]


@pytest.fixture(params=EVERY, ids=lambda drafter: drafter.name)
def drafter(request: pytest.FixtureRequest) -> Drafter:
    return request.param


def model(length: int | None, draft: Any, **settings: Any) -> AlignedModel:
    given = {"eos_token_ids": [EOS], "num_speculative_tokens": length, "draft": draft} | settings
    return AlignedModel(PROPOSAL, [ALIGNER], **given)


def test_every_registered_drafter_is_here():
    assert {type(drafter) for drafter in EVERY} >= set(DRAFTERS.values())
    assert sorted(DRAFTERS) == sorted(DRAFTER_NAMES)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_it_changes_no_law(drafter, length):
    """Enumerated: every answer of three tokens."""
    rule = parse_rule("product")
    law = enumerate_sequences(lambda text: rule(PROPOSAL.row(text), [ALIGNER.row(text)], [1.0]), [3], 3, [EOS])
    params = SamplingParams(n=1500, seed=length, max_tokens=3)
    assert fits([tuple(c.tokens) for c in model(length, drafter, max_num_seqs=1500).generate([[3]], params)], law) > 1e-3


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 1.6},
    {"repetition_penalty": 3.0, "ignore_eos": True, "logprobs": True},
    {"rule": "nucleus", "proposal_top_p": 0.7, "top_k": 3},
    {"rule": "kl_gate(tau=0.4)", "stop_token_ids": [4]},
    {"rule": "candidates(n=3)"},
]


def test_a_seed_gives_the_same_tokens_at_every_draft_length_in_any_batch(drafter):
    params = [SamplingParams(seed=i, max_tokens=14, n=2, **asked) for i, asked in enumerate(SETTINGS)]
    prompts = [[1 + i % 4] * (1 + i % 3) for i in range(len(params))]
    expected = model(0, drafter).generate(prompts, params)
    for length in (1, 3, None):
        assert model(length, drafter, max_num_seqs=5).generate(prompts, params) == expected, length
    alone = [c for prompt, asked in zip(prompts, params, strict=True) for c in model(2, drafter).generate([prompt], asked)]
    assert alone == expected
    greedy = [SamplingParams(seed=i, max_tokens=14, temperature=0) for i in range(3)]
    assert model(4, drafter).generate(prompts[:3], greedy) == model(0, drafter).generate(prompts[:3], greedy)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_it_is_told_exactly_what_was_accepted(drafter, length):
    """Each text's memory is its prompt, then its answer: nothing rejected, and nothing behind a stop."""
    record = Recorder(drafter)
    params = [SamplingParams(seed=i, max_tokens=14, n=2, **asked) for i, asked in enumerate(SETTINGS)]
    prompts = [[1 + i % 4] * (1 + i % 3) for i in range(len(params))]
    aligned = model(length, record, max_num_seqs=6)
    done = aligned.generate(prompts, params)
    texts = [[*prompts[i // 2], *c.tokens] for i, c in enumerate(done)]
    assert Counter(map(tuple, record.told)) == Counter(map(tuple, texts))
    assert [c.tokens for c in done] == [c.tokens for c in model(length, drafter).generate(prompts, params)]
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_a_text_that_is_cancelled_is_told_of_no_further(drafter):
    record = Recorder(drafter)
    aligned = model(2, record)
    engine = Engine(aligned.proposal, aligned.pace)
    going, staying = (aligned.prepare([i + 1], SamplingParams(max_tokens=20, seed=i, ignore_eos=True), i) for i in range(2))
    engine.submit([*going, *staying])
    for _ in range(3):
        engine.step()
    engine.cancel(going)
    held = [1, *going[0].tokens]
    while engine:
        engine.step()
    assert sorted(record.told) == sorted([held, [2, *staying[0].tokens]])


def test_what_is_looked_up_changes_no_token(drafter):
    """Certain drafts leave the text of `none`, and say so to files that go on; whoever draws from rows has a name there."""
    params = [SamplingParams(seed=i, max_tokens=14, n=2, **asked) for i, asked in enumerate(SETTINGS)]
    prompts = [[1 + i % 4] * (1 + i % 3) for i in range(len(params))]
    same = model(3, drafter).generate(prompts, params) == model(0, "none").generate(prompts, params)
    assert same == (not drafter.has_rows) == (drafter.identity == "none")
    assert drafter.has_rows or not drafter.models


def test_equal_drafters_share_a_group(drafter):
    anew = {"model": lambda: ModelDrafter(DRAFT), "corpus": lambda: CorpusDrafter(CORPUS.path)}
    again = anew.get(drafter.name, type(drafter))()
    assert again == drafter
    assert hash(again) == hash(drafter)
    base = model(2, drafter)
    one, other = base.prepare([1], SamplingParams()), model(2, again).prepare([2], SamplingParams())
    assert one[0].models == other[0].models
    assert isinstance(drafter.identity, str)
    assert drafter.who


# ---- what is given for one


@pytest.mark.parametrize(
    ("text", "kind", "argument"),
    [
        ("aligner", AlignerDrafter, None),
        ("ngram", NgramDrafter, None),
        ("none", NoDrafter, None),
        ("ngram:3", NgramDrafter, "3"),
        ("model:some/folder", ModelDrafter, "some/folder"),
        ("model", ModelDrafter, "model"),
        ("organisation/name", ModelDrafter, "organisation/name"),
        ("C:\\models\\draft", ModelDrafter, "C:\\models\\draft"),
    ],
)
def test_a_name_may_have_more_behind_a_colon(text, kind, argument):
    assert read_draft(text) == (kind, argument)


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ("corpse:FILE", "draft: there is no drafter 'corpse'; choose one of aligner, corpus, model, ngram, none, or a model"),
        ("ngram:3", "draft: 'ngram' takes nothing behind its name, not '3'"),
        ("model:", "draft: 'model' wants to know which: model:PATH"),
        ("corpus", "draft: 'corpus' wants to know which table: corpus:FILE"),
        ("model:some/folder", "draft: name 'some/folder' to AlignedModel.from_pretrained"),
        ("some/folder", "draft must be one of aligner, corpus, ngram, none, or a model, not 'some/folder'"),
        (3, "draft must be a drafter, its name, or a model, not 3"),
    ],
)
def test_what_is_no_drafter_is_refused(draft, message):
    with pytest.raises(InvalidOption) as error:
        model(2, draft)
    assert str(error.value).startswith(message)


def test_a_drafter_that_cannot_be_compared_is_refused():
    class Unhashable(Cycle):
        __hash__ = None

    with pytest.raises(InvalidOption, match="Unhashable cannot be hashed"):
        model(2, Unhashable())


class Wrong(Drafter):
    name = "wrong"

    def __init__(self, said: Any) -> None:
        self.said = said

    def draft(self, step):
        return self.said(len(step.limits), step.width)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            lambda b, p: Drafted(torch.zeros(b, p + 1, dtype=torch.long)),
            r"gave torch.int64 \[1, 2\] on cpu for tokens, and must",
        ),
        (
            lambda b, p: Drafted(torch.zeros(b, p)),
            r"gave torch.float32 \[1, 1\] on cpu for tokens, and must give int64 \[1, 1\]",
        ),
        (
            lambda b, p: Drafted(torch.zeros(b, p).long(), torch.zeros(b, p + 1, V)),
            r"gave rows of shape \[1, 2, 5\] for tokens",
        ),
    ],
)
def test_drafts_of_the_wrong_form_are_named(said, message):
    with pytest.raises(InvalidOption, match=f"draft: 'wrong' {message}"):
        model(2, Wrong(said)).generate([[1]], SamplingParams(max_tokens=4, seed=0))


@pytest.mark.parametrize("token", [V, -2, 10**9])
def test_a_guess_that_is_no_token_is_named(token):
    with pytest.raises(InvalidOption, match=f"draft: 'cycle' guessed {token}, and ids are from 0 to 4"):
        model(2, Cycle((1, token))).generate([[1]], SamplingParams(max_tokens=9, seed=0, ignore_eos=True))


def test_a_text_that_dies_at_once_is_told_of_nothing():
    record = Recorder(Cycle())
    dead = TableLM(torch.zeros(V + 1, V))
    dead.table = torch.full_like(dead.table, torch.nan)
    (done,) = AlignedModel(dead, draft=record).generate([[1, 2]], SamplingParams(max_tokens=9, seed=0))
    assert (done.finish_reason, record.told) == ("error", [[1, 2]])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (Cycle(), "a drafter is a class that inherits"),
        (dict, "a drafter is a class that inherits"),
        (type("Nameless", (Drafter,), {}), "Nameless needs a name"),
        (type("Spaced", (Drafter,), {"name": "two words"}), "Spaced needs a name"),
    ],
)
def test_what_cannot_be_registered_is_refused(value, message):
    with pytest.raises(InvalidOption, match=message):
        check_drafter(value)


# ---- a drafter of another package


@pytest.fixture
def task(tmp_path, monkeypatch):
    look_again(DRAFTERS, monkeypatch)
    bring(
        tmp_path / "package", monkeypatch, "their_drafters", FIXED, {"trimtab.drafters": {"fixed": "their_drafters:FixedText"}}
    )
    (tmp_path / "words.txt").write_text("the quick brown fox", encoding="utf-8")
    return make_task(tmp_path)


def test_the_commands_take_it_and_say_so(task, capsys, caplog):
    words = ["--proposal", str(task / "proposal"), "--aligner", str(task / "start"), "--draft", f"fixed:{task / 'words.txt'}"]
    texts = []
    for length in ("0", "3"):
        more = ["--prompt", "a", "--max_tokens", "12", "--seed", "1", "--num_speculative_tokens", length, "--json"]
        assert main(["generate", *words, *more]) == 0
        texts.append(json.loads(capsys.readouterr().out)["completions"][0]["completion"])
    assert texts[0] == texts[1]
    assert any(text.startswith("who drafts: the drafter fixed sha256:") for text in caplog.messages)
    assert main(["bench", *words, "--max_tokens", "4", "--repeats", "1", "--context", "4", "--json"]) == 0
    assert "aligned_speculative" in json.loads(capsys.readouterr().out)["runs"][0]["tokens_per_second"]
    assert main(["generate", *words[:-1], "fixed:nowhere", "--prompt", "a"]) == 2
    assert "draft: there is no file 'nowhere'" in capsys.readouterr().err
    assert main(["generate", *words, "--prompt", "a", "--draft_temperature", "0.5"]) == 2
    assert "is for a model that drafts" in capsys.readouterr().err
    parser = Parser("trimtab generate")
    add_options(parser, ModelOptions)
    assert "who drafts: aligner, corpus, fixed, model, ngram, none, with more behind" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("length", [0, 3])
def test_a_server_drafts_with_it(task, length):
    draft = f"fixed:{task / 'words.txt'}"

    def load() -> Opened:
        base = AlignedModel.from_pretrained(task / "proposal", draft=draft, num_speculative_tokens=length)
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
        registry.load("q", str(task / "start"), pinned=True)
        return Opened(registry, Engine(base.proposal, base.pace, prefixes=base.prefixes))

    alone = AlignedModel.from_pretrained(task / "proposal", task / "start", draft=draft)
    (expected,) = alone.generate("abc", SamplingParams(max_tokens=12, seed=5))
    with running(Service(Settings("base", stream_interval=0.0), load)) as server:
        answer = server.complete(model="q", prompt="abc", max_tokens=12, seed=5)
        assert answer["choices"][0]["text"] == expected.text
        assert (server.metric("trimtab:spec_decode_num_draft_tokens_total", model_name="q") > 0) == (length > 0)
