"""Under `geometric` the weight of an aligner of its own comes from whole rows: what a cache leaves out does not move it."""

import json

import pytest

from tiny_task import make_task, task_options, task_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.files import read_json
from trimtab.models.aligner import manifest_of
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train

SETTINGS = {"objective": "sft", "rule": "geometric", "proposal_temperature": 0.8, "aligner_temperature": 1.25}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """The task with an aligner in `coarse` that was trained beside a cache of two entries, and the report of it."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    return folder, train(options(folder, "coarse"))


def options(folder, name, **settings):
    said = SETTINGS | {"cache_top_k": 2, "eval_dataset": str(folder / "held_out.jsonl"), "dev_samples": 0}
    return task_options(folder, name, **(said | settings))


def test_a_coarse_cache_gives_the_weight_of_exact_rows(task):
    folder, coarse = task
    exact = train(options(folder, "exact", cache_top_k=0))
    assert coarse["weight"] == exact["weight"]
    assert dict(coarse["weights_tried"]) == pytest.approx(dict(exact["weights_tried"]), abs=1e-5)
    assert coarse["kl"] == pytest.approx(exact["kl"], abs=1e-5)
    assert (coarse["tuned_on"], exact.get("tuned_on")) == ("whole rows", None)
    nll, exact_nll = (report["metrics"]["eval_nll_aligned"] for report in (coarse, exact))
    assert abs(nll - exact_nll) > 0.01, "the cache was coarse"


def test_the_losses_are_what_score_says(task):
    folder, report = task
    rows = task_rows(64)[48:]
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "coarse")
    for weight, loss in report["weights_tried"][::4]:
        scores = model.score([r["prompt"] for r in rows], [r["chosen"] for r in rows], SamplingParams(weight=weight))
        assert loss == pytest.approx(-sum(sum(s.aligned) for s in scores) / sum(len(s.tokens) for s in scores), abs=1e-4)
    assert model.defaults.weight is None or model.defaults.weight == report["weight"]


def test_an_aligner_that_broke_is_given_no_weight(task):
    """A diverged aligner has an infinite loss at every weight but 0: that is said in words, for JSON has no number for it."""
    folder, _ = task
    report = train(options(folder, "broke", training={"learning_rate": 1e3, "max_steps": 2}))
    assert report["weight"] == manifest_of(folder / "broke").weight == 0
    assert read_json(folder / "broke" / "training.json")["weights_tried"] == json.loads(json.dumps(report))["weights_tried"]


def test_a_weight_that_was_tuned_before_stays(task):
    """By an earlier version on cached rows, say; its samples were drawn at it."""
    folder, _ = task
    old = train(options(folder, "old"))
    path = folder / "old" / "training.json"
    path.write_text(json.dumps({name: value for name, value in old.items() if name != "tuned_on"} | {"weight": 0.25}))
    assert train(options(folder, "old"))["weight"] == 0.25


def test_a_run_that_was_killed_before_it_tunes_then(task):
    folder, report = task
    output = folder / "coarse"
    known = json.loads((output / "training.json").read_text())
    changed = {name: value for name, value in known.items() if name != "tuned_on"} | {"weight": 0.01, "weights_tried": []}
    (output / "training.json").write_text(json.dumps(changed))
    again = train(options(folder, "coarse"))
    assert (again["weight"], again["weights_tried"]) == (report["weight"], report["weights_tried"])
    assert json.loads((output / "training.json").read_text()) == json.loads(json.dumps(again))
    assert manifest_of(output).weight == report["weight"]
    assert f"{report['weight']:g}" in (output / "README.md").read_text()


def test_a_budget_binds_whole_rows(task):
    folder, free = task
    bound = train(options(folder, "bound", max_kl=free["kl"] / 4))
    assert 0 < bound["weight"] < free["weight"]
    assert bound["kl"] <= free["kl"] / 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, True),
        ({"objective": "likelihood"}, True),
        ({"rule": "nucleus", "aligner_temperature": None}, False),
        ({"cache_top_k": 0}, False),
        ({"aligner": "", "objective": "likelihood"}, False),
        ({"proposal_endpoint": ("http://a",), "proposal_temperature": None}, False),
    ],
)
def test_who_needs_them(task, settings, expected):
    assert bool(resolve(options(task[0], "x", **settings)).wants_whole_rows) == expected
