"""A whole evaluation: every figure is what its parts give, every file can be read again, and what is complete is kept."""

import copy
import dataclasses
import json
import warnings
from collections import Counter

import pytest

from eval_task import QUICK, fair, make_eval_task, prefers, read, shown, timeless, verdict
from scripted import Reply, scripted
from spellings import KINDS
from trimtab import AlignedModel, SamplingParams
from trimtab.data.records import read_records
from trimtab.errors import BudgetExceeded
from trimtab.evaluate.alpaca import read_annotations, read_outputs
from trimtab.evaluate.distribution import summarise, trace
from trimtab.evaluate.likelihood import held_out
from trimtab.evaluate.run import NULL_SEED, Plan, _tokens, bare_proposal, run_evaluation
from trimtab.evaluate.systems import Prompts, System, parse_system
from trimtab.evaluate.winrate import summarise_annotations
from trimtab.judges.budget import Budget
from trimtab.judges.endpoint import EndpointJudge
from trimtab.judges.references import ReferenceJudge, ReferenceMetric
from trimtab.judges.reward import RewardJudge
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.rewards.model import ModelReward
from trimtab.models.table import TableLM

PARAMS = SamplingParams(max_tokens=6, seed=3)
PROPOSAL, ALIGNED, REFERENCES = (System(name, name) for name in ("proposal", "aligned", "references"))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_eval_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(task):
    return AlignedModel.from_pretrained(task / "proposal", [task / "start"])


@pytest.fixture(scope="module")
def prompts(task):
    """Twelve, of which the third and the last have no wanted answer."""
    records = read_records(str(task / "prompts.jsonl"), need="prompt")
    references = [None if i in (2, 11) else r.chosen for i, r in enumerate(records)]
    return Prompts([r.prompt for r in records], references, [r.source for r in records])


def evaluated(out, respond, judges=("endpoint",), *, budget=None, **plan):
    """The results, and the script of the endpoint that judges."""
    with scripted(respond, models=[{"id": "org/judge"}]) as server:
        endpoint = EndpointJudge(server.url, "org/judge", limits=QUICK, budget=budget)
        asked = [endpoint if judge == "endpoint" else judge for judge in judges]
        settings = {"baseline": PROPOSAL, "system": ALIGNED, "params": PARAMS, "limits": QUICK}
        return run_evaluation(Plan(judges=asked, out=out, **{**settings, **plan})), server


@pytest.fixture(scope="module")
def done(task, model, prompts, tmp_path_factory):
    """The folder and the results of a run with every kind of judge."""
    out = tmp_path_factory.mktemp("out")
    reward = RewardJudge(ModelReward(RewardModel.from_pretrained(task / "reward")))
    judges = ("endpoint", reward, ReferenceJudge(ReferenceMetric("chrf")))
    return out, evaluated(out, fair, judges, model=model, prompts=prompts)[0]


def row_of(results, judge, pair="main"):
    [row] = [row for row in results["judging"] if (row["judge"], row["pair"]) == (judge, pair)]
    return row


