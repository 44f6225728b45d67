"""A start out of the proposal's own layers: what is kept, what it learns, on what, and that a kill changes nothing."""

import json

import pytest
import torch
from safetensors.torch import load_file

from scripted import scoring, scripted
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import TRAINING, V, task_options, task_rows, write_rows
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.errors import CheckpointError, DataError, InvalidOption
from trimtab.models.layers import pick_layers
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.train import sibling
from trimtab.train.distil import DistilTrainer
from trimtab.train.own_samples import read_samples
from trimtab.train.run import run_training as train
from trimtab.train.sibling import make_start
from trimtab.train.sibling_options import StartOptions

QUICK = TRAINING | {"max_steps": 24, "eval_steps": 8, "save_steps": 8}
TITLED = "s " + CHAT_TEMPLATE
"""A template that also writes something before the first message of a user, who is called u."""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a `proposal` of five layers, the same without a template, `plain`, and some `prompts.jsonl`."""
    folder = tmp_path_factory.mktemp("task")
    deep = tiny_model("llama", V, seed=1, spread=0.3, num_hidden_layers=5)
    save_tiny(folder / "proposal", deep, tiny_tokenizer(chat_template=TITLED))
    save_tiny(folder / "plain", deep, tiny_tokenizer())
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in task_rows(10)])
    write_rows(folder / "answered.jsonl", task_rows(24))
    return folder


def start_options(task, name, training=None, **settings):
    said = {"proposal": str(task / "proposal"), "out": str(task / name), "layers": "0,2,4", "samples": 32, "max_tokens": 8}
    return StartOptions(**said | {"cache_top_k": 0, "dev_fraction": 0.25} | settings, training=QUICK | (training or {}))


@pytest.fixture(scope="module")
def made(task):
    """A start, and its report."""
    return task / "start", make_start(start_options(task, "start"))


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def test_it_begins_with_the_layers_themselves_and_keeps_the_vocabulary(task, monkeypatch):
    seen = {}

    def look(trainer, checkpoint):
        seen.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    monkeypatch.setattr(sibling, "fit", look)
    make_start(start_options(task, "untrained"))
    whole = load_model(task / "proposal").state_dict()
    for place in range(3):
        for name in (name for name in whole if f".layers.{2 * place}." in name):
            assert torch.equal(seen.pop(name.replace(f".{2 * place}.", f".{place}.")), whole[name])
    assert seen.keys() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert all(torch.equal(value, whole[name]) for name, value in seen.items())


def test_it_comes_closer_to_the_proposal(task, made):
    folder, report = made
    before, after = report["before"], report["metrics"]
    assert after["eval_kl_proposal_start"] < 0.9 * before["eval_kl_proposal_start"]
    assert after["eval_nll_start"] < before["eval_nll_start"]
    assert after["eval_acceptance_on_answers"] > before["eval_acceptance_on_answers"]
    assert after["eval_nll_proposal"] == before["eval_nll_proposal"]
    assert (report["layers"], report["of_layers"]) == ([0, 2, 4], 5)
    assert report["parameters"] == sum(parameter.numel() for parameter in load_model(folder).parameters())


def test_its_figures_are_those_of_the_loaded_models(task, made):
    """By hand: rows of both models on each development sample, which every sample that was not trained on is."""
    folder, report = made
    examples = read_samples(folder / "samples.jsonl")
    _, development = sibling.split_examples(examples, 0.25)
    assert 0 < len(development) < len(examples)
    assert report["examples"] == len(examples) - len(development)
    p, q = load_model(task / "proposal"), load_model(folder)
    nll, kl, kept = [], [], []
    for example in development:
        ids = torch.tensor([[*example.prompt, *example.chosen]])
        with torch.no_grad():
            logp, logq = (m(ids).logits[0, len(example.prompt) - 1 : -1, :V].log_softmax(-1) for m in (p, q))
        nll += (-logq.gather(-1, torch.tensor(list(example.chosen)).unsqueeze(-1))).flatten().tolist()
        kl += (logp.exp() * (logp - logq)).sum(-1).tolist()
        kept += torch.minimum(logp, logq).exp().sum(-1).tolist()
    metrics = report["metrics"]
    for name, values in (("nll_start", nll), ("kl_proposal_start", kl), ("acceptance_on_answers", kept)):
        assert metrics[f"eval_{name}"] == pytest.approx(sum(values) / len(values), abs=1e-5)


def test_it_is_an_aligner_a_proposal_and_a_start_of_training(task, made):
    folder, _ = made
    ours, theirs = load_tokenizer(task / "proposal"), load_tokenizer(folder)
    assert fingerprint_vocabulary(ours) == fingerprint_vocabulary(theirs)
    assert theirs.chat_template == TITLED
    assert Aligner.from_pretrained(folder).manifest is None
    params = SamplingParams(max_tokens=6, seed=0)
    for models in ((task / "proposal", folder), (folder, None), (folder, task / "proposal")):
        (completion,) = AlignedModel.from_pretrained(*models).generate([[{"role": "user", "content": "abc"}]], params)
        assert completion.finish_reason in ("stop", "length")
    write_rows(task / "train.jsonl", task_rows(24))
    assert train(task_options(task, "trained", {"max_steps": 2}, aligner=str(folder)))["weight"] > 0


def test_it_writes_like_the_proposal(task, made):
    """Greedily, on the proposal's own samples: more of its tokens are the proposal's than before the distillation."""
    folder, _ = made
    p, q, picked = (load_model(path) for path in (task / "proposal", folder, task / "proposal"))
    picked = pick_layers(picked, [0, 2, 4])
    alike = {"before": 0, "after": 0}
    for example in read_samples(folder / "samples.jsonl"):
        ids = torch.tensor([[*example.prompt, *example.chosen]])
        with torch.no_grad():
            best, now, then = (model(ids).logits[0].argmax(-1) for model in (p, q, picked))
        alike["after"] += int((best == now).sum())
        alike["before"] += int((best == then).sum())
    assert alike["after"] > alike["before"]


@pytest.mark.parametrize("where", ["while it samples", "in a step", "before it is saved"])
def test_a_killed_run_ends_with_the_same_start(task, made, where, monkeypatch):
    folder, report = made
    name = where.replace(" ", "-")
    generate, compute, calls = AlignedModel.generate, DistilTrainer.compute_loss, {"generate": 0, "step": 0}

    def drawing(self, *args, **kwargs):
        calls["generate"] += 1
        if where == "while it samples" and calls["generate"] == 4:  # the second batch's answers
            raise RuntimeError("killed")
        return generate(self, *args, **kwargs)

    def stepping(self, *args, **kwargs):
        calls["step"] += self.model.training
        if where == "in a step" and calls["step"] == 12:
            raise RuntimeError("killed")
        return compute(self, *args, **kwargs)

    def dying(*args, **kwargs):
        raise RuntimeError("killed")

    monkeypatch.setattr(AlignedModel, "generate", drawing)
    monkeypatch.setattr(DistilTrainer, "compute_loss", stepping)
    if where == "before it is saved":
        monkeypatch.setattr(sibling, "save_model", dying)
    with pytest.raises(RuntimeError, match="killed"):
        make_start(start_options(task, name, max_num_seqs=12))
    monkeypatch.undo()
    assert not (task / name / "config.json").exists()
    again = make_start(start_options(task, name, max_num_seqs=12))
    one, other = weights_of(folder), weights_of(task / name)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert again["metrics"] == report["metrics"]
    assert (task / name / "samples.jsonl").read_text() == (folder / "samples.jsonl").read_text()


def test_a_finished_start_is_left_alone_and_another_is_refused(task, made, monkeypatch):
    report = made[1]
    monkeypatch.setattr(sibling, "DistilTrainer", None)
    assert make_start(start_options(task, "start")) == report
    with pytest.raises(InvalidOption, match=r"out: .*start holds a run with layers=\[0, 2, 4\], now it is \[0, 4\]"):
        make_start(start_options(task, "start", layers="2"))
    (task / "foreign").mkdir()
    (task / "foreign" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidOption, match=r"out: .*foreign is not empty and holds no training run"):
        make_start(start_options(task, "foreign"))


# ---- on what


def test_the_proposal_says_the_prompts_as_the_user(task, made):
    """After what its template writes before a message, up to what it writes behind one; then it answers that."""
    folder, _ = made
    model = AlignedModel.from_pretrained(task / "proposal")
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    beginning = model.encoder.prompt("s u")
    for i in (0, 7, 31):
        asked = SamplingParams(seed=2 * i + 42 + 1, max_tokens=16, stop="<eos>")
        (said,) = model.generate([beginning], asked)
        prompt = model.encoder.prompt([{"role": "user", "content": said.text.strip()}])
        assert rows[i]["prompt"] == prompt
        (answer,) = model.generate([prompt], SamplingParams(seed=2 * i + 42, max_tokens=8))
        assert rows[i]["answer"] == list(answer.tokens)


def test_without_a_template_it_goes_on_from_the_beginning_of_a_text(task):
    report = make_start(start_options(task, "of-plain", proposal=str(task / "plain")))
    examples = read_samples(task / "of-plain" / "samples.jsonl")
    assert {tuple(example.prompt) for example in examples} == {(0,)}
    assert report["examples"] < 32
    assert load_tokenizer(task / "of-plain").chat_template is None


def test_prompts_of_a_data_set_come_in_turn(task):
    make_start(start_options(task, "prompted", dataset=str(task / "prompts.jsonl"), training={"seed": 5}))
    model = AlignedModel.from_pretrained(task / "proposal")
    prompts = [model.encoder.prompt(row["prompt"]) for row in task_rows(10)]
    examples = read_samples(task / "prompted" / "samples.jsonl")
    assert [list(example.prompt) for example in examples] == [prompts[i % 10] for i in range(32)]
    (answer,) = model.generate([prompts[3]], SamplingParams(seed=5 + 2 * 13, max_tokens=8))
    assert list(examples[13].chosen) == list(answer.tokens)


def given_options(task, name, **settings):
    return start_options(task, name, dataset=str(task / "answered.jsonl"), answers="given", **settings)


def test_given_answers_are_learnt_as_they_are_with_rows_from_anywhere(task):
    here = make_start(given_options(task, "given"))
    assert not (task / "given" / "samples.jsonl").exists()
    train_examples = sum(len(row["chosen"]) + 1 for row in task_rows(24))  # a token a letter, and the end
    assert here["tokens"] < train_examples
    model = load_model(task / "proposal")
    with scripted(scoring(model), models=[{"id": "p", "root": str(task / "proposal")}]) as server:
        there = make_start(given_options(task, "remote", proposal_endpoint=(server.url,)))
        assert len(server.asked) == 24
    assert there["tokens"] == here["tokens"]
    for name in ("nll_start", "kl_proposal_start"):
        assert there["metrics"][f"eval_{name}"] == pytest.approx(here["metrics"][f"eval_{name}"], abs=1e-3)


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answers": "given"}, "answers 'given' are those of a data set: name one with --dataset"),
        ({"answers": "mine"}, "answers must be one of samples, given, not 'mine'"),
        ({"proposal_endpoint": ("http://a/v1",)}, "proposal_endpoint: .*trimtab propose --endpoint.*--answers given"),
        ({"samples": 1}, "samples must be at least 2, not 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"layers": "first"}, "layers must be how many"),
        ({"layers": "0,5"}, "layers: there is no layer 5; the proposal's are 0 to 4"),
        ({"cache_top_k": -1}, "cache_top_k must be at least 0, not -1"),
        ({"concurrency": 3}, "--concurrency needs --proposal_endpoint"),
        ({"max_length": 7}, "max_length 7 leaves no room for an answer to"),
    ],
)
def test_what_cannot_be_is_refused_by_name(task, settings, message):
    with pytest.raises(InvalidOption, match=message):
        make_start(start_options(task, "refused", **settings))


def test_the_proposal_is_not_overwritten(task):
    with pytest.raises(InvalidOption, match="out holds the proposal"):
        start_options(task, "proposal", overwrite_output_dir=True)


def test_without_weights_the_way_out_is_said(task, tmp_path):
    for path in (task / "proposal").iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        CheckpointError, match=r"holds no safetensors weights.*any small model of its vocabulary as the --aligner"
    ):
        make_start(start_options(task, "weightless", proposal=str(tmp_path)))


def test_a_template_that_writes_nothing_before_a_message_needs_prompts(task, tmp_path):
    bare = tiny_tokenizer(chat_template="{% for m in messages %}{{ m.content }}<eos>{% endfor %}")
    save_tiny(tmp_path, load_model(task / "proposal"), bare)
    with pytest.raises(InvalidOption, match="dataset: the proposal cannot be asked for prompts of its own"):
        make_start(start_options(task, "unasked", proposal=str(tmp_path)))


def test_prompts_that_leave_no_room_are_an_error(task):
    write_rows(task / "long.jsonl", [{"prompt": "abcdefghij"}])
    with pytest.raises(DataError, match="every prompt has 8 tokens or more; raise max_length"):
        make_start(start_options(task, "long", dataset=str(task / "long.jsonl"), max_length=8))
