"""`trimtab serve --engine vllm` as a process, with OpenAI's client, with `propose`, and with the cache of log-probabilities."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from engines import CONTEXT, Models
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, TextHandover
from trimtab import SamplingParams as Ours
from trimtab.data.examples import Example
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.handover.sides import RemoteProposal
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.models.vocabulary import vocabulary_size
from trimtab.train.endpoint_rows import EndpointRows
from trimtab.train.rows import Layout, ModelRows

GREEDY: Any = {"max_tokens": 20, "temperature": 0}
CHAT = "{% for message in messages %}{{ message.content }}{% endfor %}"


class Server:
    """A server on a port of its own, which may be killed and started again."""

    def __init__(self, models: Models, port: int, *flags: str) -> None:
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        words = [sys.executable, "-m", "trimtab", "serve", "--engine", "vllm", "--proposal", models.proposal]
        words += ["--port", str(port), "--dtype", "float32", "--served_model_name", "base", *flags]
        more = f"--enforce-eager --max-model-len {CONTEXT} --kv-cache-memory-bytes {2**26} --gpu-memory-utilization 0.3"
        self._words = [*words, f"--vllm_args={more} --max-logprobs -1"]
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        self.process = subprocess.Popen(self._words, env=environment, start_new_session=True)
        for _ in range(240):
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx2.HTTPError:
                pass
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.5)
        raise AssertionError("the server did not start in two minutes")

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def chatty(models: Models) -> Models:
    """The same models; the proposal's tokenizer has a chat template."""
    tiny_tokenizer("abcdef", chat_template=CHAT).save_pretrained(models.proposal)
    return models


@pytest.fixture(scope="module")
def server(chatty: Models) -> Iterator[Server]:
    flags = [word for name, path in chatty.aligners.items() for word in ("--aligner", f"{name}={path}")]
    server = Server(chatty, free_port(), *flags)
    yield server
    if server.process.poll() is None:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0, "SIGTERM ends it as it should"


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ours(models: Models, names: list[str], prompt: str, **settings: Any) -> str:
    whole = AlignedModel.from_pretrained(models.proposal, [models.aligners[name] for name in names], dtype="float32")
    return whole.generate([prompt], Ours(max_tokens=20, temperature=0, **settings))[0].text


def test_aligners_are_asked_for_in_vllm_xargs(models, client):
    def ask(**xargs: Any) -> str:
        body = {"vllm_xargs": xargs} if xargs else None
        return client.completions.create(model="base", prompt="abc", extra_body=body, **GREEDY).choices[0].text

    assert ask() == ours(models, [], "abc")
    assert ask(aligner="first") == ours(models, ["first"], "abc")
    assert ask(aligner="first", weight=0.3) == ours(models, ["first"], "abc", weight=0.3)
    several: Any = {"weight": [0.6, 0.5], "rule": "geometric"}
    assert ask(aligner=["second", "blue"], **several) == ours(models, ["second", "blue"], "abc", **several)


def test_the_embedded_servers_requests_mean_the_same(models, client):
    def ask(model: str, **body: Any) -> str:
        return client.completions.create(model=model, prompt="fed", extra_body=body, **GREEDY).choices[0].text

    assert ask("base") == ours(models, [], "fed")
    assert ask("red") == ask("base:red") == ask("base", aligner="red") == ours(models, ["red"], "fed")
    assert ask("second", weight=0.5) == ours(models, ["second"], "fed", weight=0.5)
    assert [model.id for model in client.models.list()] == ["base", *models.aligners]


