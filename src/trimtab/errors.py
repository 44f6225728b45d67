"""Every error that Trimtab raises on purpose, as one tree.

    TrimtabError
    ├── InvalidRequest          a prompt or a sampling parameter that cannot be decoded (also a ValueError)
    ├── InvalidOption           an option, a configuration key or a combination of them (also a ValueError)
    ├── DataError               a data set, record or file that cannot be read as what it should be
    ├── ModelError              a model folder or object that cannot be used
    │   ├── CheckpointError     missing, corrupt, pickled or NaN weights
    │   ├── UnsupportedModel    an architecture that our engine would decode wrongly
    │   ├── VocabularyMismatch  two models that do not share a vocabulary
    │   └── ManifestError       a `trimtab.json` that says something we do not understand
    ├── CacheMismatch           cached proposal log-probabilities that belong to something else
    ├── EndpointError           an OpenAI-compatible server that refuses a request, or does not answer
    ├── BudgetExceeded          a judge that would cost more than it may
    └── DeadRow                 a next-token distribution without any probability, or with NaN

The command line prints the message of any of them on one line and exits with 2 for `InvalidOption` and 1 for the rest.
"""

__all__ = [
    "BudgetExceeded",
    "CacheMismatch",
    "CheckpointError",
    "DataError",
    "DeadRow",
    "EndpointError",
    "InvalidOption",
    "InvalidRequest",
    "ManifestError",
    "ModelError",
    "TrimtabError",
    "UnsupportedModel",
    "VocabularyMismatch",
]


class TrimtabError(Exception):
    """The root of the tree: `except TrimtabError` catches all of it."""


class InvalidRequest(TrimtabError, ValueError):
    """A prompt or a sampling parameter that cannot be decoded; the message names the field and the fix."""


class InvalidOption(TrimtabError, ValueError):
    """An option or configuration key that does not exist, does not fit, or contradicts another."""


class DataError(TrimtabError):
    """A data set, record or file that cannot be read as what it should be; the message names file and line."""


class ModelError(TrimtabError):
    """A model folder or object that cannot be used."""


class CheckpointError(ModelError):
    """Weights that are missing, corrupt, pickled or not finite."""


class UnsupportedModel(ModelError):
    """An architecture, or a setting of one, that our engine would decode wrongly, or cannot decode."""


class VocabularyMismatch(ModelError):
    """A proposal and an aligner whose tokenizers do not map the same tokens to the same ids."""


class ManifestError(ModelError):
    """A `trimtab.json` with unknown keys, missing keys or values of the wrong kind."""


class CacheMismatch(TrimtabError):
    """Cached proposal log-probabilities made for another model, tokenizer, data set or setting."""


class EndpointError(TrimtabError):
    """A server that refuses a request, or does not answer as often as it was asked; the message has its own words."""

    status: int | None = None
    """The HTTP status of a refusal."""

    code: str | None = None
    """The server's own name for the reason of a refusal, if it has one."""

    all_down: bool = False
    """Whether no endpoint answers any more, rather than one request alone having failed."""


class BudgetExceeded(TrimtabError):
    """What is left to ask a judge would cost more than was allowed; what it has said is kept."""


class DeadRow(TrimtabError):
    """A next-token distribution that has no probability anywhere, or is NaN."""
