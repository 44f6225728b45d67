"""From votes to pairs with weights: what is said twice, what contradicts itself, who says too much, and what is only length.

1. *Repeats.* Votes on one prompt, but for spelling, whose answers are nearly the same (Jaccard's index of their words in
   threes at least .8) are one pair. A key counts once for a pair, by its newest vote, whose `weight` is 1 at most.
2. *Floods.* No key has more than a share of all weight: `--key_share`, or twice an equal share, if that is more. Of a key that
   says more, as many votes are kept as it may count for, picked by their digests. Votes without a key are the operator's own,
   and all count.
3. *Contradictions.* Of the weights for either answer of a pair, the difference is left, for the answer that has more.
4. *Length.* Annotators like long answers. If significantly more than half of the weight is for the longer answer, votes for it
   are weighed down until both directions weigh alike, provided that enough keys speak for shorter ones. That short answers are
   preferred is taken for what it is.
5. What 3 and 4 leave may again be too much of one key; then it is weighed down until it is not. Where they leave so few keys
   that one must have more than the share, it is twice an equal one of those.
"""

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from trimtab.core.intervals import sign_interval
from trimtab.data.prompts import answer_text
from trimtab.data.records import Record
from trimtab.loop.votes import Vote, normal
from trimtab.words import split_words

__all__ = ["Sifted", "cap_of", "sift", "told_apart"]

logger = logging.getLogger(__name__)

ALIKE = 0.8
"""Jaccard's index from which two answers are one."""
WORDS = 3
"""In a row."""
LEVEL = 0.95
"""At which a bias for long answers is significant."""
PASSES = 200
"""Of weighing keys down; each leaves less to do."""


class Sifted(NamedTuple):
    """What is left."""

    records: list[Record]
    """Pairs with weights."""
    figures: dict[str, Any]
    """How many votes there were and what became of them, as JSON has it."""


class _Pair:
    """Two answers to a prompt, and who prefers which; the first one is the one that its first vote preferred."""

    def __init__(self, said: "_Answers") -> None:
        self._first = said
        self.said: dict[str | None, list[tuple[bool, Vote]]] = defaultdict(list)
        """By key: whether a vote is for the first answer, and the vote; a key's own newest last."""

    def direction(self, said: "_Answers") -> bool | None:
        """Whether a vote on nearly the same answers is for the first one; None if its answers are others."""
        first = self._first
        if said.texts in (first.texts, first.texts[::-1]):
            return said.texts == first.texts
        same, turned = (_likeness(said.words, other) for other in (first.words, first.words[::-1]))
        likest = max(same, turned, key=sum)
        return likest is same if min(likest) >= ALIKE else None


class _Answers(NamedTuple):
    """The two answers of a vote, the preferred one first."""

    texts: tuple[str, str]
    """But for spelling."""
    words: tuple[frozenset[Any], frozenset[Any]]
    """In threes."""

    @classmethod
    def of(cls, vote: Vote) -> "_Answers":
        better, worse = normal(answer_text(vote.record.chosen)), normal(answer_text(vote.record.rejected))
        return cls((better, worse), (_words(better), _words(worse)))


class _Weighed(NamedTuple):
    """What is left of a pair."""

    record: Record
    """Of the newest vote for the answer that has more."""
    weight: float
    by: dict[str | None, float]
    """How much of it is each key's; an operator's own has none."""
    longer: int
    """By how much the preferred answer is longer, in characters."""

    def times(self, factor: float) -> "_Weighed":
        return self._replace(weight=self.weight * factor, by={key: part * factor for key, part in self.by.items()})


