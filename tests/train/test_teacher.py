"""A prompt becomes an aligner: what is put before prompts, what is refused, and runs that learn a teacher's rows."""

import dataclasses
import json
import logging
import math

import pytest
import torch

from eval_task import called
from tiny import CHAT_TEMPLATE, EOS, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, make_task, task_options, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import kl_divergence
from trimtab.data.encoding import Encoder
from trimtab.data.examples import encode_records
from trimtab.data.records import Record, read_records
from trimtab.errors import DataError, InvalidOption
from trimtab.files import read_json
from trimtab.models.loading import load_model
from trimtab.train import teacher_answers
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train
from trimtab.train.samples import LIMIT
from trimtab.train.teacher import Teacher

SYSTEM = {"role": "system", "content": "be brief"}
SHOT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ASK = [{"role": "user", "content": "w"}]


def teacher_file(folder, content, name="teacher.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Models with a chat template, prompts without answers, and teachers that change what the proposal says."""
    folder = make_task(tmp_path_factory.mktemp("task"), chat_template=CHAT_TEMPLATE)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(folder / "chats.jsonl", [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows])
    teacher_file(folder, "zyzzyxzyzx", "teacher.txt")
    teacher_file(folder, [SYSTEM, *SHOT])
    return folder


def options_of(task, name, training=None, **settings):
    return task_options(task, name, training, **({"teacher_prompt": str(task / "teacher.txt")} | settings))


# ---- what is put before


def test_a_text_goes_before_texts_and_is_the_system_message_of_chats(tmp_path):
    teacher = Teacher.read(teacher_file(tmp_path, "be brief\n", "t.txt"))
    assert teacher.put_before("w", "here") == "be brief\nw"
    assert teacher.put_before(ASK, "here") == [SYSTEM, *ASK]


@pytest.mark.parametrize(
    ("before", "prompt", "expected"),
    [
        (SHOT, ASK, [*SHOT, *ASK]),
        ([SYSTEM, *SHOT], ASK, [SYSTEM, *SHOT, *ASK]),
        (SHOT, [SYSTEM, *ASK], [SYSTEM, *SHOT, *ASK]),
        ([SYSTEM], [{**SYSTEM, "content": "in French"}, *ASK], [{**SYSTEM, "content": "be brief\n\nin French"}, *ASK]),
    ],
)
def test_messages_go_before_chats_with_one_system_message_first(tmp_path, before, prompt, expected):
    for name, content in (("t.json", json.dumps(before)), ("t.jsonl", "\n".join(map(json.dumps, before)))):
        assert Teacher.read(teacher_file(tmp_path, content, name)).put_before(prompt, "here") == expected
    tools = {"messages": prompt, "tools": [{"name": "f"}]}
    teacher = Teacher.read(teacher_file(tmp_path, before))
    assert teacher.put_before(tools, "here") == {"messages": expected, "tools": [{"name": "f"}]}


def test_what_cannot_be_put_before_is_refused_with_the_fix(tmp_path):
    teacher = Teacher.read(teacher_file(tmp_path, [SYSTEM]))
    with pytest.raises(
        DataError, match=r"d.jsonl:3: 'prompt' is a text, but teacher_prompt .* holds messages: give it as a pl"
    ):
        teacher.put_before("w", "d.jsonl:3")
    with pytest.raises(DataError, match=r"here: the system messages .* write both as texts, or leave one out"):
        teacher.put_before([{"role": "system", "content": [{"type": "text", "text": "x"}]}, *ASK], "here")


@pytest.mark.parametrize(
    ("content", "name", "error"),
    [
        (" \n", "t.txt", "is empty"),
        ("{}", "t.json", "must hold a list of messages"),
        ("[]", "t.json", "must hold a list of messages"),
        ("[1", "t.json", "Expecting"),
        ('[{"role": "user"}]', "t.json", r"messages\[0\] must be a message with 'role' and 'content'"),
        ('{"prompt": "x", "completion": "y"}\n', "t.jsonl", r"messages\[0\] must be a message"),
    ],
)
def test_a_file_that_is_no_prompt_is_refused(tmp_path, content, name, error):
    with pytest.raises(InvalidOption, match=f"teacher_prompt: .*{error}"):
        Teacher.read(teacher_file(tmp_path, content, name))


def test_the_digest_is_of_what_is_said_and_not_of_where_it_is_kept(tmp_path):
    kept = [Teacher.read(teacher_file(tmp_path, [SYSTEM], "a.json")), Teacher.read(teacher_file(tmp_path, SYSTEM, "b.jsonl"))]
    assert kept[0].digest == kept[1].digest != Teacher.read(teacher_file(tmp_path, SHOT)).digest


# ---- options


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (
            {"objective": "sft", "rule": "geometric"},
            "learnt from whole rows, by objective likelihood, and 'sft' looks at tokens",
        ),
        ({"contrast": 1.0}, "contrast: a teacher's rows say how likely every token is"),
        ({"proposal_endpoint": ("http://h/v1",), "cache_top_k": 8}, "needs the proposal here: an endpoint names the best"),
        ({"cache_top_k": 8, "cache_tail_samples": 0}, "would leave out the tail of the teacher's rows: give at least 1"),
        ({"teacher_max_tokens": 0}, "teacher_max_tokens must be at least 1, not 0"),
    ],
)
def test_what_does_not_go_with_a_teacher_is_refused(task, settings, error):
    with pytest.raises(InvalidOption, match=error):
        resolve(options_of(task, "refused", **settings))


