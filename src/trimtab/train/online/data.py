"""The prompts of a run from rewards: read, split, and as ids."""

import logging
from collections.abc import Sequence
from typing import Any

from trimtab.data.encoding import Encoder
from trimtab.data.examples import split_by_prompt
from trimtab.data.records import Record, read_records, repeat_records
from trimtab.errors import DataError, InvalidRequest
from trimtab.train.online.samples import Prompt
from trimtab.train.plan import Plan

__all__ = ["encode_prompts", "read_prompts"]

logger = logging.getLogger(__name__)


def read_prompts(plan: Plan, *, columns: bool) -> tuple[list[Record], list[Record]]:
    """Training and development records.

    Args:
        plan: of the run.
        columns: whether the other columns of the data are of interest.

    Raises:
        DataError: something cannot be read, or one prompt is all there is.
    """
    how: dict[str, Any] = {"need": "prompt", "how": plan.asked, "answers": False, "others": columns, "weights": True}
    records = repeat_records(read_records(plan.asked.dataset, limit=plan.asked.max_examples, **how))
    if plan.asked.eval_dataset is None:
        return split_by_prompt(records, plan.asked.dev_fraction, seed=0)
    return records, repeat_records(read_records(plan.asked.eval_dataset, **how))


def encode_prompts(part: str, records: Sequence[Record], encoder: Encoder, room: int) -> list[Prompt]:
    """The prompts as ids.

    Args:
        part: what messages call them.
        records: of the data.
        encoder: the proposal's.
        room: most tokens of a prompt; longer ones are left out, and counted in the log.

    Raises:
        DataError: one cannot be encoded, or none is left.
    """
    found = []
    for record in records:
        try:
            ids = encoder.prompt(record.prompt)
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
        if len(ids) <= room:
            found.append(Prompt(record, ids))
    if not found:
        raise DataError(f"no {part} prompt is left: each has more than {room} tokens; raise max_length, or lower max_tokens")
    if left := len(records) - len(found):
        logger.warning(
            "%d of %d %s prompts have more than %d tokens, which leave no room for max_tokens within max_length: left out",
            left, len(records), part, room,
        )  # fmt: skip
    return found
