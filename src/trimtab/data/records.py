"""Read data sets in TRL's layouts (where their rows come from: `trimtab.data.sources`).

    prompt, completion           a prompt with a wanted answer
    prompt, chosen, rejected     a prompt with a wanted and an unwanted answer
    chosen, rejected             the same, where both begin with the prompt: transcripts or conversations, see `implicit_prompt`
    messages                     a conversation whose last message is the wanted answer
    prompt                       a prompt alone, to sample from

A list `unfinished` names answers that were cut, such as samples by `max_tokens`: they have no end of sequence to learn.
A row with the `finish_reason` `error` is of a completion that could not go on, and is left out.
A prompt is a text or a list of messages, and an answer is of the same kind. Beside messages, `tools` (JSON schemas, or a text
of them) and `chat_template_kwargs` go to the chat template. Further columns are ignored, but for those that change what a
record means: a `label` that says that an answer is not wanted (`trimtab.data.unwanted`), and images. Data that call their
columns otherwise are mapped, and then no others are looked at: `prompt=post`.

A column `weight` says how often training has a record: 3 is the record three times, .5 counts half, 0 leaves it out.
"""

import dataclasses
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.data.implicit import implicit_prompt
from trimtab.data.prompts import CHAT_FIELDS, check_messages, is_chat, join_chat
from trimtab.data.sources import DataOptions, read_rows
from trimtab.data.unwanted import LABEL, refuse_unwanted
from trimtab.errors import DataError, InvalidOption, InvalidRequest

__all__ = [
    "UNFINISHED",
    "WEIGHT",
    "Record",
    "parse_columns",
    "read_records",
    "read_weight",
    "repeat_records",
]

logger = logging.getLogger(__name__)

_FILES = (".jsonl", ".jsonl.gz", ".parquet")
WEIGHT = "weight"
"""The column that says how often training has a record."""
MOST = 1e5
"""The largest weight: a record so many times is more than enough."""
COLUMNS = ("prompt", "completion", "chosen", "rejected", "messages", *CHAT_FIELDS, WEIGHT)
"""The columns that mean something."""
UNFINISHED = "unfinished"
"""The column that says which answers were cut."""


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        prompt: a text or messages.
        chosen: the wanted answer, a text or a list of messages; None if there is none.
        rejected: an unwanted answer, or one drawn from the proposal; None if there is none.
        source: where it came from, for messages to the user.
        unfinished: which of `chosen` and `rejected` were cut, and so do not end.
        teacher: the prompt as a teacher gets it (`trimtab.train.teacher`); None without one.
        columns: what else its row has, by column; empty where that is not asked for.
        weight: how often training has it; 1 where that is not asked for.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    source: str
    unfinished: frozenset[str] = frozenset()
    teacher: Any = None
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weight: float = 1.0

    @property
    def asked(self) -> Any:
        """The prompt that answers are drawn for."""
        return self.prompt if self.teacher is None else self.teacher


def parse_columns(columns: Sequence[str]) -> dict[str, str]:
    """Column names from `FIELD=COLUMN` texts: the layout's field to the data's column.

    Raises:
        InvalidOption: no such field, or the same one twice.
    """
    found: dict[str, str] = {}
    for text in columns:
        field, equals, column = text.partition("=")
        if not equals or not column or field not in COLUMNS:
            raise InvalidOption(f"columns must be FIELD=COLUMN with a field of {', '.join(COLUMNS)}, not '{text}'")
        if field in found:
            raise InvalidOption(f"columns names '{field}' twice")
        found[field] = column
    return found


