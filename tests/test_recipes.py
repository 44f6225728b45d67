"""The recipes: --dry_run accepts every file as it stands, without a hub, and whole recipes run with tiny stand-ins."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
import yaml

from eval_task import called, fair
from scripted import scripted
from trimtab import AlignedModel, Aligner
from trimtab.data.records import read_records
from trimtab.evaluate.paper import TASKS, aligned_decoding
from trimtab.models import shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*/*.yaml"))
TRAINING = [path for path in FILES if "propose" not in path.name and "eval" not in path.name]
QUICK = (
    "--max_steps",
    2,
    "--per_device_train_batch_size",
    2,
    "--gradient_accumulation_steps",
    2,
    "--disable_tqdm",
    "--use_cpu",
)
QUICK += ("--bf16", "false", "--max_length", 512, "--dtype", "float32", "--eval_steps", 2, "--save_steps", 2)


def command_of(path):
    kinds = {"propose": "propose", "eval": "eval"}
    return next((kinds[word] for word in path.stem.split("-") if word in kinds), "train")


def name_of(path):
    return f"{path.parent.name}/{path.stem}"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """Paths in the recipes count from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("stand_ins", ROOT / "recipes" / "stand_ins.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("stand_ins")
    module.make_stand_ins(folder)
    return folder


# ---- as they stand


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_recipe_passes_a_dry_run_without_a_hub(path, capsys, monkeypatch, tmp_path):
    """All but the depth of the models is as it stands: two layers are made in a second, and 48 in ten."""
    shallow = {name: shape._replace(fields=shape.fields | {"num_hidden_layers": 2}) for name, shape in shapes.SHAPES.items()}
    monkeypatch.setattr(shapes, "SHAPES", shallow)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    before = {item.name for item in ROOT.iterdir()}
    more = ("--assume_tflops", 400) if command_of(path) == "train" else ()
    started = time.monotonic()
    status, out, errors = called(capsys, command_of(path), "--config", path, "--dry_run", "--json", *more)
    assert (status, [line for line in errors if "error" in line]) == (0, [])
    told = json.loads(out)
    assert told["dry_run"] is True
    assert not told["data"]["at_hand"]
    assert time.monotonic() - started < 60  # no lookup of a hub that does not answer
    assert {item.name for item in ROOT.iterdir()} == before
    if command_of(path) == "train":
        examples = yaml.safe_load(path.read_text(encoding="utf-8"))["expected_examples"]
        assert told["data"]["examples"] + told["data"]["development"] == examples
        assert told["batch"] == 64
        assert told["steps"] == -(-told["data"]["examples"] // 64)


def test_one_recipe_at_its_full_depth(capsys):
    path = ROOT / "recipes" / "tldr-llama" / "3-train-trimtab.yaml"
    told = json.loads(called(capsys, "train", "--config", path, "--dry_run", "--json", "--assume_tflops", 400)[1])
    tied = 1_235_814_400  # the output layer is the embeddings'
    assert told["aligner"]["parameters"] == tied
    assert told["memory"]["optimizer"] == pytest.approx(2 * 4 * tied, rel=1e-6)
    assert told["caching"]["parameters"] == 8_030_261_248
    assert told["cache"]["bytes_per_token"] == 780


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_papers_settings_are_the_papers(path):
    said = yaml.safe_load(path.read_text(encoding="utf-8"))
    task, family = path.parent.name.split("-")
    if path.stem == "3-train":
        rate = 1e-6 if path.parent.name == "ultrachat-qwen" else 2e-7
        assert (said["objective"], said["optim"], said["learning_rate"]) == ("ram", "rmsprop", rate)
        assert (said["lr_scheduler_type"], said["warmup_steps"], said["max_grad_norm"]) == ("constant_with_warmup", 0.1, 10)
        assert said["per_device_train_batch_size"] * said["gradient_accumulation_steps"] == 64
        assert said["expected_examples"] == {"ultrachat": 120000, "tldr": 116722, "hh": 160800}[task]
    if path.stem == "1-warm-up":
        assert (said["proposal"], said["expected_examples"]) == (said["aligner"], 10048)
    if path.stem == "2-propose":
        assert (said["temperature"], said["top_p"], said["repetition_penalty"]) == (0.5, 0.95, 1.05)
    if command_of(path) == "eval":
        goal = f"hh-{path.stem.split('-')[-1]}" if task == "hh" else task
        decoding = aligned_decoding(goal, family)
        assert {name: said[name] for name in decoding} == decoding
        assert said["criterion"] == TASKS[goal].criterion


# ---- with stand-ins


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_every_training_runs_two_steps_with_stand_ins(path, stand_ins, tmp_path, capsys):
    task, family = path.parent.name.split("-")
    models = stand_ins / family
    aligner = models / ("proposal" if path.stem == "1-warm-up" else "aligner")
    data = stand_ins / f"{task}.jsonl"
    words = ["--proposal", models / "proposal", "--aligner", aligner, "--dataset", data, "--output_dir", tmp_path / "out"]
    if task == "ultrachat":
        words += ["--chat_template_path", "recipes/chat.jinja"]
    if path.stem == "3-train" and task != "hh":  # y' would come from the step before; any unwanted answer will do here
        rows = [
            {"prompt": r.prompt, "chosen": r.chosen, "rejected": r.chosen}
            for r in read_records(str(data), how=Mapped(("messages=messages",) if task == "ultrachat" else ()))
        ]
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        words[5] = tmp_path / "samples.jsonl"
    status, _, errors = called(capsys, "train", "--config", path, *words, *QUICK)
    assert status == 0, errors
    trained = Aligner.from_pretrained(tmp_path / "out")
    assert trained.manifest.objective == ({"3-train": "ram", "3-train-trimtab": "likelihood"}.get(path.stem, "sft"))
    assert (json.loads((tmp_path / "out" / "training.json").read_text())["history"][-1]["step"]) == 2


class Mapped:
    """How a stand-in's columns are called."""

    dataset_split, dataset_config, dataset_data_dir = "train", None, None

    def __init__(self, columns):
        self.columns = columns


@pytest.mark.parametrize("recipe", ["ultrachat-qwen", "tldr-llama", "hh-llama"])
def test_a_whole_recipe_runs_with_stand_ins(recipe, stand_ins, tmp_path, capsys):
    """Every step in order, each on what the one before wrote; only ids, places and sizes are overridden."""
    task, family = recipe.split("-")
    folder, models, data = ROOT / "recipes" / recipe, stand_ins / family, stand_ins / f"{task}.jsonl"

    def run(command, name, *words):
        status, _, errors = called(capsys, command, "--config", folder / name, *words)
        assert status == 0, (name, errors)

    warm = "--proposal", tmp_path / "warm-up"
    run("train", "1-warm-up.yaml", "--proposal", models / "proposal", "--aligner", models / "proposal", "--dataset", data,
        "--output_dir", tmp_path / "warm-up", *QUICK)  # fmt: skip
    small = "--max_tokens", 8, "--dtype", "float32"
    start, pairs = models / "aligner", tmp_path / "samples.jsonl"
    if task == "hh":
        start, pairs = tmp_path / "sft-aligner", data
        run(
            "train",
            "2-sft-aligner.yaml",
            *warm,
            "--aligner",
            models / "aligner",
            "--dataset",
            data,
            "--output_dir",
            start,
            *QUICK,
        )
    else:
        run("propose", "2-propose.yaml", *warm, "--dataset", data, "--out", pairs, *small)
        assert len(pairs.read_text(encoding="utf-8").splitlines()) == 48
    run("train", "3-train.yaml", *warm, "--aligner", start, "--dataset", pairs, "--output_dir", tmp_path / "aligner", *QUICK)
    held = "--baseline", stand_ins / "alpaca_eval_gpt4_baseline.json"
    if task != "ultrachat":
        held = "--dataset", data
    with scripted(fair, models=[{"id": "judge"}]) as judge:
        run("eval", "4-eval.yaml" if task != "hh" else "4-eval-harmless.yaml", *warm, "--aligner", tmp_path / "aligner", *held,
            "--judge", f"{judge.url}#judge", "--out", tmp_path / "eval", "--max_prompts", 6, *small)  # fmt: skip
        assert judge.posts()
    results = json.loads((tmp_path / "eval" / "results.json").read_text(encoding="utf-8"))
    assert [row["n"] for row in results["judging"] if row["pair"] == "main"] == [6]


def test_the_chat_template_ends_each_turn_at_the_models_own_end(stand_ins, tmp_path, capsys):
    """A base model stops at its end of text alone, so that is what must follow an answer."""
    for family in ("llama", "qwen"):
        model = AlignedModel.from_pretrained(stand_ins / family / "proposal")
        model.tokenizer.chat_template = (ROOT / "recipes" / "chat.jinja").read_text(encoding="utf-8")
        chat = [{"role": "user", "content": "Go on."}]
        score = model.score([chat], ["No."])[0]
        assert score.tokens[-1] == model.tokenizer.eos_token_id
        assert model.tokenizer.decode(score.tokens[:-1]) == "No."
        with torch.no_grad():
            text = model.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        begin = model.tokenizer.bos_token or ""
        assert text == f"{begin}<|user|>\nGo on.{model.tokenizer.eos_token}\n<|assistant|>\n"
