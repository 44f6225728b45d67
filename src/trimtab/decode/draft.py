"""All that is run to decode a request, and who drafts among it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.decode.drafters import AlignerDrafter, Drafter, NgramDrafter, NoDrafter
from trimtab.errors import InvalidOption, VocabularyMismatch
from trimtab.models.adapters import Adapted
from trimtab.models.base import LanguageModel
from trimtab.models.head import check_heads, tap_of

__all__ = ["Models", "choose_drafter", "who_drafts"]


@dataclass(frozen=True)
class Models:
    """All that is run to decode a request. Requests whose models are equal go through them together.

    Attributes:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        drafter: who drafts.
        adapters: the adapter that the request's slots use in each of `all`, None for the model as it is. Equal models may
            differ in them: a batch mixes adapters.
        who: who drafts, in words; where nobody does, why, and what would help.
    """

    proposal: LanguageModel
    aligners: tuple[LanguageModel, ...] = ()
    drafter: Drafter = field(default_factory=NoDrafter)
    adapters: tuple[Any, ...] = field(default=(), compare=False)
    who: str = field(default="", compare=False)

    @property
    def all(self) -> list[LanguageModel]:
        """Proposal, aligners, and the models that the drafter has of its own."""
        return [self.proposal, *self.aligners, *self.drafter.models]

    def check_vocabulary(self) -> None:
        """Refuse models whose rows are of different lengths.

        Raises:
            VocabularyMismatch: naming the first.
        """
        names = ["", *(f"aligner {i}" for i in range(len(self.aligners))), "draft"]
        for name, model in zip(names, self.all, strict=False):
            if model.vocab_size != self.proposal.vocab_size:
                sizes = f"{model.vocab_size} tokens, the proposal {self.proposal.vocab_size}"
                raise VocabularyMismatch(f"{name} has {sizes}; they must share one vocabulary")


def choose_drafter(
    proposal: LanguageModel, aligners: Sequence[LanguageModel], drafter: Drafter | None, *, residual: bool = False
) -> Models:
    """The models with who drafts for them.

    Args:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        drafter: what the user wants; None for the default. The aligner's is the first one, of whatever aligners there are.
        residual: whether the first aligner is one, whose own drafts are rarely accepted. Where nobody is named, the text drafts
            for those, and for heads, which cannot draft.

    Raises:
        InvalidOption: the drafter is a head, which reads what the proposal has read.
        UnsupportedModel: an aligner is a head of another proposal.
    """
    check_heads(proposal, aligners, drafter.models if drafter else ())
    head = bool(aligners) and tap_of(aligners[0]) is not None
    who = _in_words(len(aligners), drafter, residual=residual, head=head)
    if drafter is None:
        drafter = NgramDrafter() if aligners and (residual or head) else AlignerDrafter()
    elif drafter.from_aligner and head:
        raise InvalidOption("draft: the first aligner is a head, which reads what the proposal has read, and cannot draft")
    if drafter.from_aligner and not aligners:
        drafter = NoDrafter()
    given = [proposal, *aligners, *drafter.models]
    adapters = tuple(model.adapter if isinstance(model, Adapted) else None for model in given)
    proposal, *rest = (model.pool if isinstance(model, Adapted) else model for model in given)
    own = tuple(rest[len(aligners) :])
    return Models(proposal, tuple(rest[: len(aligners)]), drafter.on(own) if own else drafter, adapters=adapters, who=who)


def _in_words(aligners: int, drafter: Drafter | None, *, residual: bool, head: bool) -> str:
    """Who drafts, of so many aligners; the further arguments are those of `choose_drafter`, and whether the first is a head."""
    if drafter is not None and not drafter.from_aligner:
        return drafter.who
    if not aligners:
        return "nobody: there is no aligner; --draft ngram or a model would"
    if drafter is None and (head or residual):
        makes = "(`trimtab train --train_draft true` makes one)"
        why, better = (
            ("a head, which reads what the proposal has read, and came without a drafter", f"one {makes}")
            if head
            else ("a residual, whose own drafts are rarely accepted", f"its drafter, --draft FOLDER/draft {makes},")
        )
        return f"{NgramDrafter().who}: the aligner is {why}; {better} may do better"
    return "the aligner itself" if aligners == 1 else AlignerDrafter().who


def who_drafts(model: Any) -> str:
    """Who drafts for an `AlignedModel`, in words, where a request does not name another rule."""
    if model.pace.fixed == 0:
        return "nobody: --num_speculative_tokens 0"
    rule = model.shaping(model.defaults).rule
    return str(model.models.who) if rule.has_row else f"nobody: the rule '{rule}' has no row that drafts could be verified with"
