"""A reward without annotators: how much likelier each token of an answer is on a good side than on a bad one.

A side is a model, perhaps behind a prompt of its own: one model behind two prompts, or two models. After LLMdoctor
(arXiv 2601.10416), whose token rewards are such log-ratios, squashed and thresholded. Which function squashes, and what the
threshold does, are our own choice, so nothing that was measured there is claimed here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimtab.data.preamble import Preamble
from trimtab.errors import DataError, InvalidOption, InvalidRequest, VocabularyMismatch
from trimtab.files import json_digest
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Ids, RewardKind
from trimtab.judges.rewards.keyed import number, read_keyed
from trimtab.judges.rewards.tokens import TokenReward
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.options import Range

if TYPE_CHECKING:
    from trimtab.decode.aligned import AlignedModel

__all__ = ["CONTRAST", "ContrastReward", "Side", "squash"]

SCALE, THRESHOLD = Range(above=0, below=math.inf), Range(low=0, high=1)
"""Which of them there may be."""

KEYS = ("good", "bad", "model", "good_model", "bad_model", "scale", "threshold")


@dataclass(frozen=True)
class Side:
    """What an answer is read by.

    Attributes:
        model: a folder or a hub id.
        before: what stands before every prompt; None for nothing.
    """

    model: str
    before: Preamble | None = None


def squash(good: float, bad: float, scale: float, threshold: float) -> float:
    """tanh((good − bad)/scale) of a token's two log-probabilities in nats; 0 where that is below the threshold in size."""
    if good == bad:  # both may be −inf
        return 0.0
    value = math.tanh((good - bad) / scale)
    return value if abs(value) >= threshold else 0.0


class ContrastReward(TokenReward):
    """Σ_t s(log π_good(y_t|…) − log π_bad(y_t|…)), s being `squash`; an end of sequence counts as a token.

    A side without a prompt of its own reads the ids that it is given; with one, its model's chat template writes the prompt.

    Args:
        good: what says wanted answers.
        bad: what says unwanted ones.
        scale: nats at which the squashing sets in.
        threshold: squashed log-ratios of a smaller size count as 0.
        dtype, device: how the models are loaded.

    Raises:
        InvalidOption: both sides are one, or a number is out of its range.
    """

    name = "contrast"

    def __init__(
        self,
        good: Side,
        bad: Side,
        *,
        scale: float = 1.0,
        threshold: float = 0.1,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        for name, value, allowed in (("scale", scale, SCALE), ("threshold", threshold, THRESHOLD)):
            if not allowed.holds(value):
                raise InvalidOption(f"{name} must be {allowed}, not {value!r}")
        if good.model == bad.model and (good.before and good.before.digest) == (bad.before and bad.before.digest):
            raise InvalidOption("good and bad are the same, and every answer would be worth 0: name two prompts or two models")
        self._sides, self._scale, self._threshold = (good, bad), scale, threshold
        self._how: dict[str, Any] = {"dtype": dtype, "device": device}
        self._models: dict[str, AlignedModel] = {}

    def load(self, asked: Asked, date: str) -> None:
        """Load the models, and refuse prompts that cannot stand behind those of the sides.

        Raises:
            ModelError: a model cannot be loaded.
            VocabularyMismatch: there are two vocabularies.
            DataError: names the prompt.
        """
        from trimtab.decode.aligned import AlignedModel

        for side in self._sides:
            if side.model not in self._models:
                self._models[side.model] = AlignedModel.from_pretrained(side.model, date=date, **self._how)
        good, bad = (self._models[side.model] for side in self._sides)
        if fingerprint_vocabulary(good.tokenizer) != fingerprint_vocabulary(bad.tokenizer):
            names = " and ".join(side.model for side in self._sides)
            raise VocabularyMismatch(
                f"{self.called or self.name}: {names} do not share a vocabulary, so no token is common to both"
            )
        self.encoder, self.tokenizer = good.encoder, good.tokenizer
        self.date = good.encoder.chat_settings["date"] or bad.encoder.chat_settings["date"]
        described = [
            [*model.fingerprints, model.encoder.chat_settings["chat_template"], side.before and side.before.digest]
            for model, side in zip((good, bad), self._sides, strict=True)
        ]
        self.fingerprint = f"sha256:{json_digest([*described, self._scale, self._threshold])}"
        for prompt, place in zip(asked.prompts, asked.sources, strict=True):
            for side in self._sides:
                try:
                    self._prompt(side, prompt, place)
                except InvalidRequest as error:
                    raise DataError(f"{place}: {self.called or self.name} cannot take it: {error}") from error

    def score_tokens(self, prompts: Sequence[Any], ids: Ids) -> list[float | None]:
        """The sums."""
        good, bad = (self._read(side, prompts, ids) for side in self._sides)
        return [
            sum(squash(*pair, self._scale, self._threshold) for pair in zip(*rows, strict=True))
            for rows in zip(good, bad, strict=True)
        ]

    def identity(self) -> dict[str, Any]:
        """What the sides are, and the date that a chat template writes."""
        return {"reward": self.fingerprint, "date": self.date}

    def label(self) -> str:
        """The same."""
        return self.fingerprint if self.date is None else f"{self.fingerprint} {self.date}"

    def describe(self) -> dict[str, Any]:
        """The same, with names."""
        named = [{"model": side.model, "prompt": side.before and side.before.path} for side in self._sides]
        numbers = {"scale": self._scale, "threshold": self._threshold}
        return {"good": named[0], "bad": named[1], **numbers, "fingerprint": self.fingerprint, "date": self.date}

    def _read(self, side: Side, prompts: Sequence[Any], ids: Ids) -> list[list[float]]:
        """Log-probabilities of the answers' tokens."""
        given = [list(prompt) for prompt in ids.prompts]
        if side.before is not None:
            given = [self._or_fail(self._prompt, side, prompt, "a prompt") for prompt in prompts]
        scores = self._or_fail(self._models[side.model].score, given, [list(answer) for answer in ids.answers])
        return [score.proposal for score in scores]

    def _prompt(self, side: Side, prompt: Any, source: str) -> list[int]:
        """Ids of a prompt behind the side's."""
        behind = prompt if side.before is None else side.before.put_before(prompt, source)
        return self._models[side.model].encoder.prompt(behind)


def _make(argument: str, options: Mapping[str, Any]) -> ContrastReward:
    """Of `KEY=VALUE,…`, see `CONTRAST`."""
    given = read_keyed("contrast", argument.split(","), KEYS)
    numbers: dict[str, Any] = {name: number("contrast", name, given[name]) for name in ("scale", "threshold") if name in given}
    how = {name: value for name, value in options.items() if name in ("dtype", "device")}
    return ContrastReward(_side("good", given), _side("bad", given), **numbers, **how)


def _side(name: str, given: Mapping[str, str]) -> Side:
    own, both = given.get(f"{name}_model"), given.get("model")
    if own is not None and both is not None:
        raise InvalidOption(f"contrast: 'model' is for both sides, and {name}_model is there, too: leave one of them out")
    if own is None and both is None:
        raise InvalidOption("contrast: name the model of both sides, model=PATH, or good_model=PATH and bad_model=PATH")
    return Side(own or both or "", Preamble.read(given[name], f"contrast: {name}") if name in given else None)


CONTRAST = RewardKind(
    "contrast",
    "good=FILE,bad=FILE,model=PATH, or good_model=PATH,bad_model=PATH, with scale=1 and threshold=0.1: how much likelier each"
    " token is behind one prompt than behind another, or to one model than to another",
    _make,
    lambda argument: ("dtype", "device", "date"),
)