def test_what_would_change_nothing_is_refused(task, capsys):
    with pytest.raises(InvalidOption, match="teacher_max_tokens would change nothing: the records have answers"):
        train(options_of(task, "refused", teacher_max_tokens=9))
    said = ["--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "train.jsonl"]
    with pytest.raises(InvalidOption, match="cut_answers would change nothing: of answers that are drawn it is known"):
        train(options_of(task, "refused", dataset=str(task / "prompts.jsonl"), cut_answers="end"))
    status, _, errors = called(capsys, "train", *said, "--output_dir", task / "refused", "--teacher_max_tokens", 9)
    assert status == 2
    assert "--teacher_max_tokens needs --teacher_prompt" in errors[0]
    assert not (task / "refused" / "run.json").exists()


def test_a_teacher_that_cannot_be_read_is_said_before_any_model_is(task):
    with pytest.raises(InvalidOption, match=r"teacher_prompt: .*nowhere"):
        train(options_of(task, "refused", teacher_prompt=str(task / "nowhere.txt"), proposal="nowhere"))


def test_some_answers_are_not_enough(task):
    rows = [{"prompt": "abc", "completion": "x"}, {"prompt": "bcd"}, {"prompt": "cde"}]
    dataset = write_rows(task / "some.jsonl", rows)
    with pytest.raises(
        DataError, match=r"some.jsonl:\d: has no answer, but other records have: give all of them answers, or none"
    ):
        train(options_of(task, "refused", dataset=str(dataset)))


# ---- examples


def test_answers_are_cut_and_prompts_left_out_where_the_teacher_fills_the_context(caplog):
    encoder = Encoder(tiny_tokenizer(), V, (EOS,))
    records = [Record("ab", "xyz", None, "1", teacher="c" * n + "ab") for n in (2, 7, 8, 9)]
    with caplog.at_level(logging.WARNING):
        examples = encode_records(records, encoder, 64, 10)
    assert [(len(e.prompt), len(e.teacher), len(e.chosen)) for e in examples] == [(2, 4, 4), (2, 9, 1)]
    assert (
        "of 4 records, 1 (25 %) had an answer cut at max_length=64 (at 10 behind teacher_prompt), which teaches no end, and 2 a"
        " longer prompt, left out; a larger max_length, or a shorter teacher_prompt, keeps them whole" in caplog.text
    )
    with pytest.raises(
        DataError, match="64 tokens or more, or 10 behind teacher_prompt; raise max_length, or shorten teacher_prompt"
    ):
        encode_records(records[2:], encoder, 64, 10)


# ---- runs


def exact_divergence(task, name, rows, before, weight=1.0):
    """KL(teacher‖aligned) in nats a token on some records, from stock forward passes; and that of the bare proposal."""
    manifest = read_json(task / name / "trimtab.json")
    proposal, aligner = load_model(task / "proposal"), load_model(task / name)
    encoder = Encoder(tiny_tokenizer(), V, (EOS,))
    sums, count = torch.zeros(2), 0
    for row in rows:
        found = []
        for model, context in ((proposal, row["prompt"]), (aligner, row["prompt"]), (proposal, before + row["prompt"])):
            prompt, answer = encoder.pair(context, row["chosen"])
            with torch.no_grad():
                found.append(model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, :V].log_softmax(-1))
        bare, own, teacher = found
        aligned = (bare + weight * own / manifest["aligner_temperature"]).log_softmax(-1)
        sums += torch.stack([kl_divergence(teacher, aligned).sum(), kl_divergence(teacher, bare).sum()])
        count += len(teacher)
    return (sums / count).tolist()


