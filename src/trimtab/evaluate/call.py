"""`trimtab.evaluate(...)`: what `trimtab eval` does, from Python."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.decode.options import refuse_beside_loaded
from trimtab.errors import InvalidOption
from trimtab.evaluate.options import EvalOptions
from trimtab.options import make_options, named_for_python

if TYPE_CHECKING:
    from trimtab.decode.aligned import AlignedModel

__all__ = ["evaluate", "run"]


def evaluate(options: EvalOptions | None = None, /, *, model: "AlignedModel | None" = None, **settings: Any) -> dict[str, Any]:
    """Is one system better than another, by how much, and how sure are we? What `trimtab eval` does.

        results = trimtab.evaluate(proposal="P", aligner=["A"], dataset="prompts.jsonl", judge=["rougeL"], out="results")
        results = trimtab.evaluate(model=model, dataset="prompts.jsonl", judge=[my_judge], out="results")

    Args:
        options: all options at once; `EvalOptions` says what each means.
        model: loaded models, in the place of the options that say which to load and how (`proposal`, `aligner`, `rule`, `dtype`
            and the rest of `ModelOptions`, the chat template and the date): for the systems `proposal` and `aligned`.
        settings: options by name, in the place of `options` or over its fields. An entry of `judge` may be a
            `trimtab.judges.base.Judge`.

    Returns:
        What `results.json` in the folder `out` holds, and `out`: `judging` has a row for each judge and contest, with
        `win_rate` in percent and its interval. With `dry_run`, what would be compared, asked and loaded. With `annotations`,
        the win rates of that file.

    Raises:
        InvalidOption: an option is not known, cannot be, or has no effect beside the others.
        DataError, ModelError: data or models that cannot be read or used.
        EndpointError: an endpoint that does not answer; what has come is kept, and the same call goes on.
        BudgetExceeded: a judge would cost more than it may; what is complete has been written.
    """
    with named_for_python(EvalOptions):
        made = make_options(EvalOptions, options, settings)
        if model is not None:
            refuse_beside_loaded(made, model)
        return run(made, model)


def run(
    options: EvalOptions,
    model: "AlignedModel | None" = None,
    amend: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda results: {},
) -> dict[str, Any]:
    """The same for options that were checked, as the command line makes them; `amend` adds sections to the results."""
    if options.annotations is not None:
        return _summarise(options, options.annotations)
    if options.out is None:
        raise InvalidOption("--out is required, or --annotations")
    if options.dry_run:
        from trimtab.evaluate.dry_run import rehearse

        return rehearse(options, model)
    from trimtab.evaluate.setup import compare

    return compare(options, Path(options.out), model, amend)


def _summarise(options: EvalOptions, source: str) -> dict[str, Any]:
    from trimtab.evaluate.alpaca import read_annotations
    from trimtab.evaluate.winrate import summarise_annotations

    annotations = read_annotations(source)
    return summarise_annotations(annotations, length_control=options.length_control, seed=options.seed, source=source)
