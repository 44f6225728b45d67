"""Sampling whole sequences instead of tokens: what may be asked for, and of which requests it can be.

The *token-level* law draws each token from p_t = w_t / Z_t, where w_t(v) = p̃(v)·q(v)^λ under `product`. The *sequence-level*
one is Π_t w_t(y_t) / Z over whole sequences. They differ by Π_t Z_t, so no setting of a row leads from one to the other: a
population of weighted particles does (`trimtab.decode.particles`).
"""

import ast
import dataclasses
from dataclasses import dataclass
from typing import Any

from trimtab.core.rules import Rule
from trimtab.decode.request import SamplingParams, refuse_row_settings
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidRequest

__all__ = [
    "MAX_PARTICLES",
    "SequenceLevel",
    "check_sequence_level",
    "parse_sequence_level",
    "refuse_knobs",
    "refuse_rule",
]

MAX_PARTICLES = 65536
"""Far beyond what pays; it keeps a slip of the keyboard from filling the memory."""


@dataclass(frozen=True)
class SequenceLevel:
    """How to draw whole sequences from the sequence-level law, by sequential Monte Carlo.

    Attributes:
        particles: how many texts grow side by side for one completion. The law is exact in the limit.
        ess: resample where the effective size of the weights is below this share of the particles: 0 for never, which is plain
            importance sampling, 1 for whenever the weights differ.
    """

    particles: int
    ess: float = 0.5

    def __post_init__(self) -> None:
        """Check both."""
        if type(self.particles) is not int or not 2 <= self.particles <= MAX_PARTICLES:
            raise InvalidRequest(
                f"sequence_level: particles must be an integer from 2 to {MAX_PARTICLES}, not {self.particles!r};"
                " a single one follows the token-level law, which is the default"
            )
        if isinstance(self.ess, bool) or not isinstance(self.ess, int | float) or not 0 <= self.ess <= 1:
            raise InvalidRequest(f"sequence_level: ess must be a number from 0 to 1, not {self.ess!r}")

    def __str__(self) -> str:
        """As `parse_sequence_level` reads it."""
        return f"particles={self.particles},ess={self.ess:g}"


def parse_sequence_level(asked: Any) -> SequenceLevel:
    """Read `particles=16` or `particles=16,ess=0.3`; a `SequenceLevel` is one already.

    Raises:
        InvalidRequest: it says something else.
    """
    if isinstance(asked, SequenceLevel):
        return asked
    known = [field.name for field in dataclasses.fields(SequenceLevel)]
    if not isinstance(asked, str):
        raise InvalidRequest(f"sequence_level must be a text such as 'particles=16', or a SequenceLevel, not {asked!r}")
    settings: dict[str, Any] = {}
    for part in asked.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in known or not equals:
            raise InvalidRequest(f"sequence_level: '{part.strip()}' is none of {', '.join(f'{name}=…' for name in known)}")
        if key in settings:
            raise InvalidRequest(f"sequence_level: '{asked}' gives {key} twice")
        try:
            settings[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise InvalidRequest(f"sequence_level: {key} must be a number, not '{value}'") from None
    if "particles" not in settings:
        raise InvalidRequest(f"sequence_level: '{asked}' lacks particles=…, how many texts grow side by side")
    return SequenceLevel(**settings)


def check_sequence_level(params: SamplingParams, shaping: Shaping) -> None:
    """Refuse a request that the sequence-level law means nothing for, or nothing else than the token-level one.

    Raises:
        InvalidRequest: it has no aligner, or what `refuse_rule` and `refuse_knobs` refuse.
    """
    if not shaping.aligners:
        raise InvalidRequest("sequence_level needs an aligner: the proposal alone is the same at both levels")
    refuse_rule(shaping.rule)
    refuse_knobs(params)


def refuse_rule(rule: Rule) -> None:
    """Refuse a rule whose rows are no token weights w_t(v), each by itself, so that there is no Π_t w_t(y_t) to draw from.

    Raises:
        InvalidRequest: it mixes several normalisers, or has no row; or it looks back, which is not done for particles.
    """
    if not rule.has_row or not rule.weighs_tokens:
        raise InvalidRequest(
            f"sequence_level: rule '{rule}' does not weigh each token by itself, so that no weight of a whole sequence is the"
            " product of theirs: use product, geometric, or nucleus without force_eos"
        )
    if rule.looks_back:
        raise InvalidRequest(f"sequence_level: rule '{rule}' looks at the text before a row, which is not kept for particles")


def refuse_knobs(params: SamplingParams) -> None:
    """Refuse what acts on the aligned row: it would change the row that tokens are drawn from, and so the law.

    Raises:
        InvalidRequest: names the knob.
    """
    if params.logprobs:
        raise InvalidRequest("logprobs are not kept at the sequence level: leave it out, and score the completions")
    refuse_row_settings(params, "acts on the row that tokens are drawn from, and sequence_level draws by the rule's own")
