"""A head's drafter: what it learns, that a kill changes nothing, and that decoding with it changes no text."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tiny_task import make_task, task_options, task_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.errors import UnsupportedModel
from trimtab.models.reduced import ReducedLM
from trimtab.train import run
from trimtab.train.draft import CHECKPOINTS
from trimtab.train.examples import Example
from trimtab.train.head_draft import Answer, ReducedTrainer, frequent_tokens
from trimtab.train.run import train


def options(folder, name, **settings):
    plain = {"aligner": "", "head_layers": 1, "contrast": 0.0, "lora_dropout": 0.0, "keep_samples": 0, "train_draft": True}
    return task_options(folder, name, **(plain | settings))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, with a head and its drafter in `head`, and the report."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    return folder, train(options(folder, "head"))


def test_it_comes_closer_to_the_aligned_model(task):
    folder, report = task
    seen = [row for row in report["draft"]["history"] if "eval_acceptance_on_answers" in row]
    assert seen[-1]["eval_loss"] < seen[0]["eval_loss"]
    assert report["draft"]["metrics"]["eval_acceptance_on_answers"] > 0.3
    assert json.loads((folder / "head" / "training.json").read_text())["draft"] == report["draft"]


def test_decoding_with_it_changes_no_text(task):
    folder, _ = task
    prompts = [row["prompt"] for row in task_rows(6)]
    for temperature in (0.0, 1.0):
        params = [SamplingParams(seed=i, max_tokens=12, temperature=temperature) for i in range(6)]
        texts = []
        for length in (0, 1, 4, None):
            model = AlignedModel.from_pretrained(folder / "proposal", folder / "head", num_speculative_tokens=length)
            assert isinstance(model.models.draft, ReducedLM)
            texts.append([completion.tokens for completion in model.generate(prompts, params)])
            assert length != 4 or model.pace.tally.accepted > 0
        assert texts[0] == texts[1] == texts[2] == texts[3]
        alone = [model.generate(p, one)[0].tokens for p, one in zip(prompts, params, strict=True)]
        assert alone == texts[0]
        if not temperature:
            nobody = AlignedModel.from_pretrained(folder / "proposal", folder / "head", draft="none")
            assert [completion.tokens for completion in nobody.generate(prompts, params)] == texts[0]
