"""The server as clients see it: OpenAI's own client, raw HTTP, and samples against enumeration."""

import asyncio
import contextlib
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from serving import LETTERS, Server, running, table_service
from statistics_of import fits
from tiny import EOS, tiny_tokenizer
from trimtab.core.rules import parse_rule
from trimtab.models.table import TableLM, enumerate_sequences
from trimtab.serve.wire import Usage

V = len(LETTERS) + 1
JSON = {"content-type": "application/json"}
TABLES = [TableLM.random(V, order=2, seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def server():
    with running(table_service(TABLES)) as running_server:
        yield running_server


def law(aligners: list[int], rule: str = "product", weights: list[float] | None = None, prompt: str = "abc", length: int = 2):
    """Log-probabilities of completions, by enumeration; the end of a sequence counts."""
    parsed = parse_rule(rule)
    ids = tiny_tokenizer(LETTERS)(prompt)["input_ids"]
    return enumerate_sequences(
        lambda prefix: parsed(
            TABLES[0].row(prefix), [TABLES[1 + q].row(prefix) for q in aligners], weights or [1.0] * len(aligners)
        ),
        ids,
        length,
        [EOS],
    )


def tokens_of(choice: dict) -> tuple[int, ...]:
    names = ["<eos>", *LETTERS]
    return tuple(names.index(token) for token in choice["logprobs"]["tokens"])


def drawn(server: Server, rounds: int, **body) -> list[tuple[int, ...]]:
    samples = []
    for seed in range(rounds):
        answer = server.complete(prompt="abc", max_tokens=2, n=100, logprobs=0, seed=seed, **body)
        samples += [tokens_of(choice) for choice in answer["choices"]]
    return samples


# ---- the law, through HTTP


@pytest.mark.parametrize(
    ("body", "of"),
    [
        ({"model": "base"}, ([],)),
        ({"model": "q0"}, ([0],)),
        ({"model": "base:q1", "weight": 0.5}, ([1], "product", [0.5])),
        ({"model": "base", "aligner": "q2", "rule": "geometric", "weight": 0.4}, ([2], "geometric", [0.4])),
        ({"model": "base", "aligner": ["q0", "q2"], "weight": [0.7, 0.3]}, ([0, 2], "product", [0.7, 0.3])),
        ({"model": "q1", "rule": "nucleus"}, ([1], "nucleus")),
        ({"model": "q0", "rule": "mixture", "weight": 0.4}, ([0], "mixture", [0.4])),
        (
            {"model": "base", "aligner": ["q0", "q2"], "rule": "gate(rule=mixture, by=entropy, tau=1.5)", "weight": [0.4, 0.3]},
            ([0, 2], "gate(rule=mixture, by=entropy, tau=1.5)", [0.4, 0.3]),
        ),
    ],
    ids=["base", "aligner", "strength", "geometric", "two", "nucleus", "mixture", "gate"],
)
def test_samples_through_http_follow_the_rule(server, body, of):
    """While requests for other aligners and the bare base are in the same batch."""
    stop = threading.Event()

    def traffic() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            i = 0
            while not stop.is_set():
                client.post(
                    "/v1/completions", json={"model": ["q0", "q1", "base"][i % 3], "prompt": "fed", "max_tokens": 5, "seed": i}
                )
                i += 1

    thread = threading.Thread(target=traffic)
    thread.start()
    try:
        samples = drawn(server, 20, **body)
    finally:
        stop.set()
        thread.join()
    assert fits(samples, law(*of)) > 1e-3
    assert fits(samples, law([0, 1], "product", [0.2, 1.0])) < 1e-6, "the test cannot tell laws apart"


def test_a_seed_gives_the_same_text_streamed_or_not_and_whatever_else_runs(server, client):
    body = {"model": "q0", "prompt": ["abc", "fade"], "max_tokens": 20, "seed": 5, "n": 2, "ignore_eos": True}
    alone = [choice["text"] for choice in server.complete(**body)["choices"]]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(server.complete, model=f"q{i % 3}", prompt="dead", max_tokens=30, seed=i) for i in range(24)]
        again = [choice["text"] for choice in server.complete(**body)["choices"]]
        for other in others:
            other.result()
    streamed = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(
        **{k: v for k, v in body.items() if k != "ignore_eos"}, stream=True, extra_body={"ignore_eos": True}
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert alone == again == list(streamed.values())
    assert alone[0] != alone[1]


# ---- methods


@pytest.mark.parametrize(
    "path", ["/health", "/metrics", "/v1/models", "/v1/models/q1", "/v1/models/none", "/docs", "/openapi.json"]
)
def test_head_is_get_without_the_body(server, path):
    got, asked = server.client.get(path), server.client.head(path)
    assert (asked.status_code, asked.content) == (got.status_code, b"")
    for name in set(got.headers) - {"date", "x-request-id", "content-length" if path == "/metrics" else ""}:
        assert asked.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models", "GET, HEAD"),
        ("PUT", "/v1/models/q1", "GET, HEAD"),
        ("GET", "/v1/completions", "POST"),
        ("HEAD", "/v1/chat/completions", "POST"),
        ("OPTIONS", "/v1/completions", "POST"),
        ("POST", "/docs", "GET, HEAD"),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(server, method, path, allowed):
    answer = server.client.request(method, path)
    assert (answer.status_code, answer.headers.get_list("allow")) == (405, [allowed])
    if method != "HEAD":
        assert answer.json()["error"] == {
            "message": f"{method} {path}: method not allowed",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }


# ---- OpenAI's client


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def test_models_can_be_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == ["base", "q0", "q1", "q2"]
    assert client.models.retrieve("q1").id == "q1"
    with pytest.raises(openai.NotFoundError, match="there is no model 'q9'"):
        client.models.retrieve("q9")


def test_completions_have_openais_shape(client):
    answer = client.completions.create(
        model="q0", prompt=["abc", "de"], max_tokens=7, seed=1, n=2, logprobs=3, extra_body={"ignore_eos": True}
    )
    assert answer.object == "text_completion"
    assert answer.model == "q0"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 28
    for choice in answer.choices:
        assert choice.finish_reason == "length"
        assert "".join(choice.logprobs.tokens).replace("<eos>", "") == choice.text
        for token, value, best in zip(
            choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
        ):
            assert best[token] == value
            assert len(best) in (3, 4)


def test_log_probabilities_are_the_aligned_rows(server):
    choice = server.complete(model="q1", prompt="abc", max_tokens=6, seed=3, logprobs=7, ignore_eos=True, temperature=0.5)[
        "choices"
    ][0]
    ids = tiny_tokenizer(LETTERS)("abc")["input_ids"]
    for i, token in enumerate(tokens_of(choice)):
        prefix = [*ids, *tokens_of(choice)[:i]]
        row = parse_rule("product")(TABLES[0].row(prefix), [TABLES[2].row(prefix)], [1.0])
        assert choice["logprobs"]["token_logprobs"][i] == pytest.approx(float(row[token]), abs=1e-9)
        best = choice["logprobs"]["top_logprobs"][i]
        assert sorted(best.values()) == pytest.approx(sorted(row.tolist()), abs=1e-9)


def test_echo_scores_the_prompt(server):
    answer = server.complete(model="q0", prompt=["abcd", "e"], max_tokens=0, echo=True, logprobs=2)
    first, second = answer["choices"]
    assert (first["text"], second["text"]) == ("abcd", "e")
    assert answer["usage"] == Usage(5, 0).as_dict()
    assert second["logprobs"]["token_logprobs"] == [None]
    scores = first["logprobs"]
    assert scores["tokens"] == list("abcd")
    assert scores["text_offset"] == [0, 1, 2, 3]
    ids = tiny_tokenizer(LETTERS)("abcd")["input_ids"]
    for i in range(1, 4):
        row = parse_rule("product")(TABLES[0].row(ids[:i]), [TABLES[1].row(ids[:i])], [1.0])
        assert scores["token_logprobs"][i] == pytest.approx(float(row[ids[i]]), abs=1e-9)
        assert max(scores["top_logprobs"][i].values()) == pytest.approx(float(row.max()), abs=1e-9)
    longer = server.complete(model="q0", prompt="abcd", max_tokens=3, echo=True, logprobs=2, seed=1, ignore_eos=True)[
        "choices"
    ][0]
    assert longer["logprobs"]["token_logprobs"][:4] == scores["token_logprobs"]
    assert longer["logprobs"]["tokens"][:4] == list("abcd")
    assert len(longer["logprobs"]["tokens"]) == 7
    assert longer["text"].startswith("abcd")


def test_a_later_turn_says_how_much_of_it_was_read_before(server):
    queried, hit = (f"trimtab:prefix_cache_{name}_total" for name in ("queries", "hits"))
    body = {"model": "q1", "max_tokens": 6, "seed": 4, "ignore_eos": True, "logprobs": 0}
    prompt = "abcdeabcdeabcdeabcde"
    first = server.complete(prompt=prompt, **body)
    before = [server.metric(name, model_name="q1") for name in (queried, hit)]
    prompt += "".join(first["choices"][0]["logprobs"]["tokens"]).replace("<eos>", "") + "ab"
    later = server.complete(prompt=prompt, **body)
    cached = later["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert first["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
    assert 20 <= cached < len(prompt)
    assert [server.metric(name, model_name="q1") for name in (queried, hit)] == [before[0] + len(prompt), before[1] + cached]
    other = server.complete(**(body | {"model": "q0"}), prompt=prompt)
    assert other["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_completions_of_a_prompt_that_come_one_after_another_count_it_once():
    with running(table_service(TABLES, engine={"max_num_seqs": 1})) as server:
        body = {"model": "q1", "max_tokens": 3, "seed": 1, "ignore_eos": True, "n": 3}
        answer = server.complete(prompt="abcde" * 6, **body)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert server.metric("trimtab:prefix_cache_hits_total", model_name="q1") == 0


def test_streams_end_with_usage_and_done(server):
    body = {"model": "q0", "prompt": "abc", "max_tokens": 12, "seed": 2, "stream": True, "ignore_eos": True}
    lines = server.post("/v1/completions", **body, stream_options={"include_usage": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == Usage(3, 12).as_dict()
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    whole = server.complete(**{k: v for k, v in body.items() if k != "stream"})["choices"][0]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]


def test_stop_bias_and_greedy_do_what_clients_mean(server):
    free = server.complete(model="q0", prompt="abc", max_tokens=30, seed=8, ignore_eos=True)["choices"][0]["text"]
    stop = free[5:7]
    cut = server.complete(model="q0", prompt="abc", max_tokens=30, seed=8, ignore_eos=True, stop=[stop])["choices"][0]
    assert cut["text"] == free[: free.index(stop)]
    assert cut["finish_reason"] == "stop"
    only = server.complete(model="q0", prompt="abc", max_tokens=5, logit_bias={"3": 100}, ignore_eos=True)["choices"][0]
    assert only["text"] == "ccccc"
    greedy = [
        server.complete(model="q0", prompt="abc", max_tokens=9, temperature=0, seed=s)["choices"][0]["text"] for s in (1, 2)
    ]
    assert greedy[0] == greedy[1]


# ---- what is wrong


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"model": "q9", "prompt": "a"}, 404, "model", "there is no model 'q9'"),
        ({"model": "base", "aligner": ["q0", "q9"], "prompt": "a"}, 404, "aligner", "q9"),
        ({"model": "q0", "aligner": "q1", "prompt": "a"}, 400, "aligner", "different aligners"),
        ({"model": "q0", "prompt": "a", "colour": 1}, 400, "colour", "unknown field 'colour'"),
        ({"model": "q0", "prompt": "a", "temperature": -1}, 400, "temperature", "temperature"),
        ({"model": "q0", "prompt": "a", "rule": "magic"}, 400, "rule", "there is no rule 'magic'"),
        ({"model": "q0", "prompt": "a", "rule": "gate(rule=candidates)"}, 400, "rule", "has no row in closed form"),
        ({"model": "q0", "prompt": "a", "rule": "mixture", "weight": 1.5}, 400, "weight", "and must be at most 1"),
        ({"model": "q0", "prompt": "a", "rule": "gate(rule=mixture)", "weight": -1}, 400, "weight", "must be at least 0"),
        ({"model": "q0", "prompt": "a", "weight": [1.0, 2.0]}, 400, "weight", "2 numbers, but there are 1 aligners"),
        ({"model": "q0", "prompt": ""}, 400, "prompt", "prompt is empty"),
        ({"model": "q0", "prompt": ["a", ""]}, 400, "prompt", r"prompt[1] is empty"),
        ({"model": "q0", "prompt": [99]}, 400, "prompt", "ids from 0 to 6"),
        ({"model": "q0", "prompt": "a", "logit_bias": {"99": 1}}, 400, "logit_bias", "there is no token 99"),
        ({"model": "q0", "prompt": "a", "n": 128, "max_tokens": 1, "stream": 1}, 400, "stream", "stream"),
        ({"model": "q0", "prompt": "a", "rule": "candidates(n=4)", "top_p": 0.5}, 400, "top_p", "acts on the aligned row"),
        ({"model": "q0", "prompt": "ab", "rule": "candidates(n=4)", "echo": True, "max_tokens": 0}, 200, None, ""),
        (
            {"model": "q0", "prompt": "ab", "logit_bias": {str(i): -1e6 for i in range(7)}, "top_k": 1, "min_p": 1},
            200,
            None,
            "",
        ),
    ],
)
def test_what_is_wrong_is_named(server, body, status, param, says):
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert error["param"] == param
        assert says in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
    assert server.idle()


def test_bodies_and_paths_that_make_no_sense_get_openais_error(server):
    for answer, status in (
        (server.client.post("/v1/completions", content=b"{", headers=JSON), 400),
        (server.client.post("/v1/completions", content=b"[]", headers=JSON), 400),
        (server.client.post("/v1/completions", content=b"\xff\xfe", headers=JSON), 400),
        (server.client.get("/v1/completions"), 405),
        (server.client.post("/v1/nothing"), 404),
        (server.client.post("/v1/load_aligner", json={"name": "x", "path": "y"}), 404),
        (server.client.get("/v1/models/a%2f..%2fb"), 404),
    ):
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["message"]


def test_a_chat_without_a_template_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        client.chat.completions.create(model="q0", messages=[{"role": "user", "content": "abc"}])


# ---- operations


def test_health_and_metrics(server):
    assert server.client.get("/health").json() == {"status": "ready"}
    before = (
        server.metric("trimtab:generation_tokens_total", model_name="q2") if "q2" in server.client.get("/metrics").text else 0
    )
    server.complete(model="q2", prompt="abc", max_tokens=9, ignore_eos=True, seed=0, n=2)
    assert server.metric("trimtab:generation_tokens_total", model_name="q2") == before + 18
    assert server.metric("trimtab:request_success_total", finished_reason="length", model_name="q2") >= 2
    assert server.metric("trimtab:num_requests_running") == 0
    assert server.metric("trimtab:aligners_loaded") == 3
    assert server.metric("trimtab:tokens_per_proposal_call", model_name="q2") >= 1
    assert -20 < server.metric("trimtab:log_z", model_name="q2") < 0
    names = {line.split("{")[0] for line in server.client.get("/metrics").text.splitlines() if line.startswith("trimtab:")}
    assert {"trimtab:time_to_first_token_seconds_bucket", "trimtab:e2e_request_latency_seconds_count"} <= names


class Slow(TableLM):
    """Takes its time."""

    def extend(self, state, tokens, counts):
        time.sleep(0.01)
        return super().extend(state, tokens, counts)


@pytest.fixture
def slow():
    tables = [Slow(table.table) for table in TABLES[:2]]
    settings = {"max_waiting": 2, "request_timeout": 1.0}
    with running(table_service(tables, engine={"max_num_seqs": 2}, **settings)) as running_server:
        yield running_server


def test_a_full_queue_is_429_and_says_when_to_come_back(slow):
    body = {"model": "q0", "prompt": "a", "max_tokens": 6, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(slow.post, "/v1/completions", **body) for _ in range(8)]
        found = [answer.result() for answer in answers]
    refused = [answer for answer in found if answer.status_code == 429]
    assert sorted({answer.status_code for answer in found}) == [200, 429]
    assert 1 <= len(refused) <= 4
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert slow.post("/v1/completions", **body, n=5).status_code == 400, "what can never fit is no matter of waiting"
    assert slow.idle()


@pytest.mark.parametrize("echo", [False, True])
def test_streams_that_find_no_room_are_429_too_however_many_come_at_once(slow, echo):
    body = {"model": "q0", "prompt": "a", "max_tokens": 6, "ignore_eos": True, "stream": True, "echo": echo}

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=slow.url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(20)))

    found = asyncio.run(ask_all())
    assert {answer.status_code for answer in found} == {200, 429}
    assert all('"error"' not in answer.text for answer in found if answer.status_code == 200)
    assert slow.idle()


