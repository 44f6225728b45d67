"""Scores that somebody computed: a file with a prompt, a completion and a score in each row."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.prompts import is_chat
from trimtab.data.records import read_records, read_rows
from trimtab.errors import DataError, InvalidOption
from trimtab.files import expand_home
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Reward, RewardKind

__all__ = ["FILE", "FileReward"]


class FileReward(Reward):
    """The scores in a file.

    Args:
        path: JSON Lines (also gzipped) or Parquet with the columns `prompt`, `completion` and `score`. A prompt is a text or
            messages, with `tools` and `chat_template_kwargs` beside it as in a data set; a completion is a text, or messages
            of which the last one is the answer. A score is a number, or null for none.
        name: what reports call it. Default: the file's name.

    Raises:
        InvalidOption: there is no such file.
        DataError: a row is none of these, or two rows give one answer two scores.
    """

    def __init__(self, path: str | Path, name: str | None = None) -> None:
        file = expand_home(path)
        if not file.is_file():
            raise InvalidOption(f"there is no file of scores '{path}'")
        self.path, self.name = str(path), name or file.name
        with open(file, "rb") as stream:
            self.fingerprint = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
        self._scores: dict[str, float | None] = {}
        self._prompts: set[str] = set()
        records = read_records(str(path), need="prompt", answers=False)
        for record, (source, row) in zip(records, read_rows(str(path)), strict=True):
            completion, score = _read(row, source)
            key = _key(record.prompt, completion)
            if self._scores.setdefault(key, score) != score:
                raise DataError(f"{source}: the same prompt and completion have another score above: keep one")
            self._prompts.add(_key(record.prompt))

    def check(self, asked: Asked) -> None:
        """Refuse prompts of which the file has no completion."""
        for prompt, source in zip(asked.prompts, asked.sources, strict=True):
            if _key(prompt) not in self._prompts:
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
            key = _key(prompt, answer)
            if key not in self._scores:
                raise DataError(f"{self.path} has no score of the completion {_short(answer)} of the prompt {_short(prompt)}")
            found.append(self._scores[key])
        return found

    def describe(self) -> dict[str, Any]:
        """What it is, for the record."""
        return {"file": self.path, "sha256": self.fingerprint.removeprefix("sha256:")}


def _read(row: Mapping[str, Any], source: str) -> tuple[str, float | None]:
    """Completion and score of a row."""
    if missing := [name for name in ("completion", "score") if name not in row]:
        raise DataError(f"{source}: '{missing[0]}' is missing; it has: {', '.join(row)}")
    completion, score = row["completion"], row["score"]
    if isinstance(completion, list) and is_chat(completion):
        completion = completion[-1].get("content")
    if not isinstance(completion, str):
        raise DataError(f"{source}: 'completion' must be a text or messages, not {row['completion']!r}")
    if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)):
        raise DataError(f"{source}: 'score' must be a finite number, or null, not {score!r}")
    return completion, None if score is None else float(score)


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _short(text: Any) -> str:
    return repr(text if isinstance(text, str) else json.dumps(text, ensure_ascii=False))[:80]


FILE = RewardKind(
    "file",
    "scores that somebody computed: a .jsonl or .parquet file with the columns prompt, completion and score",
    lambda argument, options: FileReward(argument),
)
