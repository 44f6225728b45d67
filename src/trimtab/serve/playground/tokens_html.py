"""Tokens as HTML: coloured by log(aligned / proposal), each with a card of what both models wanted in its place.

Pure functions from values to text, for the playground. Nothing here needs a script: the tokens of a text are one group of radio
buttons, so that Tab reaches the group, arrow keys move through it, and a tap selects; the style sheet (`playground.css`) shows
the card of the token that is pointed at or has the focus. Texts come from models and users, so all of them are escaped, and
characters that would hide or rearrange what stands around them are spelled out.
"""

import math
import unicodedata
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

__all__ = [
    "FULL_COLOUR",
    "Candidate",
    "Shown",
    "command_html",
    "dials_html",
    "legend_html",
    "notice_html",
    "panel_html",
    "text_html",
    "tokens_html",
]

FULL_DIAL = 3.0
"""The weight at a dial's end."""
FULL_COLOUR = 4.0
"""The |log ratio|, in nats, from which a token has the full colour."""
_TEMPLATE_SIGNS = {ord(char): f"&#{ord(char)};" for char in "${}`"}
"""Gradio fills templates in the browser; a text of ours must never look like one."""
_MARKS = {"\n": "↵", "\t": "⇥"}
_JOINERS = "\u200c\u200d"
"""Invisible, but parts of words and of emoji."""


class Candidate(NamedTuple):
    """A token that a model might have chosen."""

    text: str
    logp: float


class Shown(NamedTuple):
    """One token as it is to be shown.

    Attributes:
        text: what it adds to the text; empty for a part of a character.
        name: the token by itself, for its card.
        special: whether it is no text, such as an end of sequence.
        proposal, aligned: its natural-log probabilities; None leaves it uncoloured and without a card.
        top_proposal, top_aligned: the best tokens in its place, best first.
    """

    text: str
    name: str
    special: bool = False
    proposal: float | None = None
    aligned: float | None = None
    top_proposal: Sequence[Candidate] = ()
    top_aligned: Sequence[Candidate] = ()

    @property
    def log_ratio(self) -> float | None:
        """Log(aligned / proposal), if it is a number."""
        if self.proposal is None or self.aligned is None:
            return None
        ratio = self.aligned - self.proposal
        return None if math.isnan(ratio) else ratio


def tokens_html(tokens: Sequence[Shown], group: str, *, cards: bool) -> str:
    """A text, token by token.

    Args:
        tokens: in order.
        group: a name that no other text on the page has.
        cards: whether tokens can be selected, and show a card then.
    """
    pieces = [_token(token, group, cards) for token in tokens]
    role = ' role="radiogroup" aria-label="Tokens: choose one to see its probabilities"' if cards else ""
    return f'<div class="tt-tokens" dir="auto"{role}>{"".join(pieces)}</div>'


def _token(token: Shown, group: str, cards: bool) -> str:
    text = _safe(token.name) if token.special else _visible(token.text) or '<i class="tt-mark">▫</i>'
    kind = "tt-token tt-special" if token.special else "tt-token"
    style, ratio = "", token.log_ratio
    if ratio is not None:
        kind += " tt-up" if ratio > 0 else " tt-down"
        style = f' style="--share:{min(abs(ratio) / FULL_COLOUR, 1.0):.2f}"'
    if not cards or token.proposal is None or token.aligned is None:
        return f'<span class="{kind}"{style}>{text}</span>'
    return f'<label class="{kind}"{style}><input type="radio" name="{escape(group)}">{text}{_card(token)}</label>'


def _card(token: Shown) -> str:
    assert token.proposal is not None
    assert token.aligned is not None
    ratio = token.log_ratio
    change = "" if ratio is None else f"<b>{ratio:+.2f} nats</b>"
    columns = (
        _column("Proposal", token.proposal, token.top_proposal, token.name),
        _column("Aligned", token.aligned, token.top_aligned, token.name),
    )
    head = f'<span class="tt-card-head"><code>{_spelled(token.name)}</code>{change}</span>'
    return f'<span class="tt-card">{head}<span class="tt-columns">{"".join(columns)}</span></span>'


def _column(title: str, logp: float, top: Sequence[Candidate], chosen: str) -> str:
    """One model's probability of the token, and its best candidates."""
    rows = [
        f'<span class="tt-candidate{" tt-chosen" if one.text == chosen else ""}" style="--p:{_probability(one.logp):.3f}">'
        f"<code>{_spelled(one.text)}</code><span>{_percent(one.logp)}</span></span>"
        for one in top
    ]
    return f'<span class="tt-column"><span class="tt-title">{title}<b>{_percent(logp)}</b></span>{"".join(rows)}</span>'


