"""The weight of a finished aligner under `geometric`, tuned on whole rows of proposal and aligner.

Cached rows spread what is behind their best entries evenly. Σ p^(1−w)·q^w over such a tail is far too small where q prefers
the tail tokens that p prefers, so weights between 0 and 1 look better than they are. The proposal is loaded once more for it,
as for the samples, after the trainer is gone.
"""

import gc
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, kl_divergence, warp
from trimtab.core.objectives import likelihood
from trimtab.data.examples import Example
from trimtab.decode.scoring import by_length, completion_rows
from trimtab.files import finite
from trimtab.models.aligner import rewrite_manifest
from trimtab.train.checks import warn_of_weight
from trimtab.train.plan import Plan
from trimtab.train.samples import open_aligned
from trimtab.train.tune import Look, tune_weight

__all__ = ["tune_on_whole_rows"]

logger = logging.getLogger(__name__)

BATCH = 8
"""Examples of like length whose rows are made together."""


@torch.inference_mode()
def tune_on_whole_rows(plan: Plan, output: Path, tokenizer: Any, development: Sequence[Example]) -> dict[str, Any]:
    """Tune the weight of the aligner in the output folder, and write it into its manifest.

    Returns:
        What `training.json` says of it: `weight`, `weights_tried`, `kl` at the weight, and `tuned_on`.
    """
    gc.collect()  # a trainer is a ring of references, and holds its optimizer's state until it is collected
    logger.info("tuning the weight on whole rows of the proposal")
    model = open_aligned(plan, output, tokenizer)
    pairs = [(example.prompt, example.chosen) for example in development]
    both = [model.proposal, *model.aligners]

    def losses() -> Iterator[Look]:
        for batch in by_length([len(prompt) + len(answer) for prompt, answer in pairs], BATCH):
            for rows, tokens, counts in completion_rows(both, [pairs[i] for i in batch]):
                there = torch.arange(tokens.shape[1]) < torch.tensor(counts)[:, None]
                index = there.flatten().nonzero().squeeze(-1).to(tokens.device)
                logp, logq = (
                    warp(one.flatten(0, 1).index_select(0, index), Warp(temperature))
                    for one, temperature in zip(rows, plan.temperatures, strict=True)
                )
                often = torch.tensor([development[i].weight for i in batch])[:, None].expand(there.shape)[there]
                yield Look(partial(_at, plan, logp, logq, tokens.flatten().index_select(0, index)), often.to(tokens.device))

    tuned = tune_weight(plan.rule, losses, max_kl=plan.asked.max_kl)
    warn_of_weight(plan, tuned)
    rewrite_manifest(output, weight=tuned.weight)
    return dict(finite({"weight": tuned.weight, "weights_tried": tuned.tried, "kl": tuned.kl, "tuned_on": "whole rows"}))


def _at(plan: Plan, logp: Tensor, logq: Tensor, tokens: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """What `tune_weight` asks of rows `[n, V]`, at a weight."""
    rule = plan.rule
    aligned = rule.target(logp, [logq], logp.new_tensor([weight]))
    return likelihood(rule, logp, logq, weight, tokens), kl_divergence(aligned, logp)
