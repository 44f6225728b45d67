"""A prompt that is to become an aligner: what is put before every prompt, and what a run that learns from it cannot be told.

The *teacher* is the proposal itself behind these messages or this text. The aligned model without them learns the proposal's
rows with them, so what a prompt costs at every request is paid once.
"""

import dataclasses
from collections.abc import Iterable
from typing import Self, TypeAlias

from trimtab.data.preamble import Preamble
from trimtab.data.records import Record
from trimtab.errors import DataError, InvalidOption
from trimtab.train.plan import Plan

__all__ = ["Parts", "Teacher", "lack_answers", "teach"]

Parts: TypeAlias = tuple[list[Record], list[Record]]
"""Training and development records."""


class Teacher(Preamble):
    """What is put before every prompt of a run."""

    @classmethod
    def read(cls, path: str, option: str = "teacher_prompt") -> Self:
        """From a file, see `Preamble.read`."""
        return super().read(path, option)

    def put_before_all(self, records: Iterable[Record]) -> list[Record]:
        """The records without unwanted answers, each with its prompt as the teacher gets it.

        Raises:
            DataError: names the record that the teacher cannot be put before, and the fix.
        """
        return [
            dataclasses.replace(record, rejected=None, teacher=self.put_before(record.prompt, record.source))
            for record in records
        ]


def teach(plan: Plan, parts: Parts) -> Parts:
    """The records with their prompts as the teacher of the options gets them; as they are, if there is none.

    Raises:
        InvalidOption: the teacher cannot be read; or drawn answers are spoken of and all are given, or the other way around.
        DataError: the teacher cannot be put before a record, or only some records have answers.
    """
    if plan.asked.teacher_prompt is None:
        return parts
    teacher = Teacher.read(plan.asked.teacher_prompt)
    drawn = lack_answers(parts)
    if not drawn and plan.asked.teacher_max_tokens is not None:
        raise InvalidOption("teacher_max_tokens would change nothing: the records have answers; leave it out")
    if drawn and plan.asked.cut_answers != "auto":
        raise InvalidOption(
            "cut_answers would change nothing: of answers that are drawn it is known how they end; leave it out"
        )
    return teacher.put_before_all(parts[0]), teacher.put_before_all(parts[1])


def lack_answers(parts: Parts) -> bool:
    """Whether the answers are to be drawn, because no record has one.

    Raises:
        DataError: some have one, and some have not.
    """
    records = [*parts[0], *parts[1]]
    lacking = [record for record in records if record.chosen is None]
    if lacking and len(lacking) < len(records):
        raise DataError(
            f"{lacking[0].source}: has no answer, but other records have: give all of them answers, or none, and the proposal"
            " draws them behind teacher_prompt"
        )
    return bool(lacking)
