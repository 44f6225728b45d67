"""Draw completions y' from the proposal for every prompt of a data set, resumably.

The output is a data set in TRL's layout: `prompt`, `chosen` (the record's own answer) and `rejected` (the sample) where the
record has an answer, else `prompt` and `completion`. Every prompt has a seed of its own, so an interrupted run gives the same
file as one that was left alone.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.jsonlines import ResumableLines
from trimtab.train.records import Record

__all__ = ["propose"]

logger = logging.getLogger(__name__)


def propose(model: AlignedModel, records: Sequence[Record], out: str | Path, params: SamplingParams, batch_size: int) -> int:
    """Write `params.n` samples for each record to `out`; the number of rows.

    Args:
        model: a transformers proposal, usually bare.
        records: what to sample for.
        out: a `.jsonl` file.
        params: how to sample; each record adds its number to the seed.
        batch_size: records drawn together and written at once.

    Raises:
        InvalidOption: `out` holds part of a run with other settings.
    """
    assert params.seed is not None
    prompts = hashlib.sha256(json.dumps([record.prompt for record in records]).encode()).hexdigest()
    lines = ResumableLines(
        out, {"proposal": getattr(model.proposal, "fingerprint", None), "prompts": prompts, "sampling": repr(params)}, params.n
    )
    with lines:
        for start in range(lines.done, len(records), batch_size):
            part = records[start : start + batch_size]
            each = [dataclasses.replace(params, seed=params.seed + start + i) for i in range(len(part))]
            samples = model.generate([record.prompt for record in part], each)
            lines.write(_row(part[i // params.n], sample.text) for i, sample in enumerate(samples))
            logger.info("proposed for %d of %d prompts", start + len(part), len(records))
    return len(records) * params.n


def _row(record: Record, sample: str) -> dict[str, Any]:
    answer: Any = sample if isinstance(record.prompt, str) else [{"role": "assistant", "content": sample}]
    if record.chosen is None:
        return {"prompt": record.prompt, "completion": answer}
    return {"prompt": record.prompt, "chosen": record.chosen, "rejected": answer}
