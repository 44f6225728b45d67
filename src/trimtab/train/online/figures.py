"""What samples of the development prompts tell of a policy."""

from collections import defaultdict
from collections.abc import Sequence

from trimtab.errors import ModelError
from trimtab.train.online.samples import Sample

__all__ = ["check_spread", "figures_of", "said_of"]

FARTHEST = 1e6
"""Nats that two answers to a prompt may be apart by their rewards."""


def figures_of(
    samples: Sequence[Sample],
    gain: float,
    beta: float,
    budget: float | None = None,
    before: float = 0.0,
    loss: float = 0.0,
) -> dict[str, float]:
    """Figures of samples that were drawn at temperature 1.

    Args:
        samples: several of each prompt.
        gain: the mean of log P_θ(y) − log P_M(y), which estimates KL(P_θ‖P_M) in nats an answer.
        beta: β.
        budget: of that divergence.
        before: the reward of the proposal's own answers to the same prompts.
        loss: of answers that have rewards.

    Returns:
        `reward`, `kl`, `kl_per_token`; `objective`, by which looks are compared: reward − β·KL, which the target maximises, or
        under a budget the reward, and of a policy that is beyond it the share of its gain that the budget is of its KL, for a
        lower weight reaches that much; `length` in tokens; `ended`, the share that came to its end; `distinct`, the share of a
        prompt's answers that no other one equals, for a policy that has collapsed says one thing; `scored`, the share with a
        reward; `loss`. Where no sample has a reward, there is no `reward`, and the objective is −loss.
    """
    scores = [sample.score for sample in samples if sample.score is not None]
    reward = sum(scores) / max(len(scores), 1)
    length = sum(len(sample.tokens) for sample in samples) / len(samples)
    texts: dict[int, list[str]] = defaultdict(list)
    for sample in samples:
        texts[sample.place].append(sample.completion)
    objective = reward - beta * gain
    if budget is not None:
        objective = before + (reward - before) * (1.0 if gain <= budget else budget / gain)
    if not scores:
        objective = -loss
    alone = sum(some.count(text) == 1 for some in texts.values() for text in some)
    return ({"reward": reward} if scores else {}) | {
        "kl": gain,
        "kl_per_token": gain / length,
        "objective": objective,
        "beta": beta,
        "length": length,
        "ended": sum(sample.finish_reason == "stop" for sample in samples) / len(samples),
        "distinct": alone / len(samples),
        "scored": len(scores) / len(samples),
        "loss": loss,
    }


def said_of(samples: Sequence[Sample], beta: float) -> dict[str, float]:
    """What is logged of a round as it was drawn, at whatever temperatures: `reward`, `length` and `beta`."""
    scores = [sample.score for sample in samples if sample.score is not None]
    length = sum(len(sample.tokens) for sample in samples) / len(samples)
    return {"reward": sum(scores) / max(len(scores), 1), "length": length, "beta": beta}


def check_spread(groups: Sequence[Sequence[Sample]], beta: float) -> None:
    """Refuse rewards that no gradient can be had of.

    Raises:
        ModelError: those of two answers to a prompt are too far apart.
    """
    for group in groups:
        scores = [sample.score for sample in group if sample.score is not None]
        if scores and max(scores) - min(scores) > FARTHEST * beta:
            raise ModelError(
                f"two answers to a prompt have rewards {min(scores):g} and {max(scores):g}, more than {FARTHEST:g} times beta"
                " apart: nothing can be learnt from that; let rewards be within a few times beta, or raise beta"
            )
