"""Pairs of answers as token ids, for what compares them by their log-probabilities."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from trimtab.data.records import Record
from trimtab.decode.aligned import AlignedModel
from trimtab.errors import DataError, InvalidRequest

__all__ = ["Pair", "encode_pairs"]

logger = logging.getLogger(__name__)


class Pair(NamedTuple):
    """Two answers to one prompt as token ids, the preferred one first."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]


def encode_pairs(records: Sequence[Record], model: AlignedModel, *, leave_out_long: bool) -> tuple[list[Pair], list[Record]]:
    """Pairs as ids, and their records; those of two equal answers say nothing, and are left out, with a warning.

    Args:
        records: with both answers.
        model: whose tokenizer and context it is.
        leave_out_long: whether pairs that do not fit into the context are left out, too.

    Raises:
        DataError: one cannot be encoded, or does not fit into the context.
    """
    pairs, of, equal, long = [], [], 0, 0
    for record in records:
        ended = [name not in record.unfinished for name in ("chosen", "rejected")]
        try:
            found = model.encoder.answers(
                record.prompt, [record.chosen, record.rejected], "prompt", ["chosen", "rejected"], ended
            )
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
        pair = Pair(found.prompt, *found.answers)
        length = len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))
        if pair.chosen == pair.rejected:
            equal += 1
        elif model.max_length is not None and length > model.max_length:
            if not leave_out_long:
                raise DataError(
                    f"{record.source}: prompt and answer have {length} tokens, and the context {model.max_length}:"
                    " leave_out_long goes on without it"
                )
            long += 1
        else:
            pairs.append(pair)
            of.append(record)
    for count, why in ((equal, "have two equal answers"), (long, "do not fit into the context")):
        if count:
            logger.warning("%d of %d pairs %s: left out", count, len(records), why)
    return pairs, of
