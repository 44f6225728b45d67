"""How far the aligners move the proposal, measured exactly on the rows of given answers: KL, entropy, log Z, influence."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import entropy, gather, kl_divergence
from trimtab.data.prompts import Prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.decode.scoring import Following, by_length, completion_rows
from trimtab.decode.shaping import Shaping, explain_dead_row
from trimtab.decode.text import TextStream
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate.intervals import ratio_interval

__all__ = ["Trace", "pieces", "summarise", "trace"]


@dataclass(frozen=True)
class Trace:
    """What happens at each of the T tokens of a completion, in nats. The aligned row is the rule's, its inputs warped.

    Attributes:
        tokens: the completion's ids, with the end of sequence where it was added.
        proposal: log-probability of the token under the proposal as it is: temperature 1, no truncation.
        aligned: under the aligned row; −inf where the rule forbids the token.
        kl: KL(aligned row ‖ proposal's row as it is), the exact sum over the vocabulary, never below 0.
        entropy: of the aligned row.
        log_z: log of the mass by which the rule divides, see `Rule.log_z`: for `product` log Σ p̃ Π q_i^λ_i. None without
            aligners, and for rules that have no one normaliser: `kl_gate`, and `nucleus(force_eos=True)`.
    """

    tokens: list[int]
    proposal: list[float]
    aligned: list[float]
    kl: list[float]
    entropy: list[float]
    log_z: list[float] | None

    @property
    def influence(self) -> list[float]:
        """`aligned` − `proposal` of each token. −inf where only the rule forbids it; 0 where the proposal already does."""
        return [0.0 if p == -math.inf else a - p for a, p in zip(self.aligned, self.proposal, strict=True)]


def trace(
    model: AlignedModel, prompts: Prompt | Iterable[Prompt], completions: Any, params: SamplingParams | None = None
) -> list[Trace]:
    """What the aligners do at each token of given completions.

    For completions y drawn from the aligned model P itself, Σ_t KL_t is an unbiased estimate of the sequence-level KL(P‖P_M),
    and the Rao–Blackwellised one: the plain estimate Σ_t log P(y_t)/P_M(y_t) with each term replaced by its mean given the
    prefix, so it is never negative, and no single term varies more (Amini, Vieira and Cotterell, "Better Estimation of the KL
    Divergence Between Language Models", arXiv 2504.10637). "Drawn from P" means at temperature 1 with the knobs after the rule
    off, and passed on as token ids: a text would be tokenized again, and get an end of sequence even where the length limit
    cut it. On other completions the sum describes those texts and estimates nothing.

    Args:
        model: the models.
        prompts: as in `AlignedModel.score`.
        completions: as in `AlignedModel.score`: one for each prompt, a text or a message, to which the end of sequence is
            added and counted, or token ids, taken as they are.
        params: `rule`, `weight` and the warps of the rule's inputs are taken from it; sampling knobs play no part.

    Raises:
        InvalidRequest: a pair cannot be scored; nothing has been computed then.
        InvalidOption: the rule has no closed form.
        DeadRow: a distribution is NaN or has no mass.
    """
    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidRequest(f"params must be SamplingParams, not {params!r}")
    pairs = [(prompt, completion) for prompt, completion, _ in model.encode_pairs(prompts, completions)]
    shaping = model.shaping(params or model.defaults)
    if not shaping.rule.has_row:
        raise InvalidOption(f"rule '{shaping.rule}' has no next-token row in closed form: it can sample, but not score")
    traces: dict[int, Trace] = {}
    for batch in by_length([len(prompt) + len(completion) for prompt, completion in pairs], model.max_num_seqs):
        traces |= zip(batch, _trace_batch(model, shaping, [pairs[i] for i in batch], batch), strict=True)
    return [traces[i] for i in range(len(pairs))]


def summarise(traces: Sequence[Trace]) -> dict[str, Any]:
    """Means of traces for a report: every number is finite or None.

    Args:
        traces: one for each prompt, for the intervals resample them as prompts.

    Returns:
        `sequences` and `tokens`; `kl_per_token` and `kl_per_sequence` in nats, each with a 95 % bootstrap interval over
        prompts as `…_interval`, which is None for fewer than two; `log_z_mean` and `log_z_std` over tokens, None where the
        rule has no log Z; `entropy`, the mean over tokens; `influence`, the mean of |log aligned − log proposal| over the
        tokens that are possible under the rule; `impossible_tokens`, how many are not.
    """
    tokens = sum(len(t.tokens) for t in traces)
    kl = torch.tensor([math.fsum(t.kl) for t in traces], dtype=torch.float64)
    sizes = torch.tensor([len(t.tokens) for t in traces], dtype=torch.float64)
    log_z = [] if any(t.log_z is None for t in traces) else [value for t in traces for value in t.log_z or ()]
    influences = [abs(i) for t in traces for i, a in zip(t.influence, t.aligned, strict=True) if a > -math.inf]
    log_z_mean = _mean(log_z)
    return {
        "sequences": len(traces),
        "tokens": tokens,
        **_ratio("kl_per_token", kl, sizes),
        **_ratio("kl_per_sequence", kl, torch.ones_like(sizes)),
        "log_z_mean": log_z_mean,
        "log_z_std": None if log_z_mean is None else math.sqrt(_mean([(z - log_z_mean) ** 2 for z in log_z]) or 0.0),
        "entropy": _mean([value for t in traces for value in t.entropy]),
        "influence": _mean(influences),
        "impossible_tokens": tokens - len(influences),
    }


def pieces(
    tokenizer: Any, ids: Sequence[int], influences: Sequence[float], prompt: Sequence[int] = ()
) -> list[tuple[str, float]]:
    """A completion's tokens as pieces of text for a coloured report, each with its influence.

    The texts join to the completion's text, see `trimtab.decode.text.TextStream`. A character spread over several
    tokens is the text of its last one, and the earlier ones have "", as have the end of sequence and other special tokens.
    Bytes that never become a character are shown by the last token that is not special.

    Args:
        tokenizer: a transformers tokenizer.
        ids: the completion.
        influences: one for each, see `Trace.influence`.
        prompt: ids whose text the completion goes on with; empty after a chat.
    """
    special = set(tokenizer.all_special_ids)
    stream = TextStream(tokenizer, prompt=prompt)
    texts = [""] * len(ids)
    last = 0
    for i, token in enumerate(ids):
        last = last if token in special else i
        texts[last] += stream.push(token)
    if texts:
        texts[last] += stream.close()
    return list(zip(texts, influences, strict=True))


def _trace_batch(
    model: AlignedModel, shaping: Shaping, pairs: Sequence[tuple[list[int], list[int]]], places: Sequence[int]
) -> list[Trace]:
    """Traces of completions that fit into one batch; errors name them by their places. It waits for the device once a piece."""
    device = model.proposal.device
    following = Following(shaping, [prompt for prompt, _ in pairs], device)
    weights = torch.tensor(shaping.weights, dtype=torch.float64, device=device)
    has_log_z = shaping.rule.weighs_tokens and bool(model.aligners)
    names = ["proposal", "aligned", "kl", "entropy"] + ["log_z"] * has_log_z
    columns: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in pairs]
    for rows, tokens, counts in completion_rows([model.proposal, *model.aligners_of(shaping)], pairs):
        inputs, contexts, aligned = following.align(rows, tokens, counts)
        # Rounding may put the KL of equal rows a hair below 0.
        values = [
            gather(rows[0], tokens),
            gather(aligned, tokens),
            kl_divergence(aligned, rows[0]).clamp(min=0),
            entropy(aligned),
        ]
        if has_log_z:
            seen = shaping.rule.seen(contexts.get(shaping.rule))
            values.append(shaping.rule.log_z(*inputs, weights.to(aligned.dtype), **seen))
        for i, (column, mine, count) in enumerate(zip(columns, torch.stack(values, dim=1).tolist(), counts, strict=True)):
            for name, numbers in zip(names, mine, strict=True):
                dead = [j for j in range(count) if math.isnan(numbers[j])]
                if dead:
                    where = f"after {len(column[name]) + dead[0]} tokens of completions[{places[i]}]"
                    raise explain_dead_row(shaping, [row[i, dead[0]] for row in rows], where)
                column[name] += numbers[:count]
    return [
        Trace(completion, c["proposal"], c["aligned"], c["kl"], c["entropy"], c.get("log_z"))
        for (_, completion), c in zip(pairs, columns, strict=True)
    ]


def _ratio(name: str, totals: Tensor, sizes: Tensor) -> dict[str, Any]:
    """Σ totals / Σ sizes under its name, and its interval; None where they are not finite or there is too little."""
    finite = len(totals) > 0 and bool(totals.isfinite().all())
    interval = list(ratio_interval(totals, sizes)) if finite and len(totals) > 1 else None
    return {name: float(totals.sum() / sizes.sum()) if finite else None, f"{name}_interval": interval}


def _mean(values: Sequence[float]) -> float | None:
    """The mean, or None if there is none or it is not finite."""
    total = sum(values)
    return total / len(values) if values and math.isfinite(total) else None
