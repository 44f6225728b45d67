"""The proposal's rows on completions, compressed, and where they come from: a model here, or others (`endpoint_rows`).

For each token of a completion we keep the row's k most probable entries, the token's own, and the log of the mass of all
others: the *tail*. A row is rebuilt by spreading the tail evenly, so rebuilt rows are normalised, any rule takes them as it
takes exact ones, and what is lost is only how the tail was spread. (Without the tail bucket, training is ruined: RAM.md.)
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, gather, warp
from trimtab.decode.scoring import completion_rows
from trimtab.models.base import LanguageModel
from trimtab.train.examples import Example

__all__ = ["BATCH", "CachedRows", "Compressed", "ModelRows", "RowSource", "compress", "compress_each"]

BATCH = 16
"""Examples in a forward pass."""


class CachedRows(NamedTuple):
    """Compressed rows of T tokens."""

    ids: Tensor
    """`[T, k]` int32, the most probable tokens."""
    logp: Tensor
    """`[T, k]` their log-probabilities."""
    token: Tensor
    """`[T]` int32, the completion's tokens."""
    token_logp: Tensor
    """`[T]` their log-probabilities."""
    tail: Tensor
    """`[T]` log of the mass of all other tokens."""

    def rebuild(self, vocab_size: int) -> Tensor:
        """Normalised rows `[T, V]`, the tail spread evenly."""
        rows = (
            self.spread(vocab_size).unsqueeze(-1).expand(*self.token.shape, vocab_size).scatter(-1, self.ids.long(), self.logp)
        )
        return rows.scatter(-1, self.token.long().unsqueeze(-1), self.token_logp.unsqueeze(-1))

    def spread(self, vocab_size: int) -> Tensor:
        """`[T]` log-probability of each of the others."""
        among = (self.ids == self.token.unsqueeze(-1)).any(-1)
        kept = self.ids.shape[-1] + (~among).to(self.tail.dtype)
        return self.tail - (vocab_size - kept).clamp(min=1).log()


class Compressed(NamedTuple):
    """The rows of some examples."""

    rows: list[CachedRows]
    """For each example, on its wanted answer."""
    error: Tensor
    """`[2]` float64: the sum of KL(exact‖rebuilt) over all tokens, and the largest; NaN where that cannot be known."""


class RowSource(Protocol):
    """Whoever has the proposal's rows."""

    @property
    def vocab_size(self) -> int:
        """V."""

    @property
    def fingerprint(self) -> str:
        """What tells this proposal from others, found without asking it for rows."""

    def who(self) -> str:
        """Who computes the rows, where the fingerprint cannot tell; else ''. Asked only where rows are wanted."""

    def compress(self, examples: Sequence[Example], top_k: int, temperature: float) -> Compressed:
        """The rows of the examples at a temperature, of which each keeps the `top_k` ≤ V best entries."""


class ModelRows:
    """The rows of a model that runs here.

    Args:
        model: P_M.
        fingerprint: of its weights, see `trimtab.models.fingerprint`.
    """

    def __init__(self, model: LanguageModel, fingerprint: str) -> None:
        self._model, self.fingerprint = model, fingerprint

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._model.vocab_size

    def who(self) -> str:
        """The fingerprint says it."""
        return ""

    def compress(self, examples: Sequence[Example], top_k: int, temperature: float) -> Compressed:
        """Examples of like length go through the model together."""
        parts: list[list[CachedRows]] = [[] for _ in examples]
        losses = []
        order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].chosen))
        for start in range(0, len(order), BATCH):
            batch = order[start : start + BATCH]
            pairs = [(examples[i].prompt, examples[i].chosen) for i in batch]
            for (rows,), tokens, counts in completion_rows([self._model], pairs):
                for slot, (kept, loss) in enumerate(compress_each(rows, tokens, counts, top_k, temperature)):
                    parts[batch[slot]].append(kept)
                    losses.append(loss)
        error = torch.cat(losses).clamp(min=0)
        whole = [CachedRows(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]
        return Compressed(whole, torch.stack([error.sum(), error.max()]))


def compress_each(
    rows: Tensor, tokens: Tensor, counts: Sequence[int], top_k: int, temperature: float
) -> Iterator[tuple[CachedRows, Tensor]]:
    """For each of B completions: its first `counts` rows of `[B, T, V]`, compressed, and what each loses `[count]`."""
    rows = warp(rows, Warp(temperature))
    compressed = compress(rows, tokens, top_k)
    for slot, count in enumerate(counts):
        kept = CachedRows(*(column[slot, :count] for column in compressed))
        exact, rebuilt = rows[slot, :count], kept.rebuild(rows.shape[-1])
        loss = (exact.exp() * torch.where(exact.isneginf(), 0.0, exact - rebuilt)).sum(-1).double()
        yield CachedRows(*(column.cpu() for column in kept)), loss.cpu()


def compress(rows: Tensor, tokens: Tensor, top_k: int) -> CachedRows:
    """Rows `[…, T, V]` and tokens `[…, T]`, compressed."""
    best = rows.topk(top_k, dim=-1)
    rest = rows.scatter(-1, best.indices, -torch.inf).scatter(-1, tokens.unsqueeze(-1), -torch.inf)
    return CachedRows(best.indices.int(), best.values, tokens.int(), gather(rows, tokens), rest.logsumexp(-1))
