"""Tokens as HTML: everything is escaped, everything shows, and colours and numbers are those of the tokens."""

import math
import re
from html.parser import HTMLParser

import pytest

from trimtab.serve.playground.tokens_html import (
    FULL_COLOUR,
    Candidate,
    Shown,
    command_html,
    legend_html,
    notice_html,
    panel_html,
    text_html,
    tokens_html,
)

HOSTILE = "<script>alert(1)</script>\"'&amp;${value}{{value}}`"


class Reader(HTMLParser):
    """Elements, and the text outside of cards and marks."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.text, self._hidden = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        classes = dict(attrs).get("class") or ""
        self.elements.append((tag, dict(attrs)))
        if tag != "input":
            self._hidden.append(any(name in classes for name in ("tt-card", "tt-mark")) or any(self._hidden[-1:]))

    def handle_endtag(self, tag):
        self._hidden.pop()

    def handle_data(self, data):
        if not any(self._hidden[-1:]):
            self.text += data

    def with_class(self, name):
        return [(tag, attrs) for tag, attrs in self.elements if name in (attrs.get("class") or "").split()]


def shown(text="a", proposal=-1.0, aligned=-1.0, **more):
    return Shown(text, text, False, proposal, aligned, **more)


@pytest.mark.parametrize("cards", [True, False])
def test_hostile_text_is_text(cards):
    token = shown(HOSTILE, top_proposal=[Candidate(HOSTILE, -1.0)], top_aligned=[Candidate(HOSTILE, -2.0)])
    html = tokens_html([token, shown("b")], "g", cards=cards)
    page = Reader(html)
    assert page.text == HOSTILE + "b"
    assert {tag for tag, _ in page.elements} <= {"div", "span", "label", "input", "i", "b", "code"}
    assert not re.search(r"[${}`]", html)


@pytest.mark.parametrize(
    "html",
    [
        panel_html(HOSTILE, "", note=HOSTILE, facts=[HOSTILE]),
        notice_html(HOSTILE, kind="problem"),
        command_html(HOSTILE, [HOSTILE]),
        text_html(HOSTILE, "none"),
        text_html("", HOSTILE),
    ],
)
def test_hostile_text_is_text_everywhere_else(html):
    page = Reader(html)
    assert HOSTILE in page.text
    assert not {"script"} & {tag for tag, _ in page.elements}


def test_line_ends_and_tabs_are_marked_and_kept():
    html = tokens_html([shown("a\n\tb")], "g", cards=False)
    assert "↵</i>\n" in html
    assert "⇥</i>\t" in html
    assert Reader(html).text == "a\n\tb"


@pytest.mark.parametrize("char", ["\u202e", "\x00", "\x1b", "\u200b", "\u2028", "\ufeff", "\r"])
def test_characters_that_hide_are_spelled_out(char):
    html = tokens_html([shown(f"a{char}b")], "g", cards=False)
    assert char not in html
    assert f"U+{ord(char):04X}" in html


def test_joiners_of_emoji_stay():
    family = "\U0001f468\u200d\U0001f469"
    assert Reader(tokens_html([shown(family)], "g", cards=False)).text == family


def test_special_tokens_are_named():
    page = Reader(tokens_html([Shown("", "<eos>", True, -1.0, -2.0)], "g", cards=True))
    assert page.text == "<eos>"
    assert len(page.with_class("tt-special")) == 1


def test_a_part_of_a_character_is_marked():
    html = tokens_html([shown(""), shown("é")], "g", cards=False)
    assert "▫" in html
    assert Reader(html).text == "é"


@pytest.mark.parametrize(
    ("ratio", "kind", "share"),
    [
        (0.0, "tt-down", "0.00"),
        (FULL_COLOUR / 2, "tt-up", "0.50"),
        (-FULL_COLOUR / 4, "tt-down", "0.25"),
        (100.0, "tt-up", "1.00"),
        (-math.inf, "tt-down", "1.00"),
    ],
)
def test_colour_is_the_log_ratio(ratio, kind, share):
    (token,) = Reader(tokens_html([shown(proposal=-200.0, aligned=-200.0 + ratio)], "g", cards=False)).with_class("tt-token")
    assert kind in token[1]["class"].split()
    assert token[1]["style"] == f"--share:{share}"


@pytest.mark.parametrize("token", [Shown("a", "a"), shown(proposal=-math.inf, aligned=-math.inf)])
def test_without_a_ratio_there_is_no_colour(token):
    (element,) = Reader(tokens_html([token], "g", cards=True)).with_class("tt-token")
    assert element[1]["class"] == "tt-token"
    assert "style" not in element[1]


def test_a_card_has_both_models_numbers():
    """Log(0.5 / 0.25) = 0.69; bars are as long as the probabilities; the chosen token is marked on both sides."""
    token = shown(
        " yes",
        math.log(0.25),
        math.log(0.5),
        top_proposal=[Candidate("no", math.log(0.6)), Candidate(" yes", math.log(0.25)), Candidate("\n", -math.inf)],
        top_aligned=[Candidate(" yes", math.log(0.5)), Candidate("maybe", math.log(1e-6))],
    )
    html = tokens_html([token], "group", cards=True)
    page = Reader(html)
    assert "<b>+0.69 nats</b>" in html
    assert re.findall(r'tt-title">(\w+)<b>([^<]+)</b>', html) == [("Proposal", "25.0 %"), ("Aligned", "50.0 %")]
    assert re.findall(r"--p:([0-9.]+)", html) == ["0.600", "0.250", "0.000", "0.500", "0.000"]
    assert re.findall(r"<code>([^<]+)</code><span>([^<]+)</span>", html) == [
        ("no", "60.0 %"),
        ("␣yes", "25.0 %"),
        ("↵", "0.0 %"),
        ("␣yes", "50.0 %"),
        ("maybe", "0.0001 %"),
    ]
    assert len(page.with_class("tt-chosen")) == 2
    assert [attrs for tag, attrs in page.elements if tag == "input"] == [{"type": "radio", "name": "group"}]


def test_the_legend_has_the_ends_of_the_scale():
    assert f"≥ +{FULL_COLOUR:g}" in legend_html()
    assert f"≤ −{FULL_COLOUR:g}" in legend_html()


def test_a_notice_without_a_message_is_nothing():
    assert notice_html("") == ""
    assert 'role="alert"' in notice_html("a", kind="problem")
