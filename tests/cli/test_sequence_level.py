"""`trimtab generate --sequence_level`: what it prints and writes, what is wrong usage before a model is loaded."""

import json
import shutil

import pytest

from eval_task import called
from tiny import tiny_tokenizer
from tiny_task import make_task
from trimtab import AlignedModel, SamplingParams
from trimtab.models.aligner import Manifest
from trimtab.models.vocabulary import fingerprint_vocabulary


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def words(task, *more):
    return "generate", "--proposal", task / "proposal", "--aligner", task / "start", "--max_tokens", 4, "--seed", 3, *more


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_report_names_the_target_and_each_row_tells_of_its_run(task, capsys):
    asked = words(task, "--prompt", "ab", "--n", 2, "--json", "--rule", "product")
    status, out, errors = called(capsys, *asked, "--sequence-level", "particles=6")
    told = json.loads(out)
    assert status == 0
    assert not any("the aligner itself" in line for line in errors)  # nobody drafts
    assert (told["target"], told["sequence_level"]) == ("sequence-level", "particles=6,ess=0.5")
    model = AlignedModel.from_pretrained(task / "proposal", task / "start", rule="product")
    done = model.generate(["ab"], SamplingParams(max_tokens=4, seed=3, n=2), sequence_level="particles=6")
    for row, run in zip(told["completions"], done, strict=True):
        assert row["completion"] == run.text
        assert row["sequence_level"] == {
            "log_z": run.particles.log_z,
            "effective_size": run.particles.effective_size,
            "least_size": min(run.particles.effective_size, *run.particles.effective_sizes),
            "resamplings": len(run.particles.resampled),
            "origins": run.particles.origins,
            "collapsed": run.particles.collapsed,
        }
    plain = json.loads(called(capsys, *asked)[1])
    assert plain["target"] == "token-level"
    assert "sequence_level" not in plain
    assert "sequence_level" not in plain["completions"][0]


def test_files_are_written_and_resumed_under_the_same_settings_only(task, capsys, tmp_path, monkeypatch):
    out = tmp_path / "o.jsonl"
    asked = words(task, "--input", task / "held_out.jsonl", "--max_num_seqs", 4, "--out", out)
    whole = called(capsys, *asked, "--sequence_level", "particles=3,ess=1", "--out", tmp_path / "whole.jsonl")
    assert whole[0] == 0
    generate, calls = AlignedModel.generate, []

    def interrupted(self, *given, **more):
        calls.append(more["sequence_level"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(AlignedModel, "generate", interrupted)
        called(capsys, *asked, "--sequence_level", "particles=3,ess=1")
    status, _, errors = called(capsys, *asked, "--sequence_level", "particles=4")
    assert status == 2
    assert "sequence_level" in errors[-1]
    assert called(capsys, *asked, "--sequence_level", "particles=3,ess=1")[0] == 0
    assert rows(out) == rows(tmp_path / "whole.jsonl")
    assert {"log_z", "collapsed"} <= rows(out)[0]["sequence_level"].keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["particles=0"], "sequence_level: particles must be an integer from 2 to 65536, not 0"),
        (["16"], "sequence_level: '16' is none of particles=…, ess=…"),
        (["particles=4", "--temperature", 0.5], "temperature acts on the row that tokens are drawn from"),
        (["particles=4", "--rule", "kl_gate"], "sequence_level: rule 'kl_gate' does not weigh each token by itself"),
        (["particles=4", "--draft", "ngram"], "--draft has no effect with --sequence_level: nobody drafts for particles"),
        (["particles=4", "--num_speculative_tokens", 3], "--num_speculative_tokens has no effect with --sequence_level"),
    ],
)
def test_wrong_usage_is_one_line_before_a_model_is_loaded(task, capsys, more, message):
    asked = "generate", "--proposal", task / "nowhere", "--aligner", task / "nobody", "--prompt", "ab"
    status, out, errors = called(capsys, *asked, "--sequence_level", *more)
    assert (status, out, len(errors)) == (2, "", 1)
    assert message in errors[0]


def test_a_manifests_rule_that_has_no_such_law_is_wrong_usage(task, capsys, tmp_path):
    gated = shutil.copytree(task / "start", tmp_path / "gated")
    manifest = Manifest(vocabulary=fingerprint_vocabulary(tiny_tokenizer()), rule="kl_gate")
    (gated / "trimtab.json").write_text(json.dumps(manifest.to_dict()), encoding="utf-8")
    asked = "generate", "--proposal", task / "proposal", "--aligner", gated, "--prompt", "ab", "--sequence_level", "particles=4"
    status, _, errors = called(capsys, *asked)
    assert status == 2
    assert "rule 'kl_gate' does not weigh each token by itself" in errors[-1]


def test_the_proposal_alone_is_wrong_usage(task, capsys):
    asked = "generate", "--proposal", task / "proposal", "--prompt", "ab", "--sequence_level", "particles=4"
    status, _, errors = called(capsys, *asked)
    assert status == 2
    assert "--sequence_level needs an --aligner: the proposal alone is the same at both levels" in errors[-1]
