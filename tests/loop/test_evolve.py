"""Loops on the tiny task: what is promoted and what is not, whatever is voted, killed or rolled back."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trimtab
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, make_task, task_rows, write_rows
from trimtab.cli import main
from trimtab.decode.aligned import AlignedModel
from trimtab.errors import DataError, InvalidOption
from trimtab.files import read_json
from trimtab.loop.gate import level_of, verdict_of

TRAINING = {
    "learning_rate": 1e-2, "num_train_epochs": 2, "max_length": 32, "report_to": "none", "disable_tqdm": True, "use_cpu": True,
}  # fmt: skip
REWARD = """
def f(prompts, completions, **columns):
    return [sum(1 if letter in "xyz" else -1 for letter in text) for text in completions]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Votes of twenty people for letters of xyz, and a reward that likes them, too."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    (folder / "reward.py").write_text(REWARD)
    write_rows(folder / "pool.jsonl", [{"prompt": row["prompt"]} for row in task_rows(60, seed=9)])
    return folder


def votes(count, seed=3, keys=20, first=0):
    """Votes with prompts of their own; fewer are the first ones of more."""
    rows = task_rows(1000, seed)[first : first + count]
    return [row | {"key": f"user {i % keys}", "time": f"{first + i:04d}"} for i, row in enumerate(rows)]


def turned(row):
    return row | {"chosen": row["rejected"], "rejected": row["chosen"]}


def evolve(task, out, **settings):
    return trimtab.evolve(proposal=str(task / "proposal"), out=str(out), **TRAINING | settings)


def xyz(task, aligner):
    """The share of letters that are wanted, of what is written."""
    model = AlignedModel.from_pretrained(task / "proposal", aligner)
    params = trimtab.SamplingParams(max_tokens=5, seed=0, n=8)
    text = "".join(one.text for one in model.generate([row["prompt"] for row in task_rows(20, seed=77)], params))
    return sum(letter in "xyz" for letter in text) / len(text)


def test_rounds_begin_where_the_last_one_ended(task, tmp_path, capsys):
    """Votes are learnt from once as new ones, the second round starts from the first one's aligner, and both are better."""
    said = write_rows(tmp_path / "said.jsonl", votes(80))
    first = evolve(task, tmp_path / "loop", feedback=str(said))
    assert [one["promoted"] for one in first["rounds"]] == [True]
    assert first["current"] == 1
    assert Path(first["aligner"]).samefile(tmp_path / "loop" / "current")
    again = evolve(task, tmp_path / "loop", feedback=str(said))
    assert again["rounds"] == []
    assert again["waiting"]["why"] == "0 new votes, of 1 that a round takes"
    write_rows(said, votes(200))
    second = evolve(task, tmp_path / "loop", feedback=str(said), rounds=2)
    assert [one["round"] for one in second["rounds"]] == [2]
    assert second["rounds"][0]["incumbent"] == 1
    run = read_json(tmp_path / "loop/rounds/002/aligner/run.json")
    assert run["aligner"].endswith("rounds/001/aligner")
    assert xyz(task, None) < 0.3 < xyz(task, tmp_path / "loop" / "current")
    # no text of a vote stays in the folder
    kept = [path.read_bytes() for path in (tmp_path / "loop").rglob("*") if path.is_file()]
    assert not any(row["prompt"].encode() + b'"' in data for data in kept for row in votes(200) if len(row["prompt"]) > 5)
    assert main(["evolve", "--out", str(tmp_path / "loop")]) == 0
    assert "in service: round" in capsys.readouterr().out


def test_a_page_shows_the_curve(task, tmp_path):
    said = write_rows(tmp_path / "said.jsonl", votes(80))
    evolve(task, tmp_path / "loop", feedback=str(said))
    page = (tmp_path / "loop/index.html").read_text()
    assert "In service: <strong>round 1</strong>" in page
    assert "people&#x27;s votes" in page or "people's votes" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_votes_are_never_promoted(task, tmp_path, seed):
    """The control: three rounds in which either answer is preferred at random."""
    draw, rows = random.Random(seed), []
    for number in range(3):
        rows += [row if draw.random() < 0.5 else turned(row) for row in votes(60, seed=30 + seed, first=60 * number)]
        report = evolve(task, tmp_path / "loop", feedback=str(write_rows(tmp_path / "said.jsonl", rows)))
        assert [one["promoted"] for one in report["rounds"]] == [False]
    assert report["current"] == 0
    assert not (tmp_path / "loop" / "current").exists()


