"""Training runs from options to a finished aligner: what they learn, how they resume, what they refuse."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from killing import kill_in_step
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, answer_rows, make_task, task_options, task_rows, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import gather
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, answers, encode_records
from trimtab.data.records import read_records
from trimtab.errors import CheckpointError, InvalidOption, UnsupportedModel
from trimtab.models.aligner import Manifest, describe
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, Item, cached_rows, collate
from trimtab.train.objectives import Batch, Rows
from trimtab.train.plan import Facts, resolve
from trimtab.train.rows import ModelRows
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

TURNS = (("user", "prompt"), ("assistant", "chosen"), ("assistant", "rejected"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize(
    ("objective", "rule"),
    [("likelihood", "product"), ("likelihood", "geometric"), ("sft", "geometric"), ("preference", "product")],
)
def test_an_objective_lowers_its_loss_on_development_prompts(task, objective, rule):
    report = train(task_options(task, f"{objective}-{rule}", objective=objective, rule=rule))
    losses = [row["eval_loss"] for row in report["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0]
    assert json.loads((task / f"{objective}-{rule}" / "trimtab.json").read_text())["objective"] == objective


def test_the_trained_product_beats_the_proposal_and_its_figure_is_what_score_says(task):
    report = train(task_options(task, "measured"))
    rows = task_rows(64)[48:]
    model = AlignedModel.from_pretrained(task / "proposal", task / "measured")
    scores = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows])
    assert sum(sum(s.aligned) for s in scores) > sum(sum(s.proposal) for s in scores)
    assert report["metrics"]["eval_nll_aligned"] < report["metrics"]["eval_nll_proposal"]
    assert report["cache"]["kl_per_token"] == 0.0


@pytest.mark.parametrize("rule", ["product", "geometric"])
def test_contrast_is_dpo_of_what_is_decoded_against_the_proposal(task, rule):
    """The loss at the end is −log P/L + γ·log(1 + exp(−β·Δ)) of sequences as `score` sees them, and Δ grows with γ.

    Δ is the difference between the chosen and the rejected answer of log P_θ − log p̃ in nats a token, each token with its
    normaliser; L is the mean length of the training answers. The proposal p̃ is at the temperature that was fitted.
    """
    margins, data = {}, {"eval_dataset": str(task / "held_out.jsonl"), "rule": rule}
    rows = task_rows(64)[48:]
    for gamma in (0.0, 3.0):
        name = f"contrast-{rule}-{gamma:g}"
        report = train(task_options(task, name, contrast=gamma, **({"beta": 0.3} if gamma else {}), **data))
        temperature = json.loads((task / name / "trimtab.json").read_text())["proposal_temperature"]
        weight = 0.5 if rule == "geometric" else 1.0
        model = AlignedModel.from_pretrained(task / "proposal", task / name, weight=weight)
        bare = AlignedModel.from_pretrained(task / "proposal", proposal_temperature=temperature)
        gain, nll = {}, {}
        for which in ("chosen", "rejected"):
            texts = [row["prompt"] for row in rows], [row[which] for row in rows]
            aligned, proposal = ([sum(s.aligned) for s in one.score(*texts)] for one in (model, bare))
            lengths = [len(s.aligned) for s in model.score(*texts)]
            gain[which] = [(a - p) / n for a, p, n in zip(aligned, proposal, lengths, strict=True)]
            nll[which] = [-a for a in aligned]
        deltas = [chosen - rejected for chosen, rejected in zip(gain["chosen"], gain["rejected"], strict=True)]
        mean_length = report["tokens"] / 48
        losses = [n / mean_length + gamma * math.log1p(math.exp(-0.3 * d)) for n, d in zip(nll["chosen"], deltas, strict=True)]
        assert report["metrics"]["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
        margins[gamma] = sum(deltas) / len(deltas)
    assert margins[3.0] > margins[0.0] + 0.4


def test_by_default_there_is_a_contrast_where_every_record_has_a_rejected_answer(task):
    rows = task_rows(64)[:48]
    lacking = write_rows(task / "lacking.jsonl", [{"prompt": rows[0]["prompt"], "chosen": rows[0]["chosen"]}, *rows[1:]])

    def trained(name, **said):
        train(task_options(task, name, {"max_steps": 4}, train_draft=False, **said))
        return load_file(task / name / "model.safetensors")["lm_head.weight"]

    contrasted, plain = trained("contrast-1", contrast=1.0), trained("contrast-0", contrast=0.0)
    assert torch.equal(trained("contrast-by-default"), contrasted)
    assert torch.equal(trained("contrast-lacking", dataset=str(lacking)), plain)
    assert not torch.equal(contrasted, plain)


def test_a_second_round_goes_on_where_the_first_stopped(task):
    """With its manifest, its weights and its drafter: a run that learns nothing ends with all of them."""
    train(task_options(task, "round-1", train_draft=True, weight=0.6, proposal_top_p=0.9))
    first = json.loads((task / "round-1" / "trimtab.json").read_text())
    assert (first["aligner_temperature"], first["weight"]) != (1, 1)
    still = {"training": {"learning_rate": 1e-12, "max_steps": 4}, "aligner": str(task / "round-1"), "start": "pretrained"}
    train(task_options(task, "round-2", train_draft=True, contrast=3.0, **still))
    assert json.loads((task / "round-2" / "trimtab.json").read_text()) == first
    for part in ("model.safetensors", "draft/model.safetensors"):
        before, after = (load_file(task / name / part) for name in ("round-1", "round-2"))
        assert all(torch.allclose(before[key], after[key], atol=1e-9, rtol=0) for key in before)


def test_what_a_later_round_cannot_use_is_refused_before_it_trains(task, tmp_path):
    for folder in ("first", "shorter"):
        shutil.copytree(task / "start", tmp_path / folder)
    save_tiny(tmp_path / "first" / "draft", tiny_model("llama", V, seed=4, max_position_embeddings=8), tiny_tokenizer())
    options = task_options(task, "refused", aligner=str(tmp_path / "first"), train_draft=True)
    with pytest.raises(UnsupportedModel, match="knows 28 tokens and takes 8, but 28 and 64 are needed: remove the folder"):
        train(options)
    train(dataclasses.replace(options, output_dir=str(task / "undrafted"), train_draft=False))  # which needs no drafter
    (tmp_path / "first" / "draft" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError):
        train(options)
    assert not (task / "refused" / "run.json").exists()
    with pytest.raises(InvalidOption, match="output_dir holds the aligner, "):
        task_options(task, "start")


def test_a_drafter_that_changes_between_two_runs_is_noticed_where_one_is_trained_from_it(task, tmp_path):
    shutil.copytree(task / "start", tmp_path / "first")
    alone = task_options(task, "drafted", {"max_steps": 2}, aligner=str(tmp_path / "first"), train_draft=False)
    drafted = dataclasses.replace(alone, train_draft=True)
    report = train(alone)
    save_tiny(tmp_path / "first" / "draft", tiny_model("llama", V, seed=4), tiny_tokenizer())
    assert train(alone) == report
    assert train(drafted)["draft"] == train(drafted)["draft"]
    save_tiny(tmp_path / "first" / "draft", tiny_model("llama", V, seed=5), tiny_tokenizer())
    with pytest.raises(InvalidOption, match="draft_weights"):
        train(drafted)
    (tmp_path / "first" / "draft" / "model.safetensors").unlink()
    assert "draft" in train(alone)


def test_only_a_later_round_of_the_same_training_takes_the_manifests_temperatures(task):
    warps = {"proposal_temperature": 1.5, "aligner_temperature": 3.0, "proposal_top_p": 0.9}
    found = describe(task / "start")._replace(manifest=Manifest("sha256:0", objective="likelihood", weight=0.7, **warps))
    for said, expected in (
        ({"start": "pretrained"}, (0.7, 0.9, 1.5, 3.0)),
        ({"start": "pretrained", "rule": "product()"}, (0.7, 0.9, 1.5, 3.0)),
        ({"start": "pretrained", "proposal_temperature": 1.2, "weight": 1.0}, (1.0, 0.9, 1.2, 3.0)),
        ({"start": "pretrained", "rule": "geometric"}, (0.5, None, 1.0, 1.0)),
        ({"start": "pretrained", "objective": "sft", "rule": "geometric"}, (0.5, None, 1.0, 1.0)),
        ({"start": "auto"}, (1.0, None, 1.0, 1.0)),
    ):
        plan = resolve(task_options(task, "none", **said), Facts(found))
        assert (plan.weight, plan.asked.proposal_top_p, *plan.temperatures) == expected
    with pytest.raises(InvalidOption, match="start was trained at other settings: an endpoint's rows have temperature 1"):
        resolve(task_options(task, "none", start="pretrained", proposal_endpoint=("http://a/v1",), cache_top_k=5), Facts(found))
    alone = resolve(task_options(task, "none", start="pretrained"), Facts(describe(task / "start")))
    assert (alone.weight, alone.asked.proposal_top_p, *alone.temperatures) == (1.0, None, 1.0, 1.0)


def test_a_run_on_drawn_tails_is_close_to_one_on_exact_rows(task):
    """In what it learns, and in what it says of its development prompts: what exact rows say of the same aligner."""
    rows, found = task_rows(64)[48:], []
    for name, settings in (("exact", {}), ("drawn", {"cache_top_k": 5, "cache_tail_samples": 20})):
        said = train(task_options(task, f"kept-{name}", eval_dataset=str(task / "held_out.jsonl"), **settings))["metrics"]
        model = AlignedModel.from_pretrained(task / "proposal", task / f"kept-{name}")
        scores = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows], SamplingParams(weight=1.0))
        found.append(-sum(sum(s.aligned) for s in scores) / sum(len(s.aligned) for s in scores))
        assert said["eval_nll_aligned"] == pytest.approx(found[-1], abs=0.01)
        assert all(math.isfinite(value) for value in said.values())
    assert found[1] == pytest.approx(found[0], abs=0.01)


def test_draws_change_only_the_diagnostics_that_are_sums_over_the_proposal(task):
    """`sft` sees no rows, so the aligner is the same one; KL(P‖Q) and the nucleus are of evenly spread rows in both runs."""
    drawn, even = (
        train(task_options(task, f"sft-{samples}", objective="sft", cache_top_k=5, cache_tail_samples=samples))["metrics"]
        for samples in (6, 0)
    )
    changed = {name for name in even if drawn[name] != even[name] and "per_second" not in name}
    moved = ("nll_aligned", "log_z_mean", "log_z_std", "kl_aligned_proposal")
    assert changed == {f"eval_{name}" for name in moved}


def test_an_interrupted_run_ends_with_the_same_weights(task, monkeypatch):
    """Stopped after a checkpoint and run again: bit for bit the weights of a run that was left alone."""
    train(task_options(task, "whole"))
    kill_in_step(monkeypatch, AlignerTrainer)
    with pytest.raises(RuntimeError, match="killed"):
        train(task_options(task, "halves"))
    monkeypatch.undo()
    torn = task / "halves" / "checkpoint-6"
    shutil.copytree(task / "halves" / "checkpoint-4", torn)
    (torn / "trainer_state.json").unlink()  # as a kill while writing leaves it: passed over
    train(task_options(task, "halves"))
    one, other = (load_file(task / name / "model.safetensors") for name in ("whole", "halves"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_killed_after_its_last_step_is_not_trained_further(task):
    """Twelve steps end inside an epoch, at a learning rate that is not 0: a thirteenth would show."""
    constant = {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    train(task_options(task, "late", constant))
    whole = load_file(task / "late" / "model.safetensors")
    for name in ("trimtab.json", "training.json", "model.safetensors"):
        (task / "late" / name).unlink()
    report = train(task_options(task, "late", constant))
    again = load_file(task / "late" / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert max(row["step"] for row in report["history"]) == 12
    assert not (task / "late" / "checkpoint-13").exists()


def test_an_output_folder_may_hold_what_a_kill_left(task):
    folder = task / "killed"
    folder.mkdir()
    (folder / ".run.json.abc.partial").write_text("{")
    train(task_options(task, "killed", {"max_steps": 2}))
    assert not list(folder.glob(".*"))


def test_other_weights_under_the_same_names_are_another_run(tmp_path):
    folder = make_task(tmp_path)
    train(task_options(folder, "out", {"max_steps": 2}))
    save_tiny(folder / "start", tiny_model("llama", 28, seed=9, spread=0.1, num_hidden_layers=1), tiny_tokenizer())
    with pytest.raises(InvalidOption, match="holds a run with aligner_weights="):
        train(task_options(folder, "out", {"max_steps": 2}))


def test_a_finished_run_is_left_alone_and_another_one_refused(task):
    first = train(task_options(task, "finished"))
    before = (task / "finished" / "model.safetensors").stat().st_mtime_ns
    assert train(task_options(task, "finished"))["metrics"] == first["metrics"]
    assert (task / "finished" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InvalidOption, match="holds a run with objective='likelihood', now it is 'sft'"):
        train(task_options(task, "finished", objective="sft"))
    (task / "mine").mkdir()
    (task / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(InvalidOption, match="no training run"):
        train(task_options(task, "mine", overwrite_output_dir=True))
    assert (task / "mine" / "thesis.txt").read_text() == "dear"


def test_a_lora_run_saves_an_adapter_that_decodes(task):
    train(task_options(task, "lora", use_peft=True, lora_r=4))
    assert (task / "lora" / "adapter_model.safetensors").exists()
    model = AlignedModel.from_pretrained(task / "proposal", task / "lora")
    score = model.score(["def"], ["xyz"])[0]
    assert score.aligned != score.proposal


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_top_k": 5, "cache_tail_samples": 7, "sft_weight": 0.0},
        {"rule": "geometric", "cache_top_k": 5, "sft_weight": 0.7},
    ],
)
def test_the_loss_of_a_contrasted_step_is_the_one_that_is_evaluated_and_its_regulariser(task, settings):
    """From logits and compressed rows, or from whole rows: the same losses and gradients."""
    plan = resolve(task_options(task, "none", contrast=2.0, **settings), Facts(records=48))
    source = ModelRows(HuggingFaceLM(load_model(task / "proposal", device="cpu"), V), "sha256:0")
    records = read_records(str(task / "train.jsonl"), need="rejected")
    examples = encode_records(records, Encoder(load_tokenizer(task / "proposal"), V, (0,)), 64)[:6]
    kinds = {which: source.compress(answers(examples, which), plan.row_layout(V), 1.3).rows for which in ("chosen", "rejected")}
    batch = collate([Item(e, {which: rows[i] for which, rows in kinds.items()}) for i, e in enumerate(examples)])
    model, data = load_model(task / "start", device="cpu"), ExampleDataset(examples)
    arguments = training_arguments(plan)
    trainer = AlignerTrainer(plan, V, 3.0, model=model, args=arguments, train_dataset=data, eval_dataset=data)
    found = []

    def plain(loss, which):
        logp, logq = cached_rows(batch, V, which), answer_rows(model, batch, which, V, plan.temperatures.aligner)
        return loss.of_rows(Rows(batch[f"{which}_tokens"], logq, logp, plan.setting))

    for compute in (
        lambda: trainer.compute_loss(model, batch),
        lambda: (
            plan.objective.loss(Batch(batch, plan.setting, 3.0, plain, training=False)).sum()
            - settings.get("sft_weight", 0.3)
            / 3.0
            * gather(answer_rows(model, batch, "chosen", V), batch["chosen_tokens"]).sum()
        ),
    ):
        model.zero_grad()
        loss = compute()
        loss.backward()
        found.append((loss.detach(), [p.grad.clone() for p in model.parameters()]))
    assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_micro_batches_give_the_weights_of_the_whole_batch(task):
    train(task_options(task, "batch8", {"max_steps": 4}))
    train(task_options(task, "batch4", {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}))
    one, other = (load_file(task / name / "model.safetensors") for name in ("batch8", "batch4"))
    for name in one:
        assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)


def test_rows_of_answers_do_not_depend_on_padding(task):
    """Left-padded prompts and right-padded answers give the rows of each example alone, in the plain model."""
    model = AlignedModel.from_pretrained(task / "proposal").proposal.model
    examples = [Example([4, 5, 6], [7, 8, 0], []), Example([9], [3, 0], []), Example([2, 2, 2, 2, 2], [1, 1, 1, 1, 0], [])]
    batch = collate([Item(example) for example in examples])
    with torch.no_grad():
        rows = answer_rows(model, batch, "chosen", 28)
        alone = [
            torch.log_softmax(model(torch.tensor([e.prompt + e.chosen])).logits[0, len(e.prompt) - 1 : -1], -1)
            for e in examples
        ]
    assert_close(rows, torch.cat(alone), atol=5e-5, rtol=0)
    assert batch["chosen_tokens"].tolist() == [7, 8, 0, 3, 0, 1, 1, 1, 1, 0]
    assert batch["chosen_owner"].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize(
    ("objective", "layout"),
    [("likelihood", "messages"), ("likelihood", "completion"), ("preference", "pairs"), ("ram", "pairs"), ("sft", "messages")],
)
def test_chats_go_the_whole_way(tmp_path, objective, layout):
    """Conversational data in each layout: trained through the template, scored and decoded by the same folders."""
    folder = make_task(tmp_path, chat_template=CHAT_TEMPLATE)
    chats = []
    for row in task_rows(64):
        user, good, bad = ([{"role": role, "content": row[key]}] for role, key in TURNS)
        if layout == "messages":
            chats.append({"messages": user + good})
        elif layout == "completion":
            chats.append({"prompt": user, "completion": good})
        else:
            chats.append({"prompt": user, "chosen": good, "rejected": bad})
    write_rows(folder / "train.jsonl", chats[:48])
    report = train(task_options(folder, "out", objective=objective, **({"alpha": 1e-3} if objective == "ram" else {})))
    losses = [row["eval_loss"] for row in report["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0]
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "out")
    prompt = [{"role": "user", "content": "def"}]
    score = model.score([prompt], [[{"role": "assistant", "content": "xyz"}]])[0]
    assert len(score.tokens) == 4
    assert all(token < 0 for token in score.aligned)
    assert model.generate([prompt], SamplingParams(max_tokens=3, seed=0))[0].prompt_tokens == len("u def.a ")


def test_a_finished_aligner_uses_its_cache(task):
    """The trainer turns `use_cache` off in the configuration; saved so, `generate` would recompute everything at each token."""
    train(task_options(task, "cached", {"max_steps": 2}))
    assert json.loads((task / "cached" / "config.json").read_text())["use_cache"] is True
