"""How far to draft ahead: what a step costs, measured, against the tokens that it can be hoped to bring.

A step of k drafts brings 1 + a + a² + … + a^k tokens if each draft is accepted with probability a, and takes a time that
depends on k and on how many sequences decode together. Both are learned while decoding, from steps that are over; so drafting
stops by itself where it does not pay. No choice looks at a draft that was drawn from a row, and with the coupled draw no choice
changes a token. Drafts that were looked up play no part in the text (`trimtab.core.speculation`), so there are chances of each.
"""

import math
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import NamedTuple, Protocol

from trimtab.errors import InvalidOption

__all__ = ["Chances", "Hope", "Load", "Looked", "Pace", "Steady", "Tally"]

MAX_DRAFT = 16
"""The longest draft."""
LADDER = (0, 1, 2, 3, 4, 6, 8, 12, 16)
"""The draft lengths in use."""
DRAWN = 8
"""The longest of them for drafts that a model must make one by one."""
FIRST = (4, 0, 2)
"""Draft lengths that are timed before one is chosen, twice each: the first time of anything is slow."""
PATIENCE = 32
"""Steps in a row in which no draft was worth verifying, after which drafts are looked up seldom: that takes time, too."""
SELDOM = 8
"""Once in so many steps, then."""
LOOK_AROUND = 48
"""Steps after which a neighbour of the best length, or 0, is timed again: what was measured once may no longer be so."""
RECONSIDER = 4
"""Steps after which the best length is worked out again: that takes about as long as a matrix product of a tiny model."""
TRUST = 8.0
"""How many observations what is known of similar requests is worth against a sequence's own."""

Size = tuple[int, ...]


class Load(NamedTuple):
    """Who decodes together in a step; steps of about the same load cost about the same."""

    sequences: int
    drafting: int
    """How many of them draft."""
    groups: int = 1
    """How many sets of models they need."""

    @property
    def size(self) -> Size:
        """Each number by how many binary digits it has."""
        return tuple(number.bit_length() for number in self)


MAX_KINDS = 1000
"""Kinds of requests to remember."""


@dataclass
class Tally:
    """Counts over everything decoded.

    Attributes:
        calls: forward passes of the proposal that tokens were drawn from, counted once for each sequence in them.
        tokens: tokens that came out of them.
        drafted: drafts that were verified.
        tested: those of them up to the first that failed.
        accepted: drafts that stayed.
    """

    calls: int = 0
    tokens: int = 0
    drafted: int = 0
    tested: int = 0
    accepted: int = 0

    def observe(self, accepted: int, drafted: int) -> None:
        """Count one step of one sequence."""
        self.calls += 1
        self.tokens += accepted + 1
        self.drafted += drafted
        self.tested += min(accepted + 1, drafted)
        self.accepted += accepted

    def add(self, other: "Tally") -> None:
        """Count what another one has counted."""
        self.calls += other.calls
        self.tokens += other.tokens
        self.drafted += other.drafted
        self.tested += other.tested
        self.accepted += other.accepted

    @property
    def acceptance(self) -> float | None:
        """Share of the tested drafts that stayed, or None if there were none."""
        return self.accepted / self.tested if self.tested else None

    @property
    def tokens_per_call(self) -> float | None:
        """Tokens that a sequence gains when the proposal is called once."""
        return self.tokens / self.calls if self.calls else None


class Hope:
    """The running acceptance of one sequence or of one kind of request."""

    def __init__(self, kept: float = 0.0, tested: float = 0.0) -> None:
        self.kept, self.tested = kept, tested

    def observe(self, kept: int, tested: int) -> None:
        """Add what one step showed; old evidence fades."""
        if self.tested > 256:
            self.kept, self.tested = self.kept / 2, self.tested / 2
        self.kept += kept
        self.tested += tested

    def estimate(self, prior: float) -> float:
        """Acceptance, believing `prior` until there is evidence."""
        return min((self.kept + TRUST * prior) / (self.tested + TRUST), 0.999)


class Chances(Protocol):
    """What drafts for one sequence are hoped to bring."""

    @property
    def longest(self) -> int:
        """The most drafts that there may be."""

    def tokens(self, k: int) -> float:
        """Tokens that a step of up to k drafts brings, the one behind those that stay included."""


class Steady(NamedTuple):
    """Every draft is accepted with one probability, below 1."""

    acceptance: float
    longest: int = DRAWN

    def tokens(self, k: int) -> float:
        """1 + a + … + a^k."""
        return (1 - math.pow(self.acceptance, k + 1)) / (1 - self.acceptance)


