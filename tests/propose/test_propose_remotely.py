"""Proposal samples from endpoints: the file that a local run writes, whoever answers, whenever, and killed or not."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from scripted import Reply, scripted
from serving import folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.data.records import Record, read_records
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.errors import DataError, EndpointError, InvalidOption
from trimtab.propose.local import propose
from trimtab.propose.remote import propose_remotely

QUICK = Limits(concurrency=3, request_timeout=30, max_retries=3, backoff=0.02)
CHAT = [{"role": "user", "content": "abc", "name": None}]
RECORDS = [
    Record("abc", None, None, ""),
    Record(CHAT, [{"role": "assistant", "content": "xyz"}], None, ""),
    Record("de", "fg", None, ""),
    Record("é\u2028", None, None, ""),
]
MODELS = [{"id": "m", "owned_by": "someone"}]


def choices(asked, *, delay=0.0):
    """n texts that name the prompt and the seed, the last choice first."""
    body = asked.body
    chat = asked.path == "/v1/chat/completions"
    prompt = body["messages"][-1]["content"] if chat else body["prompt"]
    texts = [f"{prompt} {body['seed']} {i}" for i in range(body["n"])]
    made = [{"index": i, **({"message": {"content": text}} if chat else {"text": text})} for i, text in enumerate(texts)]
    return Reply({"choices": made[::-1]}, delay=delay)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def sampled(url, out, params, records=RECORDS, model=None, limits=QUICK):
    with Endpoints([url] if isinstance(url, str) else url, limits) as endpoints:
        return propose_remotely(endpoints, model, records, out, params)


def test_a_sample_that_could_not_go_on_is_no_answer_and_ends_nothing(tmp_path):
    """One choice of a request, as a server says it; and a request that is refused because none of its choices could go on."""

    def respond(asked, number):
        reply = choices(asked)
        if asked.body.get("prompt") == "de":
            return Reply({"error": {"message": "all dead", "code": "dead_row"}}, status=400)
        if asked.body.get("prompt") == "abc":
            reply.body["choices"][0] |= {"finish_reason": "error", "error": {"message": "a row is NaN"}}
        return reply

    for _ in range(2):  # once more, as the file is written anew
        with scripted(respond, models=MODELS) as server:
            assert sampled(server.url, tmp_path / "o.jsonl", SamplingParams(max_tokens=4, n=2, seed=5)) == (8, 3)
        first, dead, _, _, *lost = rows(tmp_path / "o.jsonl")[:6]
        assert first == {"prompt": "abc", "completion": "abc 5 0"}
        assert dead == {"prompt": "abc", "finish_reason": "error", "error": "a row is NaN"}
        assert all(row["prompt"] == "de" and row["finish_reason"] == "error" and "all dead" in row["error"] for row in lost)
    assert read_records(str(tmp_path / "o.jsonl"), need="prompt")[0].chosen == "abc 5 0"


def test_another_refusal_still_ends_the_run(tmp_path):
    refusal = Reply({"error": {"message": "too long", "code": "context_length"}}, status=400)
    with scripted(lambda asked, number: refusal, models=MODELS) as server, pytest.raises(EndpointError, match="too long"):
        sampled(server.url, tmp_path / "o.jsonl", SamplingParams(max_tokens=4, n=2, seed=5))


def test_texts_and_chats_are_asked_for_and_written_in_order(tmp_path):
    """Two of each: vLLM draws them by seed and seed + 1, so the next prompt has seed + 2."""
    with scripted(lambda asked, number: choices(asked, delay=0.1 * (3 - number)), models=MODELS) as server:
        assert sampled(server.url, tmp_path / "out", SamplingParams(max_tokens=4, n=2, seed=5, stop=["x"])) == (8, 0)
    assert rows(tmp_path / "out") == [
        {"prompt": "abc", "completion": "abc 5 0"},
        {"prompt": "abc", "completion": "abc 5 1"},
        *(
            {"prompt": CHAT, "chosen": RECORDS[1].chosen, "rejected": [{"role": "assistant", "content": f"abc 7 {i}"}]}
            for i in (0, 1)
        ),
        {"prompt": "de", "chosen": "fg", "rejected": "de 9 0"},
        {"prompt": "de", "chosen": "fg", "rejected": "de 9 1"},
        {"prompt": "é\u2028", "completion": "é\u2028 11 0"},
        {"prompt": "é\u2028", "completion": "é\u2028 11 1"},
    ]
    common = {"model": "m", "max_tokens": 4, "n": 2, "temperature": 1.0, "top_p": 1.0, "stop": ["x"]}
    by_seed = {asked.body["seed"]: asked for asked in server.asked}
    assert by_seed[5].body == common | {"seed": 5, "prompt": "abc"}
    assert by_seed[7].path == "/v1/chat/completions"
    assert by_seed[7].body == common | {"seed": 7, "messages": [{"role": "user", "content": "abc"}]}


def test_tools_of_a_chat_are_sent(tmp_path):
    prompt = {"messages": [{"role": "user", "content": "abc"}], "tools": [{"type": "function", "function": {"name": "look"}}]}
    with scripted(lambda asked, number: choices(asked), models=[{"id": "m", "owned_by": "x"}]) as server:
        sampled(server.url, tmp_path / "out", SamplingParams(max_tokens=4), [Record(prompt, None, None, "")])
    assert {name: server.asked[-1].body[name] for name in prompt} == prompt
    assert "chat_template_kwargs" not in server.asked[-1].body
    assert rows(tmp_path / "out")[0]["tools"] == prompt["tools"]


@pytest.mark.parametrize(
    ("owner", "settings", "sent"),
    [
        ("openai", {}, {}),
        ("openai", {"top_k": 3, "min_p": 0.1}, {"top_k": 3, "min_p": 0.1}),
        ("vllm", {}, {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("sglang", {"top_k": 3}, {"top_k": 3, "min_p": 0.0, "repetition_penalty": 1.0}),
    ],
)
def test_what_openai_does_not_have_is_sent_where_it_says_something(owner, settings, sent, tmp_path):
    """vLLM takes what is not sent from the model's own generation configuration: there, the neutral value says something."""
    with scripted(lambda asked, number: choices(asked), models=[{"id": "m", "owned_by": owner}]) as server:
        sampled(server.url, tmp_path / "out", SamplingParams(seed=0, **settings), RECORDS[:1])
    (body,) = server.posts()
    assert {name: body[name] for name in ("top_k", "min_p", "repetition_penalty") if name in body} == sent


