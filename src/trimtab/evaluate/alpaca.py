"""AlpacaEval's JSON: a list of outputs, `{instruction, output, generator, …}`, and of annotations, which compare two outputs.

An annotation has `output_1` and `generator_1` (the baseline's), `output_2` and `generator_2`, and a `preference` from 1 to 2,
where 2 says that the second is better and 0, for a draw, is the 1.5 of older files. What we write, `alpaca_eval` reads.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import DataError
from trimtab.files import expand_home, write_json

__all__ = ["Annotation", "read_annotations", "read_outputs", "write_outputs"]

SURROGATE = re.compile("[\ud800-\udfff]")
"""What JSON can spell, and no file can hold."""


@dataclass(frozen=True)
class Annotation:
    """What a judge said of two outputs.

    Attributes:
        preference: 1 to 2, 2 where the second is better; None where the judge gave none.
        output_1, output_2: the texts.
        generator_1, generator_2: who wrote them.
        annotator: the judge.
        instruction: what was asked.
    """

    preference: float | None
    output_1: str
    output_2: str
    generator_1: str = ""
    generator_2: str = ""
    annotator: str = ""
    instruction: str = ""


def read_annotations(path: str | Path) -> list[Annotation]:
    """Read an annotation file: JSON, or JSON Lines, gzipped or not.

    Raises:
        DataError: it is none, or holds no annotation; the message names the row and the field.
    """
    return [_annotation(row, source) for source, row in _rows(path)]


def read_outputs(path: str | Path, *, need_output: bool = True) -> list[dict[str, Any]]:
    """Read a file of outputs: AlpacaEval's, or the JSON Lines of `trimtab generate`. Each has `instruction` and `output`.

    Args:
        path: JSON, or JSON Lines, gzipped or not.
        need_output: refuse a row without one; otherwise it is None there.

    Raises:
        DataError: it is none, or holds no output; the message names the row and the field.
    """
    outputs = []
    for source, row in _rows(path):
        known = {"instruction": row.get("instruction", row.get("prompt")), "output": row.get("output", row.get("completion"))}
        if not isinstance(known["instruction"], (str, list)):
            raise DataError(f"{source}: 'instruction' must be a text, and is {_kind(known['instruction'])}")
        if not isinstance(known["output"], str) and (need_output or known["output"] is not None):
            raise DataError(f"{source}: 'output' must be a text, and is {_kind(known['output'])}")
        for name, value in known.items():
            if isinstance(value, str) and SURROGATE.search(value):
                raise DataError(f"{source}: '{name}' is no valid Unicode: it has a lone surrogate")
        if row.get("input"):  # AlpacaFarm's second half of an instruction
            known["instruction"] = f"{known['instruction']}\n\n{row['input']}"
        outputs.append({**row, **known})
    return outputs


def write_outputs(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write outputs or annotations, atomically."""
    write_json(path, list(rows))


def _annotation(row: Mapping[str, Any], source: str) -> Annotation:
    if "preference" not in row:
        raise DataError(f"{source}: 'preference' is missing; it has: {', '.join(row)}")
    texts = {}
    for name in ("output_1", "output_2"):
        if not isinstance(row.get(name), str):
            raise DataError(f"{source}: '{name}' must be a text, and is {_kind(row.get(name))}")
        texts[name] = row[name]
    names = {name: str(row.get(name) or "") for name in ("generator_1", "generator_2", "annotator", "instruction")}
    return Annotation(_preference(row["preference"], source), **texts, **names)


def _preference(value: Any, source: str) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{source}: 'preference' must be a number from 1 to 2, or null, and is {value!r}")
    if value == 0:
        return 1.5
    if not 1 <= value <= 2:
        raise DataError(f"{source}: 'preference' must be from 1 to 2, or 0 for a draw, or null, and is {value!r}")
    return float(value)


def _rows(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """Every object of the file, with the name of its place."""
    path = expand_home(path)
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8-sig")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    rows = _parse(text, str(path))
    if not rows:
        raise DataError(f"{path}: holds nothing")
    for source, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{source}: must be a JSON object, not {_kind(row)}")
    return rows


def _parse(text: str, name: str) -> list[tuple[str, Any]]:
    try:
        if text.lstrip().startswith("["):
            return [(f"{name} entry {i}", row) for i, row in enumerate(json.loads(text), 1)]
        source = name
        rows = []
        for i, line in enumerate(text.split("\n"), 1):
            if line.strip():
                source = f"{name}:{i}"
                rows.append((source, json.loads(line)))
        return rows
    except (ValueError, RecursionError) as error:
        place = name if text.lstrip().startswith("[") else source
        raise DataError(f"{place}: neither a JSON list nor JSON Lines: {error}") from None


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__