def sift(
    votes: Sequence[Vote], *, key_share: float = 0.1, leave_out: Collection[str] = (), length_bias: str = "balance"
) -> Sifted:
    """Pairs with weights from votes.

    Args:
        votes: in the order in which they came.
        key_share: what one key may count for, of everything, at most.
        leave_out: keys that count for nothing.
        length_bias: "balance" weighs down votes for longer answers where they are too many; "keep" leaves them.
    """
    counted = [vote for vote in votes if vote.key not in leave_out]
    differ = [vote for vote in counted if _differs(vote)]
    pairs = _pairs(differ)
    share = max(key_share, _twice_equal({key for pair in pairs for key in pair.said}))
    kept = _kept(pairs, share)
    factors: dict[str, float] = defaultdict(lambda: 1.0)
    for _ in range(PASSES):
        weighed, ties, contradicted = _net(pairs, kept, factors)
        weighed, length = _balance(weighed, length_bias, share)
        total = sum(one.weight for one in weighed)
        mine: dict[str, float] = defaultdict(float)
        for one in weighed:
            for key, part in one.by.items():
                if key is not None:
                    mine[key] += part
        parties = {key for one in weighed for key in one.by}
        most = share if len(parties) * share >= 1 else _twice_equal(parties)  # of fewer, one must have more than the share
        over = {key: part for key, part in mine.items() if part > most * total * 1.0001}
        if not over:
            break
        for key, part in over.items():
            factors[key] *= most * (total - part) / ((1 - most) * part)
    else:
        logger.warning("after %d passes these keys still count for more than %.3f: %s", PASSES, most, ", ".join(over))
    records = [dataclasses.replace(one.record, weight=round(one.weight, 6)) for one in weighed]
    figures = {
        "votes": len(votes),
        "keys": len({vote.key for vote in counted} - {None}),
        "left_out": len(votes) - len(counted),
        "equal": len(counted) - len(differ),
        "repeated": len(differ) - sum(1 if key is not None else len(s) for p in pairs for key, s in p.said.items()),
        "key_share": most,
        "capped": _capped(pairs, kept),
        "weighed_down": {key: round(factor, 6) for key, factor in factors.items() if factor < 1},
        "contradicted": contradicted,
        "undecided": ties,
        "length": length,
        "pairs": sum(record.weight > 0 for record in records),
    }
    return Sifted([record for record in records if record.weight > 0], figures)


def told_apart(votes: Sequence[Vote], taken: Collection[str], *, key_share: float, leave_out: Collection[str]) -> list[Vote]:
    """Those votes that say something new, and no more of a key than it may.

    Of different answers they are; and a key says nothing new where it says again what it said of a pair before.

    Args:
        votes: all that there are.
        taken: digests of those that are not new.
        key_share: as in `sift`.
        leave_out: as in `sift`.
    """
    new: list[Vote] = []
    for pair in _pairs([vote for vote in votes if vote.key not in leave_out and _differs(vote)]):
        for key, said in pair.said.items():
            if key is None:
                new += [vote for _, vote in said if vote.digest not in taken]
            else:
                before = [first for first, vote in said if vote.digest in taken]
                first, vote = said[-1]
                new += [vote] * (vote.digest not in taken and before[-1:] != [first])
    pairs = _pairs(new)
    kept = _kept(pairs, max(key_share, _twice_equal({key for pair in pairs for key in pair.said})))
    found = {vote.digest for vote in new if vote.key is None or vote.digest in kept}
    return [vote for vote in votes if vote.digest in found]


def _twice_equal(parties: Collection[str | None]) -> float:
    """Twice an equal share of these keys; the operator's own votes are one more party."""
    return min(1.0, 2 / max(1, len(parties)))


def cap_of(counts: Iterable[int], share: float, others: float = 0.0) -> float:
    """The largest c with min(n, c) ≤ share · (Σ min(n, c) + others) for every n; infinity where no n is too large.

    Args:
        counts: n of each key.
        share: of everything.
        others: what counts beside them.
    """
    counts = sorted(counts)
    for i in range(len(counts)):  # with those from i on at c: c = share · (others + Σ before + (N − i) c)
        before, rest = others + sum(counts[:i]), 1 - share * (len(counts) - i)
        cap = share * before / rest if rest > 1e-12 else math.inf
        if cap < counts[i]:
            return max(cap, float(counts[i - 1])) if i else cap
    return math.inf


def _differs(vote: Vote) -> bool:
    return answer_text(vote.record.chosen).strip() != answer_text(vote.record.rejected).strip()


def _pairs(votes: Sequence[Vote]) -> list[_Pair]:
    """The votes by what they compare."""
    found: dict[str, list[_Pair]] = defaultdict(list)
    for vote in votes:
        near, answers = found[vote.asked], _Answers.of(vote)
        for pair in near:
            if (first := pair.direction(answers)) is not None:
                pair.said[vote.key].append((first, vote))
                break
        else:
            near.append(_Pair(answers))
            near[-1].said[vote.key].append((True, vote))
    return [pair for near in found.values() for pair in near]


