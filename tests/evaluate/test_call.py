"""`trimtab.evaluate(...)`: the results of the command, from options, settings, loaded models and judges."""

import inspect
import json

import pytest

import trimtab
from eval_task import called, make_eval_task, read, timeless
from trimtab import AlignedModel, EvalOptions
from trimtab.data.template import today
from trimtab.errors import InvalidOption
from trimtab.judges.base import Judge, Judgement
from trimtab.judges.references import ReferenceJudge, ReferenceMetric
from trimtab.judges.reward import RewardJudge
from trimtab.judges.rewards.function import FunctionReward


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_eval_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(task):
    return AlignedModel.from_pretrained(task / "proposal", [task / "start"])


def named(task):
    return {"proposal": str(task / "proposal"), "aligner": str(task / "start")}


def shared(task, **more):
    return {"dataset": str(task / "prompts.jsonl"), "max_tokens": 6, "seed": 4, **more}


@pytest.fixture(scope="module")
def expected(task, tmp_path_factory):
    """What the library gives with texts for everything."""
    out = str(tmp_path_factory.mktemp("out") / "o")
    judges = ["rougeL", f"{task}/reward"]
    return trimtab.evaluate(**named(task), **shared(task, judge=judges, out=out))


FIGURES = ("judging", "texts", "distribution", "likelihood", "failed")


def test_the_results_are_the_commands(task, expected, capsys, tmp_path):
    words = ["eval", "--proposal", task / "proposal", "--aligner", task / "start", "--dataset", task / "prompts.jsonl"]
    words += ["--max_tokens", 6, "--seed", 4, "--judge", "rougeL", "--judge", f"{task}/reward", "--out", tmp_path / "o"]
    status, said, _ = called(capsys, *words, "--json")
    assert status == 0
    ours, theirs = timeless(json.loads(said)), timeless(expected)
    for results in (ours, theirs):
        results["provenance"].pop("options")
    assert json.loads(json.dumps(theirs)) == ours


def test_options_may_be_one_object_and_models_and_judges_may_be_loaded(task, model, expected, tmp_path):
    options = EvalOptions(**shared(task, judge=("rougeL",), out=str(tmp_path / "a")), proposal=str(task / "proposal"))
    given = trimtab.evaluate(options, aligner=[str(task / "start")], judge=["rougeL", f"{task}/reward"])
    judges = [ReferenceJudge(ReferenceMetric("rougeL")), f"{task}/reward"]
    loaded = trimtab.evaluate(model=model, **shared(task, judge=judges, out=str(tmp_path / "b")))
    for results in (given, loaded):
        assert {key: results[key] for key in FIGURES} == {key: expected[key] for key in FIGURES}
    assert loaded["provenance"]["options"]["judge"] == ["rougeL", f"{task}/reward"]
    weights = {name: facts["weights"] for name, facts in loaded["provenance"]["models"].items()}
    assert weights == {"proposal": model.proposal.fingerprint, "aligner 1": model.aligners[0].fingerprint}
    assert read(tmp_path / "b" / "run.json") == {"date": today()}


def lettered(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer, strict=True)]


class Constant(Judge):
    """Prefers the second answer by as much as it is told."""

    kind = name = "constant"

    def judge(self, pairs, journal):
        return [Judgement(1.75) for _ in pairs]


