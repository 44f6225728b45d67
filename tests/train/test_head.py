"""Heads are trained from cached hidden states: what is trained is what is decoded, and what PEFT makes of the proposal."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel

from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import make_task, task_options
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.data.examples import Example
from trimtab.errors import CacheMismatch, InvalidOption, UnsupportedModel
from trimtab.evaluate.distribution import summarise, trace
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.models.slots import SlotLayer
from trimtab.train.batches import Item, answer_logits, collate, kept_of
from trimtab.train.head import adapted_upper, pick_tap, upper_model
from trimtab.train.hidden import hidden_states
from trimtab.train.inputs import read_parts
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, with a head that was trained on it in `head`, and its report."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    report = train(options(folder, "head"))
    return folder, report


def options(folder, name, training=None, **settings):
    return task_options(
        folder,
        name,
        training,
        **({"aligner": "", "head_layers": 1, "contrast": 0.0, "lora_dropout": 0.0, "keep_samples": 0} | settings),
    )


def nats(model, rows, params=None):
    """The mean negative log-likelihood of the wanted answers' tokens, aligned and of the proposal."""
    scores = model.score([row["prompt"] for row in rows], [row["chosen"] for row in rows], params)
    tokens = sum(len(score.tokens) for score in scores)
    return -sum(sum(s.aligned) for s in scores) / tokens, -sum(sum(s.proposal) for s in scores) / tokens


def development(folder):
    """The rows that `dev_fraction` kept aside."""
    rows = {row["prompt"]: row for row in map(json.loads, (folder / "train.jsonl").read_text().splitlines())}
    _, kept = read_parts(resolve(options(folder, "head")), None)
    return [rows[record.prompt] for record in kept]