def test_a_request_that_takes_too_long_is_ended(slow):
    answer = slow.post("/v1/completions", model="q0", prompt="a", max_tokens=10_000, ignore_eos=True)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "timeout"
    lines = slow.post("/v1/completions", model="q0", prompt="a", max_tokens=10_000, ignore_eos=True, stream=True).text
    assert '"code":"timeout"' in lines
    assert lines.endswith("data: [DONE]\n\n")
    assert slow.idle()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slots(slow, stream):
    body = {"model": "q0", "prompt": "a", "max_tokens": 10_000, "ignore_eos": True, "stream": stream, "n": 2}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            request = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while slow.service.worker.outstanding < 2:
                await asyncio.sleep(0.01)
            request.cancel()

    asyncio.run(leave())
    assert slow.idle(0.8), "before the time limit would have ended it"


def test_a_client_that_goes_away_while_its_prompt_is_scored_frees_the_engine(slow):
    body = {"model": "q0", "prompt": ["abc" * 200] * 4, "max_tokens": 0, "echo": True, "logprobs": 1}

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=slow.url) as client:
            request = asyncio.ensure_future(client.post("/v1/completions", json=body))
            while slow.service.worker.outstanding < 1:
                await asyncio.sleep(0.005)
            request.cancel()

    asyncio.run(leave())
    assert slow.idle(2.0)
    assert slow.complete(model="q0", prompt="ab", max_tokens=2)