def test_what_is_worse_is_never_promoted(task, tmp_path):
    """After a good round, votes of another taste come that outnumber the first ones; those who judge keep theirs."""
    good = votes(100)
    said = write_rows(tmp_path / "said.jsonl", good)
    assert evolve(task, tmp_path / "loop", feedback=str(said))["current"] == 1
    history = read_json(tmp_path / "loop/history.json")
    held = [row for row in votes(400, seed=50) if _held_out(history, row)]
    bad = [turned(row) for row in votes(400, seed=50) if not _held_out(history, row)]
    write_rows(said, [*good, *held, *bad])
    report = evolve(task, tmp_path / "loop", feedback=str(said))
    assert not report["rounds"][0]["promoted"]
    assert report["rounds"][0]["votes"]["interval"][1] < 0.5 or report["rounds"][0]["votes"]["nll_more"] > 0.1
    assert report["current"] == 1


def _held_out(history, row):
    from trimtab.loop.folder import LoopFolder
    from trimtab.loop.options import EvolveOptions
    from trimtab.loop.stages import Loop
    from trimtab.loop.votes import Said

    folder = LoopFolder("x")
    folder.history = history
    return Loop(EvolveOptions(out="x"), folder, Said([], [], 0), [], None).is_held_out(row["prompt"])


def test_a_poisoned_tenth_is_met_by_the_gate(task, tmp_path):
    """A tenth of the votes is turned, by keys of their own: what is learnt is what the others say, and it is promoted."""
    rows = [turned(row) | {"key": f"bad {i % 4}"} if i % 10 == 0 else row for i, row in enumerate(votes(200))]
    report = evolve(task, tmp_path / "loop", feedback=str(write_rows(tmp_path / "said.jsonl", rows)))
    assert report["rounds"][0]["promoted"]
    assert xyz(task, report["aligner"]) > 0.5


def test_a_flood_from_one_key_moves_nothing(task, tmp_path):
    """A thousand votes for abc of one key against two hundred for xyz of twenty: without its share they would win."""
    flood = [turned(row) | {"key": "flood"} for row in votes(1000, seed=60)]
    said = write_rows(tmp_path / "said.jsonl", [*votes(200), *flood])
    report = evolve(task, tmp_path / "loop", feedback=str(said))
    assert report["rounds"][0]["promoted"]
    assert xyz(task, report["aligner"]) > 0.5
    assert report["rounds"][0]["pairs"]["train"]["capped"]["flood"] > 700
    trusting = evolve(task, tmp_path / "other", feedback=str(said), key_share=1.0)
    assert xyz(task, tmp_path / "other/rounds/001/aligner") < 0.2
    assert trusting["rounds"][0]["pairs"]["train"]["capped"] == {}


def test_rewards_alone(task, tmp_path):
    """Answers are drawn, ranked, learnt from and judged; prompts that are held out are never drawn for."""
    how = {"prompts": str(task / "pool.jsonl"), "reward": f"{task}/reward.py:f", "max_tokens": 5, "held_out": 0.5}
    report = evolve(task, tmp_path / "loop", rounds=3, **how)
    assert len(report["rounds"]) == 3
    assert report["current"] >= 1
    assert xyz(task, report["aligner"]) > xyz(task, None) + 0.2
    held = {row["prompt"] for row in task_rows(60, seed=9) if _held_out(read_json(tmp_path / "loop/history.json"), row)}
    drawn = {json.loads(line)["prompt"] for line in (tmp_path / "loop/rounds/001/pairs.jsonl").read_text().splitlines()}
    assert drawn
    assert held
    assert not held & drawn


