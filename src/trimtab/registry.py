"""Things that are chosen by name: ours, and those that other packages bring through an entry point.

    RULES = Registry("rule", "trimtab.rules")

    @RULES.register
    class Product: name = "product"

A package of somebody else's names its own in its `pyproject.toml`, and every command, the server and the vLLM plugin know it:

    [project.entry-points."trimtab.rules"]
    tempered = "my_package.rules:Tempered"

Entry points are looked up when all names are asked for, or one that is none of ours; each is imported when it is asked for.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from trimtab.errors import InvalidOption

__all__ = ["Registry", "check_is", "help_of", "names_of"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Values by name: those that are registered here, and those of entry points.

    Args:
        what: what they are, for messages: `rule`.
        group: the entry points' group: `trimtab.rules`.
        check: raises `InvalidOption` for an entry point's value that cannot be used, and says why.
    """

    def __init__(self, what: str, group: str, check: Callable[[T], object] = lambda value: None) -> None:
        self.what, self.group, self._check = what, group, check
        self._known: dict[str, T] = {}
        self._ours: set[str] = set()

    def register(self, value: Any) -> Any:
        """Class decorator: put a value with a `name` under that name."""
        return self.add(value.name, value)

    def add(self, name: str, value: Any) -> Any:
        """Put a value under a name, and return it.

        Raises:
            InvalidOption: the name is taken.
        """
        if name in self._known:
            raise InvalidOption(f"{self.what}: there are two of the name '{name}'")
        self._known[name] = value
        self._ours.add(name)
        return value

    def __getitem__(self, name: str) -> T:
        """The value of a name.

        Raises:
            KeyError: there is none.
            InvalidOption: an entry point of that name cannot be imported or used, or two packages bring one.
        """
        if name not in self._known:
            self._known[name] = self._load(name)
        return self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in self._brought

    def __iter__(self) -> Iterator[str]:
        """All names; nothing is imported for it."""
        return iter([*self._known, *(name for name in self._brought if name not in self._known)])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def find(self, name: str) -> T:
        """The value of a name that a user gives.

        Raises:
            InvalidOption: there is none; the message lists what there is. Or as for `[name]`.
        """
        if name not in self:
            raise InvalidOption(f"{self.what}: there is no {self.what} '{name}'; choose one of {', '.join(sorted(self))}")
        return self[name]

    @cached_property
    def _brought(self) -> dict[str, list[EntryPoint]]:
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            if point.name in self._ours:
                logger.warning(
                    "%s: %s brings a '%s', which is ours, and counts: rename it", self.what, _package_of(point), point.name
                )
                continue
            found.setdefault(point.name, []).append(point)
        return found

    def _load(self, name: str) -> T:
        points = self._brought.get(name, [])
        if not points:
            raise KeyError(name)
        if len({point.value for point in points}) > 1:
            packages = " and ".join(sorted(_package_of(point) for point in points))
            raise InvalidOption(f"{self.what}: '{name}' is brought by {packages}: uninstall one of them")
        point = points[0]
        try:
            value: T = point.load()
        except Exception as error:  # whatever somebody's module raises on import
            raise InvalidOption(
                f"{self.what}: '{name}' of {_package_of(point)} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        named = getattr(value, "name", name)
        if named != name:
            raise InvalidOption(f"{self.what}: '{name}' of {_package_of(point)} calls itself '{named}': give both one name")
        try:
            self._check(value)
        except Exception as error:  # a check may run what is somebody's
            why = error if isinstance(error, InvalidOption) else f"{type(error).__name__}: {error}"
            raise InvalidOption(f"{self.what}: '{name}' of {_package_of(point)} cannot be used: {why}") from error
        return value


def check_is(kind: type) -> Callable[[Any], None]:
    """What checks that an entry point's value is of a class."""

    def check(value: Any) -> None:
        if not isinstance(value, kind):
            raise InvalidOption(f"it must be a {kind.__module__}.{kind.__name__}, not {value!r}")

    return check


def help_of(registry: Registry[Any]) -> str:
    """The `help` of every value, for `--help`; of one that cannot be used, why."""
    lines = []
    for name in sorted(registry):
        try:
            lines.append(f"{name}: {registry[name].help}")
        except InvalidOption as error:
            lines.append(f"{name} ({error})")
    return "; ".join(lines)


def names_of(group: str, ours: Iterable[str]) -> list[str]:
    """The names of a registry in order, for a text of help: nothing is imported for it, our own modules among that.

    Args:
        group: the entry points' group.
        ours: the names that we have.
    """
    return sorted({*ours, *(point.name for point in entry_points(group=group))})


def _package_of(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
