"""The arguments `KEY=VALUE,…` of kinds of rewards."""

from collections.abc import Iterable, Sequence

from trimtab.errors import InvalidOption
from trimtab.options import meant

__all__ = ["number", "read_keyed"]


def read_keyed(kind: str, parts: Iterable[str], keys: Sequence[str]) -> dict[str, str]:
    """Values by key.

    Args:
        kind: what messages call it.
        parts: each is `KEY=VALUE`.
        keys: which there are.

    Raises:
        InvalidOption: a part is none, or a key is not known, has no value, or is there twice.
    """
    given: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in keys:
            raise InvalidOption(f"{kind} takes {', '.join(keys)}, each as KEY=VALUE, and not '{key}'{meant(key, keys)}")
        if not equals or not value:
            raise InvalidOption(f"{kind}: '{key}' needs a value: {key}=…")
        if key in given:
            raise InvalidOption(f"{kind}: '{key}' stands there twice")
        given[key] = value
    return given


def number(kind: str, name: str, text: str) -> float:
    """A value as a number.

    Raises:
        InvalidOption: it is none.
    """
    try:
        return float(text)
    except ValueError:
        raise InvalidOption(f"{kind}: {name} must be a number, not '{text}'") from None
