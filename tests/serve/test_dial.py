"""The playground's dial: each side says what the API says to the same weights, blended and mixed.

First its handlers, in the event loop of a service; then the page, in a real browser.
"""

import contextlib

import gradio as gr
import httpx
import pytest
from playwright.sync_api import expect

from playing import (
    DESKTOP,
    LETTERS,
    PHONE,
    TOKENS,
    Server,
    Table,
    ask,
    check_picture,
    text_of,
    visit,
    wait_for,
)
from tiny import CHAT_TEMPLATE, save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.serve.app import make_app
from trimtab.serve.playground.dial import TWO_NEEDED, Asked, Dial
from trimtab.serve.playground.tab import OWN

pytestmark = pytest.mark.filterwarnings(  # Gradio 6.31 with pandas 3
    "ignore:'future.no_silent_downcasting' is deprecated", "ignore:The copy keyword is deprecated"
)
ALIGNERS = ("polite", "rude", "whole")
SIDES = ("#tt-blended", "#tt-mixed")
SESSION = gr.Request(session_hash="a")
PLAIN = Asked("def", "text", 0.7, TOKENS, "polite", "rude", OWN, 3, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A proposal, two LoRA aligners of one base, and a whole model."""
    folder, tokenizer = tmp_path_factory.mktemp("dial"), tiny_tokenizer(LETTERS)
    for seed, name in enumerate(("proposal", "base", "whole")):
        model = tiny_model("llama", len(LETTERS) + 1, seed=seed, spread=0.3, max_position_embeddings=1024)
        save_tiny(folder / name, model, tokenizer)
    for seed, name in enumerate(("polite", "rude")):
        save_lora(folder / name, folder / "base", seed=seed, r=2 + seed, target_modules="all-linear")
        tokenizer.save_pretrained(folder / name)
    return folder


# ---- its handlers


class DialTable(Table):
    """With a dial, and the API."""

    def __init__(self, folder, aligners):
        super().__init__(folder, aligners, Dial)
        self.dial = self.tab

    def shown(self, updates):
        """What the page has in the end: the left side, the right side, the message."""
        final = {}
        for update in updates:
            final |= update
        return [final.get(place, "") for place in (self.dial.left, self.dial.right, self.dial.notice)]

    def answers(self, monkeypatch):
        """The answers that are made from now on."""
        made, prepare = [], self.dial.play

        def play(given, draw, session):
            async def keep():
                made[:] = await given()
                return made

            return prepare(keep, draw, session)

        monkeypatch.setattr(self.dial, "play", play)
        return made

    def run(self, asked):
        return self.runner.run(drain(self.dial.run(SESSION, *asked)))

    def complete(self, **body):
        """What the API says."""
        return self.post("/v1/completions", prompt="def", **body)

    def post(self, route, **body):
        async def post():
            transport = httpx.ASGITransport(make_app(self.service))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(route, json={"model": "base", "temperature": 0.7, **body})

        return self.runner.run(post()).json()


async def drain(updates):
    return [update async for update in updates]


@pytest.fixture(scope="module")
def table(folder):
    with contextlib.closing(DialTable(folder, ALIGNERS)) as table:
        yield table


@pytest.mark.parametrize("rule", [OWN, "geometric"])
@pytest.mark.parametrize("dial", [0.0, 0.3, 1.0])
def test_each_side_says_what_the_api_says(dial, rule, table, monkeypatch):
    """At both ends, where an aligner has weight 0, the sides have one law, and say the same."""
    answers = table.answers(monkeypatch)
    table.run(PLAIN._replace(dial=dial, rule=rule))
    weights = [("polite", 1 - dial), ("rude", dial)][:: -1 if dial == 1 else 1]
    body = {"aligner": dict(weights), "max_tokens": TOKENS, "seed": 3} | ({} if rule == OWN else {"rule": rule})
    strength = {} if rule == OWN else {"rule_weight": 1.0}  # what `product` has anyway
    mixed, blended = answers
    assert blended.text == table.complete(**body, **strength, blend="weights")["choices"][0]["text"]
    assert mixed.text == table.complete(**body)["choices"][0]["text"]
    assert (blended.text == mixed.text) == (dial in (0, 1))
    if dial in (0, 1) and rule == OWN:
        alone = table.complete(model=weights[0][0], max_tokens=TOKENS, seed=3)
        assert alone["choices"][0]["text"] == mixed.text


def test_what_cannot_be_blended_is_said_as_the_api_says_it_and_the_other_side_goes_on(table, monkeypatch):
    answers = table.answers(monkeypatch)
    left, right, notice = table.shown(table.run(PLAIN._replace(other="whole")))
    body = {"aligner": {"polite": 0.7, "whole": 0.3}, "max_tokens": TOKENS, "seed": 3}
    message = table.complete(**body, blend="weights")["error"]["message"]
    assert message.replace("`", "&#96;") in left
    assert 'aria-busy="false"' in left
    assert "cut at the limit" in right
    assert [answer.text for answer in answers] == [table.complete(**body)["choices"][0]["text"]]
    assert notice == ""


def test_a_message_goes_through_the_chat_template(table, monkeypatch):
    monkeypatch.setattr(table.service.registry.base.tokenizer, "chat_template", CHAT_TEMPLATE)
    answers = table.answers(monkeypatch)
    table.run(PLAIN._replace(kind="chat"))
    messages = [{"role": "user", "content": "def"}]
    body = {"aligner": {"polite": 0.7, "rude": 0.3}, "max_tokens": TOKENS, "seed": 3, "messages": messages}
    for answer, how in zip(answers, ({}, {"blend": "weights"}), strict=True):
        assert answer.text == table.post("/v1/chat/completions", **body, **how)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "Write a prompt first."),
        ({"other": "polite"}, "Choose two different aligners."),
        ({"other": None}, TWO_NEEDED),
        ({"dial": None}, "Set the dial to a number from 0 to 1."),
        ({"text": "a" * 2000}, "2000 tokens"),
    ],
)
def test_what_cannot_be_asked_is_one_message(change, message, table):
    left, right, notice = table.shown(table.run(PLAIN._replace(**change)))
    assert message in notice
    assert left == right == ""


@pytest.mark.parametrize("aligners", [(), ("polite",)])
def test_with_fewer_than_two_aligners_it_says_what_to_start_with(folder, aligners):
    with contextlib.closing(DialTable(folder, aligners)) as table:
        left, right, _ = table.shown([table.dial.load()])
        assert "start with --aligner NAME=PATH --aligner NAME=PATH" in left
        assert "start with --aligner NAME=PATH --aligner NAME=PATH" in right


def test_a_dial_that_was_not_moved_asks_nothing_nor_does_one_without_a_prompt(table):
    for place, asked in ((PLAIN.dial, PLAIN), (0.5, PLAIN._replace(text=""))):
        updates = table.runner.run(drain(table.dial.turn(SESSION, place, *asked)))
        assert updates == [{table.dial.place: PLAIN.dial}]


def test_who_turns_the_dial_cancels_what_runs(table):
    """The run before shows nothing any more; the stop button stops the new one."""
    dial, long = table.dial, PLAIN._replace(max_tokens=500)

    async def play():
        old = dial.run(SESSION, *long)
        while not any('"tt-token ' in str(html) for html in (await anext(old)).values()):
            pass
        assert table.service.worker.outstanding == 2
        new = dial.turn(SESSION, 0.3, *long._replace(dial=0.9))
        while "0.9 rude" not in str((await anext(new)).get(dial.left)):
            pass
        assert await drain(old) == []
        while not any('"tt-token ' in str(html) for html in (await anext(new)).values()):
            pass
        assert table.service.worker.outstanding == 2
        await dial._stop(SESSION)
        return await drain(new)

    left, right, _ = table.shown(table.runner.run(play()))
    for side in (left, right):
        assert "<li>stopped</li>" in side
        assert "0.9 rude" in side
    assert table.service.worker.outstanding == 0
    assert not dial._tasks
    assert not dial._newest


# ---- the page


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("votes") / "votes.jsonl", ALIGNERS).start()
    yield server
    server.stop()


@pytest.fixture
def page(browser, server):
    with visit(browser, server) as page:
        ready(page)
        yield page
    server.step_seconds = 0.0


def ready(page):
    page.get_by_role("tab", name="Dial").click()
    expect(page.get_by_role("slider", name="Dial: 0 is all polite, 1 is all rude")).to_be_enabled()


def finished(page, x):
    """Both sides, with this weight of the aligner at 1."""
    for side in SIDES:
        expect(page.locator(f"{side} h3")).to_contain_text(f"{x:g} rude")
        expect(page.locator(f"{side} .tt-facts")).to_contain_text("cut at the limit")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def check_texts(page, server, x):
    body = {"prompt": "def", "seed": 3, "aligner": {"polite": round(1 - x, 6), "rude": x}}
    assert text_of(page, "#tt-blended") == server.complete(**body, blend="weights")
    assert text_of(page, "#tt-mixed") == server.complete(**body)


def requests_of(server):
    return server.service.metrics.requests


def test_letting_go_of_the_dial_asks_again_and_cancels_what_runs(page, server):
    server.step_seconds = 0.1
    ask(page, "def", button="Run", seed=3)
    for side in SIDES:
        expect(page.locator(f"{side} [aria-busy=true] .tt-token").nth(2)).to_be_visible()
    dial = page.get_by_role("slider", name="Dial")
    dial.scroll_into_view_if_needed()
    box, before = dial.bounding_box(), requests_of(server)
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, y, steps=20)
    expect(dial).to_have_value("0.7")
    assert requests_of(server) == before  # none was cancelled, so none is asked anew
    expect(page.locator("#tt-mixed h3")).to_contain_text("0.5 rude")
    page.mouse.up()
    expect(page.locator("#tt-mixed h3")).to_contain_text("0.7 rude")
    wait_for(lambda: requests_of(server) == before + 2)
    assert server.service.worker.outstanding == 2
    server.step_seconds = 0.0
    finished(page, 0.7)
    check_texts(page, server, 0.7)


def test_keys_turn_the_dial(page, server):
    """An arrow key asks again, as a number does that is typed and entered; Tab does not."""
    ask(page, "def", button="Run", seed=3)
    finished(page, 0.5)
    dial = page.get_by_role("slider", name="Dial")
    dial.focus()
    page.keyboard.press("ArrowRight")
    finished(page, 0.55)
    check_texts(page, server, 0.55)
    number = page.get_by_role("spinbutton", name="Dial")
    number.fill("0.3")
    number.press("Enter")
    finished(page, 0.3)
    check_texts(page, server, 0.3)
    count = requests_of(server)
    number.press("Tab")
    dial.press("Tab")
    page.wait_for_timeout(300)
    assert requests_of(server) == count


def test_the_ends_are_those_chosen(page):
    page.get_by_label("Aligner at 1", exact=True).click()
    page.get_by_role("option", name="polite").click()
    expect(page.get_by_role("slider", name="Dial: 0 is all polite, 1 is all polite")).to_be_enabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_screen(browser, server, tmp_path, size, scheme):
    """Side by side where there is room, else one below the other; the picture is not blank: look at it."""
    with visit(browser, server, size, color_scheme=scheme) as page:
        ready(page)
        ask(page, "def", button="Run", sampling=False)
        finished(page, 0.5)
        left, right = (page.locator(side).bounding_box() for side in SIDES)
        assert (left["y"] == right["y"]) == (size is DESKTOP)
        check_picture(page, tmp_path / "dial.png", scheme)
