"""From votes to pairs with weights: what is said twice, what contradicts itself, who says too much, and what is only length.

1. *Repeats.* Votes on one prompt, but for spelling, whose answers are nearly the same (Jaccard's index of their words in
   threes at least .8) are one pair. A key counts once for a pair, by its newest vote.
2. *Floods.* No key counts for more than a share of everything, or, where there are too few keys for that, for more than
   another one: with n_k pairs of key k, it counts for min(n_k, c), and c is the largest number for which no min(n_k, c) exceeds
   its share of their sum. As many of a key's votes are kept as it counts for, picked by their digests. Votes without a key are
   the operator's own, and all count.
3. *Contradictions.* Of the weights for either answer of a pair, the difference is left, for the answer that has more.
4. *Length.* Annotators like long answers. If significantly more than half of the weight is for the longer answer, votes for it
   are weighed down until both directions weigh alike. That short ones are preferred is taken for what it is.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from trimtab.core.intervals import sign_interval
from trimtab.data.prompts import answer_text
from trimtab.data.records import Record
from trimtab.loop.votes import Vote, normal

__all__ = ["Sifted", "cap_of", "sift"]

ALIKE = 0.8
"""Jaccard's index from which two answers are one."""
WORDS = 3
"""In a row."""
LEVEL = 0.95
"""At which a bias for long answers is significant."""


class Sifted(NamedTuple):
    """What is left."""

    records: list[Record]
    """Pairs with weights."""
    figures: dict[str, Any]
    """How many votes there were and what became of them, as JSON has it."""


class _Pair:
    """Two answers to a prompt, and who prefers which; the first one is the one that its first vote preferred."""

    def __init__(self, vote: Vote) -> None:
        self.words = _words(vote.record.chosen), _words(vote.record.rejected)
        self.said: dict[str | None, list[tuple[bool, Vote]]] = defaultdict(list)
        """By key: whether a vote is for the first answer, and the vote; a key's own newest last."""

    def direction(self, vote: Vote) -> bool | None:
        """Whether a vote on nearly the same answers is for the first one; None if its answers are others."""
        better, worse = _words(vote.record.chosen), _words(vote.record.rejected)
        same = _jaccard(better, self.words[0]), _jaccard(worse, self.words[1])
        turned = _jaccard(better, self.words[1]), _jaccard(worse, self.words[0])
        likest = max(same, turned, key=sum)
        return likest is same if min(likest) >= ALIKE else None


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
    differ = [vote for vote in counted if normal(answer_text(vote.record.chosen)) != normal(answer_text(vote.record.rejected))]
    pairs = _pairs(differ)
    cap, kept = _fair(pairs, key_share)
    records, ties, contradicted = [], 0, 0
    for pair in pairs:
        weights, newest = [0.0, 0.0], {}
        for key, said in pair.said.items():
            for first, vote in said if key is None else said[-1:]:
                if key is None or vote.digest in kept:
                    weights[first] += vote.record.weight * (1.0 if key is None else kept[vote.digest])
                    newest[first] = vote
        if not newest:
            continue
        contradicted += min(weights) > 0
        if weights[0] == weights[1]:
            ties += 1
            continue
        first = weights[1] > weights[0]
        weight = abs(weights[1] - weights[0])
        records.append(dataclasses.replace(newest[first].record, weight=round(weight, 6)))
    records, length = _balance(records, length_bias)
    figures = {
        "votes": len(votes),
        "keys": len({vote.key for vote in counted} - {None}),
        "left_out": len(votes) - len(counted),
        "equal": len(counted) - len(differ),
        "repeated": len(differ) - sum(1 if key is not None else len(s) for p in pairs for key, s in p.said.items()),
        "capped": _capped(pairs, kept),
        "counts_for": None if cap == math.inf else cap,
        "contradicted": contradicted,
        "undecided": ties,
        "length": length,
        "pairs": len(records),
    }
    return Sifted(records, figures)


