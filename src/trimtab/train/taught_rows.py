"""A proposal's rows on answers in two contexts, bare and behind a teacher's prompt, compressed at the same tokens.

The loss is KL(p̃(·|teacher, x, y<t)‖aligned(·|x, y<t)), and needs both rows wherever it looks: the bare row's probability at
what the teacher says, and the teacher's at what stands in the normaliser. So the entries are chosen once for both, by the row
halfway between them, m = ½p̃ + ½p̃(·|teacher): the answer's token, ends of sequence, m's k most probable tokens, and S draws
from the rest of m, of mass r. An entry that is kept stands for itself. A draw v stands for c = r/(S·m(v)) tokens, and then

    Σ_u c_u f(u) is unbiased for Σ_v f(v), whatever f,

as every token is drawn S·m(v)/r times on average (points as in `rows`). That holds for powers of p̃ as well, so `geometric` gets
draws here. Neither row has an entry above 2m, so none counts for more than 2r/S of its mass.
"""

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import takewhile

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, kl_divergence, warp
from trimtab.core.objectives import sampled_distillation
from trimtab.data.examples import Example
from trimtab.decode.scoring import by_length, completion_rows
from trimtab.train.cache import ProposalCache
from trimtab.train.rows import BATCH, Compressed, Layout, ModelRows, TaughtRows, compress, tail_points

__all__ = ["TaughtCache", "TeacherRows", "compress_both", "taught_batch", "warn_of_ends"]

logger = logging.getLogger(__name__)


class TeacherRows:
    """The rows of a proposal that runs here, in both contexts of examples that have a teacher's prompt."""

    def __init__(self, proposal: ModelRows) -> None:
        self._proposal, self.vocab_size, self.fingerprint = proposal, proposal.vocab_size, proposal.fingerprint

    def who(self) -> str:
        """The fingerprint says it."""
        return ""

    def compress(self, examples: Sequence[Example], layout: Layout, temperature: float) -> Compressed:
        """Examples of like length go through the model together; what all teacher's prompts begin with, it reads once."""
        parts: list[list[TaughtRows]] = [[] for _ in examples]
        errors = []
        for batch in by_length([len(example.teacher) + len(example.chosen) for example in examples], BATCH):
            points = [tail_points(examples[i], layout.samples) for i in batch]
            done = 0
            for bare, taught, tokens, counts in self._pairs([examples[i] for i in batch]):
                bare, taught = warp(bare, Warp(temperature)), warp(taught, Warp(temperature))
                for slot, (each, count) in enumerate(zip(points, counts, strict=True)):
                    rows = bare[slot, :count], taught[slot, :count]
                    there = each[done : done + count].to(bare.device)
                    found = compress_both(*rows, tokens[slot, :count], layout.top_k, there, self._proposal.ends)
                    exact = kl_divergence(rows[1], rows[0]).double()
                    error = sampled_distillation(found.logt, found.logp, found.logc).double() - exact
                    errors.append(torch.stack([exact, error], -1).cpu())
                    parts[batch[slot]].append(TaughtRows(*(column.cpu() for column in found)))
                done += tokens.shape[1]
        exact, error = torch.cat(errors).unbind(-1)
        whole = [TaughtRows(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]
        return Compressed(whole, torch.stack([exact.sum(), exact.max(), error.sum(), (error**2).sum()]))

    def _pairs(self, examples: Sequence[Example]) -> Iterator[tuple[Tensor, Tensor, Tensor, list[int]]]:
        """The rows in both contexts `[B, K, V]`, the answers' next tokens `[B, K]`, and how many of the K each has."""
        teachers = [example.teacher for example in examples]
        columns = zip(*(teacher[:-1] for teacher in teachers), strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        bare = completion_rows([self._proposal.model], [(example.prompt, example.chosen) for example in examples])
        pairs = [(example.teacher, example.chosen) for example in examples]
        for ((one,), tokens, counts), ((other,), _, _) in zip(
            bare, completion_rows([self._proposal.model], pairs, shared=shared), strict=True
        ):
            yield one, other, tokens, counts


def compress_both(
    bare: Tensor, taught: Tensor, tokens: Tensor, top_k: int, points: Tensor, ends: Sequence[int] = ()
) -> TaughtRows:
    """Compress two rows at the same entries.

    Args:
        bare: log p̃ `[…, T, V]`.
        taught: the same behind the teacher's prompt.
        tokens: the answer's `[…, T]`.
        top_k: entries to keep, beside the tokens.
        points: `[…, T, S]` as in `rows.compress`; S 0 draws nothing, and only where every entry is kept is nothing lost.
        ends: tokens that come before the most probable.
    """
    middle = torch.logaddexp(bare, taught) - math.log(2)
    found = compress(middle, tokens, top_k, points, ends)
    own = found.token.unsqueeze(-1)
    ids = torch.cat([own, found.ids, found.samples], -1)
    counts = [torch.zeros_like(found.logp[..., :1]), torch.zeros_like(found.logp).masked_fill(found.ids == own, -torch.inf)]
    if found.samples.shape[-1]:
        each = found.each_draw().unsqueeze(-1)
        counts.append(torch.where(each.isneginf(), each, each - middle.gather(-1, found.samples.long())))
    return TaughtRows(ids, bare.gather(-1, ids.long()), taught.gather(-1, ids.long()), torch.cat(counts, -1))


class TaughtCache(ProposalCache):
    """A cache of `TaughtRows`, of examples that have a teacher's prompt."""

    kind = TaughtRows
    losses = ("kl_teacher_proposal", "kl_worst_token", "kl_error", "kl_error_rms")
    of = "KL(teacher‖proposal)"

    @staticmethod
    def columns(layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a token has of each field."""
        entries: tuple[int, ...] = (1 + layout.top_k + layout.samples,)
        return {"ids": (torch.int32, entries)} | dict.fromkeys(("logc", "logp", "logt"), (torch.float32, entries))


def taught_batch(batch: Mapping[str, Tensor]) -> TaughtRows:
    """The rows in both contexts of a batch's N wanted tokens."""
    return TaughtRows(*(batch[f"teacher_proposal_{name}"] for name in TaughtRows._fields))


def warn_of_ends(cache: ProposalCache, examples: Sequence[Example], ends: Collection[int]) -> None:
    """Say it where given answers end where the teacher would rather go on than the bare proposal: to go on is then learnt.

    Args:
        cache: of `TaughtRows`, on the examples.
        examples: with answers that are not the teacher's own.
        ends: ends of sequence.
    """
    last = [cache[i] for i, example in enumerate(examples) if example.chosen[-1] in ends]
    if not last:
        return
    means = [float(torch.stack([getattr(rows, name)[-1, 0] for rows in last]).mean().exp()) for name in ("logp", "logt")]
    if means[1] < means[0]:
        logger.warning(
            "the development answers end where the teacher would go on: it ends there with a probability of %.2g (geometric"
            " mean), and the bare proposal of %.2g, so what is learnt is to go on; without answers in the data"
            " (--columns prompt=prompt) the teacher draws its own, and shows where it ends", means[1], means[0],
        )  # fmt: skip