def test_streams_begin_before_they_end(slow):
    with slow.client.stream(
        "POST", "/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 40, "ignore_eos": True, "stream": True}
    ) as answer:
        arrivals = [time.monotonic() for line in answer.iter_lines() if line.startswith("data:")]
    assert arrivals[-1] - arrivals[0] > 0.3


def test_a_step_that_fails_is_told_to_those_at_work_and_the_next_request_works():
    class Fragile(TableLM):
        broken = False

        def extend(self, state, tokens, counts):
            if Fragile.broken:
                Fragile.broken = False
                raise RuntimeError("out of memory")
            return super().extend(state, tokens, counts)

    with running(table_service([Fragile(TABLES[0].table)])) as server:
        Fragile.broken = True
        answer = server.post("/v1/completions", model="base", prompt="ab", max_tokens=3)
        assert answer.status_code == 500
        assert "out of memory" not in answer.text
        assert answer.json()["error"]["code"] == "engine_failed"
        assert server.complete(model="base", prompt="ab", max_tokens=3)["usage"]["completion_tokens"] >= 1
        assert server.client.get("/health").status_code == 200
        Fragile.broken = True
        lines = server.post("/v1/completions", model="base", prompt="ab", max_tokens=3, stream=True).text
        assert '"code":"engine_failed"' in lines
        assert lines.endswith("data: [DONE]\n\n")
        assert server.metric("trimtab:request_failure_total", model_name="base", reason="engine_failed") == 2


