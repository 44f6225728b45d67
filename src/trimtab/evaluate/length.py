"""Length control: what the win rate would be if both answers were equally long.

Judges like long answers. AlpacaEval 2 therefore predicts each preference with a logistic model of who wrote the answers, how
hard the instruction is, and the difference in length, and reports its prediction at no difference (Dubois et al., "Length-
Controlled AlpacaEval", 2024). That model needs a table of difficulties, which exists for one set of 805 instructions and one
baseline. `length_only_fit` does without the difficulty:

    logit P(second wins) = θ + φ·tanh((length_1 − length_2) / σ)        controlled win rate = 1 / (1 + exp(−θ))

with σ the standard deviation of the differences. A model whose answers are nearly all shorter says little about φ, so both
methods regularise it. AlpacaEval adds its judge's preferences between its baseline and the same model told to be brief or
verbose, which weigh a fifth of what is judged. Here, as other judges have other tastes, pairs between which the judge does not
care are added, one longer by σ for one that is shorter, of the same weight. The two rank models alike
(benchmarks/RESULTS.md), but they are not the same number, so a report names the one it used.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import InvalidOption
from trimtab.evaluate.alpaca import Annotation
from trimtab.evaluate.intervals import bootstrap
from trimtab.extras import how_to_install

__all__ = ["LENGTH_CONTROLS", "LengthControl", "control_length", "length_only_fit", "why_not_alpaca_eval"]

logger = logging.getLogger(__name__)

LENGTH_CONTROLS = ("auto", "alpaca_eval", "length-only fit")
RIDGE = 0.01
"""Keeps the fit finite where one side always wins: a Gaussian prior on θ with a standard deviation of 10."""

PULL = 0.2
"""What the added pairs weigh for each judged one: AlpacaEval's `regularize_to_baseline_lambda`."""

STEPS, LONGEST_STEP = 50, 2.0
ALPACA_BASELINES = ("gpt4_1106_preview", "gpt-4-1106-preview")
ALPACA_INSTRUCTIONS = 805
TABLE = ("tatsu-lab/alpaca_eval", "df_gamed.csv")
"""Where AlpacaEval keeps its difficulties: a data set on the hub, and the file."""


class LengthControl(NamedTuple):
    """A win rate at equal length.

    Attributes:
        win_rate: percent.
        interval: 95 %, over prompts; None from `alpaca_eval`, which gives none, and where there is no spread to see.
        by: `"alpaca_eval"` or `"length-only fit"`.
    """

    win_rate: float
    interval: tuple[float, float] | None
    by: str


def control_length(annotations: Sequence[Annotation], how: str = "auto", *, seed: int = 0) -> LengthControl:
    """The length-controlled win rate of the second generator.

    Args:
        annotations: of one generator against one baseline; those without a preference are left out.
        how: `"length-only fit"`, `"alpaca_eval"`, or `"auto"`: AlpacaEval's own code if that is installed, these are its 805
            instructions judged against its baseline, and its table of difficulties can be had; the fit otherwise.
        seed: for the interval.

    Raises:
        InvalidOption: `"alpaca_eval"` is asked for and cannot be.
    """
    if how not in LENGTH_CONTROLS:
        raise InvalidOption(f"length_control must be one of {', '.join(LENGTH_CONTROLS)}, not '{how}'")
    if how != "length-only fit":
        problem = why_not_alpaca_eval(annotations)
        if not problem:
            return LengthControl(_by_alpaca_eval(annotations), None, "alpaca_eval")
        if how == "alpaca_eval":
            raise InvalidOption(f"length_control alpaca_eval: {problem}")
        if _is_alpaca_eval(annotations):
            logger.info("length control by a length-only fit: %s", problem)
    judged = [a for a in annotations if a.preference is not None]
    wins = torch.tensor([a.preference for a in judged], dtype=torch.float64) - 1
    delta = torch.tensor([float(len(a.output_1) - len(a.output_2)) for a in judged], dtype=torch.float64)
    rate, interval = length_only_fit(wins, delta, seed=seed)
    return LengthControl(rate, interval, "length-only fit")


