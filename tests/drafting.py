"""Drafters for tests: one looks tokens up in a fixed text, one draws from rows of its own, and one keeps a record."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from trimtab import AlignedModel, Completion, SamplingParams
from trimtab.decode.drafters import CorpusDrafter, Drafted, Drafter, Guess, Step, TextDrafter
from trimtab.decode.drafters.table import count_runs, write_table

FIXED = '''
"""A drafter of somebody else's: whatever the text, it says the words of a file in turn."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from trimtab.decode.drafters import TextDrafter
from trimtab.errors import InvalidOption


@dataclass(frozen=True)
class FixedText(TextDrafter):
    name: ClassVar[str] = "fixed"
    takes: ClassVar[str | None] = "FILE"
    tokens: tuple[int, ...]

    @classmethod
    def make(cls, argument, given):
        if not argument or not Path(argument).is_file():
            raise InvalidOption(f"draft: there is no file '{argument}'; say fixed:FILE")
        return cls(tuple(given.tokenizer(Path(argument).read_text(encoding="utf-8"))["input_ids"]))

    def start(self, tokens):
        return [len(tokens)]

    def accepted(self, memory, tokens):
        memory[0] += len(tokens)

    def guess(self, memory, count):
        return [self.tokens[(memory[0] + i) % len(self.tokens)] for i in range(count)]
'''


@dataclass(frozen=True)
class Cycle(TextDrafter):
    """Says some tokens in turn, by the place in the text; nothing at every fifth place."""

    name: ClassVar[str] = "cycle"
    tokens: tuple[int, ...] = (1, 2, 3, 4)

    def start(self, tokens: Sequence[int]) -> list[int]:
        return list(tokens)

    def accepted(self, memory: list[int], tokens: Sequence[int]) -> None:
        memory += tokens

    def guess(self, memory: list[int], count: int) -> list[int]:
        places = range(len(memory), len(memory) + count)
        return [self.tokens[place % len(self.tokens)] if place % 5 else -1 for place in places]


@dataclass(frozen=True)
class Even(Drafter):
    """Draws from an even row over `size` tokens, through the texts' own knobs."""

    name: ClassVar[str] = "even"
    size: int = 5

    def draft(self, step: Step) -> Drafted:
        row = torch.full((len(step.limits), 1, self.size), 1 / self.size, dtype=torch.float64).log()
        drafts: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        for _ in range(step.width):
            token, drawn_from = step.draw(row, drafts)
            drafts.append(token.squeeze(1))
            rows += [] if drawn_from is None else [drawn_from]
        return Drafted(torch.stack(drafts, 1), torch.cat(rows, 1) if rows else None)


@dataclass(eq=False)
class Recorder:
    """Another drafter, by its protocol alone, and what it was told of each text."""

    inner: Drafter
    told: list[list[int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def on(self, models: Any) -> "Recorder":
        return self

    def start(self, tokens: Sequence[int]) -> tuple[list[int], Any]:
        self.told.append(list(tokens))
        return self.told[-1], self.inner.start(tokens)

    def accepted(self, memory: tuple[list[int], Any], tokens: Sequence[int]) -> None:
        memory[0].extend(tokens)
        self.inner.accepted(memory[1], tokens)

    def draft(self, step: Step) -> Drafted:
        return self.inner.draft(step._replace(memories=[memory[1] for memory in step.memories]))

    def look(self, memory: tuple[list[int], Any], count: int) -> Guess:
        return self.inner.look(memory[1], count)


_FOLDER = tempfile.TemporaryDirectory()


def corpus_of(texts: Sequence[Sequence[int]], name: str = "corpus.table") -> CorpusDrafter:
    """A drafter from a table of these texts."""
    path = Path(_FOLDER.name) / name
    write_table(path, count_runs([(text, 1) for text in texts]), {"vocabulary": "sha256:x"})
    return CorpusDrafter(path)


def alone_and_together(
    model: Callable[..., AlignedModel], asked: Sequence[tuple[list[int], SamplingParams]]
) -> list[list[Completion]]:
    """What each request gets alone and token by token, which is what it gets in a batch, at every draft length.

    Args:
        model: makes one with a draft length, and further settings.
        asked: prompts and what is asked for.
    """
    expected = [model(0).generate([prompt], params) for prompt, params in asked]
    for length in (0, 2, 5, None):
        together = iter(model(length, max_num_seqs=4).generate(*map(list, zip(*asked, strict=True))))
        assert [[next(together) for _ in range(params.n)] for _, params in asked] == expected, length
    return expected