def test_a_run_on_given_answers_brings_the_aligned_model_to_its_teacher(task):
    """The figures are the exact divergences; temperature 1 is kept of the proposal, which is its own teacher."""
    report = train(
        options_of(
            task, "given", {"max_steps": 40, "eval_steps": 20, "save_steps": 20}, eval_dataset=str(task / "held_out.jsonl")
        )
    )
    metrics, manifest = report["metrics"], read_json(task / "given" / "trimtab.json")
    rows = [json.loads(line) for line in (task / "held_out.jsonl").read_text().splitlines()]
    aligned, bare = exact_divergence(task, "given", rows, (task / "teacher.txt").read_text())
    assert metrics["eval_kl_teacher_aligned"] == pytest.approx(aligned, rel=1e-3)
    assert metrics["eval_kl_teacher_proposal"] == pytest.approx(bare, rel=1e-3)
    assert aligned < 0.7 * bare
    mean_length = report["tokens"] / 48
    tokens = sum(len(row["chosen"]) + 1 for row in rows)
    assert metrics["eval_loss"] == pytest.approx(aligned * tokens / len(rows) / mean_length, rel=1e-3)
    assert metrics["eval_nll_teacher"] > 0
    assert manifest["proposal_temperature"] == 1
    assert report["sft_weight"] == 0
    assert report["contrast"] == 0
    tried = dict(map(tuple, report["weights_tried"]))
    assert tried[1.0] == pytest.approx(aligned, rel=1e-3), "the weight is tuned for the divergence"
    assert report["weight"] == min(tried, key=tried.get)
    digest = Teacher.read(str(task / "teacher.txt")).digest
    assert report["teacher"]["prompt"] == digest == read_json(task / "given" / "run.json")["teacher_prompt"]
    assert abs(report["teacher"]["cache"]["kl_error"]) < 1e-5


@pytest.mark.parametrize(("before", "flagged"), [("zyzzyxzyzx", False), ("abcabc", True)])
def test_given_answers_that_end_where_the_teacher_would_go_on_are_flagged(task, caplog, before, flagged):
    """The geometric means of P(end) at the answers' ends, with and without the teacher's prompt, scored in another way.

    Without the answers' column the teacher draws its own, and nothing is said of where those end.
    """
    name, rows = f"ends-{before}", [json.loads(line) for line in (task / "held_out.jsonl").read_text().splitlines()]
    said = {"eval_dataset": str(task / "held_out.jsonl"), "teacher_prompt": teacher_file(task, before, f"{before}.txt")}
    with caplog.at_level(logging.WARNING, "trimtab"):
        train(options_of(task, name, {"max_steps": 1}, **said))
    messages = [record.getMessage() for record in caplog.records if "the teacher would go on" in record.getMessage()]
    model, means = AlignedModel.from_pretrained(task / "proposal"), []
    for put in (before, ""):
        scores = model.score([put + row["prompt"] for row in rows], [row["chosen"] for row in rows])
        means.append(math.exp(sum(score.proposal[-1] for score in scores) / len(scores)))
    assert len(messages) == (means[0] < means[1]) == flagged
    assert all(f"of {means[0]:.2g} (geometric mean), and the bare proposal of {means[1]:.2g}" in one for one in messages)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trimtab"):
        train(options_of(task, f"{name}-drawn", {"max_steps": 1}, **said, columns=("prompt=prompt",), teacher_max_tokens=40))
    assert (task / f"{name}-drawn" / "teacher_answers" / "dev.jsonl").exists()
    assert "the teacher would go on" not in caplog.text


