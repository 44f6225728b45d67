"""Tasks that come from files: transcripts as chats, and parts that share no prompt."""

from real_study import study_module

hh, short_answers, outside = study_module("hh"), study_module("short_answers"), study_module("outside")


def test_transcripts_become_turns():
    assert hh.messages("\n\nHuman: hi \n\nAssistant: Hello.\n\nYes?\n\nHuman: bye\n\nAssistant:") == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello.\n\nYes?"},
        {"role": "user", "content": "bye"},
    ]
    for odd in (
        "\n\nHuman: hi\n\nHuman: ho\n\nAssistant:",
        "\n\nHuman: hi",
        "\n\nAssistant: hi\n\nHuman: ho\n\nAssistant:",
        "\n\nHuman: \n\nAssistant:",
        "\n\nHuman: hi\n\nAssistant: begun",
        "hi",
    ):
        assert hh.messages(odd) is None, odd


def pair(prompt: str, chosen: str = " yes", rejected: str = "no ") -> dict[str, str]:
    return {"prompt": f"\n\nHuman: {prompt}\n\nAssistant:", "chosen": chosen, "rejected": rejected}


def test_pairs_are_dealt_by_their_first_turn():
    rows = [pair(f"{i}") for i in range(1650)] + [pair(f"{i}\n\nAssistant: a\n\nHuman: b") for i in range(1650)]
    rows += [pair("equal", "same", " same"), pair("x" * 2200), pair("turn", "yes\n\nHuman: no"), pair("empty", " ")]
    parts = hh.split(rows)
    assert {name: len(records) for name, records in parts.items()} == hh.SIZES
    groups = [{record["group"] for record in records} for records in parts.values()]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert not set.union(*groups) & {"equal", "x" * 2200, "turn", "empty"}
    first = parts["test"][0]
    assert (first["chosen"], first["rejected"]) == (
        [{"role": "assistant", "content": "yes"}],
        [{"role": "assistant", "content": "no"}],
    )
    assert hh.split(reversed(rows))["test"][0]["group"] == first["group"]


def test_answers_that_end_and_were_liked_are_taken():
    def row(prompt: str, completion: str, score: float) -> dict[str, object]:
        return {"prompt": prompt, "completion": completion, "score": score}

    rows = [row(f"p{i}", f"Answer {j}.", 0.3 + j / 100) for i in range(200) for j in range(10)]
    rows += [row("cut", "An answer that", 0.9), row("bad", "An answer.", 0.29), row("long", "word " * 80 + "end.", 0.9)]
    parts = short_answers.split([*rows, row("p0", "Answer 9. ", 0.99)])
    groups = {name: [record["group"] for record in records] for name, records in parts.items()}
    assert sum(len(set(found)) for found in groups.values()) == 200 == len(set().union(*groups.values()))
    for name, found in groups.items():
        assert 0 < len(found) == len(set(found)) * short_answers.MOST[name]
        texts = [record["completion"][0]["content"] for record in parts[name]]
        assert texts[: short_answers.MOST[name]] == [f"Answer {9 - i}." for i in range(short_answers.MOST[name])]


def test_prompts_outside_are_many_and_of_no_task():
    assert len(set(outside.PROMPTS)) == 60
    assert not [text for text in outside.PROMPTS if "docstring" in text or text.startswith("Facts")]
