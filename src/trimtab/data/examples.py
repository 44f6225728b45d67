"""From records to token ids, and the split into training and development prompts."""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

from trimtab.data.encoding import Encoder
from trimtab.data.records import Record
from trimtab.errors import DataError, InvalidRequest
from trimtab.files import json_digest

__all__ = ["Example", "answers", "encode_records", "fingerprint_examples", "mean_tokens", "split_by_prompt", "split_examples"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NONE = array("i")


class _Ids(NamedTuple):
    prompt: "array[int]"
    chosen: "array[int]"
    rejected: "array[int]"
    """Empty where the record has none."""
    teacher: "array[int]"
    """The prompt as a teacher gets it; empty without one."""
    weight: float
    """How often it counts."""


class Example(_Ids):
    """A record as token ids; answers end with the end of sequence unless they were cut.

    Ids are kept in arrays, of four bytes each: lists of Python's integers take ten times that, in every process of a run.
    """

    __slots__ = ()

    def __new__(
        cls,
        prompt: Iterable[int],
        chosen: Iterable[int],
        rejected: Iterable[int],
        teacher: Iterable[int] = _NONE,
        weight: float = 1.0,
    ) -> Self:
        """From arrays as they are, and from other ids."""
        ids = (prompt, chosen, rejected, teacher)
        prompt, chosen, rejected, teacher = (i if isinstance(i, array) else array("i", i) for i in ids)
        return super().__new__(cls, prompt, chosen, rejected, teacher, weight)

    @property
    def differs(self) -> bool:
        """Whether it is no pair of two equal answers."""
        return not self.rejected or self.chosen != self.rejected

    @property
    def length(self) -> int:
        """Tokens of the prompt with the longer of the answers."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def answers(examples: Sequence[Example], which: str) -> list[Example]:
    """The examples with their `chosen` or `rejected` answers as the only ones."""
    return [Example(example.prompt, getattr(example, which), _NONE, weight=example.weight) for example in examples]


def mean_tokens(examples: Sequence[Example]) -> float:
    """Tokens of their wanted answers, each example counted as often as its weight says."""
    return sum(len(example.chosen) * example.weight for example in examples) / sum(example.weight for example in examples)


def encode_records(records: Sequence[Record], encoder: Encoder, max_length: int, context: int | None = None) -> list[Example]:
    """Encode prompts and answers, chats by the template.

    Answers are cut at `max_length` tokens, prompt included, and at `context` behind a teacher's prompt. A prompt that leaves no
    room for an answer is left out, and the number of either is logged.

    Raises:
        DataError: a record cannot be encoded, or no record is left.
    """
    examples, cut, dropped, shared, apart = [], 0, 0, 0, 0
    for record in records:
        prompt, found, shares_token = _encode(record, record.prompt, "prompt", encoder)
        shared += shares_token
        teacher: list[int] = []
        room = max_length - len(prompt)
        if record.teacher is not None:
            teacher, behind, _ = _encode(record, record.teacher, "prompt behind teacher_prompt", encoder)
            if found.get("chosen") != behind.get("chosen"):
                apart += 1
                continue
            room = min(room, (max_length if context is None else context) - len(teacher))
        if room < 1:
            dropped += 1
            continue
        cut += any(len(answer) > room for answer in found.values())
        kept = {name: answer[:room] for name, answer in found.items()}
        examples.append(Example(prompt, kept.get("chosen", []), kept.get("rejected", []), teacher, record.weight))
    behind_too = "" if context is None else f" (at {context} behind teacher_prompt)"
    remedy = "a larger max_length" if context is None else "a larger max_length, or a shorter teacher_prompt,"
    if cut or dropped:
        logger.warning(
            "of %d records, %d (%.0f %%) had an answer cut at max_length=%d%s, which teaches no end, and %d a longer prompt,"
            " left out; %s keeps them whole",
            len(records), cut, 100 * cut / len(records), max_length, behind_too, dropped, remedy,
        )  # fmt: skip
    if apart:
        logger.warning(
            "of %d records, %d are left out: behind teacher_prompt their answers are other tokens", len(records), apart
        )
    if shared:
        logger.warning(
            "of %d records, %d have a prompt whose end and whose answer's beginning are one token, as after a space: it is the"
            " answer's, and in decoding the prompt ends with another; let prompts end without a space",
            len(records), shared,
        )  # fmt: skip
    if not examples:
        if apart:
            raise DataError("no record is left: behind teacher_prompt every answer is other tokens, or the prompt too long")
        mend = (
            "; raise max_length"
            if context is None
            else f", or {context} behind teacher_prompt; raise max_length, or shorten teacher_prompt"
        )
        raise DataError(f"no record is left: every prompt has {max_length} tokens or more{mend}")
    return examples


def _encode(record: Record, prompt: Any, name: str, encoder: Encoder) -> tuple[list[int], dict[str, list[int]], bool]:
    """Ids of a record's prompt, or of what stands in its place, and of its answers; see `Encoder.answers`."""
    names = [name for name in ("chosen", "rejected") if getattr(record, name) is not None]
    try:
        encoded = encoder.answers(
            prompt,
            [getattr(record, name) for name in names],
            name,
            names,
            [name not in record.unfinished for name in names],
        )
    except InvalidRequest as error:
        raise DataError(f"{record.source}: {error}") from error
    found = dict(zip(names, encoded.answers, strict=True))
    if record.rejected is not None and record.rejected == record.chosen:
        found["rejected"] = found["chosen"]  # one answer, whichever of the two was cut
    return encoded.prompt, found, encoded.shares_token


def split_by_prompt(records: Sequence[Record], fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and development records; all answers to one prompt stay on one side.

    The prompts with the smallest hashes go to development: about `fraction` of the distinct ones, at least one on each side.

    Raises:
        DataError: there is only one prompt.
    """
    keys = [f"{seed} {json.dumps(record.prompt, sort_keys=True)}" for record in records]
    if len(set(keys)) < 2:
        raise DataError("all records share one prompt: none can be kept for development; give --eval_dataset")
    return _split(records, keys, fraction)


def split_examples(examples: Sequence[Example], fraction: float) -> tuple[list[Example], list[Example]]:
    """The same of examples; where all share one prompt, by their wanted answers.

    Raises:
        DataError: all are alike.
    """
    keys = [str(list(example.prompt)) for example in examples]
    if len(set(keys)) < 2:
        keys = [str(list(example.chosen)) for example in examples]
    if len(set(keys)) < 2:
        raise DataError(f"all {len(examples)} examples are alike: none can be kept for development")
    return _split(examples, keys, fraction)


def _split(items: Sequence[T], keys: Sequence[str], fraction: float) -> tuple[list[T], list[T]]:
    """Items of the keys with the largest hashes, and of the others; at least one key on each side."""
    hashes = [_hash(key) for key in keys]
    distinct = sorted(set(hashes))
    count = min(max(1, round(fraction * len(distinct))), len(distinct) - 1)
    held_out = set(distinct[:count])
    train = [item for key, item in zip(hashes, items, strict=True) if key not in held_out]
    return train, [item for key, item in zip(hashes, items, strict=True) if key in held_out]


def fingerprint_examples(examples: Sequence[Example], *, rejected: bool = False, weights: bool = False) -> str:
    """A hash of prompts and wanted answers, in order, and of a teacher's prompts.

    With `rejected` of unwanted answers, too, and with `weights` of weights that are not 1.
    """

    def described(example: Example) -> list[list[int] | float]:
        answers = [example.chosen, example.rejected] if rejected else [example.chosen]
        ids = [example.prompt, *answers, *([example.teacher] if example.teacher else [])]
        return [*map(list, ids), *([example.weight] if weights and example.weight != 1 else [])]

    return json_digest(map(described, examples))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
