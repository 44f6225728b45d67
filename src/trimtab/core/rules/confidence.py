"""`confidence`: one rule writes until the proposal finds what is written likely, then another goes on: weak-to-strong decoding.

Song et al., "Weak-to-strong decoding" (arXiv 2506.07434): a small aligned model begins the answer, and as soon as a large base
is confident of the draft, it takes over for good. Here that is a law like others, as the row depends on the prefix alone: it is
enumerated, scored, and drafted for without loss.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from trimtab.core.rules.base import Rule
from trimtab.core.rules.context import Context
from trimtab.core.rules.nucleus import Nucleus
from trimtab.core.rules.proposal import Proposal
from trimtab.errors import InvalidOption

__all__ = ["Confidence"]

ROUNDING = 1e-9
"""By so much a mean of log-probabilities in float64 may miss the threshold."""


@dataclass(frozen=True)
class Confidence(Rule):
    """`before` until the geometric mean of p̃ over the answer's last `window` tokens is at least `threshold`; then `after`.

    The token that brings the mean there is the last one of `before`. A threshold of 0 hands over after exactly `window` tokens,
    and one above 1 never. By default the aligners write alone (on the support of p̃), then the proposal does.

    Raises:
        InvalidOption: a setting is wrong, a rule has no row, or looks further back than `window`.
    """

    name: ClassVar[str] = "confidence"
    marks: ClassVar[str | None] = "written after the hand-over"
    hands_over: ClassVar[bool] = True
    reads_logp = True
    window: int = 6
    threshold: float = 0.8
    before: Rule = Nucleus()  # noqa: RUF009 - a value
    after: Rule = Proposal()  # noqa: RUF009 - a value

    def __post_init__(self) -> None:
        """Check the settings."""
        super().__post_init__()
        if self.window < 1:
            raise InvalidOption(f"{self.name}: window must be at least 1, not {self.window}")
        if not self.threshold >= 0:
            raise InvalidOption(f"{self.name}: threshold must be at least 0, not {self.threshold}")
        for part, rule in (("before", self.before), ("after", self.after)):
            if not rule.has_row:
                raise InvalidOption(f"{self.name}: {part}='{rule}' has no row in closed form: choose another, such as product")
            if rule.hands_over:
                raise InvalidOption(f"{self.name}: {part}='{rule}' hands over itself: one answer is handed over once")
            if rule.window > self.window:
                raise InvalidOption(f"{self.name}: {part}='{rule}' looks at {rule.window} tokens: let window be at least that")

    def log_weights(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """The target of whichever of the rules has its turn; p̃ behind the last word of the aligners, even of broken ones.

        Whether they have left already depends on how far somebody drafts, and must not be noticed.
        """
        assert context is not None
        before, after = (
            logp if rule is self.after and self.lets_go else rule.target(logp, logqs, weights, **rule.seen(part))
            for rule, part in self._parts(context)
        )
        return torch.where(_handed(context).unsqueeze(-1), after, before)

    def target(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """As for every rule, and that rule's target to the bit."""
        return self._cut(logp, logqs, weights, context) if logqs else logp

    def marked(self, logp: Tensor, logqs: Sequence[Tensor], weights: Tensor, *, context: Context | None = None) -> Tensor:
        """Which rows `[...]` come after the hand-over."""
        assert context is not None
        return _handed(context).expand(logp.shape[:-1])

    def hands_over_at(self, logps: Sequence[float]) -> int | None:
        """After how many tokens of an answer it hands over, by their log-probabilities under p̃; None if it does not."""
        ends = range(self.window, len(logps) + 1)
        return next((end for end in ends if math.fsum(logps[end - self.window : end]) / self.window >= self._least), None)

    @property
    def lets_go(self) -> bool:
        """If the proposal goes on."""
        return isinstance(self.after, Proposal)

    def check_weights(self, weights: Sequence[float]) -> None:
        """As both rules have it."""
        self.before.check_weights(weights)
        self.after.check_weights(weights)

    def default_weights(self, aligners: int) -> tuple[float, ...]:
        """Those of the rule before, with which the other one must do, too."""
        return self.before.default_weights(aligners)

    def bind(self, eos_token_ids: Sequence[int]) -> Self:
        """With both rules bound."""
        before, after = self.before.bind(eos_token_ids), self.after.bind(eos_token_ids)
        return self if (before, after) == (self.before, self.after) else dataclasses.replace(self, before=before, after=after)

    # ---- what it remembers: whether it has handed over, and what the rules do

    @property
    def state_size(self) -> int:
        """One number, and those of the rules."""
        return 1 + self.before.state_size + self.after.state_size

    def initial_state(self) -> Sequence[float]:
        """Nothing is handed over yet."""
        return (0.0, *self.before.initial_state(), *self.after.initial_state())

    def advance(self, context: Context, tokens: Tensor, logp: Tensor) -> Tensor:
        """Hand over where the last tokens, this one among them, are likely enough; NaN, of the prompt's, never is."""
        mean = torch.cat([context.logp[..., 1:], logp.unsqueeze(-1)], -1).mean(-1)
        states = [(_handed(context) | (mean >= self._least)).to(context.state.dtype).unsqueeze(-1)]
        for rule, part in self._parts(context):
            states.append(rule.advance(part, tokens, logp) if rule.state_size else part.state)
        return torch.cat(states, -1)

    @property
    def _least(self) -> float:
        """The mean log-probability from which it hands over."""
        return math.log(self.threshold) - ROUNDING if self.threshold else -math.inf

    def _parts(self, context: Context) -> list[tuple[Rule, Context]]:
        """Each of the rules with what it sees."""
        parts, start = [], 1
        for rule in (self.before, self.after):
            w = self.window - rule.window
            state = context.state[..., start : start + rule.state_size]
            parts.append((rule, context._replace(tokens=context.tokens[..., w:], logp=context.logp[..., w:], state=state)))
            start += rule.state_size
        return parts


def _handed(context: Context) -> Tensor:
    """Whether each row `[...]` comes after the hand-over."""
    return context.state[..., 0] > 0
