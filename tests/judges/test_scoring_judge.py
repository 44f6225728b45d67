"""Judges that score: preferences follow from the scores of model and metric, and each answer is scored once."""

import pytest

from eval_task import make_eval_task
from trimtab.journal import Journal
from trimtab.judges import scoring as scoring_judge
from trimtab.judges.base import Judgement, Pair
from trimtab.judges.references import ReferenceJudge, ReferenceMetric
from trimtab.judges.reward import RewardJudge
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.rewards.model import ModelReward
from trimtab.judges.scoring import bradley_terry as preference

ANSWERS = ["xyz", "abc", "", "xx yy", "cab", "zy", "abc", "xyz"]


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return RewardModel.from_pretrained(make_eval_task(tmp_path_factory.mktemp("task")) / "reward")


def pairs_of(references):
    return [
        Pair(f"p{'abcdefgh'[i]}", "shown", one, other, reference)
        for i, (one, other, reference) in enumerate(zip(ANSWERS, ANSWERS[::-1], references, strict=True))
    ]


PAIRS = pairs_of(["xyz xx", None, "abc", "   ", "xx", "", "abc", "yy"])


@pytest.fixture
def counted(monkeypatch):
    """What was scored: prompts or references with answers."""
    seen = []
    for owner, order in ((RewardModel, 1), (ReferenceMetric, -1)):
        score = owner.score

        def counting(self, first, second, score=score, order=order):
            seen.extend(zip(*(first, second)[::order], strict=True))
            return score(self, first, second)

        monkeypatch.setattr(owner, "score", counting)
    return seen


@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_a_reward_model_prefers_by_its_scores_and_scores_each_answer_once(reward, counted, monkeypatch, tmp_path, chunk):
    monkeypatch.setattr(scoring_judge, "CHUNK", chunk)
    first = reward.score([pair.prompt for pair in PAIRS], [pair.output_1 for pair in PAIRS])
    second = reward.score([pair.prompt for pair in PAIRS], [pair.output_2 for pair in PAIRS])
    counted.clear()
    judge = RewardJudge(ModelReward(reward, "r"))
    with Journal(tmp_path / "j.jsonl") as journal:
        found = judge.judge([*PAIRS, PAIRS[0]], journal)
    assert found[8] == found[0]
    for judgement, one, other in zip(found, first, second, strict=False):
        assert judgement.scores == pytest.approx((one, other), abs=1e-5)
        assert judgement.preference == preference(*judgement.scores)
    assert sorted(counted) == sorted({(pair.prompt, text) for pair in PAIRS for text in (pair.output_1, pair.output_2)})
    counted.clear()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert RewardJudge(ModelReward(reward, "r")).judge([*PAIRS, PAIRS[0]], journal) == found
        assert counted == []
        RewardJudge(ModelReward(reward, "r")).judge([Pair("other", "", "xyz", "abc")], journal)
    assert counted == [("other", "xyz"), ("other", "abc")]
    assert judge.describe()["weights"].startswith("sha256:")
    assert judge.cost() is None


@pytest.mark.parametrize("name", ["rougeL", "chrf"])
def test_a_metric_prefers_the_closer_answer_and_says_nothing_without_a_reference(counted, tmp_path, name):
    judge = ReferenceJudge(ReferenceMetric(name))
    with Journal(tmp_path / "j.jsonl") as journal:
        found = judge.judge(PAIRS, journal)
        asked = set(counted)
        assert len(counted) == len(asked)
        counted.clear()
        assert ReferenceJudge(ReferenceMetric(name)).judge(PAIRS, journal) == found
        assert counted == []
        moved = judge.judge(pairs_of(["abc"] * 8), journal)  # other references: other scores
        assert counted
    missing = Judgement(None, why_missing="no reference")
    assert [i for i, one in enumerate(found) if one == missing] == [1, 3, 5]
    assert asked == {(p.reference, a) for p in PAIRS if (p.reference or "").strip() for a in (p.output_1, p.output_2)}
    assert found[4].preference == 2.0  # the reference is xx, the answers cab and xx yy
    assert found[4].scores[0] == 0.0 < found[4].scores[1]
    assert (found[6].preference, found[6].scores) == (1.5, pytest.approx((1.0, 1.0)))  # abc, twice
    assert moved[1].preference == 1.5


def test_what_was_scored_before_a_failure_is_kept(reward, counted, monkeypatch, tmp_path):
    monkeypatch.setattr(scoring_judge, "CHUNK", 4)
    plain, calls = RewardModel.score, []

    def failing(self, prompts, answers):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return plain(self, prompts, answers)

    with Journal(tmp_path / "j.jsonl") as journal, monkeypatch.context() as patch:
        patch.setattr(RewardModel, "score", failing)
        with pytest.raises(RuntimeError):
            RewardJudge(ModelReward(reward, "r")).judge(PAIRS, journal)
    before = len(counted)
    counted.clear()
    with Journal(tmp_path / "j.jsonl") as journal:
        RewardJudge(ModelReward(reward, "r")).judge(PAIRS, journal)
    assert (before, len(counted)) == (8, 4)  # of sixteen answers, four are to the same prompt twice
