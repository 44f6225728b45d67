"""Checkable instructions: the program that judges, and that wanted answers obey it."""

import pytest

from real_study import study_module

constraints, instructions = study_module("constraints"), study_module("instructions")
obeys, states = constraints.obeys, constraints.states


@pytest.mark.parametrize(
    ("constraint", "kept", "broken"),
    [
        (
            {"kind": "one sentence"},
            ["It has 3.5 million people.", 'She said "yes."', " Really? ", "Wait…"],
            ["One. Two.", "One", "One.\nTwo.", "A: b\n", "Is it? Yes.", "1. One."],
        ),
        (
            {"kind": "json", "keys": ["a", "b"]},
            ['{"b": 1, "a": null}', ' {"a": "x", "b": {}}\n'],
            ['{"a": 1}', '{"a": 1, "b": 2, "c": 3}', '```json\n{"a": 1, "b": 2}\n```', '["a", "b"]', "{'a': 1, 'b': 2}", "a b"],
        ),
        (
            {"kind": "no list"},
            ["A well-known town. It has 2 rivers - both small.", "In 1284 it was founded.\n\n1284 is long ago."],
            ["Facts:\n- one", "1. One\n2. Two", " * one", "Some:\n  (1) one", "• one"],
        ),
        ({"kind": "below", "words": 4}, ["one two three", "one\n two", "one-two-three four"], ["one two three four"]),
        ({"kind": "ending", "phrase": "Ask me."}, ["Yes. Ask me.", "Ask me. \n"], ["Ask me", "Ask me. Yes.", 'Yes. "Ask me."']),
        ({"kind": "language", "language": "French"}, ["Le fleuve est l'Aune."], ["The river is the Aune.", "El río", "Aune"]),
        (
            {"kind": "language", "language": "German"},
            ["Das ist der Fluss Aune."],
            ["Le fleuve est l'Aune.", "die or not: it is"],
        ),
        (
            {"kind": "language", "language": "Spanish"},
            ["El río pasa por la ciudad."],
            ["La rivière dans la ville", "it is el río"],
        ),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_what_obeys(constraint, kept, broken):
    assert [text for text in kept if not obeys(constraint, text)] == []
    assert [text for text in [*broken, "", " \n"] if obeys(constraint, text)] == []


def test_unknown_constraints_are_refused():
    with pytest.raises(ValueError, match="there is no constraint 'rhyme'; there are one sentence, json"):
        obeys({"kind": "rhyme"}, "text")


def test_facts_are_looked_for_as_whole_words():
    assert states(["Aune", "1284"], "In 1284, on the AUNE.")
    assert not states(["Aune", "128"], "In 1284, on the Aune.")
    assert states([], "")


def test_no_word_belongs_to_two_languages():
    words = [word for known in constraints.LANGUAGES.values() for word in known.split()]
    assert len(words) == len(set(words))


def test_wanted_answers_obey_and_state_what_was_asked():
    parts = instructions.make(None)
    assert {name: len(records) for name, records in parts.items()} == {"train": 600, "dev": 60, "test": 150}
    for record in (record for records in parts.values() for record in records):
        wanted = record["completion"][0]["content"]
        assert obeys(record["constraint"], wanted), (record["constraint"], wanted)
        assert states(record["facts"], wanted)
        assert "{" not in wanted or record["constraint"]["kind"] == "json"


def test_sentences_are_in_their_language_and_in_no_other():
    """Every template with every word: the judge knows the language of all that is wanted."""
    town = {"town": "Zelkova", "river": "Isk", "founded": "1284", "inhabitants": "4100"}
    for language, templates in instructions.SENTENCES.items():
        for product, festival in zip(
            list(instructions.WORDS["French"])[:12], list(instructions.WORDS["French"])[12:], strict=True
        ):
            facts = instructions.words_of(town | {"product": product, "festival": festival}, language)
            for text in (one.format(**facts) for several in templates.values() for one in several):
                found = [name for name in constraints.LANGUAGES if obeys({"kind": "language", "language": name}, text)]
                assert found == [language], text


def test_towns_are_in_one_part_and_kinds_are_even():
    parts = instructions.make(None)
    towns = {name: {record["group"] for record in records} for name, records in parts.items()}
    assert {name: len(found) for name, found in towns.items()} == {"train": 50, "dev": 10, "test": 25}
    assert len(set.union(*towns.values())) == 85
    for records in parts.values():
        kinds = [record["constraint"]["kind"] for record in records]
        assert {kinds.count(kind) for kind in constraints.KINDS} == {len(records) // 6}
    assert instructions.make(None) == parts
