"""Where endpoints are, and how much is asked of them: checked before anything is sent."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from trimtab.errors import InvalidOption

__all__ = ["Limits", "base_url", "is_url", "make_limits", "without_password"]


@dataclass(frozen=True)
class Limits:
    """How much is asked of an endpoint.

    Attributes:
        concurrency: the most requests in flight for each endpoint.
        request_timeout: seconds that one request may take.
        max_retries: how often a request may fail and be sent again, and an endpoint fail in a row before it counts as down.
        backoff: seconds to wait after the first failure in a row; twice as long after each further one.
    """

    concurrency: int = 16
    request_timeout: float = 600.0
    max_retries: int = 6
    backoff: float = 0.5

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.concurrency < 1:
            raise InvalidOption(f"concurrency must be at least 1, not {self.concurrency}")
        if not 0 < self.request_timeout < math.inf:
            raise InvalidOption(f"request_timeout must be a number of seconds above 0, not {self.request_timeout}")
        if self.max_retries < 0:
            raise InvalidOption(f"max_retries must be at least 0, not {self.max_retries}")


def make_limits(flag: str, endpoints: Sequence[str], local: Mapping[str, Any], remote: Mapping[str, Any]) -> Limits:
    """The limits among a command's options, of which None is one that was not given.

    Args:
        flag: the option that names endpoints.
        endpoints: its values.
        local: options that make sense only without endpoints.
        remote: options that make sense only with them, by the names of the fields of `Limits`.

    Raises:
        InvalidOption: one of them is given where it has no meaning, or has a value that cannot be; or a URL is none.
    """
    for name, value in (local if endpoints else remote).items():
        if value is not None:
            why = f"is for a model that runs here, not for --{flag}" if endpoints else f"needs --{flag}"
            raise InvalidOption(f"--{name} {why}")
    for url in endpoints:
        base_url(url)
    return Limits(**{name: value for name, value in remote.items() if value is not None})


def base_url(url: str) -> str:
    """The URL that paths such as `/v1/models` are added to; it may be given with `/v1` or without.

    Raises:
        InvalidOption: it is no HTTP URL.
    """
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.query + parts.fragment
    except ValueError:  # a port that is none, a bracket that is not closed
        whole = False
    if not whole:
        raise InvalidOption(f"'{url}' is no endpoint: give a URL such as http://localhost:8000/v1")
    path = parts.path.rstrip("/").removesuffix("/v1")
    return urlunsplit((parts.scheme, parts.netloc, path, "", ""))


def is_url(text: str) -> bool:
    """Whether a text is meant for an endpoint's URL, and not for a file or a model."""
    return text.startswith(("http://", "https://"))


def without_password(text: str) -> str:
    """A text, such as a URL, without the user names and passwords in its URLs: for what is written down."""
    return re.sub(r"(?<=://)[^/?#@\s]*@", "", text)
