"""From records to token ids, and the split into training and development prompts."""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

from trimtab.decode.encoding import Encoder
from trimtab.errors import DataError, InvalidRequest
from trimtab.files import json_digest
from trimtab.train.records import Record

__all__ = ["Example", "answers", "encode_records", "fingerprint_examples", "split_by_prompt"]

logger = logging.getLogger(__name__)

_NONE = array("i")


class _Ids(NamedTuple):
    prompt: "array[int]"
    chosen: "array[int]"
    rejected: "array[int]"
    """Empty where the record has none."""


class Example(_Ids):
    """A record as token ids; answers end with the end of sequence unless they were cut.

    Ids are kept in arrays, of four bytes each: lists of Python's integers take ten times that, in every process of a run.
    """

    __slots__ = ()

    def __new__(cls, prompt: Iterable[int], chosen: Iterable[int], rejected: Iterable[int]) -> Self:
        """From arrays as they are, and from other ids."""
        return super().__new__(cls, *(i if isinstance(i, array) else array("i", i) for i in (prompt, chosen, rejected)))

    @property
    def differs(self) -> bool:
        """Whether it is no pair of two equal answers."""
        return self.chosen != self.rejected


def answers(examples: Sequence[Example], which: str) -> list[Example]:
    """The examples with their `chosen` or `rejected` answers as the only ones."""
    return [Example(example.prompt, getattr(example, which), _NONE) for example in examples]


def encode_records(records: Sequence[Record], encoder: Encoder, max_length: int) -> list[Example]:
    """Encode prompts and answers, chats by the template.

    Answers are cut at `max_length` tokens, prompt included. A prompt that leaves no room for an answer is left out, and the
    number of either is logged.

    Raises:
        DataError: a record cannot be encoded, or no record is left.
    """
    examples, cut, dropped, shared = [], 0, 0, 0
    for record in records:
        names = [name for name in ("chosen", "rejected") if getattr(record, name) is not None]
        try:
            prompt, encoded, shares_token = encoder.answers(
                record.prompt,
                [getattr(record, name) for name in names],
                "prompt",
                names,
                [name not in record.unfinished for name in names],
            )
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
        shared += shares_token
        if record.rejected is not None and record.rejected == record.chosen:
            encoded[1] = encoded[0]  # one answer, whichever of the two was cut
        room = max_length - len(prompt)
        if room < 1:
            dropped += 1
            continue
        cut += any(len(answer) > room for answer in encoded)
        found = {name: answer[:room] for name, answer in zip(names, encoded, strict=True)}
        examples.append(Example(prompt, found.get("chosen", []), found.get("rejected", [])))
    if cut or dropped:
        logger.warning(
            "of %d records, %d (%.0f %%) had an answer cut at max_length=%d, which teaches no end, and %d a longer prompt, left"
            " out; a larger max_length keeps them whole",
            len(records), cut, 100 * cut / len(records), max_length, dropped,
        )  # fmt: skip
    if shared:
        logger.warning(
            "of %d records, %d have a prompt whose end and whose answer's beginning are one token, as after a space: it is the"
            " answer's, and in decoding the prompt ends with another; let prompts end without a space",
            len(records), shared,
        )  # fmt: skip
    if not examples:
        raise DataError(f"no record is left: every prompt has {max_length} tokens or more; raise max_length")
    return examples


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and development records; all answers to one prompt stay on one side.

    The prompts with the smallest hashes go to development: about `fraction` of the distinct ones, at least one on each side.

    Raises:
        DataError: there is only one prompt.
    """
    keys = [_hash(f"{seed} {json.dumps(record.prompt, sort_keys=True)}") for record in records]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise DataError("all records share one prompt: none can be kept for development; give --eval_dataset")
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held_out = set(distinct[:count])
    train = [record for key, record in zip(keys, records, strict=True) if key not in held_out]
    return train, [record for key, record in zip(keys, records, strict=True) if key in held_out]


def fingerprint_examples(examples: Sequence[Example], *, rejected: bool = False) -> str:
    """A hash of prompts and wanted answers, in order; with `rejected`, of unwanted ones too."""
    return json_digest([list(ids) for ids in example[: 3 if rejected else 2]] for example in examples)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
