"""Where the rows of a data set come from: JSON Lines (also gzipped), Parquet, or the hub."""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import DataError
from trimtab.extras import need
from trimtab.files import expand_home
from trimtab.reasons import reason_of

__all__ = ["DataOptions", "is_cached", "is_local", "read_rows"]

_FILES = (".jsonl", ".jsonl.gz", ".parquet")


class DataOptions(Protocol):
    """The flags that say how a data set is read."""

    @property
    def dataset_split(self) -> str:
        """The split of a hub data set, maybe sliced: `train[:1000]`."""

    @property
    def dataset_config(self) -> str | None:
        """The configuration of a hub data set that has several."""

    @property
    def dataset_data_dir(self) -> str | None:
        """The folder of a hub data set that is sorted into folders."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What `parse_columns` takes."""


def is_local(dataset: str) -> bool:
    """Whether a name can only be that of a file here, there or not."""
    path = expand_home(dataset)
    return path.suffix in (".jsonl", ".gz", ".parquet", ".json") or path.is_absolute() or len(path.parts) > 2


def is_cached(dataset: str) -> bool:
    """Whether a hub data set was loaded on this machine before."""
    _need_datasets(dataset)
    from datasets import config

    return (Path(config.HF_DATASETS_CACHE) / dataset.replace("/", "___")).is_dir()


def read_rows(dataset: str, how: DataOptions | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row with the name of its place, such as `data.jsonl:12`."""
    path = expand_home(dataset)
    if path.is_dir():
        raise DataError(f"{dataset}: is a folder; give one of its files ({', '.join(_FILES)})")
    if not path.exists():
        if is_local(dataset):
            raise DataError(f"{dataset}: there is no such file")
        yield from _hub_rows(dataset, how)
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
    need("train", f"'{name}', a Parquet file,", "pyarrow.parquet")
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: cannot be read as Parquet: {error}") from error
    yield from (
        (f"{name} row {i}", {key: _without_nulls(value) for key, value in row.items()}) for i, row in enumerate(rows, 1)
    )


def _without_nulls(value: Any) -> Any:
    """A value without empty fields: a column of Parquet has one type, so each object in it has the fields of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _need_datasets(name: str) -> None:
    need("train", f"'{name}' is no file here, and a data set of the hub", "datasets")


def _hub_rows(name: str, how: DataOptions | None) -> Iterator[tuple[str, dict[str, Any]]]:
    _need_datasets(name)
    from datasets import load_dataset

    config, folder, split = (how.dataset_config, how.dataset_data_dir, how.dataset_split) if how else (None, None, "train")
    try:
        data = load_dataset(name, config, data_dir=folder, split=split)
    except Exception as error:  # whatever the hub, the network or the data set's own files give rise to
        raise DataError(f"'{name}' is no file here, and the hub gave no data set of that name: {reason_of(error)}") from error
    yield from (
        (f"{name} row {i}", {key: _without_nulls(value) for key, value in row.items()}) for i, row in enumerate(data, 1)
    )
