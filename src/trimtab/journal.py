"""What judges have said, kept in a file that only grows: nothing is asked twice, whatever happens in between.

One line for each answer, written and synced as it comes (`trimtab.kept_lines`). A kill loses what was in flight and no more.
Keys say what was asked (the judge and everything that it was shown), so a file serves any run that asks the same.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from trimtab.errors import DataError
from trimtab.kept_lines import KeptLines

__all__ = ["Journal", "key_of"]


def key_of(question: Any) -> str:
    """A key for whatever JSON can say."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class Journal:
    """Answers by key, as a context manager; one process at a time has it.

    Args:
        path: a `.jsonl` file; it need not be there yet.

    Raises:
        InvalidOption: another process has it.
        DataError: it is something else.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._answers: dict[str, dict[str, Any]] = {}
        self._file = KeptLines(self.path)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            lines = stack.enter_context(self._file).lines
            self._load(lines)
            self._file.keep(len(lines))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, key: str) -> dict[str, Any] | None:
        """The latest answer to a question, if there is one."""
        return self._answers.get(key)

    def items(self) -> list[tuple[str, dict[str, Any]]]:
        """Every key with its latest answer."""
        return list(self._answers.items())

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._answers[key]

    def add(self, key: str, answer: Mapping[str, Any]) -> None:
        """Keep an answer; it is on disk when this returns. Any thread may call it."""
        self.add_all({key: answer})

    def add_all(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep several answers at once."""
        self._file.append("".join(json.dumps({"key": key, **answer}) + "\n" for key, answer in answers.items()))
        self._answers |= {key: dict(answer) for key, answer in answers.items()}

    def _load(self, lines: list[bytes]) -> None:
        for number, line in enumerate(lines, 1):
            try:
                answer = json.loads(line)
                self._answers[answer.pop("key")] = answer
            except (ValueError, KeyError, AttributeError, TypeError):
                raise DataError(f"{self.path}:{number}: is no line of a journal: move the file away") from None
