"""A run says before it begins that its largest micro-batch will not fit, with the figures of the dry run."""

import logging

import pytest

from tiny_task import make_task, task_options
from trimtab.hardware import in_bytes
from trimtab.train import headroom
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.run import train

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_micro_batch_that_does_not_fit_is_said_before_anything_is_cached(folder, said, kind):
    options = task_options(folder, f"short {kind}", {"max_steps": 1}, **KINDS[kind])
    memory = estimate(options, Expected())["memory"]
    takes = memory["total"] - memory["weights"]
    messages = said(options, takes - 1)
    (place,) = (i for i, message in enumerate(messages) if "the largest micro-batch, of " in message)
    otherwise = memory["total_if_checkpointing_were_otherwise"] - memory["weights"]
    assert f"takes {in_bytes(takes)}, and {in_bytes(takes - 1)} are free" in messages[place]
    assert f"with --activation_checkpointing it takes {in_bytes(otherwise)}" in messages[place]
    assert not any("cach" in message for message in messages[:place])


@pytest.mark.parametrize("kind", KINDS)
def test_one_that_fits_is_no_cause_for_words(folder, said, kind):
    options = task_options(folder, f"enough {kind}", {"max_steps": 1}, **KINDS[kind])
    memory = estimate(options, Expected())["memory"]
    assert not any("micro-batch" in message for message in said(options, memory["total"] - memory["weights"]))
