"""What a dry run says of a head is what training it takes: bytes of a step and of a look, steps, cache and caching pass."""

import json

import pytest
import torch

from eval_task import called
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, make_examples, make_task, task_options, task_rows, write_rows
from trimtab.data.examples import Example, answers
from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, collate
from trimtab.train.dry_run import Expected, estimate
from trimtab.train.footprint import Ledger, count_flops, nbytes
from trimtab.train.head import HeadPlan, adapted_upper, plan_head
from trimtab.train.hidden import hidden_states
from trimtab.train.pieces import Room
from trimtab.train.plan import resolve
from trimtab.train.rehearsal import Rehearsal
from trimtab.train.rehearse_caching import rehearse_hidden
from trimtab.train.rows import compress, tail_points
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

pytestmark = pytest.mark.slow

QUICK = Expected(tflops=1.0)
CHAT = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


def options(task, name, training=None, **settings):
    said = {"aligner": "", "head_layers": 1, "contrast": 0.0, "keep_samples": 0, "lora_r": 3}
    return task_options(task, name, training, **(said | settings))


def both(task, tmp_path, plan):
    """The rehearsal of a head and its real trainer, with the proposal that stays in memory."""
    arguments = training_arguments(plan)
    arguments.output_dir = str(tmp_path)
    dtype = getattr(torch, "float32" if plan.asked.dtype == "auto" else plan.asked.dtype)
    proposal = load_model(plan.asked.proposal, dtype=dtype, device="cpu")
    tap, lora = plan_head(plan, proposal.config, None)
    rehearsal = Rehearsal(plan, arguments, proposal.config, V, 3.0, None, HeadPlan(tap, 2 - tap, lora, dtype))
    data = ExampleDataset([])
    model = adapted_upper(proposal, tap, plan_head(plan, proposal.config, None)[1], 0)
    trainer = AlignerTrainer(plan, V, 3.0, model=model, args=arguments, train_dataset=data, eval_dataset=data)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    if arguments.activation_checkpointing:
        trainer.model.activation_checkpointing_enable()
    return rehearsal, trainer, trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True), proposal


def real_batch(plan, proposal, examples, *, kept=0, part="train", pairs=False):
    """A batch with hidden states, and with rows that some model might have where the loss reads some."""
    top_k, samples = plan.row_layout(V)
    model, items = HuggingFaceLM(load_model(plan.asked.proposal, dtype=proposal.dtype, device="cpu")), []
    for i, example in enumerate(examples):
        rows, hidden = {}, {}
        for which in ("chosen", "rejected") if pairs else ("chosen",):
            one = answers([example], which)[0]
            if tap := 2 - plan.asked.head_layers:
                hidden[which] = hidden_states(model, [one], tap)[0]
            if (part, which) in plan.cached_answers:
                even = torch.log_softmax(torch.zeros(len(one.chosen), V), -1)
                rows[which] = compress(even, torch.tensor(one.chosen), top_k, tail_points(one, samples))
        items.append(Item(example, rows, 1.0, hidden, i < kept))
    return collate(items)


CASES = {
    "weight 1": ({}, {}, 0),
    "kept samples": ({"keep_samples": 64}, {}, 3),
    "all layers": ({"head_layers": 2, "keep_samples": 64}, {}, 3),
    "weight below 1, proposal in bfloat16": ({"weight": 0.5, "dtype": "bfloat16", "keep_samples": 64}, {}, 2),
    "trained in bfloat16": ({"keep_samples": 64}, {"bf16": True, "optim": "adafactor"}, 8),
    "contrast": ({"contrast": 0.5, "cache_top_k": 5, "keep_samples": 64}, {}, 2),
    "preference": ({"objective": "preference", "contrast": None, "keep_samples": None}, {}, 0),
    "checkpointed": ({"keep_samples": 64}, {"activation_checkpointing": True}, 1),
}


