"""How much is asked of endpoints, as options of commands."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from trimtab.endpoints.settings import Limits, make_limits
from trimtab.options import option

__all__ = ["AskingOptions"]


@dataclass(frozen=True)
class AskingOptions:
    """The fields of `Limits` that can be said; None where nothing is."""

    concurrency: int | None = option(None, "most requests in flight for each endpoint [default: 16]")
    request_timeout: float | None = option(None, "seconds that one request may take [default: 600]")
    max_retries: int | None = option(None, "tries after the first, of a request or for an endpoint in a row [default: 6]")

    def limits_of(self, flag: str, endpoints: Sequence[str]) -> Limits:
        """Them as limits, for the endpoints that an option names.

        Raises:
            InvalidOption: as `make_limits`.
        """
        remote = {field.name: getattr(self, field.name) for field in fields(AskingOptions)}
        return make_limits(flag, endpoints, {}, remote)