def test_a_judge_of_ones_own_and_a_function_that_reads_columns(task, model, tmp_path):
    rows = [json.loads(line) for line in (task / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, row in enumerate(rows):
        row["answer"] = "xyza"[i % 4]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judges = [Constant(), RewardJudge(FunctionReward(lettered))]
    asked = {"dataset": str(tmp_path / "d.jsonl"), "max_tokens": 6, "null": False, "references": False, "judge": judges}
    results = trimtab.evaluate(model=model, out=str(tmp_path / "o"), **asked)
    constant, letters = results["judging"]
    assert (constant["judge"], constant["win_rate"], constant["n"]) == ("constant", 75.0, 12)
    outputs = read(tmp_path / "o" / "outputs" / "aligned.json")
    expected = sum(row["answer"] in output["output"] for row, output in zip(rows, outputs, strict=True)) / 12
    assert letters["scores"]["output_2"] == pytest.approx(expected)
    kept = (tmp_path / "o" / "judgements.jsonl").read_bytes()
    trimtab.evaluate(model=model, out=str(tmp_path / "o"), **asked)
    assert (tmp_path / "o" / "judgements.jsonl").read_bytes() == kept


def test_annotations_and_dry_runs_too(task, expected, model, tmp_path):
    folder = expected["out"]
    found = trimtab.evaluate(annotations=f"{folder}/annotations/rougeL-main.json")
    assert found["win_rate"] == expected["judging"][0]["win_rate"]
    told = trimtab.evaluate(model=model, dry_run=True, **shared(task, judge=[Constant(), "chrf"], out=str(tmp_path / "o")))
    assert (told["judges"], told["models"], told["data"]["prompts"]) == (["constant", "chrf"], [], 12)
    assert list(tmp_path.iterdir()) == []


class Nameless(Judge):
    """Reports could not say whose figures they are."""

    kind = "nameless"

    def judge(self, pairs, journal):
        return [Judgement(None) for _ in pairs]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judg": "chrf"}, r"^there is no option 'judg': did you mean judge\?$"),
        ({"out": None}, r"^out is required, or annotations$"),
        ({"judge": "rouge3"}, r"^judge 'rouge3' is none: give URL#MODEL"),
        ({"judge": [len]}, r"^judge must be a text, or a trimtab\.judges\.base\.Judge, not <built-in function len>$"),
        ({"judge": "chrf", "criterion": "harmless"}, r"^criterion needs a judge that is an endpoint$"),
        ({"orders": "second"}, r"^orders must be one of both, random, not 'second'$"),
        ({"proposal": ""}, r"^proposal is required for the systems proposal and aligned$"),
        ({"proposal": "", "aligner": (), "model": "loaded", "rule": "product"}, r"^rule needs an aligner$"),
        ({"proposal": "", "aligner": (), "model": "loaded", "max_num_seqs": 4}, r"^max_num_seqs is for models that are loaded"),
        ({"proposal": "", "aligner": (), "model": "loaded", "date": "2026-11-30"}, r"^date is for models that are loaded"),
        ({"model": "loaded", "aligner": ()}, r"^proposal is for models that are loaded here, and model is loaded"),
        ({"proposal": "", "aligner": (), "model": 3}, r"^model must be a trimtab\.AlignedModel, not 3$"),
        ({"judge": Nameless()}, r"^judge: Nameless needs a text 'name'"),
        ({"sweep_weight": 0.5}, r"^sweep_weight needs a judge to pick by$"),
        (
            {"sweep_weight": [0.5, 1.5], "sweep_rule": ["product", "mixture"], "judge": "chrf"},
            r"^sweep_weight: weight: under mixture the aligner's share is 1\.5, and must be at most 1",
        ),
        ({"sweep_weight": -0.5, "rule": "mixture", "judge": "chrf"}, r"^sweep_weight: weight must be at least 0 under mixture"),
    ],
)
def test_what_cannot_be_is_refused_by_the_options_name(task, model, settings, message, tmp_path):
    asked = named(task) | shared(task, out=str(tmp_path / "o")) | settings
    if asked.get("model") == "loaded":
        asked["model"] = model
    with pytest.raises(InvalidOption, match=message):
        trimtab.evaluate(**asked)
    assert list(tmp_path.iterdir()) == []


def test_the_function_says_what_it_takes_and_the_modules_are_still_there():
    assert "Returns:" in inspect.getdoc(trimtab.evaluate.call.evaluate)
    assert list(inspect.signature(trimtab.evaluate).parameters) == ["options", "model", "settings"]
