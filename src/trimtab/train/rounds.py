"""The options of a run once the folder of its aligner has been read: what the aligner is, and what an earlier round settled."""

import dataclasses
from typing import TypeVar

from trimtab.errors import InvalidOption
from trimtab.models.aligner import Description, Manifest
from trimtab.train.options import TrainOptions

__all__ = ["of_head", "settle"]

Options = TypeVar("Options", bound=TrainOptions)


def settle(options: TrainOptions, found: Description | None) -> TrainOptions:
    """The same for the aligner that the run starts from.

    Args:
        options: as they were given.
        found: its folder; None where there is none, or it is not at hand.

    Raises:
        InvalidOption: an option that does not go with it.
    """
    if not options.aligner:
        return options
    manifest = None if found is None else found.manifest
    if found is not None and manifest is not None and manifest.head is not None:
        options = of_head(options, manifest).continuing(manifest)
        return dataclasses.replace(options.of_adapter(found), train_draft=options.train_draft)
    for name in ("head_layers", "keep_samples"):
        if getattr(options, name) is not None:
            raise InvalidOption(f"{name} is for heads, and '{options.aligner}' is none: leave it out")
    options = dataclasses.replace(options, rule=options.rule or "product").continuing(manifest)
    return options.of_adapter(found) if found is not None and found.is_adapter else options


def of_head(options: Options, manifest: Manifest) -> Options:
    """The same where the aligner is a head, whose manifest this is: it keeps its layers, and its rule unless another is named.

    Raises:
        InvalidOption: other layers are asked for, or what no head can have.
    """
    head = manifest.parsed_head
    assert head is not None
    layers = head.layers - head.tap
    if options.head_layers not in (None, layers):
        raise InvalidOption(f"head_layers: '{options.aligner}' is a head of {layers} layers, and keeps them: leave it out")
    return dataclasses.replace(options, head_layers=layers, rule=options.rule or manifest.rule)
