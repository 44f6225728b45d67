"""Several rewards as one, and what the options of a command say of them."""

import json
from types import SimpleNamespace

import pytest

from eval_task import make_eval_task
from rewards_of import write_functions, write_scores
from trimtab.cli.options import add_options, read_options
from trimtab.cli.parser import Parser
from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.reward import RewardJudge
from trimtab.judges.rewards.base import Failures, Reward
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.judges.rewards.combined import CombinedReward, combine
from trimtab.judges.rewards.function import FunctionReward
from trimtab.judges.rewards.kinds import make_reward
from trimtab.judges.rewards.making import make_rewards
from trimtab.judges.rewards.options import RewardOptions
from trimtab.judges.rewards.workers import WorkerReward
from trimtab.options import make_options

PROMPTS, ANSWERS = ["pa", "pb", "pc"], ["xyz", "ab", "qx"]
COLUMNS = [{"answer": "xyz"}, {"answer": "b"}, {"answer": "qx"}]
ASKED = SimpleNamespace(prompts=PROMPTS, references=[None] * 3, columns=COLUMNS, sources=["d:0", "d:1", "d:2"])
OPTIONS = {"dtype": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    functions, scores = write_functions(folder), write_scores(folder, PROMPTS, ANSWERS)
    return {"functions": str(functions), "scores": str(scores), "model": f"{make_eval_task(folder / 'task')}/reward"}


def wordy(completions):
    return [len(completion) for completion in completions]


class Constant(Reward):
    """Some scores, whatever is asked."""

    def __init__(self, name, *scores):
        self.name, self.fingerprint, self.scores, self.seen = name, f"constant {scores}", scores, []

    def check(self, asked):
        self.seen.append("check")

    def load(self, asked, date):
        self.seen.append(f"load {date}")

    def score(self, prompts, answers, columns):
        return self.scores

    def close(self):
        self.seen.append("close")


# ---- the sum


def test_the_sum_is_weighted_and_none_of_a_part_is_none_of_it():
    """.5·(1, 2, −) − 2·(3, −, 5) + 0·(7, 8, 9) = (.5 − 6, −, −)."""
    parts = [Constant("a", 1, 2, None), Constant("b", 3, None, 5), Constant("c", 7, 8, 9)]
    reward = CombinedReward(parts, [0.5, -2, 0])
    assert reward.score(PROMPTS, ANSWERS, COLUMNS) == [-5.5, None, None]
    given = reward.parts_of(PROMPTS, ANSWERS, COLUMNS)
    assert given == [[1.0, 2.0, None], [3.0, None, 5.0], [7.0, 8.0, 9.0]]
    assert reward.sum_of(given) == [-5.5, None, None]
    assert CombinedReward(parts[:1]).score(PROMPTS, ANSWERS, COLUMNS) == [1.0, 2.0, None]


def test_parts_are_checked_loaded_and_closed():
    parts = [Constant("a", 1), Constant("b", 1)]
    with CombinedReward(parts) as reward:
        reward.check(ASKED)
        reward.load(ASKED, "2026-11-30")
    assert [part.seen for part in parts] == [["check", "load 2026-11-30", "close"]] * 2


def test_what_tells_a_sum_from_others_is_its_parts_and_weights():
    def made(*parts, weights=None):
        return CombinedReward([Constant("n", part) for part in parts], weights)

    sums = [made(1, 2), made(1, 2, weights=[1, 0.5]), made(1, 3), made(2, 1), made(1)]
    for known in ("fingerprint", "label", "identity"):
        values = [json.dumps(value() if callable(value := getattr(one, known)) else value) for one in sums]
        assert len(set(values)) == len(sums)
    assert made(1, 2).fingerprint == made(1, 2, weights=[1, 1]).fingerprint
    assert made(1, 2, weights=[1, 0.5]).label() == "1.0*(constant (1,)) + 0.5*(constant (2,))"
    assert made(1, 2).describe() == {
        "sum_of": [
            {"name": "n", "weight": 1.0, "fingerprint": "constant (1,)"},
            {"name": "n#2", "weight": 1.0, "fingerprint": "constant (2,)"},
        ]
    }
    assert (made(1, 2).part_names, made(1, 2).name) == (("n", "n#2"), "n+n#2")


def test_a_sum_knows_what_its_parts_know(places):
    reward = make_rewards([f"model:{places['model']}", f"{places['functions']}:graded", wordy], [2, 1, 0.25], options=OPTIONS)
    assert reward.reads_columns
    assert not hasattr(reward, "fingerprint")
    reward.check(ASKED)
    reward.load(ASKED, "2026-11-30")
    model = RewardModel.from_pretrained(places["model"]).score(PROMPTS, ANSWERS)
    expected = [2 * m + g + w / 4 for m, g, w in zip(model, [1, 0, 1], [3, 2, 2], strict=True)]
    assert reward.score(PROMPTS, ANSWERS, COLUMNS) == pytest.approx(expected)
    assert reward.name == "reward+rewards.graded+wordy"
    assert reward.tokenizer is reward.parts[0].tokenizer is not None
    assert json.loads(json.dumps(reward.identity())) == reward.identity()
    assert json.loads(json.dumps(reward.describe())) == reward.describe()
    judge = RewardJudge(reward)
    assert (judge.name, judge.reads_columns, judge.tokenizer) == (reward.name, True, reward.tokenizer)


def test_errors_are_of_the_part_and_its_option(places):
    text = f"{places['functions']}:graded"
    reward = make_rewards([wordy, text], options=OPTIONS)
    assert reward.called == f"--reward wordy and --reward {text}"
    with pytest.raises(InvalidOption, match=f"^--reward {text} takes 'answer', and the data have no such column"):
        reward.check(SimpleNamespace(prompts=["p"], columns=[{}], sources=["d:0"]))
    with pytest.raises(ModelError, match="the reward few must give a list of 3 scores, one for each completion, not 2 scores"):
        CombinedReward([Constant("few", 1, 2)]).score(PROMPTS, ANSWERS, COLUMNS)
    bad = Constant("bad", 1)
    del bad.fingerprint
    with pytest.raises(InvalidOption, match="Constant needs a text 'fingerprint'"):
        CombinedReward([bad]).load(ASKED, "2026-11-30")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1], "there must be a weight for each reward: 2, not 1"),
        ([1, float("nan")], "the weight of a reward must be a finite number, not nan"),
        ([1, float("-inf")], "the weight of a reward must be a finite number, not -inf"),
        ([1, True], "the weight of a reward must be a finite number, not True"),
    ],
)
def test_weights_that_are_none_are_refused(weights, message):
    with pytest.raises(InvalidOption, match=message):
        CombinedReward([Constant("a", 1), Constant("b", 2)], weights)
    with pytest.raises(InvalidOption, match=f"--reward_weights: {message}"):
        make_rewards([Constant("a", 1), Constant("b", 2)], weights, options={})