def test_lost_prompts_are_expanded(task, tmp_path):
    """With a reward, prompts that the incumbent lost get pairs of drawn answers, without a pool those themselves."""
    rows = votes(60)
    said = write_rows(tmp_path / "said.jsonl", rows)
    report = evolve(task, tmp_path / "loop", feedback=str(said), reward=f"{task}/reward.py:f", expand=5, max_tokens=5)
    assert report["rounds"][0]["drawn"] == 5
    assert not (tmp_path / "loop/rounds/001/pairs.jsonl").exists()  # those prompts are people's, and stay with the votes


def test_any_earlier_round_comes_back(task, tmp_path):
    said = write_rows(tmp_path / "said.jsonl", votes(80))
    evolve(task, tmp_path / "loop", feedback=str(said))
    write_rows(said, votes(240))
    evolve(task, tmp_path / "loop", feedback=str(said))
    for number in (2, 1):  # whether it was promoted or not
        report = trimtab.evolve(out=str(tmp_path / "loop"), rollback=number)
        assert report["current"] == number
        assert os.readlink(tmp_path / "loop" / "current") == f"rounds/00{number}/aligner"
    with pytest.raises(InvalidOption, match="has no such round; it has 2"):
        trimtab.evolve(out=str(tmp_path / "loop"), rollback=3)
    with pytest.raises(InvalidOption, match="began with the proposal alone"):
        trimtab.evolve(out=str(tmp_path / "loop"), rollback=0)
    write_rows(said, votes(260))
    assert evolve(task, tmp_path / "loop", feedback=str(said))["rounds"][0]["incumbent"] == 1


def test_a_loop_may_begin_with_an_aligner(task, tmp_path):
    said = write_rows(tmp_path / "said.jsonl", votes(80))
    how = {"feedback": str(said), "aligner": str(task / "start"), "objective": "likelihood", "max_nll_loss": 5.0}
    report = evolve(task, tmp_path / "loop", **how)
    assert report["rounds"][0]["incumbent"] == 0
    back = trimtab.evolve(out=str(tmp_path / "loop"), rollback=0)
    assert Path(back["aligner"]).samefile(task / "start")
    assert (tmp_path / "loop" / "current").samefile(task / "start")


