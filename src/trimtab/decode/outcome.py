"""What a step decided, for groups of sequences: columns on the device, one transfer to the host, and plain values there."""

import math
from collections.abc import Sequence
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
    flat: list[Tensor] = []
    _gather([tuple(part) for part in decided], flat)
    numbers: list[float] = torch.cat([column.flatten().double() for column in flat]).tolist()
    columns, start = [], 0
    for column in flat:
        columns.append(_nest(numbers[start : start + column.numel()], column.shape))
        start += column.numel()
    taken = iter(columns)
    return [_outcomes(Decided(*_replace(tuple(part), taken))) for part in decided]


def _gather(value: Any, into: list[Tensor]) -> None:
    """All tensors in nested sequences, in order."""
    if isinstance(value, Tensor):
        into.append(value)
    elif value is not None:
        for part in value:
            _gather(part, into)


def _replace(value: Any, columns: Any) -> Any:
    """The same nested sequences as tuples, with a column in the place of each tensor, in order."""
    if isinstance(value, Tensor):
        return next(columns)
    return None if value is None else tuple(_replace(part, columns) for part in value)


def _nest(numbers: list[float], shape: Sequence[int]) -> Any:
    """Numbers as nested lists of this shape."""
    if len(shape) == 1:
        return numbers
    size = len(numbers) // max(shape[0], 1)
    return [_nest(numbers[i * size : (i + 1) * size], shape[1:]) for i in range(shape[0])]


def _outcomes(columns: Any) -> list[Outcome]:
    """One for each sequence, from lists in the place of a `Decided`'s tensors."""
    outcomes = []
    for b, (accepted, kept) in enumerate(zip(columns.accepted, columns.kept, strict=True)):
        drawn = []
        for j in range(int(accepted) + 1):
            logprobs = () if columns.logprobs is None else columns.logprobs[b][j]
            marked = columns.marked is not None and bool(columns.marked[b][j])
            tops: list[list[tuple[int, float]]] = []
            for values, ids in columns.best or ():
                tops.append([(int(i), value) for i, value in zip(ids[b][j], values[b][j], strict=True)])
            drawn.append(Drawn(int(columns.tokens[b][j]), logprobs, marked, tops))
        log_z = math.nan if columns.log_z is None else columns.log_z[b]
        outcomes.append(Outcome(int(accepted), int(kept), drawn, log_z))
    return outcomes