def length_only_fit(wins: Tensor, delta: Tensor, *, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Win rate at equal length, in percent, and its 95 % bootstrap interval.

    The interval says how much the figure varies with the prompts. It does not make up for the regularisation, which draws the
    figure towards the raw win rate where one side's answers are nearly all longer. It is None where resampling cannot show any
    spread: for a single prompt, and where one side has won every time.

    Args:
        wins: `[N]`, 0 to 1, how strongly the second answer is preferred.
        delta: `[N]`, length of the first answer minus that of the second.
        seed: for the interval.
    """
    wins, delta = wins.double(), delta.double()
    spread = delta.std() if len(delta) > 1 else torch.zeros(())
    x = torch.tanh(delta / spread) if spread > 0 else torch.zeros_like(delta)
    start = _logistic(x[None], wins[None], wins.new_zeros(1, 2))
    if len(wins) < 2 or (wins[0] in (0, 1) and bool((wins == wins[0]).all())):
        return 100 * start[0, 0].sigmoid().item(), None
    low, high = bootstrap(len(wins), lambda chosen: 100 * _logistic(x[chosen], wins[chosen], start)[:, 0].sigmoid(), seed=seed)
    return 100 * start[0, 0].sigmoid().item(), (low, high)


def _logistic(x: Tensor, y: Tensor, start: Tensor) -> Tensor:
    """Newton's method for logit y = θ + φ·x, regularised, for R samples at once: θ and φ `[R, 2]` from x and y `[R, N]`.

    The added pairs have no θ. There are no more of them than AlpacaEval has, so that many judgements outweigh them.
    """
    beta = start.expand(len(x), 2).clone()
    pull, far = PULL * min(x.shape[1], ALPACA_INSTRUCTIONS), math.tanh(1.0)
    for _ in range(STEPS):
        p = torch.sigmoid(beta[:, :1] + beta[:, 1:] * x)
        slack, weight = y - p, p * (1 - p)
        even = torch.sigmoid(beta[:, 1] * far)
        gradient = torch.stack([slack.sum(1) - RIDGE * beta[:, 0], (slack * x).sum(1) + pull * far * (0.5 - even)], 1)
        a, b = weight.sum(1) + RIDGE, (weight * x).sum(1)
        c = (weight * x * x).sum(1) + pull * far * far * even * (1 - even)
        step = torch.stack([c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], 1)
        step /= (a * c - b * b)[:, None]
        beta += step * (LONGEST_STEP / step.norm(dim=1, keepdim=True).clamp(min=LONGEST_STEP))
        if step.abs().max() < 1e-8:
            break
    return beta


def why_not_alpaca_eval(annotations: Sequence[Annotation]) -> str:
    """What keeps AlpacaEval's own model from being used; empty if nothing does."""
    if not _is_alpaca_eval(annotations):
        return f"AlpacaEval's difficulties are for its own {ALPACA_INSTRUCTIONS} instructions against {ALPACA_BASELINES[0]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pkg_resources, which it imports, is deprecated
            import alpaca_eval  # noqa: F401
    except ImportError as error:
        return f"alpaca_eval cannot be imported ({error}): {how_to_install('eval')}"
    return "" if _table_can_be_had() else f"{TABLE[1]} of {TABLE[0]} is not in the hub's cache, and the hub does not answer"


def _is_alpaca_eval(annotations: Sequence[Annotation]) -> bool:
    baselines = {a.generator_1 for a in annotations}
    return baselines <= set(ALPACA_BASELINES) and len(annotations) == ALPACA_INSTRUCTIONS


def _table_can_be_had() -> bool:
    """Whether AlpacaEval's download will work; asked once, since it would itself try for a long time."""
    import huggingface_hub
    from huggingface_hub.utils import get_session

    if isinstance(huggingface_hub.try_to_load_from_cache(*TABLE, repo_type="dataset"), str):
        return True
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        url = huggingface_hub.hf_hub_url(*TABLE, repo_type="dataset")
        return bool(get_session().head(url, timeout=5, follow_redirects=True).status_code == 200)
    except Exception:  # whichever HTTP library the hub's client uses today
        return False


def _by_alpaca_eval(annotations: Sequence[Annotation]) -> float:
    import alpaca_eval.metrics

    rows: list[dict[str, Any]] = [
        {
            "preference": a.preference,
            "output_1": a.output_1,
            "output_2": a.output_2,
            "generator_1": a.generator_1,
            "generator_2": a.generator_2,
            "annotator": a.annotator,
        }
        for a in annotations
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's about arguments that it uses
        found = alpaca_eval.metrics.get_length_controlled_winrate(rows, save_weights_dir=None, is_warn_extreme_changes=False)
    return float(found["length_controlled_winrate"])