def test_all_of_it_is_in_the_folder_and_on_the_page(done):
    out, results = done
    assert read(out / "results.json") == json.loads(json.dumps(results))
    assert results.keys() == {
        *("title", "systems", "dataset", "judging", "texts", "distribution", "likelihood", "speed", "provenance", "failed")
    }
    assert sorted(path.name for path in out.glob("o*/*")) == ["aligned.json", "proposal.json", "proposal_another_seed.json"]
    assert sorted(path.name for path in out.glob("a*/*")) == [
        *("chrf-main.json", "chrf-null.json"),
        *(f"{judge}-{pair}.json" for judge in ("org_judge", "reward") for pair in ("main", "null", "references")),
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    for words in ("aligned against proposal", "org/judge", "Distance from the proposal", "Speed", "Prompt by prompt"):
        assert words in page
    assert not list(out.glob("**/.*"))


def test_win_rates_are_the_means_of_what_the_judge_says(model, prompts, done):
    """The judge prefers by a known formula; the null is the proposal with seeds that lie a million further on."""
    _, results = done
    each = [dataclasses.replace(PARAMS, seed=3 + i) for i in range(12)]
    later = [dataclasses.replace(PARAMS, seed=3 + NULL_SEED + i) for i in range(12)]
    first, again = ([c.text for c in bare_proposal(model).generate(prompts.prompts, one)] for one in (each, later))
    second = [c.text for c in model.generate(prompts.prompts, each)]
    for pair, texts in (("main", second), ("null", again), ("references", prompts.references)):
        wins = [prefers(other, one) for one, other in zip(first, texts, strict=True) if other is not None]
        row = row_of(results, "org/judge", pair)
        assert row["win_rate"] == pytest.approx(100 * sum(wins) / len(wins)), pair
        assert (row["n"], row["missing"]) == (len(wins), 12 - len(wins))
        assert row["position"]["first_preferred"] == pytest.approx(50)
    assert row["why_missing"] == "no reference"
    assert [row["pair"] for row in results["judging"] if row["kind"] == "reference"] == ["main", "null"]
    metric = ReferenceMetric("chrf")
    known = [i for i in range(12) if prompts.references[i]]
    scores = [metric.score([texts[i] for i in known], [prompts.references[i] for i in known]) for texts in (first, second)]
    row = row_of(results, "chrf")
    assert (row["n"], row["missing"]) == (10, 2)
    assert [row["scores"][f"output_{k}"] for k in (1, 2)] == pytest.approx([sum(s) / 10 for s in scores])
    assert row_of(results, "reward")["scores"].keys() >= {"output_1", "output_2"}


@pytest.mark.parametrize("kind", ["byte_level", "llama", "wordpiece"])
def test_the_tokens_of_an_answer_are_its_text(kind):
    """After a text they go on with it, after a chat they begin anew: else the page would not colour them."""
    tokenizer = KINDS[kind]()
    tables = [TableLM.random(len(tokenizer), order=1, seed=seed) for seed in range(2)]
    model = AlignedModel(tables[0], [tables[1]], tokenizer, [tokenizer.eos_token_id])
    for prompt in ("the cat", [{"role": "user", "content": "the cat"}]):
        for completion in model.generate([prompt], SamplingParams(max_tokens=9, seed=1, n=4, ignore_eos=True)):
            (seen,) = trace(model, [prompt], [completion.tokens])
            shown = _tokens(model, prompt, completion.text, seen)
            assert "".join(text for text, _ in shown) == completion.text
            assert [influence for _, influence in shown] == seen.influence
            assert _tokens(model, prompt, f"{completion.text}.", seen) is None


def test_distance_and_likelihood_are_those_of_the_parts(model, prompts, done):
    _, results = done
    each = [dataclasses.replace(PARAMS, seed=3 + i) for i in range(12)]
    answers = model.generate(prompts.prompts, each)
    moved = summarise(trace(model, prompts.prompts, [c.tokens for c in answers]))
    found = results["distribution"]["aligned"]
    for name in ("tokens", "kl_per_token", "kl_per_sequence", "log_z_mean", "log_z_std", "entropy", "influence"):
        assert found[name] == pytest.approx(moved[name], abs=1e-6), name
    some = prompts.pick([i for i in range(12) if prompts.references[i]])
    expected = held_out(model, some.prompts, some.references, some.sources)
    assert results["likelihood"]["nll"] == pytest.approx(expected["nll"])
    assert (results["likelihood"]["sequences"], results["likelihood"]["left_out"]) == (10, 0)
    assert results["texts"].keys() == results["speed"].keys() == {"proposal", "aligned"}
    assert results["texts"]["aligned"]["truncated"] == sum(c.finish_reason == "length" for c in answers) / 12


def test_annotations_and_outputs_are_read_again_by_us_and_by_alpaca_eval(prompts, done, tmp_path):
    out, results = done
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from alpaca_eval import utils
        from alpaca_eval.metrics import get_winrate
    for path in sorted((out / "annotations").iterdir()):
        judge, _, pair = path.stem.rpartition("-")
        row = row_of(results, judge.replace("_", "/"), pair)
        assert summarise_annotations(read_annotations(path))["win_rate"] == row["win_rate"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = get_winrate(utils.load_or_convert_to_dataframe(path))
        assert (theirs["win_rate"], theirs["n_total"]) == (pytest.approx(row["win_rate"]), row["n"])
    rows = read_outputs(out / "outputs" / "aligned.json")
    assert [row["instruction"] for row in rows] == prompts.prompts
    assert {row["generator"] for row in rows} == {"aligned"}
    files = {name: parse_system(str(out / "outputs" / f"{name}.json")) for name in ("proposal", "aligned")}
    again, server = evaluated(tmp_path, fair, baseline=files["proposal"], system=files["aligned"], prompts=None)
    assert server.asked
    for key in ("win_rate", "win_rate_interval", "length_controlled_win_rate", "length"):
        assert again["judging"][0][key] == row_of(results, "org/judge")[key]
    assert [row["pair"] for row in again["judging"]] == ["main"]  # a file has no other seed, and there are no references
    assert again["systems"] == {"baseline": "proposal", "system": "aligned"}
    assert not again.keys() & {"distribution", "likelihood", "speed"}


def test_the_same_run_again_computes_and_asks_nothing(task, model, prompts, done, monkeypatch):
    out, results = done
    for owner, name in ((AlignedModel, "stream"), (RewardModel, "score"), (ReferenceMetric, "score")):
        reward = RewardModel.from_pretrained(task / "reward")
        monkeypatch.setattr(owner, name, None)
    judges = ("endpoint", RewardJudge(ModelReward(reward)), ReferenceJudge(ReferenceMetric("chrf")))
    again, server = evaluated(out, fair, judges, model=model, prompts=prompts)
    assert server.asked == []
    before, now = (copy.deepcopy(timeless(one)) for one in (results, again))
    places = before["provenance"]["judges"]["org/judge"], now["provenance"]["judges"]["org/judge"]
    assert places[1].pop("also_answered_at") == [places[0].pop("url")] != [places[1].pop("url")]  # the script's port
    assert now == before


def outputs(path, texts, prompts, generator=None):
    known = {"generator": generator} if generator else {}
    rows = [{"instruction": p, "output": t, **known} for p, t in zip(prompts.prompts, texts, strict=True)]
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return parse_system(str(path))


@pytest.mark.parametrize(
    ("first", "second"), [("model", "model"), ("a b", "a_b"), ("模型 甲", "模型 乙"), ("m" * 70, "m" * 70 + "x"), ("甲", "甲")]
)
def test_systems_keep_apart_whatever_they_are_called(prompts, tmp_path, first, second):
    names = [f"{'xyz'[i % 3]}" * (i + 1) for i in range(12)], ["abc"] * 12
    one = outputs(tmp_path / "1" / "o.json", names[0], prompts, first)
    other = outputs(tmp_path / "2" / "o.json", names[1], prompts, second)
    results, _ = evaluated(tmp_path / "out", fair, (), baseline=one, system=other, prompts=prompts)
    written = {rows[0]["generator"]: [row["output"] for row in rows] for rows in map(read, (tmp_path / "out").glob("o*/*"))}
    assert written == {results["systems"]["baseline"]: names[0], results["systems"]["system"]: names[1]}
    assert results["judging"] == []


def test_references_may_be_a_system(prompts, tmp_path):
    some = prompts.pick([i for i in range(12) if prompts.references[i]])
    one = outputs(tmp_path / "o.json", ["abc"] * 10, some)
    results, server = evaluated(tmp_path / "out", fair, baseline=one, system=REFERENCES, prompts=some)
    assert [row["pair"] for row in results["judging"]] == ["main"]
    assert row_of(results, "org/judge")["output_2"] == "references"
    assert results["judging"][0]["win_rate"] == pytest.approx(10 * sum(prefers(r, "abc") for r in some.references))
    assert len(server.asked) == 20


def test_an_endpoint_is_its_own_null_with_seeds_that_no_prompt_has(prompts, tmp_path):
    def both(asked, number):
        if "chat" in asked.path:
            return fair(asked)
        return Reply({"choices": [{"index": 0, "text": f"xyz {asked.body['seed']}"}]})

    with scripted(both, models=[{"id": "m"}]) as server:
        judge = EndpointJudge(server.url, "m", limits=QUICK)
        baseline, system = parse_system(f"{server.url}#m"), outputs(tmp_path / "m.json", ["abc"] * 12, prompts, "m")
        plan = Plan(prompts, baseline, system, [judge], PARAMS, tmp_path / "out", limits=QUICK, references=False)
        results = run_evaluation(plan)
    assert results["systems"] == {"baseline": "m", "system": "2 m"}
    assert [(row["output_1"], row["output_2"]) for row in results["judging"]] == [("m", "2 m"), ("m", "m, another seed")]
    for name, first in (("m", 3), ("m_another_seed", 3 + NULL_SEED)):
        rows = read(tmp_path / "out" / "outputs" / f"{name}.json")
        assert [row["output"] for row in rows] == [f"xyz {first + i}" for i in range(12)]
    wins = [prefers(f"xyz {3 + NULL_SEED + i}", f"xyz {3 + i}") for i in range(12)]
    assert results["judging"][1]["win_rate"] == pytest.approx(100 * sum(wins) / 12)


def test_what_a_judge_cannot_say_is_counted_and_named(prompts, tmp_path):
    def moody(asked, number):
        said = shown(asked)
        if "aa" in said:
            return Reply({"choices": [{"message": {"content": "neither"}}]})
        return Reply({"error": {"message": "too rude"}}, status=400) if "bb" in said else fair(asked)

    texts = ["xyz", "xy", "yyx", *["aa"] * 3, *["bb"] * 2, *["cx"] * 4]
    one, other = outputs(tmp_path / "o.json", ["abc"] * 12, prompts), outputs(tmp_path / "s.json", texts, prompts)
    results, _ = evaluated(tmp_path / "out", moody, baseline=one, system=other, prompts=prompts, references=False)
    row = row_of(results, "org/judge")
    assert (row["n"], row["missing"]) == (7, 5)
    assert row["win_rate"] == pytest.approx(100 * sum(prefers(t, "abc") for t in texts if t not in ("aa", "bb")) / 7)
    rows = read(tmp_path / "out" / "annotations" / "org_judge-main.json")
    why = Counter(row.get("why_missing", "")[:10] for row in rows)
    assert why == {"": 7, "no verdict": 3, "http://127": 2}
    assert [row["preference"] is None for row in rows] == [t in ("aa", "bb") for t in texts]


def test_a_judge_that_never_says_anything_has_a_row_without_figures(prompts, tmp_path):
    prompts = dataclasses.replace(prompts.pick(range(3)), references=[None] * 3)  # more, and the run would end
    one, other = (outputs(tmp_path / f"{n}.json", [n * (i + 1) for i in range(3)], prompts) for n in ("abc", "xyz"))
    silent = Reply({"choices": [{"message": {"content": "?"}}]})
    results, _ = evaluated(tmp_path / "out", lambda *_: silent, baseline=one, system=other, prompts=prompts)
    row = row_of(results, "org/judge")
    assert (row["n"], row["missing"], row["why_missing"]) == (0, 3, "no verdict in '?'")
    assert "nothing can be said" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_limit_of_cost_keeps_what_is_complete_and_the_rest_can_be_bought(prompts, tmp_path):
    """101 for each question: enough for the main contest, 24 questions, and not for the references."""
    one, other = (outputs(tmp_path / f"{n}.json", [n * (i + 1) for i in range(12)], prompts) for n in ("abc", "xyz"))
    judges = ("endpoint", ReferenceJudge(ReferenceMetric("rouge1")))
    plan = {"baseline": one, "system": other, "prompts": prompts}
    with pytest.raises(BudgetExceeded, match=r"org/judge has cost \d+ of max_cost 3500.*raise max_cost and run again"):
        evaluated(tmp_path / "out", fair, judges, budget=Budget(1e6, 1e6, 3500.0), **plan)
    found = read(tmp_path / "out" / "results.json")
    assert [(row["judge"], row["pair"]) for row in found["judging"]] == [("org/judge", "main"), ("rouge1", "main")]
    assert 24 * 101 < found["provenance"]["judges"]["org/judge"]["cost"]["amount"] <= 3500
    assert "raise max_cost" in found["stopped"]
    whole, server = evaluated(tmp_path / "out", fair, judges, budget=Budget(1e6, 1e6, 1e6), **plan)
    assert len(server.asked) == 44 - found["provenance"]["judges"]["org/judge"]["cost"]["requests"]
    assert "stopped" not in whole
    assert row_of(whole, "org/judge")["win_rate"] == row_of(found, "org/judge")["win_rate"]
    assert row_of(whole, "org/judge", "references")["n"] == 10


def test_texts_that_do_not_fit_the_models_are_left_out_of_their_figures(model, prompts, tmp_path):
    """A wanted answer of 70 letters in a context of 64 takes nothing away from the rest of a run."""
    asked = prompts.pick([0, 1, 3])
    asked.references[1] = "x" * 70
    long = outputs(tmp_path / "o.json", ["y" * 70, "", "z" * 90], asked)
    results, _ = evaluated(tmp_path / "out", lambda *_: verdict(0.4), baseline=long, model=model, prompts=asked)
    assert (results["likelihood"]["sequences"], results["likelihood"]["left_out"]) == (2, 1)
    assert row_of(results, "org/judge")["n"] == 3
    assert results["texts"]["o"]["empty"] == pytest.approx(1 / 3)
