"""Options of calls from Python get the checks that flags get."""

import dataclasses
import math

import pytest

from trimtab.cli.options import add_options, read_options
from trimtab.cli.parser import Parser
from trimtab.errors import InvalidOption
from trimtab.options import Flag, Range, check_ranges, make_options, named_for_python, option, same


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


# ---- ranges


@dataclasses.dataclass(frozen=True)
class Oven:
    """With knobs."""

    trays: int = option(1, "how many", low=1)
    heat: float | None = option(None, "in degrees [default: by the dough]", above=0, below=math.inf)
    port: int = option(80, "where it listens", low=0, high=65535)
    times: tuple[float, ...] = option((), "parts of an hour; may repeat", above=0, below=1)
    name: str = option("", "what it is called")


@pytest.mark.parametrize(
    ("ends", "words", "inside", "outside"),
    [
        ({"low": 1}, "at least 1", [1, 2, 1.5, 10**400, math.inf], [0, 0.99, math.nan, True, "1", None]),
        ({"above": 0}, "above 0", [1e-300, math.inf], [0, -1, 0.0, math.nan]),
        ({"above": 0, "below": math.inf}, "above 0 and finite", [1e300], [math.inf, 0, math.nan]),
        ({"low": 0, "high": 16}, "from 0 to 16", [0, 16], [-1, 17, math.nan]),
        ({"above": 0, "below": 1}, "between 0 and 1", [0.5], [0, 1, math.nan]),
        ({"above": 0, "high": 1}, "above 0 and at most 1", [1, 1e-9], [0, 1.001]),
        ({"low": 0, "below": 1}, "at least 0 and below 1", [0, 0.5], [1, -0.1]),
        ({"low": 1e-3, "high": 1e3}, "from 0.001 to 1000", [1e-3, 1000], [9e-4, 1001]),
    ],
)
def test_a_range_holds_what_it_says(ends, words, inside, outside):
    found = Range.of({"help": "text", **ends})
    assert str(found) == words
    assert all(map(found.holds, inside))
    assert not any(map(found.holds, outside))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trays": 0}, "--trays must be at least 1, not 0"),
        ({"heat": math.inf}, "--heat must be above 0 and finite, not inf"),
        ({"port": 65536}, "--port must be from 0 to 65535, not 65536"),
        ({"times": [0.5, 1.0]}, "--times must be between 0 and 1, not 1.0"),
        ({"trays": "two"}, "--trays must be at least 1, not 'two'"),
    ],
)
def test_a_number_out_of_range_is_refused_wherever_it_comes_from(settings, message):
    with pytest.raises(InvalidOption) as from_python:
        make_options(Oven, None, settings)
    with pytest.raises(InvalidOption) as from_flags:
        read_options(Oven, settings)
    assert str(from_python.value) == str(from_flags.value) == message


def test_none_and_the_ends_are_in_the_range():
    check_ranges(Oven(trays=1, heat=None, port=65535, times=()))


def test_help_shows_a_range_that_says_something():
    parser = Parser("bake")
    add_options(parser, Oven)
    helped = {name: action.help for name, action in parser.flags.items()}
    assert helped["--trays"] == "how many [default: 1]"
    assert helped["--heat"] == "in degrees [default: by the dough]"
    assert helped["--port"] == "where it listens (from 0 to 65535) [default: 80]"
    assert helped["--times"] == "parts of an hour; may repeat (between 0 and 1)"


def test_an_option_can_be_another_ones_but_for_its_default():
    @dataclasses.dataclass(frozen=True)
    class Grill:
        port: int = same(Oven, "port", default=81)

    assert Grill().port == 81
    with pytest.raises(InvalidOption, match=r"^--port must be from 0 to 65535, not -1$"):
        make_options(Grill, None, {"port": -1})


@dataclasses.dataclass(frozen=True)
class Kettle(Brew):
    """With a choice."""

    heat: str = option("gas", lambda: "how", choices=("gas", "wood"))


def test_one_value_of_an_option_that_repeats_is_one_of_it_alone():
    assert make_options(Brew, None, {"leaves": "green", "milk": "oat"}).milk == ("oat",)
    assert make_options(Brew, None, {"leaves": "green", "milk": None}).milk == ()


def test_none_is_the_default_of_every_option():
    assert make_options(Brew, None, {"leaves": "green", "minutes": None, "strain": None}) == Brew("green")
    with pytest.raises(InvalidOption, match="--leaves is required"):
        make_options(Brew, None, {"leaves": None})
    assert make_options(Cake, None, {"oven": None}) == make_options(Cake, None, {"degrees": None}) == Cake()


@dataclasses.dataclass(frozen=True)
class Cake:
    """With nested options."""

    oven: dict[str, object] = dataclasses.field(
        default_factory=dict,
        metadata={"help": "what", "nested": lambda: {"degrees": Flag(float, "hot"), "fan": Flag(bool, "on")}},
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"oven": 5}, "^--oven must be a mapping of options, not 5$"),
        ({"degrees": "hot"}, "^--degrees must be a number, not 'hot'$"),
        ({"oven": {"fan": 1}}, "^--fan must be true or false, not 1$"),
        ({"degree": 180.0}, r"^there is no option 'degree': did you mean degrees\?$"),
    ],
)
def test_nested_options_have_types_too(settings, message):
    assert make_options(Cake, None, {"degrees": 180, "fan": True}).oven == {"degrees": 180, "fan": True}
    with pytest.raises(InvalidOption, match=message):
        make_options(Cake, None, settings)


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
