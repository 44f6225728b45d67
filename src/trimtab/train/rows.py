"""The proposal's rows on completions, compressed, and where they come from: a model here, or others (`endpoint_rows`).

For each token of a completion we keep the row's k most probable entries, the token's own, and the log of the mass of all
others: the *tail*. (Without it, training is ruined: RAM.md.) Beside them we may keep S tokens that were drawn from the tail in
proportion to their probability. A row is rebuilt in one of two ways, and is normalised in both:

    drawn    each of the S draws stands for 1/S of the tail: p̃. Then Σ_v p̃(v) f(v) is unbiased for every f, and so is the
             normaliser of `product`, with f = q^λ. It is not for what bends p̃, such as its entropy or p̃^(1−w) of `geometric`.
    evenly   all others share the tail alike. log p̃ is finite, so any rule takes it, but Z comes out too low where an aligner
             prefers the tail tokens that the proposal prefers.

Draws are systematic: points (i+u)/S on the tail's cumulative distribution, with one uniform u for each row, a function of the
example's tokens and the position, so that a cache is the same whoever builds it. They miss a token that the proposal hardly
ever says and the aligner often does. One such is known beforehand, the end of sequence of a proposal that was not trained to
stop; so ends of sequence are always among the k entries.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, gather, kl_divergence, warp
from trimtab.core.noise import uniforms
from trimtab.data.examples import Example
from trimtab.decode.scoring import by_length, completion_rows
from trimtab.models.base import LanguageModel
from trimtab.models.huggingface import HuggingFaceLM

__all__ = [
    "BATCH",
    "CachedRows",
    "Compressed",
    "Layout",
    "ModelRows",
    "Proposal",
    "RowSource",
    "TaughtRows",
    "compress",
    "compress_each",
    "tail_points",
]

BATCH = 16
"""Examples in a forward pass."""


class Layout(NamedTuple):
    """What is kept of a row, beside the token's own entry and the tail."""

    top_k: int
    """k, the most probable entries, of which some may be given to ends of sequence."""
    samples: int = 0
    """S, tokens drawn from the tail; 0 where it is spread evenly."""

    @classmethod
    def of(cls, top_k: int, samples: int, vocab_size: int) -> "Layout":
        """With `top_k` 0, or as large as the vocabulary, every entry is kept, and there is no tail to draw from."""
        whole = top_k == 0 or top_k >= vocab_size
        return cls(vocab_size) if whole else cls(top_k, samples)


class CachedRows(NamedTuple):
    """Compressed rows of T tokens."""

    ids: Tensor
    """`[T, k]` int32, ends of sequence (where a model's rows are compressed) and the most probable tokens."""
    logp: Tensor
    """`[T, k]` their log-probabilities."""
    token: Tensor
    """`[T]` int32, the completion's tokens."""
    token_logp: Tensor
    """`[T]` their log-probabilities."""
    tail: Tensor
    """`[T]` log of the mass of all other tokens."""
    samples: Tensor
    """`[T, S]` int32, draws from those others, some perhaps alike; of no meaning where the tail has no mass."""

    @classmethod
    def whole(cls, rows: Tensor, tokens: Tensor) -> Self:
        """Rows `[T, V]` on tokens `[T]`, with every entry kept."""
        ids = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device).expand(rows.shape)
        none = torch.full_like(rows[..., 0], -math.inf)
        return cls(ids, rows, tokens.int(), gather(rows, tokens), none, ids[..., :0])

    def rebuild(self, vocab_size: int) -> Tensor:
        """Normalised rows `[T, V]`, the tail on the draws, or spread evenly where there are none."""
        if self.samples.shape[-1]:
            drawn = self.logp.new_zeros(*self.token.shape, vocab_size)
            drawn.scatter_add_(-1, self.samples.long(), torch.ones_like(self.samples, dtype=self.logp.dtype))
            others = drawn.log_().add_(self.each_draw().unsqueeze(-1))
        else:
            others = self.spread(vocab_size).unsqueeze(-1).expand(*self.token.shape, vocab_size)
        rows = others.scatter(-1, self.ids.long(), self.logp)
        return rows.scatter(-1, self.token.long().unsqueeze(-1), self.token_logp.unsqueeze(-1))

    def evenly(self) -> "CachedRows":
        """Without the draws: rebuilt, the tail is spread evenly."""
        return self._replace(samples=self.samples[..., :0])

    def each_draw(self) -> Tensor:
        """`[T]` log of the mass that each draw stands for."""
        return self.tail - math.log(self.samples.shape[-1])

    def spread(self, vocab_size: int) -> Tensor:
        """`[T]` log-probability of each of the others, where they share the tail alike."""
        among = (self.ids == self.token.unsqueeze(-1)).any(-1)
        kept = self.ids.shape[-1] + (~among).to(self.tail.dtype)
        return self.tail - (vocab_size - kept).clamp(min=1).log()


class TaughtRows(NamedTuple):
    """Rows of T tokens in two contexts, bare and behind a teacher's prompt, at the same E tokens (`taught_rows`)."""

    ids: Tensor
    """`[T, E]` int32, some perhaps alike."""
    logp: Tensor
    """`[T, E]` their log-probabilities in the bare context."""
    logt: Tensor
    """`[T, E]` those behind the teacher's prompt."""
    logc: Tensor
    """`[T, E]` log of how many tokens each stands for; −inf where it stands for none."""


