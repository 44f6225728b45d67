"""A team of aligners as a reward: how much more likely the team makes an answer than the proposal does.

With r(x, y) = log P_team(y|x) − log P_M(y|x) and β = 1, the sequence-level target P_M·e^{r/β} is P_team itself, token by token.
So whatever is trained by this reward becomes one aligner that decodes as the team does, in one pass of one model.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.core.rules import Rule, parse_rule
from trimtab.errors import InvalidOption
from trimtab.files import json_digest
from trimtab.judges.base import Asked
from trimtab.judges.rewards.base import Ids
from trimtab.judges.rewards.tokens import TokenReward

if TYPE_CHECKING:
    from trimtab.decode.aligned import AlignedModel

__all__ = ["TeamReward"]

LEAST = -20.0
"""Nats that a token takes from an answer at most: the team may never say it, and no reward is infinite."""


class TeamReward(TokenReward):
    """Log P_team − log P_M, summed over an answer's tokens; each counts for at least −20 nats, also if the team never says it.

    Args:
        proposal: P_M: a folder, a hub id, or whatever `AlignedModel.from_pretrained` takes.
        aligners: the team, each likewise.
        rule: that it is decoded by. Default: what the manifests say, or `product`.
        weight: λ of each aligner. Default: what the manifests say, or the rule's own.
        dtype, device: how folders are loaded.

    Raises:
        InvalidOption: there is no aligner, not one weight for each, or the rule cannot score or has no law for the weights.
    """

    name = "team"

    def __init__(
        self,
        proposal: Any,
        aligners: Sequence[Any],
        *,
        rule: str | None = None,
        weight: Sequence[float] | None = None,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        if not aligners:
            raise InvalidOption("aligner: a team needs at least one")
        if weight is not None and len(weight) != len(aligners):
            raise InvalidOption(f"weight: there are {len(aligners)} aligners, but {len(weight)} weights: give one for each")
        if rule is not None:
            _check_scores(parse_rule(rule))
            if weight is not None:
                parse_rule(rule).check_weights(weight)
        self.proposal, self.aligners, self.rule, self.weight = proposal, tuple(aligners), rule, weight
        self.called = "the team"
        self._how: dict[str, Any] = {"dtype": dtype, "device": device}
        self._team: AlignedModel | None = None

    def load(self, asked: Asked, date: str) -> None:
        """Load the proposal and the team.

        Raises:
            ModelError: one of them cannot be loaded, or an aligner's vocabulary is another one.
            InvalidOption: the manifests disagree on something that is not said.
        """
        if self._team is not None:
            return
        from trimtab.decode.aligned import AlignedModel

        how = {"rule": self.rule, "weight": self.weight, "draft": "none", "date": date, **self._how}
        self._team = team = AlignedModel.from_pretrained(self.proposal, list(self.aligners), **how)
        self.encoder, self.tokenizer = team.encoder, team.tokenizer
        self.date = team.encoder.chat_settings["date"]
        law = team.shaping(team.defaults)
        _check_scores(law.rule)
        self.fingerprint = f"sha256:{json_digest([*team.fingerprints, repr(law)])}"

    @property
    def team(self) -> "AlignedModel":
        """The loaded models.

        Raises:
            RuntimeError: they are not loaded yet.
        """
        if self._team is None:
            raise RuntimeError("the team is not loaded yet")
        return self._team

    def score_tokens(self, prompts: Sequence[Any], ids: Ids) -> list[float | None]:
        """The team's log-probabilities, minus the proposal's."""
        prompts, answers = ([list(one) for one in part] for part in ids)
        scores = self._or_fail(self.team.score, prompts, answers)
        pairs = [zip(score.aligned, score.proposal, strict=True) for score in scores]
        return [sum(LEAST if ours == -math.inf else max(LEAST, ours - bare) for ours, bare in pair) for pair in pairs]

    def describe(self) -> dict[str, Any]:
        """Who is in it, and how it is decoded, for the record."""
        law = self.team.shaping(self.team.defaults)
        aligners = [str(one) if isinstance(one, (str, Path)) else type(one).__name__ for one in self.aligners]
        return {"team": aligners, "weight": list(law.weights), "rule": str(law.rule), "fingerprint": self.fingerprint}


def _check_scores(rule: Rule) -> None:
    """Refuse a rule whose probabilities are not known."""
    if not rule.has_row:
        raise InvalidOption(f"rule: '{rule}' can sample, but not score, and a team is learnt from by its scores")
