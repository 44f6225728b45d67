"""What `trimtab train` does otherwise where it trains a head of the proposal, a fresh one or one of an earlier round."""

import math
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.train.tune import CHEAPEST, Stay

__all__ = ["settle_head", "stay_of"]


def settle_head(options: Any) -> None:
    """Fill in the defaults of `TrainOptions` that a head has, in place; of a later round its manifest has the rule.

    Raises:
        InvalidOption: an option that a head has no use for.
    """
    if not options.trains_head:
        return
    if options.proposal_endpoint:
        why = "the aligner is a head" if options.aligner else "without one a head is trained"
        raise InvalidOption(
            f"aligner: {why}, which reads the proposal's hidden states, and an endpoint gives none: name"
            " the model to train, or leave out --proposal_endpoint"
        )
    if options.aligner and options.start not in ("auto", "pretrained"):
        raise InvalidOption(f"start: a head is trained on as it is: leave out --start {options.start}")
    if not options.aligner and options.start != "auto":
        raise InvalidOption(f"start: a head starts at the proposal, and at nothing else: leave out --start {options.start}")
    if options.sft_weight:
        raise InvalidOption("sft_weight: at weight 1 the likelihood of a head is that of its own row already: leave it out")
    if not options.aligner and not options.rule:
        object.__setattr__(options, "rule", "geometric")
    if options.rule and options.parsed_rule.name == "product":
        raise InvalidOption(
            "rule: a head starts as the proposal, and product would multiply the proposal with itself: leave out --rule"
            " product, for geometric"
        )
    object.__setattr__(options, "use_peft", True)


def stay_of(options: Any) -> Stay | None:
    """Where the weight of a run of `TrainOptions` stays: a head's at 1, and at the trained one if it learnt preferences."""
    if options.has_reference:
        return Stay(options.starting_weight, math.inf)
    return CHEAPEST if options.trains_head else None
