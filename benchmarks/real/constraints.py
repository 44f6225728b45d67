"""Constraints on an answer that a program can check, and the program.

A constraint is an object with a `kind`, as it stands in the data:

    {"kind": "one sentence"}
    {"kind": "json", "keys": [...]}         a JSON object with these keys and no others, and nothing around it
    {"kind": "no list"}                     no line that begins as an item of a list does
    {"kind": "below", "words": n}           fewer than n words, split at white space
    {"kind": "language", "language": l}     of `LANGUAGES`
    {"kind": "ending", "phrase": p}         the last thing that is said, letter by letter

No empty text obeys any of them. Whether an answer is right is another question: see `states`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["KINDS", "LANGUAGES", "obeys", "states"]

KINDS = ("one sentence", "json", "no list", "below", "language", "ending")

LANGUAGES = {
    "English": "the is of was has it its for and there are people that with from to by town river which",
    "French": "le les est et une au aux du des dans pour sur qui avec son sa ville rivière habitants fête lieu elle été",
    "Spanish": "el los las del y por con su fue una está tiene ciudad río habitantes fiesta viven personas lo se",
    "German": "der die das ist und ein eine im von für hat wurde den dem mit stadt fluss einwohner leben liegt fest jahr",
}
"""Frequent words of each that none of the others has: a text is in the language that most of those in it belong to."""

_SENTENCE_END = re.compile(r"""[.!?…]["'’”»)\]]*(?=\s|$)""")
_ITEM = re.compile(r"^\s*([-*+•–]|\(?\d{1,2}[.)])\s", re.MULTILINE)


def obeys(constraint: Mapping[str, Any], text: str) -> bool:
    """Whether a text keeps to a constraint.

    Raises:
        ValueError: there is no such kind.
    """
    text = text.strip()
    if not text:
        return False
    match constraint["kind"]:
        case "one sentence":
            ends = list(_SENTENCE_END.finditer(text))
            return "\n" not in text and len(ends) == 1 and ends[0].end() == len(text)
        case "json":
            return _keys(text) == set(constraint["keys"])
        case "no list":
            return _ITEM.search(text) is None
        case "below":
            return len(text.split()) < constraint["words"]
        case "language":
            counts = _language_words(text)
            own = counts.pop(constraint["language"])
            return own > max(counts.values())
        case "ending":
            return text.endswith(constraint["phrase"])
    raise ValueError(f"there is no constraint '{constraint['kind']}'; there are {', '.join(KINDS)}")


def states(facts: Sequence[str], text: str) -> bool:
    """Whether all of the facts, numbers and names, stand in a text."""
    said = text.casefold()
    return all(re.search(rf"\b{re.escape(fact.casefold())}\b", said) for fact in facts)


def _keys(text: str) -> set[str] | None:
    """Of a JSON object; None if the text is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return set(value) if isinstance(value, dict) else None


def _language_words(text: str) -> dict[str, int]:
    words = re.findall(r"[^\W\d_]+", text.casefold())
    return {name: sum(word in known.split() for word in words) for name, known in LANGUAGES.items()}
