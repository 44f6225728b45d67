"""`TableLM`: a language model small enough to know everything about it.

Its next-token distribution depends on the last `order` tokens and stands in a table, so whole distributions over sequences
can be enumerated and compared exactly. It is the model on which decoding is proved right before any sampling.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import log_normalize
from trimtab.core.noise import uniforms
from trimtab.models.base import State, last_of

__all__ = ["TableLM", "enumerate_sequences"]


class TableState(State):
    """The tokens of each slot, written out."""

    def __init__(self, prefixes: Sequence[Sequence[int]], capacity: int) -> None:
        super().__init__([len(prefix) for prefix in prefixes], capacity)
        self.prefixes = [list(prefix) for prefix in prefixes]


class TableLM:
    """A Markov chain of some order over V tokens.

    Args:
        table: log-probabilities `[V + 1] * order + [V]`. Index V along a context dimension stands for "before the start".
    """

    max_length: int | None = None
    immutable = True

    def __init__(self, table: Tensor) -> None:
        self.table = log_normalize(table)
        self.order = table.ndim - 1
        self.vocab_size = table.shape[-1]
        self.device = table.device

    @classmethod
    def random(cls, vocab_size: int, order: int = 1, *, seed: int, scale: float = 1.0, zeros: float = 0.0) -> "TableLM":
        """A table of logits uniform in ±2·`scale`, of which about a share `zeros` is −inf, never a whole row. Float64."""
        shape = [vocab_size + 1] * order + [vocab_size]
        noise = uniforms([seed], [0], [0], torch.Size(shape).numel(), 2)[0]
        logits = ((noise[:, 0] - 0.5) * 4 * scale).view(shape)
        gone = (noise[:, 1] < zeros).view(shape) & (logits < logits.amax(-1, keepdim=True))
        return cls(logits.masked_fill(gone, -torch.inf))

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of the table; a subclass that goes by something else says so."""
        digest = hashlib.sha256(f"{type(self).__qualname__} {tuple(self.table.shape)} {self.table.dtype}".encode())
        digest.update(self.table.cpu().contiguous().view(torch.uint8).numpy().data)
        return f"sha256:{digest.hexdigest()}"

    def row(self, prefix: Sequence[int]) -> Tensor:
        """The next-token log-probabilities `[V]` after `prefix`."""
        context = ([self.vocab_size] * self.order + list(prefix))[len(prefix) :] if self.order else []
        return self.table[tuple(context)]

    def new_state(self, slots: int, capacity: int) -> TableState:
        """Empty slots."""
        return TableState([[] for _ in range(slots)], capacity)

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Nothing that matters."""
        return 0

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; rows `[B, K, V]`."""
        assert isinstance(state, TableState)
        state.check_room(tokens, counts)
        rows = self.table.new_zeros(*tokens.shape, self.vocab_size)
        for slot, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True)):
            for j in range(count):
                state.prefixes[slot].append(new[j])
                rows[slot, j] = self.row(state.prefixes[slot])
        state.advance(counts)
        return rows

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; the row `[B, 1, V]` after its last token."""
        return last_of(self.extend(state, tokens, counts), counts)

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last tokens of each slot."""
        assert isinstance(state, TableState)
        state.check_rollback(counts)
        state.advance(counts, -1)
        for prefix, length in zip(state.prefixes, state.lengths, strict=True):
            del prefix[length:]

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots."""
        assert isinstance(source, TableState)
        assert isinstance(target, TableState)
        for slot, other in zip(slots, to, strict=True):
            target.prefixes[other], target.lengths[other] = list(source.prefixes[slot]), source.lengths[slot]
            target.adapters[other] = source.adapters[slot]

    def select(self, state: State, rows: Sequence[int]) -> TableState:
        """Copies of the given slots."""
        assert isinstance(state, TableState)
        selected = TableState([[] for _ in rows], state.capacity)
        self.copy(state, rows, selected, range(len(rows)))
        return selected

    def enumerate(self, prompt: Sequence[int], max_tokens: int, eos: Sequence[int] = ()) -> dict[tuple[int, ...], float]:
        """The exact law of this model's completions: see `enumerate_sequences`."""
        return enumerate_sequences(self.row, prompt, max_tokens, eos)


def enumerate_sequences(
    next_row: Callable[[Sequence[int]], Tensor], prompt: Sequence[int], max_tokens: int, eos: Sequence[int] = ()
) -> dict[tuple[int, ...], float]:
    """Every completion of `prompt` with its log-probability in nats.

    Completions end with the first token in `eos` or after `max_tokens` tokens. Impossible ones are left out.

    Args:
        next_row: the model or decoding rule: prefix → log-probabilities `[V]`.
        prompt: where to start.
        max_tokens: the longest completion.
        eos: ids that end a completion.
    """
    return dict(_walk(next_row, list(prompt), (), 0.0, max_tokens, frozenset(eos)))


def _walk(
    next_row: Callable[[Sequence[int]], Tensor],
    prefix: list[int],
    done: tuple[int, ...],
    logp: float,
    left: int,
    eos: frozenset[int],
) -> Iterator[tuple[tuple[int, ...], float]]:
    if left == 0 or (done and done[-1] in eos):
        yield done, logp
        return
    for token, step in enumerate(next_row(prefix).tolist()):
        if step > -torch.inf:
            yield from _walk(next_row, [*prefix, token], (*done, token), logp + step, left - 1, eos)
