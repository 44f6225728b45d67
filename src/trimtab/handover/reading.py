"""Read drafts where some may have rows that are broken: each draft as far as it can be read, and why not further."""

from collections.abc import Sequence

from trimtab.errors import DeadRow
from trimtab.handover.sides import Begun, Proposal

__all__ = ["read_alive"]


def read_alive(proposal: Proposal, begun: Sequence[Begun]) -> list[tuple[list[float], str | None]]:
    """For each draft the log-probabilities of its first tokens, and what is wrong behind them; None where that is all."""
    try:
        return [(logps, None) for logps in proposal.read(begun)]
    except DeadRow as error:
        if len(begun) > 1:
            return [found for one in begun for found in read_alive(proposal, [one])]
        return [(_first(proposal, begun[0]), str(error))]


def _first(proposal: Proposal, one: Begun) -> list[float]:
    """The log-probabilities of as many of a draft's tokens as can be read, of a draft that cannot be read whole."""
    alive, dead, found = 0, len(one.tokens), []
    while dead - alive > 1:
        middle = (alive + dead) // 2
        try:
            (found,) = proposal.read([one._replace(tokens=one.tokens[:middle])])
            alive = middle
        except DeadRow:
            dead = middle
    return found