def test_one_alone_stays_what_it_is():
    one = Constant("a", 1)
    assert combine([one]) is one
    assert combine([one], [1]) is one
    assert isinstance(combine([one], [2]), CombinedReward)
    with pytest.raises(InvalidOption, match="there is no reward to combine"):
        combine([])


# ---- options


def read(*words):
    parser = Parser("x", add_help=False)
    add_options(parser, RewardOptions)
    return read_options(RewardOptions, parser.read(list(words)))


def test_flags_make_a_sum_of_functions_in_worker_processes(places):
    words = ["--reward", f"{places['functions']}:picky", "--reward", f"file:{places['scores']}"]
    words += ["--reward_weights", ".5", "--reward_weights", "-1", "--reward_timeout", "20", "--reward_workers", "2"]
    with read(*words).sum_of_rewards(OPTIONS) as reward:
        reward.check(ASKED)
        reward.load(ASKED, "2026-11-30")
        assert [type(part).__name__ for part in reward.parts] == ["WorkerReward", "FileReward"]
        assert reward.score(PROMPTS, ANSWERS, COLUMNS) == [0.5 - 3, 0.0, None]


def test_functions_are_called_here_unless_something_else_is_asked_for(places):
    text = f"{places['functions']}:wordy"
    assert type(read("--reward", text).sum_of_rewards({})) is FunctionReward
    for words in (("--reward_timeout", "3"), ("--reward_workers", "1")):
        reward = read("--reward", text, *words).sum_of_rewards({})
        assert type(reward) is WorkerReward
        assert (reward.called, reward.fingerprint) == (f"--reward {text}", make_reward(text, {}).fingerprint)
    made = make_options(RewardOptions, None, {"reward": wordy}).sum_of_rewards({})
    assert (type(made), made.called) == (FunctionReward, "--reward wordy")


