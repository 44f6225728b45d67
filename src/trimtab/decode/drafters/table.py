"""Tables of what followed runs of one to three tokens in a corpus: built once, mapped into memory, shared by all who draft.

A table is a safetensors file. For runs of n tokens, n from 1 to 3, it holds

    n.runs      [R] int64   the runs, ascending: each a number with 21 bits for a token, the latest token lowest
    n.tokens    [R] int32   the token that followed each run most often, of equals the lowest
    n.counts    [R] int64   how often it did
    n.totals    [R] int64   how often anything did

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

Array = NDArray[Any]


class Counted(NamedTuple):
    """What followed runs of one length: the columns of a table."""

    runs: Array
    tokens: Array
    counts: Array
    totals: Array


def count_runs(texts: Iterable[tuple[Sequence[int], int]]) -> list[Counted]:
    """Count what followed runs of 1 … `LONGEST` tokens.

    Args:
        texts: ids, and from which of them on they count as what followed: those before are looked at alone.

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
        found.append(_count(run, tokens[at]))
    if not len(found[0].runs):
        raise DataError("no token follows another: there is nothing to draft from")
    return found


def _count(run: Array, token: Array) -> Counted:
    """The most frequent token of each run."""
    order = np.lexsort((token, run))
    run, token = run[order], token[order]
    new = np.ones(len(run), dtype=bool)
    new[1:] = (run[1:] != run[:-1]) | (token[1:] != token[:-1])
    at = np.flatnonzero(new)
    count = np.diff(np.append(at, len(run)))
    run, token = run[at], token[at]
    order = np.lexsort((token, -count, run))
    runs, first = np.unique(run[order], return_index=True)
    totals = np.add.reduceat(count[order], first) if len(runs) else count
    best = order[first]
    return Counted(runs, token[best].astype(np.int32), count[best], totals)


def write_table(path: str | Path, counted: Sequence[Counted], facts: dict[str, str]) -> int:
    """Write a table; how many bytes it has.

    Args:
        path: a file.
        counted: for runs of 1, 2, … tokens.
        facts: what else its metadata says.
    """
    from safetensors.numpy import save

    tensors = {f"{n}.{name}": part for n, one in enumerate(counted, 1) for name, part in one._asdict().items()}
    data = save(tensors, {"trimtab_draft_table": FORMAT, **facts})
    with atomic_write(path, "wb") as stream:
        stream.write(data)
    return len(data)


class DraftTable:
    """A table that is open.

    Args:
        path: the file.

    Attributes:
        facts: its metadata.

    Raises:
        DataError: it is not there, or no table.
    """

    def __init__(self, path: Path) -> None:
        self.facts, self._columns = _open(path)

    def best(self, run: Sequence[int]) -> tuple[int, float] | None:
        """The token that followed a run of 1 to `LONGEST` tokens most often, and its share, as if something else had once, too.

        None if nothing is known of the run.
        """
        number = 0
        for token in run:
            number = (number << BITS) | token
        runs, tokens, counts, totals = self._columns[len(run) - 1]
        i = int(runs.searchsorted(number))
        if i == len(runs) or runs[i] != number:
            return None
        return int(tokens[i]), int(counts[i]) / (int(totals[i]) + 1)


def _open(path: Path) -> tuple[dict[str, str], list[Counted]]:
    """Metadata and columns of a table's file, whose pages are read when they are looked at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("trimtab_draft_table") != FORMAT:
                raise DataError(f"draft: '{path}' is no table of `trimtab draft-table`, or of another version")
            columns = ((file.get_tensor(f"{n}.{name}").numpy() for name in Counted._fields) for n in range(1, LONGEST + 1))
            return facts, [Counted(*parts) for parts in columns]
    except FileNotFoundError as error:
        raise DataError(f"draft: there is no file '{path}'; `trimtab draft-table` makes one") from error
    except (SafetensorError, OSError) as error:
        raise DataError(f"draft: '{path}' cannot be read as a table: {error}") from error
