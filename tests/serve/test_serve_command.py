"""`trimtab serve` as a process: it starts, says where it is, stops when it is told to, and refuses what makes no sense."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.cli import main

V = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("serve")
    big = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "max_position_embeddings": 4096}
    save_tiny(made / "proposal", tiny_model("llama", V, seed=0, spread=0.02, **big), tiny_tokenizer())
    save_tiny(made / "aligner", tiny_model("llama", V, seed=1, spread=0.3, max_position_embeddings=4096), tiny_tokenizer())
    return made


def command(folder: Path, *flags: str) -> list[str]:
    models = ["--proposal", str(folder / "proposal"), "--aligner", f"q={folder / 'aligner'}"]
    return [sys.executable, "-m", "trimtab", "serve", *models, "--device", "cpu", "--port", "0", *flags]


@contextmanager
def serving(folder: Path, *flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it is ready, and its address."""
    process = subprocess.Popen(
        command(folder, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    try:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            if "listening on" in line:
                url = json.loads(line)["message"].removeprefix("listening on ")
            if '"ready' in line:
                break
        yield process, url
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.slow
def test_the_log_says_who_drafts_and_that_aligners_may_be_told_to(folder):
    """`--draft aligner` is for each of them; the bare proposal, which is asked here too, has nobody."""
    process = subprocess.Popen(
        command(folder, "--draft", "aligner"), stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    with process.stderr as lines:
        said = next(line for line in map(json.loads, lines) if "who_drafts" in line)
    process.kill()
    process.wait()
    assert said["message"] == "loaded aligner q; who drafts: the aligner itself"
    assert (said["aligner"], said["who_drafts"]) == ("q", "the aligner itself")


def stop(
    process: subprocess.Popen[str], sent: signal.Signals = signal.SIGTERM
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """What it prints and logs from here on, when it is told to stop."""
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return json.loads(out), [json.loads(line) for line in err.splitlines()]


def test_a_server_answers_logs_without_the_text_and_stops(folder):
    with serving(folder, "--json", "--api_key", "k") as (process, url):
        body = {"model": "q", "prompt": "some secret", "max_tokens": 5, "seed": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        headers = {"authorization": "Bearer k", "x-request-id": "mine-1"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["model"] == "q"
        report, log = stop(process)
    assert report == {"model": "proposal", "requests": 1, "unfinished_sequences": 0}
    (line,) = [entry for entry in log if entry["message"] == "request"]
    assert line["request_id"] == "mine-1"
    assert line["outcome"] == "ok"
    assert line["completion_tokens"] == answer.json()["usage"]["completion_tokens"]
    assert "secret" not in json.dumps(log)


def test_prompts_are_logged_if_that_is_asked_for(folder):
    with serving(folder, "--json", "--log_prompts", "--served_model_name", "big", "--weight", "0.5") as (process, url):
        text = httpx.post(f"{url}/v1/completions", json={"model": "big:q", "prompt": "some secret", "max_tokens": 5}).json()
        _, log = stop(process, signal.SIGINT)
    (line,) = [entry for entry in log if entry["message"] == "request"]
    assert line["prompts"] == ["some secret"]
    assert line["completions"][0].replace("<eos>", "") == text["choices"][0]["text"]


def stream_lines(url: str, tokens: int) -> Iterator[str]:
    body = {"model": "q", "prompt": "abc", "max_tokens": tokens, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        yield from (line for line in answer.iter_lines() if line)


def test_a_running_stream_is_finished_before_the_server_stops(folder):
    with serving(folder, "--json") as (process, url):
        lines = stream_lines(url, 300)
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert '"finish_reason":"length"' in rest[-2]
        assert rest[-1] == "data: [DONE]"
        out, _ = process.communicate(timeout=60)
        assert json.loads(out)["unfinished_sequences"] == 0


@pytest.mark.slow
def test_what_cannot_be_finished_in_time_is_told_so(folder):
    with serving(folder, "--json", "--shutdown_timeout", "0.3") as (process, url):
        lines = stream_lines(url, 4000)
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
        assert "the server is shutting down" in rest[-2]
        assert rest[-1] == "data: [DONE]"
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert json.loads(out)["unfinished_sequences"] == 1


@pytest.mark.slow
def test_a_killed_server_starts_again_and_gives_the_same(folder):
    body = {"model": "q", "prompt": "abc", "max_tokens": 20, "seed": 1, "ignore_eos": True}
    texts = []
    for _ in range(2):
        with serving(folder) as (process, url):
            texts.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"])
            process.kill()
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_second_server_on_a_port_says_so(folder):
    with serving(folder) as (_, url):
        port = url.rpartition(":")[2]
        done = subprocess.run([*command(folder), "--port", port], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "address already in use" in done.stderr.lower()


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--aligner", "q=/nowhere/at/all"], 2, "two models are called 'q'"),
        (["--aligner", "=x"], 2, "must be NAME=PATH"),
        (["--aligner", "a/b=x"], 2, "must be NAME=PATH"),
        (["--weight", "1", "--weight", "2"], 2, "2 --weight for 1 --aligner"),
        (["--aligner_root", "/nowhere"], 2, "--aligner_root: there is no folder"),
        (["--port", "70000"], 2, "--port must be from 0 to 65535"),
        (["--ssl_keyfile", "x"], 2, "go together"),
        (["--votes", "x"], 2, "--votes belongs to --playground"),
        (["--request_timeout", "0"], 2, "--request_timeout must be above 0"),
        (["--shutdown_timeout", "-1"], 2, "--shutdown_timeout must be at least 0"),
        (["--api_key", " "], 2, "API key must be printable"),
    ],
)
def test_wrong_usage_is_one_line_and_no_server(folder, flags, status, says, capsys):
    assert main([*command(folder)[3:], *flags]) == status
    assert says in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("flags", "status", "says"),
    [
        (["--aligner", "z=/nowhere/at/all"], 1, "'/nowhere/at/all' does not exist"),
        (["--rule", "magic"], 2, "there is no rule 'magic'"),
        (["--max_aligner_memory", "0.000001"], 1, "aligner 'q' needs"),
        (["--host", "999.1.1.1"], 1, "not known"),  # not above: by then, the process's logging is that of a server
    ],
)
def test_what_cannot_be_loaded_ends_the_server_in_one_line(folder, flags, status, says):
    done = subprocess.run(
        [*command(folder), *flags], capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, says in one_line(done.stderr)) == (status, True), done.stderr


def one_line(err: str) -> str:
    """The last line on standard error, which is the error."""
    last = err.strip().splitlines()[-1]
    assert last.startswith("trimtab serve: error:")
    assert "Traceback" not in err
    return last


def test_listening_beyond_this_machine_without_a_key_is_warned_of(folder):
    started = time.monotonic()
    process = subprocess.Popen(command(folder, "--host", "0.0.0.0"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as lines:
        first = json.loads(next(lines))
    process.kill()
    process.wait()
    assert first["level"] == "warning"
    assert "without an API key" in first["message"]
    assert time.monotonic() - started < 60
