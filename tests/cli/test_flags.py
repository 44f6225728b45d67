"""Flags: both spellings of every one, mistakes in one line, and options that have no effect beside the others."""

import argparse
import importlib

import pytest
import torch

from tiny_task import make_task
from trimtab import AlignedModel, Aligner
from trimtab.cli import COMMANDS, _parser, main
from trimtab.cli.options import _read_config, read_options
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Manifest
from trimtab.models.vocabulary import fingerprint_vocabulary


def options_of(command):
    return importlib.import_module(f"trimtab.cli.{command.replace('-', '_')}").Options


def value_of(action):
    """Some value that a flag takes."""
    if action.type in (int, float):
        return "3"
    if action.metavar and action.metavar.startswith("{"):
        return action.metavar.strip("{}").split(",")[0]
    return "false" if action.nargs == "?" else "a-b_c"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_works_in_both_spellings(command):
    parser = _parser(command, options_of(command))
    takes = [a for a in parser._actions if not isinstance(a, (argparse._HelpAction, argparse._StoreTrueAction))]
    assert len(takes) > 0
    for action in takes:
        (flag,) = action.option_strings
        assert "-" not in flag[2:]
        value = value_of(action)
        expected = parser.read([f"{flag}={value}"])
        dashed = f"--{flag[2:].replace('_', '-')}"
        mixed = f"--{flag[2:].replace('_', '-', 1)}"
        for words in ([dashed, value], [f"{dashed}={value}"], [flag, value], [mixed, value]):
            assert parser.read(words) == expected
        if action.nargs == "?":
            assert parser.read([dashed]) == parser.read([flag]) == {action.dest: True}
            for off in (f"--no_{flag[2:]}", f"--no-{dashed[2:]}"):
                assert parser.read([off]) == {action.dest: False}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_configuration_file_works_in_both_spellings(command, tmp_path):
    options, file = options_of(command), tmp_path / "config.yaml"
    for action in _parser(command, options)._actions:
        name, dashed = action.dest, action.dest.replace("_", "-")
        if name in ("help", "config", "json") or "_" not in name:
            continue
        read = []
        for key in (name, dashed):
            file.write_text(f"{key}: {value_of(action)}\n", encoding="utf-8")
            read.append(_read_config(options, str(file)))
        assert read[0] == read[1]
        assert read[0].keys() == {name}
        file.write_text(f"{name}: 1\n{dashed}: 1\n", encoding="utf-8")
        with pytest.raises(InvalidOption, match=f"line 2: '{name}' and '{dashed}' are one option: give it once"):
            _read_config(options, str(file))


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--vllm_args=--max-num-seqs=4 --api-key x"], "--max-num-seqs=4 --api-key x"),
        (["--vllm-args", "--max-num-seqs=4 --some-thing 3"], "--max-num-seqs=4 --some-thing 3"),
        (["--vllm_args", "--enforce-eager"], "--enforce-eager"),
    ],
)
def test_what_is_passed_on_stays_as_it_is(words, value):
    assert _parser("serve", options_of("serve")).read(words) == {"vllm_args": value}


