"""`trimtab.train(...)`: what `trimtab train` does, from Python."""

from typing import Any

from trimtab.options import make_options, named_for_python
from trimtab.train.options import TrainOptions

__all__ = ["run", "train"]


def train(options: TrainOptions | None = None, /, **settings: Any) -> dict[str, Any]:
    """Train an aligner for a frozen proposal, tune its weight and save it. What `trimtab train` does.

        trimtab.train(proposal="P", dataset="pairs.jsonl", output_dir="A")
        trimtab.train(proposal="P", aligner="Q", dataset="D", output_dir="A", objective="ram", alpha=1e-3, max_steps=200)

    A run that was killed goes on where it stopped, and one that is finished returns its report.

    Args:
        options: all options at once; `TrainOptions` says what each means.
        settings: options by name, in the place of `options` or over its fields: its own, those of the objective (`contrast`,
            `alpha`, …), and those of `transformers.TrainingArguments`.

    Returns:
        `output_dir`, and what `training.json` there holds: `metrics` on the development prompts, the tuned `weight` and those
        `weights_tried`, `history`, `samples`, `seconds`, and the rest. With `dry_run`, what the run would take.

    Raises:
        InvalidOption: an option is not known, is missing, cannot be, or has no effect beside the others; or the output folder
            holds a run with others.
        DataError, ModelError: data or models that cannot be read or used.
        EndpointError: no endpoint answers; the same call goes on where this one stopped.
    """
    with named_for_python(TrainOptions):
        return run(make_options(TrainOptions, options, settings))


def run(options: TrainOptions) -> dict[str, Any]:
    """The same for options that were checked, as the command line makes them."""
    from trimtab.models.loading import quiet_loading
    from trimtab.train.dry_run import Expected, estimate
    from trimtab.train.run import run_training

    quiet_loading()
    if options.dry_run:
        known = (options.expected_proposal, options.expected_aligner, options.expected_examples, options.assume_tflops)
        return estimate(options, Expected(*known))
    return {"output_dir": options.output_dir, **run_training(options)}
