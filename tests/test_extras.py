"""A core install does what needs no extra, and says in one sentence which extra the rest needs.

The environment of a core install is made here out of the one that the tests run in: a folder of links to the packages that the
core's own dependencies lead to, and Python without any other place to look for packages.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement

from models.test_head import save_base, save_head
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.errors import InvalidOption
from trimtab.extras import how_to_install, is_here, need

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OF_EXTRAS = {"accelerate", "datasets", "fastapi", "gguf", "gradio", "lm_eval", "peft", "pyarrow", "rouge_score", "sacrebleu"}
PROMPT = "ab"


def closure(requirements: list[str]) -> set[str]:
    """The distributions that some lead to, extras and markers heeded."""
    found: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in found:
                found.add((requirement.name, wanted))
                todo += [(Requirement(text), wanted) for text in distribution(requirement.name).requires or []]
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a core install."""
    folder: Path = tmp_path_factory.mktemp("core")
    for name in closure(PROJECT["dependencies"]):
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))).resolve())
    assert not {path.name for path in folder.iterdir()} & OF_EXTRAS
    return folder


DRIVER = """
import contextlib, io, json, sys
from trimtab.cli import main
for words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(words)
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Done(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def report(self) -> Any:
        assert self.status == 0, self.err
        return json.loads(self.out)


def run_all(core: Path, commands: dict[str, list[str]]) -> dict[str, Done]:
    """Run commands in one process of the core's environment."""
    paths = os.pathsep.join([str(ROOT / "src"), str(core)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=300, env=environment, check=True)
    python = [sys.executable, "-S", "-c", DRIVER]  # -S: no site-packages
    lines = run(python, input=json.dumps(list(commands.values()))).stdout.splitlines()
    return {name: Done(*json.loads(line)) for name, line in zip(commands, lines, strict=True)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proposal; an aligner, a head, a LoRA adapter of a base and one with layers that only PEFT has; data to go with them."""
    folder: Path = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer()
    save_base(folder / "proposal")
    for seed, name in enumerate(("aligner", "base")):
        save_tiny(folder / name, tiny_model("llama", 28, seed=seed, spread=0.5), tokenizer)
    save_lora(folder / "lora", folder / "base", r=2, target_modules=["q_proj", "down_proj"])
    save_head(folder / "head", folder / "proposal", tap=1)
    save_lora(folder / "dora", folder / "base", r=2, target_modules=["q_proj"], use_dora=True)
    (folder / "data.jsonl").write_text(json.dumps({"prompt": PROMPT, "completion": "cd"}) + "\n", encoding="utf-8")
    (folder / "data.parquet").write_bytes(b"PAR1")
    (folder / "x.gguf").touch()
    shutil.copytree(folder / "proposal", folder / "quantised")
    config = json.loads((folder / "quantised" / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "quantised" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def words_for(models: Path, aligner: str = "aligner") -> list[str]:
    return ["--proposal", str(models / "proposal"), "--aligner", str(models / aligner), "--device", "cpu"]


@pytest.fixture(scope="module")
def done(core: Path, models: Path) -> dict[str, Done]:
    """What a core install can do."""
    data, generate = ["--dataset", str(models / "data.jsonl")], ["--prompt", PROMPT, "--max_tokens", "8", "--seed", "3"]
    sampled = ["--out", str(models / "samples.jsonl"), "--n", "2", "--max_tokens", "4"]
    commands = {
        "aligner": ["generate", *words_for(models), *generate],
        "lora": ["generate", *words_for(models, "lora"), *generate],
        "head": ["generate", *words_for(models, "head"), *generate],
        "score": ["score", *words_for(models), *data],
        "propose": ["propose", "--proposal", str(models / "proposal"), *data, *sampled],
        "bench": ["bench", *words_for(models), "--max_tokens", "4", "--repeats", "1"],
        "env": ["env"],
    }
    return run_all(core, {name: [*words, "--json"] for name, words in commands.items()})


@pytest.mark.parametrize("aligner", ["aligner", "lora", "head"])
def test_the_core_decodes_and_gives_the_same_text_as_a_whole_install(done, models, aligner):
    here = AlignedModel.from_pretrained(models / "proposal", models / aligner, device="cpu")
    completion = here.generate([PROMPT], SamplingParams(max_tokens=8, seed=3))[0]
    assert [row["completion"] for row in done[aligner].report["completions"]] == [completion.text]


def test_the_core_scores_samples_and_measures(done, models):
    here = AlignedModel.from_pretrained(models / "proposal", models / "aligner", device="cpu").score([PROMPT], ["cd"])[0]
    assert done["score"].report["nll"]["aligned"] == pytest.approx(-sum(here.aligned) / len(here.aligned))
    assert done["propose"].report["rows"] == len((models / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert done["bench"].report["tokens_per_second"]["aligned_tokenwise"] > 0


def test_the_core_says_what_it_is(done):
    packages = done["env"].report["packages"]
    assert packages["peft"] == packages["accelerate"] == packages["datasets"] == "not installed"
    assert packages["torch"] != "not installed"


def refused(models: Path) -> dict[str, tuple[list[str], str]]:
    """Words, and the sentence that answers them."""
    data, new, gguf = models / "data.parquet", str(models / "new"), models / "x.gguf"
    proposal, aligned = ["--proposal", str(models / "proposal")], words_for(models)
    train = ["train", *proposal, "--dataset", str(models / "data.jsonl"), "--output_dir", new]
    lacking = "training needs the extra 'train' (accelerate is missing)"
    return {
        "train": (train, lacking),
        "dry run": ([*train, "--dry_run"], lacking),
        "start": (["start", *proposal, "--out", new], lacking),
        "demo": (["demo", "--out", new], f"the demo, which trains, {lacking.partition(' ')[2]}"),
        "Parquet": (
            ["score", *aligned, "--dataset", str(data)],
            f"'{data}', a Parquet file, needs the extra 'train' (pyarrow is missing)",
        ),
        "hub": (
            ["score", *aligned, "--dataset", "a/b"],
            "'a/b' is no file here, and a data set of the hub needs the extra 'train' (datasets is missing)",
        ),
        "device": (
            ["generate", *proposal, "--device", "auto", "--prompt", "a"],
            "device 'auto' needs the extra 'train' (accelerate is missing)",
        ),
        "adapter": (
            ["generate", *words_for(models, "dora"), "--prompt", "a"],
            f"'{models / 'dora'}', an adapter that shares no base with others, needs the extra 'train' (peft is missing)",
        ),
        "quantised": (
            ["generate", "--proposal", str(models / "quantised"), "--prompt", "a"],
            f"'{models / 'quantised'}', a quantised folder, needs the extra 'train' (accelerate is missing)",
        ),
        "serve": (["serve", *proposal], "serving needs the extra 'serve' (fastapi is missing)"),
        "GGUF": (
            ["generate", "--proposal", str(gguf), "--prompt", "a"],
            f"'{gguf}', a GGUF file, needs the extra 'gguf' (gguf is missing)",
        ),
        "metric": (
            ["eval", *aligned, "--dataset", str(models / "data.jsonl"), "--judge", "rougeL", "--out", new],
            "the metric 'rougeL' needs the extra 'eval' (rouge_score is missing)",
        ),
    }


def test_what_needs_an_extra_says_which_before_any_work(core, models):
    said = refused(models)
    for name, done in run_all(core, {name: words for name, (words, _) in said.items()}).items():
        words, sentence = said[name]
        extra = sentence.split("extra '")[1].split("'")[0]
        wanted = f"trimtab {words[0]}: error: {sentence}: pip install 'trimtab[{extra}]' (see trimtab {words[0]} --help)"
        assert done.err.strip().splitlines()[-1] == wanted
        assert (name, done.status, done.out) == (name, 2, "")
    assert not (models / "new").exists()


def test_the_playground_is_looked_for_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", "--proposal", "no such folder", "--playground"]) == 2
    sentence = "the playground needs the extra 'playground' (gradio is missing): pip install 'trimtab[playground]'"
    assert capsys.readouterr().err == f"trimtab serve: error: {sentence} (see trimtab serve --help)\n"


def test_every_extra_that_is_named_exists():
    for extra in ("train", "serve", "playground", "eval", "gguf", "llamacpp", "vllm"):
        assert extra in PROJECT["optional-dependencies"]
        assert how_to_install(extra) == f"pip install 'trimtab[{extra}]'"


def test_a_package_that_cannot_be_imported_is_told_from_one_that_is_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise ImportError('a library is too old')", encoding="utf-8")
    (tmp_path / "lacking_package.py").write_text("import no_such_package", encoding="utf-8")
    (tmp_path / "a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    remedy = r"pip install 'trimtab\[serve\]'"
    with pytest.raises(
        InvalidOption, match=rf"^it needs the extra 'serve' \(broken_package .*: a library is too old\): {remedy}$"
    ):
        need("serve", "it", "broken_package")
    with pytest.raises(InvalidOption, match=rf"^it needs the extra 'serve' \(no_such_package is missing\): {remedy}$"):
        need("serve", "it", "json", "lacking_package")
    need("serve", "it", "json")
    assert is_here("broken_package")
    assert not is_here("no_such_package")
    assert not is_here("a_folder")
