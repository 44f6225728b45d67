"""`trimtab generate --leader`: another tokenizer begins, here or behind an endpoint the proposal goes on."""

import json

import pytest
from peft import PeftModel

from eval_task import called
from serving import folder_service, running
from tiny import bpe_tokenizer, save_lora, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import make_task, write_rows
from trimtab import AlignedModel, SamplingParams, TextHandover
from trimtab.data import template as dates
from trimtab.models.aligner import Manifest
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.models.vocabulary import fingerprint_vocabulary

OVER = "confidence(window=2, threshold=0.04)"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_task(tmp_path_factory.mktemp("task"))
    tokenizer = bpe_tokenizer(["ab cd", "abc abd cab", "dab bad"], 20)
    save_tiny(folder / "leader", tiny_model("llama", len(tokenizer), seed=9), tokenizer)
    return folder


def words(task, *more):
    leader = ("--leader", task / "leader", "--handover", OVER)
    return "generate", "--proposal", task / "proposal", *leader, "--max_tokens", 12, "--seed", 3, *more


def expected(task, prompts, n=1):
    both = TextHandover(*(AlignedModel.from_pretrained(task / name) for name in ("leader", "proposal")), OVER)
    done = both.generate(prompts, SamplingParams(max_tokens=12, seed=3, n=n))
    return [(one.text, one.handover_at, one.finish_reason) for one in done]


def told(rows):
    return [(row["completion"], row.get("handover_at"), row["finish_reason"]) for row in rows]


def interrupt(monkeypatch, capsys, asked, at=2):
    """A run that is killed before its part `at`."""
    generate, calls = TextHandover.generate, []

    def interrupted(self, *given):
        calls.append(given)
        if len(calls) == at:
            raise KeyboardInterrupt
        return generate(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(TextHandover, "generate", interrupted)
        called(capsys, *asked)


def test_the_report_names_the_leader_and_each_row_where_it_was_handed_over(task, capsys):
    status, out, _ = called(capsys, *words(task, "--prompt", "ab", "--prompt", "c d", "--n", 6, "--json"))
    report = json.loads(out)
    assert status == 0
    assert (report["leader"], report["handover"]) == (str(task / "leader"), "confidence(window=2, threshold=0.04)")
    assert report["target"] == "text-level hand-over"
    assert told(report["completions"]) == expected(task, ["ab", "c d"], 6)
    assert {row.get("handover_at") is None for row in report["completions"]} == {True, False}


def test_a_proposal_behind_an_endpoint_writes_what_it_would_write_here(task, capsys):
    with running(folder_service(task / "proposal", {})) as server:
        status, out, _ = called(capsys, *words(task, "--prompt", "ab", "--n", 6, "--json", "--endpoint", server.url))
    assert status == 0
    assert told(json.loads(out)["completions"]) == expected(task, ["ab"], 6)


def test_a_killed_run_goes_on_and_another_leader_does_not(task, capsys, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    asked = words(task, "--input", task / "held_out.jsonl", "--max_num_seqs", 4, "--out", out)
    assert called(capsys, *asked, "--out", tmp_path / "whole.jsonl")[0] == 0
    interrupt(monkeypatch, capsys, asked, 3)
    for other in (("--leader", task / "start"), ("--handover", "confidence(window=3)")):
        status, _, errors = called(capsys, *asked, *other)
        assert status == 2, errors
    assert called(capsys, *asked)[0] == 0
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--sequence_level", "particles=4"), "--sequence_level has no effect with --leader"),
        (("--blend", "weights"), "--blend has no effect with --leader"),
        (("--rule", "product"), "--rule needs an --aligner"),
        (("--handover", "product"), "hands nothing over between two models"),
        (("--handover", "confidence(after=product)"), "leave both out"),
        (("--endpoint_model", "m"), "--endpoint_model needs --endpoint"),
        (("--endpoint", "http://localhost:1", "--proposal_top_k", 3), "--proposal_top_k is for a proposal that runs here"),
        (("--endpoint", "nowhere"), "'nowhere' is no endpoint"),
        (("--endpoint", "http://localhost:1", "--draft", "ngram"), "--draft is for a proposal that runs here"),
    ],
)
def test_wrong_usage_is_told_before_a_model_is_loaded(task, capsys, monkeypatch, more, said):
    monkeypatch.setattr(AlignedModel, "from_pretrained", None)
    status, _, errors = called(capsys, *words(task, "--prompt", "a", *more))
    assert status == 2
    assert said in "\n".join(errors)


def test_an_endpoint_needs_a_leader(task, capsys):
    status, _, errors = called(capsys, "generate", "--proposal", task / "proposal", "--prompt", "a", "--endpoint", "http://h")
    assert status == 2
    assert "--endpoint needs a --leader" in errors[-1]


def test_an_aligner_joins_in_behind_the_hand_over(task, capsys):
    more = ("--aligner", task / "start", "--rule", "geometric", "--prompt", "ab", "--json", "--temperature", 0)
    status, out, _ = called(capsys, *words(task, *more))
    assert status == 0
    (row,) = json.loads(out)["completions"]
    model = AlignedModel.from_pretrained(task / "proposal", task / "start", rule="geometric")
    both = TextHandover(AlignedModel.from_pretrained(task / "leader"), model, OVER)
    (one,) = both.generate("ab", SamplingParams(max_tokens=12, temperature=0, seed=3))
    assert row["completion"] == one.text


