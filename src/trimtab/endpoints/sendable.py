"""What can be sent to an endpoint at all."""

import json
from collections.abc import Sequence

from trimtab.data.prompts import Prompt
from trimtab.errors import DataError

__all__ = ["check_sendable"]


def check_sendable(prompts: Sequence[Prompt], sources: Sequence[str], what: str = "prompt") -> None:
    """Refuse a prompt, or whatever else it is, that JSON in UTF-8 cannot hold, naming where it came from.

    Raises:
        DataError: it has a lone surrogate.
    """
    for prompt, source in zip(prompts, sources, strict=True):
        try:
            json.dumps(prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise DataError(f"{source}: {what} is no valid Unicode: it has a lone surrogate") from None