@pytest.mark.parametrize("words", [(), ("--reward_workers", "1")])
def test_completions_that_functions_fail_for_may_have_no_score(words, places):
    base = ("--reward", f"{places['functions']}:wordy", "--reward", f"{places['functions']}:nan", "--reward_errors", "none")
    with read(*base, *words).sum_of_rewards({}) as reward:
        assert reward.failures == Failures()
        assert reward.score(PROMPTS, ANSWERS, COLUMNS) == [None] * 3
        assert reward.parts_of(PROMPTS, ANSWERS, COLUMNS) == [[3.0, 2.0, 2.0], [None] * 3]
        assert [part.failures.count for part in reward.parts] == [0, 6]
        assert reward.failures == reward.parts[1].failures


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--reward_weights", "1"), "--reward_weights needs --reward"),
        (("--reward_timeout", "1"), "--reward_timeout needs --reward"),
        (("--reward_errors", "none"), "--reward_errors needs --reward"),
        (("--reward", "{functions}:wordy", "--reward_timeout", "0"), "--reward_timeout must be above 0 and finite, not 0.0"),
        (("--reward", "{functions}:wordy", "--reward_workers", "0"), "--reward_workers must be at least 1, not 0"),
        (("--reward", "{functions}:wordy", "--reward_weights", "nan"), "--reward_weights must be from .* not nan"),
        (("--reward", "{functions}:wordy", "--reward_errors", "skip"), "--reward_errors"),
    ],
)
def test_flags_that_cannot_be_are_refused(words, message, places):
    with pytest.raises(InvalidOption, match=message):
        read(*(word.format(**places) for word in words))


@pytest.mark.parametrize(
    ("rewards", "settings", "message"),
    [
        ([], {}, "--reward is required"),
        (["what"], {}, "--reward: 'what' is no reward: give MODULE.py:FUNCTION"),
        ([3], {}, "--reward: must be a text, a function, or a trimtab.judges.rewards.base.Reward, not 3"),
        (["{functions}:nobody"], {"workers": 1}, "--reward: {functions} has no function 'nobody'"),
        (["file:{scores}"], {"timeout": 1}, "--reward_timeout is for functions, and no --reward is one: leave it out"),
        (["file:{scores}"], {"workers": 1}, "--reward_workers is for functions, and no --reward is one: leave it out"),
        (["file:{scores}"], {"on_error": "none"}, "--reward_errors is for functions, and no --reward is one: leave it out"),
        (["{functions}:wordy", wordy], {"timeout": 1}, "--reward_timeout: the function 'wordy' is an object of this process"),
        (["{functions}:wordy", FunctionReward(wordy)], {"workers": 1}, "--reward_workers: the function 'wordy' is an object"),
        (["{functions}:wordy", "{functions}:picky"], {"weights": [1]}, "--reward_weights: there must be a weight for each"),
    ],
)
def test_rewards_and_options_that_do_not_fit_are_refused(rewards, settings, message, places):
    made = [one.format(**places) if isinstance(one, str) else one for one in rewards]
    with pytest.raises(InvalidOption) as caught:
        make_rewards(made, options={}, **settings)
    assert message.format(**places) in str(caught.value)