def test_what_changes_no_text_may_change_when_a_run_goes_on(task, capsys, tmp_path, monkeypatch):
    """Who looks drafts up, and whether the default is said."""
    shared = ("generate", "--proposal", task / "proposal", "--leader", task / "leader", "--max_tokens", 12, "--seed", 3)
    asked = (*shared, "--input", task / "held_out.jsonl", "--max_num_seqs", 4)
    whole, out = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    assert called(capsys, *asked, "--out", whole)[0] == 0
    interrupt(monkeypatch, capsys, (*asked, "--out", out, "--draft", "ngram"))
    more = ("--draft", "none", "--handover", "confidence(window=6, threshold=0.8)")
    status, _, errors = called(capsys, *asked, "--out", out, *more)
    assert status == 0, errors
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (whole, out)]
    assert rows[0][1:] == rows[1][1:]


def test_the_leaders_own_template_and_its_date_are_kept(tmp_path, capsys, monkeypatch):
    folder = make_task(tmp_path / "task", chat_template="{% for m in messages %}{{ m.content }} {% endfor %}")
    template = "{{ strftime_now('%A') | lower }} {% for m in messages %}{{ m.content }} {% endfor %}"
    tokenizer = bpe_tokenizer(["ab cd", "abc abd cab", "dab bad"], 20, chat_template=template)
    save_tiny(folder / "leader", tiny_model("llama", len(tokenizer), seed=9), tokenizer)
    write_rows(folder / "chats.jsonl", [{"prompt": [{"role": "user", "content": word}]} for word in ("ab", "cd", "d c", "a")])
    shared = ("generate", "--proposal", folder / "proposal", "--leader", folder / "leader", "--max_tokens", 9, "--seed", 3)
    asked = (*shared, "--input", folder / "chats.jsonl", "--max_num_seqs", 1)
    monkeypatch.setattr(dates, "today", lambda: "2026-11-29")
    assert called(capsys, *asked, "--out", tmp_path / "sunday.jsonl")[0] == 0
    interrupt(monkeypatch, capsys, (*asked, "--out", tmp_path / "o.jsonl"))
    monkeypatch.setattr(dates, "today", lambda: "2026-11-30")
    assert called(capsys, *asked, "--out", tmp_path / "monday.jsonl")[0] == 0
    tokenizer.chat_template = template.replace("%A", "%B")
    tokenizer.save_pretrained(folder / "leader")
    status, _, errors = called(capsys, *asked, "--out", tmp_path / "o.jsonl")
    assert status == 2, errors
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder / "leader")
    assert called(capsys, *asked, "--out", tmp_path / "o.jsonl")[0] == 0
    assert (tmp_path / "o.jsonl").read_bytes() == (tmp_path / "sunday.jsonl").read_bytes()
    assert (tmp_path / "monday.jsonl").read_bytes() != (tmp_path / "sunday.jsonl").read_bytes()


def write_manifest(folder, **said):
    manifest = Manifest(vocabulary=fingerprint_vocabulary(load_tokenizer(folder)), **said)
    (folder / "trimtab.json").write_text(json.dumps(manifest.to_dict()), encoding="utf-8")


def test_an_adapter_leads_with_the_base_that_it_names(task, capsys, caplog, tmp_path):
    """As the two do when they are merged; a head cannot, and a residual is warned of."""
    adapter = save_lora(tmp_path / "adapter", task / "leader", seed=4)
    load_tokenizer(task / "leader").save_pretrained(adapter)
    merged = PeftModel.from_pretrained(load_model(task / "leader"), str(adapter)).merge_and_unload()
    leader = AlignedModel.from_pretrained(merged, tokenizer=task / "leader")
    params = SamplingParams(max_tokens=12, seed=3, n=6)
    done = TextHandover(leader, AlignedModel.from_pretrained(task / "proposal"), OVER).generate("ab", params)
    status, out, _ = called(capsys, *words(task, "--prompt", "ab", "--n", 6, "--json", "--leader", adapter))
    assert status == 0
    assert told(json.loads(out)["completions"]) == [(one.text, one.handover_at, one.finish_reason) for one in done]
    write_manifest(adapter, objective="likelihood")
    assert "is a residual" not in caplog.text
    assert called(capsys, *words(task, "--prompt", "ab", "--leader", adapter))[0] == 0
    assert "is a residual, and no language model" in caplog.text


def test_a_head_cannot_lead(tmp_path, capsys):
    base = save_tiny(tmp_path / "base", tiny_model("llama", 28), tiny_tokenizer())
    head = save_lora(tmp_path / "head", base)
    tiny_tokenizer().save_pretrained(head)
    write_manifest(head, head={"tap": 1, "layers": 2, "proposal": "sha256:0"})
    status, _, errors = called(capsys, "generate", "--proposal", base, "--leader", head, "--prompt", "ab")
    assert status == 1
    assert "is a head, which reads what its proposal has read, and cannot begin a text alone" in errors[-1]
