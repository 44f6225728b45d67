"""Train an aligner against a frozen proposal: cached log-probabilities, objectives, the trainer, and what comes after it."""

from trimtab.callable import make_callable

make_callable(__name__, "trimtab.train.call:train")