def test_a_server_that_does_not_list_its_models_is_asked_by_name(tmp_path):
    with scripted(lambda asked, number: choices(asked)) as server:
        sampled(server.url, tmp_path / "out", SamplingParams(seed=0), model="mine")
        assert {body["model"] for body in server.posts()} == {"mine"}
        with pytest.raises(EndpointError, match="answered 404: Not Found"):
            sampled(server.url, tmp_path / "other", SamplingParams(seed=0))


@pytest.mark.parametrize(
    "junk",
    [
        {"choices": []},
        {"choices": [{"index": 0, "text": "a"}]},
        {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": None}]},
        {"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "\ud800"}]},
        {"choices": [{"text": "a"}, {"text": "b"}]},
    ],
)
def test_an_answer_without_n_texts_is_asked_for_again(junk, tmp_path):
    respond = lambda asked, number: Reply(junk) if number == 0 else choices(asked)  # noqa: E731
    with scripted(respond, models=MODELS) as server:
        sampled(server.url, tmp_path / "out", SamplingParams(n=2, seed=0), RECORDS[:1])
        assert len(server.asked) == 2
    assert [row["completion"] for row in rows(tmp_path / "out")] == ["abc 0 0", "abc 0 1"]


def test_a_prompt_that_cannot_be_sent_is_named(tmp_path):
    records = [*RECORDS, Record("a\ud800b", None, None, "data.jsonl:5")]
    with (
        scripted(lambda asked, number: choices(asked), models=MODELS) as server,
        pytest.raises(DataError, match=r"^data.jsonl:5: prompt is no valid Unicode"),
    ):
        sampled(server.url, tmp_path / "out", SamplingParams(seed=0), records)
    assert server.asked == []


# ---- resuming


def many(count):
    return [Record(f"p{i}", None, None, "") for i in range(count)]


def test_an_interrupted_run_goes_on_with_other_machines_and_no_other_model(tmp_path):
    params = SamplingParams(n=2, seed=5)
    with scripted(lambda asked, number: choices(asked), models=MODELS) as server:
        sampled(server.url, tmp_path / "whole", params, many(20))
    dying = lambda asked, number: Reply({"error": "gone"}, status=400) if number == 9 else choices(asked)  # noqa: E731
    with (
        scripted(dying, models=MODELS) as server,
        pytest.raises(EndpointError, match="answered 400: gone"),
    ):
        sampled(server.url, tmp_path / "halves", params, many(20))
    assert not (tmp_path / "halves").exists()
    with scripted(lambda asked, number: choices(asked), models=MODELS) as server:
        with pytest.raises(InvalidOption, match="other proposal: finish that one, or delete it"):
            sampled(server.url, tmp_path / "halves", params, many(20), model="n")
        sampled(server.url, tmp_path / "halves", params, many(20))
        asked_again = {body["prompt"] for body in server.posts()}
    first = 20 - len(asked_again)
    assert asked_again == {f"p{i}" for i in range(first, 20)}
    assert 0 < first < 15
    assert (tmp_path / "halves").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_killed_command_run_again_gives_every_row_once(tmp_path, capsys):
    """SIGKILL with requests in flight and answers out of order, of which the partial file has the first ones."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": record.prompt} for record in many(60)])

    def respond(asked, number):
        return choices(asked, delay=0.02 + 0.03 * (asked.body["seed"] % 3))

    with scripted(respond, models=MODELS) as server:
        words = ["propose", "--endpoint", f"{server.url}/v1", "--dataset", str(data), "--n", "2", "--concurrency", "2"]
        assert main([*words, "--out", str(tmp_path / "whole")]) == 0
        command = [sys.executable, "-m", "trimtab", *words, "--out", str(tmp_path / "killed")]
        partial = tmp_path / "killed.partial"
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (partial.exists() and partial.read_bytes().count(b"\n") > 12):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        written = (partial.read_bytes().count(b"\n") - 1) // 2
        assert 6 <= written < 60
        before = len(server.asked)
        assert main([*words, "--out", str(tmp_path / "killed"), "--json"]) == 0
        assert len(server.asked) - before == 60 - written
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"] == 120
    assert (tmp_path / "killed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not partial.exists()


# ---- the command


def test_a_refusal_is_one_line_and_one_request(tmp_path, capsys):
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": "a"}])
    refusal = Reply({"error": {"message": "top_k: not\nsupported"}}, status=400)
    with scripted(lambda asked, number: refusal, models=MODELS) as server:
        words = "propose", "--endpoint", server.url, "--dataset", str(data), "--out", str(tmp_path / "o"), "--top_k", "5"
        assert main(words) == 1
        assert len(server.asked) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert errors == [f"trimtab propose: error: {server.url}/v1/completions answered 400: top_k: not supported"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--proposal is required"),
        (("--proposal", "p", "--concurrency", "3"), "--concurrency needs --endpoint"),
        (("--proposal", "p", "--request_timeout", "3"), "--request_timeout needs --endpoint"),
        (("--endpoint", "http://a", "--dtype", "auto"), "--dtype is for a model that runs here"),
        (("--endpoint", "http://a", "--device", "cpu"), "--device is for a model that runs here"),
        (("--endpoint", "http://a", "--max_num_seqs", "3"), "--max_num_seqs is for a model that runs here"),
        (("--endpoint", "a:8000"), "'a:8000' is no endpoint"),
        (("--endpoint", "http://a", "--concurrency", "0"), "concurrency must be at least 1"),
    ],
)
def test_flags_that_do_not_go_together_are_wrong_usage(words, message, tmp_path, capsys):
    assert main(["propose", "--dataset", "d", "--out", str(tmp_path / "o"), *words]) == 2
    assert message in capsys.readouterr().err


# ---- our own server


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("proposal")
    return save_tiny(path, tiny_model("llama", V, seed=1), tiny_tokenizer(chat_template=CHAT_TEMPLATE))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "stop": ("b",)}])
def test_our_own_server_draws_what_the_model_draws_here(folder, settings, tmp_path):
    """The same seeds give the same texts, for texts and chats, several of each, whatever shares a batch with what."""
    texts = ("abc", "de", [{"role": "user", "content": "abc"}], "jklm", "fgh", [{"role": "user", "content": "d"}])
    records = [Record(text, None, None, "") for text in itertools.chain(texts, texts)]
    params = SamplingParams(max_tokens=5, n=3, seed=11, **settings)
    propose(AlignedModel.from_pretrained(folder, dtype="float32"), records, tmp_path / "here", params, batch_size=2)
    with running(folder_service(folder, {})) as server:
        sampled(server.url, tmp_path / "there", params, records)
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    assert len({json.dumps(row) for row in rows(tmp_path / "here")}) > 12
