"""Samples that are learnt from, and the files that they are kept in: a prompt, a completion and a score in each line."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.data.prompts import CHAT_FIELDS, chat_columns, is_chat
from trimtab.data.records import Record
from trimtab.errors import DataError
from trimtab.jsonlines import write_rows

__all__ = ["Prompt", "Sample", "read_samples", "write_samples"]


class Prompt(NamedTuple):
    """What answers are drawn to."""

    record: Record
    ids: Sequence[int]

    @property
    def before(self) -> Sequence[int]:
        """Ids whose text an answer goes on with; of a chat, none: an answer is a text of its own."""
        return () if is_chat(self.record.prompt) else self.ids


@dataclass(frozen=True)
class Sample:
    """An answer that was drawn.

    Attributes:
        group: which of the round's groups it was drawn for.
        place: of its prompt in the data.
        tokens: its ids.
        completion: its text.
        finish_reason: `"stop"`, or `"length"` where the limit cut it.
        temperature: of the policy that drew it.
        score: its reward; None where it has none.
        gain: log P_θ(y) − log P_M(y) of the policy at temperature 1, where it was asked for.
        prefix_scores: of each token, the score of the answer that ends before it, where they were asked for.
    """

    group: int
    place: int
    tokens: list[int]
    completion: str
    finish_reason: str
    temperature: float
    score: float | None
    gain: float | None = None
    prefix_scores: list[float | None] | None = None

    @property
    def was_cut(self) -> bool:
        """Whether the limit cut it, so that it has no end of sequence."""
        return self.finish_reason == "length"


def write_samples(path: Path, samples: Iterable[Sample], prompts: Sequence[Prompt]) -> None:
    def row(sample: Sample) -> dict[str, Any]:
        known = {name: value for name, value in asdict(sample).items() if value is not None or name in ("score", "gain")}
        return chat_columns(prompts[sample.place].record.prompt) | known

    write_rows(path, map(row, samples))


def read_samples(path: Path, places: Sequence[int], counts: Sequence[int], *, prefixes: bool) -> list[Sample] | None:
    """The samples in a file, if there is one: so many for each group, of which each has a place; perhaps with prefix scores.

    Raises:
        DataError: somebody has changed it.
    """
    if not path.exists():
        return None
    try:
        with open(path, encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
        samples = [
            Sample(**{name: value for name, value in row.items() if name not in ("prompt", *CHAT_FIELDS)}) for row in rows
        ]
        groups = [(group, place) for group, place in enumerate(places) for _ in range(counts[group])]
        if [(sample.group, sample.place) for sample in samples] != groups:
            raise ValueError(f"it has not the {len(groups)} answers of its groups")
        for sample in samples:
            if not sample.tokens or (sample.score is not None and not math.isfinite(sample.score)):
                raise ValueError(f"an answer without tokens, or of score {sample.score!r}")
            if prefixes and len(sample.prefix_scores or ()) != len(sample.tokens):
                raise ValueError("an answer without a score of what is before each token")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not as it was written ({error}): delete it, and it is drawn anew") from error
    return samples
