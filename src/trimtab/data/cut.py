"""Answers that were cut, and do not say so: they would teach an end of sequence in odd places.

No single answer tells: titles and lists end without a mark, too. Many of them do, in one of two ways:

    piling up    of the answers that stop at a letter, many have exactly one length, and hardly any is longer: they were cut at
                 so many words, characters or tokens
    prose        of the answers whose last line has a sentence's end inside, many go on behind it and stop at a letter
"""

import dataclasses
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from trimtab.data.records import Record

__all__ = ["CUT_ANSWERS", "Cut", "find_cut", "looks_cut", "mark_cut"]

logger = logging.getLogger(__name__)

CUT_ANSWERS = ("auto", "end", "continue")
"""What to do with answers that look cut."""

COUNT = 8
"""So many of them at least, however small the data."""

PILED = 0.25
"""Such a share of the answers that stop at a letter has one length where they were cut; otherwise hardly any has."""

LONGER = 0.05
"""No larger share of them is longer."""

PLAIN = 0.95
"""Where a larger share of all answers stops at a letter, a pile is of titles or of one pattern: cut ones may stop at a mark."""

OPEN_PROSE = 0.2
"""Such a share of the answers in prose stops at a letter where they were cut; people forget a full stop less often."""

LEAST = {"words": 4, "characters": 20, "tokens": 6}
"""Shorter answers are labels and names, which are alike in length by nature."""

_OPEN_MARKS = ",;:-–—(&、，；：（"
_SENTENCE = re.compile(r"\w{2}[.!?…؟।][\"'”’)\]]*\s+\S|\w[。！？]")
_NO_MARKS = ("THAI ", "LAO ")
"""Scripts whose sentences end in a space."""


class Cut(NamedTuple):
    """What looks cut among some answers."""

    places: list[int]
    """Which of them, in order."""
    why: str
    """What gives them away, in words that go on from "of n answers"."""


def looks_cut(text: str) -> bool:
    """Whether a text stops where no sentence does: at a letter, a comma or the like, in a script that has a mark for the end.

    A text of one word never does, nor one that stops at a digit, a bracket, a quote, a code fence or an emoji.
    """
    text = text.rstrip()
    if not text or (text.isascii() and " " not in text):
        return False
    last = text[-1]
    if last in _OPEN_MARKS:
        return True
    return unicodedata.category(last)[0] in "LM" and not unicodedata.name(last, "").startswith(_NO_MARKS)


def find_cut(texts: Sequence[str], count_tokens: Callable[[Sequence[str]], list[int]]) -> Cut | None:
    """The answers that were evidently cut; None if there are too few of them, or nothing tells them from whole ones.

    Args:
        texts: answers.
        count_tokens: the numbers of tokens of some texts.
    """
    opened = [i for i, text in enumerate(texts) if looks_cut(text)]
    if len(opened) < COUNT:
        return None
    stopping = [texts[i].rstrip() for i in opened]
    lengths = {
        "words": [text.count(" ") + 1 for text in stopping],
        "characters": [len(text) for text in stopping],
        "tokens": count_tokens(stopping),
    }
    piles = [(unit, [i for i, length in zip(opened, lengths[unit], strict=True) if length == pile], pile)
             for unit in lengths if (pile := _pile(lengths[unit], LEAST[unit])) is not None]  # fmt: skip
    places: set[int] = set()
    why = []
    if piles and len(opened) <= PLAIN * len(texts):
        unit, piled, pile = max(piles, key=lambda found: len(found[1]))
        places |= set(piled)
        why.append(f"{len(piled)} stop at a letter and have exactly {pile} {unit}")
    prose = [i for i, text in enumerate(texts) if _SENTENCE.search(text.rstrip().rpartition("\n")[2])]
    unended = sorted(set(prose) & set(opened))
    if len(unended) >= max(COUNT, OPEN_PROSE * len(prose)):
        places |= set(unended)
        why.append(f"{len(unended)} stop at a letter behind whole sentences")
    return Cut(sorted(places), " and ".join(why)) if places else None


def mark_cut(parts: Sequence[Sequence[Record]], how: str, tokenizer: Any) -> list[list[Record]]:
    """The records of each part, with the answers that look cut as `unfinished`: they have no end of sequence to learn.

    A warning says how many there are, shows two, and names the remedy. Answers that the data call unfinished are not looked at.

    Args:
        parts: such as training and development; they are judged as one.
        how: of `CUT_ANSWERS`: `auto` marks what `find_cut` finds, `continue` whatever stops at a letter, `end` nothing.
        tokenizer: counts tokens.
    """
    records = [record for part in parts for record in part]
    if how != "end":
        for which in ("chosen", "rejected"):
            _mark(records, which, how, partial(_count_tokens, tokenizer))
    rest = iter(records)
    return [[next(rest) for _ in part] for part in parts]


def _mark(records: list[Record], which: str, how: str, count_tokens: Callable[[Sequence[str]], list[int]]) -> None:
    """Mark answers of one kind, in place."""
    texts = [None if which in record.unfinished else _text(getattr(record, which)) for record in records]
    there = [i for i, text in enumerate(texts) if text is not None]
    found = [text for text in texts if text is not None]
    if how == "continue":
        cut: Cut | None = Cut([i for i, text in enumerate(found) if looks_cut(text)], "so many stop at a letter")
    else:
        cut = find_cut(found, count_tokens)
    if cut is None or not cut.places:
        return
    for place in cut.places:
        record = records[there[place]]
        records[there[place]] = dataclasses.replace(record, unfinished=record.unfinished | {which})
    if how == "auto":
        shown = " and ".join(f"'…{found[place].rstrip()[-40:]}'" for place in (cut.places[0], cut.places[-1]))
        logger.warning(
            "of %d %s answers, %d (%.0f %%) look cut: %s, such as %s. No end of sequence is learnt where they stop, but what"
            " comes behind is not learnt either: better give whole answers. If these are whole, --cut_answers end",
            len(found), which, len(cut.places), 100 * len(cut.places) / len(found), cut.why, shown,
        )  # fmt: skip
    else:
        logger.info("%d %s answers stop at a letter, and teach no end of sequence", len(cut.places), which)


def _count_tokens(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    valid = [text.encode(errors="replace").decode() for text in texts]  # whoever encodes them names what is not Unicode
    return [len(ids) for ids in tokenizer(valid, add_special_tokens=False, verbose=False)["input_ids"]]


def _pile(lengths: Sequence[int], least: int) -> int | None:
    """The one length that many have and hardly any exceeds; None if there is none."""
    counts, behind = Counter(lengths), len(lengths)
    best: int | None = None
    for length in sorted(counts):
        behind -= counts[length]
        if behind <= LONGER * len(lengths) and length >= least and (best is None or counts[length] > counts[best]):
            best = length
    return best if best is not None and counts[best] >= max(COUNT, PILED * len(lengths)) else None


def _text(answer: object) -> str | None:
    """What an answer says, if it says something: a text, or the content of its last message."""
    said = answer[-1].get("content") if isinstance(answer, list) and answer else answer
    return said if isinstance(said, str) else None
