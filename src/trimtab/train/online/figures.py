"""What samples of the development prompts tell of a policy."""

from collections import defaultdict
from collections.abc import Sequence

from trimtab.train.online.rounds import Sample

__all__ = ["figures_of", "said_of"]


def figures_of(samples: Sequence[Sample], gain: float, beta: float, budget: float | None) -> dict[str, float]:
    """Figures of samples that were drawn at temperature 1.

    Args:
        samples: several of each prompt.
        gain: the mean of log P_θ(y) − log P_M(y), which estimates KL(P_θ‖P_M) in nats an answer.
        beta: β.
        budget: of that divergence.

    Returns:
        `reward`, `kl`, `kl_per_token`; `objective`, which is reward − β·KL, under a budget reward − β·(KL − budget): what the
        target maximises; `length` in tokens; `ended`, the share that came to its end; `distinct`, the share of a prompt's
        answers that no other one equals, for a policy that has collapsed says one thing; `scored`, the share with a reward.
    """
    scores = [sample.score for sample in samples if sample.score is not None]
    reward = sum(scores) / len(scores) if scores else 0.0
    length = sum(len(sample.tokens) for sample in samples) / len(samples)
    texts: dict[int, list[str]] = defaultdict(list)
    for sample in samples:
        texts[sample.place].append(sample.completion)
    alone = sum(some.count(text) == 1 for some in texts.values() for text in some)
    return {
        "reward": reward,
        "kl": gain,
        "kl_per_token": gain / length,
        "objective": reward - beta * (gain - (budget or 0.0)),
        "beta": beta,
        "length": length,
        "ended": sum(sample.finish_reason == "stop" for sample in samples) / len(samples),
        "distinct": alone / len(samples),
        "scored": len(scores) / len(samples),
    }


def said_of(samples: Sequence[Sample], beta: float) -> dict[str, float]:
    """What is logged of a round as it was drawn, at whatever temperatures: `reward`, `length` and `beta`."""
    scores = [sample.score for sample in samples if sample.score is not None]
    length = sum(len(sample.tokens) for sample in samples) / len(samples)
    return {"reward": sum(scores) / max(len(scores), 1), "length": length, "beta": beta}