def test_a_newcomer_for_whom_there_is_no_memory_is_told_and_the_others_go_on():
    class Full(TableLM):
        def extend(self, state, tokens, counts):
            time.sleep(0.02)
            return super().extend(state, tokens, counts)

        def prefill(self, state, tokens, counts):
            if tokens.shape[1] > 5:
                raise RuntimeError("out of memory")
            return super().prefill(state, tokens, counts)

    with running(table_service([Full(TABLES[0].table)])) as server, ThreadPoolExecutor(1) as pool:
        asked = {"model": "base", "prompt": "ab", "max_tokens": 60, "ignore_eos": True, "seed": 1}
        alone = server.complete(**asked)
        working = pool.submit(server.complete, **asked)
        time.sleep(0.3)
        answer = server.post("/v1/completions", model="base", prompt="abcabcabca", max_tokens=3)
        assert not working.done()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_failed")
        assert "out of memory" not in answer.text
        assert working.result()["choices"] == alone["choices"]
        assert server.complete(model="base", prompt="ab", max_tokens=3)["usage"]["completion_tokens"] >= 1


def test_an_engine_that_fails_for_good_is_seen_in_health():
    class Dead(TableLM):
        def extend(self, state, tokens, counts):
            raise RuntimeError("the device is gone")

    with running(table_service([Dead(TABLES[0].table)])) as server:
        statuses = [server.post("/v1/completions", model="base", prompt="a").status_code for _ in range(4)]
        assert statuses == [500, 500, 500, 503]
        assert server.client.get("/health").json() == {"status": "failed"}