def cap_of(counts: Iterable[int], share: float, others: float = 0.0) -> float:
    """The largest c with min(n, c) ≤ share · (Σ min(n, c) + others) for every n; infinity where no n is too large.

    Where there are too few keys for the share, it is an equal one, `others` being one more party.

    Args:
        counts: n of each key.
        share: of everything.
        others: what counts beside them.
    """
    counts = sorted(counts)
    parties = len(counts) + (others > 0)
    share = max(share, 1 / parties) if parties else 1.0
    for i in range(len(counts)):  # with those from i on at c: c = share · (others + Σ before + (N − i) c)
        before, rest = others + sum(counts[:i]), 1 - share * (len(counts) - i)
        cap = share * before / rest if rest > 1e-12 else math.inf
        if cap < counts[i]:
            return max(cap, float(counts[i - 1])) if i else cap
    return math.inf


def _pairs(votes: Sequence[Vote]) -> list[_Pair]:
    """The votes by what they compare."""
    found: dict[str, list[_Pair]] = defaultdict(list)
    for vote in votes:
        near = found[vote.asked]
        for pair in near:
            if (first := pair.direction(vote)) is not None:
                pair.said[vote.key].append((first, vote))
                break
        else:
            near.append(_Pair(vote))
            near[-1].said[vote.key].append((True, vote))
    return [pair for near in found.values() for pair in near]


def _fair(pairs: Sequence[_Pair], share: float) -> tuple[float, dict[str, float]]:
    """What a key may count for, and for what each vote that is kept counts."""
    by_key: dict[str, list[str]] = defaultdict(list)
    own = 0
    for pair in pairs:
        for key, said in pair.said.items():
            if key is None:
                own += len(said)
            else:
                by_key[key].append(said[-1][1].digest)
    cap = cap_of(map(len, by_key.values()), share, own)
    kept: dict[str, float] = {}
    for digests in by_key.values():
        counts_for = min(float(len(digests)), cap)
        some = sorted(digests)[: math.ceil(counts_for)]
        kept |= dict.fromkeys(some, counts_for / len(some))
    return cap, kept


def _capped(pairs: Sequence[_Pair], kept: dict[str, float]) -> dict[str, int]:
    """How many votes of each key are over what it may count for."""
    over: dict[str, int] = defaultdict(int)
    for pair in pairs:
        for key, said in pair.said.items():
            if key is not None:
                over[key] += said[-1][1].digest not in kept
    return {key: count for key, count in over.items() if count}


def _balance(records: list[Record], how: str) -> tuple[list[Record], dict[str, Any]]:
    """The records with votes for longer answers weighed down, if there is a bias and it is wanted; and how biased they are."""
    longer = [len(answer_text(record.chosen)) - len(answer_text(record.rejected)) for record in records]
    sums = {sign: sum(r.weight for r, more in zip(records, longer, strict=True) if more * sign > 0) for sign in (1, -1)}
    both = sum(sums.values())
    squares = sum(record.weight**2 for record, more in zip(records, longer, strict=True) if more)
    low, _ = sign_interval(sums[1], both, squares, level=LEVEL)
    figures = {"longer_wins": sums[1] / both if both else None, "biased": low > 0.5, "balanced": False}
    if how == "balance" and low > 0.5 and sums[-1] > 0:
        factor = sums[-1] / sums[1]
        records = [
            dataclasses.replace(record, weight=round(record.weight * factor, 6)) if more > 0 else record
            for record, more in zip(records, longer, strict=True)
        ]
        figures["balanced"] = True
    return [record for record in records if record.weight > 0], figures


def _words(answer: Any) -> frozenset[tuple[str, ...]]:
    words = normal(answer_text(answer)).split()
    return frozenset(tuple(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1)))


def _jaccard(a: frozenset[Any], b: frozenset[Any]) -> float:
    return len(a & b) / len(a | b)
