"""Score given completions: the exact log-probability of every token under proposal, aligners and aligned model."""

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.logprobs import gather, impossible
from trimtab.core.transfer import to_device
from trimtab.decode.history import Histories
from trimtab.decode.prefill import pad, prefill
from trimtab.decode.reading import extend_all
from trimtab.decode.request import TokenLogprobs
from trimtab.decode.shaping import BatchShaping, Contexts, Inputs, Shaping, explain_dead_row
from trimtab.errors import InvalidOption
from trimtab.models.base import LanguageModel

__all__ = ["Aligned", "Following", "Score", "by_length", "completion_rows", "score_in_steps", "score_tokens"]

ROW_BUDGET = 2**26
"""Numbers in the rows that one step may make for one model (256 MiB in float32)."""


@dataclass(frozen=True)
class Score(TokenLogprobs):
    """Log-probabilities of a given completion, token by token; −inf where a token is impossible.

    Attributes:
        tokens: the completion's ids, with the end of sequence where it was added.
        num_bytes: length of its text in UTF-8, or None where it was given as ids.
        inputs: log-probabilities as the rule sees them, after the warps of its inputs: the proposal's, then each aligner's.
        outside: of each aligner, its probability at each position of all tokens that the rule does not see in the proposal.
    """

    tokens: list[int] = field(kw_only=True)
    num_bytes: int | None = field(default=None, kw_only=True)
    inputs: list[list[float]] = field(default_factory=list, kw_only=True)
    outside: list[list[float]] = field(default_factory=list, kw_only=True)


def score_tokens(
    proposal: LanguageModel,
    aligners: Sequence[LanguageModel],
    shaping: Shaping,
    pairs: Sequence[tuple[list[int], list[int]]],
    places: Sequence[int],
) -> list[Score]:
    """Score completions after their prompts, all in one batch, with the rule's inputs; see `score_in_steps`."""
    steps = score_in_steps(proposal, aligners, shaping, pairs, places=places, inputs=True)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


def score_in_steps(
    proposal: LanguageModel,
    aligners: Sequence[LanguageModel],
    shaping: Shaping,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    top: int = 0,
    step: int | None = None,
    places: Sequence[int] | None = None,
    inputs: bool = False,
) -> Generator[None, None, list[Score]]:
    """Score completions after their prompts, all in one batch, piece by piece: the scores are the generator's return value.

    Args:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        shaping: how the aligned rows come about.
        pairs: prompt and completion, neither empty.
        top: how many of the best tokens to return for each position.
        step: the most tokens of a completion to score before yielding.
        places: the completions' numbers, for errors; None where the user knows of none.
        inputs: whether to return `Score.inputs` and `Score.outside`, too.

    Raises:
        InvalidOption: the rule has no row.
        DeadRow: a row on the way is NaN or has no mass.
    """
    if not shaping.rule.has_row:
        raise InvalidOption(f"rule '{shaping.rule}' has no next-token row in closed form: it can sample, but not score")
    following = Following(shaping, [prompt for prompt, _ in pairs], proposal.device)
    said, more = len(aligners) + 2, (2 * len(aligners) + 1) * inputs
    columns: list[list[list[float]]] = [[[] for _ in range(said + more)] for _ in pairs]
    tops: list[list[list[list[tuple[int, float]]]]] = [[[], []] for _ in pairs]
    for rows, tokens, counts in completion_rows([proposal, *aligners], pairs, step):
        aligned = following.align(rows, tokens, counts)
        rows.append(aligned.target)
        found = [gather(row, tokens) for row in rows] + (_of_inputs(aligned.inputs, tokens) if inputs else [])
        values = torch.stack(found, dim=1).tolist()
        for i, (column, value, count) in enumerate(zip(columns, values, counts, strict=True)):
            dead = [j for j in range(count) if any(math.isnan(numbers[j]) for numbers in value[:said])]
            if dead:
                where = f"after {len(column[0]) + dead[0]} tokens"
                where += "" if places is None else f" of completions[{places[i]}]"
                raise explain_dead_row(shaping, [row[i, dead[0]] for row in rows], where)
            for numbers, new in zip(column, value, strict=True):
                numbers += new[:count]
        for i, row in enumerate((rows[0], rows[-1]) if top else ()):
            best, ids = (part.tolist() for part in row.topk(min(top, row.shape[-1]), dim=-1))
            for mine, values, names, count in zip(tops, best, ids, counts, strict=True):
                mine[i] += [list(zip(*pair, strict=True)) for pair in zip(names[:count], values[:count], strict=True)]
        yield
    scores = []
    for column, best, (_, completion) in zip(columns, tops, pairs, strict=True):
        (p, *q, combined), rest = column[:said], column[said:]
        logprobs = (p, q[0] if len(aligners) == 1 else q, combined, *(best if top else ()))
        scores.append(Score(*logprobs, tokens=completion, inputs=rest[: said - 1], outside=rest[said - 1 :]))
    return scores


