"""Scores that somebody computed: a file with a prompt, a completion and a score in each row."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.scored import read_scored, scored_file
from trimtab.errors import DataError
from trimtab.journal import key_of
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Reward, RewardKind

__all__ = ["FILE", "FileReward"]


class FileReward(Reward):
    """The scores in a file.

    Args:
        path: what `trimtab.data.scored.read_scored` reads.
        name: what reports call it. Default: the file's name.

    Raises:
        InvalidOption: there is no such file.
        DataError: a row is none of these, or two rows give one answer two scores.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        file, self.fingerprint = scored_file(path)
        self.path, self.name = str(path), name or file.name
        self._scores: dict[str, float | None] = {}
        self._prompts: set[str] = set()
        for row in read_scored(path):
            key = key_of([row.prompt, row.completion])
            if self._scores.setdefault(key, row.score) != row.score:
                raise DataError(f"{row.source}: the same prompt and completion have another score above: keep one")
            self._prompts.add(key_of([row.prompt]))

    def check(self, asked: Asked) -> None:
        """Refuse prompts of which the file has no completion."""
        for prompt, source in zip(asked.prompts, asked.sources, strict=True):
            if key_of([prompt]) not in self._prompts:
                raise DataError(f"{source}: {self.path} has no score of any completion of this prompt: {_short(prompt)}")

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """The scores of the answers.

        Raises:
            DataError: the file does not have one of them.
        """
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            key = key_of([prompt, answer])
            if key not in self._scores:
                raise DataError(f"{self.path} has no score of the completion {_short(answer)} of the prompt {_short(prompt)}")
            found.append(self._scores[key])
        return found

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"file": self.path, "sha256": self.fingerprint.removeprefix("sha256:")}


def _short(text: Any) -> str:
    return repr(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False))[:80]


FILE = RewardKind(
    "file",
    "scores that somebody computed: a .jsonl or .parquet file with the columns prompt, completion and score",
    lambda argument, options: FileReward(argument),
)
