"""`corpus`: a table of what followed what in other texts drafts, beside the text itself and what was said a moment ago.

After Liu et al., "Adaptive draft-verification for efficient large language model decoding" (ADED, arXiv 2407.12021): a table of
trigrams that adapts to what is being decoded. Here drafts are certain, and so change no token (`trimtab.core.speculation`):
what is learned from one request may draft for all others, whose texts stay what they are.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from trimtab.decode.drafters.base import Given, Guess, TextDrafter
from trimtab.decode.drafters.lookup import Found, Lookup
from trimtab.decode.drafters.table import LONGEST, DraftTable
from trimtab.decode.pace import Hope
from trimtab.errors import InvalidOption, VocabularyMismatch
from trimtab.files import expand_home
from trimtab.models.vocabulary import fingerprint_vocabulary

__all__ = ["CorpusDrafter"]

STEPS = (0.25, 0.5, 0.75)
"""Shares from which a token's followers are of the next kind."""
RECENT = 200_000
"""Runs that were said lately and are remembered, for all texts together."""


class TableSource:
    """A table's best token for the longest run that it knows; how often that is right is learned from all texts.

    Args:
        table: it.
    """

    def __init__(self, table: DraftTable) -> None:
        self._table = table
        kinds = [(n, step) for n in range(LONGEST) for step in range(len(STEPS) + 1)]
        self._seen = [(Hope(), 0.05 + 0.15 * step + 0.05 * n) for n, step in kinds]
        self.kinds = len(kinds)
        """By tokens that were found, and by the share of the best follower."""

    def share(self, kind: int) -> float:
        """As it was in all texts so far."""
        hope, prior = self._seen[kind]
        return hope.estimate(prior)

    def find(self, text: list[int], run: int) -> Found | None:
        """By as many tokens as the table knows."""
        for n in range(len(text), 0, -1):
            if best := self._table.best(text[-n:]):
                return Found(best[0], (n - 1) * (len(STEPS) + 1) + sum(best[1] >= step for step in STEPS))
        return None

    def learn(self, text: list[int], token: int, found: Found | None) -> None:
        """The table stays; what is learned is how far it can be trusted."""
        if found is not None:
            self._seen[found.kind][0].observe(found.token == token, 1)


class Recent:
    """What followed runs of three tokens when they were last said, in whichever text; the oldest runs are forgotten."""

    kinds = 3
    """By guesses in a row that came true: none, one, more."""

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}

    def share(self, kind: int) -> float:
        """At first."""
        return (0.3, 0.45, 0.6)[kind]

    def find(self, text: list[int], run: int) -> Found | None:
        """By exactly three."""
        token = self._next.get(tuple(text))
        return None if token is None else Found(token, min(run, 2))

    def learn(self, text: list[int], token: int, found: Found | None) -> None:
        """It is the latest now."""
        if len(text) == LONGEST:
            self._next.pop(last := tuple(text), None)
            self._next[last] = token
            if len(self._next) > RECENT:
                del self._next[next(iter(self._next))]


class Shared(NamedTuple):
    """What all texts that draft from a file have in common."""

    table: DraftTable
    sources: tuple[TableSource, Recent]


@functools.lru_cache(maxsize=8)
def _open(path: Path, changed: int) -> Shared:
    """A file as it was changed last."""
    table = DraftTable(path)
    return Shared(table, (TableSource(table), Recent()))


@dataclass(frozen=True)
class CorpusDrafter(TextDrafter):
    """What followed the last few tokens in a corpus, in the text itself, and in what was said lately.

    Attributes:
        path: a file of `trimtab draft-table`.

    Raises:
        DataError: it is none.
    """

    name: ClassVar[str] = "corpus"
    takes: ClassVar[str | None] = "FILE"
    path: Path
    shared: Shared = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Open the file."""
        path = expand_home(self.path).resolve()
        changed = path.stat().st_mtime_ns if path.exists() else 0
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "shared", _open(path, changed))

    @classmethod
    def make(cls, argument: str | None, given: Given) -> Self:
        """From a file, whose vocabulary must be the proposal's."""
        if not argument:
            raise InvalidOption("draft: 'corpus' wants to know which table: corpus:FILE, made by `trimtab draft-table`")
        drafter = cls(Path(argument))
        theirs = drafter.shared.table.facts.get("vocabulary")
        if given.tokenizer is not None and fingerprint_vocabulary(given.tokenizer) != theirs:
            raise VocabularyMismatch(
                f"draft: the table '{argument}' was made with another tokenizer than the proposal's: make one with"
                " `trimtab draft-table --proposal` of this proposal"
            )
        return drafter

    @property
    def who(self) -> str:
        """In words."""
        return f"the table {self.path}, and the text itself"

    def start(self, tokens: Sequence[int]) -> Lookup:
        """What was said so far."""
        return Lookup(tokens, self.shared.sources)

    def accepted(self, memory: Lookup, tokens: Sequence[int]) -> None:
        """It is said, too."""
        memory.extend(tokens)

    def guess(self, memory: Lookup, count: int) -> Guess:
        """By whatever is likeliest."""
        return memory.guess(count)
