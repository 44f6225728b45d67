"""A head's drafter: what it learns, that a kill changes nothing, and that decoding with it changes no text."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tiny_task import make_task, task_options, task_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.data.examples import Example
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.errors import UnsupportedModel
from trimtab.models.reduced import ReducedLM
from trimtab.models.weight_files import WEIGHTS_NAME
from trimtab.serve.registry import Registry
from trimtab.train import head_draft
from trimtab.train.draft import CHECKPOINTS
from trimtab.train.head_draft import Answer, ReducedTrainer, frequent_tokens
from trimtab.train.inputs import read_parts
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train


def options(folder, name, **settings):
    plain = {"aligner": "", "head_layers": 1, "contrast": 0.0, "lora_dropout": 0.0, "keep_samples": 0, "train_draft": True}
    return task_options(folder, name, **(plain | settings))


@pytest.fixture(scope="module", autouse=True)
def in_parts():
    """Answers are written in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_draft, "TOGETHER", 16)
        yield


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task, with a head and its drafter in `head`, and the report."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    return folder, train(options(folder, "head"))


def test_it_comes_closer_to_the_aligned_model(task):
    folder, report = task
    assert report["draft"]["layers"] == [0, 1]
    seen = [row for row in report["draft"]["history"] if "eval_acceptance_on_answers" in row]
    assert seen[-1]["eval_loss"] < seen[0]["eval_loss"]
    assert report["draft"]["metrics"]["eval_acceptance_on_answers"] > 0.3
    assert json.loads((folder / "head" / "training.json").read_text())["draft"] == report["draft"]


def test_decoding_with_it_changes_no_text(task):
    folder, _ = task
    prompts = [row["prompt"] for row in task_rows(6)]
    for temperature in (0.0, 1.0):
        params = [SamplingParams(seed=i, max_tokens=12, temperature=temperature) for i in range(6)]
        texts = []
        for length in (0, 1, 4, None):
            model = AlignedModel.from_pretrained(folder / "proposal", folder / "head", num_speculative_tokens=length)
            assert isinstance(model.models.drafter.model, ReducedLM)
            texts.append([completion.tokens for completion in model.generate(prompts, params)])
            assert length != 4 or model.pace.tally.accepted > 0
        assert texts[0] == texts[1] == texts[2] == texts[3]
        alone = [model.generate(p, one)[0].tokens for p, one in zip(prompts, params, strict=True)]
        assert alone == texts[0]
        if not temperature:
            nobody = AlignedModel.from_pretrained(folder / "proposal", folder / "head", draft="none")
            assert [completion.tokens for completion in nobody.generate(prompts, params)] == texts[0]


def test_what_it_says_are_the_tokens_that_are_said_most(task):
    """Token 4 is expected .6 + .5 times, 7 .3, 2 .2 and 9 .1 times; 0 ends a text, and is said by none."""
    example = Example([1], [4], [])
    logs = [torch.tensor([row]).log() for row in ([0.6, 0.3, 0.1], [0.5, 0.2, 0.0])]
    answers = [Answer(example, torch.tensor([ids]), logp) for ids, logp in zip(([4, 7, 9], [4, 2, 6]), logs, strict=True)]
    assert frequent_tokens(answers, [0], 3).tolist() == [0, 4, 7]
    assert frequent_tokens(answers, [0], 100).tolist() == [0, 2, 4, 7, 9]
    assert frequent_tokens(answers, [], 2).tolist() == [4, 7]  # of a proposal whose texts have no end
    folder, report = task
    assert report["draft"]["tokens"] == len(load_file(folder / "head/draft/model.safetensors")["draft_token_ids"])


def test_it_learns_from_rows_that_are_cut(task):
    """Where top-p leaves fewer tokens than are kept, and not as many at each place."""
    folder, _ = task
    report = train(options(folder, "cut", proposal_top_p=0.3, training={"max_steps": 1}))
    rows = [json.loads(line) for line in (folder / "cut" / CHECKPOINTS / "answers.jsonl").read_text().splitlines()]
    assert len({len(ids) for row in rows for ids in row["ids"]}) > 1
    assert 0 < report["draft"]["metrics"]["eval_acceptance_on_answers"] <= 1


def test_its_figures_are_those_of_the_loaded_models(task):
    """By hand: aligned rows and the drafter's on each development answer, from the folders; tiny rows are kept whole."""
    folder, report = task
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "head")
    rows = [json.loads(line) for line in (folder / "head" / CHECKPOINTS / "answers.jsonl").read_text().splitlines()]
    prompts = {tuple(row["prompt"]) for row in rows}
    kept, same = [], []
    for row in rows[-2 * len(model_development(folder)) :]:
        text = [*row["prompt"], *row["answer"]]
        draft = model.models.drafter.model
        ids = torch.tensor([text[:-1]])
        logd = draft.extend(draft.new_state(1, len(text)), ids, [len(text) - 1])[0, len(row["prompt"]) - 1 :]
        aligned = torch.full_like(logd, -torch.inf).scatter(1, torch.tensor(row["ids"]), torch.tensor(row["logp"]))
        kept += torch.minimum(aligned, logd).exp().sum(-1).tolist()
        same += (aligned.argmax(-1) == logd.argmax(-1)).tolist()
    metrics = report["draft"]["metrics"]
    assert metrics["eval_acceptance_on_answers"] == pytest.approx(sum(kept) / len(kept), abs=1e-3)
    assert metrics["eval_greedy_acceptance"] == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert len(rows) == 2 * len(prompts)