def test_an_engine_that_cannot_even_let_go_is_given_up_and_nobody_waits_for_ever():
    class Stuck(TableLM):
        def copy(self, source, slots, target, to):
            if source is target:
                raise RuntimeError("out of memory")
            super().copy(source, slots, target, to)

    with running(table_service([Stuck(TABLES[0].table)])) as server:
        body = {"model": "base", "prompt": "a", "ignore_eos": True}
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(server.post, "/v1/completions", **body, max_tokens=3 + 2 * i) for i in range(6)]
            statuses = {answer.result(timeout=30).status_code for answer in answers}
        assert statuses <= {200, 500, 503}
        assert 500 in statuses


def test_scrapes_do_not_disturb_the_engine_nor_the_engine_them(server):
    stop = threading.Event()

    def traffic(seed: int) -> int:
        count = 0
        while not stop.is_set():
            server.complete(model=f"q{seed % 3}", prompt="abc" * (1 + count % 9), max_tokens=2, seed=seed)
            count += 1
        return count

    with ThreadPoolExecutor(6) as pool:
        running_traffic = [pool.submit(traffic, seed) for seed in range(6)]
        statuses = {server.client.get("/metrics").status_code for _ in range(150)}
        stop.set()
        assert all(work.result() for work in running_traffic)
    assert statuses == {200}