def _kept(pairs: Sequence[_Pair], share: float) -> dict[str, float]:
    """For what each vote that is kept counts."""
    by_key: dict[str, list[Vote]] = defaultdict(list)
    own = 0.0
    for pair in pairs:
        for key, said in pair.said.items():
            if key is None:
                own += sum(vote.record.weight for _, vote in said)
            else:
                by_key[key].append(said[-1][1])
    cap = cap_of(map(len, by_key.values()), share, own)
    kept: dict[str, float] = {}
    for votes in by_key.values():
        counts_for = min(float(len(votes)), cap)
        some = sorted(votes, key=lambda vote: vote.digest)[: math.ceil(counts_for)]
        kept |= {vote.digest: counts_for / len(some) * min(1.0, vote.record.weight) for vote in some}
    return kept


def _net(pairs: Sequence[_Pair], kept: dict[str, float], factors: dict[str, float]) -> tuple[list[_Weighed], int, int]:
    """Of each pair what is left of its votes; how many pairs nothing is left of, and how many had votes for both answers."""
    found, ties, contradicted = [], 0, 0
    for pair in pairs:
        sides: tuple[dict[str | None, float], dict[str | None, float]] = ({}, {})
        newest: dict[bool, Record] = {}
        for key, said in pair.said.items():
            for first, vote in said if key is None else said[-1:]:
                if key is None or vote.digest in kept:
                    worth = vote.record.weight if key is None else kept[vote.digest] * factors[key]
                    sides[first][key] = sides[first].get(key, 0.0) + worth
                    newest[first] = vote.record
        against, in_favour = (sum(side.values()) for side in sides)
        contradicted += min(against, in_favour) > 0
        if not newest or math.isclose(against, in_favour, rel_tol=1e-9):
            ties += bool(newest)
            continue
        first = in_favour > against
        left = abs(in_favour - against) / max(in_favour, against)
        by = {key: worth * left for key, worth in sides[first].items()}
        record = newest[first]
        longer = len(answer_text(record.chosen)) - len(answer_text(record.rejected))
        found.append(_Weighed(record, sum(by.values()), by, longer))
    return found, ties, contradicted


def _balance(weighed: list[_Weighed], how: str, share: float) -> tuple[list[_Weighed], dict[str, Any]]:
    """The pairs with those for longer answers weighed down, if a bias is not to be learnt; and how biased they are."""
    sums = {sign: sum(one.weight for one in weighed if one.longer * sign > 0) for sign in (1, -1)}
    both, squares = sum(sums.values()), sum(one.weight**2 for one in weighed if one.longer)
    low, _ = sign_interval(sums[1], both, squares, level=LEVEL)
    shorter = {key for one in weighed if one.longer < 0 for key in one.by}
    enough = None in shorter or len(shorter) * share * 2 >= 1  # else one of them would have more than its share of a half
    figures = {"longer_wins": sums[1] / both if both else None, "biased": low > 0.5, "balanced": False}
    if how != "balance" or low <= 0.5 or not enough or not sums[-1]:
        return weighed, figures
    factor = sums[-1] / sums[1]
    lighter = [one.times(factor) if one.longer > 0 else one for one in weighed]
    return lighter, figures | {"balanced": True}


def _capped(pairs: Sequence[_Pair], kept: dict[str, float]) -> dict[str, int]:
    """How many votes of each key are over what it may count for."""
    over: dict[str, int] = defaultdict(int)
    for pair in pairs:
        for key, said in pair.said.items():
            if key is not None:
                over[key] += said[-1][1].digest not in kept
    return {key: count for key, count in over.items() if count}


def _words(text: str) -> frozenset[tuple[str, ...]]:
    words = split_words(text)
    return frozenset(tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def _likeness(words: Sequence[frozenset[Any]], others: Sequence[frozenset[Any]]) -> tuple[float, ...]:
    """Jaccard's index of each two sets; 0 where their sizes alone say that it is below `ALIKE`."""
    return tuple(
        len(a & b) / len(a | b) if min(len(a), len(b)) >= ALIKE * max(len(a), len(b)) else 0.0
        for a, b in zip(words, others, strict=True)
    )