def text_html(text: str, placeholder: str) -> str:
    """A text without its tokens, or the placeholder where there is none."""
    if not text:
        return f'<p class="tt-empty">{_safe(placeholder)}</p>'
    return f'<div class="tt-tokens" dir="auto">{_visible(text)}</div>'


def legend_html() -> str:
    """The scale of the colours."""
    full, half = f"{FULL_COLOUR:g}", f"{FULL_COLOUR / 2:g}"
    ticks = "".join(f"<span>{tick}</span>" for tick in (f"≤ −{full}", f"−{half}", "0", f"+{half}", f"≥ +{full}"))
    return (
        '<div class="tt-legend"><span>Colour of a token: log(aligned / proposal) in nats. Point at a token, tap it, or walk '
        "with Tab and the arrow keys, for both models’ candidates.</span>"
        '<div class="tt-scale"><span>less likely than before</span>'
        f'<div><div class="tt-bar"></div><div class="tt-ticks">{ticks}</div></div>'
        "<span>more likely</span></div></div>"
    )


def panel_html(title: str, body: str, *, note: str = "", facts: Sequence[str] = (), busy: bool = False) -> str:
    """One answer: a title with a note, the text, and facts below it.

    Args:
        title: a text.
        body: HTML.
        note: a text beside the title.
        facts: texts below the body.
        busy: whether more is to come.
    """
    below = "".join(f"<li>{_safe(fact)}</li>" for fact in facts)
    return (
        f'<section class="tt-panel" aria-label="{escape(title)}" aria-busy="{"true" if busy else "false"}">'
        f'<h3>{_safe(title)}<span class="tt-note">{_safe(note)}</span></h3>'
        f'{body}<ul class="tt-facts">{below}</ul></section>'
    )


def dials_html(dials: Sequence[tuple[str, float, float, float]]) -> str:
    """A dial for each aligner: its weight, and where .95 of what it might be is.

    Args:
        dials: name, weight, and the ends of its interval.
    """
    rows = []
    for name, weight, low, high in dials:
        at, start, end = (f"{100 * (min(max(x, -FULL_DIAL), FULL_DIAL) / FULL_DIAL + 1) / 2:.1f}%" for x in (weight, low, high))
        rows.append(
            f'<div class="tt-dial" role="meter" aria-label="weight of {escape(name)}" aria-valuemin="{-FULL_DIAL:g}"'
            f' aria-valuemax="{FULL_DIAL:g}" aria-valuenow="{weight:.3f}" aria-valuetext="{weight:+.2f}, from {low:+.2f} to'
            f' {high:+.2f}" style="--at:{at};--low:{start};--high:{end}">'
            f'<span>{_safe(name)}</span><span class="tt-track"></span><span>{weight:+.2f}</span></div>'
        )
    return f'<div class="tt-dials">{"".join(rows)}</div>'


def notice_html(message: str, *, kind: str = "info") -> str:
    """A message to the user; `kind` is `"info"` or `"problem"`. Empty without a message."""
    if not message:
        return ""
    role = "alert" if kind == "problem" else "status"
    return f'<p class="tt-notice tt-{kind}" role="{role}">{_safe(message)}</p>'


def command_html(message: str, commands: Sequence[str]) -> str:
    """A message with commands for a shell."""
    lines = "\n".join(_safe(command) for command in commands)
    return f'<div class="tt-hint"><p>{_safe(message)}</p><pre tabindex="0">{lines}</pre></div>'


# ---- characters


def _safe(text: str) -> str:
    """A text as HTML, and as no template of Gradio's."""
    return escape(text).translate(_TEMPLATE_SIGNS)


def _visible(text: str) -> str:
    """A text as HTML; line ends, tabs and characters without a look of their own are marked."""
    return "".join(_character(char) for char in text)


def _character(char: str) -> str:
    if char in _MARKS:
        return f'<i class="tt-mark">{_MARKS[char]}</i>{char}'
    if char not in _JOINERS and unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f'<i class="tt-mark">U+{ord(char):04X}</i>'
    return _safe(char)


def _spelled(text: str) -> str:
    """A token by itself, on one line: spaces at its edges show too."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    inner = text.strip(" ")
    if not inner:
        return "␣" * len(text) or "▫"
    start = text.index(inner)
    return "␣" * start + _visible(inner) + "␣" * (len(text) - start - len(inner))


def _probability(logp: float) -> float:
    return math.exp(min(logp, 0.0)) if not math.isnan(logp) else 0.0


def _percent(logp: float) -> str:
    p = 100 * _probability(logp)
    return f"{p:.1f} %" if p >= 0.05 or p == 0 else f"{p:.1g} %"
