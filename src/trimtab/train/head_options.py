"""What `trimtab train` does otherwise where it is told of no aligner, and trains a head of the proposal."""

from typing import Any

from trimtab.errors import InvalidOption
from trimtab.models.aligner import Manifest

__all__ = ["refuse_head", "settle_head"]


def settle_head(options: Any) -> None:
    """Fill in the defaults of `TrainOptions` that depend on whether the aligner is a head, in place.

    Raises:
        InvalidOption: an option that a head has no use for, or that only a head has.
    """
    if options.aligner:
        if options.head_layers is not None:
            raise InvalidOption("head_layers: a head is trained where there is no --aligner: leave one of them out")
        _fill(options, "rule", "product")
        return
    if options.proposal_endpoint:
        raise InvalidOption(
            "aligner: without one a head is trained, which reads the proposal's hidden states, and an endpoint gives none: name"
            " the model to train, or leave out --proposal_endpoint"
        )
    if options.start != "auto":
        raise InvalidOption(f"start: a head starts at the proposal, and at nothing else: leave out --start {options.start}")
    if options.sft_weight:
        raise InvalidOption("sft_weight: at weight 1 the likelihood of a head is that of its own row already: leave it out")
    _fill(options, "rule", "geometric")
    if options.parsed_rule.name == "product":
        raise InvalidOption(
            "rule: a head starts as the proposal, and product would multiply the proposal with itself: leave out --rule"
            " product, for geometric"
        )
    object.__setattr__(options, "use_peft", True)


def refuse_head(manifest: Manifest | None, name: str) -> None:
    """Refuse to train on a head: its weights are of another proposal's layers, and fresh ones cost minutes.

    Raises:
        InvalidOption: it is one.
    """
    if manifest is not None and manifest.head is not None:
        raise InvalidOption(
            f"aligner: '{name}' is a head, and no second round starts from one: leave --aligner out for a new one"
        )


def _fill(options: Any, name: str, value: Any) -> None:
    """Set a field of a frozen dataclass that was not given."""
    if not getattr(options, name):
        object.__setattr__(options, name, value)
