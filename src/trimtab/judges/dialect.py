"""What one endpoint takes: which fields, and whether messages may have a system role. Learned from what it refuses."""

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import EndpointError

__all__ = ["Dialect"]

REFUSES = (
    "not support", "unsupported", "not allowed", "not enabled", "not permitted", "not available", "not implemented",
    "unknown", "unrecognized", "unexpected", "extra inputs", "invalid parameter", "invalid argument",
)  # fmt: skip
"""How servers say, in lower case, that they do not take something at all."""

FEWER_LOGPROBS = 2
"""Enough for the two names, where five are too many."""


class Dialect:
    """How to put a question to an endpoint.

    Args:
        max_tokens: room for its answer.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0.0, "logprobs": True, "top_logprobs": 5}
        self._system = True

    def body(self, model: str | None, messages: Sequence[Mapping[str, str]]) -> dict[str, Any]:
        """A request's body; without a system role, what it says comes before the question."""
        if not self._system:
            messages = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        return {"model": model, "messages": list(messages), **self.fields}

    def learn(self, error: EndpointError) -> str | None:
        """What to do without after a refusal, from its words; None if they are about no field of ours."""
        words = str(error).lower()
        refuses = any(word in words for word in REFUSES)
        if ("logprob" in words or "log prob" in words) and "logprobs" in self.fields:
            if refuses or self.fields["top_logprobs"] == FEWER_LOGPROBS:
                return self._drop("logprobs", "top_logprobs")
            self.fields["top_logprobs"] = FEWER_LOGPROBS
            return f"more than {FEWER_LOGPROBS} top_logprobs"
        if "max_tokens" in words and refuses and "max_tokens" in self.fields:
            self.fields["max_completion_tokens"] = self.max_tokens
            return self._drop("max_tokens")
        if "temperature" in words and refuses and "temperature" in self.fields:
            return self._drop("temperature")
        about_roles = "alternate" in words or ("system" in words and ("role" in words or "message" in words))
        if about_roles and self._system:
            self._system = False
            return "a system role"
        return None

    def _drop(self, *names: str) -> str:
        for name in names:
            del self.fields[name]
        return names[0]
