"""Rounds of samples: which prompts, how they are drawn, what they are worth; and the files that they are kept in.

A round is written whole before it is learnt from, so a run that was killed reads it again and scores nothing twice. The files
are the replay buffer, too, and they read as data: a prompt, a completion and a score in each line.
"""

import logging
import random
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from trimtab.decode.request import SamplingParams
from trimtab.decode.text import text_of
from trimtab.errors import ModelError
from trimtab.judges.rewards.base import Ids, Reward, checked_scores
from trimtab.train.online.policy import Policy
from trimtab.train.online.prefixes import Ends, with_prefix_scores
from trimtab.train.online.samples import Prompt, Sample, read_samples, write_samples

__all__ = ["Rounds", "Schedule", "replayed"]

logger = logging.getLogger(__name__)

FOLDER = "rounds"
"""Where the files are, in the output folder."""


class Schedule(NamedTuple):
    """How the rounds of a run are drawn."""

    prompts: int
    """In a round."""
    generations: int
    """Answers to a prompt, earlier ones included."""
    max_tokens: int
    seed: int
    tempered_share: float = 0.0
    lowest_temperature: float = 1.0
    highest_temperature: float = 1.0
    replay_share: float = 0.0


class Rounds:
    """The rounds of a run.

    Args:
        folder: the run's output folder.
        prompts: to train on.
        development: for looks.
        schedule: how they are drawn.
        reward: what scores them, loaded; None where nothing is drawn to learn from, but from `filed`.
        tokenizer: the proposal's.
        filed: scored answers that were there before, by the place of their prompt.
        filed_development: the same for looks, where there is no reward.
        ends: how answers end, where everything that samples begin with is scored, too.
    """

    def __init__(
        self,
        folder: Path,
        prompts: Sequence[Prompt],
        development: Sequence[Prompt],
        schedule: Schedule,
        reward: Reward | None,
        *,
        tokenizer: Any,
        filed: Mapping[int, Sequence[Sample]] = MappingProxyType({}),
        filed_development: Mapping[int, Sequence[Sample]] = MappingProxyType({}),
        ends: Ends | None = None,
    ) -> None:
        self._folder, self._ends, self._tokenizer = folder / FOLDER, ends, tokenizer
        self._prompts, self._development, self._schedule, self._reward = prompts, development, schedule, reward
        self._buffer: dict[int, dict[tuple[int, ...], tuple[int, Sample]]] = defaultdict(dict)
        """Of each prompt its distinct answers, with the rounds that they were first drawn in."""
        self._filed = filed
        for place, some in filed.items():
            self._buffer[place] = {tuple(sample.tokens): (-1, sample) for sample in some}
        self.filed_development = [
            _some(random.Random(f"{schedule.seed} look {place}"), some, schedule.generations)
            for place, some in filed_development.items()
        ]
        """Groups of development answers that losses are of, where none that are drawn have a score."""
        self.seconds = {"sampling": 0.0, "rewards": 0.0}
        """What drawing and scoring have taken."""
        self._known = 0
        """How many rounds the buffer has."""

    def read(self, number: int) -> list[Sample] | None:
        """What was drawn for a round; None if it was not.

        Raises:
            DataError: somebody has changed the file.
        """
        places = self._places(number)
        return self._read_file(self._path(number), places, [self._fresh(number, *one) for one in enumerate(places)])

    def unscored(self, count: int) -> int:
        """How many answers of the first so many rounds have no score."""
        return sum(sample.score is None for number in range(count) for sample in self.read(number) or [])

    def draw(self, number: int, policy: Policy, *, gains: bool) -> list[Sample]:
        """Draw a round, score and write it; without a reward nothing is drawn.

        Raises:
            ModelError: a reward fails, or the model breaks down; the same run goes on from here.
        """
        if self._reward is None:
            write_samples(self._path(number), [], self._prompts)
            return []
        schedule, places = self._schedule, self._places(number)
        chance = random.Random(f"{schedule.seed} temperatures {number}")
        asked: list[tuple[int, SamplingParams]] = []
        for slot, place in enumerate(places):
            temperature = 1.0
            if chance.random() < schedule.tempered_share:
                temperature = chance.uniform(schedule.lowest_temperature, schedule.highest_temperature)
            if gains and slot == 0:  # β is found by samples at temperature 1
                temperature = 1.0
            fresh = self._fresh(number, slot, place)
            seed = _seed(schedule.seed, number, slot)
            params = SamplingParams(n=fresh, max_tokens=schedule.max_tokens, temperature=temperature, seed=seed, logprobs=gains)
            asked.append((place, params))
        samples = self._score(self._prompts, asked, policy)
        write_samples(self._path(number), samples, self._prompts)
        return samples

    def look(self, name: str, policy: Policy) -> list[Sample]:
        """Samples of the development prompts at temperature 1, with the same random numbers every time; kept in a file."""
        path = self._look_path(name)
        if (found := self._read_look(path)) is None:
            like = SamplingParams(max_tokens=self._schedule.max_tokens, temperature=1.0, n=self._schedule.generations)
            places = range(len(self._development))
            asked = [(place, replace(like, seed=_seed(self._schedule.seed, -1, place))) for place in places]
            found = self._score(self._development, asked, policy)
            write_samples(path, found, self._development)
        return found

    def read_look(self, step: int) -> list[Sample]:
        """Those of a look that was taken after so many updates."""
        return self._read_look(self._look_path(f"{step:06d}")) or []

    def _read_look(self, path: Path) -> list[Sample] | None:
        places = range(len(self._development))
        return self._read_file(path, places, [self._schedule.generations] * len(places))

    def _read_file(self, path: Path, places: Sequence[int], counts: Sequence[int]) -> list[Sample] | None:
        return read_samples(path, places, counts, prefixes=self._ends is not None)

    def _fresh(self, number: int, slot: int, place: int) -> int:
        """How many answers are drawn to a prompt in its slot of a round."""
        return 0 if self._reward is None else self._schedule.generations - len(self._earlier(number, slot, place))

    def groups(self, number: int, fresh: Sequence[Sample]) -> list[list[Sample]]:
        """The round's samples by prompt, with earlier ones."""
        found = [self._earlier(number, *one) for one in enumerate(self._places(number))]
        for sample in fresh:
            found[sample.group].append(sample)
        return found

    def _places(self, number: int) -> list[int]:
        """The prompts of a round: one pass over all of them after another, each in an order of its own."""
        count, size = len(self._prompts), self._schedule.prompts
        return [self._order((number * size + i) // count)[(number * size + i) % count] for i in range(size)]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._schedule.seed} order {epoch}").shuffle(order)
        return order

    def _earlier(self, number: int, slot: int, place: int) -> list[Sample]:
        """Answers to a prompt from rounds before this one: a draw from the better half of the distinct ones."""
        chance = random.Random(f"{self._schedule.seed} replay {number} {slot}")
        if self._reward is None:
            return _some(chance, self._filed[place], self._schedule.generations)
        most = replayed(self._schedule.replay_share, self._schedule.generations)
        if not most:
            return []
        while self._known < number:
            for sample in self.read(self._known) or []:
                if sample.score is not None:
                    self._buffer[sample.place].setdefault(tuple(sample.tokens), (self._known, sample))
            self._known += 1
        known = [sample for first, sample in self._buffer[place].values() if first < number]
        if not known:
            return []
        scores = sorted((sample.score or 0.0 for sample in known), reverse=True)
        least = scores[min(max(most, -(-len(scores) // 2)), len(scores)) - 1]
        better = [sample for sample in known if (sample.score or 0.0) > least]
        if len(better) < most:  # of those that are as good as the last of the half, all count or none
            better = [sample for sample in known if (sample.score or 0.0) >= least]
        most = min(most, len(better), self._schedule.generations - 1)
        return chance.sample(better, most)

    def _score(self, prompts: Sequence[Prompt], asked: Sequence[tuple[int, SamplingParams]], policy: Policy) -> list[Sample]:
        began = time.monotonic()
        drawn = policy.generate([list(prompts[place].ids) for place, _ in asked], [params for _, params in asked])
        owners = [(group, place, params) for group, (place, params) in enumerate(asked) for _ in range(params.n)]
        if broken := next((one.error for one in drawn if one.error is not None), None):
            raise ModelError(f"what is trained cannot be sampled from any more: {broken}; lower the learning_rate")
        records = [prompts[place].record for _, place, _ in owners]
        texts = [self._text(prompts[place], one) for (_, place, _), one in zip(owners, drawn, strict=True)]
        self.seconds["sampling"] += (scoring := time.monotonic()) - began
        scores: list[float | None] = [None] * len(texts)
        if self._reward is not None:
            ids = Ids([prompts[place].ids for _, place, _ in owners], [completion.tokens for completion in drawn])
            asked_of, columns = [record.prompt for record in records], [record.columns for record in records]
            given = self._reward.score_drawn(asked_of, texts, columns, ids)
            scores = checked_scores(self._reward.called or self._reward.name, given, len(texts))
        samples = [
            Sample(group, place, list(one.tokens), text, one.finish_reason, params.temperature, score, _gain(one))
            for (group, place, params), one, text, score in zip(owners, drawn, texts, scores, strict=True)
        ]
        if self._ends is not None and self._reward is not None:
            samples = with_prefix_scores(samples, prompts, self._reward, self._ends)
        self.seconds["rewards"] += time.monotonic() - scoring
        return samples

    def _text(self, prompt: Prompt, drawn: Any) -> str:
        """What a completion says: it was drawn to ids, which do not tell that they are a chat's."""
        if prompt.before:
            return str(drawn.text)
        return text_of(self._tokenizer, drawn.tokens[: len(drawn.tokens) - (drawn.finish_reason == "stop")])

    def _look_path(self, name: str) -> Path:
        return self._folder / f"look-{name}.jsonl"

    def _path(self, number: int) -> Path:
        return self._folder / f"round-{number:06d}.jsonl"


def _gain(completion: Any) -> float | None:
    """What the aligned model gives it more than the proposal, where that was asked for."""
    if completion.logprobs is None:
        return None
    return float(sum(completion.logprobs.aligned) - sum(completion.logprobs.proposal))


def replayed(share: float, generations: int) -> int:
    """How many of a prompt's answers are earlier ones, once there are any."""
    return round(share * generations)


def _some(chance: random.Random, samples: Sequence[Sample], count: int) -> list[Sample]:
    """So many of them, or all."""
    return chance.sample(samples, min(count, len(samples)))


def _seed(*parts: int) -> int:
    return random.Random(" ".join(map(str, parts))).getrandbits(62)