def test_nan_is_the_requests_error_and_not_the_servers():
    with running(table_service([TABLES[0], TableLM(TABLES[1].table * torch.nan)])) as server:
        answer = server.post("/v1/completions", model="q0", prompt="ab")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "dead_row"
        assert "aligner 0 gives NaN" in answer.json()["error"]["message"]
        assert server.complete(model="base", prompt="ab")["choices"]


class DiesAfter(TableLM):
    """NaN after one token."""

    def __init__(self, table, token):
        super().__init__(table)
        self._token = token

    def row(self, prefix):
        return super().row(prefix) * (torch.nan if len(prefix) and prefix[-1] == self._token else 1.0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wants", [{}, {"logprobs": 2}], ids=["", "logprobs"])
def test_a_completion_that_cannot_go_on_ends_its_own_choice_alone(stream, wants):
    """Prompts "aba" and "abb", of which only the second ends in the sick token; 'a' is all that is drawn else."""
    a, b = tiny_tokenizer(LETTERS).convert_tokens_to_ids(["a", "b"])
    service = table_service([DiesAfter(TABLES[0].table, b)])
    with running(service) as server:
        body = {"model": "base", "max_tokens": 3, "logit_bias": {str(a): 1000}, "stream": stream} | wants
        answer = server.post("/v1/completions", prompt=["aba", "abb"], **body)
        assert answer.status_code == 200
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        choices = [c for chunk in chunks for c in chunk["choices"]] if stream else answer.json()["choices"]
        ends = {c["index"]: c for c in choices if c["finish_reason"]}
        assert {i: c["finish_reason"] for i, c in ends.items()} == {0: "length", 1: "error"}
        assert "".join(c["text"] for c in choices if c["index"] == 0) == "aaa"
        assert "".join(c["text"] for c in choices if c["index"] == 1) == ""
        assert ends[1]["error"]["code"] == "dead_row"
        assert "the proposal gives NaN" in ends[1]["error"]["message"]
        assert "error" not in ends[0]
        assert not any("error" in chunk for chunk in chunks)
        if not stream:
            assert answer.json()["usage"]["completion_tokens"] == 3
        alone = server.post("/v1/completions", prompt="abb", n=2, **body)
        if stream:
            assert alone.status_code == 200
            *_, last, done = [line for line in alone.text.splitlines() if line]
            assert json.loads(last[6:])["error"]["code"] == "dead_row"
            assert done == "data: [DONE]"
        else:
            assert (alone.status_code, alone.json()["error"]["code"]) == (400, "dead_row")
        assert server.complete(prompt="aba", **body | {"stream": False})["choices"][0]["text"] == "aaa"
        assert server.metric("trimtab:request_failure_total", model_name="base", reason="dead_row") == 1


def test_loading_is_seen_in_health_and_requests_are_told_to_wait():
    service = table_service(TABLES[:1])
    gate, load = threading.Event(), service._load

    def wait_and_load():
        gate.wait(20)
        return load()

    service._load = wait_and_load
    with running(service, wait=False) as server:
        assert server.client.get("/health").json() == {"status": "loading"}
        answer = server.post("/v1/completions", model="base", prompt="a")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        gate.set()
        while server.client.get("/health").status_code != 200:
            time.sleep(0.01)
        assert server.complete(model="base", prompt="a")


def test_keys_guard_the_api_and_nothing_else():
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running(table_service(TABLES[:2], api_keys=("secret", "other"))))
        assert server.complete(model="q0", prompt="a")
        plain = stack.enter_context(httpx.Client(base_url=server.url))
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Bearer secret2"},
        ):
            answer = plain.post("/v1/completions", json={"model": "q0", "prompt": "a"}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert plain.get("/v1/models", headers=headers).status_code == 401
        assert plain.get("/v1/models", headers={"authorization": "Bearer other"}).status_code == 200
        assert plain.get("/health").status_code == plain.get("/metrics").status_code == 200


def test_limits_of_body_prompt_and_output():
    limits = {"max_body_bytes": 300, "max_prompt_tokens": 5, "max_tokens": 10}
    with running(table_service(TABLES[:2], **limits)) as server:
        assert server.post("/v1/completions", model="q0", prompt="a" * 400).status_code == 413
        answer = server.post("/v1/completions", model="q0", prompt="abcdef")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
        answer = server.post("/v1/completions", model="q0", prompt="abc", max_tokens=11)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "max_tokens")
        assert server.complete(model="q0", prompt="abcde", max_tokens=10)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echoed_prompt_that_cannot_be_scored_ends_its_own_choice(stream):
    """The proposal says b after a, and d after c; the aligner never does the latter: that row has no token."""
    letters = "abcd"
    proposal, aligner = (torch.zeros(5, 5, dtype=torch.float64) for _ in range(2))
    proposal[3] = aligner[3] = -math.inf
    proposal[3, 4], aligner[3, 1] = 0.0, 0.0
    service = table_service([TableLM(proposal), TableLM(aligner)], tokenizer=tiny_tokenizer(letters))
    asked = {"model": "q0", "prompt": ["ab", "acd"], "echo": True, "logprobs": 1, "max_tokens": 2, "seed": 0}
    with running(service) as server:
        if not stream:
            choices = server.post("/v1/completions", **asked).json()["choices"]
        else:
            lines = server.post("/v1/completions", stream=True, **asked).text.splitlines()
            chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
            choices = [next(c for c in chunks if c["index"] == i and c["finish_reason"]) for i in range(2)]
            choices[0]["text"] = "".join(c["text"] for c in chunks if c["index"] == 0)
        assert choices[0]["finish_reason"] in ("stop", "length")
        assert choices[0]["text"].startswith("ab")
        assert choices[1]["finish_reason"] == "error"
        assert "leaves no possible token after 1 tokens: " in choices[1]["error"]["message"]
        alone = server.post("/v1/completions", **asked | {"prompt": "acd"})
        assert (alone.status_code, alone.json()["error"]["code"]) == (400, "dead_row")