def read_records(
    dataset: str,
    *,
    need: str = "chosen",
    how: DataOptions | None = None,
    limit: int | None = None,
    answers: bool = True,
    others: bool = False,
    weights: bool = False,
) -> list[Record]:
    """Read a data set.

    Args:
        dataset: a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a hub id.
        need: what every record must have: `"prompt"`, `"chosen"` or `"rejected"` (which includes the ones before).
        how: which part of a hub data set, and how its columns are called. Default: the split `train`, as it is.
        limit: take the first so many.
        answers: whether answers are of interest; otherwise records have none, and what `label` says of them does not matter.
        others: whether records have the other columns of their rows: all but `prompt`, `completion` and `completion_ids`, as
            TRL gives them to reward functions.
        weights: whether the column `weight` is read, for training; those of weight 0 are left out.

    Raises:
        InvalidOption: a Parquet file or a hub data set, and the extra `train` is not installed.
        DataError: names the file and the line, or the row; an answer that is not wanted stands where a wanted one should.
    """
    columns = parse_columns(how.columns) if how else {}
    records, labels, dead, weightless = [], [], 0, 0
    for source, given in itertools.islice(read_rows(dataset, how), limit):
        if answers and given.get("finish_reason") == "error":
            dead += 1
            continue
        row = _renamed(given, columns, source)
        record = _record(row, source, need)
        record = record if answers else Record(record.prompt, None, None, source)
        if weights and row.get(WEIGHT) is not None:
            record = dataclasses.replace(record, weight=read_weight(row[WEIGHT], source, mapped=WEIGHT in columns))
            if record.weight == 0:
                weightless += 1
                continue
        records.append(dataclasses.replace(record, columns=_others(given, columns)) if others else record)
        if answers and record.chosen is not None and record.rejected is None:
            labels.append((source, None if LABEL in columns.values() else given.get(LABEL)))
    if dead:
        logger.warning("%s: %d rows are left out: their completions ended in an error", dataset, dead)
    if weightless:
        logger.info("%s: %d records of weight 0 are left out", dataset, weightless)
    if not records:
        raise DataError(f"{dataset}: holds no records" + (" of a weight above 0" if weightless else ""))
    refuse_unwanted(labels, ignored=bool(columns))
    return records


def repeat_records(records: Sequence[Record]) -> list[Record]:
    """Each as often as its weight says, for where records are drawn.

    Raises:
        DataError: a weight is no whole number.
    """
    if broken := next((record for record in records if record.weight % 1), None):
        raise DataError(f"{broken.source}: 'weight' must be a whole number where answers are drawn, not {broken.weight:g}")
    return [dataclasses.replace(record, weight=1.0) for record in records for _ in range(int(record.weight))]


def _renamed(row: dict[str, Any], columns: Mapping[str, str], source: str) -> dict[str, Any]:
    """The columns that are mapped, and no others; all of them where none is."""
    if missing := [column for column in columns.values() if column not in row]:
        raise DataError(f"{source}: there is no column '{missing[0]}', which --columns names; it has: {', '.join(row)}")
    return {field: row[column] for field, column in columns.items()} if columns else row