def test_a_budget_bounds_how_far_a_teacher_takes_the_proposal(task):
    """The divergence from the teacher at the weight, written out, and KL(aligned‖p̃) within the budget, as at every look."""
    said = {"eval_dataset": str(task / "held_out.jsonl"), "train_draft": False}
    training = {"max_steps": 40, "eval_steps": 20, "save_steps": 20}
    free = train(options_of(task, "free", training, **said))
    assert free["kl"] > 0.05
    bound = train(options_of(task, "bound", training, **said, max_kl=free["kl"] / 2))
    assert 0 < bound["weight"] < free["weight"]
    assert bound["kl"] <= free["kl"] / 2
    looks = [row for row in bound["history"] if "eval_loss" in row]
    assert all(row["eval_kl_aligned_proposal"] <= free["kl"] / 2 for row in looks)
    rows = [json.loads(line) for line in (task / "held_out.jsonl").read_text().splitlines()]
    before = (task / "teacher.txt").read_text()
    assert bound["metrics"]["eval_weight"] == bound["weight"]
    aligned, _ = exact_divergence(task, "bound", rows, before, bound["weight"])
    assert bound["metrics"]["eval_kl_teacher_aligned"] == pytest.approx(aligned, rel=1e-3)
    assert dict(map(tuple, bound["weights_tried"]))[bound["weight"]] == pytest.approx(aligned, rel=1e-3)


@pytest.mark.parametrize("rule", ["product", "geometric"])
def test_compressed_rows_do_nearly_as_well(task, rule):
    """Four entries and eight draws of 28 tokens: the estimate at the end is near the exact rows' figure."""
    figures = []
    for name, kept in (("whole", {}), ("cut", {"cache_top_k": 4} | ({"cache_tail_samples": 8} if rule == "product" else {}))):
        report = train(options_of(task, f"{name}-{rule}", {"max_steps": 24}, rule=rule, **kept))
        figures.append(report["metrics"])
    whole, cut = (figure["eval_kl_teacher_aligned"] for figure in figures)
    assert whole < 0.9 * figures[0]["eval_kl_teacher_proposal"]
    assert cut == pytest.approx(whole, rel=0.25)


