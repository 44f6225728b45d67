"""Answers for a teacher's records that have none: the proposal's own, drawn once behind the teacher's prompt.

They are kept in the output folder as data sets of prompts without the teacher, one for each part of the data. What they depend
on stands in `run.json`; a run that is interrupted goes on where it stopped.

Answers that did not end are not learnt from, as long as most did. They are long, so a few of them are most of the tokens; far
into them both prompts say nearly the same; and where to end, which the teacher decides early in an answer, they do not show.
"""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from trimtab.data.encoding import Encoder
from trimtab.data.records import UNFINISHED, Record
from trimtab.data.sources import read_rows
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.errors import DataError, InvalidRequest
from trimtab.propose.local import propose
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.rows import ModelRows, Proposal
from trimtab.train.teacher import Parts

__all__ = ["FOLDER", "draw_answers"]

logger = logging.getLogger(__name__)

FOLDER = "teacher_answers"
"""Where they are, in the output folder."""

MAX_TOKENS = 256
"""Of an answer, where nobody names another limit."""

BATCH = 32
"""Answers drawn at once."""


def draw_answers(
    plan: Plan, proposal: Proposal, encoder: Encoder, output: Path, seed: int, ranks: Ranks, parts: Parts
) -> Parts:
    """The records with an answer each; those that the proposal cannot take or finish are left out, and counted.

    Where fewer than half of all answers ended, those that did not are kept, with a warning.

    Args:
        plan: of the run.
        proposal: who draws, at the temperature of the plan.
        encoder: of the run.
        output: its folder.
        seed: of the first record; each further one adds to it.
        ranks: the processes of the run, of which the first draws.
        parts: records that have a teacher's prompt.

    Raises:
        DataError: none is left of a part, or a file in the folder is not what was drawn.
    """
    assert isinstance(proposal.rows, ModelRows)  # as `refuse_contradictions` has it
    model = AlignedModel(
        proposal.rows.model, (), encoder.tokenizer, proposal.eos_token_ids, max_num_seqs=BATCH, date=encoder.date
    )
    at, most = plan.temperatures.proposal, plan.asked.teacher_max_tokens or MAX_TOKENS
    found = []
    for name, records in zip(("train", "dev"), parts, strict=True):
        path, fitting = output / FOLDER / f"{name}.jsonl", _fitting(model, records)
        params = SamplingParams(max_tokens=most, proposal_temperature=at, seed=seed)
        ranks.first_does(partial(_draw, model, fitting, path, params))
        found.append(_answered(fitting, path))
        seed += len(fitting)
    return _ended(found[0], found[1], most)


def _ended(training: list[Record], development: list[Record], most: int) -> Parts:
    """Those that ended, if at least half did; a part in which none did is kept."""
    cut = sum(bool(record.unfinished) for record in training + development)
    count, few = len(training) + len(development), 2 * cut <= len(training) + len(development)
    if cut:
        logger.warning(
            "%d of %d answers that were drawn behind teacher_prompt did not end within %d tokens, %s",
            cut, count, most,
            "and are left out" if few else "and hardly an end is learnt: give a larger teacher_max_tokens, or a teacher_prompt"
            " whose examples are shorter, or alike",
        )  # fmt: skip
    if not few:
        return training, development
    whole = [[record for record in part if not record.unfinished] for part in (training, development)]
    return whole[0] or training, whole[1] or development


def _fitting(model: AlignedModel, records: Sequence[Record]) -> list[Record]:
    """The records whose prompts behind the teacher's leave room for an answer."""
    fitting = []
    for record in records:
        try:
            if model.fits(record.asked, None):
                fitting.append(record)
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
    if len(fitting) < len(records):
        logger.warning(
            "%d of %d prompts fill the context of %d tokens behind teacher_prompt, and are left out",
            len(records) - len(fitting), len(records), model.max_length,
        )  # fmt: skip
    return fitting


def _draw(model: AlignedModel, records: Sequence[Record], path: Path, params: SamplingParams) -> None:
    """Write the answers, unless an earlier run has."""
    if path.exists():
        return
    path.parent.mkdir(exist_ok=True)
    logger.info("drawing answers behind teacher_prompt for %d prompts", len(records))
    propose(model, records, path, params, BATCH)


def _answered(records: Sequence[Record], path: Path) -> list[Record]:
    """The records with the answers in a file, in its order."""
    rows = [row for _, row in read_rows(str(path))]
    if len(rows) != len(records):
        raise DataError(f"{path}: has {len(rows)} answers for {len(records)} prompts: delete it, and they are drawn again")
    cut = frozenset({"chosen"})
    answered = [
        dataclasses.replace(record, chosen=row["completion"], unfinished=cut if row.get(UNFINISHED) else frozenset())
        for record, row in zip(records, rows, strict=True)
        if "error" not in row
    ]
    if not answered:
        raise DataError(f"{path}: holds no answer that could be finished")
    if len(answered) < len(rows):
        logger.warning("%s: %d rows are left out: their answers ended in an error", path, len(rows) - len(answered))
    return answered
