"""What the tasks have in common: records as chats, dealt to parts by what they are about, and written once.

A record is what `trimtab train` reads (`prompt` with `completion`, or with `chosen` and `rejected`, all of them messages), and
some columns of ours that training leaves alone: `group`, the name of what it is about, and what a program judges it by.
"""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.errors import DataError
from trimtab.files import atomic_folder, read_json

__all__ = ["Record", "Task", "answer", "place", "question", "read_part"]

Record = dict[str, Any]
Parts = Mapping[str, Sequence[Record]]
"""By name: `train`, `dev`, `test`, and maybe further ones to test on."""

ABOUT = "about.json"


class Task(NamedTuple):
    """One thing to learn.

    Attributes:
        name: what it is called, also its folder.
        make: its parts, out of the file that it needs if it needs one.
        system_prompt: what one would tell the proposal to do, without examples.
        max_tokens: of an answer.
        file: what it needs in the folder of `--data`; None if nothing.
        sources: packages that its texts come from, whose versions belong to the record.
        answered: how many prompts of a test set are answered, the first ones; None for all. Likelihoods are of all.
    """

    name: str
    make: Callable[[Path | None], Parts]
    system_prompt: str
    max_tokens: int
    file: str | None = None
    sources: tuple[str, ...] = ()
    answered: int | None = None

    def prepare(self, folder: Path, data: Path | None, limit: int | None = None) -> None:
        """Write `train.jsonl` and the other parts into `folder`, all of them at once, unless they are there.

        Those that come from installed packages are kept whatever is installed now, so a study can go on on another machine.

        Args:
            folder: where they go.
            data: the folder that has the file which this task needs.
            limit: the most records of each part.

        Raises:
            DataError: the file is not there, or is not the one that the parts were made from.
        """
        path = None
        if self.file is not None:
            path = None if data is None else data / self.file
            if path is None or not path.is_file():
                raise DataError(f"task '{self.name}' needs {self.file} in the folder that --data names, which is {data}")
        about = self._about(path)
        if (folder / ABOUT).exists():
            if path is not None and (there := read_json(folder / ABOUT)["made_from"]) != about:
                raise DataError(f"{folder} was made from {there}, and now there is {about}: choose another --out")
            return
        parts = {name: records[:limit] for name, records in self.make(path).items()}
        with atomic_folder(folder) as staging:
            for name, records in parts.items():
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
                (staging / f"{name}.jsonl").write_text(lines, encoding="utf-8")
            counts = {name: len(records) for name, records in parts.items()}
            (staging / ABOUT).write_text(json.dumps({"records": counts, "made_from": about}, indent=2), encoding="utf-8")

    def _about(self, path: Path | None) -> dict[str, Any]:
        """What the records depend on, apart from this code."""
        if path is not None:
            return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        from importlib.metadata import version

        return {name: platform.python_version() if name == "python" else version(name) for name in self.sources}


def read_part(folder: Path, name: str) -> list[Record]:
    """The records of a part; empty if the task has no such part."""
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def question(text: str) -> list[dict[str, str]]:
    """What a user says, as a prompt."""
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, str]]:
    """What an assistant says, as a completion."""
    return [{"role": "assistant", "content": text}]


def place(name: str) -> float:
    """A number from 0 to 1 that belongs to a name for ever."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) / 2**256
