"""Endpoints: answers in order, never too much at once, and every kind of failure ends in an answer or in one clear error."""

import asyncio
import itertools
import logging
import socket
import time
from email.utils import formatdate

import pytest

from scripted import Reply, scripted
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.pool import _retry_after
from trimtab.endpoints.settings import Limits, base_url, make_limits
from trimtab.errors import EndpointError, InvalidOption

QUICK = Limits(concurrency=4, request_timeout=5, max_retries=4, backoff=0.02)


def echo(asked, number):
    """The body's `x`."""
    return Reply({"x": asked.body["x"]})


def doubled(url_or_urls, limits=QUICK, inputs=range(12)):
    """Each input, sent to and read from the endpoints."""
    urls = [url_or_urls] if isinstance(url_or_urls, str) else url_or_urls
    with Endpoints(urls, limits) as endpoints:
        groups = endpoints.map(inputs, lambda x: ("/v1/do", {"x": x}), lambda x, answer: (x, answer["x"]))
        return list(itertools.chain.from_iterable(groups))


@pytest.fixture
def dead():
    """A URL that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return f"http://127.0.0.1:{port}"


# ---- sharing out


def test_outputs_keep_the_order_of_inputs_and_no_endpoint_has_more_in_flight_than_it_may():
    """Answers take the longer the earlier they were asked for, so that they come in another order."""

    def respond(asked, number):
        return Reply({"x": asked.body["x"]}, delay=0.04 * (3 - asked.body["x"] % 4))

    with scripted(respond) as one, scripted(respond) as other:
        assert doubled([one.url, f"{other.url}/v1/"], inputs=range(40)) == [(x, x) for x in range(40)]
        assert one.most_in_flight == other.most_in_flight == 4
        assert len(one.asked) + len(other.asked) == 40
        assert {asked.path for asked in other.asked} == {"/v1/do"}


def test_the_least_busy_endpoint_is_asked_first():
    """Where one takes half a second and the other none, the slow one is left with what it has."""
    with scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.5)) as slow, scripted(echo) as fast:
        assert doubled([slow.url, fast.url], inputs=range(30)) == [(x, x) for x in range(30)]
        assert len(slow.asked) == 4
        assert len(fast.asked) == 26
    with scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.3)) as one, scripted(one._respond) as other:
        doubled([one.url, other.url], inputs=range(4))
        assert len(one.asked) == len(other.asked) == 2


def test_inputs_are_taken_as_they_are_needed():
    """While the first answer is awaited, no more than four times what may be in flight is taken from a source without end."""
    taken = itertools.count()
    with (
        scripted(lambda asked, number: Reply({"x": 0}, delay=0.2 if asked.body["x"] == 0 else 0)) as server,
        Endpoints([server.url], QUICK) as endpoints,
    ):
        groups = endpoints.map(taken, lambda x: ("/v1/do", {"x": x}), lambda x, answer: x)
        first = next(groups)
        assert first == list(range(len(first)))
        assert next(taken) == 16
        groups.close()


def test_what_is_left_when_the_caller_stops_is_not_asked():
    with scripted(lambda asked, number: Reply({"x": 0}, delay=0.05)) as server:
        with Endpoints([server.url], QUICK) as endpoints:
            next(endpoints.map(itertools.count(), lambda x: ("/v1/do", {"x": x}), lambda x, answer: x))
        count = len(server.asked)
        time.sleep(0.2)
        assert len(server.asked) == count < 16


def test_it_works_inside_an_event_loop():
    async def notebook(url):
        return doubled(url)

    with scripted(echo) as server:
        assert asyncio.run(notebook(server.url)) == doubled(server.url)


# ---- failures


@pytest.mark.parametrize(
    "trouble",
    [
        Reply({"error": {"message": "busy"}}, status=429),
        Reply({"error": {"message": "broken"}}, status=500),
        Reply(text="<html>", status=502),
        Reply(text="", status=408),
        Reply(text="not JSON"),
        Reply({"y": 1}),
        Reply([1]),
        Reply(drop=True),
        Reply({"x": 0}, delay=1.2),
    ],
    ids=["429", "500", "502", "408", "text", "lacks", "list", "drop", "timeout"],
)
def test_a_request_that_fails_is_sent_again(trouble):
    """Every fifth fails: each input is answered once and in order, and was asked as often as it failed and once more."""
    failed = set()

    def respond(asked, number):
        x = asked.body["x"]
        if x % 5 == 2 and x not in failed:
            failed.add(x)
            return trouble
        return Reply({"x": x})

    with scripted(respond) as server:
        limits = Limits(concurrency=4, request_timeout=0.5, max_retries=4, backoff=0.02)
        assert doubled(server.url, limits) == [(x, x) for x in range(12)]
        assert sorted(body["x"] for body in server.posts()) == sorted([*range(12), 2, 7])


@pytest.mark.parametrize("said", ["1", "date"])
def test_an_endpoint_rests_as_long_as_it_asks_for(said):
    """A date has whole seconds: two from now are more than one."""

    def respond(asked, number):
        if number == 0:
            wait = said if said == "1" else formatdate(time.time() + 2, usegmt=True)
            return Reply({}, status=429, headers={"retry-after": wait})
        return Reply({"x": asked.body["x"]})

    with scripted(respond) as server:
        limits = Limits(concurrency=1, max_retries=2, backoff=0.001)
        assert doubled(server.url, limits, range(3)) == [(x, x) for x in range(3)]
        first, second = server.asked[:2]
        assert second.time - first.time >= 0.99


def test_a_wait_that_is_no_wait_is_passed_over():
    assert _retry_after("soon") is None
    assert _retry_after("-3") is None
    assert _retry_after("nan") is None
    assert _retry_after(formatdate(0, usegmt=True)) == 0
    assert _retry_after(None) is None


def test_others_take_over_from_an_endpoint_that_is_down(dead, caplog):
    """It is tried in between, ever more rarely, and no input fails for it, though no retry is allowed."""
    limits = Limits(concurrency=2, max_retries=0, backoff=0.02)
    with scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.01)) as server:
        assert doubled([dead, server.url], limits, range(60)) == [(x, x) for x in range(60)]
        assert len(server.asked) == 60
        assert server.most_in_flight == 2
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert 2 <= len(warned) <= 8
    assert all(message.startswith(f"{dead} cannot be reached") for message in warned)


def test_others_take_over_from_an_endpoint_that_fails_every_request():
    """A request goes to the endpoint that has not failed it, and waits for that: it needs one retry at the most."""
    with (
        scripted(lambda asked, number: Reply({"error": {"message": "dead engine"}}, status=500)) as broken,
        scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.1)) as sound,
    ):
        limits = Limits(concurrency=1, max_retries=1, backoff=0.01)
        assert doubled([broken.url, sound.url], limits, range(8)) == [(x, x) for x in range(8)]
        asked = [body["x"] for body in broken.posts()]
        assert asked
        assert len(set(asked)) == len(asked)


def test_an_endpoint_that_comes_back_is_used_again(dead):
    """Down for the first half second; then it takes its share."""
    port = int(dead.rpartition(":")[2])
    limits = Limits(concurrency=2, max_retries=6, backoff=0.05)
    with (
        scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.05)) as steady,
        Endpoints([dead, steady.url], limits) as endpoints,
    ):
        groups = endpoints.map(range(60), lambda x: ("/v1/do", {"x": x}), lambda x, answer: answer["x"])
        outputs = next(groups)
        with scripted(lambda asked, number: Reply({"x": asked.body["x"]}, delay=0.05), port=port) as late:
            outputs += itertools.chain.from_iterable(groups)
            assert len(late.asked) > 5
    assert outputs == list(range(60))


def test_when_no_endpoint_is_left_one_error_names_them(dead):
    limits = Limits(concurrency=4, max_retries=3, backoff=0.02)
    with scripted(lambda asked, number: Reply(drop=True)) as dropping:
        started = time.monotonic()
        with pytest.raises(EndpointError) as caught:
            doubled([dead, dropping.url], limits)
        assert time.monotonic() - started < 5
        assert str(caught.value).startswith((f"no endpoint is left: {dead} cannot be reached", f"{dropping.url} lost the conn"))
        with pytest.raises(EndpointError, match=r"^no endpoint is left: http://127\S+ cannot be reached: "):
            doubled(dead, limits)


def test_outputs_before_the_one_that_fails_for_good_are_had():
    """Number 6 fails each time, and says why; what comes before it is not lost."""

    def respond(asked, number):
        return Reply({"error": {"message": "poison"}}, status=500) if asked.body["x"] == 6 else Reply({"x": 0})

    with scripted(respond) as server, Endpoints([server.url], QUICK) as endpoints:
        outputs = []
        groups = endpoints.map(range(12), lambda x: ("/v1/do", {"x": x}), lambda x, answer: x)
        with pytest.raises(EndpointError, match=r"answered 500: poison \(a request to /v1/do failed 5 times\)"):
            outputs.extend(itertools.chain.from_iterable(groups))
        assert outputs == list(range(6))
        assert [body["x"] for body in server.posts()].count(6) == 5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "no model 'm'", "type": "x"}}, "no model 'm'"),
        ({"object": "error", "message": "no model 'm'"}, "no model 'm'"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"error": "no model 'm'"}, "no model 'm'"),
        ([3], r"\[3\]"),
    ],
)
@pytest.mark.parametrize("status", [400, 404, 301])
def test_a_refusal_is_shown_in_the_servers_words_and_not_repeated(status, body, said):
    with scripted(lambda asked, number: Reply(body, status=status)) as server:
        with pytest.raises(EndpointError, match=rf"^{server.url}/v1/do answered {status}: .*{said}") as caught:
            doubled(server.url, inputs=[1])
        assert caught.value.status == status
        assert len(server.asked) == 1


# ---- who is asked


def test_the_key_is_sent_where_there_is_one(monkeypatch, caplog):
    with scripted(echo) as server, caplog.at_level(logging.DEBUG, "trimtab"):
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        doubled(server.url, inputs=[1])
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        doubled(server.url, inputs=[2])
        assert [asked.headers.get("authorization") for asked in server.asked] == [None, "Bearer sk-secret"]
    assert "sk-secret" not in caplog.text


def test_a_password_in_a_url_is_not_shown(dead):
    with pytest.raises(EndpointError) as caught:
        doubled(dead.replace("http://", "http://me:secret@"), Limits(max_retries=0, backoff=0.01))
    assert "secret" not in str(caught.value)
    assert dead in str(caught.value)


def test_models_are_listed_and_picked():
    listed = [{"id": "first"}, {"id": "second", "root": "org/second"}]
    with scripted(echo, models=listed) as server, Endpoints([server.url], QUICK) as endpoints:
        assert endpoints.models() == listed
        assert endpoints.pick_model()["id"] == "first"
        assert endpoints.pick_model("org/second")["id"] == "second"
        assert endpoints.pick_model("second")["id"] == "second"
        assert endpoints.pick_model("third")["id"] == "first"
        assert endpoints.post("/v1/do", {"x": 4}, lambda answer: answer["x"]) == 4
    with (
        scripted(echo, models=[]) as empty,
        Endpoints([empty.url], QUICK) as endpoints,
        pytest.raises(EndpointError, match="lists no model"),
    ):
        endpoints.pick_model()


@pytest.mark.parametrize("url", ["http://a:8000", "http://a:8000/", "http://a:8000/v1", "http://a:8000/v1/"])
def test_a_url_may_end_in_v1_or_not(url):
    assert base_url(url) == "http://a:8000"
    assert base_url("https://a/gate/v1") == "https://a/gate"


@pytest.mark.parametrize("url", ["", "a:8000", "localhost", "ftp://a", "http://", "http://a:port", "http://[a", "http://a?b=1"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidOption, match="is no endpoint: give a URL such as"):
        base_url(url)


def test_limits_go_with_endpoints_and_the_rest_without():
    nothing = {"concurrency": None, "max_retries": None}
    assert make_limits("endpoint", ["http://a"], {"dtype": None}, {"concurrency": 3, "max_retries": None}) == Limits(3)
    assert make_limits("endpoint", [], {"dtype": "float32"}, nothing) == Limits()
    with pytest.raises(InvalidOption, match="--dtype is for a model that runs here, not for --endpoint"):
        make_limits("endpoint", ["http://a"], {"dtype": "float32"}, nothing)
    with pytest.raises(InvalidOption, match="--max_retries needs --endpoint"):
        make_limits("endpoint", [], {}, {"concurrency": None, "max_retries": 0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"request_timeout": 0.0}, "request_timeout must be a number of seconds above 0"),
        ({"request_timeout": float("nan")}, "request_timeout must be"),
        ({"max_retries": -1}, "max_retries must be at least 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InvalidOption, match=message):
        Limits(**settings)
