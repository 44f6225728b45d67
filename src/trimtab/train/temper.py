"""Where a trained language model starts as an aligner: at the two temperatures at which it and the proposal fit best.

A language model's own probabilities under `product` count the proposal twice. With exponents a on p̃ and s on q, the target is
∝ p^a·q^s, whose negative log-likelihood is convex in (a, s): Newton's method finds the best pair, and 1/a and 1/s are the
temperatures to train and to decode at. No weight is touched, so it works for adapters and tied embeddings alike. It is the
best `geometric` mixture of the two, with the sum of the exponents set free; training goes on from there.

The proposal's exponent has a prior, and the aligner's has bounds. Wanted answers alone would flatten a proposal that knows much
to make room for an aligner that knows little, and what it knows of other prompts would go with it. The prior is a Gaussian
around 1 on a, as heavy as every token's own evidence, so that more data do not outvote it; on a, and not on its logarithm, it
keeps the objective convex.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.data.examples import Example, answers
from trimtab.train.batches import Item, answer_logits, cached_batch, collate
from trimtab.train.checks import warn_of_start
from trimtab.train.pieces import Room, pieces, token_counts
from trimtab.train.plan import Temperatures
from trimtab.train.rows import Layout, RowSource

__all__ = ["TOP_K", "fit_exponents", "fit_temperatures"]

logger = logging.getLogger(__name__)

WIDTH = 0.2
"""Of the prior on the proposal's exponent: so far from 1 it costs half a nat a token."""

LEAST = 0.25
"""No smaller exponent of the aligner: its logits, and so the steps of its training, are scaled by it."""

MOST = 4.0
"""No larger exponent of either, and no smaller one of the proposal than its inverse."""

ENTRIES = 1 << 27
"""Entries of the rows that are looked at: half a gigabyte for each model."""

TOKENS = 16384
"""No more tokens than that, however small the vocabulary."""

PIECE = 1 << 24
"""Entries of the rows that are computed with at a time."""

TOP_K = 1024
"""Entries kept of a proposal row."""

STEPS = 20