def _others(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The columns that are no prompt and no completion, by the layout's names where they are mapped."""
    mapped = {field: row[column] for field, column in columns.items()}
    rest = {name: value for name, value in row.items() if name not in columns.values()}
    return {name: value for name, value in (rest | mapped).items() if name not in ("prompt", "completion", "completion_ids")}


def _record(row: Mapping[str, Any], source: str, need: str) -> Record:
    record = _answers(row, source, need)
    read = {field: _read_field(row[field], field, source) for field in CHAT_FIELDS if row.get(field)}
    fields = {field: value for field, value in read.items() if value}
    if fields and isinstance(record.prompt, str):
        raise DataError(f"{source}: '{min(fields)}' goes to a chat template, but 'prompt' is a text: give messages")
    return dataclasses.replace(record, prompt=join_chat(record.prompt, fields))


def read_weight(value: Any, source: str, *, mapped: bool = False) -> float:
    """How often a record counts.

    Raises:
        DataError: it is no number, or a negative one.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MOST:
        other = "" if mapped else "; if the column means something else, name the others by --columns"
        raise DataError(f"{source}: 'weight' must be a number from 0 to {MOST:g}, not {value!r}{other}")
    return float(value)


def _read_field(value: Any, field: str, source: str) -> Any:
    """A field of a chat; TRL also takes a text of JSON, for the columns of Parquet have one type."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, list):
            value = [json.loads(item) if isinstance(item, str) else item for item in value]
    except ValueError as error:
        raise DataError(f"{source}: '{field}' is not JSON: {error}") from None
    if not value:
        return None
    if field == "tools" and not (isinstance(value, list) and all(isinstance(tool, Mapping) for tool in value)):
        raise DataError(f"{source}: 'tools' must be a list of JSON schemas, not {value!r}")
    if field != "tools" and not isinstance(value, Mapping):
        raise DataError(f"{source}: '{field}' must be an object, not {value!r}")
    return value


def _answers(row: Mapping[str, Any], source: str, need: str) -> Record:
    if row.get("images") or (row.get("image") and not isinstance(row["image"], str)):
        raise DataError(
            f"{source}: has images, which no model here sees; leave them out, or name the other columns by --columns"
        )
    pair = all(row.get(name) is not None for name in ("chosen", "rejected"))
    if row.get("messages") is not None and row.get("prompt") is None and not pair:
        messages = row["messages"]
        last = messages[-1] if is_chat(messages) else None
        answered = isinstance(last, Mapping) and last.get("role") == "assistant"
        if need == "prompt" and isinstance(last, Mapping) and not answered:
            return Record(messages, None, None, source)
        if not answered or len(messages) < 2:
            raise DataError(f"{source}: 'messages' must be a conversation that ends with the assistant's answer")
        _check_messages(messages, "messages", source)
        if need == "rejected":
            raise DataError(
                f"{source}: 'rejected' is missing, which this objective needs; 'messages' hold a wanted answer alone"
            )
        return Record(messages[:-1], messages[-1:], None, source)
    if pair and row.get("prompt") is None:
        row = {**row, **_implicit(row, source)}
    prompt = _text_or_chat(row, "prompt", source)
    if not prompt:
        raise DataError(f"{source}: 'prompt' is empty")
    chosen = _answer(row, "chosen" if row.get("chosen") is not None else "completion", prompt, source)
    rejected = _answer(row, "rejected", prompt, source)
    if chosen is None and need != "prompt":
        raise DataError(f"{source}: has neither 'completion' nor 'chosen'; it has: {', '.join(row)}")
    if rejected is None and need == "rejected":
        raise DataError(f"{source}: 'rejected' is missing, which this objective needs; it has: {', '.join(row)}")
    return Record(prompt, chosen, rejected, source, _unfinished(row))


def _unfinished(row: Mapping[str, Any]) -> frozenset[str]:
    """The answers that are said to be cut, by the names of a record's fields."""
    named = row.get(UNFINISHED)
    names = {"completion": "chosen", "chosen": "chosen", "rejected": "rejected"}
    return frozenset(names[name] for name in named if name in names) if isinstance(named, list) else frozenset()


def _implicit(row: Mapping[str, Any], source: str) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` of a pair whose answers both begin with the prompt."""
    chosen, rejected = (_text_or_chat(row, name, source) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise DataError(f"{source}: 'chosen' and 'rejected' must both be texts, or both messages")
    prompt = implicit_prompt(chosen, rejected)
    if not prompt:
        raise DataError(
            f"{source}: 'prompt' is missing, and 'chosen' and 'rejected' do not begin alike; it has: {', '.join(row)}"
        )
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _answer(row: Mapping[str, Any], name: str, prompt: Any, source: str) -> Any:
    """An answer of the prompt's kind, without the prompt where the data repeat it; None if there is none."""
    if row.get(name) is None:
        return None
    value = _text_or_chat(row, name, source)
    if isinstance(value, str) and isinstance(prompt, str):
        return value
    if not isinstance(value, str) and not isinstance(prompt, str):
        value = value[len(prompt) :] if value[: len(prompt)] == prompt else value
        if value and value[-1]["role"] != "assistant":
            raise DataError(f"{source}: '{name}' must end with the assistant's message, not with that of '{value[-1]['role']}'")
        return value
    if isinstance(value, str):  # `trimtab generate` writes the assistant's text
        return [{"role": "assistant", "content": value}]
    raise DataError(f"{source}: '{name}' must be a text like 'prompt'")


def _check_messages(messages: Any, name: str, source: str) -> None:
    try:
        check_messages(messages, name)
    except InvalidRequest as error:
        raise DataError(f"{source}: {error}") from None


def _text_or_chat(row: Mapping[str, Any], name: str, source: str) -> Any:
    if name not in row or row[name] is None:
        raise DataError(f"{source}: '{name}' is missing; it has: {', '.join(row) or 'nothing'}")
    value = row[name]
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if is_chat(value) or (isinstance(value, list) and not value):
        _check_messages(value, name, source)
        return value
    raise DataError(f"{source}: '{name}' must be a text or a list of messages, not {type(value).__name__}")
