"""Ways to decode that a study compares, the strength of each as one number, and what it says and how it scores."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.objectives import acceptance as agreement
from trimtab.data.examples import Example
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.scoring import Following, completion_rows
from trimtab.evaluate.distribution import Trace, trace
from trimtab.models.aligner import MANIFEST_NAME

__all__ = ["Samples", "System", "acceptance", "from_folder", "nll", "sample"]

BATCH = 64
"""Completions at once."""


class System(NamedTuple):
    """A frozen proposal, who steers it, and how it is set."""

    proposal: Path
    aligners: tuple[Any, ...] = ()
    """Folders, or loaded models."""
    rule: str = "product"
    weights: tuple[float, ...] = ()
    proposal_temperature: float = 1.0
    aligner_temperature: float = 1.0
    proposal_top_p: float = 1.0

    def at(self, strength: float) -> "System":
        """The same, moved from the bare proposal (0) to itself (1) or beyond: exponents are scaled by as much."""
        exponent = 1 + strength * (1 / self.proposal_temperature - 1)
        return self._replace(weights=tuple(strength * w for w in self.weights), proposal_temperature=1 / exponent)

    def open(self) -> AlignedModel:
        """Load it."""
        named = {"rule": self.rule} if self.aligners else {}
        return AlignedModel.from_pretrained(
            self.proposal, list(self.aligners), draft="none", num_speculative_tokens=0, max_num_seqs=BATCH, **named
        )

    @property
    def params(self) -> SamplingParams:
        """What a request says."""
        return SamplingParams(
            weight=self.weights if self.aligners else None,
            proposal_temperature=self.proposal_temperature,
            aligner_temperature=self.aligner_temperature,
            proposal_top_p=self.proposal_top_p,
        )


class Samples(NamedTuple):
    """What a system says."""

    tokens: list[list[int]]
    """n answers to each prompt in turn, with the end of sequence where it was drawn."""
    kl: Tensor
    """`[answers]` nats from the proposal as it is, summed over each answer's tokens: unbiased for the sequence-level KL."""
    seconds: float


def from_folder(proposal: Path, aligner: Path) -> System:
    """An aligner as its manifest says, at weight 1."""
    manifest = json.loads((aligner / MANIFEST_NAME).read_text(encoding="utf-8"))
    temperatures = [manifest[name] for name in ("proposal_temperature", "aligner_temperature")]
    return System(proposal, (aligner,), "product", (1.0,), *temperatures)


def nll(system: System, examples: list[Example]) -> Tensor:
    """Negative log-likelihood of each wanted answer in nats: `[examples]` float64."""
    scores = system.open().score([e.prompt for e in examples], [e.chosen for e in examples], system.params)
    return -torch.tensor([sum(score.aligned) for score in scores], dtype=torch.float64)


def sample(system: System, prompts: list[list[int]], *, n: int, max_tokens: int, seed: int) -> Samples:
    """Draw n answers to each prompt, and measure how far they are from the proposal."""
    model, started = system.open(), time.monotonic()
    first = dataclasses.replace(system.params, n=n, max_tokens=max_tokens)
    params = [dataclasses.replace(first, seed=1_000_000 * seed + i) for i in range(len(prompts))]  # else they share their noise
    tokens = [list(one.tokens) for one in model.generate(prompts, params)]
    seconds = time.monotonic() - started
    traces: list[Trace] = trace(model, [prompt for prompt in prompts for _ in range(n)], tokens, system.params)
    return Samples(tokens, torch.tensor([sum(one.kl) for one in traces], dtype=torch.float64), seconds)


@torch.no_grad()
def acceptance(system: System, drafter: Path, prompts: list[list[int]], answers: list[list[int]]) -> float:
    """The share of a model's drafts that would be accepted, averaged over the positions of a system's own answers."""
    model, draft = system.open(), AlignedModel.from_pretrained(drafter, draft="none").proposal
    shaping, kept, tokens = model.shaping(system.params), 0.0, 0
    for start in range(0, len(prompts), BATCH):
        pairs = list(zip(prompts[start : start + BATCH], answers[start : start + BATCH], strict=True))
        following = Following(shaping, [prompt for prompt, _ in pairs], model.proposal.device)
        for rows, given, counts in completion_rows([model.proposal, *model.aligners, draft], pairs):
            target = following.align(rows[:-1], given, counts).target
            found = agreement(target, rows[-1])
            kept += sum(float(found[i, :count].sum()) for i, count in enumerate(counts))
            tokens += sum(counts)
    return kept / tokens
