"""The playground's steering: choices move the weights, the answers have them, and nothing is kept elsewhere.

First its handlers, in the event loop of a service; then the page, in a real browser.
"""

import contextlib

import gradio as gr
import pytest
import torch
from playwright.sync_api import expect

from playing import DESKTOP, LETTERS, PHONE, TOKENS, Server, Table, ask, check_picture, visit
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.core.user_weights import fit_user_weights
from trimtab.serve.bank import Bank
from trimtab.serve.playground.steer import NONE, Steer, drawn

pytestmark = pytest.mark.filterwarnings(  # Gradio 6.31 with pandas 3
    "ignore:'future.no_silent_downcasting' is deprecated", "ignore:The copy keyword is deprecated"
)
ALIGNERS = ("polite", "rude")
SESSION = gr.Request(session_hash="a")
PLAIN = ("def", "text", 0.7, TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("steer"), tiny_tokenizer(LETTERS)
    for seed, name in enumerate(("proposal", *ALIGNERS)):
        model = tiny_model("llama", len(LETTERS) + 1, seed=seed, spread=0.3, max_position_embeddings=1024)
        save_tiny(folder / name, model, tokenizer)
    return folder


class SteerTable(Table):
    """With steering."""

    def __init__(self, folder, aligners):
        super().__init__(folder, aligners, Steer)
        self.steer = self.tab

    def ask(self, learnt, *asked):
        return self._last(self.steer.run(SESSION, learnt, *asked))

    def choose(self, side, learnt, *asked):
        return self._last(self.steer._choose(side, SESSION, learnt, *asked))

    def _last(self, updates):
        async def drain():
            return [update async for update in updates]

        final = {}
        for update in self.runner.run(drain()):
            final |= update
        return final


@pytest.fixture(scope="module")
def table(folder):
    with contextlib.closing(SteerTable(folder, ALIGNERS)) as table:
        yield table


def test_a_choice_moves_the_weights_that_the_next_answers_have(table):
    steer = table.steer
    learnt = steer.load()[steer.learnt]
    table.ask(learnt, *PLAIN)
    assert learnt.can_choose
    for count in range(1, 4):
        texts = [answer.text for answer in learnt.answers]
        final = table.choose(0, learnt, *PLAIN)
        assert len(learnt.nats) == count
        nats = table.runner.run(
            Bank(table.service, learnt.aligners).compare(learnt.model, "def", *texts, unfinished=["chosen", "rejected"])
        )
        assert learnt.nats[-1] == pytest.approx(nats)
        fitted = fit_user_weights(learnt.features, torch.zeros(2), 0.1, 1.0)
        shown = [f'aria-valuenow="{weight:.3f}"' for weight in fitted.mean.tolist()]
        assert all(one in final[steer.dials] for one in shown)
        weights = [list(answer.shaping.weights) for answer in learnt.answers]
        likeliest = pytest.approx(fitted.mean.tolist())
        assert sum(one == likeliest for one in weights) == 1, "the other one is drawn"


def test_a_choice_counts_once_and_is_forgotten_when_asked(table):
    steer = table.steer
    learnt = steer.load()[steer.learnt]
    table.ask(learnt, *PLAIN)
    learnt.question = None
    assert table.choose(0, learnt, *PLAIN) == {}
    assert learnt.nats == []
    table.ask(learnt, *PLAIN)
    table.choose(1, learnt, *PLAIN)
    assert len(learnt.nats) == 1
    fresh = steer.forget()
    assert fresh[steer.learnt].nats == []
    assert fresh[steer.dials].count('aria-valuenow="0.000"') == 2


def test_who_starts_over_in_mid_answer_has_started_over(table):
    """And the numbers of other aligners are none."""
    steer = table.steer
    learnt = steer.load()[steer.learnt]
    table.ask(learnt, *PLAIN)
    table.choose(0, learnt, *PLAIN)

    async def play():
        updates = steer.run(SESSION, learnt, *PLAIN)
        await anext(updates)
        steer.start_over(SESSION, learnt)
        return [update async for update in updates]

    later = table.runner.run(play())
    assert not any(steer.learnt in update or steer.dials in update for update in later)
    assert any(update.get(steer.go, {}).get("interactive") for update in later), "one can ask again"
    learnt = steer.forget()[steer.learnt]
    table.ask(learnt, *PLAIN)
    table.choose(0, learnt, *PLAIN)
    assert len(learnt.nats) == 1
    table.service.registry.load("rude", table.service.registry.entries[1].path)
    table.ask(learnt, *PLAIN)
    assert learnt.nats == []


def test_what_cannot_be_asked_is_said(folder, table):
    steer = table.steer
    learnt = steer.load()[steer.learnt]
    assert "Write a prompt first." in table.ask(learnt, "", *PLAIN[1:])[steer.notice]
    assert not learnt.can_choose
    with contextlib.closing(SteerTable(folder, ())) as bare:
        learnt = bare.steer.load()[bare.steer.learnt]
        final = bare.ask(learnt, *PLAIN)
        assert NONE in final[bare.steer.dials]
        assert NONE in final[bare.steer.notice]


def test_weights_are_drawn_as_wide_as_they_are_unknown():
    features = torch.tensor([[10.0, 0.0]] * 30, dtype=torch.float64)
    fitted = fit_user_weights(features, torch.zeros(2), 0.1, 1.0)
    some = torch.stack([drawn(fitted) for _ in range(2000)])
    assert some.mean(0).tolist() == pytest.approx(fitted.mean.tolist(), abs=0.08)
    torch.testing.assert_close(some.T.cov(), fitted.covariance, atol=0.1, rtol=0.1)


# ---- the page


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    server = Server(folder, tmp_path_factory.mktemp("votes") / "votes.jsonl", ALIGNERS).start()
    yield server
    server.stop()


def test_this_one_rather_asks_again_and_the_dials_move(browser, server, tmp_path):
    with visit(browser, server) as page:
        page.get_by_role("tab", name="Steer").click()
        polite = page.get_by_role("meter", name="weight of polite")
        expect(polite).to_have_attribute("aria-valuenow", "0.000")
        ask(page, "def", button="Ask", sampling=False)
        choice = page.get_by_role("button", name="This one, rather (A)")
        expect(choice).to_be_enabled()
        before = page.locator("#tt-steer-0 .tt-tokens").inner_text()
        choice.click()
        expect(polite).not_to_have_attribute("aria-valuenow", "0.000")
        expect(choice).to_be_enabled()
        assert page.locator("#tt-steer-0 .tt-tokens").inner_text() != before
        moved = polite.get_attribute("aria-valuenow")
        choice.click()
        expect(polite).not_to_have_attribute("aria-valuenow", moved)
        expect(choice).to_be_enabled()
        page.get_by_role("button", name="Start over").click()
        expect(polite).to_have_attribute("aria-valuenow", "0.000")
        expect(choice).to_be_disabled()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_it_fits_the_screen(browser, server, tmp_path, size, scheme):
    """The picture is not blank: look at it."""
    with visit(browser, server, size, color_scheme=scheme) as page:
        page.get_by_role("tab", name="Steer").click()
        ask(page, "def", button="Ask", sampling=False)
        choice = page.get_by_role("button", name="This one, rather (B)")
        expect(choice).to_be_enabled()
        choice.click()
        expect(page.get_by_role("meter", name="weight of rude")).not_to_have_attribute("aria-valuenow", "0.000")
        expect(choice).to_be_enabled()
        check_picture(page, tmp_path / "steer.png", scheme)
