"""What a step decided, for groups of sequences: columns on the device, one transfer to the host, and plain values there."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Best", "Decided", "Drawn", "Outcome", "fetch"]


class Best(NamedTuple):
    """The n best tokens of each row."""

    logp: Tensor
    """`[b, P, n]`, best first."""
    tokens: Tensor
    """`[b, P, n]`"""


class Decided(NamedTuple):
    """What became of the drafts of b sequences at P positions, on the device. What nobody asked for is None."""

    accepted: Tensor
    """`[b]`, see `Verdict`."""
    kept: Tensor
    """`[b]`, see `Verdict`."""
    tokens: Tensor
    """`[b, P]`; those behind the first `accepted + 1` mean nothing."""
    log_z: Tensor | None = None
    """`[b]` observed at the first position; NaN where the rule has none."""
    marked: Tensor | None = None
    """`[b, P]` which rows the rule marked."""
    logprobs: Tensor | None = None
    """`[b, P, R]` of the tokens under proposal, each aligner, and the aligned model."""
    best: tuple[Best, Best] | None = None
    """Of the proposal's rows, and of the aligned ones."""


class Drawn(NamedTuple):
    """One decided token, as a step hands it to its sequence."""

    token: int
    logprobs: Sequence[float] = ()
    """Under proposal, each aligner, and the aligned model; empty if nobody asked."""
    marked: bool = False
    """Whether the rule marked its row, see `Rule.marks`."""
    tops: Sequence[list[tuple[int, float]]] = ()
    """The best tokens of the proposal and of the aligned model, with their log-probabilities; empty if nobody asked."""


class Outcome(NamedTuple):
    """What became of one sequence's drafts."""

    accepted: int
    """Drafts that stay."""
    kept: int
    """Drafts that would stay if none were withheld."""
    drawn: list[Drawn]
    """The `accepted + 1` tokens that it gains."""
    log_z: float = math.nan
    """Observed at the first of them; NaN if it was not, or the rule has none."""


def fetch(decided: Sequence[Decided]) -> list[list[Outcome]]:
    """What several groups decided, sequence by sequence, in one wait for the device.

    All numbers travel as float64, which holds ids and truth values exactly.
    """
    columns = [list(_columns(part)) for part in decided]
    numbers: list[float] = torch.cat([column.flatten().double() for mine in columns for column in mine]).tolist()
    found, start = [], 0
    for part, mine in zip(decided, columns, strict=True):
        lists = []
        for column in mine:
            lists.append(_nest(numbers[start : start + column.numel()], column.shape))
            start += column.numel()
        found.append(_outcomes(part, lists))
    return found


def _columns(part: Decided) -> Iterator[Tensor]:
    """All tensors of what was decided, in the order of its fields."""
    yield from (column for column in part[:-1] if isinstance(column, Tensor))
    for best in part.best or ():
        yield from best


def _nest(numbers: list[float], shape: Sequence[int]) -> Any:
    """Numbers as nested lists of this shape."""
    if len(shape) == 1:
        return numbers
    size = len(numbers) // max(shape[0], 1)
    return [_nest(numbers[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def _outcomes(part: Decided, lists: list[Any]) -> list[Outcome]:
    """One for each sequence, from the numbers of a group's columns as nested lists."""
    known = iter(lists)
    accepted, kept, tokens = next(known), next(known), next(known)
    log_z, marked, logprobs = (None if column is None else next(known) for column in part[3:6])
    tops = [(next(known), next(known)) for _ in part.best or ()]
    outcomes = []
    for b, stayed in enumerate(accepted):
        drawn = [
            Drawn(
                int(tokens[b][j]),
                logprobs[b][j] if logprobs else (),
                bool(marked and marked[b][j]),
                [[(int(i), value) for i, value in zip(ids[b][j], values[b][j], strict=True)] for values, ids in tops],
            )
            for j in range(int(stayed) + 1)
        ]
        outcomes.append(Outcome(int(stayed), int(kept[b]), drawn, log_z[b] if log_z else math.nan))
    return outcomes
