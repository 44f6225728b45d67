"""The validator of the study of rewards: 1 for an answer that keeps to the constraint of its prompt, else 0."""

from collections.abc import Mapping, Sequence
from typing import Any

from constraints import obeys

__all__ = ["obeyed"]


def obeyed(
    completions: Sequence[Sequence[Mapping[str, str]]], constraint: Sequence[Mapping[str, Any]], **_: Any
) -> list[float]:
    """A reward function of TRL's kind; `constraint` is a column of the data."""
    return [float(obeys(wanted, messages[0]["content"])) for wanted, messages in zip(constraint, completions, strict=True)]