def pairs_of(plan, count=8):
    unwanted = [1, 2, 3] if plan.reads_rejected else []
    return [example._replace(rejected=unwanted) for example in make_examples(count)]


@pytest.mark.parametrize("name", CASES)
def test_a_step_without_weights_takes_the_bytes_of_a_real_one(task, tmp_path, name):
    settings, training, kept = CASES[name]
    plan = resolve(options(task, "none", training, **settings))
    rehearsal, trainer, model, proposal = both(task, tmp_path, plan)
    examples = pairs_of(plan)
    step = rehearsal.step(examples, kept)
    below = list(proposal.model.layers[: 2 - plan.asked.head_layers].parameters())
    assert nbytes(rehearsal.parameters) == nbytes([*model.parameters(), *below])
    batch = real_batch(plan, proposal, examples, kept=kept, pairs=plan.reads_rejected)
    assert ("kept_rows" in batch) == bool(kept)
    assert step.batch == nbytes(batch)
    trainer.training_step(model, batch)
    assert step.gradients == nbytes([parameter.grad for parameter in model.parameters()])
    trainer.optimizer.step()
    assert step.optimizer == nbytes([list(state.values()) for state in trainer.optimizer.state.values()])
    model.zero_grad()
    with Ledger() as ledger:
        trainer.training_step(model, batch)
        trainer.optimizer.step()
    assert step.peak == ledger.peak + step.optimizer
    with count_flops() as flops:
        trainer.training_step(model, batch)
    assert rehearsal.flops(examples, kept) == flops()


@pytest.mark.parametrize("name", ["weight 1", "contrast", "pairs without contrast"])
def test_a_look_at_development_prompts_takes_the_bytes_of_a_real_one(task, tmp_path, name):
    settings, training, _ = CASES.get(name, ({}, {}, 0))
    plan = resolve(options(task, "none", training, **settings))
    rehearsal, trainer, model, proposal = both(task, tmp_path, plan)
    pairs = name != "weight 1"
    examples = [example._replace(rejected=[1, 2, 3] if pairs else []) for example in make_examples(8)]
    room, peaks = Room.of(examples if plan.reads_rejected else answers(examples, "chosen"), 8), []
    for places in room.batches(examples, 16):
        batch = real_batch(plan, proposal, [examples[i] for i in places], part="dev", pairs=pairs)
        with torch.no_grad(), Ledger() as ledger:
            model.eval()
            trainer.look(batch, trainer.passes(batch, room.piece, pairs=pairs))
        peaks.append(ledger.peak + nbytes(batch))
    assert rehearsal.evaluation(examples, examples) == max(peaks)


@pytest.mark.parametrize(
    "settings",
    [{}, {"contrast": 0.5}, {"weight": 0.5, "dtype": "bfloat16"}, {"head_layers": 2}, {"teacher_prompt": "", "contrast": None}],
)
def test_steps_and_cache_are_those_of_the_run(task, settings):
    name = "-".join(["whole", *settings])
    if "teacher_prompt" in settings:
        (task / "teacher.txt").write_text("xyz")
        settings = settings | {"teacher_prompt": str(task / "teacher.txt"), "cache_top_k": 5}
    asked = options(task, name, {"max_steps": -1, "num_train_epochs": 1}, **settings)
    told = estimate(asked, QUICK)
    assert not (task / name).exists()
    report = train(asked)
    files = list((task / name).glob("proposal_cache/*/*.safetensors"))
    assert told["cache"]["bytes"] == sum(file.stat().st_size for file in files)
    width = 2 if "dtype" in settings else 4
    if settings.get("head_layers") == 2:  # it reads tokens
        assert not files
        assert told["caching"] is None
    else:
        assert told["cache"]["hidden_bytes_per_token"] == width * load_model(task / "proposal").config.hidden_size
    assert told["steps"] == max(row["step"] for row in report["history"]) == 5
    assert told["head"] == {"layers": settings.get("head_layers", 1), "of": 2, "kept_samples": 0}
    weights = (task / name / "adapter_model.safetensors").stat().st_size
    assert 4 * told["aligner"]["trainable"] < weights < 4 * told["aligner"]["trainable"] + 4096
    held = sum(parameter.numel() for parameter in load_model(task / "proposal").parameters())
    assert told["aligner"]["parameters"] == held + told["aligner"]["trainable"]
    assert told["memory"]["weights"] == width * held + 4 * told["aligner"]["trainable"]


