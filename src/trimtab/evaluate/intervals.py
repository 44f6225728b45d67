"""Bootstrap intervals over prompts."""

from torch import Tensor

from trimtab.core.noise import uniforms

__all__ = ["ratio_interval"]


def ratio_interval(
    totals: Tensor, sizes: Tensor, *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of Σ totals / Σ sizes, resampling prompts with replacement.

    Args:
        totals: `[N]`, a sum for each prompt, such as its negative log-likelihood, or a difference of two.
        sizes: `[N]`, what to divide by, such as its number of tokens.
        seed: for the resampling.
        resamples: number of bootstrap samples.
        level: coverage.
    """
    count = len(totals)
    noise = uniforms([seed], [0], [0], resamples, count)[0]
    chosen = (noise * count).long()
    ratios = (totals.double()[chosen].sum(1) / sizes.double()[chosen].sum(1)).sort().values
    low, high = (ratios.quantile(q).item() for q in ((1 - level) / 2, (1 + level) / 2))
    return low, high