def test_without_answers_the_proposal_draws_them_once_and_a_killed_run_goes_on(task, monkeypatch):
    """Kept as data sets of bare prompts; another run of the same seed draws the same, and the run resumes with them."""
    monkeypatch.setattr(teacher_answers, "BATCH", 8)
    settings = {"dataset": str(task / "prompts.jsonl"), "teacher_max_tokens": 5}
    whole = train(options_of(task, "drawn", **settings))
    drawn = {part: (task / "drawn" / "teacher_answers" / f"{part}.jsonl").read_text() for part in ("train", "dev")}
    rows = [json.loads(line) for text in drawn.values() for line in text.splitlines()]
    assert {row["prompt"] for row in rows} == {
        json.loads(line)["prompt"] for line in (task / "prompts.jsonl").read_text().splitlines()
    }
    assert len({row["completion"] for row in rows}) > 20
    assert all(("unfinished" in row) == (len(row["completion"]) == 5) for row in rows)

    original, calls = teacher_answers.AlignedModel.generate, []

    def dies(self, prompts, params):
        calls.append(list(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, prompts, params)

    monkeypatch.setattr(teacher_answers.AlignedModel, "generate", dies)
    options = options_of(task, "killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(options)
    assert train(options)["metrics"] == whole["metrics"]
    assert len(calls) == 3 + 3 + 2, "of six batches two were not drawn again; the development part has two"
    assert all(prompt.startswith("zyzzyxzyzx") for prompts in calls for prompt in prompts)
    for part, text in drawn.items():
        assert (task / "killed" / "teacher_answers" / f"{part}.jsonl").read_text() == text
    with pytest.raises(InvalidOption, match="holds a run with teacher_prompt="):
        train(dataclasses.replace(options, teacher_prompt=teacher_file(task, "abc", "other.txt")))


@pytest.mark.parametrize(("limit", "left_out"), [(40, True), (4, False)])
def test_drawn_answers_that_did_not_end_are_left_out_where_most_did(task, caplog, limit, left_out):
    """They would be most of the tokens, and tell nothing of where to end."""
    name = f"limit-{limit}"
    with caplog.at_level(logging.WARNING, "trimtab"):
        report = train(options_of(task, name, {"max_steps": 2}, dataset=str(task / "prompts.jsonl"), teacher_max_tokens=limit))
    rows = [read_records(str(task / name / "teacher_answers" / f"{part}.jsonl")) for part in ("train", "dev")]
    cut = [[bool(row.unfinished) for row in part] for part in rows]
    lengths = [len(row.chosen) + (not row.unfinished) for row in rows[0] if not (left_out and row.unfinished)]
    assert report["tokens"] == sum(lengths)
    assert 0 < len(lengths) <= len(rows[0])
    (message,) = [record.getMessage() for record in caplog.records if "drawn behind" in record.getMessage()]
    assert f"{sum(map(sum, cut))} of {sum(map(len, cut))} answers" in message
    assert f"did not end within {limit} tokens, {'and are left out' if left_out else 'and hardly an end is learnt'}" in message


def test_chats_get_the_teachers_messages_and_a_drafter_is_trained_as_ever(task):
    report = train(
        options_of(
            task, "chats", {"max_steps": 4}, dataset=str(task / "chats.jsonl"), teacher_max_tokens=4,
            teacher_prompt=str(task / "teacher.json"), train_draft=True, dev_samples=2,
        )
    )  # fmt: skip
    assert report["draft"]["metrics"]["eval_loss"] > 0
    rows = read_records(str(task / "chats" / "teacher_answers" / "train.jsonl"))
    assert all(row.prompt[0]["role"] == "user" and row.chosen[0]["role"] == "assistant" for row in rows)
    before = report["metrics"]["eval_kl_teacher_proposal"]
    assert before > 0.01
    drawn = read_records(str(task / "chats" / "teacher_answers" / "dev.jsonl"))
    asked = {row.chosen[0]["content"].strip(): row.prompt for row in drawn}
    assert len(report["samples"]) == 2
    assert {sample["wanted"] for sample in report["samples"]} <= set(asked)
    assert not any("be brief" in sample["prompt"] for sample in report["samples"])
    teacher = AlignedModel.from_pretrained(task / "proposal")
    prompts = [[SYSTEM, *SHOT, *asked[sample["wanted"]]] for sample in report["samples"]]
    greedy = teacher.generate(prompts, SamplingParams(max_tokens=LIMIT, temperature=0.0))
    assert [sample["teacher"] for sample in report["samples"]] == [one.text.strip() for one in greedy]


def test_prompts_that_fill_the_context_behind_the_teacher_are_left_out(tmp_path, caplog):
    folder = make_task(tmp_path)
    save_tiny(folder / "proposal", tiny_model("llama", V, seed=1, max_position_embeddings=20), tiny_tokenizer())
    rows = [{"prompt": "abcdefghijkl"[: 4 + i % 8] + "xyz"[i // 8]} for i in range(24)]
    write_rows(folder / "prompts.jsonl", rows)
    options = options_of(
        folder,
        "out",
        {"max_steps": 2},
        dataset=str(folder / "prompts.jsonl"),
        teacher_prompt=teacher_file(folder, "z" * 12, "z"),
    )
    with caplog.at_level(logging.WARNING):
        train(options)
    assert "prompts fill the context of 20 tokens behind teacher_prompt, and are left out" in caplog.text


@pytest.mark.slow
def test_a_dry_run_knows_the_bytes_of_both_caches_and_writes_nothing(task):
    options = options_of(task, "dry", {"max_steps": 2}, cache_top_k=4, cache_tail_samples=3)
    told = estimate(options, Expected(tflops=1.0))
    assert not (task / "dry").exists()
    train(options)
    files = list((task / "dry" / "proposal_cache").rglob("*.safetensors"))
    assert {file.parent.name for file in files} == {"dev", "dev_teacher", "train_teacher"}
    assert told["cache"]["bytes"] == sum(file.stat().st_size for file in files)
    assert told["cache"]["teacher_bytes_per_token"] == 16 * (1 + 4 + 3)
    undrawn = estimate(options_of(task, "dry-2", dataset=str(task / "prompts.jsonl")), Expected(tflops=1.0))
    assert undrawn["data"]["why_not"] == "the answers are yet to be drawn behind teacher_prompt"
    assert undrawn["data"]["examples"] + undrawn["data"]["development"] == 48
