"""What people say of answers is data that training reads, with whose key it came; a flood is stopped, and nothing is lost."""

import json

import pytest

from serving import Server, folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from trimtab.cli import main
from trimtab.data.records import read_records
from trimtab.errors import InvalidOption
from trimtab.serve.feedback import FeedbackBook, key_name
from trimtab.serve.refusal import Refusal

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(
        tmp_path_factory.mktemp("feedback") / "proposal",
        tiny_model("llama", 28, seed=0),
        tiny_tokenizer(chat_template=CHAT_TEMPLATE),
    )


@pytest.fixture
def server(folder, tmp_path):
    with running(folder_service(folder, {}, feedback=tmp_path / "said.jsonl", api_keys=("one", "two"))) as server:
        yield server


def say(server: Server, key: str = "one", **body):
    return server.client.post("/v1/feedback", json=body, headers={"authorization": f"Bearer {key}"})


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_votes_and_corrections_are_what_training_reads(server, tmp_path):
    vote = say(server, prompt="de", chosen="x", rejected="y", model="polite")
    assert vote.status_code == 200
    assert vote.json()["kind"] == "vote"
    assert say(server, "two", messages=CHAT, completion="no", correction="yes").json()["kind"] == "correction"
    path = tmp_path / "said.jsonl"
    first, second = read_records(str(path), need="rejected")
    assert (first.prompt, first.chosen, first.rejected) == ("de", "x", "y")
    assert (second.prompt, second.chosen[0]["content"], second.rejected[0]["content"]) == (CHAT, "yes", "no")
    kept = rows(path)
    assert [row["key"] for row in kept] == [key_name("one"), key_name("two")]
    assert [row.get("model") for row in kept] == ["polite", None]
    assert "one" not in json.dumps([row["key"] for row in kept])


def test_a_thumb_is_an_unpaired_preference(server, tmp_path):
    assert say(server, prompt="de", completion="x", rating="up").json()["kind"] == "thumb"
    say(server, messages=CHAT, completion="no", rating="down")
    kept = rows(tmp_path / "said.thumbs.jsonl")
    assert [(row["prompt"], row["completion"], row["label"]) for row in kept] == [
        ("de", "x", True),
        (CHAT, [{"role": "assistant", "content": "no"}], False),
    ]
    assert not (tmp_path / "said.jsonl").exists()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": "de", "messages": CHAT, "chosen": "x", "rejected": "y"}, "prompt"),
        ({"prompt": "de", "chosen": "x"}, "chosen"),
        ({"prompt": "de", "completion": "x"}, "chosen"),
        ({"prompt": "de", "completion": "x", "correction": "y", "rating": "up"}, "chosen"),
        ({"prompt": "de", "completion": "x", "rating": "sideways"}, "rating"),
        ({"prompt": "de", "chosen": "x", "rejected": "y", "key": "z"}, "key"),
        ({"prompt": "\ud83d", "chosen": "x", "rejected": "y"}, "prompt"),
    ],
)
def test_what_says_nothing_is_refused(server, tmp_path, body, param):
    headers = {"content-type": "application/json", "authorization": "Bearer one"}
    answer = server.client.post("/v1/feedback", content=json.dumps(body), headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param or "\ud83d" in body.get("prompt", "")
    assert not (tmp_path / "said.jsonl").exists()


def test_a_key_is_needed_and_each_may_say_so_much(folder, tmp_path):
    with running(
        folder_service(folder, {}, feedback=tmp_path / "said.jsonl", feedback_per_hour=3, api_keys=("one", "two"))
    ) as server:
        assert say(server, "guess", prompt="de", chosen="x", rejected="y").status_code == 401
        for _ in range(3):
            assert say(server, prompt="de", chosen="x", rejected="y").status_code == 200
        refused = say(server, prompt="de", chosen="x", rejected="y")
        assert refused.status_code == 429
        assert 3500 < int(refused.headers["retry-after"]) <= 3601
        assert say(server, "two", prompt="de", chosen="x", rejected="y").status_code == 200
    assert len(rows(tmp_path / "said.jsonl")) == 4


def test_an_hour_later_a_key_may_speak_again(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("trimtab.serve.feedback.time.monotonic", lambda: clock[0])
    book = FeedbackBook(tmp_path / "said.jsonl", 2)
    book.admit("one")
    clock[0] = 1800.0
    book.admit("one")
    with pytest.raises(Refusal, match="2 times an hour") as refused:
        book.admit("one")
    assert refused.value.retry_after == 1801
    clock[0] = 3600.0
    book.admit("one")


def test_a_full_disk_is_said_and_leaves_nothing(server, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("trimtab.appended.os.write", full)
        answer = say(server, prompt="de", chosen="x", rejected="y")
    assert answer.status_code == 503
    assert "No space left" in answer.json()["error"]["message"]
    assert say(server, prompt="de", chosen="x", rejected="y").status_code == 200
    assert len(rows(tmp_path / "said.jsonl")) == 1


def test_without_a_file_nothing_is_taken(folder):
    with running(folder_service(folder, {})) as server:
        assert server.post("/v1/feedback", prompt="de", chosen="x", rejected="y").status_code == 404


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--feedback", "said.jsonl"], "--feedback needs an --api_key"),
        (["--feedback", "said.txt", "--api_key", "k"], "must end in .jsonl"),
        (["--feedback_per_hour", "3"], "belongs to --feedback"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, capsys, monkeypatch, flags, said):
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)
    assert main(["serve", "--proposal", str(folder), *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "said.jsonl").mkdir()
    with pytest.raises(InvalidOption, match="is a folder: name a file"):
        FeedbackBook(tmp_path / "said.jsonl", 1)