def test_a_stream_and_a_chat_are_aligned(models, client):
    stream = client.completions.create(model="first", prompt="aa", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == ours(models, ["first"], "aa")
    messages: Any = [{"role": "user", "content": "aa"}]
    answer = client.chat.completions.create(model="first", messages=messages, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == ours(models, ["first"], "aa")


@pytest.mark.parametrize(
    ("model", "body", "field", "words"),
    [
        ("base", {"vllm_xargs": {"aligner": "nobody"}}, "aligner", "there is no aligner 'nobody'"),
        ("base", {"vllm_xargs": {"aligner": "first", "weight": "much"}}, "weight", "weight must be a number"),
        ("base", {"vllm_xargs": {"aligner": "first", "rule": "candidates"}}, "rule", "no row in closed form"),
        ("first", {"aligner": "second"}, "aligner", "names an aligner"),
        ("base", {"aligner": "first", "vllm_xargs": {"aligner": "second"}}, "aligner", "is given twice"),
        ("first", {"weight": [1, 2]}, "weight", "2 numbers, but there are 1 aligners"),
    ],
)
def test_wrong_arguments_are_a_400_that_names_the_field(client, model, body, field, words):
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.completions.create(model=model, prompt="abc", max_tokens=2, extra_body=body)
    assert caught.value.param == field


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="base:nobody", prompt="abc", max_tokens=2, extra_body={"weight": 1})


@pytest.mark.parametrize("top_k", [3, 0])
def test_the_cache_from_prompt_logprobs_is_the_local_one(models, server, top_k):
    tokenizer = load_tokenizer(models.proposal)
    size = vocabulary_size(tokenizer)
    examples = [Example(prompt=[1, 2, i], chosen=[3, i, 5, 0], rejected=[]) for i in range(1, 6)]
    far = EndpointRows([server.url], Limits(), "base", size).compress(examples, Layout(top_k or size), 1.0)
    local = HuggingFaceLM(load_model(models.proposal, dtype="float32"), size)
    near = ModelRows(local, "").compress(examples, Layout(top_k or size), 1.0)
    for theirs, here in zip(far.rows, near.rows, strict=True):
        assert theirs.rebuild(size).exp().sub(here.rebuild(size).exp()).abs().max() < 1e-5
        assert theirs.ids.tolist() == here.ids.tolist()


def propose(server: Server, data: Path, out: Path) -> "subprocess.Popen[str]":
    words = ["propose", "--endpoint", server.url, "--dataset", str(data), "--out", str(out), "--max_tokens", "60"]
    words += ["--temperature", "1", "--seed", "3", "--max_retries", "2", "--concurrency", "8"]
    return subprocess.Popen([sys.executable, "-m", "trimtab", *words], stderr=subprocess.PIPE, text=True)


def test_propose_goes_on_after_the_server_was_killed(server, tmp_path):
    data = tmp_path / "data.jsonl"
    letters = "abcdef"
    prompts = ["".join(letters[(i * step) % 6] for step in range(1, 4 + i % 40)) for i in range(400)]
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert propose(server, data, whole).wait(300) == 0

    partial = cut.with_name("cut.jsonl.partial")
    running = propose(server, data, cut)
    while not partial.exists() or len(partial.read_text().splitlines()) < 50:
        assert running.poll() is None, "it was meant to be killed on its way"
        time.sleep(0.01)
    server.kill()
    assert running.wait(120) == 1
    assert running.stderr is not None
    assert "no endpoint is left" in running.stderr.read()
    assert not cut.exists()

    server.start()
    assert propose(server, data, cut).wait(300) == 0
    rows = [json.loads(line) for line in cut.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    same = sum(a == json.loads(b) for a, b in zip(rows, whole.read_text().splitlines(), strict=True))
    assert same == len(rows), "each request has a seed of its own"


def test_it_goes_on_behind_a_leader_with_another_tokenizer(chatty, server, tmp_path):
    """As a model here would: what vLLM echoes of a prompt says where the hand-over is."""
    folder = save_tiny(tmp_path / "leader", tiny_model("llama", 7, seed=3), tiny_tokenizer("fedcba"))
    leader, proposal = AlignedModel.from_pretrained(folder), AlignedModel.from_pretrained(chatty.proposal, dtype="float32")
    asked = ["abc", "fed", "add"], Ours(max_tokens=12, temperature=0)
    for over in ("confidence(window=2, threshold=0)", "confidence(window=2, threshold=0.3)", "confidence(threshold=1.1)"):
        here = TextHandover(leader, proposal, over).generate(*asked)
        with Endpoints([server.url]) as endpoints:
            there = TextHandover(leader, RemoteProposal(endpoints, proposal.tokenizer, "base"), over).generate(*asked)
        assert [(one.text, one.handover_at) for one in there] == [(one.text, one.handover_at) for one in here]
