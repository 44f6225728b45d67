"""By how much more each aligner of a bank favours one answer than another, in nats: what users' weights are fitted on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.rules import Geometric, Product, Rule
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.pairs import Pair
from trimtab.decode.scoring import Score
from trimtab.errors import DataError, InvalidOption

__all__ = ["check_rule", "compared", "features_of"]


def check_rule(rule: Rule) -> None:
    """Refuse a rule under which weights do not multiply log-probabilities.

    Raises:
        InvalidOption: it is one.
    """
    if not isinstance(rule, (Product, Geometric)):
        raise InvalidOption(f"rule: weights are fitted for product and geometric, and not for '{rule}'")


def features_of(model: AlignedModel, pairs: Sequence[Pair], sources: Sequence[str]) -> Tensor:
    """F `[N, K]`: what a unit of each aligner's weight adds to the log-odds of two answers as wholes, in nats.

    Under `product` that is Σ log q_k over the tokens of the preferred answer minus the same of the other one; under
    `geometric`, where the proposal has what the weights leave it, Σ log q_k − log p̃. Decoding also divides each row by what it
    sums to, which this leaves out, as P ∝ P_M·Q over whole answers does.

    Args:
        model: the proposal with the bank; its own rule is the one that counts.
        pairs: token ids.
        sources: where each pair came from, for errors.

    Raises:
        InvalidOption: see `check_rule`.
        DataError: an aligner, or the proposal, can never say an answer.
    """
    rule = model.shaping(model.defaults).rule
    check_rule(rule)
    prompts = [list(pair.prompt) for pair in pairs for _ in range(2)]
    answers = [list(answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    found = compared(rule, model.score(prompts, answers) if pairs else [])
    if broken := (~found.isfinite()).any(-1).nonzero().flatten().tolist():
        raise DataError(f"{sources[broken[0]]}: a model can never say one of the answers, so they cannot be compared")
    return found


def compared(rule: Rule, scores: Sequence[Score]) -> Tensor:
    """F `[N, K]` from the scores of 2N answers with a rule's inputs, the preferred one of each pair first."""
    sums = torch.tensor([[sum(row) for row in score.inputs] for score in scores], dtype=torch.float64)
    sums = sums.reshape(len(scores) // 2, 2, -1)
    favoured = sums[..., 1:] - sums[..., :1] if isinstance(rule, Geometric) else sums[..., 1:]
    return favoured[:, 0] - favoured[:, 1]