def test_what_was_trained_is_what_is_decoded(task):
    folder, report = task
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "head")
    aligned, proposal = nats(model, development(folder))
    tried = dict(report["weights_tried"])
    assert aligned == pytest.approx(tried[report["weight"]], abs=1e-4)
    assert proposal == pytest.approx(tried[0.0], abs=1e-4)
    assert aligned < proposal - 0.5
    assert tried[1.0] == pytest.approx(report["metrics"]["eval_nll_aligned"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo3", "phi3", "qwen3_moe", "smollm3"])
def test_what_was_trained_is_what_is_decoded_in_other_families(task, kind, layers, tmp_path):
    """Scaled embeddings, norms around and behind, windows, rotations by kind and none, fused layers, experts."""
    shutil.copytree(task[0] / "proposal", tmp_path / "proposal")
    shutil.copy(task[0] / "train.jsonl", tmp_path)
    vocab_size = load_model(tmp_path / "proposal").config.vocab_size
    save_tiny(tmp_path / "proposal", tiny_model(kind, vocab_size, seed=3), tiny_tokenizer())
    report = train(options(tmp_path, "head", {"max_steps": 4}, head_layers=layers, train_draft=layers == 2))
    model = AlignedModel.from_pretrained(tmp_path / "proposal", tmp_path / "head")
    aligned, proposal = nats(model, development(tmp_path), SamplingParams(weight=1.0))
    assert aligned == pytest.approx(report["metrics"]["eval_nll_aligned"], abs=1e-4)
    assert aligned < proposal - 0.01
    assert len(model.generate("abc", SamplingParams(max_tokens=5, seed=0, ignore_eos=True))[0].tokens) == 5


@pytest.mark.parametrize("settings", [{}, {"weight": 0.5}, {"contrast": None}, {"proposal_temperature": 1.3}])
def test_every_weight_is_tried_on_whole_rows(task, settings):
    """Few cached entries of the proposal's rows would bend p̃^(1−w): weights below 1 looked better than they are."""
    folder, _ = task
    name = "-".join(["tried", *settings])
    report = train(options(folder, name, cache_top_k=3, **settings))
    rows = development(folder)
    model = AlignedModel.from_pretrained(folder / "proposal", folder / name)
    texts = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    for weight, nll in report["weights_tried"][::3]:
        assert nats(model, rows, SamplingParams(weight=weight))[0] == pytest.approx(nll, abs=1e-4)
    if "proposal_temperature" not in settings:  # for training compares with p̃, and score and trace with the proposal
        assert report["kl"] == pytest.approx(summarise(trace(model, *texts))["kl_per_token"], abs=1e-4)
        assert report["metrics"]["eval_nll_proposal"] == pytest.approx(nats(model, rows)[1], abs=1e-4)


def test_the_folder_is_an_adapter_of_the_proposal(task):
    folder, _ = task
    config = json.loads((folder / "head" / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1]
    assert config["base_model_name_or_path"] == str(folder / "proposal")
    manifest = json.loads((folder / "head" / "trimtab.json").read_text())
    assert (manifest["rule"], manifest["head"]["tap"], manifest["head"]["layers"]) == ("geometric", 1, 2)
    ids = torch.tensor([tiny_tokenizer()("defgxyz")["input_ids"]])
    with torch.no_grad():
        logits = PeftModel.from_pretrained(load_model(folder / "proposal"), str(folder / "head"))(ids).logits
    rows = torch.log_softmax(logits[0, 3:6], -1).gather(1, ids[0, 4:, None]).squeeze(1)
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "head", weight=1.0)
    assert model.score("defg", [ids[0, 4:].tolist()])[0].aligned == pytest.approx(rows.tolist(), abs=1e-4)


def test_it_starts_at_the_proposal(task):
    folder, _ = task
    metrics = train(options(folder, "still", {"max_steps": 1, "learning_rate": 1e-12}))["metrics"]
    assert metrics["eval_nll_aligned"] == pytest.approx(metrics["eval_nll_proposal"], abs=1e-4)
    assert metrics["eval_kl_aligned_proposal"] == pytest.approx(0, abs=1e-4)


def test_hidden_states_are_the_input_of_the_layer(task):
    folder, _ = task
    model = load_model(folder / "proposal")
    examples = [Example([3, 4, 5], [6, 7], []), Example([9], [1, 2, 3, 4, 5, 0], [])]
    for example, found in zip(examples, hidden_states(HuggingFaceLM(model), examples, 1), strict=True):
        ids = torch.tensor([[*example.prompt, *example.chosen]])
        with torch.no_grad():
            wanted = model(ids, output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_texts_that_are_split_at_several_places_have_their_states_each(task):
    folder, _ = task
    model = HuggingFaceLM(load_model(folder / "proposal"))
    one, other = hidden_states(model, [Example([3, 4], [5, 6], []), Example([3], [4, 5, 6], [])], 1)
    assert len(one) == len(other) == 4
    torch.testing.assert_close(one, other)


def test_no_layer_above_is_run_for_the_hidden_states(task, monkeypatch):
    folder, _ = task
    model, run = HuggingFaceLM(load_model(folder / "proposal")), []
    update = SlotLayer.update
    monkeypatch.setattr(SlotLayer, "update", lambda self, *given: run.append(self) or update(self, *given))
    hidden_states(model, [Example([3, 4, 5], [6, 7], [])], 1)
    assert len(run) == 1


def test_the_upper_layers_are_the_proposals_own(task):
    folder, _ = task
    model = load_model(folder / "proposal")
    upper = upper_model(model, 1)
    assert upper.model.layers[0] is model.model.layers[1]
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        whole = model(ids, output_hidden_states=True)
        torch.testing.assert_close(
            upper(inputs_embeds=whole.hidden_states[1], use_cache=False).logits, whole.logits, atol=1e-5, rtol=0
        )


def test_it_resumes_exactly(task, monkeypatch):
    folder, report = task

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AlignerTrainer, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(options(folder, "again"))
    again = train(options(folder, "again"))
    assert again["weights_tried"] == report["weights_tried"]
    one, other = ((folder / name / "adapter_model.safetensors").read_bytes() for name in ("head", "again"))
    assert one == other


def test_pairs_are_learnt_from_by_contrast(task):
    folder, _ = task
    metrics = train(options(folder, "pairs", contrast=None, keep_samples=6))["metrics"]
    bare = train(options(folder, "alone", objective="preference", rule="geometric", weight=1.0, beta=1.0))["metrics"]
    for found in (metrics, bare):
        assert found["eval_nll_rejected"] > found["eval_nll_aligned"] + 1


def test_preference_is_dpo_of_the_head_against_the_proposal(task, caplog):
    """The loss of the development pairs, from the log-probabilities of the finished head and its proposal, by the formula."""
    folder, _ = task
    beta, rows = 0.3, development(folder)
    report = train(options(folder, "dpo", objective="preference", contrast=None, beta=beta, keep_samples=None))
    model, rewards = AlignedModel.from_pretrained(folder / "proposal", folder / "dpo"), []
    for name in ("chosen", "rejected"):
        scores = model.score([row["prompt"] for row in rows], [row[name] for row in rows], SamplingParams(weight=1.0))
        rewards.append([sum(score.aligned) - sum(score.proposal) for score in scores])
    losses = [math.log1p(math.exp(-beta * (wanted - unwanted))) for wanted, unwanted in zip(*rewards, strict=True)]
    assert report["metrics"]["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
    assert report["metrics"]["eval_loss"] < 0.9 * math.log(2)
    won = [wanted > unwanted for wanted, unwanted in zip(*rewards, strict=True)]
    assert report["metrics"]["eval_rewards/accuracies"] == sum(won) / len(won) > 0.9
    assert report["weight"] == 1.0
    assert "does not train" not in caplog.text


def test_a_head_of_a_model_on_the_hub_names_its_commit(task, tmp_path, monkeypatch):
    """The proposal in the hub's cache, by its id; the head loads again by that id, and PEFT finds the base."""
    folder, _ = task
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--base"
    shutil.copytree(folder / "proposal", repository / "snapshots" / ("c" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    train(options(folder, "hub", {"max_steps": 1}, proposal="org/base", dev_samples=1))
    config = json.loads((folder / "hub" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "c" * 40)
    assert AlignedModel.from_pretrained("org/base", folder / "hub").score("defg", "xyz")[0].aligned


def test_unwanted_answers_have_no_hidden_states_where_nothing_is_learnt_from_them(task):
    folder, _ = task
    assert sorted(path.name for path in (folder / "head" / "proposal_cache").glob("*_hidden")) == [
        "dev_chosen_hidden", "dev_rejected_hidden", "train_chosen_hidden",
    ]  # fmt: skip


def test_kept_samples_hold_the_head_at_the_proposal(task):
    """KL(proposal‖head) on text that the proposal says: the loss is the trainer's own, and smaller than without."""
    folder, _ = task
    found = {}
    for count in (0, 40):
        train(options(folder, f"kept-{count}", keep_samples=count, dev_samples=0))
        model = AlignedModel.from_pretrained(folder / "proposal", folder / f"kept-{count}", weight=1.0)
        said = model.with_aligners([]).generate(["q", "r", "s", "t"] * 8, SamplingParams(max_tokens=8, seed=3))
        scores = model.score(["q", "r", "s", "t"] * 8, [list(one.tokens) for one in said])
        found[count] = sum(sum(s.proposal) - sum(s.aligned) for s in scores) / sum(len(s.tokens) for s in scores)
    assert found[40] < found[0] / 2
    lines = (folder / "kept-40" / "kept_samples.jsonl").read_text().splitlines()
    assert len(lines) == 40
    tokens = [json.loads((folder / f"kept-{count}" / "training.json").read_text())["tokens"] for count in (0, 40)]
    assert tokens[0] == tokens[1]  # of the data alone


def test_the_loss_of_kept_samples_is_their_divergence(task):
    folder, _ = task
    model = load_model(folder / "proposal")
    examples = [Example([3, 4], [5, 6, 0], []), Example([7], [8, 9], []), Example([1, 2, 3], [4], [])]
    hidden = hidden_states(HuggingFaceLM(model), examples, 1)
    peft = adapted_upper(model, 1, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), 0)
    batch = collate([Item(e, {}, 1.0, {"chosen": h}, i != 1) for i, (e, h) in enumerate(zip(examples, hidden, strict=True))])
    some, places = kept_of(batch)
    assert places.tolist() == [0, 1, 2, 5]
    with torch.no_grad():
        logits, positions = answer_logits(peft, batch, "chosen")
        with peft.disable_adapter():
            alone, at = answer_logits(peft, some, "chosen")
            whole = answer_logits(peft, batch, "chosen")[0]
    assert not torch.allclose(logits, whole)
    torch.testing.assert_close(alone[at], whole[positions[places]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"contrast": None}, {"keep_samples": 24}, {"rule": "mixture", "weight": 0.5}])
def test_a_head_of_all_layers_reads_tokens(task, settings):
    """There is nothing below it to cache."""
    folder, _ = task
    name = "-".join(["all", *settings])
    report = train(options(folder, name, head_layers=None, **settings))
    assert not list((folder / name).rglob("*hidden*"))
    assert json.loads((folder / name / "trimtab.json").read_text())["head"]["tap"] == 0
    model = AlignedModel.from_pretrained(folder / "proposal", folder / name)
    aligned, proposal = nats(model, development(folder))
    assert aligned == pytest.approx(dict(report["weights_tried"])[report["weight"]], abs=1e-4)
    assert aligned < proposal - 0.5


def test_another_number_of_layers_is_another_cache(task):
    folder, _ = task
    cache = shutil.copytree(folder / "head" / "proposal_cache", folder / "another_cache")
    key = json.loads((cache / "dev_chosen_hidden" / "cache.json").read_text())
    (cache / "dev_chosen_hidden" / "cache.json").write_text(json.dumps(key | {"tap": key["tap"] + 1}))
    with pytest.raises(CacheMismatch, match="another number of head_layers"):
        train(options(folder, "deep", proposal_cache=str(cache)))


def test_a_run_is_known_by_the_layers_that_the_default_meant(task):
    """Once it was two thirds of them, and `run.json` said nothing of it."""
    folder, _ = task
    name, settings = "defaults", {"head_layers": None, "training": {"max_steps": 1}}
    report = train(options(folder, name, **settings))
    assert train(options(folder, name, **settings | {"head_layers": 2})) == report
    run = json.loads((folder / name / "run.json").read_text())
    (folder / name / "run.json").write_text(json.dumps(run | {"head_layers": None}))
    with pytest.raises(InvalidOption, match="head_layers=None, now it is 2"):
        train(options(folder, name, **settings))


@pytest.mark.parametrize(("layers", "wanted", "tap"), [(30, None, 0), (1, None, 0), (4, 4, 0), (4, 1, 3)])
def test_how_many_layers(layers, wanted, tap):
    assert pick_tap(layers, wanted) == tap


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_layers": 3}, "head_layers must be from 1 to 2, which is all"),
        ({"head_layers": 0}, "head_layers must be at least 1, not 0"),
        ({"lora_target_modules": ("lm_head",)}, "a head of this proposal adapts q_proj, k_proj, .*, not 'lm_head'"),
        ({"keep_samples": 8, "objective": "sft"}, "only a head is kept at the proposal by its samples, under likelihood"),
        ({"sft_weight": 0.3}, "the likelihood of a head is that of its own row already"),
        ({"start": "uniform"}, "a head starts at the proposal"),
        ({"rule": "product"}, "a head starts as the proposal, and product would multiply"),
        ({"rule": "product", "objective": "preference"}, "a head starts as the proposal, and product would multiply"),
        ({"proposal_endpoint": ("http://h/v1",)}, "an endpoint gives none"),
    ],
)
def test_what_a_head_refuses(task, settings, message):
    with pytest.raises(InvalidOption, match=message):
        train(options(task[0], "refused", **settings))


def test_a_proposal_without_a_lean_pass_is_refused_before_any_work(tmp_path):
    folder = make_task(tmp_path)
    save_tiny(folder / "proposal", tiny_model("gpt2", 28), tiny_tokenizer())
    with pytest.raises(UnsupportedModel, match="'gpt2' model is run by its stock modules"):
        train(options(folder, "gpt2"))
    assert not (folder / "gpt2" / "run.json").exists()


def test_the_command_trains_a_head_and_generates_with_it(task, capsys):
    folder, _ = task
    common = ["--proposal", str(folder / "proposal")]
    flags = ["--max_steps", "2", "--report_to", "none", "--use_cpu", "true", "--contrast", "0", "--max_length", "32"]
    data = ["--dataset", str(folder / "train.jsonl"), "--output_dir", str(folder / "cli")]
    assert main(["train", *common, *data, *flags]) == 0
    capsys.readouterr()
    assert main(["generate", *common, "--aligner", str(folder / "cli"), "--prompt", "defg", "--max_tokens", "4"]) == 0
    for idle, more in (
        ("use_peft", ["--use_peft"]),
        ("cache_top_k", ["--cache_top_k", "8"]),
        ("cache_top_k", ["--cache_top_k", "8", "--aligner", str(folder / "head")]),
    ):
        assert main(["train", *common, *data, *more]) == 2
        assert f"--{idle}" in capsys.readouterr().err
    assert not math.isnan(json.loads((folder / "cli" / "training.json").read_text())["weight"])


def test_a_finished_head_draws_no_samples_again(task, monkeypatch):
    """Whose last bits may differ by the number of threads: its caches would be of other data then."""
    folder, _ = task
    first = train(options(folder, "keeping", keep_samples=4))
    monkeypatch.setattr("trimtab.train.head.draw_samples", lambda *_args, **_kwargs: pytest.fail("drawn again"))
    assert train(options(folder, "keeping", keep_samples=4)) == first
