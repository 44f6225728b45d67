"""Options of calls from Python get the checks that flags get."""

import dataclasses

import pytest

from trimtab.errors import InvalidOption
from trimtab.options import make_options, named_for_python, option


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


@dataclasses.dataclass(frozen=True)
class Kettle(Brew):
    """With a choice."""

    heat: str = option("gas", lambda: "how", choices=("gas", "wood"))


def test_one_value_of_an_option_that_repeats_is_one_of_it_alone():
    assert make_options(Brew, None, {"leaves": "green", "milk": "oat"}).milk == ("oat",)
    assert make_options(Brew, None, {"leaves": "green", "milk": None}).milk == ()


def test_a_choice_is_one_of_its_choices():
    with pytest.raises(InvalidOption, match=r"^--heat must be one of gas, wood, not 'sun'$"):
        make_options(Kettle, None, {"leaves": "green", "heat": "sun"})


def test_options_that_are_given_whole_get_the_checks_too():
    with pytest.raises(InvalidOption, match="--leaves is required"):
        make_options(Brew, Brew(), {})
    with pytest.raises(InvalidOption, match="--strain is for loose leaves"):
        make_options(Strained, Strained("bag", strain=True), {})


@dataclasses.dataclass(frozen=True)
class Strained(Brew):
    """Off by default."""

    strain: bool = option(False, "the leaves out")


def test_from_python_messages_name_options_without_dashes_and_leave_other_words():
    with pytest.raises(InvalidOption, match=r"^leaves and milk, not --sugar$"), named_for_python(Brew):
        raise InvalidOption("--leaves and --milk, not --sugar")
