"""Sweeps: each point is what a run of its own gives, and the pick is the best that may be picked."""

import dataclasses

import pytest

from eval_task import QUICK, fair, make_eval_task, prefers, verdict
from scripted import scripted
from trimtab import AlignedModel, SamplingParams
from trimtab.data.records import read_records
from trimtab.errors import InvalidOption
from trimtab.evaluate import sweep as module
from trimtab.evaluate.distribution import summarise, trace
from trimtab.evaluate.prompts import split_prompts
from trimtab.evaluate.run import Bench, bare_proposal
from trimtab.evaluate.sweep import Setting, sweep
from trimtab.evaluate.systems import Prompts, System
from trimtab.judges.endpoint import EndpointJudge

PARAMS = SamplingParams(max_tokens=6, seed=3)
SETTINGS = [Setting(None, 0.0), Setting(None, 0.5), Setting("geometric", 0.5), Setting("product", 2.0)]
PROPOSAL = System("proposal", "proposal")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return make_eval_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def model(task):
    return AlignedModel.from_pretrained(task / "proposal", [task / "start"])


@pytest.fixture(scope="module")
def prompts(task):
    records = read_records(str(task / "prompts.jsonl"), need="prompt")
    return Prompts([r.prompt for r in records], [r.chosen for r in records], [r.source for r in records])


def swept(model, prompts, out, respond=fair, settings=SETTINGS, **more):
    """The parameters that won, the frontier, and how many questions were asked."""
    with scripted(respond, models=[{"id": "judge"}]) as server, Bench(out, model, QUICK) as bench:
        judge = EndpointJudge(server.url, limits=QUICK)
        params, frontier = sweep(bench, judge, PROPOSAL, prompts, PARAMS, settings, **more)
        return params, frontier, len(server.asked)


@pytest.fixture(scope="module")
def done(model, prompts, tmp_path_factory):
    return swept(model, prompts, tmp_path_factory.mktemp("sweep"))


def test_each_point_is_what_a_run_of_its_own_gives(model, prompts, done):
    """The win rate is the mean of P(its answer) over prompts, and the KL that of the traces of its answers."""
    _, frontier, _ = done
    each = [dataclasses.replace(PARAMS, seed=3 + i) for i in range(len(prompts))]
    baseline = [c.text for c in bare_proposal(model).generate(prompts.prompts, each)]
    assert (frontier["judge"], frontier["split"], frontier["prompts"]) == ("judge", "development", 12)
    for point, setting in zip(frontier["points"], SETTINGS, strict=True):
        alone = AlignedModel(
            model.proposal, model.aligners, model.tokenizer, model.eos_token_ids, rule=setting.rule, weight=setting.weight
        )
        answers = alone.generate(prompts.prompts, each)
        wins = [prefers(c.text, text) for c, text in zip(answers, baseline, strict=True)]
        assert point["win_rate"] == pytest.approx(100 * sum(wins) / len(wins))
        moved = summarise(trace(alone, prompts.prompts, [c.tokens for c in answers]))
        assert point["kl_per_sequence"] == pytest.approx(moved["kl_per_sequence"], abs=1e-6)
        assert point["kl_per_token"] == pytest.approx(moved["kl_per_token"], abs=1e-6)
        assert (point["rule"], point["weight"]) == (setting.rule or "product", setting.weight)
        assert (point["n"], point["missing"]) == (12, 0)
    assert frontier["points"][0]["kl_per_sequence"] == pytest.approx(0, abs=1e-5)


def test_the_highest_win_rate_is_picked_and_its_settings_come_back(done):
    params, frontier, _ = done
    best = max(range(4), key=lambda i: frontier["points"][i]["win_rate"])
    assert [point["picked"] for point in frontier["points"]] == [i == best for i in range(4)]
    picked = SETTINGS[best]
    assert params == dataclasses.replace(PARAMS, rule=picked.rule, weight=picked.weight)


def test_the_same_sweep_again_asks_nothing(model, prompts, tmp_path):
    first = swept(model, prompts, tmp_path)
    with scripted(fair, models=[{"id": "judge"}]) as server, Bench(tmp_path, model, QUICK) as bench:
        judge = EndpointJudge(server.url, limits=QUICK)
        assert sweep(bench, judge, PROPOSAL, prompts, PARAMS, SETTINGS) == first[:2]
        assert server.asked == []


def test_of_equal_win_rates_the_one_that_moved_least_is_picked(model, prompts, tmp_path):
    _, frontier, _ = swept(
        model, prompts, tmp_path, lambda asked, number: verdict(0.5), [Setting(None, w) for w in (2.0, 0.5, 1.0)]
    )
    assert {point["win_rate"] for point in frontier["points"]} == {50.0}
    least = min(point["kl_per_sequence"] for point in frontier["points"])
    assert [point["picked"] for point in frontier["points"]] == [p["kl_per_sequence"] == least for p in frontier["points"]]


def test_a_pick_is_no_further_away_than_it_may_be(model, prompts, done, tmp_path):
    points = done[1]["points"]
    limit = sorted(point["kl_per_sequence"] for point in points)[1]
    _, frontier, _ = swept(model, prompts, tmp_path, max_kl=limit)
    allowed = [point for point in frontier["points"] if point["kl_per_sequence"] <= limit]
    assert len(allowed) == 2
    assert max(allowed, key=lambda point: point["win_rate"])["picked"]
    with pytest.raises(InvalidOption, match=r"max_kl 1e-09: the least of the settings tried is [\d.]+ nats"):
        swept(model, prompts, tmp_path, settings=SETTINGS[1:], max_kl=1e-9)


def test_a_kl_that_is_not_finite_is_too_much_and_loses_ties(model, prompts, monkeypatch, tmp_path):
    def infinite(traces):
        found = summarise(traces)
        return found if found["kl_per_sequence"] > 1e-4 else found | {"kl_per_sequence": None}

    monkeypatch.setattr(module, "summarise", infinite)
    for more in ({}, {"max_kl": 1e6}):
        _, frontier, _ = swept(model, prompts, tmp_path, lambda *_: verdict(0.5), SETTINGS[:2], **more)
        assert [point["picked"] for point in frontier["points"]] == [False, True]


def test_a_rule_without_a_row_is_refused_before_anybody_answers(model, prompts, tmp_path):
    with pytest.raises(InvalidOption, match=r"sweep_rule: 'candidates.*' has no row in closed form"):
        swept(model, prompts, tmp_path, settings=[*SETTINGS, Setting("candidates(n=4)", 1.0)])
    assert (tmp_path / "answers.jsonl").read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
def test_the_same_prompt_is_never_on_both_sides(fraction):
    """Forty different texts, some up to four times, some as a chat: the parts are disjoint, whole, and in order."""
    texts = [f"p{i % 40 if i % 3 else i % 7}" for i in range(100)]
    asked = [[{"role": "user", "content": text}] if i % 5 == 0 else text for i, text in enumerate(texts)]
    prompts = Prompts(asked, texts, [str(i) for i in range(100)])
    report, development = split_prompts(prompts, fraction)
    assert not set(report.references) & set(development.references)
    assert sorted([*report.sources, *development.sources], key=int) == prompts.sources
    assert [int(i) for i in report.sources] == sorted(map(int, report.sources))
    assert len(set(development.references)) == round(fraction * len(set(texts)))
