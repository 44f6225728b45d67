"""`trimtab.propose(...)`: what `trimtab propose` does, from Python."""

from typing import TYPE_CHECKING, Any

from trimtab.options import make_options, named_for_python
from trimtab.propose.options import ProposeOptions

if TYPE_CHECKING:
    from trimtab.decode.aligned import AlignedModel

__all__ = ["propose", "run"]


def propose(
    options: ProposeOptions | None = None, /, *, model: "AlignedModel | None" = None, **settings: Any
) -> dict[str, Any]:
    """Write samples of a model for every prompt of a data set, or preference pairs of them. What `trimtab propose` does.

        trimtab.propose(proposal="P", dataset="prompts.jsonl", out="samples.jsonl", n=4, max_tokens=256)
        trimtab.propose(model=model, dataset="prompts.jsonl", out="pairs.jsonl", n=8, reward=my_function, pairs=2)

    Args:
        options: all options at once; `ProposeOptions` says what each means.
        model: a loaded model to sample from, in the place of the options that say which to load and how (`proposal`,
            `aligner`, `dtype`, `device`, `backend`, `max_num_seqs`, the chat template and the date).
        settings: options by name, in the place of `options` or over its fields. `reward` may be a function of TRL's kind, or a
            `trimtab.judges.rewards.base.Reward`.

    Returns:
        `out`, `rows` that it has, `failed` of them that could not be finished, `pairs` of each prompt (0 for samples) and
        `seed`. With `dry_run`, what would be asked, of whom, and for how much.

    Raises:
        InvalidOption: an option is not known, is missing, cannot be, or has no effect beside the others; or `out` is left from
            a run with others.
        DataError, ModelError: data or models that cannot be read or used, or a reward that fails.
        EndpointError: no endpoint answers; the same call goes on where this one stopped.
    """
    with named_for_python(ProposeOptions):
        return run(make_options(ProposeOptions, options, settings), model)


def run(options: ProposeOptions, model: "AlignedModel | None" = None) -> dict[str, Any]:
    """The same for options that were checked, as the command line makes them."""
    from trimtab.propose.setup import rehearse, sample

    return rehearse(options, model) if options.dry_run else sample(options, model)
