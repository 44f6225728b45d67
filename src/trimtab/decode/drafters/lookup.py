"""Guess how a text goes on by what followed its last few tokens, in the text itself and elsewhere, and know how sure that is.

Each *source* says one token for the end of a text, and of what kind that guess is: found by how many tokens, say. How often the
guesses of a kind come true is learned from the text as it grows, whether anybody asked for them or not; where sources differ,
the likelier one counts. So a chain of guesses comes with the probability that each stays, and drafts are as long as they pay.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from trimtab.decode.drafters.base import Guess
from trimtab.decode.pace import Hope

__all__ = ["LONGEST", "Found", "Lookup", "Source", "Text"]

LONGEST = 3
"""Tokens to look for at most; shorter runs are tried after longer ones, down to 1."""
RUNS = (4, 8, 16)
"""Guesses in a row that came true, from which text counts as copied, ever more surely."""
SHARES = (0.2, 0.35, 0.55, 0.65, 0.75, 0.85)
"""How often a guess from the text comes true: by one token that was found, by two, by three, and by three after each of `RUNS`.
As measured on Python files and chats."""
DOUBTFUL = 0.02
"""A chain of guesses ends where it is less likely than this to be right so far."""


class Found(NamedTuple):
    """A guess of one token."""

    token: int
    kind: int
    """Of the source's kinds."""


class Source(Protocol):
    """What says how texts go on."""

    @property
    def kinds(self) -> int:
        """How many kinds of guesses there are."""

    def share(self, kind: int) -> float:
        """How often guesses of a kind come true, before the text itself has shown more."""

    def find(self, text: list[int], run: int) -> Found | None:
        """The token that follows the last tokens of a text, `LONGEST` of them at most; None if nothing is known of them.

        Args:
            text: those tokens.
            run: how many guesses in a row have come true before.
        """

    def learn(self, text: list[int], token: int, found: Found | None) -> None:
        """A token followed these, for which `found` was said."""


class Text:
    """One text as a source: what followed its last few tokens when they last stood there.

    That is prompt lookup decoding (Saxena, 2023). Text that is being copied goes on: the more guesses in a row came true, the
    surer the next one is.
    """

    kinds = len(SHARES)

    def __init__(self) -> None:
        self._next: dict[tuple[int, ...], int] = {}
        self.passing: dict[tuple[int, ...], int] = {}
        """What followed what in a chain of guesses that is being made."""

    def share(self, kind: int) -> float:
        """Of any text."""
        return SHARES[kind]

    def find(self, text: list[int], run: int) -> Found | None:
        """By as many tokens as can be found."""
        for n in range(len(text), 0, -1):
            last = tuple(text[-n:])
            token = self.passing.get(last, self._next.get(last))
            if token is not None:
                return Found(token, n - 1 if n < LONGEST else n - 1 + sum(run >= least for least in RUNS))
        return None

    def learn(self, text: list[int], token: int, found: Found | None) -> None:
        """It is said now."""
        self._note(text, token, self._next)

    def pretend(self, text: list[int], token: int) -> None:
        """It is guessed, and counts until `passing` is cleared."""
        self._note(text, token, self.passing)

    def _note(self, text: list[int], token: int, into: dict[tuple[int, ...], int]) -> None:
        for n in range(1, len(text) + 1):
            into[tuple(text[-n:])] = token


class Lookup:
    """What is known of one text.

    Args:
        tokens: the text so far.
        others: further sources, which other texts may share.
    """

    def __init__(self, tokens: Sequence[int], others: Sequence[Source] = ()) -> None:
        self._tail: list[int] = []
        self._text = Text()
        self._sources: tuple[Source, ...] = (self._text, *others)
        self._hopes = [[Hope() for _ in range(source.kinds)] for source in self._sources]
        self._runs = [0] * len(self._sources)
        for token in tokens:  # how a prompt goes on tells little of how an answer does
            for source in self._sources:
                source.learn(self._tail, token, None)
            self._tail = [*self._tail[1 - LONGEST :], token]

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens that are certain."""
        for token in tokens:
            for i, source in enumerate(self._sources):
                found = source.find(self._tail, self._runs[i])
                right = found is not None and found.token == token
                if found is not None:
                    self._hopes[i][found.kind].observe(right, 1)
                self._runs[i] = self._runs[i] + 1 if right else 0
                source.learn(self._tail, token, found)
            self._tail = [*self._tail[1 - LONGEST :], token]

    def guess(self, count: int) -> Guess:
        """The next tokens, up to `count`, each as if those before it had been accepted, while that is likely enough."""
        tail, runs = self._tail, list(self._runs)
        tokens: list[int] = []
        odds: list[float] = []
        likely = 1.0
        while len(tokens) < count:
            found = [source.find(tail, run) for source, run in zip(self._sources, runs, strict=True)]
            chance = [0.0 if one is None else self._odds(i, one.kind) for i, one in enumerate(found)]
            best = max(range(len(found)), key=chance.__getitem__)
            one = found[best]
            if one is None or likely * chance[best] < DOUBTFUL:
                break
            likely *= chance[best]
            tokens.append(one.token)
            odds.append(chance[best])
            runs = [
                run + 1 if other is not None and other.token == one.token else 0 for run, other in zip(runs, found, strict=True)
            ]
            self._text.pretend(tail, one.token)
            tail = [*tail[1 - LONGEST :], one.token]
        self._text.passing.clear()
        return Guess(tokens, odds)

    def _odds(self, source: int, kind: int) -> float:
        return self._hopes[source][kind].estimate(self._sources[source].share(kind))