def model_development(folder):
    """The prompts that `dev_fraction` kept aside."""
    _, kept = read_parts(resolve(options(folder, "head")), None)
    return {record.prompt for record in kept}


def test_the_head_is_that_of_a_run_without_a_drafter_which_may_come_later(task):
    folder, report = task
    alone = train(options(folder, "alone", train_draft=False))
    assert "draft" not in alone
    assert (folder / "alone" / WEIGHTS_NAME).read_bytes() == (folder / "head" / WEIGHTS_NAME).read_bytes()
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "alone")
    assert "came without a drafter" in model.models.who
    later = train(options(folder, "alone"))
    assert later["draft"]["metrics"] == report["draft"]["metrics"]
    assert (folder / "alone/draft/model.safetensors").read_bytes() == (folder / "head/draft/model.safetensors").read_bytes()
    assert not resolve(options(folder, "x", train_draft=None)).trains_draft


@pytest.mark.parametrize("where", ["while it answers", "in a step", "before it is saved"])
def test_a_killed_run_ends_with_the_same_drafter(task, where, monkeypatch):
    folder, _ = task
    name, calls = where.replace(" ", "-"), 0
    compute, generate = ReducedTrainer.compute_loss, AlignedModel.generate

    def failing(real, after):
        def fail(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > after:
                raise RuntimeError("killed")
            return real(self, *args, **kwargs)

        return fail

    train(options(folder, name, train_draft=False))
    if where == "while it answers":
        monkeypatch.setattr(AlignedModel, "generate", failing(generate, 1))
    elif where == "in a step":
        monkeypatch.setattr(ReducedTrainer, "compute_loss", failing(compute, 12))
    else:
        monkeypatch.setattr(head_draft, "save_reduced", failing(None, 0))
    with pytest.raises(RuntimeError, match="killed"):
        train(options(folder, name))
    monkeypatch.undo()
    assert AlignedModel.from_pretrained(folder / "proposal", folder / name).drafter == "none"  # the head is whole
    assert "draft" in train(options(folder, name))
    one, other = (load_file(folder / path / "draft" / "model.safetensors") for path in ("head", name))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_it_goes_with_its_head_and_fits_no_other_proposal(task, tmp_path):
    folder, _ = task
    shutil.copytree(folder / "head", tmp_path / "head")
    model = AlignedModel.from_pretrained(folder / "proposal", tmp_path / "head")
    assert isinstance(model.models.drafter.model, ReducedLM)
    assert model.models.who == f"the drafter {tmp_path / 'head' / 'draft'}"
    values = json.loads((tmp_path / "head/draft/trimtab_draft.json").read_text())
    (tmp_path / "head/draft/trimtab_draft.json").write_text(json.dumps(values | {"proposal": "sha256:0"}))
    with pytest.raises(UnsupportedModel, match="drafter of another proposal"):
        AlignedModel.from_pretrained(folder / "proposal", tmp_path / "head")
    assert AlignedModel.from_pretrained(folder / "proposal", tmp_path / "head", draft="none").drafter == "none"


def test_a_batch_mixes_it_with_others(task):
    """A server's engine: the head with its drafter, an aligner that drafts for itself, the bare proposal."""
    folder, _ = task
    base = AlignedModel.from_pretrained(folder / "proposal", num_speculative_tokens=2)
    registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
    for name in ("head", "proposal"):
        registry.load(name, str(folder / name))
    models = [registry.resident(names) for names in (["head"], ["proposal"], [])]
    assert isinstance(models[0].models.drafter.model, ReducedLM)
    prompts = [row["prompt"] for row in task_rows(6)]
    params = [SamplingParams(seed=i, max_tokens=10, temperature=i % 2) for i in range(6)]
    sequences = [models[i % 3].prepare(prompts[i], params[i], i)[0] for i in range(6)]
    engine = Engine(base.proposal, base.pace, max_num_seqs=6)
    engine.submit(sequences)
    while engine:
        engine.step()
    expected = [models[i % 3].generate(prompts[i], params[i])[0].tokens for i in range(6)]
    assert [sequence.tokens for sequence in sequences] == expected


def test_a_server_loads_it_unless_somebody_else_is_to_draft(task, tmp_path):
    folder, _ = task
    shutil.copytree(folder / "head", tmp_path / "linked")
    (tmp_path / "linked" / "draft").rename(tmp_path / "elsewhere")
    (tmp_path / "linked" / "draft").symlink_to(tmp_path / "elsewhere")
    for draft, path, drafts in (
        (None, folder / "head", True),
        ("none", folder / "head", False),
        (None, tmp_path / "linked", False),
    ):
        base = AlignedModel.from_pretrained(folder / "proposal", draft=draft)
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
        entry = registry.load("head", str(path))
        own = registry.resident(["head"]).models.drafter.models
        assert len(own) == drafts
        assert entry.loaded.num_bytes == entry.loaded.model.adapter.num_bytes + sum(model.num_bytes for model in own)
