"""`trimtab.evolve(...)`: what `trimtab evolve` does, from Python."""

from typing import Any

from trimtab.loop.options import EvolveOptions
from trimtab.options import make_options, named_for_python

__all__ = ["evolve"]


def evolve(options: EvolveOptions | None = None, /, **settings: Any) -> dict[str, Any]:
    """Improve an aligner from what people say of its answers, round after round. What `trimtab evolve` does.

        trimtab.evolve(proposal="P", out="loop", feedback="said.jsonl")
        trimtab.evolve(proposal="P", out="loop", prompts="prompts.jsonl", reward="my.py:f", rounds=3)
        trimtab.evolve(out="loop", rollback=1)

    A call that was killed goes on where it stopped, to the same end.

    Args:
        options: all options at once; `EvolveOptions` says what each means.
        settings: options by name, in the place of `options` or over its fields: its own, those of the objective, and those of
            `transformers.TrainingArguments`.

    Returns:
        `out`; `current`, the round in service, and its `aligner` (None for the proposal alone); `rounds`, the verdicts of this
        call; `waiting`, why no further round was due, or None; `history`, all verdicts; `page`. A verdict has `round`,
        `incumbent`, `promoted`, `why`, and `votes` or `answers`, what was `won` of the held-out prompts with its `interval`.

    Raises:
        InvalidOption: an option is not known, cannot be, or has no effect beside the others; or the folder is another loop's.
        DataError: there is too little to learn from or to judge by, or something cannot be read.
        ModelError: a model or a reward cannot be loaded, or fails.
    """
    from trimtab.loop.run import run

    with named_for_python(EvolveOptions):
        return run(make_options(EvolveOptions, options, settings))
