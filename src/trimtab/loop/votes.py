"""What people said of answers, as votes for one of two: from the files that the server and the arena write.

`FILE.jsonl` has votes and corrections, `prompt`, `chosen` and `rejected`, which any data set in this layout is, too. Beside it
may lie `FILE.thumbs.jsonl`, with one answer and a `label`: a thumb up and a thumb down to one prompt are a vote. A thumb down
alone says that its prompt was lost; a thumb up alone compares nothing.
"""

import dataclasses
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from trimtab.data.prompts import show_prompt
from trimtab.data.records import Record, read_records, read_weight
from trimtab.data.sources import read_rows
from trimtab.errors import DataError
from trimtab.files import expand_home, json_digest

__all__ = ["Said", "Vote", "normal", "read_said"]


@dataclass(frozen=True)
class Vote:
    """One answer preferred to another.

    Attributes:
        record: the prompt with both answers.
        key: a digest of whose it is; None where the data do not say, as in an operator's own.
        digest: what tells it from others.
        time: when it came, as the data have it; None if they do not say.
    """

    record: Record
    key: str | None
    digest: str
    time: str | None = None

    @property
    def asked(self) -> str:
        """The prompt, but for spelling."""
        return normal(show_prompt(self.record.prompt))


class Said(NamedTuple):
    """What there is to learn from."""

    votes: list[Vote]
    lost: list[Any]
    """Prompts of thumbs down that are in no vote."""
    alone: int
    """Thumbs up that are in no vote."""


def normal(text: str) -> str:
    """A text in small letters, with single spaces, and without the punctuation at its end: what differs otherwise is one."""
    found = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    while found and (found[-1] == " " or unicodedata.category(found[-1]) in ("Po", "Pd")):
        found = found[:-1]
    return found or " ".join(text.split())


def read_said(files: Sequence[str]) -> Said:
    """Votes of all files by their time, those without one first and in their order.

    Raises:
        DataError: a file cannot be read, or a row is no vote, and no thumb.
    """
    votes: dict[str, Vote] = {}
    lost: list[Any] = []
    alone = 0
    for name in files:
        seen: Counter[str] = Counter()
        for record in read_records(name, need="rejected", others=True, weights=True):
            time = record.columns.get("time")
            vote = _vote(record, record.columns.get("key"), time)
            if time is None:  # then rows that are alike are votes that are
                seen[vote.digest] += 1
                vote = _vote(record, record.columns.get("key"), seen[vote.digest])
            votes.setdefault(vote.digest, vote)
        path = expand_home(name)
        thumbs = path.with_name(f"{path.name.removesuffix('.gz').removesuffix('.jsonl')}.thumbs.jsonl")
        if thumbs.is_file() and thumbs != path:
            found = _read_thumbs(str(thumbs))
            votes |= {vote.digest: vote for vote in found.votes if vote.digest not in votes}
            lost, alone = lost + found.lost, alone + found.alone
    return Said(sorted(votes.values(), key=lambda vote: vote.time or ""), lost, alone)


def _vote(record: Record, key: Any, time: Any) -> Vote:
    _check_key(key, record.source)
    told = [record.prompt, record.chosen, record.rejected, key, time, record.weight, sorted(record.unfinished)]
    return Vote(dataclasses.replace(record, columns={}), key, json_digest(told), time if isinstance(time, str) else None)


def _check_key(key: Any, source: str) -> None:
    if key is not None and not isinstance(key, str):
        raise DataError(f"{source}: 'key' must be a text that says whose it is, not {key!r}")


def _read_thumbs(name: str) -> Said:
    """Thumbs to one prompt as votes: each up with a down of its own, in their order."""
    prompts: dict[str, tuple[Any, list[dict[str, Any]], list[dict[str, Any]]]] = {}
    records = read_records(name, need="prompt", answers=False)
    speaks: Counter[Any] = Counter()
    for record, (source, row) in zip(records, read_rows(name), strict=True):
        if not isinstance(row.get("label"), bool) or row.get("completion") is None:
            raise DataError(f"{source}: a thumb has a 'completion' and a 'label' that is true or false")
        _check_key(row.get("key"), source)
        row = {**row, "source": source, "weight": read_weight(row.get("weight", 1), source)}
        _, ups, downs = prompts.setdefault(normal(show_prompt(record.prompt)), (record.prompt, [], []))
        (ups if row["label"] else downs).append(row)
        speaks[row.get("key")] += 1
    votes: list[Vote] = []
    lost: list[Any] = []
    alone = 0
    for prompt, ups, downs in prompts.values():
        alone += max(0, len(ups) - len(downs))
        if not ups:
            lost.append(prompt)
        for up, down in zip(ups, downs, strict=False):
            record = Record(
                prompt, up["completion"], down["completion"], up["source"], weight=min(up["weight"], down["weight"])
            )
            who = max((up.get("key"), down.get("key")), key=lambda key: speaks[key])  # a flood pairs with whatever there is
            vote = _vote(record, who, [up.get("time"), down.get("time")])
            times = [one["time"] for one in (up, down) if isinstance(one.get("time"), str)]
            votes.append(dataclasses.replace(vote, time=max(times, default=None)))
    return Said(votes, lost, alone)
