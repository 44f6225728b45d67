"""Score given completions: the exact log-probability of every token under proposal, aligners and aligned model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.decode.prefill import pad, prefill
from trimtab.decode.request import TokenLogprobs
from trimtab.decode.shaping import BatchShaping, Shaping
from trimtab.errors import DeadRow, InvalidOption
from trimtab.models.base import LanguageModel

__all__ = ["Score", "completion_rows", "score_tokens"]

ROW_BUDGET = 2**26
"""Numbers in the rows that one step may make for one model (256 MiB in float32)."""


@dataclass(frozen=True)
class Score(TokenLogprobs):
    """Log-probabilities of a given completion, token by token; −inf where a token is impossible.

    Attributes:
        tokens: the completion's ids, with the end of sequence where it was added.
        num_bytes: length of its text in UTF-8, or None where it was given as ids.
    """

    tokens: list[int]
    num_bytes: int | None = None


def score_tokens(
    proposal: LanguageModel,
    aligners: Sequence[LanguageModel],
    shaping: Shaping,
    pairs: Sequence[tuple[list[int], list[int]]],
) -> Iterator[TokenLogprobs]:
    """Score completions after their prompts, all in one batch.

    Args:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        shaping: how the aligned rows come about.
        pairs: prompt and completion, neither empty.

    Raises:
        InvalidOption: the rule has no row.
    """
    if not shaping.rule.has_row:
        raise InvalidOption(f"rule '{shaping.rule}' has no next-token row in closed form: it can sample, but not score")
    batch = BatchShaping([shaping] * len(pairs), proposal.device)
    columns: list[list[list[float]]] = [[[] for _ in range(len(aligners) + 2)] for _ in pairs]
    for rows, tokens, counts in completion_rows([proposal, *aligners], pairs):
        rows.append(batch.target(batch.inputs(rows[0], rows[1:])))
        values = torch.stack([gather(row, tokens) for row in rows], dim=1).tolist()
        for column, value, count in zip(columns, values, counts, strict=True):
            if any(math.isnan(number) for numbers in value for number in numbers[:count]):
                raise DeadRow(f"rule '{shaping.rule}' leaves no possible token, or a model gives NaN")
            for numbers, new in zip(column, value, strict=True):
                numbers += new[:count]
    for proposal_column, *aligner_columns, aligned in columns:
        yield TokenLogprobs(proposal_column, aligner_columns[0] if len(aligners) == 1 else aligner_columns, aligned)


def completion_rows(
    models: Sequence[LanguageModel], pairs: Sequence[tuple[list[int], list[int]]]
) -> Iterator[tuple[list[Tensor], Tensor, list[int]]]:
    """Each model's rows on completions after their prompts, in pieces of bounded size.

    Args:
        models: the first one's device is where all rows come out.
        pairs: prompt and completion, neither empty: B of them.

    Yields:
        For the next K tokens of every completion: one `[B, K, V]` for each model, the tokens `[B, K]`, and how many of the
        K each completion has.
    """
    device, vocab_size = models[0].device, models[0].vocab_size
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    states = [prefill(model, [prompt[:-1] for prompt, _ in pairs], longest) for model in models]
    inputs = [[prompt[-1], *completion[:-1]] for prompt, completion in pairs]
    width = max(1, ROW_BUDGET // (len(pairs) * vocab_size))
    for start in range(0, max(map(len, inputs)), width):
        chunks = [ids[start : start + width] for ids in inputs]
        counts = [len(chunk) for chunk in chunks]
        rows = [
            model.extend(state, pad(chunks, model.device), counts).to(device)
            for model, state in zip(models, states, strict=True)
        ]
        yield rows, pad([completion[start : start + width] for _, completion in pairs], device), counts
