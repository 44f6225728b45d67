"""Score given completions: the exact log-probability of every token under proposal, aligners and aligned model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from trimtab.core.logprobs import gather
from trimtab.decode.prefill import pad, prefill
from trimtab.decode.request import TokenLogprobs
from trimtab.decode.shaping import BatchShaping, Shaping
from trimtab.errors import InvalidOption
from trimtab.models.base import LanguageModel

__all__ = ["Score", "score_tokens"]

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
    models = [proposal, *aligners]
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    states = [prefill(model, [prompt[:-1] for prompt, _ in pairs], longest) for model in models]
    inputs = [[prompt[-1], *completion[:-1]] for prompt, completion in pairs]
    batch = BatchShaping([shaping] * len(pairs), proposal.device)
    width = max(1, ROW_BUDGET // (len(pairs) * proposal.vocab_size))
    columns: list[list[list[float]]] = [[[] for _ in [*models, "aligned"]] for _ in pairs]
    for start in range(0, max(map(len, inputs)), width):
        chunks = [ids[start : start + width] for ids in inputs]
        counts = [len(chunk) for chunk in chunks]
        tokens = pad([completion[start : start + width] for _, completion in pairs], proposal.device)
        rows = [
            model.extend(state, pad(chunks, model.device), counts).to(proposal.device)
            for model, state in zip(models, states, strict=True)
        ]
        rows.append(batch.target(batch.inputs(rows[0], rows[1:])))
        values = torch.stack([gather(row, tokens) for row in rows], dim=1).tolist()
        for column, value, count in zip(columns, values, counts, strict=True):
            for numbers, new in zip(column, value, strict=True):
                numbers += new[:count]
    for proposal_column, *aligner_columns, aligned in columns:
        yield TokenLogprobs(proposal_column, aligner_columns[0] if len(aligners) == 1 else aligner_columns, aligned)
