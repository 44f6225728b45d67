"""Pairs of a wanted and an unwanted answer that are the same: nothing in them says what to prefer.

Answers are compared as the loss sees them, as ids that are cut at `max_length`. What an objective does with an equal pair:

    likelihood   learns the wanted answer, and leaves the pair out of the contrast
    preference   leaves it out altogether
    ram          takes it like any other: its unwanted answers are draws from the proposal, and to leave out those that are
                 right would bias their mean
"""

import logging
from typing import NamedTuple

from trimtab.data.examples import Example
from trimtab.errors import DataError
from trimtab.train.options import TrainOptions

__all__ = ["Pairs", "settle_pairs"]

logger = logging.getLogger(__name__)


class Pairs(NamedTuple):
    """What is trained, and on what, once the pairs are known."""

    options: TrainOptions
    """With the contrast settled."""
    examples: list[Example]
    development: list[Example]
    equal: int
    """Pairs of two equal answers, in both parts of the data."""


def settle_pairs(options: TrainOptions, examples: list[Example], development: list[Example]) -> Pairs:
    """Settle the contrast, and leave out what the objective learns nothing from.

    Raises:
        DataError: the loss is of pairs, and none has two different answers.
    """
    everything = [*examples, *development]
    lacking, equal = sum(not example.rejected for example in everything), sum(not example.differs for example in everything)
    options = options.with_contrast_for(len(everything), lacking=lacking)
    if not equal or not options.needs_rejected:
        return Pairs(options, examples, development, equal)
    alone = options.objective == "preference"
    for part, some in {"training": examples, "development": development}.items():
        if options.objective != "ram" and (alone or some is examples) and not any(example.differs for example in some):
            raise DataError(
                f"every {part} pair has two equal answers within max_length={options.max_length}: there is nothing to prefer;"
                " give other pairs, or " + ("take --objective sft" if alone else "leave them out with --contrast 0")
            )
    does = {"preference": "left out", "ram": "kept, as draws like any other"}.get(options.objective, "left out of the contrast")
    logger.warning("%d of %d pairs have two equal answers, and are %s", equal, len(everything), does)
    if alone:
        examples, development = ([example for example in some if example.differs] for some in (examples, development))
    return Pairs(options, examples, development, equal)
