"""Looking at development data without more memory than training has: small enough batches, and their rows in pieces.

A pass without a gradient keeps no activations, so what it needs is the logits of a batch and what is computed from rows as wide
as the vocabulary. Training's largest micro-batch bounds both (`Room`): no batch has more tokens or logits than that one, and
no more of its rows are looked at together than fit where training has its targets and gradients.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from torch import Tensor

from trimtab.data.examples import Example
from trimtab.train.batches import rows_at
from trimtab.train.rows import CachedRows

__all__ = ["Passes", "Piece", "Room", "pieces", "shape", "token_counts"]

PIECES = 16
"""A piece has one row where training has so many rows of logits: what looks at a row makes about ten more like it."""


class Piece(NamedTuple):
    """Some of a batch's answer tokens, n of them, with a model's rows and, where they are cached, the proposal's."""

    tokens: Tensor
    """`[n]`."""
    logq: Tensor
    """`[n, V]` log-probabilities of the model."""
    cached: CachedRows | None
    """Of the proposal, n rows; whole ones, where it runs here."""
    positions: Tensor
    """`[n]`, which rows of the batch's logits predict the tokens."""
    part: slice
    """Which of the batch's tokens they are."""

    @property
    def logp(self) -> Tensor:
        """The proposal's rows `[n, V]`, rebuilt each time."""
        assert self.cached is not None
        return self.cached.rebuild(self.logq.shape[-1])


Passes: TypeAlias = Iterator[tuple[str, Iterator[Piece]]]
"""The passes over a batch: `chosen` or `rejected`, and the rows of these answers."""


class Room(NamedTuple):
    """How large training's largest micro-batch is, padding included."""

    tokens: int
    """Of prompts and answers."""
    rows: int
    """Of logits: one before each token of an answer, and one behind."""

    @classmethod
    def of(cls, examples: Sequence[Example], batch_size: int) -> "Room":
        """What a micro-batch takes that has the longest example, and one that has the longest answer."""
        count = min(batch_size, len(examples))
        shapes = [shape([example]) for example in examples]
        return cls(count * max(one.tokens for one in shapes), count * max(one.rows for one in shapes))

    def batches(self, examples: Sequence[Example], most: int) -> list[list[int]]:
        """All examples in batches of like length, with the longest first.

        A batch has at most `most` examples, and is no larger than this; but an example that alone is larger has one to itself.
        """
        order = sorted(range(len(examples)), key=lambda i: shape([examples[i]]).tokens, reverse=True)
        batches: list[list[int]] = []
        for i in order:
            if not batches or len(batches[-1]) == most or not self._holds([examples[j] for j in (*batches[-1], i)]):
                batches.append([])
            batches[-1].append(i)
        return batches

    @property
    def piece(self) -> int:
        """Rows to look at together."""
        return max(1, self.rows // PIECES)

    def _holds(self, examples: Sequence[Example]) -> bool:
        tokens, rows = shape(examples)
        return tokens <= self.tokens and rows <= self.rows


def shape(examples: Sequence[Example]) -> Room:
    """What a batch of examples takes: prompts are padded to the longest, and so are answers."""
    prompt = max(len(example.prompt) for example in examples)
    answer = max(max(len(example.chosen), len(example.rejected)) for example in examples)
    return Room(len(examples) * (prompt + answer), len(examples) * (answer + 1))


def pieces(
    logits: Tensor,
    positions: Tensor,
    tokens: Tensor,
    cached: CachedRows | None,
    vocab_size: int,
    temperature: float,
    most: int,
    bare: tuple[Tensor, float] | None = None,
) -> Iterator[Piece]:
    """Rows of a batch's answers, at most `most` at a time.

    Args:
        logits: a model's, `[M, W]` with W ≥ V.
        positions: `[N]`, which of the M rows predicts each token.
        tokens: `[N]`.
        cached: the proposal's, N rows.
        vocab_size: V.
        temperature: of the model's rows.
        most: rows in a piece.
        bare: the proposal's own logits `[M, W]` and its temperature, where it runs here and nothing of it is cached.
    """
    for start in range(0, len(tokens), most):
        part = slice(start, start + most)
        some = None if cached is None else CachedRows(*(column[part] for column in cached))
        if bare is not None:
            some = CachedRows.whole(rows_at(bare[0], positions[part], vocab_size, bare[1]), tokens[part])
        yield Piece(tokens[part], rows_at(logits, positions[part], vocab_size, temperature), some, positions[part], part)


def token_counts(inputs: Mapping[str, Tensor], which: str, piece: Piece) -> Tensor:
    """How often each token of a piece counts in a look `[n]`: its example's weight."""
    return inputs["weight"].index_select(0, inputs[f"{which}_owner"][piece.part])
