r"""Words and n-grams of a text: how much it repeats itself.

A *word* is a run of letters, digits and underscores, or one other character that is no white space: `\w+|[^\w\s]` as
Python reads it for Unicode. So a punctuation mark or an emoji is a word, case counts, a run of Chinese is one word, and in
scripts that write vowels as combining marks a word falls into several. N-grams are of words and stay within a text.
"""

import re
from collections.abc import Sequence

__all__ = ["distinct", "repetition", "split_words"]

_WORD = re.compile(r"\w+|[^\w\s]")


def split_words(text: str) -> list[str]:
    """The words of a text, as this module counts them."""
    return _WORD.findall(text)


def distinct(corpus: Sequence[Sequence[str]], n: int) -> float | None:
    """Different n-grams / all n-grams of some texts' words, or None if there are none."""
    grams = [tuple(words[i : i + n]) for words in corpus for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(corpus: Sequence[Sequence[str]]) -> float | None:
    """The mean of 1 − different / all 4-grams over the texts of at least four words, or None if there are none."""
    shares = [1 - share for words in corpus if (share := distinct([words], 4)) is not None]
    return sum(shares) / len(shares) if shares else None