def _of_inputs(inputs: Inputs, tokens: Tensor) -> list[Tensor]:
    """Of tokens `[B, K]`, the log-probabilities that the rule sees, and each aligner's mass where it sees none of p̃."""
    logp, logqs = inputs
    unseen = impossible(logp)
    return [gather(row, tokens) for row in (logp, *logqs)] + [torch.where(unseen, q.exp(), 0.0).sum(-1) for q in logqs]


class Aligned(NamedTuple):
    """What the aligners make of a piece of given completions; all rows are `[B, K, V]`."""

    inputs: Inputs
    """The rule's."""
    contexts: Contexts
    """Of the rule, if it looks back."""
    target: Tensor
    """The aligned rows."""


class Following:
    """Aligned rows on given completions, piece by piece, as `completion_rows` yields them.

    Args:
        shaping: how the aligned rows come about.
        prompts: ids.
        device: where rows are.
    """

    def __init__(self, shaping: Shaping, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self._batch = BatchShaping([shaping] * len(prompts), device)
        self._histories = Histories(self._batch.members, prompts, device)

    def align(self, rows: Sequence[Tensor], tokens: Tensor, counts: Sequence[int]) -> Aligned:
        """The next piece of each text.

        Args:
            rows: the proposal's, and each aligner's.
            tokens: `[B, K]` of the completions.
            counts: how many of the K each has.
        """
        inputs = self._batch.inputs(rows[0], rows[1:])
        contexts = self._histories.contexts(inputs[0], tokens[:, :-1])
        if contexts:
            self._histories.move_on(contexts, inputs[0], tokens, to_device(counts, tokens.device))
        return Aligned(inputs, contexts, self._batch.target(inputs, contexts))


def by_length(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """The places of texts in batches of at most so many, alike in length: a batch is padded to its longest.

    The longest come first, for what is too large then fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), most):
        yield order[start : start + most]


def completion_rows(
    models: Sequence[LanguageModel],
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    step: int | None = None,
    shared: int = 0,
) -> Iterator[tuple[list[Tensor], Tensor, list[int]]]:
    """Each model's rows on completions after their prompts, in pieces of bounded size.

    Args:
        models: the first one's device is where all rows come out; it is the proposal, if heads are among them.
        pairs: prompt and completion, neither empty: B of them.
        step: the most tokens K of a completion in one piece.
        shared: how many tokens all prompts begin with, fewer than any has, that are to be read once.

    Yields:
        For the next K tokens of every completion: one `[B, K, V]` for each model, the tokens `[B, K]`, and how many of the
        K each completion has.
    """
    device, vocab_size = models[0].device, models[0].vocab_size
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    states = prefill(models, [prompt[:-1] for prompt, _ in pairs], longest, shared)
    inputs = [[prompt[-1], *completion[:-1]] for prompt, completion in pairs]
    width = min(max(1, ROW_BUDGET // (len(pairs) * vocab_size)), step or ROW_BUDGET)
    for start in range(0, max(map(len, inputs)), width):
        chunks = [ids[start : start + width] for ids in inputs]
        counts = [len(chunk) for chunk in chunks]
        rows = extend_all(models, states, pad(chunks, device), counts)
        yield rows, pad([completion[start : start + width] for _, completion in pairs], device), counts
