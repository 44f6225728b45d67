"""Scored answers in files: rows with a prompt, a completion and a score, as rounds of training have them, and anybody may."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.data.prompts import is_chat
from trimtab.data.records import UNFINISHED, WEIGHT, read_records, read_weight
from trimtab.data.sources import read_rows
from trimtab.errors import DataError, InvalidOption
from trimtab.files import expand_home

__all__ = ["Scored", "read_scored", "scored_file"]


FINISHED = ("stop", "length")
"""How an answer may have come about that is worth something."""


class Scored(NamedTuple):
    """A row.

    Attributes:
        source: where it came from.
        prompt: a text or a chat.
        completion: the answer.
        score: what it is worth; None for no score.
        tokens: its ids, if the row has them.
        cut: whether its limit cut it, so that it does not end.
    """

    source: str
    prompt: Any
    completion: str
    score: float | None
    tokens: list[int] | None
    cut: bool


def scored_file(path: str | Path) -> tuple[Path, str]:
    """A file of scored answers, and its digest.

    Raises:
        InvalidOption: there is none.
    """
    file = expand_home(path)
    if not file.is_file():
        raise InvalidOption(f"there is no file of scores '{path}'")
    with open(file, "rb") as stream:
        return file, f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def read_scored(path: str | Path) -> Iterator[Scored]:
    """Its rows: JSON Lines (also gzipped) or Parquet with the columns `prompt`, `completion` and `score`.

    A prompt is a text or messages, with `tools` and `chat_template_kwargs` beside it as in a data set; a completion is a text,
    or messages of which the last one is the answer. A score is a number, or null for none. `tokens` may be the completion's
    ids; the `finish_reason` `length`, or a true `unfinished`, says that it was cut. An answer of another `finish_reason` than
    `stop` and `length` has no score. A `weight` of n is the row n times.

    Raises:
        DataError: a row is none of these.
    """
    records = read_records(str(path), need="prompt", answers=False)
    for record, (source, row) in zip(records, read_rows(str(path)), strict=True):
        if missing := [name for name in ("completion", "score") if name not in row]:
            raise DataError(f"{source}: '{missing[0]}' is missing; it has: {', '.join(row)}")
        completion, score, tokens = row["completion"], row["score"], row.get("tokens")
        if isinstance(completion, list) and is_chat(completion):
            completion = completion[-1].get("content")
        if not isinstance(completion, str):
            raise DataError(f"{source}: 'completion' must be a text or messages, not {row['completion']!r}")
        if score is not None and (isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score)):
            raise DataError(f"{source}: 'score' must be a finite number, or null, not {score!r}")
        if tokens is not None and not (tokens and all(type(token) is int for token in tokens)):
            raise DataError(f"{source}: 'tokens' must be a list of ids, not {tokens!r}")
        if score is not None and (reason := row.get("finish_reason")) not in (None, *FINISHED):
            raise DataError(f"{source}: 'finish_reason' must be {' or '.join(FINISHED)}, not {reason!r}: leave the row out")
        cut = row.get("finish_reason") == "length" or bool(row.get(UNFINISHED))
        often = read_weight(row.get(WEIGHT, 1), source)
        if often % 1:
            raise DataError(f"{source}: 'weight' must be a whole number where answers have scores, not {often:g}")
        for _ in range(int(often)):
            yield Scored(source, record.prompt, completion, None if score is None else float(score), tokens, cut)
