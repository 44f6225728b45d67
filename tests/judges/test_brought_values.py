"""What somebody else's judge or reward gives back is checked where it comes in, and the message names it."""

import pytest

from trimtab.data.records import Record
from trimtab.endpoints.completions import Sample
from trimtab.errors import InvalidOption, ModelError
from trimtab.evaluate.contests import _checked
from trimtab.judges.base import Judgement
from trimtab.judges.rewards.base import Reward, checked_scores
from trimtab.judges.rewards.kinds import parse_reward
from trimtab.propose.ranking import Ranking


class Given(Reward):
    """Gives what it was made with, whatever it is asked."""

    name, fingerprint = "given", "sha256:0"

    def __init__(self, scores):
        self.scores = scores

    def score(self, prompts, answers, columns):
        return self.scores


class Named:
    name = "theirs"


@pytest.mark.parametrize(
    ("judgements", "message"),
    [
        ([Judgement(3.0), Judgement(1.0)], "judge 'theirs' gave the preference 3.0: it must be from 1 to 2, or None"),
        ([Judgement("2"), Judgement(1.0)], "judge 'theirs' gave the preference '2'"),
        ([Judgement(float("nan")), Judgement(1.0)], "judge 'theirs' gave the preference nan"),
        ([], "judge 'theirs' must give an opinion of each of 2 pairs, and gave 0"),
    ],
)
def test_a_judge_gives_an_opinion_of_each_pair(judgements, message):
    assert _checked(Named(), [Judgement(1.0), Judgement(None)], 2) == [Judgement(1.0), Judgement(None)]
    with pytest.raises(ModelError, match=message):
        _checked(Named(), judgements, 2)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (["a", "b"], "gave 'a' for completions\\[0\\]: a score is a finite number, or None"),
        ([1.0], "must give a list of 2 scores, one for each completion, not 1 score"),
        ([1.0, float("inf")], "gave inf for completions"),
        (None, "must give a list of 2 scores, one for each completion, not None"),
    ],
)
def test_a_reward_gives_a_score_of_each_completion(scores, message):
    record, samples = Record("p", None, None, "here"), [Sample("one", True, None), Sample("two", True, None)]
    best = list(Ranking(Given([0.0, 1.0])).pick([record], [samples]))
    assert [(wanted.text, unwanted.text) for _, wanted, unwanted in best] == [("two", "one")]
    assert checked_scores("it", (1, None), 2) == [1.0, None]
    with pytest.raises(ModelError, match=f"the reward 'given' {message}"):
        list(Ranking(Given(scores)).pick([record], [samples]))


def test_a_kind_without_its_argument_says_what_it_wants():
    with pytest.raises(InvalidOption, match="'model' needs an argument: model:"):
        parse_reward("model")
