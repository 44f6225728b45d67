"""Where drafts come from: the first aligner, a model of its own, the text itself, or nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.draw import NO_TOKEN
from trimtab.errors import InvalidOption
from trimtab.models.adapters import Adapted
from trimtab.models.base import LanguageModel
from trimtab.models.head import check_heads, tap_of

__all__ = ["DRAFTS", "Lookup", "Models", "choose_drafter", "who_drafts"]


@dataclass(frozen=True)
class Models:
    """All that is run to decode a request. Requests whose models are equal go through them together.

    Attributes:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        draft: a model that only drafts, or None.
        lookup: draft from the text itself instead.
        drafts: False where nobody drafts.
        adapters: the adapter that the request's slots use in each of `all`, None for the model as it is. Equal models may
            differ in them: a batch mixes adapters.
        who: who drafts, in words; where nobody does, why, and what would help.
    """

    proposal: LanguageModel
    aligners: tuple[LanguageModel, ...] = ()
    draft: LanguageModel | None = None
    lookup: bool = False
    drafts: bool = True
    adapters: tuple[Any, ...] = field(default=(), compare=False)
    who: str = field(default="", compare=False)

    @property
    def all(self) -> list[LanguageModel]:
        """Proposal, aligners, and the draft model if there is one."""
        return [self.proposal, *self.aligners, *([self.draft] if self.draft else [])]

    @property
    def drafter(self) -> int | None:
        """Which of them drafts: the draft model, or the first aligner; None for a lookup, or if there is nobody."""
        if self.draft is not None:
            return len(self.aligners) + 1
        return 1 if self.aligners and self.drafts and not self.lookup else None


DRAFTS = ("aligner", "ngram", "none")
"""Who drafts, where it is no model of its own."""


def choose_drafter(
    proposal: LanguageModel, aligners: Sequence[LanguageModel], draft: str | LanguageModel | None, default: str = "aligner"
) -> Models:
    """The models with who drafts for them.

    Args:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        draft: what the user wants; None for the default. `"aligner"` is the first one, of whatever aligners there are.
        default: who drafts then, if there are aligners; `"none"` for a residual.

    Raises:
        InvalidOption: there is no such drafter, or it is a head, which reads what the proposal has read.
        UnsupportedModel: an aligner is a head of another proposal.
    """
    check_heads(proposal, aligners, None if draft is None or isinstance(draft, str) else draft)
    if default == "aligner" and aligners and tap_of(aligners[0]) is not None:
        default = "head"
    who = _in_words(len(aligners), draft, default)
    if draft == "aligner" and default == "head":
        raise InvalidOption("draft: the first aligner is a head, which reads what the proposal has read, and cannot draft")
    if draft is None:
        draft = "none" if default == "head" or not aligners else default
    given = [proposal, *aligners, *([] if isinstance(draft, str) else [draft])]
    adapters = tuple(model.adapter if isinstance(model, Adapted) else None for model in given)
    proposal, *rest = (model.pool if isinstance(model, Adapted) else model for model in given)
    if not isinstance(draft, str):
        return Models(proposal, tuple(rest[:-1]), rest[-1], adapters=adapters, who=who)
    if draft not in DRAFTS:
        raise InvalidOption(f"draft must be one of {', '.join(DRAFTS)}, or a model, not '{draft}'")
    return Models(proposal, tuple(rest), lookup=draft == "ngram", drafts=draft != "none", adapters=adapters, who=who)


def _in_words(aligners: int, draft: str | LanguageModel | None, default: str) -> str:
    """Who drafts, of so many aligners; the further arguments are those of `choose_drafter`."""
    if draft is not None and not isinstance(draft, str):
        name = getattr(getattr(draft, "model", None), "name_or_path", "")
        return f"the drafter {name}" if name else "a drafter"
    if draft == "ngram":
        return "the text itself, by its n-grams"
    if draft == "none":
        return "nobody: --draft none"
    if not aligners:
        return "nobody: there is no aligner; --draft ngram or a model would"
    if draft is None and default == "head":
        return (
            "nobody: the aligner is a head, which reads what the proposal has read, and came without a drafter (`trimtab train"
            " --train_draft true` makes one); --draft ngram or a model would"
        )
    if draft is None and default == "none":
        return (
            "nobody: the aligner is a residual, whose own drafts are rarely accepted; give its drafter, --draft FOLDER/draft"
            " (`trimtab train --train_draft true` makes one), or --draft ngram"
        )
    return "the aligner itself" if aligners == 1 else "the first aligner"


def who_drafts(model: Any) -> str:
    """Who drafts for an `AlignedModel`, in words, where a request does not name another rule."""
    if model.pace.fixed == 0:
        return "nobody: --num_speculative_tokens 0"
    rule = model.shaping(model.defaults).rule
    return str(model.models.who) if rule.has_row else f"nobody: the rule '{rule}' has no row that drafts could be verified with"


class Lookup:
    """Draft a text's continuation from the text: what followed its last few tokens when they last stood there.

    The draft at a position depends on what stands before it, and on nothing else (Saxena, "Prompt lookup decoding", 2023).

    Args:
        tokens: the text so far.
        longest: tokens to look for at most; shorter runs are tried after longer ones, down to 1.
    """

    def __init__(self, tokens: Sequence[int], longest: int = 3) -> None:
        self._longest = longest
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens that are certain."""
        for token in tokens:
            self._learn(self._tokens, token, self._next)
            self._tokens.append(token)

    def drafts(self, count: int) -> list[int]:
        """The next `count` tokens, each as if those before it had been accepted; `NO_TOKEN` where nothing is found."""
        text = self._tokens[-self._longest :]
        learned: dict[tuple[int, ...], int] = {}
        found: list[int] = []
        for _ in range(count):
            runs = [tuple(text[-n:]) for n in range(min(self._longest, len(text)), 0, -1)]
            token = next((t for run in runs if (t := learned.get(run, self._next.get(run))) is not None), NO_TOKEN)
            found.append(token)
            if token == NO_TOKEN:
                return found + [NO_TOKEN] * (count - len(found))
            self._learn(text, token, learned)
            text.append(token)
        return found

    def _learn(self, text: list[int], token: int, into: dict[tuple[int, ...], int]) -> None:
        for n in range(1, min(self._longest, len(text)) + 1):
            into[tuple(text[-n:])] = token