def test_values_that_begin_with_a_dash_are_values():
    parser = _parser("generate", options_of("generate"))
    assert parser.read(["--weight", "-1e-3", "--weight", "-2"]) == {"weight": [-1e-3, -2.0]}
    assert parser.read(["--prompt", "--max-tokens=3 is a flag", "--stop", "-"]) == {
        "prompt": ["--max-tokens=3 is a flag"],
        "stop": ["-"],
    }
    with pytest.raises(InvalidOption, match="argument --prompt: expected one argument"):
        parser.read(["--prompt", "--max-tokens", "3"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "trimtab: error: there is no command 'trian': did you mean train? (see trimtab --help)"),
        (["--verson"], "trimtab: error: unrecognized arguments: --verson: did you mean --version? (see trimtab --help)"),
        (
            ["train", "--objective", "likelyhood"],
            "trimtab train: error: argument --objective: invalid choice: 'likelyhood' (choose from grpo, likelihood,"
            " preference, ram, sft, tb, soft_q, subtb): did you mean likelihood? (see trimtab train --help)",
        ),
        (
            ["serve", "--api-keys", "k"],
            "trimtab serve: error: unrecognized arguments: --api-keys k: did you mean --api_key? (see trimtab serve --help)",
        ),
        (["env", "-x"], "trimtab env: error: unrecognized arguments: -x (see trimtab env --help)"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_meant(words, message, err):
    assert err(*words) == (2, "", f"{message}\n")


@pytest.fixture
def err(capsys):
    """Exit status, standard output and standard error of one call of `trimtab`."""

    def run(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


BARE = {"proposal": "p"}
ALIGNED = {"proposal": "p", "aligner": ["a"]}
TRAIN = {"proposal": "p", "aligner": "a", "dataset": "d.jsonl", "output_dir": "o"}
EVAL = {**ALIGNED, "dataset": "d.jsonl", "out": "o"}
FILES = {"dataset": "d.jsonl", "out": "o", "baseline": "a.json", "system": "b.json", "judge": ["chrf"]}
PROPOSE = {"proposal": "p", "dataset": "d.jsonl", "out": "o"}
VLLM = {**ALIGNED, "engine": "vllm", "aligner": ["q=a"]}


@pytest.mark.parametrize(
    ("command", "beside", "name", "value", "why"),
    [
        ("generate", BARE, "rule", "geometric", "needs an --aligner"),
        ("generate", BARE, "weight", [1.0], "needs an --aligner"),
        ("generate", BARE, "aligner_temperature", 2.0, "needs an --aligner"),
        ("generate", BARE, "draft", "aligner", "'aligner' needs an aligner"),
        ("generate", BARE, "draft_temperature", 2.0, "needs an --aligner, or --draft"),
        ("generate", BARE, "num_speculative_tokens", 4, "needs an --aligner, or --draft"),
        ("generate", {**ALIGNED, "draft": "none"}, "num_speculative_tokens", 4, "has no effect with --draft none"),
        ("generate", {**ALIGNED, "draft": "none"}, "draft_temperature", 1.0, "has no effect with --draft none"),
        ("generate", {**ALIGNED, "draft": "ngram"}, "draft_temperature", 1.0, "is for a model that drafts"),
        ("generate", {**ALIGNED, "temperature": 0.0}, "top_p", 0.9, "has no effect with --temperature 0"),
        ("generate", {**ALIGNED, "temperature": 0.0}, "top_k", 5, "has no effect with --temperature 0"),
        ("propose", {**PROPOSE, "temperature": 0.0}, "min_p", 0.1, "has no effect with --temperature 0"),
        ("score", {**BARE, "dataset": "d.jsonl"}, "aligner_temperature", 1.0, "needs an --aligner"),
        ("score", {**BARE, "dataset": "d.jsonl"}, "dataset_split", "test", "is for a data set of the hub"),
        ("bench", BARE, "weight", [1.0], "needs an --aligner"),
        ("propose", PROPOSE, "pairs", 1, "needs --reward_model"),
        ("propose", PROPOSE, "concurrency", 16, "needs --endpoint"),
        ("propose", {**PROPOSE, "endpoint": ["http://x/v1"]}, "leave_out_long", True, "is for a model that runs here"),
        ("propose", PROPOSE, "expected_examples", 5, "is for --dry_run"),
        ("train", TRAIN, "alpha", 1e-4, "is for --objective ram"),
        (
            "train",
            {**TRAIN, "objective": "sft", "rule": "geometric"},
            "beta",
            0.1,
            "is for --objective grpo, likelihood",
        ),
        ("train", TRAIN, "lora_r", 16, "is for the adapters of --use_peft"),
        ("train", TRAIN, "lora_target_modules", ["q_proj"], "is for the adapters of --use_peft"),
        ("train", {**TRAIN, "eval_dataset": "e.jsonl"}, "dev_fraction", 0.1, "has no effect with --eval_dataset"),
        ("train", TRAIN, "assume_tflops", 1.0, "is for --dry_run"),
        ("train", TRAIN, "dataset_config", "x", "is for a data set of the hub"),
        ("eval", EVAL, "criterion", "helpful", "needs a --judge that is an endpoint"),
        ("eval", EVAL, "concurrency", 8, "needs an endpoint"),
        ("eval", EVAL, "null", True, "needs a --judge"),
        ("eval", EVAL, "dev_fraction", 0.2, "needs --sweep_weight"),
        ("eval", FILES, "max_tokens", 512, "is for answers that are written now"),
        ("eval", FILES, "num_speculative_tokens", 4, "is given, but neither"),
        ("eval", FILES, "null", True, "needs a --judge, and a --baseline that can answer again"),
        ("eval", {**EVAL, "system": "a.json"}, "draft", "ngram", "is for the system aligned"),
        ("eval", {**EVAL, "dataset": "d.json"}, "columns", ["prompt=x"], "needs a --dataset in a TRL layout"),
        ("eval", {"annotations": "a.json"}, "max_tokens", 512, "has no meaning with --annotations"),
        ("serve", BARE, "rule", "product", "needs an --aligner"),
        ("serve", {**BARE, "aligner_root": "r"}, "weight", [1.0], "needs an --aligner"),
        ("serve", BARE, "max_aligner_memory", 1.0, "needs an --aligner, or --aligner_root"),
        ("serve", BARE, "draft", "aligner", "'aligner' needs an aligner"),
        ("serve", BARE, "votes", "v.jsonl", "belongs to --playground"),
        ("serve", BARE, "vllm_args", "--x", "belongs to --engine vllm"),
        ("serve", VLLM, "max_waiting", 256, "does not go with --engine vllm"),
    ],
)
def test_an_option_without_effect_is_refused(command, beside, name, value, why, tmp_path):
    """By flag and by file, at its default value, too; and not where it is left out, or has an effect."""
    options = options_of(command)
    read_options(options, beside)
    with pytest.raises(InvalidOption) as caught:
        read_options(options, {**beside, name: value})
    assert str(caught.value).startswith(f"--{name} {why}")


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("generate", {**BARE, "draft": "none", "num_speculative_tokens": 0}),
        ("generate", {**BARE, "draft": "ngram", "num_speculative_tokens": 4}),
        ("generate", {**ALIGNED, "draft": "ngram", "num_speculative_tokens": 0}),
        ("generate", {**ALIGNED, "temperature": 0.0, "seed": 1, "top_p": 1.0, "top_k": 0}),
        ("score", {**ALIGNED, "dataset": "org/name", "dataset_split": "test"}),
        ("train", {**TRAIN, "beta": 1.0}),
        ("train", {**TRAIN, "contrast": 0.5, "beta": 1.0}),
        ("train", {**TRAIN, "objective": "ram", "rule": "candidates", "alpha": 0.1}),
        ("train", {**TRAIN, "use_peft": True, "lora_r": 4}),
        ("train", {**TRAIN, "use_peft": False, "train_draft": False}),
        ("eval", {**EVAL, "judge": ["http://x/v1"], "criterion": "helpful", "concurrency": 4}),
        ("serve", {**BARE, "aligner_root": "r", "rule": "geometric", "draft": "aligner", "max_aligner_memory": 1.0}),
    ],
)
def test_what_has_an_effect_or_is_off_is_taken(command, given):
    read_options(options_of(command), given)


def test_a_configuration_file_may_hold_what_is_for_other_runs(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("expected_examples: 5\ndataset_split: test\n", encoding="utf-8")
    assert read_options(options_of("propose"), {**PROPOSE, "config": str(file)}).expected_examples == 5
    file.write_text("concurrency: 5\n", encoding="utf-8")
    with pytest.raises(InvalidOption, match=r"^--concurrency needs --endpoint$"):
        read_options(options_of("propose"), {**PROPOSE, "config": str(file)})


def test_scoring_has_no_flags_for_drafts(err):
    status, out, said = err("score", "--proposal", "p", "--dataset", "d", "--draft", "none")
    assert (status, out) == (2, "")
    assert said.startswith("trimtab score: error: unrecognized arguments: --draft none")


# ---- who drafts


def test_generate_says_who_drafts(task, err, caplog):
    residual = save_residual(task)
    words = "generate", "--proposal", task / "proposal", "--prompt", "a", "--max_tokens", 1
    for more, who in (
        (("--aligner", task / "start"), "the aligner itself"),
        (("--aligner", task / "start", "--aligner", task / "proposal"), "the first aligner"),
        (("--draft", task / "start"), f"the drafter {task / 'start'}"),
        (("--draft", "ngram"), "the text itself, by its n-grams"),
        (("--aligner", task / "start", "--draft", "none"), "nobody: --draft none"),
        (("--aligner", task / "start", "--num-speculative-tokens", 0), "nobody: --num_speculative_tokens 0"),
        (("--aligner", task / "start", "--rule", "candidates(n=2)"), "nobody: the rule 'candidates(n=2)' has no row"),
        (("--aligner", residual), "the text itself, by its n-grams: the aligner is a residual"),
        (("--aligner", residual, "--draft", "aligner"), "the aligner itself"),
    ):
        caplog.clear()
        assert err(*words, *more)[0] == 0
        (said,) = [text for text in caplog.messages if "who drafts" in text]
        assert said.startswith(f"who drafts: {who}")


def save_residual(task):
    """An aligner as `likelihood` under `product` saves it, without a drafter."""
    start = Aligner.from_pretrained(task / "start")
    manifest = Manifest(vocabulary=fingerprint_vocabulary(start.tokenizer), objective="likelihood")
    Aligner(start.model, start.tokenizer, manifest, "residual").save_pretrained(task / "residual")
    return task / "residual"


# ---- checked before any work is done


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def refuse(*args, **settings):
    raise AssertionError("a model was loaded, or run")


def test_aligners_and_drafters_may_have_a_dtype_of_their_own(task, capsys):
    words = ["generate", "--proposal", task / "proposal", "--prompt", "abc", "--max_tokens", 3, "--aligner_dtype", "bfloat16"]
    assert main([*map(str, words), "--aligner", str(task / "start"), "--json"]) == 0
    assert main([*map(str, words), "--draft", str(task / "start"), "--json"]) == 0
    capsys.readouterr()
    model = AlignedModel.from_pretrained(task / "proposal", task / "start", aligner_dtype="bfloat16")
    assert (model.proposal.model.dtype, model.aligners[0].model.dtype) == (torch.float32, torch.bfloat16)
    with pytest.raises(InvalidOption, match="aligner_dtype has no effect: nothing is loaded here beside the proposal"):
        AlignedModel.from_pretrained(task / "proposal", aligner_dtype="bfloat16")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("generate", "--prompt", "a", "--dtype", "floot"), 2, "dtype: 'floot' is none of torch's"),
        (("generate", "--prompt", "a", "--aligner_dtype", "float32"), 2, "there is none: leave it out"),
        (("generate", "--prompt", "a", "--aligner", "b", "--aligner_dtype", "floot"), 2, "aligner_dtype: 'floot' is none"),
        (("generate", "--prompt", "a", "--rule", "par"), 2, "there is no rule 'par'"),
        (("generate", "--prompt", "a", "--num-speculative-tokens", "17"), 2, "must be from 0 to 16"),
        (("generate", "--prompt", "a", "--aligner", "{}/nowhere"), 1, "nowhere' does not exist"),
        (("generate", "--prompt", "a", "--draft", "{}/nowhere"), 1, "nowhere' does not exist"),
        (("generate", "--prompt", "a", "--out", "{}/train.jsonl/x"), 2, "train.jsonl is a file: name a folder"),
        (("generate", "--prompt", "a", "--out", "{}"), 2, "is a folder: name a file"),
        (("propose", "--dataset", "{}/train.jsonl", "--out", "/proc/x"), 2, "nothing can be written in /proc"),
        (("score", "--dataset", "{}/train.jsonl", "--aligner", "{}/start", "--rule", "candidates(n=2)"), 2, "no row in closed"),
    ],
)
def test_what_can_be_checked_is_checked_before_a_model_is_loaded(task, err, monkeypatch, words, status, message):
    monkeypatch.setattr("trimtab.decode.assemble.load_model", refuse)
    got, out, said = err(*(word.replace("{}", str(task)) for word in (*words, "--proposal", "{}/proposal")))
    assert (got, out) == (status, "")
    assert message in said.splitlines()[-1]


def test_a_record_that_is_too_long_is_found_before_any_is_scored(task, err, monkeypatch, tmp_path):
    """However far behind: the batch holds one."""
    rows = ['{"prompt": "ab", "completion": "cd"}'] * 5 + [f'{{"prompt": "{"a" * 70}", "completion": "b"}}']
    (tmp_path / "long.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    monkeypatch.setattr("trimtab.decode.aligned.score_tokens", refuse)
    status, _, said = err("score", "--proposal", task / "proposal", "--dataset", tmp_path / "long.jsonl", "--max_num_seqs", 1)
    assert status == 1
    assert "long.jsonl:6: prompts[0] and completions[0] have 70 + 2 tokens" in said.splitlines()[-1]
