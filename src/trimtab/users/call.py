"""`trimtab.fit_weights(...)`: what `trimtab fit-weights` does, from Python."""

from typing import Any

from trimtab.options import make_options, named_for_python
from trimtab.users.options import FitWeightsOptions

__all__ = ["fit_weights"]


def fit_weights(options: FitWeightsOptions | None = None, /, **settings: Any) -> dict[str, Any]:
    """Fit a user's weights of several aligners on a few preferences. What `trimtab fit-weights` does.

        trimtab.fit_weights(proposal="P", aligner=["formal=A", "brief=B"], preferences="user.jsonl")

    Args:
        options: all options at once; `FitWeightsOptions` says what each means.
        settings: options by name, in the place of `options` or over its fields.

    Returns:
        `weights` by name; `interval`, the central .95 of each by Laplace's approximation; `pairs` that were reckoned with, and
        `left_out` of the others; `agree`, the share of pairs that is ranked as the user has it, `before` the fit, `fitted`, and
        `left_out`, each pair by a fit on the others (None for more than 200); `length`, for each aligner the share of what it
        says of the pairs that the difference in length explains; and `prior`, `prior_scale`, `beta`, `rule` and `aligners` as
        they counted.

    Raises:
        InvalidOption: an option is not known, is missing or cannot be; or the rule is none under which weights add up.
        DataError: the pairs cannot be read, or none is left.
        ModelError: a model cannot be loaded.
    """
    from trimtab.users.run import run

    with named_for_python(FitWeightsOptions):
        return run(make_options(FitWeightsOptions, options, settings))
