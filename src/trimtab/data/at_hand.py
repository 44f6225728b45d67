"""Whether a data set can be read without the network: for dry runs."""

from typing import Any

from trimtab.data.records import parse_columns, read_records
from trimtab.data.sources import DataOptions, is_cached, is_local
from trimtab.files import expand_home

__all__ = ["count_records", "why_not_at_hand"]


def why_not_at_hand(dataset: str) -> str | None:
    """Why a data set cannot be read without the network; None if it can."""
    if expand_home(dataset).exists():
        return None
    if is_local(dataset):
        return f"there is no file {dataset} yet"
    return None if is_cached(dataset) else f"{dataset} is not in this machine's cache of data sets"


def count_records(dataset: str, how: DataOptions, limit: int | None, expected: int | None, *, answers: bool) -> dict[str, Any]:
    """Whether a data set of prompts, maybe with `answers`, is at hand; how many records it has or is expected to have."""
    parse_columns(how.columns)
    why = why_not_at_hand(dataset)
    if why is None:
        records = read_records(dataset, need="prompt", how=how, limit=limit, answers=answers)
        return {"at_hand": True, "why_not": None, "examples": len(records)}
    counted = expected if expected is None or limit is None else min(expected, limit)
    return {"at_hand": False, "why_not": why, "examples": counted}
