"""A run says before it begins that its largest micro-batch will not fit, with the figures of the dry run."""

import logging
from pathlib import Path

import pytest

from tiny_task import make_task, task_options
from trimtab.errors import InvalidOption
from trimtab.hardware import in_bytes
from trimtab.models.loading import load_model
from trimtab.train import headroom
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.run import run_training as train

pytestmark = pytest.mark.slow

HEAD = {"aligner": "", "head_layers": 1, "contrast": 0.0, "keep_samples": 0}
KINDS = {"an aligner": {}, "an adapter": {"use_peft": True}, "a head": HEAD}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def said(caplog, monkeypatch):
    """What a run logs, where so much memory is free and no model is too small to be looked at."""
    caplog.set_level(logging.INFO)

    def run(options, free):
        caplog.clear()
        monkeypatch.setattr(headroom, "SMALL", 0)
        monkeypatch.setattr(headroom, "free_memory", lambda device: free)
        train(options)
        return [record.getMessage() for record in caplog.records]

    return run


def held(folder, options):
    """Bytes of the models that are in memory when a run looks: the proposal, and the aligner if that is another one."""
    names = {"proposal", Path(options.aligner or folder / "proposal").name}
    return sum(p.nbytes for name in names for p in load_model(folder / name, dtype="float32", device="cpu").parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_training_that_does_not_fit_is_said_before_anything_is_cached(folder, said, kind):
    options = task_options(folder, f"short {kind}", {"max_steps": 1}, **KINDS[kind])
    memory, there = estimate(options, Expected())["memory"], held(folder, options)
    messages = said(options, memory["total"] - there - 1)
    (place,) = (i for i, message in enumerate(messages) if "the largest micro-batch, of " in message)
    figures = [in_bytes(memory[name]) for name in ("total", "total_if_checkpointing_were_otherwise")]
    assert f"takes {figures[0]} with all that training holds, and there are {in_bytes(memory['total'] - 1)}" in messages[place]
    assert f"with --activation_checkpointing it takes {figures[1]}" in messages[place]
    assert not any("cach" in message for message in messages[:place])


@pytest.mark.parametrize("kind", KINDS)
def test_what_fits_is_no_cause_for_words(folder, said, kind):
    options = task_options(folder, f"enough {kind}", {"max_steps": 1}, **KINDS[kind])
    memory = estimate(options, Expected())["memory"]
    assert not any("micro-batch" in message for message in said(options, memory["total"] - held(folder, options)))


def test_a_look_that_fails_is_said_and_ends_no_run(folder, said, monkeypatch):
    def failing(*_):
        raise InvalidOption("optim: 'odd' cannot be tried without weights")

    monkeypatch.setattr(headroom, "largest_step", failing)
    messages = said(task_options(folder, "odd", {"max_steps": 1}), 0)
    assert "whether training fits into memory is not known: optim: 'odd' cannot be tried without weights" in messages
    assert (folder / "odd" / "trimtab.json").exists()
