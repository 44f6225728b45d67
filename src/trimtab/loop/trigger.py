"""Whether enough has come, or changed, for another round: `--refit_when`.

    every(n=50)                                           50 votes that no round has had
    drift(false_alarms=0.01, least=50, most=2000)         the incumbent explains what people want less well than it did

Under `drift`, the NLL a token of each new wanted answer under the incumbent goes into a CUSUM (`trimtab.core.drift`), in the
order in which the votes came. Its reference are wanted answers of earlier rounds' held-out prompts, which nothing was trained
on. No round begins before `least` votes, and one begins at `most` in any case.
"""

import ast
import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from trimtab.errors import InvalidOption
from trimtab.options import check_ranges, option

__all__ = ["Drift", "Every", "Trigger", "parse_trigger"]

FEWEST = 20
"""Losses that a reference needs: among fewer, nothing stands out."""


class Trigger:
    """What says when."""

    name: ClassVar[str]
    reads_losses: ClassVar[bool] = False
    """Whether it wants the losses of answers; otherwise it is told how many there are alone."""

    def asks(self, new: int, losses: list[float], reference: list[float]) -> dict[str, Any]:
        """Whether a round begins (`fires`), and why, as JSON has it.

        Args:
            new: how many votes are new.
            losses: of each, in order, if they are wanted.
            reference: losses of earlier ones.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Every(Trigger):
    """A number of votes."""

    name: ClassVar[str] = "every"
    n: int = option(1, "votes", low=1, high=10**9)

    def asks(self, new: int, losses: list[float], reference: list[float]) -> dict[str, Any]:
        return {"fires": new >= self.n, "new": new, "why": f"{new} new votes, of {self.n} that a round takes"}


@dataclass(frozen=True)
class Drift(Trigger):
    """A CUSUM, between a least and a most number of votes."""

    name: ClassVar[str] = "drift"
    reads_losses: ClassVar[bool] = True
    false_alarms: float = option(0.01, "the chance of a round where nothing has changed", low=0.002, below=1)
    least: int = option(50, "votes before which none begins", low=2, high=10**6)
    most: int = option(2000, "votes at which one begins anyway", low=3, high=10**6)

    def asks(self, new: int, losses: list[float], reference: list[float]) -> dict[str, Any]:
        told: dict[str, Any] = {"new": new, "least": self.least, "most": self.most, "reference": len(reference)}
        if min(new, len(losses)) < self.least and new < self.most:
            return told | {"fires": False, "why": f"{new} new votes, of {self.least} at least"}
        if new >= self.most:
            return told | {"fires": True, "why": f"{new} new votes, of {self.most} at most"}
        if len(reference) < FEWEST:
            why = f"{len(reference)} held-out answers of earlier rounds, too few to tell a drift by"
            first = not reference
            return told | {"fires": first, "why": f"the first {new} votes" if first else f"{why}: at {self.most} votes"}
        import torch

        from trimtab.core.drift import cusum, limit_of, standing

        limit = limit_of(len(reference), self.least, self.most, self.false_alarms)
        found = cusum(standing(torch.tensor(losses), torch.tensor(reference)))[self.least - 1 :]
        at = int((found > limit.height).double().argmax()) + self.least if bool((found > limit.height).any()) else None
        told |= {"cusum": float(found[-1]), "limit": limit.height, "simulated_false_alarms": limit.false_alarms, "at": at}
        why = f"a drift by the vote number {at}" if at is not None else f"no drift: {found[-1]:.2f} of {limit.height:.2f}"
        return told | {"fires": at is not None, "why": why}


TRIGGERS = {kind.name: kind for kind in (Every, Drift)}


def parse_trigger(text: str) -> Trigger:
    """Read `every(n=50)` or `drift(false_alarms=0.01, least=50, most=2000)`; what is not said is at its default.

    Raises:
        InvalidOption: there is none of that name, it has no such setting, or a number cannot be.
    """
    name, bracket, rest = text.strip().partition("(")
    if name not in TRIGGERS or (bracket and not rest.endswith(")")):
        raise InvalidOption(f"--refit_when must be every(n=…) or drift(false_alarms=…, least=…, most=…), not '{text}'")
    kind, settings = TRIGGERS[name], {}
    known = {field.name: type(field.default) for field in dataclasses.fields(kind)}
    for part in filter(None, map(str.strip, rest.removesuffix(")").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in known or key in settings:
            twice = "gives it twice" if key in settings else f"has: {', '.join(known)}"
            raise InvalidOption(f"--refit_when: '{name}' has no further setting '{key}'; it {twice}")
        settings[key] = _number(name, key, value, known[key])
    try:
        made = kind(**settings)
        check_ranges(made)
    except InvalidOption as error:
        raise InvalidOption(f"--refit_when: {str(error).removeprefix('--')}") from None
    if isinstance(made, Drift) and made.most <= made.least:
        raise InvalidOption(f"--refit_when: most must be above least, which is {made.least}, not {made.most}")
    return made


def _number(name: str, key: str, text: str, kind: type) -> Any:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InvalidOption(f"--refit_when: '{name}' wants {key} as {kind.__name__}, not '{text}'")
    return value
