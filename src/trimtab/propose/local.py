"""Draw completions y' from the proposal, aligned or not, for every prompt of a data set, by a model here."""

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path

from trimtab.data.records import Record
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.completions import Sample
from trimtab.propose.ranking import Ranking
from trimtab.propose.writing import Written, write_samples

__all__ = ["propose"]


def propose(
    model: AlignedModel,
    records: Sequence[Record],
    out: str | Path,
    params: SamplingParams,
    batch_size: int,
    ranking: Ranking | None = None,
) -> Written:
    """Write `params.n` samples for each record to `out`, or pairs of them.

    Args:
        model: transformers models: the bare proposal, or with aligners.
        records: what to sample for; behind a teacher's prompt, where they have one, which the file then lacks.
        out: a `.jsonl` file.
        params: how to sample; each record adds its number to the seed.
        batch_size: records drawn together and written at once.
        ranking: how samples become pairs; None writes each sample.

    Raises:
        InvalidOption: `out` holds part of a run with other settings.
    """
    who = {"weights": model.fingerprints, "draft": model.drafter, "shaping": repr(model.shaping(params))}
    who |= model.encoder.chat_settings

    def draw(start: int) -> Generator[list[list[Sample]], None, None]:
        for first in range(start, len(records), batch_size):
            part = records[first : first + batch_size]
            each = [dataclasses.replace(params, seed=(params.seed or 0) + first + i) for i in range(len(part))]
            drawn = model.generate([record.asked for record in part], each)
            samples = [Sample(one.text, one.finish_reason != "length", one.error) for one in drawn]
            yield [samples[i : i + params.n] for i in range(0, len(samples), params.n)]

    return write_samples(who, draw, records, out, params, ranking)
