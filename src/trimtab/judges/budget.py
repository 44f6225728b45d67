"""What a judge costs, and what it may."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from trimtab.errors import InvalidOption

__all__ = ["Budget", "Size"]

MARGIN = 1.25
"""How many more tokens for its bytes a request may have than any so far."""


class Budget:
    """Tokens asked and answered, their price, and a limit that is kept before a request is sent.

    A request is reserved at what it will cost at most, as far as is known: a token for each byte until the endpoint has told
    what it counts, in proportion to the bytes afterwards, and as many tokens to write as it may, or as any answer had. What is
    in flight is weighed anew with everything that is learned, so that the limit can be passed by what is in flight alone. Any
    thread may call.

    Args:
        prompt_price, completion_price: for a million tokens, in any currency; None without prices.
        most: the most to spend; None without a limit.

    Raises:
        InvalidOption: a price is negative, or there is a limit without prices.
    """

    def __init__(self, prompt_price: float | None, completion_price: float | None, most: float | None) -> None:
        for name, value in (("prompt_price", prompt_price), ("completion_price", completion_price), ("max_cost", most)):
            if value is not None and not 0 <= value < float("inf"):
                raise InvalidOption(f"{name} must be a number of at least 0, not {value}")
        if most is not None and (prompt_price is None or completion_price is None):
            raise InvalidOption("max_cost needs prompt_price and completion_price, for a million tokens; 0 is a price")
        self.priced = prompt_price is not None or completion_price is not None
        self.most = most
        self._prices = (prompt_price or 0.0) / 1e6, (completion_price or 0.0) / 1e6
        self._lock = threading.Lock()
        self._reserved: dict[str, Size] = {}
        self._tokens_per_byte, self._longest = 0.0, 0
        self.requests = self.prompt_tokens = self.completion_tokens = 0
        self.uncounted = 0
        """Answers that did not say what they cost, and tries that came to nothing; each counts as what it may have cost."""
        self._uncounted_size = Size(0, 0)

    @property
    def amount(self) -> float:
        """Spent so far."""
        prompt, completion = self._prices
        return (
            self.prompt_tokens * prompt
            + self.completion_tokens * completion
            + self._most_for(self._uncounted_size, self.uncounted)
        )

    def reserve(self, key: str, size: "Size") -> bool:
        """Set aside what a request may cost; False if that is too much."""
        with self._lock:
            asked = Size.sum([*self._reserved.values(), size])
            if self.most is not None and self.amount + self._most_for(asked, len(self._reserved) + 1) > self.most:
                return False
            self._reserved[key] = size
            return True

    def settle(self, key: str, size: "Size", usage: Mapping[str, int] | None) -> None:
        """Book what a request did cost; `usage` has `prompt_tokens` and `completion_tokens`."""
        with self._lock:
            self._reserved.pop(key, None)
            self.requests += 1
            if usage is None:
                self._book_uncounted(size, 1)
                return
            self.prompt_tokens += usage["prompt_tokens"]
            self.completion_tokens += usage["completion_tokens"]
            self._tokens_per_byte = max(self._tokens_per_byte, usage["prompt_tokens"] / size.prompt_bytes)
            self._longest = max(self._longest, usage["completion_tokens"])

    def lose(self, size: "Size", tries: int = 1) -> None:
        """Book tries that came to nothing: the endpoint may have worked for them. `size` is that of all together."""
        with self._lock:
            self._book_uncounted(size, tries)

    def abandon(self) -> list["Size"]:
        """Book as lost what is still set aside, and say what that was."""
        with self._lock:
            sizes = list(self._reserved.values())
            self._reserved.clear()
            self._book_uncounted(Size.sum(sizes), len(sizes))
            return sizes

    def release(self, key: str) -> None:
        """Give back what a request had set aside that was not answered."""
        with self._lock:
            self._reserved.pop(key, None)

    def report(self) -> dict[str, Any]:
        """For the record: requests, tokens, and the amount if there are prices."""
        counts = {"requests": self.requests, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return counts | {"uncounted": self.uncounted, "amount": self.amount if self.priced else None}

    def _book_uncounted(self, size: "Size", tries: int) -> None:
        self.uncounted += tries
        self._uncounted_size = Size.sum([self._uncounted_size, size])

    def _most_for(self, size: "Size", requests: int) -> float:
        """What so many requests, of this size together, may cost by all that is known now."""
        rate = MARGIN * self._tokens_per_byte if self._tokens_per_byte else 1.0
        prompt, completion = self._prices
        return size.prompt_bytes * rate * prompt + max(size.max_tokens, requests * self._longest) * completion


class Size(NamedTuple):
    """What is known of a request, or of several together, before they are sent."""

    prompt_bytes: int
    max_tokens: int

    @staticmethod
    def sum(sizes: Iterable["Size"]) -> "Size":
        """Of several together."""
        sizes = list(sizes)
        return Size(sum(size.prompt_bytes for size in sizes), sum(size.max_tokens for size in sizes))
