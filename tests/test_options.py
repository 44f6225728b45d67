"""Options of calls from Python get the checks that flags get."""

import dataclasses

import pytest

from trimtab.errors import InvalidOption
from trimtab.options import make_options, option


@dataclasses.dataclass(frozen=True)
class Brew:
    """Of tea."""

    leaves: str = option("", "which", required=True)
    minutes: int = option(3, "how long")
    milk: tuple[str, ...] = option((), "of what")
    strain: bool = option(True, "the leaves out")

    def idle(self):
        return {"strain": "is for loose leaves"} if self.leaves == "bag" else {}


def test_settings_become_options():
    assert make_options(Brew, None, {"leaves": "green", "milk": ["oat"]}) == Brew("green", milk=("oat",))


def test_options_are_taken_as_they_are_and_settings_go_over_them():
    brew = Brew("green", 2)
    assert make_options(Brew, brew, {}) == brew
    assert make_options(Brew, brew, {"minutes": 5}) == Brew("green", 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leaves": "green", "minute": 2}, "there is no option 'minute': did you mean minutes?"),
        ({"minutes": 2}, "leaves is required"),
        ({"leaves": "bag", "strain": True}, "strain is for loose leaves"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InvalidOption, match=message):
        make_options(Brew, None, settings)


def test_what_has_no_effect_and_was_not_asked_for_is_fine():
    assert make_options(Brew, None, {"leaves": "bag"}).strain
