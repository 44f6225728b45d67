"""Draw completions y' from the proposal, aligned or not, for every prompt of a data set, resumably.

The output is a data set in TRL's layout: `prompt`, `chosen` (the record's own answer) and `rejected` (the sample) where the
record has an answer, else `prompt` and `completion`; with a `Ranking`, both answers of a pair are samples. Every prompt has a
seed of its own, so an interrupted run gives the same file as one that was left alone. Who draws is a model here, or endpoints:
`trimtab.train.propose_remotely`.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.jsonlines import ResumableLines
from trimtab.train.ranking import Ranking
from trimtab.train.records import Record

__all__ = ["Draw", "propose", "write_samples"]

logger = logging.getLogger(__name__)

Draw: TypeAlias = Callable[[int], Generator[list[list[str]], None, None]]
"""From the number of a record on: the samples of that record and those after it, in order, some records at a time."""


def propose(
    model: AlignedModel,
    records: Sequence[Record],
    out: str | Path,
    params: SamplingParams,
    batch_size: int,
    ranking: Ranking | None = None,
) -> int:
    """Write `params.n` samples for each record to `out`, or pairs of them; the number of rows.

    Args:
        model: transformers models: the bare proposal, or with aligners.
        records: what to sample for.
        out: a `.jsonl` file.
        params: how to sample; each record adds its number to the seed.
        batch_size: records drawn together and written at once.
        ranking: how samples become pairs; None writes each sample.

    Raises:
        InvalidOption: `out` holds part of a run with other settings.
    """
    who = {"weights": model.fingerprints, "shaping": repr(model.shaping(params))}

    def draw(start: int) -> Generator[list[list[str]], None, None]:
        for first in range(start, len(records), batch_size):
            part = records[first : first + batch_size]
            each = [dataclasses.replace(params, seed=(params.seed or 0) + first + i) for i in range(len(part))]
            samples = model.generate([record.prompt for record in part], each)
            texts = [sample.text for sample in samples]
            yield [texts[i : i + params.n] for i in range(0, len(texts), params.n)]

    return write_samples(who, draw, records, out, params, ranking)


def write_samples(
    proposal: Any,
    draw: Draw,
    records: Sequence[Record],
    out: str | Path,
    params: SamplingParams,
    ranking: Ranking | None = None,
) -> int:
    """Write what is drawn to `out`, going on where an interrupted run stopped; the number of rows.

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
    prompts = hashlib.sha256(json.dumps([record.prompt for record in records]).encode()).hexdigest()
    header = {"proposal": proposal, "prompts": prompts, "sampling": repr(params)}
    each = params.n
    if ranking is not None:
        header["ranking"] = f"{ranking.pairs} pairs by {ranking.name}"
        each = ranking.pairs
    lines = ResumableLines(out, header, each)
    with lines:
        done = lines.done
        with contextlib.closing(draw(done)) as drawn:
            for groups in drawn:
                lines.write(_rows(records[done : done + len(groups)], groups, ranking))
                done += len(groups)
                logger.info("proposed for %d of %d prompts", done, len(records))
    return len(records) * each


def _rows(records: Sequence[Record], groups: Sequence[Sequence[str]], ranking: Ranking | None) -> Iterator[dict[str, Any]]:
    if ranking is not None:
        for record, best, worst in ranking.pick(records, groups):
            yield {"prompt": record.prompt, "chosen": _answer(record, best), "rejected": _answer(record, worst)}
        return
    for record, texts in zip(records, groups, strict=True):
        own = {} if record.chosen is None else {"chosen": record.chosen}
        for text in texts:
            yield {"prompt": record.prompt, **own, "rejected" if own else "completion": _answer(record, text)}


def _answer(record: Record, text: str) -> Any:
    """A text for a text, a message for a chat."""
    return text if isinstance(record.prompt, str) else [{"role": "assistant", "content": text}]
