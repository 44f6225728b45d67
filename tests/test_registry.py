"""What is chosen by name: ours, and what other packages bring through entry points."""

import sys

import pytest

from brought import bring
from trimtab.errors import InvalidOption
from trimtab.registry import Registry, check_is, help_of

GROUP = "trimtab.colours"
SOURCE = "class Red:\n    name = 'red'\n\nclass Blue:\n    name = 'navy'\n"


def colours(check=lambda value: None):
    registry = Registry("colour", GROUP, check)

    @registry.register
    class Green:
        name = "green"

    return registry, Green


def test_ours_are_there_by_name():
    registry, green = colours()
    assert registry["green"] is registry.find("green") is green
    assert dict(registry) == {"green": green}
    assert len(registry) == 1
    assert "green" in registry
    assert "red" not in registry


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    registry, _ = colours()
    with pytest.raises(InvalidOption, match=r"^colour: there is no colour 'red'; choose one of green$"):
        registry.find("red")
    with pytest.raises(KeyError, match="red"):
        registry["red"]


def test_a_name_is_registered_once():
    registry, green = colours()
    with pytest.raises(InvalidOption, match="colour: there are two of the name 'green'"):
        registry.register(green)


def test_an_entry_point_is_imported_when_it_is_asked_for_and_no_sooner(tmp_path, monkeypatch):
    bring(tmp_path, monkeypatch, "their_colours", SOURCE, {GROUP: {"red": "their_colours:Red"}})
    registry, _ = colours()
    assert sorted(registry) == ["green", "red"]
    assert "red" in registry
    assert "their_colours" not in sys.modules
    assert registry.find("red").__name__ == "Red"
    assert registry["red"] is registry["red"]


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ({"red": "their_colours:Missing"}, "'red' of their-package cannot be imported: AttributeError"),
        ({"red": "no_such_module:Red"}, "'red' of their-package cannot be imported: ModuleNotFoundError"),
        ({"blue": "their_colours:Blue"}, "'blue' of their-package calls itself 'navy': give both one name"),
    ],
)
def test_an_entry_point_that_cannot_be_used_is_refused_by_its_package(tmp_path, monkeypatch, points, message):
    bring(tmp_path, monkeypatch, "their_colours", SOURCE, {GROUP: points}, package="their-package")
    registry, _ = colours()
    with pytest.raises(InvalidOption, match=f"^colour: {message}"):
        [registry[name] for name in registry]


def test_two_packages_with_one_name_are_refused(tmp_path, monkeypatch):
    bring(tmp_path / "a", monkeypatch, "one_colour", SOURCE, {GROUP: {"red": "one_colour:Red"}})
    bring(tmp_path / "b", monkeypatch, "other_colour", SOURCE, {GROUP: {"red": "other_colour:Red"}})
    registry, _ = colours()
    with pytest.raises(InvalidOption, match="'red' is brought by one_colour and other_colour: uninstall one of them"):
        registry.find("red")


@pytest.mark.parametrize(("error", "reason"), [(InvalidOption, "it has no hue"), (ValueError, "ValueError: it has no hue")])
def test_what_a_check_refuses_is_refused_with_its_reason(tmp_path, monkeypatch, error, reason):
    """A check may run what is somebody's, and that may raise whatever it likes."""

    def check(value):
        raise error("it has no hue")

    bring(tmp_path, monkeypatch, "their_colours", SOURCE, {GROUP: {"red": "their_colours:Red"}})
    registry, _ = colours(check)
    with pytest.raises(InvalidOption, match=f"colour: 'red' of their_colours cannot be used: {reason}$"):
        registry.find("red")


def test_help_has_a_line_for_everything_and_says_why_something_cannot_be_used(tmp_path, monkeypatch):
    source = "class Value:\n    help = 'like blood'\n"
    points = {GROUP: {"red": "their_colours:Value", "navy": "their_colours:Missing"}}
    bring(tmp_path, monkeypatch, "their_colours", source, points)
    registry = Registry("colour", GROUP)
    registry.add("green", type("Green", (), {"help": "like grass"}))
    said = help_of(registry)
    assert said.startswith("green: like grass; navy (colour: 'navy' of their_colours cannot be imported: AttributeError")
    assert said.endswith("; red: like blood")


def test_values_that_must_be_of_a_class_are_checked(tmp_path, monkeypatch):
    bring(tmp_path, monkeypatch, "their_colours", SOURCE, {GROUP: {"red": "their_colours:Red"}})
    with pytest.raises(InvalidOption, match=r"it must be a builtins\.str, not <class 'their_colours\.Red'>"):
        Registry("colour", GROUP, check_is(str)).find("red")


def test_a_name_of_ours_is_ours_whoever_brings_it(tmp_path, monkeypatch, caplog):
    """Whether it or another one is asked for; a warning says who brings it."""
    bring(tmp_path, monkeypatch, "their_colours", SOURCE, {GROUP: {"green": "their_colours:Red", "red": "their_colours:Red"}})
    registry, green = colours()
    assert registry["green"] is green
    assert registry["red"].__name__ == "Red"
    assert sorted(registry) == ["green", "red"]
    assert "colour: their_colours brings a 'green', which is ours, and counts: rename it" in caplog.text
