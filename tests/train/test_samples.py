"""Samples after training: what the two models say by other means, beside what was wanted; in the report and in the log."""

import json
import logging

import pytest

from tiny import EOS
from tiny_task import make_task, task_options, task_plan, task_rows, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.data.examples import Example
from trimtab.errors import InvalidOption
from trimtab.train.run import run_training as train
from trimtab.train.samples import LIMIT, pick_prompts


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def test_samples_are_greedy_answers_of_proposal_and_aligned_model_beside_the_wanted_ones(task, caplog):
    with caplog.at_level(logging.INFO, "trimtab"):
        report = train(task_options(task, "sampled", dev_samples=5, eval_dataset=str(task / "held_out.jsonl")))
    rows = {row["prompt"]: row["chosen"] for row in task_rows(64)[48:]}
    samples = report["samples"]
    prompts = [sample["prompt"] for sample in samples]
    assert len(set(prompts)) == 5
    assert [sample["wanted"] for sample in samples] == [rows[prompt] for prompt in prompts]
    greedy = SamplingParams(max_tokens=LIMIT, temperature=0.0)
    for name, model in (
        ("proposal", AlignedModel.from_pretrained(task / "proposal")),
        ("aligned", AlignedModel.from_pretrained(task / "proposal", task / "sampled")),
    ):
        texts = [one.text.strip() for one in model.generate(prompts, greedy)]
        assert [sample[name] for sample in samples] == texts
    assert any(sample["proposal"] != sample["aligned"] for sample in samples)
    kept = json.loads((task / "sampled" / "training.json").read_text())
    assert (kept["samples"], kept["sample_figures"]) == (samples, report["sample_figures"])
    shown = [record.getMessage() for record in caplog.records if record.getMessage().startswith("sample\n")]
    assert len(shown) == 3
    for sample, text in zip(samples, shown, strict=False):
        assert text.splitlines() == ["sample", *(f"  {key + ':':10}{value}" for key, value in sample.items())]


def test_a_finished_aligner_gets_its_samples_later_and_keeps_them(task, monkeypatch):
    without = train(task_options(task, "later"))
    assert "samples" not in without
    with_samples = train(task_options(task, "later", dev_samples=2))
    assert len(with_samples["samples"]) == 2
    assert {key: with_samples[key] for key in without} == without
    monkeypatch.setattr("trimtab.train.samples.AlignedModel", None)  # nothing is drawn again
    assert train(task_options(task, "later", dev_samples=2)) == with_samples


def test_broken_text_is_flagged(task, caplog):
    """Wanted answers that never end teach text that never ends."""
    rows = [row | {"chosen": "xyz" * 6, "unfinished": ["chosen"]} for row in task_rows(48)]
    write_rows(task / "endless.jsonl", [{k: v for k, v in row.items() if k != "rejected"} for row in rows])
    said = {"dataset": str(task / "endless.jsonl"), "eval_dataset": str(task / "held_out.jsonl")}
    training = {"max_steps": 30, "load_best_model_at_end": False}
    with caplog.at_level(logging.WARNING, "trimtab"):
        report = train(task_options(task, "endless", training, dev_samples=4, contrast=0.0, **said))
    figures = report["sample_figures"]
    assert figures["unended_aligned"] == 1.0
    (message,) = [record.getMessage() for record in caplog.records if "look broken" in record.getMessage()]
    assert "100% do not end where wanted ones do" in message


def test_behind_an_endpoint_there_are_none(tmp_path):
    said = {"proposal_endpoint": ("http://a",), "cache_top_k": 5, "cache_tail_samples": None}
    assert task_plan(tmp_path, "out", **said).samples == 0
    assert task_plan(tmp_path, "out", **(said | {"dev_samples": None})).samples == 0
    assert task_plan(tmp_path, "out", dev_samples=None).samples == 8
    with pytest.raises(InvalidOption, match="dev_samples: text is sampled from a proposal that is here, not from an endpoint"):
        task_plan(tmp_path, "out", **said, dev_samples=3)


def test_prompts_come_from_all_over_and_each_is_another():
    examples = [Example([i // 2 + 3], [i, EOS], []) for i in range(20)]
    picked = pick_prompts(examples, 5)
    assert [list(example.prompt) for example in picked] == [[3], [5], [7], [9], [11]]
    assert [example.chosen[0] for example in picked] == [0, 4, 8, 12, 16]
    assert len(pick_prompts(examples, 50)) == 10