@pytest.mark.parametrize("chat", [False, True])
def test_kept_samples_are_counted_and_no_longer_than_said(tmp_path, chat):
    """Two chats of 3 letters beside what a model says that stops nowhere: its samples are the longest."""
    task = make_task(tmp_path, **({"chat_template": CHAT} if chat else {}))
    asked = options(task, "kept", {"max_steps": -1, "num_train_epochs": 1}, keep_samples=20, max_length=64)
    told = estimate(asked, QUICK)
    report = train(asked)
    files = list((task / "kept").glob("proposal_cache/*/*.safetensors"))
    assert told["cache"]["bytes"] >= sum(file.stat().st_size for file in files)
    assert told["head"]["kept_samples"] == 20
    assert told["steps"] == max(row["step"] for row in report["history"]) == 7
    bare = estimate(options(task, "none", {"max_steps": -1, "num_train_epochs": 1}, max_length=64), QUICK)
    assert told["memory"]["total"] > bare["memory"]["total"]
    assert told["flops"]["micro_batch"] > bare["flops"]["micro_batch"]
    assert told["flops"]["caching"] > bare["flops"]["caching"]


@pytest.mark.parametrize("answer", [5, 60])
def test_a_real_run_stays_below_what_is_said(tmp_path, monkeypatch, answer):
    """Every step of it, with the batches as they come: the ledger holds all but weights, optimizer and batch.

    Where answers are longer than what the proposal says in a chat, and prompts shorter, a batch of both is padded to more.
    """
    task = make_task(tmp_path, chat_template=CHAT)
    rows = [row | {"chosen": "xyz" * (answer // 3)} for row in task_rows(40)]
    data = str(write_rows(task / f"answers-{answer}.jsonl", rows))
    training = {"max_steps": -1, "num_train_epochs": 1}
    asked = options(task, f"peaks-{answer}", training, keep_samples=12, contrast=0.5, dataset=data, max_length=70)
    told, peaks = estimate(asked, QUICK)["memory"], []
    step = AlignerTrainer.training_step

    def watched(self, model, inputs, *rest):
        with Ledger() as ledger:
            found = step(self, model, inputs, *rest)
        peaks.append(ledger.peak + nbytes(inputs))
        return found

    monkeypatch.setattr(AlignerTrainer, "training_step", watched)
    train(asked)
    assert max(peaks) < told["total"] - told["weights"] - told["optimizer"]


def test_the_caching_pass_is_that_of_the_layers_below(task):
    """Operations of a real pass over the same examples."""
    asked = options(task, "none", head_layers=1)
    told = estimate(asked, QUICK)
    assert told["flops"]["caching"] > 0
    assert told["caching"]["keys_and_values"] > 0
    assert told["caching"]["weights"] == nbytes(list(load_model(task / "proposal").parameters()))
    model = HuggingFaceLM(load_model(task / "proposal").requires_grad_(False), owned=True)  # whose modules may be watched
    for tap in (1, 2):
        example = Example([3, 4, 5], [6, 7], [])
        with count_flops() as flops:
            hidden_states(model, [example], tap)
        found = rehearse_hidden(model.model.config, torch.float32, torch.device("cpu"), tap, 5, [example])
        assert found.flops == flops() > 0


def test_a_second_round_is_estimated_as_it_would_be_trained(task):
    train(options(task, "first", {"max_steps": 1}))
    later = task_options(task, "later", {"max_steps": 3}, aligner=str(task / "first"), keep_samples=0, contrast=0.0)
    told = estimate(later, QUICK)
    fresh = estimate(options(task, "none", {"max_steps": 3}), QUICK)
    for part in ("memory", "head", "caching", "cache"):
        assert {k: v for k, v in told[part].items() if k != "free"} == {k: v for k, v in fresh[part].items() if k != "free"}
    assert told["aligner"]["trainable"] == fresh["aligner"]["trainable"]


def test_data_that_are_not_at_hand_are_bounded(task):
    missing = str(task / "later.jsonl")
    asked = options(task, "none", {"max_steps": -1, "num_train_epochs": 1}, dataset=missing, max_length=32, contrast=None)
    told = estimate(asked, Expected(examples=80, tflops=1.0))
    assert (told["data"]["longest"], told["steps"], told["cache"]["bytes"]) == (32, 8, None)
    assert (told["contrast"], told["rejected"]) == (1.0, "assumed")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"head_layers": 3}, InvalidOption, "head_layers must be from 1 to 2, which is all"),
        ({"lora_target_modules": ("lm_head",)}, InvalidOption, "a head of this proposal adapts q_proj"),
        ({"proposal": "GPT"}, UnsupportedModel, "'gpt2' model is run by its stock modules"),
        (
            {"proposal": "MOE"},
            UnsupportedModel,
            "dry_run: this 'qwen3_moe' model is a mixture of experts, .* in bfloat16 alone",
        ),
        ({"aligner": "HEAD", "lora_r": 5}, InvalidOption, "is an adapter, and keeps its own"),
        (
            {"aligner": "HEAD", "proposal": "DEEP", "lora_r": 16},
            UnsupportedModel,
            "of another proposal: of one with 2 layers",
        ),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(task, tmp_path, settings, error, message):
    models = {
        "gpt": tiny_model("gpt2", V),
        "deep": tiny_model("llama", V, num_hidden_layers=3),
        "moe": tiny_model("qwen3_moe", V),
    }
    for name, model in models.items():
        save_tiny(tmp_path / name, model, tiny_tokenizer())
    train(options(task, "first", {"max_steps": 1}))
    places = {name.upper(): str(tmp_path / name) for name in models} | {"HEAD": str(task / "first")}
    settings = {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    head = {"head_layers": None} if "aligner" in settings else {}
    with pytest.raises(error, match=message):
        estimate(options(task, "refused", **(head | settings)), QUICK)


def test_the_command_prints_it(task, capsys):
    write_rows(task / "pairs.jsonl", task_rows(20))
    words = ["train", "--dry_run", "--proposal", task / "proposal", "--dataset", task / "pairs.jsonl", "--output_dir"]
    words += [task / "none", "--assume_tflops", 0.5, "--use_cpu", "--head_layers", 1, "--max_length", 32]
    status, out, _ = called(capsys, *words, "--json")
    told = json.loads(out)
    assert (status, told["dry_run"], told["head"]) == (0, True, {"layers": 1, "of": 2, "kept_samples": 64})
    _, out, _ = called(capsys, *words)
    assert "aligner    a head, which runs 1 of the proposal's 2 layers again" in out
    assert f"{told['aligner']['parameters']:,} parameters, the proposal's among them, {told['aligner']['trainable']:,}" in out
    assert "kept       64 samples that the proposal is yet to draw" in out
    assert "caching the proposal's hidden states on cpu in float32" in out
    assert f"bytes a token, hidden states of {told['cache']['hidden_bytes_per_token']} bytes a token" in out
    _, out, _ = called(capsys, *words, "--contrast", 0, "--keep_samples", 0)
    assert "cache on disk: hidden states of" in out
    assert "drafter" not in out
    _, out, _ = called(capsys, *words, "--train_draft", "true")
    assert "drafter    steps on answers that are drawn for it: not in what follows" in out
    status, _, errors = called(capsys, *words, "--expected_aligner", "x")
    assert status == 2
    assert "--expected_aligner is for --aligner" in errors[0]
