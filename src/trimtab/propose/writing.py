"""Samples as the rows of a data set, written resumably, whoever draws them.

The output is in TRL's layout: `prompt`, `chosen` (the record's own answer) and `rejected` (the sample) where the record has an
answer, else `prompt` and `completion`; with a `Ranking`, both answers of a pair are samples. Every prompt has a seed of its
own, so an interrupted run gives the same file as one that was left alone. The record's `weight` goes along.

A sample that could not go on is no answer. Its row has the `finish_reason` `error` and an `error` that says why in the place of
answers, and whoever reads the file leaves it out.
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from trimtab.data.prompts import chat_columns
from trimtab.data.records import UNFINISHED, WEIGHT, Record
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.completions import Sample
from trimtab.files import json_digest
from trimtab.jsonlines import ResumableLines
from trimtab.propose.ranking import Ranking

__all__ = ["Draw", "Written", "write_samples"]

logger = logging.getLogger(__name__)

Draw: TypeAlias = Callable[[int], Generator[list[list[Sample]], None, None]]
"""From the number of a record on: the samples of that record and those after it, in order, some records at a time."""


class Written(NamedTuple):
    """How many rows a file has, and how many of them stand for samples that could not go on."""

    rows: int
    failed: int


def write_samples(
    proposal: Any,
    draw: Draw,
    records: Sequence[Record],
    out: str | Path,
    params: SamplingParams,
    ranking: Ranking | None = None,
) -> Written:
    """Write what is drawn to `out`, going on where an interrupted run stopped.

    Args:
        proposal: what tells who draws from others.
        draw: draws `params.n` samples for each record.
        records: what to sample for.
        out: a `.jsonl` file.
        params: how it samples.
        ranking: how samples become pairs; None writes each sample.

    Raises:
        InvalidOption: `out` holds part of a run with other settings.
    """
    prompts = json_digest(record.asked for record in records)
    header = {"proposal": proposal, "prompts": prompts, "sampling": repr(params)}
    if any(record.weight != 1 for record in records):
        header["weights"] = json_digest(record.weight for record in records)
    each = params.n
    if ranking is not None:
        header |= {"ranking": f"{ranking.pairs} pairs by {ranking.reward.label()}", "date": ranking.reward.date}
        each = ranking.pairs
    lines = ResumableLines(out, header, each)
    with lines:
        done, alike = lines.done, 0
        with contextlib.closing(draw(done)) as drawn:
            for groups in drawn:
                rows = list(_rows(records[done : done + len(groups)], groups, ranking))
                alike += sum(row["chosen"] == row["rejected"] for row in rows if "rejected" in row)
                lines.write(rows)
                done += len(groups)
                logger.info("proposed for %d of %d prompts", done, len(records))
    if alike:
        logger.warning(
            "%d pairs are of two equal answers, from which there is nothing to learn: draw hotter, or fewer samples", alike
        )
    return Written(len(records) * each, lines.failed)


def _rows(records: Sequence[Record], groups: Sequence[Sequence[Sample]], ranking: Ranking | None) -> Iterator[dict[str, Any]]:
    if ranking is not None:
        for record, best, worst in ranking.pick(records, groups):
            yield _row(record, {"chosen": best, "rejected": worst})
        return
    for record, samples in zip(records, groups, strict=True):
        for sample in samples:
            if record.chosen is None:
                yield _row(record, {"completion": sample})
            else:
                yield _row(record, {"rejected": sample}, chosen=record.chosen)


def _row(record: Record, samples: dict[str, Sample], **known: Any) -> dict[str, Any]:
    """A record with samples for answers: texts for a text, messages for a chat; what was cut is named, what died left out."""
    if errors := [one.error for one in samples.values() if one.error is not None]:
        return {**chat_columns(record.prompt), "finish_reason": "error", "error": errors[0]}
    text = isinstance(record.prompt, str)
    drawn = {name: one.text if text else [{"role": "assistant", "content": one.text}] for name, one in samples.items()}
    cut = [name for name, one in samples.items() if one.text and not one.ended]
    further = ({UNFINISHED: cut} if cut else {}) | ({WEIGHT: record.weight} if record.weight != 1 else {})
    return {**chat_columns(record.prompt), **known, **drawn} | further
