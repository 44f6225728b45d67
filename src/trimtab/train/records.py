"""Read data sets in TRL's layouts: JSON Lines (also gzipped), Parquet, or the hub.

    prompt, completion           a prompt with a wanted answer
    prompt, chosen, rejected     a prompt with a wanted and an unwanted answer
    messages                     a conversation whose last message is the wanted answer
    prompt                       a prompt alone, to sample from

A prompt is a text or a list of messages, and an answer is of the same kind. Further columns are ignored.
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.decode.prompts import is_chat
from trimtab.errors import DataError

__all__ = ["Record", "read_records", "read_rows"]

_FILES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class Record:
    """One example.

    Attributes:
        prompt: a text or messages.
        chosen: the wanted answer, a text or a list of messages; None if there is none.
        rejected: an unwanted answer, or one drawn from the proposal; None if there is none.
        source: where it came from, for messages to the user.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    source: str


def read_records(dataset: str, *, need: str = "chosen", split: str = "train") -> list[Record]:
    """Read a whole data set.

    Args:
        dataset: a `.jsonl`, `.jsonl.gz` or `.parquet` file, or a hub id.
        need: what every record must have: `"prompt"`, `"chosen"` or `"rejected"` (which includes the ones before).
        split: which split of a hub data set.

    Raises:
        DataError: names the file and the line, or the row.
    """
    records = [_record(row, source, need) for source, row in read_rows(dataset, split=split)]
    if not records:
        raise DataError(f"{dataset}: holds no records")
    return records


def read_rows(dataset: str, *, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with the name of its place, such as `data.jsonl:12`."""
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise DataError(f"{dataset}: is a folder; give one of its files ({', '.join(_FILES)})")
    if not path.exists():
        if path.suffix in (".jsonl", ".gz", ".parquet", ".json") or path.is_absolute() or len(path.parts) > 2:
            raise DataError(f"{dataset}: there is no such file")
        yield from _hub_rows(dataset, split)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_rows(path, dataset)
    elif path.name.endswith(".parquet"):
        yield from _parquet_rows(path, dataset)
    else:
        raise DataError(f"{dataset}: is none of {', '.join(_FILES)}")


def _json_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{name}:{number}", _json_object(line, f"{name}:{number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: cannot be read after line {number}: {error}") from error


def _json_object(line: bytes, source: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{source}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: must be a JSON object, not {type(row).__name__}")
    return row


def _parquet_rows(path: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as Parquet: {error}") from error
    yield from ((f"{name} row {i}", row) for i, row in enumerate(rows, 1))


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's own files give rise to
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"'{name}' is no file here, and the hub gave no data set of that name: {first}") from error
    yield from ((f"{name} row {i}", dict(row)) for i, row in enumerate(data, 1))


def _record(row: Mapping[str, Any], source: str, need: str) -> Record:
    if row.get("messages") is not None and row.get("prompt") is None:
        messages = row["messages"]
        last = messages[-1] if is_chat(messages) else None
        answered = isinstance(last, Mapping) and last.get("role") == "assistant"
        if need == "prompt" and isinstance(last, Mapping) and not answered:
            return Record(messages, None, None, source)
        if not answered or len(messages) < 2:
            raise DataError(f"{source}: 'messages' must be a conversation that ends with the assistant's answer")
        _check_messages(messages, "messages", source)
        return Record(messages[:-1], messages[-1:], None, source)
    prompt = _text_or_chat(row, "prompt", source)
    if not prompt:
        raise DataError(f"{source}: 'prompt' is empty")
    chosen = _answer(row, "chosen" if row.get("chosen") is not None else "completion", prompt, source)
    rejected = _answer(row, "rejected", prompt, source)
    if chosen is None and need != "prompt":
        raise DataError(f"{source}: has neither 'completion' nor 'chosen'; it has: {', '.join(row)}")
    if rejected is None and need == "rejected":
        raise DataError(f"{source}: 'rejected' is missing, which this objective needs; it has: {', '.join(row)}")
    return Record(prompt, chosen, rejected, source)


def _answer(row: Mapping[str, Any], name: str, prompt: Any, source: str) -> Any:
    """An answer of the prompt's kind, without the prompt where the data repeat it; None if there is none."""
    if row.get(name) is None:
        return None
    value = _text_or_chat(row, name, source)
    if isinstance(value, str) == isinstance(prompt, str):
        return value[len(prompt) :] if not isinstance(value, str) and value[: len(prompt)] == prompt else value
    raise DataError(f"{source}: '{name}' must be {'a text' if isinstance(prompt, str) else 'messages'} like 'prompt'")


def _check_messages(messages: Any, name: str, source: str) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise DataError(f"{source}: {name}[{i}] must be a message with 'role' and 'content', not {message!r}")


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
