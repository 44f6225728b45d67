"""Is an endpoint there, and which model is it to be: asked before a long run, and soon answered."""

import dataclasses

from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.errors import EndpointError

__all__ = ["reach"]

DENIED = (401, 403)
"""What an endpoint answers to whom it does not know."""


def reach(url: str, model: str | None, limits: Limits) -> str:
    """The model's name at an endpoint that answers: the given one, or the first that is listed.

    Raises:
        EndpointError: it does not answer, or not to us. That is said soon: only a long run is worth many tries.
    """
    soon = dataclasses.replace(
        limits, max_retries=min(limits.max_retries, 2), request_timeout=min(limits.request_timeout, 30.0)
    )
    with Endpoints([url], soon) as endpoints:
        try:
            listed = endpoints.pick_model()
        except EndpointError as error:
            if model is None or error.status in (None, *DENIED):
                raise
            return model  # a server that does not list its models
    return model or str(listed["id"])
