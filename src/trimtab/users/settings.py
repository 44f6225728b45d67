"""What a server keeps of its users, and how it fits their weights."""

from dataclasses import dataclass
from pathlib import Path

from trimtab.users.options import FitWeightsOptions

__all__ = ["UserSettings"]


@dataclass(frozen=True)
class UserSettings:
    """What is kept of users, and how weights are fitted.

    Attributes:
        folder: where.
        aligners: the bank, by name.
        max_users, max_pairs, days: as in `trimtab.users.store.UserStore`.
        beta, prior_scale: as in `trimtab.users.options.FitWeightsOptions`.
    """

    folder: Path
    aligners: tuple[str, ...]
    max_users: int = 10_000
    max_pairs: int = 100
    days: float | None = None
    beta: float = FitWeightsOptions.beta
    prior_scale: float = FitWeightsOptions.prior_scale
