"""The simplest thing to try first: one logit bias for the whole vocabulary (`logit_bias`), P ∝ P_M(v|prefix)^a · exp(b_v).

It knows which words are wanted, and at which temperature, but not where. It is fitted to the wanted answers' tokens by maximum
likelihood with a Gaussian prior on b, which is convex in (a, b). The prior is loosened until that helps the development tokens
no more: otherwise the bias learns which rare words the training answers happen to use.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import completion_rows
from trimtab.files import atomic_write
from trimtab.models.base import LanguageModel
from trimtab.models.table import TableLM
from trimtab.train.rows import BATCH

__all__ = ["Bias", "fit_bias"]

RIDGES = (100.0, 30.0, 10.0, 3.0, 1.0)
"""Inverse variances of the prior, from strong to weak."""

ENTRIES = 1 << 27
"""Entries of the rows that are looked at: a quarter of a gigabyte in float16."""

CHUNK = 2048
"""Tokens whose softmax is computed at once."""


class Bias(NamedTuple):
    """What `product` at weight 1 decodes with."""

    logits: Tensor
    """b `[V]`, up to a constant."""
    proposal_temperature: float
    """1/a."""

    def aligner(self) -> TableLM:
        """The bias, normalised, as a language model that looks at no prefix."""
        return TableLM(self.logits)


def fit_bias(proposal: Path, training: Sequence[Example], development: Sequence[Example], path: Path) -> Bias:
    """Fit a bias to the wanted answers and save it at `path`; one that is there already is read."""
    if not path.exists():
        model = AlignedModel.from_pretrained(proposal, draft="none").proposal
        bias = _fit(*(_rows(model, part) for part in (training, development)))
        with atomic_write(path, "wb") as stream:
            stream.write(safetensors.torch.save({name: torch.as_tensor(value) for name, value in bias._asdict().items()}))
    saved = safetensors.torch.load_file(path)
    return Bias(saved["logits"], float(saved["proposal_temperature"]))


def _fit(training: tuple[Tensor, Tensor], development: tuple[Tensor, Tensor]) -> Bias:
    """From rows `[N, V]` and tokens `[N]` of each."""
    count = len(training[1])
    mean = torch.stack([rows.float().exp().sum(0) for rows in training[0].split(CHUNK)]).sum(0) / count
    exponent, logits = torch.ones(()), torch.zeros_like(mean)
    best, least = Bias(logits, 1.0), float("inf")
    for ridge in RIDGES:
        scale = (mean + ridge / count).rsqrt()  # the Hessian's diagonal is about 1 then
        exponent, scaled = _minimise(*training, exponent, logits / scale, scale, ridge / count)
        logits = scale * scaled
        nll = _nll(*development, exponent, scaled, scale)
        if nll > least:
            break
        best, least = Bias(logits, 1 / exponent.item()), nll
    return best


def _minimise(rows: Tensor, tokens: Tensor, exponent: Tensor, scaled: Tensor, scale: Tensor, ridge: float) -> list[Tensor]:
    """The exponent and b / `scale` with the least penalised loss, from a point near them."""
    point = [exponent.clone().requires_grad_(), scaled.clone().requires_grad_()]
    optimizer = torch.optim.LBFGS(point, max_iter=10, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        penalty = ridge / 2 * (scale * point[1]).square().sum()
        penalty.backward()
        return penalty.item() + _nll(rows, tokens, *point, scale)

    optimizer.step(loss)
    return [value.detach() for value in point]


def _nll(rows: Tensor, tokens: Tensor, exponent: Tensor, scaled: Tensor, scale: Tensor) -> float:
    """Mean over tokens; its gradient is added to what wants one."""
    total = 0.0
    for some, wanted in zip(rows.split(CHUNK), tokens.split(CHUNK), strict=True):
        logits = exponent * some.float() + scale * scaled
        part = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum") / len(tokens)
        if part.requires_grad:
            part.backward()
        total += part.item()
    return total


def _rows(model: LanguageModel, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """The proposal's rows `[N, V]` in float16 on wanted answers from all over the data, and their tokens `[N]`, on the CPU."""
    every = -(-sum(len(example.chosen) for example in examples) * model.vocab_size // ENTRIES)
    pairs = sorted(((example.prompt, example.chosen) for example in examples[::every]), key=lambda pair: sum(map(len, pair)))
    rows = torch.empty(sum(len(chosen) for _, chosen in pairs), model.vocab_size, dtype=torch.float16)
    tokens: list[int] = []
    for start in range(0, len(pairs), BATCH):
        for (some,), wanted, counts in completion_rows([model], pairs[start : start + BATCH]):
            for row, ids, count in zip(some, wanted, counts, strict=True):
                rows[len(tokens) : len(tokens) + count] = row[:count]
                tokens += ids[:count].tolist()
    return rows, torch.tensor(tokens)
