"""How far to draft ahead: what a step costs, measured, against the tokens that it can be hoped to bring.

A step of k drafts brings 1 + a + a² + … + a^k tokens if each draft is accepted with probability a, and takes a time that
depends on k and on how many sequences decode together. Both are learned while decoding, from steps that are over; so drafting
stops by itself where it does not pay. No choice looks at a draft, and with the coupled draw no choice changes a token.
"""

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.errors import InvalidOption

__all__ = ["Load", "Pace", "Tally"]

MAX_DRAFT = 16
"""The longest draft."""
LADDER = (0, 1, 2, 3, 4, 6, 8)
"""The draft lengths in use."""
FIRST = (4, 0, 2)
"""Draft lengths that are timed before one is chosen, twice each: the first time of anything is slow."""
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
        self._seconds: dict[tuple[Size, int], deque[float]] = {}
        self._steps: dict[Size, int] = {}
        self._best: dict[Size, int] = {}

    def kind(self, key: Hashable) -> Hope:
        """What is known about requests of a kind; the kinds met longest ago are forgotten."""
        if key not in self._kinds and len(self._kinds) >= MAX_KINDS:
            self._kinds.pop(next(iter(self._kinds)), None)
        return self._kinds.setdefault(key, Hope())

    def choose(self, load: "Load", hopes: Sequence[float]) -> int:
        """The draft length of the next step.

        Args:
            load: who decodes together.
            hopes: the estimated acceptance of those that can draft.
        """
        if self.fixed is not None:
            return self.fixed
        if not hopes:
            return 0
        size = load.size
        for length in FIRST:
            if len(self._seconds.get((size, length), ())) < 2:
                return length
        self._steps[size] = steps = self._steps.get(size, 0) + 1
        if size not in self._best or steps % RECONSIDER == 0:
            self._best[size] = max(LADDER, key=lambda k: self._tokens(k, load.sequences, hopes) / self._cost(size, k))
        best = self._best[size]
        if steps % LOOK_AROUND:
            return best
        at = LADDER.index(best)
        return LADDER[(0, max(at - 1, 0), min(at + 1, len(LADDER) - 1))[steps // LOOK_AROUND % 3]]

    def observe(self, load: "Load", length: int, seconds: float) -> None:
        """Note how long a step took."""
        self._seconds.setdefault((load.size, length), deque(maxlen=5)).append(seconds)

    def _tokens(self, k: int, sequences: int, hopes: Sequence[float]) -> float:
        return sequences - len(hopes) + sum((1 - a ** (k + 1)) / (1 - a) for a in hopes)

    def _cost(self, size: Size, k: int) -> float:
        """The median of what was measured, or a line through the nearest lengths that were."""
        if (size, k) in self._seconds:
            times = sorted(self._seconds[size, k])
            return times[(len(times) - 1) // 2]
        known = [length for length in LADDER if (size, length) in self._seconds]
        low = max((length for length in known if length < k), default=known[0])
        high = min((length for length in known if length > k), default=known[-1])
        if low == high:  # k is past the longest: go on along the last stretch
            low = known[-2]
        slope = (self._cost(size, high) - self._cost(size, low)) / (high - low)
        return self._cost(size, low) + max(slope, 0.0) * (k - low)