class Compressed(NamedTuple):
    """The rows of some examples."""

    rows: Sequence[CachedRows | TaughtRows]
    """For each example, on its wanted answer."""
    error: Tensor
    """`[4]` float64, of what each token loses (see `compress_each`); NaN where that cannot be known.

    The sum of KL over all tokens, and the largest; the sum of log Z's errors, and that of their squares. Of `TaughtRows`, the
    divergences are KL(teacher‖proposal), and the errors those of their estimates."""


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

    def compress(self, examples: Sequence[Example], layout: Layout, temperature: float) -> Compressed:
        """The rows of the examples at a temperature."""


class ModelRows:
    """The rows of a model that runs here.

    Args:
        model: P_M.
        fingerprint: of its weights, see `trimtab.models.fingerprint`.
        ends: ends of sequence, which are always kept.
    """

    def __init__(self, model: LanguageModel, fingerprint: str, ends: Sequence[int] = ()) -> None:
        self.model, self.fingerprint, self.ends = model, fingerprint, ends

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.model.vocab_size

    def who(self) -> str:
        """The fingerprint says it."""
        return ""

    def compress(self, examples: Sequence[Example], layout: Layout, temperature: float) -> Compressed:
        """Examples of like length go through the model together."""
        parts: list[list[CachedRows]] = [[] for _ in examples]
        losses = []
        for batch in by_length([len(example.prompt) + len(example.chosen) for example in examples], BATCH):
            points = [tail_points(examples[i], layout.samples) for i in batch]
            pairs = [(examples[i].prompt, examples[i].chosen) for i in batch]
            done = 0
            for (rows,), tokens, counts in completion_rows([self.model], pairs):
                here = [each[done : done + count] for each, count in zip(points, counts, strict=True)]
                done += tokens.shape[1]
                for slot, (kept, loss) in enumerate(compress_each(rows, tokens, here, layout.top_k, temperature, self.ends)):
                    parts[batch[slot]].append(kept)
                    losses.append(loss)
        kl, log_z = torch.cat(losses).unbind(-1)
        whole = [CachedRows(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]
        return Compressed(whole, torch.stack([kl.sum(), kl.max(), log_z.sum(), (log_z**2).sum()]))


def compress_each(
    rows: Tensor, tokens: Tensor, points: Sequence[Tensor], top_k: int, temperature: float, ends: Sequence[int]
) -> Iterator[tuple[CachedRows, Tensor]]:
    """For each of B completions: its first rows of `[B, T, V]`, as many as it has `points` for, compressed; and what they lose.

    That is `[count, 2]` float64, for each token: KL(exact‖evenly spread), and by how much log Σ_v p̃(v) q(v) is too high for
    q = p: the error in the aligned model's negative log-likelihood, were the aligner a copy of the proposal.
    """
    rows = warp(rows, Warp(temperature))
    for slot, there in enumerate(points):
        count = len(there)
        exact = rows[slot, :count]
        kept = compress(exact, tokens[slot, :count], top_k, there.to(rows.device), ends)
        kl = kl_divergence(exact, kept.evenly().rebuild(rows.shape[-1])).clamp(min=0)
        log_z = (kept.rebuild(rows.shape[-1]) + exact).logsumexp(-1) - (2 * exact).logsumexp(-1)
        yield CachedRows(*(column.cpu() for column in kept)), torch.stack([kl, log_z], -1).double().cpu()


def tail_points(example: Example, samples: int) -> Tensor:
    """Where to draw from the tails of an example's rows: `[T, S]` float64 in [0, 1], ascending in each row."""
    words = torch.tensor([len(example.prompt), *example.prompt, *example.chosen]).numpy().tobytes()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:8], "little")
    start = uniforms([seed], [0], [0], len(example.chosen), 1)[0]
    return (torch.arange(samples, dtype=torch.float64) + start) / max(samples, 1)


def compress(rows: Tensor, tokens: Tensor, top_k: int, points: Tensor | None = None, ends: Sequence[int] = ()) -> CachedRows:
    """Compress rows.

    Args:
        rows: log p `[…, T, V]`.
        tokens: the completion's `[…, T]`.
        top_k: entries to keep.
        points: `[…, T, S]` float64 in [0, 1], where to draw on the tails' cumulative distributions; without, nothing is drawn.
        ends: tokens that come before the most probable, as far as there is room.
    """
    ranked = rows.index_fill(-1, torch.tensor(ends, device=rows.device), torch.inf) if ends else rows
    best = ranked.topk(top_k, dim=-1).indices
    rest = rows.scatter(-1, best, -torch.inf).scatter(-1, tokens.unsqueeze(-1), -torch.inf)
    samples = best[..., :0] if points is None or not points.shape[-1] else _draw(rest, points)
    return CachedRows(best.int(), rows.gather(-1, best), tokens.int(), gather(rows, tokens), rest.logsumexp(-1), samples.int())


def _draw(logw: Tensor, points: Tensor) -> Tensor:
    """The tokens `[…, S]` at `points` in [0, 1] of the cumulative distributions of rows `[…, V]`."""
    mass = logw.exp().cumsum(-1, dtype=torch.float64)
    total = mass[..., -1:].clone()
    last = torch.searchsorted(mass, total)  # of those that have mass: a point may be rounded to 1
    return torch.searchsorted(mass, points * total, right=True).minimum(last)


class Proposal(NamedTuple):
    """A proposal as training sees it."""

    rows: RowSource
    context: int
    """The most tokens of a prompt and its answer."""
    eos_token_ids: tuple[int, ...]
    model: HuggingFaceLM | None
    """The model itself, if it runs here."""
