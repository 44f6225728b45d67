"""A reward model: a sequence classifier, loaded when the prompts are known."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import DataError, InvalidRequest
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Reward, RewardKind

if TYPE_CHECKING:
    from trimtab.judges.rewards.classifier import RewardModel

__all__ = ["MODEL", "ModelReward"]


class ModelReward(Reward):
    """What a reward model says.

    Args:
        model: a folder or a hub id that transformers loads as a sequence classifier with one label, or with two; or a loaded
            `RewardModel`.
        name: what reports call it. Default: the last part of its path.
        dtype, device: how a folder is loaded.
    """

    def __init__(
        self,
        model: "str | Path | RewardModel",
        name: str | None = None,
        *,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        self.source = str(model) if isinstance(model, (str, Path)) else None
        self.name = name or (Path(self.source).name if self.source is not None else "reward")
        self._dtype, self._device = dtype, device
        self._model: RewardModel | None = None
        if not isinstance(model, (str, Path)):
            self._take(model)

    def load(self, asked: Asked, date: str) -> None:
        """Load the classifier, and refuse a prompt that it cannot take."""
        if self._model is None:
            from trimtab.judges.rewards.classifier import RewardModel

            source, how = self.source or "", (self._dtype, self._device)
            self._take(RewardModel.from_pretrained(source, dtype=how[0], device=how[1], date=date))
        for prompt, place in zip(asked.prompts, asked.sources, strict=True):
            try:
                self.model.check(prompt)
            except InvalidRequest as error:
                raise DataError(f"{place}: {self.called or self.name} cannot take it: {error}") from error

    @property
    def model(self) -> "RewardModel":
        """The loaded classifier."""
        if self._model is None:
            raise RuntimeError("the reward model is not loaded yet")
        return self._model

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """The classifier's scores, see `RewardModel.score`."""
        return self.model.score(prompts, answers)

    def identity(self) -> dict[str, Any]:
        """Weights, truncation and template."""
        return {"reward": self.fingerprint, "max_length": self.model.max_length, **self.model.chat_settings}

    def label(self) -> str:
        """Weights and template."""
        return " ".join([self.fingerprint, *(str(value) for value in self.model.chat_settings.values() if value is not None)])

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"weights": self.fingerprint, "max_length": self.model.max_length, **self.model.chat_settings}

    def _take(self, model: "RewardModel") -> None:
        self._model, self.fingerprint, self.tokenizer = model, model.fingerprint, model.tokenizer
        self.date = model.chat_settings.get("date")


MODEL = RewardKind(
    "model",
    "a sequence classifier with one label or two: a folder or a hub id",
    lambda argument, options: ModelReward(argument, **{k: v for k, v in options.items() if k in ("dtype", "device")}),
    lambda argument: ("dtype", "device", "date"),
)