def fit_temperatures(
    model: Any, source: RowSource, examples: Sequence[Example], batch_size: int, proposal: float | None, layout: Layout
) -> Temperatures:
    """The temperatures at which `product` of the proposal and an aligner as it is fits a sample of the examples best.

    Args:
        model: the aligner, on any device.
        source: who has the proposal's rows.
        examples: such as the aligner was never trained on, or it is trusted too much; some, evenly spread, are looked at.
        batch_size: examples in a forward pass.
        proposal: the proposal's temperature, if it is given.
        layout: what is kept of the source's rows; the tail must be spread evenly, for the proposal's exponent bends it.
    """
    sample = _sample(examples, max(1024, min(TOKENS, ENTRIES // source.vocab_size)))
    logp, logq, tokens, counts = _rows(model, source, sample, batch_size, layout)
    fixed = None if proposal is None else 1 / proposal
    a, s = fit_exponents(logp, logq, tokens, fixed, counts=counts)
    found = Temperatures(round(1 / a, 3) if proposal is None else proposal, round(1 / s, 3))
    started, alone = (
        _derivatives(logp, logq, tokens, counts, torch.tensor(point, dtype=torch.float64))[0]
        for point in ((a, s), (1.0 if fixed is None else fixed, 0.0))
    )
    logger.info("the aligned model starts at %.3f nats a token, the proposal alone has %.3f", started, alone)
    warn_of_start(s, (LEAST, MOST), started, alone)
    return found


def fit_exponents(
    logp: Tensor,
    logq: Tensor,
    tokens: Tensor,
    a: float | None = None,
    width: float = WIDTH,
    counts: Tensor | None = None,
) -> tuple[float, float]:
    """The exponents a of p and s of q, within bounds, that minimise −log likelihood + ((a − 1) / width)² / 2 a token.

    Args:
        logp: rows of the proposal `[N, V]`, not −inf at their tokens.
        logq: rows of the aligner `[N, V]`.
        tokens: `[N]`.
        a: the exponent of p, if it is given.
        width: of the prior on the exponent of p; infinite for none.
        counts: how often each token counts `[N]`; once, where nobody says.
    """
    counts = torch.ones(len(tokens)) if counts is None else counts
    free = torch.tensor([a is None, True])
    point = torch.tensor([1.0 if a is None else a, LEAST], dtype=torch.float64)
    point = _newton(logp, logq, tokens, counts, point, free, width)
    if not LEAST <= point[1] <= MOST:  # at its bound, and then the other one again
        point[1] = point[1].clamp(LEAST, MOST)
        point = _newton(logp, logq, tokens, counts, point, free & torch.tensor([True, False]), width)
    if a is None:
        point[0] = point[0].clamp(1 / MOST, MOST)
    return float(point[0]), float(point[1])


def _newton(logp: Tensor, logq: Tensor, tokens: Tensor, counts: Tensor, point: Tensor, free: Tensor, width: float) -> Tensor:
    """Minimise over the free exponents; a step that does not help is halved."""

    def penalised(at: Tensor) -> tuple[float, Tensor, Tensor]:
        loss, gradient, hessian = _derivatives(logp, logq, tokens, counts, at)
        off, steep = float(at[0]) - 1, torch.tensor([1 / width**2, 0.0], dtype=torch.float64)
        return loss + (off / width) ** 2 / 2, gradient + off * steep, hessian + steep.diag()

    loss, gradient, hessian = penalised(point)
    for _ in range(STEPS):
        held = torch.outer(free, free)
        step = torch.linalg.solve(torch.where(held, hessian, torch.eye(2, dtype=torch.float64)), gradient * free)
        scale = 1.0
        while scale > 1e-3:
            there = penalised(point - scale * step)
            if there[0] <= loss:
                break
            scale /= 2
        else:
            return point
        point = point - scale * step
        (loss, gradient, hessian), done = there, float(step.abs().max()) < 1e-4
        if done:
            return point
    return point


def _derivatives(logp: Tensor, logq: Tensor, tokens: Tensor, counts: Tensor, point: Tensor) -> tuple[float, Tensor, Tensor]:
    """The mean negative log-likelihood, its gradient `[2]` and its Hessian `[2, 2]`, with a trace of a ridge."""
    loss, gradient, hessian = 0.0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    step = max(1, PIECE // logp.shape[-1])
    for start in range(0, len(tokens), step):
        some = slice(start, start + step)
        often = counts[some].double()
        possible = logp[some] > -math.inf
        features = torch.stack([torch.where(possible, logp[some], 0.0), logq[some].clamp(min=-1e4)])
        scores = torch.where(possible, torch.einsum("f,fnv->nv", point.to(features.dtype), features), -math.inf)
        at = scores.log_softmax(-1)
        chances = at.exp()
        wanted = tokens[some].unsqueeze(-1)
        means = (features * chances).sum(-1)
        loss -= float((at.gather(-1, wanted).squeeze(-1).double() * often).sum())
        gradient += (means - features.gather(-1, wanted.expand(2, -1, -1)).squeeze(-1)).double() @ often
        apart = features - means.unsqueeze(-1)
        weighed = chances * often.to(chances.dtype).unsqueeze(-1)
        hessian += torch.einsum("fnv,gnv,nv->fg", apart, apart, weighed).double()
    count = float(counts.double().sum())
    return loss / count, gradient / count, hessian / count + 1e-9 * torch.eye(2, dtype=torch.float64)


def _sample(examples: Sequence[Example], tokens: int) -> list[Example]:
    """Examples from all over the data, with about so many tokens of wanted answers, and never none."""
    mean = sum(len(example.chosen) for example in examples) / len(examples)
    count = min(len(examples), max(1, math.ceil(tokens / mean)))
    return answers([examples[i * len(examples) // count] for i in range(count)], "chosen")


@torch.no_grad()
def _rows(
    model: Any, source: RowSource, examples: Sequence[Example], batch_size: int, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log p and log q `[N, V]` on all answers, their tokens and how often they count, on the CPU.

    No pass is larger than the longest example's.
    """
    model.eval()
    rows = source.compress(examples, layout, 1.0).rows
    tokens = torch.empty(sum(len(example.chosen) for example in examples), dtype=torch.long)
    logp, logq = (torch.empty(len(tokens), source.vocab_size) for _ in range(2))
    counts = torch.empty(len(tokens))
    start = 0
    for places in Room.of(examples, 1).batches(examples, batch_size):
        batch = collate([Item(examples[i], {"chosen": rows[i]}) for i in places])
        there = {name: value.to(model.device) for name, value in batch.items() if name.startswith("chosen")}
        logits, positions = answer_logits(model, there, "chosen")
        most = max(1, PIECE // source.vocab_size)
        for piece in pieces(logits, positions, batch["chosen_tokens"], cached_batch(batch), source.vocab_size, 1.0, most):
            some = slice(start, start := start + len(piece.tokens))
            logp[some], logq[some], tokens[some] = piece.logp, piece.logq, piece.tokens
            counts[some] = token_counts(batch, "chosen", piece)
    return logp, logq, tokens, counts
