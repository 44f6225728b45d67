"""Held-out negative log-likelihood, per token and per byte."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch

from trimtab.core.rules import Mixture
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.scoring import Score
from trimtab.errors import DataError, DeadRow, InvalidRequest
from trimtab.evaluate.intervals import ratio_interval
from trimtab.evaluate.ratios import Ratios

__all__ = ["held_out"]

logger = logging.getLogger(__name__)

BATCHES = 8
"""Scored together: texts of like length share one, so that there is little padding."""


def held_out(
    model: AlignedModel,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    sources: Sequence[str],
    params: SamplingParams | None = None,
) -> dict[str, Any]:
    """Mean negative log-likelihood of completions under proposal, aligner and aligned model.

    Args:
        model: the models.
        prompts: as in `AlignedModel.score`.
        completions: texts or messages, one for each prompt.
        sources: where each pair came from, for errors.
        params: rule, weight and warps, as in `AlignedModel.score`.

    Returns:
        `tokens` and `sequences`; `nll`, nats per completion token with the end of sequence counted, for `proposal`,
        `aligner` (a list if there are several, left out if there is none) and `aligned`; `nll_per_byte`, nats per byte of
        the completions' text; `gain`, by how many nats per token the aligned model is below the proposal;
        `impossible_tokens`, how many have no probability under the rule, and with any of them the aligned figures are None,
        for they are infinite. `nll_interval` and `gain_interval` are 95 % bootstrap intervals over the sequences, None for
        fewer than two. With aligners also what `trimtab.evaluate.ratios` reports: `likelihood_ratio` of each, and more.
        `failed` is how many sequences have a dead row on their way, so that they have no likelihood: they
        are left out of everything else, and named in the log.

    Raises:
        DataError: a pair cannot be scored; the message names its source, and nothing has been computed then.
        DeadRow: none has a likelihood.
    """
    _check(model, prompts, completions, sources)
    shaping = model.shaping(params or model.defaults)
    read = len(model.aligners_of(shaping))
    ratios = Ratios(read, solves=isinstance(shaping.rule, Mixture))
    sums: list[list[float]] = []
    sizes: list[int] = []
    num_bytes = impossible = 0
    dead: list[DeadRow] = []
    size = BATCHES * model.max_num_seqs
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        scores, died = _score(model, prompts[part], completions[part], sources[part], params)
        dead += died
        for score in scores:
            aligners = [score.aligner] if read == 1 else score.aligner
            columns: list[Any] = [score.proposal, *aligners, score.aligned]
            sums.append([math.fsum(column) for column in columns])
            sizes.append(len(score.tokens))
            num_bytes += score.num_bytes or 0
            impossible += sum(value == -math.inf for value in score.aligned)
            if read:
                ratios.add(score)
        logger.info("scored %d of %d", min(start + size, len(prompts)), len(prompts))
    if not sums and dead:
        raise dead[0]
    columns = [list(column) for column in zip(*sums, strict=True)]
    totals = [math.fsum(column) for column in columns]
    gains = [aligned - proposal for proposal, *_, aligned in sums]
    tokens = sum(sizes)
    return {
        "tokens": tokens,
        "sequences": len(sums),
        "failed": len(dead),
        "nll": _by_model([_ratio(total, tokens) for total in totals]),
        "nll_interval": _by_model([_interval(column, sizes) for column in columns]),
        "nll_per_byte": _by_model([_ratio(total, num_bytes) for total in totals]),
        "gain": None if impossible else math.fsum(gains) / tokens,
        "gain_interval": _interval([-gain for gain in gains], sizes),
        "impossible_tokens": impossible,
        **(ratios.report() if read else {}),
    }


def _score(
    model: AlignedModel,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    sources: Sequence[str],
    params: SamplingParams | None,
) -> tuple[list[Score], list[DeadRow]]:
    """The scores of a batch, and what is wrong with those that have none: they are found by scoring one by one."""
    try:
        return model.score(list(prompts), list(completions), params), []
    except DeadRow:
        scores, dead = [], []
    for prompt, completion, source in zip(prompts, completions, sources, strict=True):
        try:
            scores += model.score([prompt], [completion], params)
        except DeadRow as error:
            dead.append(DeadRow(f"{source}: {error}"))
            logger.warning("%s is left out: %s", source, error)
    return scores, dead


def _by_model(figures: list[Any]) -> dict[str, Any]:
    """Figures of proposal, aligners and aligned model under their names."""
    proposal, *several, aligned = figures
    aligner = {} if not several else {"aligner": several[0] if len(several) == 1 else several}
    return {"proposal": proposal, **aligner, "aligned": aligned}


def _ratio(total: float, size: int) -> float | None:
    return -total / size if size and total > -math.inf else None


def _interval(totals: Sequence[float], sizes: Sequence[int]) -> list[float] | None:
    """Of −Σ totals / Σ sizes."""
    if len(totals) < 2 or not all(map(math.isfinite, totals)):
        return None
    return list(ratio_interval(-torch.tensor(totals, dtype=torch.float64), torch.tensor(sizes)))


def _check(model: AlignedModel, prompts: Sequence[Any], completions: Sequence[Any], sources: Sequence[str]) -> None:
    """Refuse a pair that cannot be scored, naming where it came from, before any is."""
    for prompt, completion, source in zip(prompts, completions, sources, strict=True):
        try:
            model.check_pair(prompt, completion)
        except InvalidRequest as error:
            raise DataError(f"{source}: {error}") from error
