"""Tables of what followed runs of one to three tokens in a corpus: built once, mapped into memory, shared by all who draft.

A table is a safetensors file. For runs of n tokens, n from 1 to 3, it holds

    n.runs      [R] int64     the runs, ascending: each a number with 21 bits for a token, the latest token lowest
    n.starts    [R + 1] int64 where the tokens that followed each run are, below
    n.tokens    [S] int32     those, by run, the most frequent first
    n.counts    [S] int32     how often each did
    n.totals    [R] int64     how often anything followed the run

and metadata that says which vocabulary it is for. Opening one reads nothing but its header: pages come from the file when they
are looked at, and processes that draft from the same file share them.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.errors import DataError
from trimtab.files import atomic_write

__all__ = ["LONGEST", "Counted", "DraftTable", "count_runs", "write_table"]

FORMAT = "1"
LONGEST = 3
"""Tokens of the longest runs."""
BITS = 21
"""Of a token in a run's number: no vocabulary has two million tokens."""
PARTS = ("runs", "starts", "tokens", "counts", "totals")

Array = NDArray[Any]


class Counted(NamedTuple):
    """What followed runs of one length."""

    runs: Array
    starts: Array
    tokens: Array
    counts: Array
    totals: Array


def count_runs(texts: Iterable[tuple[Sequence[int], int]], *, successors: int) -> list[Counted]:
    """Count what followed runs of 1 … `LONGEST` tokens.

    Args:
        texts: ids, and from which of them on they count as what followed: those before are looked at alone.
        successors: the most tokens to keep for each run.

    Raises:
        DataError: nothing follows anything.
    """
    ids: list[Array] = []
    firsts: list[Array] = []
    behind: list[Array] = []
    for text, first in texts:
        ids.append(np.asarray(text, dtype=np.int64))
        firsts.append(np.arange(len(text)) >= first)
        behind.append(np.arange(len(text)))
    if not ids:
        raise DataError("there is no text to count")
    tokens, counts, before = np.concatenate(ids), np.concatenate(firsts), np.concatenate(behind)
    found = []
    for n in range(1, LONGEST + 1):
        at = np.flatnonzero(counts & (before >= n))
        run = np.zeros(len(at), dtype=np.int64)
        for back in range(n, 0, -1):
            run = (run << BITS) | tokens[at - back]
        found.append(_count(run, tokens[at], successors))
    if not len(found[0].runs):
        raise DataError("no token follows another: there is nothing to draft from")
    return found


def _count(run: Array, token: Array, successors: int) -> Counted:
    """The tokens of each run, the most frequent first and of equals the lowest."""
    order = np.lexsort((token, run))
    run, token = run[order], token[order]
    new = np.ones(len(run), dtype=bool)
    new[1:] = (run[1:] != run[:-1]) | (token[1:] != token[:-1])
    at = np.flatnonzero(new)
    count = np.diff(np.append(at, len(run)))
    run, token = run[at], token[at]
    order = np.lexsort((token, -count, run))
    run, token, count = run[order], token[order], count[order]
    runs, first, size = np.unique(run, return_index=True, return_counts=True)
    totals = np.add.reduceat(count, first) if len(runs) else count
    kept = np.arange(len(run)) - np.repeat(first, size) < successors
    starts = np.concatenate([[0], np.cumsum(np.minimum(size, successors))])
    return Counted(runs, starts.astype(np.int64), token[kept].astype(np.int32), count[kept].astype(np.int32), totals)


def write_table(path: str | Path, counted: Sequence[Counted], facts: dict[str, str]) -> int:
    """Write a table; how many bytes it has.

    Args:
        path: a file.
        counted: for runs of 1, 2, … tokens.
        facts: what else its metadata says.
    """
    from safetensors.numpy import save

    tensors = {f"{n}.{name}": part for n, one in enumerate(counted, 1) for name, part in zip(PARTS, one, strict=True)}
    data = save(tensors, {"trimtab_draft_table": FORMAT, **facts})
    with atomic_write(path, "wb") as stream:
        stream.write(data)
    return len(data)


class DraftTable:
    """A table that is open.

    Args:
        path: the file.

    Attributes:
        path: the file.
        facts: its metadata.

    Raises:
        DataError: it is not there, or no table.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.facts, tensors = _open(self.path)
        self._runs: list[Array] = [tensors[f"{n}.runs"] for n in range(1, LONGEST + 1)]
        self._starts, self._tokens, self._counts, self._totals = (
            [tensors[f"{n}.{name}"] for n in range(1, LONGEST + 1)] for name in PARTS[1:]
        )

    def followers(self, run: Sequence[int]) -> tuple[list[tuple[int, int]], int]:
        """What followed a run of 1 to `LONGEST` tokens: tokens with how often each did, the most frequent first; and how often
        anything did, 0 if nothing is known of the run.
        """
        n, i = self._place(run)
        if i is None:
            return [], 0
        part = slice(int(self._starts[n][i]), int(self._starts[n][i + 1]))
        return list(zip(self._tokens[n][part].tolist(), self._counts[n][part].tolist(), strict=True)), int(self._totals[n][i])

    def best(self, run: Sequence[int]) -> tuple[int, float] | None:
        """The token that followed a run of 1 to `LONGEST` tokens most often, and its share, as if something else had once, too.

        None if nothing is known of the run.
        """
        n, i = self._place(run)
        if i is None:
            return None
        start = self._starts[n][i]
        return int(self._tokens[n][start]), int(self._counts[n][start]) / (int(self._totals[n][i]) + 1)

    def _place(self, run: Sequence[int]) -> tuple[int, int | None]:
        """Which of the lists a run is in, and where; None if it is not."""
        number = 0
        for token in run:
            number = (number << BITS) | token
        runs = self._runs[len(run) - 1]
        i = int(runs.searchsorted(number))
        return len(run) - 1, i if i < len(runs) and runs[i] == number else None


def _open(path: Path) -> tuple[dict[str, str], dict[str, Array]]:
    """Metadata and tensors of a table's file, whose pages are read when they are looked at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("trimtab_draft_table") != FORMAT:
                raise DataError(f"draft: '{path}' is no table of `trimtab draft-table`, or of another version")
            names = [f"{n}.{name}" for n in range(1, LONGEST + 1) for name in PARTS]
            return facts, {name: file.get_tensor(name).numpy() for name in names}
    except FileNotFoundError as error:
        raise DataError(f"draft: there is no file '{path}'; `trimtab draft-table` makes one") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"draft: '{path}' cannot be read as a table: {error}") from error
