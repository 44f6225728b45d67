"""What a dry run says is what a run does: parameters, bytes, steps; and what it checks, and leaves alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from eval_task import called
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, make_examples, make_task, task_options, task_plan, write_rows
from trimtab.data.examples import Example, answers
from trimtab.errors import InvalidOption, ModelError, UnsupportedModel, VocabularyMismatch
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.cache import ProposalCache, bytes_per_token, shard_bytes
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.footprint import Ledger, count_flops, nbytes
from trimtab.train.pieces import Room
from trimtab.train.rehearsal import Rehearsal
from trimtab.train.rehearse_caching import rehearse_caching
from trimtab.train.rows import BATCH, Layout, ModelRows, compress, tail_points
from trimtab.train.run import run_training as train
from trimtab.train.start import prepare_model
from trimtab.train.trainer import AlignerTrainer

pytestmark = pytest.mark.slow

QUICK = Expected(tflops=1.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


# ---- bytes and operations, against a real step


def real_trainer(plan):
    """The trainer of a run with its real model, ready to step."""
    arguments = training_arguments(plan)
    model = prepare_model(load_model(plan.asked.aligner, dtype=torch.float32, device="cpu"), plan, arguments.seed)
    data = ExampleDataset([])
    trainer = AlignerTrainer(plan, V, 3.0, model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps
    if arguments.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    return trainer, trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)


def real_batch(examples, plan, part="train"):
    """A batch with rows that some model might have."""
    top_k, samples = plan.row_layout(V)
    kinds = [which for one, which in plan.cached_answers if one == part]
    items = []
    for example in examples:
        rows = {}
        for which in kinds:
            one = answers([example], which)[0]
            even = torch.log_softmax(torch.zeros(len(one.chosen), V), -1)
            rows[which] = compress(even, torch.tensor(one.chosen), top_k, tail_points(one, samples))
        items.append(Item(example, rows))
    return collate(items)


CASES = {
    "likelihood": ({}, {}),
    "product, top-k and draws": ({"cache_top_k": 5, "cache_tail_samples": 7}, {}),
    "geometric, top-k": ({"rule": "geometric", "cache_top_k": 5}, {}),
    "mixture, top-k": ({"rule": "mixture", "weight": 0.3, "cache_top_k": 5}, {}),
    "sft in bfloat16": ({"objective": "sft", "rule": "geometric"}, {"bf16": True}),
    "ram, accumulated": ({"objective": "ram", "alpha": 0.1}, {"gradient_accumulation_steps": 4, "optim": "rmsprop"}),
    "preference, checkpointed": ({"objective": "preference"}, {"activation_checkpointing": True}),
    "adafactor": ({}, {"optim": "adafactor"}),
    "sgd": ({}, {"optim": "sgd"}),
    "lora": ({"use_peft": True, "lora_r": 4}, {}),
    "contrast, draws": ({"contrast": 0.5, "cache_top_k": 5, "cache_tail_samples": 7}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_step_without_weights_takes_the_bytes_of_a_real_one(task, tmp_path, name):
    """Exactly: the same operators make tensors of the same sizes, and drop them at the same places."""
    settings, training = CASES[name]
    plan = task_plan(task, "none", training, **settings)
    examples = [example._replace(rejected=[1, 2, 3] if plan.reads_rejected else []) for example in make_examples(8)]
    arguments = training_arguments(plan)
    arguments.output_dir = str(tmp_path)
    rehearsal = Rehearsal(plan, arguments, load_model(plan.asked.aligner, device="cpu").config, V, 3.0)
    step = rehearsal.step(examples)

    trainer, model = real_trainer(plan)
    assert [tuple(p.shape) for p in rehearsal.parameters] == [tuple(p.shape) for p in model.parameters()]
    batch = real_batch(examples, plan)
    assert step.batch == nbytes(batch)
    trainer.training_step(model, batch)
    assert step.gradients == nbytes([parameter.grad for parameter in model.parameters()])
    trainer.optimizer.step()
    assert step.optimizer == nbytes([list(state.values()) for state in trainer.optimizer.state.values()])
    held = step.optimizer
    if arguments.gradient_accumulation_steps == 1:
        model.zero_grad()
    else:
        held += step.gradients
    with Ledger() as ledger:
        trainer.training_step(model, batch)
        trainer.optimizer.step()
    assert step.peak == ledger.peak + held

    with count_flops() as flops:
        trainer.training_step(model, batch)
    assert rehearsal.flops(examples) == flops()


@pytest.mark.parametrize("name", ["likelihood", "contrast, draws", "pairs without contrast"])
def test_a_look_at_development_prompts_takes_the_bytes_of_a_real_one(task, tmp_path, name):
    settings, training = CASES.get(name, ({"contrast": 0.0}, {}))
    plan = task_plan(task, "none", training, **settings)
    pairs = name != "likelihood"
    examples = [example._replace(rejected=[1, 2, 3] if pairs else []) for example in make_examples(8)]
    arguments = training_arguments(plan)
    arguments.output_dir = str(tmp_path)
    rehearsal = Rehearsal(plan, arguments, load_model(plan.asked.aligner, device="cpu").config, V, 3.0)
    trainer, model = real_trainer(plan)
    room, peaks = Room.of(examples if plan.reads_rejected else answers(examples, "chosen"), 8), []
    for places in room.batches(examples, 16):
        batch = real_batch([examples[i] for i in places], plan, "dev")
        with torch.no_grad(), Ledger() as ledger:
            model.eval()
            trainer.look(batch, trainer.passes(batch, room.piece, pairs=pairs))
        peaks.append(ledger.peak + nbytes(batch))
    assert rehearsal.evaluation(examples, examples) == max(peaks)


@pytest.mark.parametrize("objective", ["likelihood", "sft"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_saves(task, tmp_path, objective):
    """Against autograd's own account of a real step, weights and batch apart; the loss's last lines hold a little more."""
    rule = "product" if objective == "likelihood" else "geometric"
    plan = task_plan(task, "none", objective=objective, rule=rule)
    examples = make_examples(8)
    arguments = training_arguments(plan)
    arguments.output_dir = str(tmp_path)
    config = load_model(plan.asked.aligner, device="cpu").config
    step = Rehearsal(plan, arguments, config, V, 3.0).step(examples)
    trainer, model = real_trainer(plan)
    batch = real_batch(examples, plan)
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *batch.values())}
    saved = {}

    def keep(tensor):
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = trainer.compute_loss(model.train(), batch)
    assert loss.requires_grad
    counted = nbytes(list(saved.values()))
    assert counted <= step.saved <= 1.1 * counted


def test_checkpointing_takes_less_where_layers_weigh_and_is_said_beforehand(task, tmp_path):
    peaks = {}
    for on in (False, True):
        plan = task_plan(task, "none", {"activation_checkpointing": on}, proposal=str(task / "proposal"))
        arguments = training_arguments(plan)
        arguments.output_dir = str(tmp_path)
        config = load_model(plan.asked.aligner, device="cpu").config
        config.num_hidden_layers = 12
        step = Rehearsal(plan, arguments, config, V, 3.0).step(make_examples(8))
        peaks[on] = step.peak, step.peak_otherwise
    assert peaks[True][0] < peaks[False][0]
    assert peaks[True] == pytest.approx(peaks[False][::-1], rel=0.01)


def test_a_ledger_counts_storages_once_and_while_they_live():
    weight = torch.zeros(10, 10)
    with Ledger((10,)) as ledger:
        one = weight.t() + 1  # a view of what was there before is nothing new
        assert (ledger.live, ledger.wide) == (400, 400)
        both = one[:, :3], torch.zeros(5)
        assert (ledger.live, ledger.wide) == (420, 400)
        del one, both
        assert (ledger.live, ledger.peak) == (0, 420)


# ---- a whole run


def test_steps_and_cache_are_those_of_the_run(task):
    """Thirty-six examples in micro-batches of 8, three at a time, over two epochs."""
    training = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "eval_steps": 2, "save_steps": 2}
    for name, settings in (
        ("exact", {}),
        ("top", {"cache_top_k": 5}),
        ("even", {"cache_top_k": 5, "cache_tail_samples": 0}),
        ("sft", {"objective": "sft", "rule": "geometric"}),
        ("contrast", {"contrast": 0.5}),
    ):
        options = task_options(task, f"whole-{name}", training, **settings)
        told = estimate(options, QUICK)
        assert not (task / f"whole-{name}").exists()
        report = train(options)
        files = list((task / f"whole-{name}").glob("proposal_cache/*/*.safetensors"))
        assert told["cache"]["bytes"] == sum(file.stat().st_size for file in files)
        assert told["steps"] == max(row["step"] for row in report["history"]) == 4
        assert (told["micro_batches"], told["batch"]) == (10, 24)
        assert (told["data"]["examples"], told["data"]["development"]) == (36, 12)
        assert told["data"]["tokens"] == report["tokens"]
        assert told["vocabulary"] == {"tokens": V, "checked": True}
        saved = load_model(task / f"whole-{name}", device="cpu")
        assert told["aligner"]["parameters"] == sum(parameter.numel() for parameter in saved.parameters())


def test_a_cache_of_several_shards_is_told_to_the_byte(task):
    """More than one file, and lengths whose number of digits differs."""
    source = ModelRows(HuggingFaceLM(load_model(task / "proposal", device="cpu"), V), "sha256:0")
    examples = make_examples(300)
    for layout in (Layout(1), Layout(4), Layout(4, 6), Layout(1, 100), Layout(V)):
        folder = task / f"shards-{layout.top_k}-{layout.samples}"
        cache = ProposalCache.build(folder, source, "sha256:1", examples, layout=layout)
        sizes = [file.stat().st_size for file in sorted(folder.glob("*.safetensors"))]
        assert shard_bytes([len(example.chosen) for example in examples], layout) == sizes
        row = cache[0]
        assert bytes_per_token(layout) * len(row.token) == sum(column.numel() * column.element_size() for column in row)


def test_no_weights_are_read_and_nothing_is_written(tmp_path):
    folder = make_task(tmp_path)
    for name in ("proposal", "start"):
        (folder / name / "model.safetensors").unlink()
    before = sorted(tmp_path.rglob("*"))
    told = estimate(task_options(folder, "out"), QUICK)
    assert told["data"]["at_hand"]
    assert sorted(tmp_path.rglob("*")) == before


def test_whether_there_are_pairs_is_read_or_assumed(task, capsys):
    """From the data; from records without a tokenizer; from columns; otherwise whatever takes more, and that is said."""
    alone = write_rows(task / "alone.jsonl", [{"prompt": row, "completion": "xyz"} for row in "defghijk"])
    shapes = {"proposal": "Qwen/Qwen2.5-14B", "aligner": "Qwen/Qwen2.5-3B"}
    for settings, contrast, rejected in (
        ({}, 1.0, "known"),
        ({"dataset": str(alone)}, 0.0, False),
        ({"contrast": 0.5}, 0.5, "known"),
        ({"dataset": str(task / "later.jsonl")}, 1.0, "assumed"),
        ({"dataset": str(task / "later.jsonl"), "columns": ("prompt=a", "completion=b")}, 0.0, False),
        ({"dataset": str(task / "later.jsonl"), "columns": ("prompt=a", "chosen=b", "rejected=c")}, 1.0, "assumed"),
        ({"dataset": str(task / "later.jsonl"), "rule": "geometric"}, 0.0, False),
        ({"dataset": str(alone), **shapes}, 0.0, False),
    ):
        told = estimate(task_options(task, "none", {"max_steps": 1}, max_length=16, **settings), QUICK)
        assert (told["contrast"], told["rejected"]) == (contrast, rejected), settings
    words = ["train", "--dry_run", "--proposal", task / "proposal", "--aligner", task / "start", "--output_dir", task / "none"]
    words += ["--assume_tflops", 1, "--use_cpu", "--dataset"]
    assert "contrast   1: a second pass" in called(capsys, *words, task / "train.jsonl")[1]
    shown = called(capsys, *words, task / "later.jsonl")[1]
    assert "contrast   1, if every record has a rejected answer: a second pass" in shown
    assert "for batches of pairs of" in shown


def test_a_later_round_is_at_its_manifests_settings_in_a_dry_run(task, monkeypatch):
    train(task_options(task, "first", {"max_steps": 1}))
    seen = []
    make = Rehearsal.__init__
    monkeypatch.setattr(Rehearsal, "__init__", lambda self, plan, *rest: seen.append(plan) or make(self, plan, *rest))
    estimate(task_options(task, "none", {"max_steps": 1}, aligner=str(task / "first"), start="pretrained"), QUICK)
    manifest = json.loads((task / "first" / "trimtab.json").read_text(encoding="utf-8"))
    assert seen[0].temperatures == (manifest["proposal_temperature"], manifest["aligner_temperature"])


def test_processes_share_the_steps_and_not_the_memory(task, monkeypatch):
    training = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    alone = estimate(task_options(task, "none", training), QUICK)
    monkeypatch.setenv("WORLD_SIZE", "3")
    shared = estimate(task_options(task, "none", training), QUICK)
    assert (alone["steps"], alone["micro_batches"], alone["processes"]) == (6, 12, 1)
    assert (shared["steps"], shared["micro_batches"], shared["processes"]) == (2, 4, 3)
    assert shared["memory"]["total"] == alone["memory"]["total"]


# ---- what is not at hand, and what is wrong


def test_what_is_not_at_hand_is_said_and_bounded(task):
    training = {"max_steps": -1, "num_train_epochs": 1}
    missing = str(task / "later.jsonl")
    told = estimate(task_options(task, "none", training, dataset=missing, max_length=32), QUICK)
    assert told["data"] == {
        "at_hand": False, "why_not": f"there is no file {missing} yet", "examples": None, "development": None,
        "tokens": None, "longest": 32, "equal_pairs": None,
    }  # fmt: skip
    assert (told["steps"], told["cache"]["bytes"], told["seconds"]["training"]) == (None, None, None)
    known = estimate(task_options(task, "none", training, dataset=missing, max_length=32), Expected(examples=80, tflops=2.0))
    assert (known["data"]["examples"], known["steps"]) == (60, 8)
    assert known["seconds"]["training"] == known["flops"]["training"] / 2e12 == known["flops"]["micro_batch"] * 8 / 2e12
    real = estimate(task_options(task, "none", training), QUICK)
    assert real["memory"]["total"] < known["memory"]["total"]
    assert real["flops"]["micro_batch"] < known["flops"]["micro_batch"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"proposal": "{}/nowhere"}, ModelError, "does not exist"),
        ({"aligner": "{}/other"}, VocabularyMismatch, "does not share the proposal's vocabulary: token"),
        ({"proposal": "Qwen/Qwen2.5-14B", "aligner": "meta-llama/Llama-3.2-1B"}, VocabularyMismatch, "has 151665 tokens and"),
        ({"output_dir": "{}/proposal"}, InvalidOption, "is not empty and holds no training run"),
        ({"training": {"optim": "adamwx"}}, InvalidOption, "adamwx"),
        ({"training": {"output_dir": "x"}}, InvalidOption, "output_dir is set by trimtab itself"),
        ({"chat_template_path": "{}/none.jinja"}, InvalidOption, "chat_template_path: "),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(task, settings, error, message):
    if not (task / "other").exists():
        save_tiny(task / "other", tiny_model("llama", 28, seed=3), tiny_tokenizer("zyxwvutsrqponmlkjihgfedcba "))
    said = {key: value.replace("{}", str(task)) if isinstance(value, str) else value for key, value in settings.items()}
    with pytest.raises(error, match=message):
        estimate(task_options(task, "none", **said), QUICK)


def test_the_command_prints_it(task, capsys):
    words = ["train", "--dry_run", "--proposal", task / "proposal", "--aligner", task / "start", "--dataset"]
    words += [task / "train.jsonl", "--output_dir", task / "none", "--assume_tflops", 0.5, "--max_steps", 5, "--use_cpu"]
    status, out, _ = called(capsys, *words, "--json")
    told = json.loads(out)
    assert (status, told["dry_run"], told["steps"]) == (0, True, 5)
    assert told["rate"]["training"] == 5e11
    _, out, _ = called(capsys, *words)
    assert "tokenizers agree" in out
    assert f"{told['aligner']['parameters']:,} parameters" in out
    assert "cache on disk: 236 bytes a token" in out
    status, _, errors = called(capsys, *words, "--assume_tflops", -1)
    assert (status, len(errors)) == (2, 1)


def test_a_measured_rate_is_a_rate(task):
    told = estimate(task_options(task, "none"), Expected())
    assert not told["rate"]["assumed"]
    assert 1e8 < told["rate"]["training"] < 1e15


def test_propose_says_what_it_would_write(task, capsys, tmp_path):
    words = [
        "propose",
        "--dry_run",
        "--proposal",
        task / "proposal",
        "--out",
        tmp_path / "o.jsonl",
        "--n",
        2,
        "--max_tokens",
        3,
    ]
    status, out, _ = called(capsys, *words, "--dataset", task / "held_out.jsonl", "--json")
    told = json.loads(out)
    assert (status, told["rows"], told["most_tokens"]) == (0, 32, 96)
    model = load_model(task / "proposal", device="cpu")
    assert told["proposal"]["weights"] == nbytes(list(model.parameters()))
    assert not (tmp_path / "o.jsonl").exists()
    write_rows(tmp_path / "bad.jsonl", [{"text": "a"}])
    status, _, errors = called(capsys, *words, "--dataset", tmp_path / "bad.jsonl")
    assert status == 1
    assert "'prompt' is missing" in errors[0]
    _, out, _ = called(capsys, *words, "--dataset", tmp_path / "later.jsonl")
    assert "a number of samples that is not known" in out


def test_eval_says_what_it_would_ask_and_asks_nothing(task, capsys, tmp_path):
    words = ["eval", "--dry_run", "--proposal", task / "proposal", "--aligner", task / "start", "--dataset"]
    words += [task / "held_out.jsonl", "--judge", "http://127.0.0.1:9/v1#judge", "--out", tmp_path / "out"]
    status, out, _ = called(capsys, *words, "--json")
    told = json.loads(out)
    assert (status, told["data"]["prompts"]) == (0, 16)
    assert list(told["most_questions"].values()) == [16 * 3 * 2]  # the pair, the null and the references, in both orders
    assert [model["parameters"] for model in told["models"]] == [
        sum(parameter.numel() for parameter in load_model(task / name, device="cpu").parameters())
        for name in ("proposal", "start")
    ]
    assert not (tmp_path / "out").exists()
    once = json.loads(called(capsys, *words, "--json", "--orders", "random", "--null", "false", "--max_prompts", 3)[1])
    assert list(once["most_questions"].values()) == [6]
    other = json.loads(called(capsys, *words, "--json", "--aligner_dtype", "bfloat16")[1])
    assert [model["dtype"] for model in other["models"]] == ["float32", "bfloat16"]
    assert "at most 96 questions" in called(capsys, *words)[1]


def test_an_adapter_counts_with_its_base(task, capsys, tmp_path):
    lora = save_lora(tmp_path / "lora", task / "start", r=2, target_modules=["q_proj"])
    words = ["--dry_run", "--proposal", task / "proposal", "--aligner", lora, "--dataset", task / "held_out.jsonl", "--json"]
    asked = ["eval", *words, "--judge", "chrf", "--out", tmp_path / "out"], ["propose", *words, "--out", tmp_path / "o.jsonl"]
    told = [json.loads(called(capsys, *command)[1]) for command in asked]
    bare = load_model(task / "start", device="cpu").parameters()
    expected = nbytes(list(bare)) + nbytes(list(load_file(lora / "adapter_model.safetensors").values()))
    assert told[0]["models"][1]["weights"] == told[1]["aligners"][0]["weights"] == expected
    assert told[0]["models"][1]["name"] == str(lora)
    (lora / "adapter_model.safetensors").unlink()
    status, _, errors = called(capsys, *asked[0])
    assert status == 1
    assert f"{lora}' holds no adapter_model.safetensors" in errors[0]


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--rule", "par"), 2, "there is no rule 'par'"),
        (("--weight", 1, "--weight", 2), 2, "2 --weight for 1 --aligner"),
        (("--baseline", "nobody"), 2, "'nobody' is no system"),
        (("--criterion", "kindest"), 2, "criterion"),
        (("--expected_examples", 0), 2, "--expected_examples must be at least 2"),
        (("--proposal", "nowhere/at/all"), 1, "does not exist; if an earlier command is to make it"),
    ],
)
def test_a_dry_run_of_eval_refuses_what_eval_would(task, capsys, tmp_path, more, status, message):
    words = ["eval", "--dry_run", "--aligner", task / "start", "--dataset", task / "held_out.jsonl"]
    words += ["--judge", "http://127.0.0.1:9/v1#judge", "--out", tmp_path / "out"]
    words += [] if "--proposal" in more else ["--proposal", task / "proposal"]
    got, out, errors = called(capsys, *words, *more)
    assert (got, out, len(errors)) == (status, "", 1)
    assert message in errors[0]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "lfm2", "falcon_h1", "mamba", "qwen3_5_text"])
def test_what_slots_keep_is_what_the_engine_keeps(kind):
    """Keys and values as the family has them, and states with their copies; the engine keeps an id of each token beside."""
    model, length = tiny_model(kind, V), 9
    example = Example([1, 2, 3], [4, 5], [])
    found = rehearse_caching(model.config, torch.float32, torch.device("cpu"), V, Layout(V), 1.0, length, [example])
    lm = HuggingFaceLM(model)
    ids = BATCH * length * torch.long.itemsize if lm.is_recurrent else 0
    assert found.keys_and_values == lm.state_bytes(BATCH, length - 1) - ids


def test_a_mixture_of_experts_as_the_proposal_is_refused_like_one_as_the_aligner():
    config, example = tiny_model("olmoe", V).config, Example([1, 2, 3], [4, 5], [])
    with pytest.raises(UnsupportedModel, match="dry_run: this 'olmoe' model is a mixture of experts"):
        rehearse_caching(config, torch.float32, torch.device("cpu"), V, Layout(V), 1.0, 9, [example])
