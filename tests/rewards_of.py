"""Rewards for tests: functions in a file, a file of scores, and a package of somebody else's with a judge and a reward."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from brought import bring
from tiny_task import write_rows
from trimtab.judges.kinds import JUDGES
from trimtab.judges.rewards.kinds import REWARDS

FUNCTIONS = '''
"""Reward functions as TRL has them."""

import asyncio


def wordy(prompts, completions, **kwargs):
    return [float(len(text(c))) for c in completions]


def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def picky(completions, **kwargs):
    return [None if "q" in text(c) else text(c).count("x") for c in completions]


async def slow(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [len(text(c)) / 2 for c in completions]


def graded(completions, answer):
    return [float(text(c) == a) for c, a in zip(completions, answer, strict=True)]


def trained(completions, trainer_state):
    return [0.0] * len(completions)


def fails(completions, **kwargs):
    raise KeyError("answer")


def short(completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def nan(completions, **kwargs):
    return [float("nan")] * len(completions)


def words(completions, **kwargs):
    return ["good"] * len(completions)


nothing = 3
'''

PACKAGE = '''
"""Somebody's judge and somebody's reward."""

from trimtab.errors import InvalidOption
from trimtab.journal import key_of
from trimtab.judges.base import Judge, Judgement, JudgeKind
from trimtab.judges.rewards.base import Reward, RewardKind


class Shorter(Judge):
    kind = "shorter"

    def __init__(self, most):
        self.most, self.name = most, f"shorter-{most}"

    def judge(self, pairs, journal):
        return [self.one(pair, journal) for pair in pairs]

    def one(self, pair, journal):
        if max(len(pair.output_1), len(pair.output_2)) > self.most:
            return Judgement(None, why_missing=f"more than {self.most} letters")
        key = key_of({"shorter": [pair.output_1, pair.output_2]})
        if journal.get(key) is None:
            gap = len(pair.output_1) - len(pair.output_2)
            journal.add(key, {"preference": 1.5 + 0.5 * (gap > 0) - 0.5 * (gap < 0)})
        return Judgement(journal[key]["preference"])

    def describe(self):
        return {"most": self.most}


def make(argument, options):
    if not argument.isdigit():
        raise InvalidOption(f"--judge shorter:{argument}: give a number of letters")
    return Shorter(int(argument))


def reads(argument):
    return ("colour",) if argument == "0" else ()


SHORTER = JudgeKind("shorter", "N, the shorter answer wins, up to N letters", make, reads)


class Letter(Reward):
    def __init__(self, letter):
        self.letter, self.name = letter, f"letter-{letter}"
        self.fingerprint = f"letter 1.0 {letter}"

    def score(self, prompts, answers, columns):
        return [float(answer.count(self.letter)) for answer in answers]


def make_reward(argument, options):
    if len(argument) != 1:
        raise InvalidOption(f"letter:{argument}: give one letter")
    return Letter(argument)


LETTER = RewardKind("letter", "L, how often the letter L is there", make_reward)
'''


POINTS = {"trimtab.judges": {"shorter": "their_judges:SHORTER"}, "trimtab.rewards": {"letter": "their_judges:LETTER"}}


def write_functions(folder: Path) -> Path:
    """The functions above in `rewards.py`."""
    (folder / "rewards.py").write_text(FUNCTIONS, encoding="utf-8")
    return folder / "rewards.py"


def write_scores(folder: Path, prompts, answers) -> Path:
    """A score for every prompt with every answer: how many letters of the answer are x, y or z."""
    rows = [{"prompt": p, "completion": a, "score": sum(letter in "xyz" for letter in a)} for p in prompts for a in answers]
    write_rows(folder / "scores.jsonl", rows)
    return folder / "scores.jsonl"


@contextmanager
def package(folder: Path, monkeypatch, module: str = "their_judges", source: str = PACKAGE, points=POINTS) -> Iterator[None]:
    """The package above, or another, installed; what the registries have found and loaded is forgotten before and after."""
    for registry in (JUDGES, REWARDS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))
        vars(registry).pop("_brought", None)
    bring(folder, monkeypatch, module, source, points)
    yield
    for registry in (JUDGES, REWARDS):
        vars(registry).pop("_brought", None)
