"""The prompts of a run from rewards: read, split, and as ids."""

import logging
from collections.abc import Sequence

from trimtab.data.encoding import Encoder
from trimtab.data.examples import split_by_prompt
from trimtab.data.records import Record, read_records
from trimtab.errors import DataError, InvalidRequest
from trimtab.train.online.rounds import Prompt
from trimtab.train.plan import Plan

__all__ = ["read_prompts"]

logger = logging.getLogger(__name__)


def read_prompts(plan: Plan, encoder: Encoder, room: int, *, columns: bool) -> tuple[list[Prompt], list[Prompt]]:
    """Training and development prompts.

    Args:
        plan: of the run.
        encoder: the proposal's.
        room: most tokens of a prompt; longer ones are left out, and counted in the log.
        columns: whether the other columns of the data are of interest.

    Raises:
        DataError: something cannot be read or encoded, or nothing is left.
    """
    asked = plan.asked
    records = read_records(asked.dataset, need="prompt", how=asked, limit=asked.max_examples, answers=False, others=columns)
    if asked.eval_dataset is None:
        records, kept = split_by_prompt(records, asked.dev_fraction, seed=0)
    else:
        kept = read_records(asked.eval_dataset, need="prompt", how=asked, answers=False, others=columns)
    training, development = _encoded(records, encoder, room), _encoded(kept, encoder, room)
    if left := len(records) + len(kept) - len(training) - len(development):
        logger.warning(
            "%d of %d prompts have more than %d tokens, which leave no room for max_tokens within max_length, and are left out",
            left, len(records) + len(kept), room,
        )  # fmt: skip
    if not training or not development:
        part = "development" if training else "training"
        raise DataError(f"no {part} prompt is left: each has more than {room} tokens; raise max_length, or lower max_tokens")
    return training, development


def _encoded(records: Sequence[Record], encoder: Encoder, room: int) -> list[Prompt]:
    found = []
    for record in records:
        try:
            ids = encoder.prompt(record.prompt)
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
        if len(ids) <= room:
            found.append(Prompt(record, ids))
    return found