@pytest.mark.parametrize("reward", [False, True])
def test_a_kill_at_any_write_leads_to_the_same_end(task, tmp_path, monkeypatch, reward):
    """The run is killed at its first write, then at its second, and so on, each time going on from what is left."""
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    how = {"feedback": str(said), "save_steps": 0.5, "eval_steps": 0.5}
    if reward:
        how |= {"reward": f"{task}/reward.py:f", "prompts": str(task / "pool.jsonl"), "expand": 4, "max_tokens": 4}
    whole = evolve(task, tmp_path / "whole", **how)
    replace, kills, state = os.replace, 0, {"left": 0}

    def failing(*paths):
        state["left"] -= 1
        if state["left"] == 0:
            raise RuntimeError("killed")
        return replace(*paths)

    monkeypatch.setattr(os, "replace", failing)
    report = None
    while report is None:
        state["left"] = kills % 7 + 1 + kills // 7
        try:
            report = evolve(task, tmp_path / "loop", **how)
        except RuntimeError as error:
            assert str(error) == "killed"  # noqa: PT017 - another one is a failure
            kills += 1
    assert kills >= 5
    monkeypatch.undo()
    report = report if report["rounds"] else {"rounds": report["history"]}
    a, b = ({k: v for k, v in one["rounds"][0].items() if k not in ("time", "seconds")} for one in (whole, report))
    assert a == b
    weights = [load_file(tmp_path / name / "rounds/001/aligner/adapter_model.safetensors") for name in ("whole", "loop")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_another_proposal_seed_or_setting_is_refused_with_what_to_do(task, tmp_path):
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    evolve(task, tmp_path / "loop", feedback=str(said))
    for settings, message in (
        ({"seed": 5}, "is a loop with seed=42, now it is 5"),
        ({"held_out": 0.5}, r"is a loop with held_out=0\.2, now it is 0\.5"),
        ({"aligner": str(task / "start")}, "is a loop with aligner=None"),
    ):
        with pytest.raises(InvalidOption, match=message):
            evolve(task, tmp_path / "loop", feedback=str(said), **settings)
    save_tiny(task / "other", tiny_model("llama", V, seed=8), tiny_tokenizer())
    history = read_json(tmp_path / "loop/history.json")
    history["proposal"] = str(task / "other")
    (tmp_path / "loop/history.json").write_text(json.dumps(history))
    write_rows(said, votes(70))
    history["current"] = 0  # before its aligner says so
    (tmp_path / "loop/history.json").write_text(json.dumps(history))
    with pytest.raises(InvalidOption, match=r"is another model than the loop in .* began with"):
        trimtab.evolve(out=str(tmp_path / "loop"), feedback=str(said), **TRAINING)


def test_a_round_ends_as_it_began(task, tmp_path, monkeypatch):
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    monkeypatch.setattr("trimtab.loop.stages._train", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        evolve(task, tmp_path / "loop", feedback=str(said))
    monkeypatch.undo()
    with pytest.raises(InvalidOption, match=r"round 1 .* has begun with key_share=0\.1, and now it is 0\.5: let it end"):
        evolve(task, tmp_path / "loop", feedback=str(said), key_share=0.5)
    write_rows(said, votes(90))  # what comes meanwhile is the next round's
    report = evolve(task, tmp_path / "loop", feedback=str(said))
    assert sum(side["votes"] for side in report["rounds"][0]["pairs"].values()) == 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "has no effect without feedback or prompts"),
        ({"prompts": "p.jsonl"}, "reward says which answer is better: give both"),
        ({"reward": "x:y"}, "reward ranks answers to prompts"),
        ({"feedback": "said.jsonl", "objective": "tb"}, "learns from rewards, and rounds from pairs"),
        ({"feedback": "said.jsonl", "num_generations": 8}, "is for answers that are drawn: needs reward"),
        ({"feedback": "said.jsonl", "rollback": 1}, "has no effect with rollback"),
        ({"feedback": "nowhere.jsonl"}, "there is no file|no such file"),
        ({"feedback": "said.jsonl", "reward": "nokind:z"}, "reward: 'nokind:z' is no reward"),
        ({"feedback": "said.jsonl", "false_promotions": 0.7}, "false_promotions must be"),
        ({"feedback": "said.jsonl", "length_bias": "no"}, "length_bias must be one of"),
        ({"feedback": "said.jsonl", "learnng_rate": 1}, "there is no option 'learnng_rate'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(task, tmp_path, settings, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "said.jsonl", votes(8))
    with pytest.raises((InvalidOption, DataError), match=message):
        trimtab.evolve(proposal=str(task / "proposal"), out="loop", **settings)
    assert not (tmp_path / "loop" / "rounds").exists()


def test_too_few_votes_are_said(task, tmp_path):
    said = write_rows(tmp_path / "said.jsonl", votes(1))
    with pytest.raises(DataError, match=r"none is left to (train on|be judged by): collect more"):
        evolve(task, tmp_path / "loop", feedback=str(said))
    write_rows(said, votes(30))
    report = evolve(task, tmp_path / "loop", feedback=str(said))
    assert not report["rounds"][0]["promoted"]
    assert "can tell nothing at this level" in report["rounds"][0]["why"]


def test_levels_add_up_to_the_stated_chance():
    """Σ 6α/(π² r²) = α; and who wins all of n prompts is promoted from the n on at which 2^−n is below the level's tail."""
    tails = [(1 - level_of(r, 0.01)) / 2 for r in range(1, 20_000)]
    assert sum(tails) == pytest.approx(0.01, rel=1e-3)
    found = {"won": 1.0, "interval": [0.6, 1.0], "prompts": 7}
    assert verdict_of(found, level_of(1, 0.01), 0.1)[1].endswith("fewer than 8 can tell nothing at this level")
    assert verdict_of(found | {"prompts": 8}, level_of(1, 0.01), 0.1)[0]
    worse = found | {"prompts": 8, "nll_more": 0.5, "nll_more_interval": [0.3, 0.7]}
    assert verdict_of(worse, level_of(1, 0.01), 0.1) == (
        False, "kept: wanted answers cost 0.500 nats a token more, at least 0.300 (max_nll_loss)",
    )  # fmt: skip


def test_a_rollback_gives_up_what_has_begun_from_what_it_rejects(task, tmp_path, monkeypatch):
    said = write_rows(tmp_path / "said.jsonl", votes(80))
    evolve(task, tmp_path / "loop", feedback=str(said))
    write_rows(said, votes(240))
    evolve(task, tmp_path / "loop", feedback=str(said))
    trimtab.evolve(out=str(tmp_path / "loop"), rollback=2)
    write_rows(said, votes(280))
    monkeypatch.setattr("trimtab.loop.stages._train", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        evolve(task, tmp_path / "loop", feedback=str(said))
    monkeypatch.undo()
    trimtab.evolve(out=str(tmp_path / "loop"), rollback=1)
    assert not (tmp_path / "loop/rounds/003").exists()
    report = evolve(task, tmp_path / "loop", feedback=str(said))
    assert report["rounds"][0]["incumbent"] == 1
    assert report["rounds"][0]["began"].startswith("40 new votes")


def test_a_kill_after_the_verdict_leaves_no_text_behind(task, tmp_path, monkeypatch):
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    monkeypatch.setattr("trimtab.loop.folder.LoopFolder.tidy", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
    with pytest.raises(RuntimeError, match="killed"):
        evolve(task, tmp_path / "loop", feedback=str(said))
    assert list((tmp_path / "loop").rglob("train.jsonl"))
    monkeypatch.undo()
    trimtab.evolve(out=str(tmp_path / "loop"))
    assert not list((tmp_path / "loop").rglob("*.jsonl"))
    assert not list((tmp_path / "loop").rglob("checkpoint-*"))


def test_a_mistake_at_the_first_call_is_no_loop(task, tmp_path, monkeypatch):
    """A proposal that is not there leaves nothing, and a loop is the same one from wherever it is called."""
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    with pytest.raises(trimtab.TrimtabError):
        trimtab.evolve(proposal=str(task / "nothere"), out=str(tmp_path / "loop"), feedback=str(said), **TRAINING)
    monkeypatch.chdir(task)
    assert trimtab.evolve(proposal="./proposal", out=str(tmp_path / "loop"), feedback=str(said), **TRAINING)["rounds"]
    write_rows(said, votes(90))
    monkeypatch.chdir(tmp_path)
    assert trimtab.evolve(out="loop", feedback="said.jsonl", **TRAINING)["rounds"][0]["round"] == 2


def test_a_key_that_nobody_has_is_said(task, tmp_path, caplog):
    said = write_rows(tmp_path / "said.jsonl", votes(60))
    with caplog.at_level("WARNING"):
        evolve(task, tmp_path / "loop", feedback=str(said), leave_out_key=["nobody"])
    assert "nobody: no vote has this key" in caplog.text


def test_drift_waits_for_a_change(task, tmp_path):
    """Votes like the earlier ones begin no round; votes for answers that the incumbent would never give do."""
    said = write_rows(tmp_path / "said.jsonl", votes(120))
    when = {"refit_when": "drift(false_alarms=0.01, least=20, most=500)", "held_out": 0.4}
    assert evolve(task, tmp_path / "loop", feedback=str(said), **when)["current"] == 1
    write_rows(said, votes(150))
    calm = evolve(task, tmp_path / "loop", feedback=str(said), **when)
    assert calm["rounds"] == []
    assert "no drift" in calm["waiting"]["why"]
    assert calm["waiting"]["simulated_false_alarms"] <= 0.03
    write_rows(said, [*votes(150), *(turned(row) for row in votes(40, seed=80))])
    report = evolve(task, tmp_path / "loop", feedback=str(said), **when)
    assert report["rounds"][0]["began"].startswith("a drift by the vote number")
