"""Drafters: who says ahead how texts go on, so that several tokens are verified in one pass. Each is a file here.

    aligner   the first aligner, from its rows
    model     a model that only drafts, from its rows
    ngram     the text itself: what followed its last few tokens before
    corpus    a table of other texts, made by `trimtab draft-table`, and the text itself
    none      nobody

`base` says what a drafter is. Other packages bring more: docs/extending.md.
"""

from pathlib import Path
from typing import Any

from trimtab.decode.drafters.aligner import AlignerDrafter
from trimtab.decode.drafters.base import DRAFTERS, Drafted, Drafter, Given, Guess, Step, TextDrafter, check_drafter, register
from trimtab.decode.drafters.corpus import CorpusDrafter
from trimtab.decode.drafters.lookup import Lookup
from trimtab.decode.drafters.model import ModelDrafter
from trimtab.decode.drafters.ngram import NgramDrafter
from trimtab.decode.drafters.none import NoDrafter
from trimtab.errors import InvalidOption

__all__ = [
    "DRAFTERS",
    "AlignerDrafter",
    "CorpusDrafter",
    "Drafted",
    "Drafter",
    "Given",
    "Guess",
    "Lookup",
    "ModelDrafter",
    "NgramDrafter",
    "NoDrafter",
    "Step",
    "TextDrafter",
    "as_drafter",
    "check_drafter",
    "read_draft",
    "register",
    "source_of",
]

for _drafter in (AlignerDrafter, CorpusDrafter, NgramDrafter, NoDrafter, ModelDrafter):
    register(_drafter)

PROTOCOL = (
    *("name", "drafts", "from_aligner", "looks", "identity", "who"),
    *("models", "on", "temperature", "start", "accepted", "look", "draft"),
)
"""What an object needs to be taken for a drafter, whatever it inherits from."""


def read_draft(text: str) -> tuple[type[Drafter], str | None]:
    """The kind of drafter that a text names, and what stands behind its name: `ngram`, `model:PATH`, `PATH`.

    What names no kind is a model's folder or hub id.

    Raises:
        InvalidOption: it looks like a kind with something behind it, and there is none of that name; or as `DRAFTERS[…]`.
    """
    kind, colon, argument = text.partition(":")
    if kind in DRAFTERS and (colon or kind != ModelDrafter.name):
        return DRAFTERS[kind], argument if colon else None
    if colon and kind.replace("-", "_").isidentifier() and len(kind) > 1 and not Path(text).exists():  # C:\ is a drive
        raise InvalidOption(f"draft: there is no drafter '{kind}'; choose one of {', '.join(sorted(DRAFTERS))}, or a model")
    return ModelDrafter, text


def source_of(draft: Any) -> Any:
    """The model that is named, or lent, to draft; None where a kind of drafter needs none, or is there already.

    Raises:
        InvalidOption: as `read_draft`.
    """
    if isinstance(draft, str):
        kind, argument = read_draft(draft)
        return argument if kind is ModelDrafter else None
    return None if draft is None or is_drafter(draft) else draft


def is_drafter(value: Any) -> bool:
    """Whether an object follows the protocol."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in PROTOCOL)


def as_drafter(draft: Any, given: Given) -> Drafter | None:
    """A drafter from what a user gives: a drafter, its name, or a loaded model; None for None.

    Raises:
        InvalidOption: there is no such drafter, or it cannot be made of what is given.
    """
    if draft is None:
        return None
    if isinstance(draft, str):
        kind, argument = read_draft(draft)
        if kind is ModelDrafter and argument == draft:
            names = ", ".join(name for name in DRAFTERS if name != ModelDrafter.name)
            raise InvalidOption(f"draft must be one of {names}, or a model, not '{draft}'")
        return kind.make(argument, given)
    if not is_drafter(draft):
        if not hasattr(draft, "vocab_size") or not hasattr(draft, "extend"):
            raise InvalidOption(f"draft must be a drafter, its name, or a model, not {draft!r}")
        return ModelDrafter(draft)
    try:
        hash(draft)
    except TypeError:
        why = f"{type(draft).__name__} cannot be hashed: make it a frozen dataclass, or leave out `__eq__`"
        raise InvalidOption(f"draft: {why}") from None
    found: Drafter = draft
    return found
