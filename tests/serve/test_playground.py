"""The playground in a real browser, over a real server with tiny models."""

import httpx
import pytest
from playwright.sync_api import expect

from playing import (
    DESKTOP,
    LETTERS,
    PHONE,
    TOKENS,
    Server,
    ask,
    check_picture,
    inside,
    point_at,
    text_of,
    visit,
    wait_for,
)
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from trimtab.data.records import read_records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(  # Gradio 6.31 with pandas 3
        "ignore:'future.no_silent_downcasting' is deprecated", "ignore:The copy keyword is deprecated"
    ),
]
KEY = "a-key"
ALIGNERS = ("polite", "rude")
ON_ONE_LINE = "#tt-aligned label.tt-token:not(:has(> .tt-mark))"
"""Tokens whose middle is their own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny_tokenizer(LETTERS)
    size = len(LETTERS) + 1
    for seed, name in enumerate(("proposal", *ALIGNERS)):
        save_tiny(folder / name, tiny_model("llama", size, seed=seed, spread=0.3, max_position_embeddings=1024), tokenizer)
    return folder


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("arena") / "votes.jsonl", ALIGNERS).start()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def full_speed(server):
    yield
    server.step_seconds = 0.0
    server.votes.unlink(missing_ok=True)


@pytest.fixture
def chatting(server, monkeypatch):
    """The same models with a chat template."""
    monkeypatch.setattr(server.service.registry.base.tokenizer, "chat_template", CHAT_TEMPLATE)


@pytest.fixture
def page(browser, server):
    with visit(browser, server) as page:
        ready(page)
        yield page


def ready(page):
    expect(page.get_by_label("Aligner", exact=True)).to_have_value("polite")
    expect(page.get_by_label("The aligner’s own strength: 1")).to_be_checked()


def finished(page):
    for side in ("#tt-proposal", "#tt-aligned"):
        expect(page.locator(f"{side} .tt-facts")).to_contain_text("cut at the limit")
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()


def test_both_sides_stream_at_once_and_say_what_the_api_says(page, server):
    """Texts full of HTML and of templates arrive as the text they are."""
    server.step_seconds = 0.03
    ask(page, "def", seed=3)
    for side in ("#tt-proposal", "#tt-aligned"):
        expect(page.locator(f"{side} [aria-busy=true] .tt-token").nth(2)).to_be_visible()
    assert page.locator("[aria-busy=true]").count() == 2
    finished(page)
    server.step_seconds = 0.0
    assert text_of(page, "#tt-proposal") == server.complete(prompt="def", seed=3, aligner="polite", weight=0)
    assert text_of(page, "#tt-aligned") == server.complete(prompt="def", seed=3, aligner="polite")
    assert "<" in text_of(page, "#tt-aligned")
    assert page.locator("#tt-aligned .tt-token").count() == TOKENS
    expect(page.locator("#tt-aligned .tt-facts")).to_contain_text("mean log ratio")
    expect(page.locator("#tt-aligned .tt-facts")).to_contain_text("tokens/s")


def test_a_token_shows_its_colour_and_its_card(page):
    """By pointer and by keyboard, one card at a time, whole on the screen."""
    ask(page, "def", seed=3)
    finished(page)
    tokens, cards = page.locator("#tt-aligned label.tt-token"), page.locator(".tt-card:visible")
    whole = page.locator(ON_ONE_LINE)
    shares = tokens.evaluate_all("all => all.map(e => e.style.getPropertyValue('--share'))")
    assert len(set(shares)) > 5
    colours = set(tokens.evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)"))
    assert len(colours) > 5
    assert cards.count() == 0
    for token in (whole.first, whole.nth(whole.count() // 2), whole.last):
        point_at(page, token)
        expect(cards).to_have_count(1)
        inside(page, cards.first)
        assert cards.first.locator(".tt-candidate").count() == 10
        assert cards.first.locator(".tt-title").all_inner_texts()[0].startswith("Proposal")
    page.mouse.move(0, 0)
    expect(cards).to_have_count(0)
    tokens.first.locator("input").focus()
    expect(tokens.first.locator(".tt-card")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tokens.nth(1).locator(".tt-card")).to_be_visible()
    expect(cards).to_have_count(1)


def test_strength_zero_is_the_proposal_and_a_seed_is_a_text(page):
    box = page.get_by_role("spinbutton", name="Strength of the aligner")
    box.fill("0")
    box.blur()
    expect(page.get_by_label("The aligner’s own strength: 1")).not_to_be_checked()
    ask(page, "abc", seed=7)
    finished(page)
    first = text_of(page, "#tt-proposal")
    expect(page.locator("#tt-aligned h3")).to_contain_text("product · strength 0")
    assert text_of(page, "#tt-aligned") == first
    ask(page, "abc", sampling=False)
    page.wait_for_timeout(300)
    finished(page)
    assert text_of(page, "#tt-proposal") == first
    page.get_by_role("button", name="New seed").click()
    expect(page.get_by_label("Seed, the same on both sides")).not_to_have_value("7")
    ask(page, "abc", sampling=False)
    page.wait_for_timeout(300)
    finished(page)
    assert text_of(page, "#tt-aligned") == text_of(page, "#tt-proposal") != first


def test_rule_and_aligner_are_those_chosen(page, server):
    for label, choice in (("Aligner", "rude"), ("Rule", "geometric")):
        page.get_by_label(label, exact=True).click()
        page.get_by_role("option", name=choice).click()
    expect(page.get_by_label("The aligner’s own strength: 0.5")).to_be_checked()
    ask(page, "abc", seed=5)
    finished(page)
    expect(page.locator("#tt-aligned h3")).to_contain_text("rude · geometric · strength 0.5")
    assert text_of(page, "#tt-aligned") == server.complete(prompt="abc", seed=5, aligner="rude", rule="geometric")


def test_models_without_a_chat_template_continue_texts(page):
    assert page.get_by_label("Message to answer").count() == 0


def test_models_with_a_chat_template_start_as_a_chat(chatting, page, server):
    for tab, place in (("Compare", "first"), ("Arena", "last")):
        page.get_by_role("tab", name=tab).click()
        expect(getattr(page.get_by_label("Message to answer"), place)).to_be_checked()
        expect(getattr(page.get_by_label("Text to continue"), place)).not_to_be_checked()
    page.get_by_role("tab", name="Compare").click()
    page.get_by_label("Text to continue").first.check()
    ask(page, "abc", seed=5)
    finished(page)
    assert text_of(page, "#tt-aligned") == server.complete(prompt="abc", seed=5, model="polite")


def test_a_message_goes_through_the_chat_template(chatting, page, server):
    ask(page, "hi", seed=5)
    finished(page)
    body = {
        "model": "polite",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": TOKENS,
        "temperature": 0.7,
        "seed": 5,
    }
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert text_of(page, "#tt-aligned") == answer["choices"][0]["message"]["content"]


def test_stop_stops(page, server):
    server.step_seconds = 0.05
    ask(page, "abc", tokens=500)
    expect(page.locator("#tt-aligned .tt-token").nth(2)).to_be_visible()
    assert server.service.worker.outstanding == 2
    page.get_by_role("button", name="Stop").first.click()
    for side in ("#tt-proposal", "#tt-aligned"):
        expect(page.locator(f"{side} .tt-facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()
    wait_for(lambda: server.service.worker.outstanding == 0, 5)
    assert 2 < page.locator("#tt-aligned label.tt-token").count() < 400


def test_who_leaves_frees_the_slots(browser, server):
    server.step_seconds = 0.05
    with visit(browser, server) as page:
        ready(page)
        ask(page, "abc", tokens=500)
        expect(page.locator("#tt-aligned .tt-token").nth(2)).to_be_visible()
        page.close()
    wait_for(lambda: server.service.worker.outstanding == 0, 10)


@pytest.mark.parametrize(("prompt", "message"), [("", "Write a prompt first."), ("a" * 2000, "2000 tokens")])
def test_a_refusal_is_a_message(page, prompt, message):
    ask(page, prompt)
    expect(page.get_by_role("alert")).to_contain_text(message)
    expect(page.get_by_role("button", name="Compare", exact=True)).to_be_enabled()
    assert "Traceback" not in page.content()


# ---- the arena


def open_arena(page, text):
    page.get_by_role("tab", name="Arena").click()
    page.get_by_label("Prompt", exact=True).last.fill(text)
    play(page)


def play(page):
    page.get_by_role("button", name="Ask both").click()
    expect(vote(page, "Tie")).to_be_enabled()


def vote(page, name):
    return page.get_by_role("button", name=name, exact=True)


def test_votes_are_what_training_reads(page, server):
    """Blind until the vote; one line for each vote, whatever is clicked; both orders of the two models come up."""
    prompt, orders = "abc <b>", set()
    open_arena(page, prompt)
    for count in range(1, 21):
        answers = [text_of(page, f"#tt-answer-{i}") for i in (0, 1)]
        assert all(name not in page.locator(".tt-answers:visible").inner_text() for name in ("polite", "base"))
        better = count % 2
        vote(page, ("A is better", "B is better")[better]).dblclick()
        expect(page.get_by_text("Written:")).to_be_visible()
        expect(vote(page, "Tie")).to_be_disabled()
        labels = [page.locator(f"#tt-answer-{i} h3").inner_text() for i in (0, 1)]
        assert sorted(label.split(": ")[1] for label in labels) == ["base", "polite"]
        orders.add(labels[0])
        record = read_records(str(server.votes), need="rejected")[-1]
        assert (record.prompt, record.chosen, record.rejected) == (prompt, answers[better], answers[1 - better])
        assert len(server.votes.read_text(encoding="utf-8").splitlines()) == count
        if len(orders) == 2 and count >= 2:
            break
        play(page)
    assert len(orders) == 2
    expect(page.locator("#tt-hint")).to_contain_text(f"{count} for one side, 0 for neither")


def test_a_tie_is_kept_apart_and_the_next_command_is_shown(page, server):
    open_arena(page, "abc")
    vote(page, "Tie").click()
    expect(page.locator("#tt-hint")).to_contain_text("0 for one side, 1 for neither")
    ties = server.votes.with_name("votes.ties.jsonl")
    assert not server.votes.exists()
    assert '"verdict": "tie"' in ties.read_text(encoding="utf-8")
    ties.unlink()
    command = (
        f"trimtab train --objective preference --proposal {server.folder / 'proposal'} --aligner {server.folder / 'polite'}"
        f" --dataset {server.votes} --output_dir better"
    )
    expect(page.locator("#tt-hint pre")).to_contain_text(command)


def test_the_next_command_is_about_the_aligner_that_is_chosen(page, server):
    page.get_by_role("tab", name="Arena").click()
    expect(page.locator("#tt-hint pre")).to_contain_text(f"--aligner {server.folder / 'polite'} ")
    page.get_by_label("The other model", exact=True).click()
    page.get_by_role("option", name="rude").click()
    expect(page.locator("#tt-hint pre")).to_contain_text(f"--aligner {server.folder / 'rude'} ")


def test_what_was_stopped_cannot_be_voted_on(page, server):
    server.step_seconds = 0.05
    page.get_by_role("tab", name="Arena").click()
    page.get_by_label("Prompt", exact=True).last.fill("abc")
    page.get_by_role("button", name="Ask both").click()
    expect(page.locator("#tt-answer-0 .tt-tokens")).to_be_visible()
    page.get_by_role("button", name="Stop").last.click()
    expect(page.get_by_role("button", name="Ask both")).to_be_enabled()
    expect(vote(page, "Tie")).to_be_disabled()
    expect(vote(page, "A is better")).to_be_disabled()


# ---- the page


@pytest.mark.parametrize(
    "path", ["", "/config", "/gradio_api/queue/join", "/gradio_api/queue/data", "/gradio_api/upload", "/login"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_other_pages_cannot_use_its_routes(server, path, method):
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = httpx.request(method, f"{server.url}/playground{path}", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_screen(browser, server, tmp_path, size, scheme):
    """Nothing is wider than the screen, cards are whole, and the pictures are not blank: look at them."""
    touch = size is PHONE
    with visit(browser, server, size, color_scheme=scheme, has_touch=touch) as page:
        ready(page)
        assert "gradio" not in page.locator("body").inner_text().lower()
        ask(page, "def", seed=3)
        finished(page)
        token = page.locator(ON_ONE_LINE).nth(5)
        point_at(page, token, touch=touch)
        expect(token.locator(".tt-card")).to_be_visible()
        inside(page, token.locator(".tt-card"))
        check_picture(page, tmp_path / "compare.png", scheme)
        open_arena(page, "def")
        vote(page, "A is better").click()
        expect(page.get_by_text("Written:")).to_be_visible()
        check_picture(page, tmp_path / "arena.png", scheme)


def test_a_key_is_needed_and_an_open_page_does_not_hold_up_a_shutdown(browser, folder, tmp_path):
    """The page is opened while the models are still being loaded, and offers them when they are there."""
    server = Server(folder, tmp_path / "votes.jsonl", ALIGNERS, keys=("other", KEY), loaded=False).start()
    try:
        assert httpx.get(f"{server.url}/playground/config").status_code == 401
        with visit(browser, server, expect_errors=True) as page:
            for password in ("wrong", KEY):
                page.get_by_label("username").fill("anybody")
                page.get_by_label("password").fill(password)
                page.get_by_role("button", name="Login").click()
                if password == "wrong":
                    expect(page.get_by_text("Incorrect")).to_be_visible()
            expect(page.get_by_text("The models are being loaded.")).to_be_visible()
            server.may_load.set()
            ready(page)
            expect(page.get_by_text("The models are being loaded.")).to_have_count(0)
            ask(page, "abc", seed=3)
            finished(page)
            assert server.stop() < 8
    finally:
        server.stop()
