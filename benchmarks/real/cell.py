"""One cell of the study: a task, a system and a seed; where its parts are."""

from pathlib import Path
from typing import NamedTuple

from chats import Record, Task, read_part

__all__ = ["Cell", "slug"]


class Cell(NamedTuple):
    """Paths. Data belong to a task, trained models to a task and a seed."""

    out: Path
    proposal: Path
    task: Task
    system: str
    seed: int
    max_examples: int | None = None
    """The most records of a part; None for all."""

    @property
    def data(self) -> Path:
        """The task's `train.jsonl`, `dev.jsonl`, `test.jsonl`."""
        return self.out / slug(self.task.name) / "data"

    @property
    def result(self) -> Path:
        """What was measured; once it is there, the cell is done."""
        return self.out / slug(self.task.name) / "results" / f"{slug(self.system)}-{self.seed}.json"

    def model(self, name: str) -> Path:
        """The folder of a model that was trained for this task with this seed."""
        return self.out / slug(self.task.name) / "models" / f"{slug(name)}-{self.seed}"

    def read(self, part: str) -> list[Record]:
        """Records; none if the task has no such part."""
        return read_part(self.data, part)

    @property
    def has_pairs(self) -> bool:
        """Whether the task has unwanted answers."""
        return "rejected" in self.read("dev")[0]


def slug(name: str) -> str:
    """A name as a part of a path."""
    return name.replace(", ", "-").replace(" ", "_")