class Looked:
    """The drafts are known, and how likely each is to stay.

    Args:
        odds: that, if those before it do.
    """

    def __init__(self, odds: Sequence[float]) -> None:
        self._tokens: list[float] = list(accumulate(accumulate(odds, mul), initial=1.0))

    @property
    def longest(self) -> int:
        """All of them."""
        return len(self._tokens) - 1

    def tokens(self, k: int) -> float:
        """1, and the probability that each stays."""
        return self._tokens[min(k, self.longest)]


class Pace:
    """Chooses draft lengths; one for each proposal, shared by all that decodes with it.

    Args:
        fixed: a draft length for every step, or None to adapt; what users call `num_speculative_tokens`.

    Raises:
        InvalidOption: it is none.
    """

    def __init__(self, fixed: int | None = None) -> None:
        if fixed is not None and (type(fixed) is not int or not 0 <= fixed <= MAX_DRAFT):
            raise InvalidOption(f"num_speculative_tokens must be from 0 to {MAX_DRAFT}, not {fixed!r}")
        self.fixed = fixed
        self.tally = Tally()
        self._kinds: dict[Hashable, Hope] = {}
        self._seconds: dict[Size, dict[int, deque[float]]] = {}
        self._steps: dict[Size, int] = {}
        self._best: dict[Size, int] = {}
        self._idle: dict[Size, int] = {}

    def longest(self, load: "Load") -> int:
        """The most tokens of a text that are worth looking up before the next step."""
        if self.fixed is not None:
            return self.fixed
        idle = self._idle.get(load.size, 0)
        return MAX_DRAFT if idle < PATIENCE or idle % SELDOM == 0 else 0

    def kind(self, key: Hashable) -> Hope:
        """What is known about requests of a kind; the kinds met longest ago are forgotten."""
        if key not in self._kinds and len(self._kinds) >= MAX_KINDS:
            self._kinds.pop(next(iter(self._kinds)), None)
        return self._kinds.setdefault(key, Hope())

    def choose(self, load: "Load", chances: Sequence[Chances]) -> int:
        """The draft length of the next step.

        Args:
            load: who decodes together.
            chances: of those that can draft.
        """
        if self.fixed is not None:
            return self.fixed
        longest = max((one.longest for one in chances), default=0)
        if not longest:
            return 0
        size = load.size
        seconds = self._seconds.setdefault(size, {})
        for length in FIRST:
            if length <= longest and len(seconds.get(length, ())) < 2:
                return length
        self._steps[size] = steps = self._steps.get(size, 0) + 1
        lengths = [k for k in LADDER if k < longest] + [longest]
        looked = not all(isinstance(one, Steady) for one in chances)
        if looked or self._best.get(size) not in lengths or steps % RECONSIDER == 0:
            spare = load.sequences - len(chances)
            costs = {k: self._cost(seconds, k) for k in lengths}
            self._best[size] = max(lengths, key=lambda k: (spare + sum(one.tokens(k) for one in chances)) / costs[k])
        best = self._best[size]
        if steps % LOOK_AROUND:
            return best
        at = lengths.index(best)
        return lengths[(0, max(at - 1, 0), min(at + 1, len(lengths) - 1))[steps // LOOK_AROUND % 3]]

    def observe(self, load: "Load", length: int, seconds: float) -> None:
        """Note how long a step took."""
        self._idle[load.size] = 0 if length else self._idle.get(load.size, 0) + 1
        self._seconds.setdefault(load.size, {}).setdefault(length, deque(maxlen=5)).append(seconds)

    def _cost(self, seconds: Mapping[int, Sequence[float]], k: int) -> float:
        """The median of what was measured, or a line through the nearest lengths that were."""
        if k in seconds:
            times = sorted(seconds[k])
            return times[(len(times) - 1) // 2]
        low = max((length for length in seconds if length < k), default=None)
        high = min((length for length in seconds if length > k), default=None)
        ends = [length for length in (low, high) if length is not None]
        if len(ends) == 1:  # k is past one end: go on along the stretch beside it
            ends = sorted(seconds, key=lambda length: abs(length - k))[:2]
        if len(ends) == 1:
            return self._cost(seconds, ends[0])
        low, high = sorted(ends)
        slope = (self._cost(seconds, high) - self._cost(seconds, low)) / (high - low)
        return self._cost(seconds, low) + max(slope, 0.0) * (k - low)
