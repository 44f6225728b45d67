"""What an objective is: a value that says what a run minimises, which answers and rows that takes, and what is logged of it.

A loss has two steps. A `TokenLoss` gives each answer token a number, from the rows of aligner and proposal. The objective's
`loss` makes one number of an example out of its tokens' numbers. Training takes the first step for a whole micro-batch, from
logits; looks at the development data take it piece by piece, from rows; so an objective sees neither logits nor pieces, and the
trainer knows no objective by name.

To add an objective, write a frozen dataclass with a `name`, its options as fields, `token_losses` and `loss`; register it here,
or name it in the entry-point group `trimtab.objectives`. Its options become flags of `trimtab train`. docs/extending.md shows
one.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from trimtab.errors import InvalidOption
from trimtab.options import check_ranges
from trimtab.registry import Registry
from trimtab.train.objectives.losses import Decoded
from trimtab.train.objectives.seen import Batch, Setting, TokenLoss

__all__ = ["OBJECTIVES", "EqualPairs", "Objective", "option_kinds"]


class EqualPairs(NamedTuple):
    """What an objective does with a pair of two equal answers."""

    does: str
    """In words, for the log."""
    dropped: bool = False
    """Whether such examples are left out altogether."""
    needed: bool = True
    """Whether there must be pairs that differ."""
    instead: str = ""
    """What to do where there are none."""


@dataclass(frozen=True)
class Objective:
    """What a run minimises. Fields are its options; None stands for a default that depends on the run.

    Raises:
        InvalidOption: an option is out of its range.
    """

    name: ClassVar[str]
    likely: ClassVar[bool] = False
    """Whether it is the likelihood of what is decoded, so that the weight that is tuned on it should be the one trained at."""
    residual: ClassVar[bool] = False
    """Whether an aligner trained for `product` becomes what the proposal lacks, and so is no language model."""
    rewarded: ClassVar[bool] = False
    """Whether it learns from samples and their rewards (`Batch.rewards`), drawn as it trains, and not from answers."""
    budgeted: ClassVar[bool] = False
    """Whether `--max_kl` can settle its `beta`, the price of divergence in units of reward."""
    keeps: ClassVar[bool] = False
    """Whether a head may be kept at the proposal by samples of its own, whose token losses are then KL(proposal‖head)."""
    equal_pairs: ClassVar[EqualPairs] = EqualPairs("kept", needed=False)

    def __post_init__(self) -> None:
        """Check the ranges and the choices of the fields."""
        check_ranges(self)
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices is not None and value is not None and value not in choices:
                raise InvalidOption(f"{field.name} must be one of {', '.join(map(str, choices))}, not {value!r}")

    def settle(self, setting: Setting) -> Self:
        """The same with defaults filled in, as far as they can be by what is known.

        Raises:
            InvalidOption: it cannot train what is asked for, or an option has no effect.
        """
        return self

    def announce(self, setting: Setting) -> None:
        """Log what the data have settled of the options as they were asked for."""

    def fits(self, setting: Setting) -> tuple[str, ...]:
        """The rules that decode what it trains; with another one a run goes on, with a warning. Empty: any."""
        return ()

    @property
    def answers(self) -> tuple[str, ...]:
        """Which answers its loss looks at: `("chosen",)`, or `("chosen", "rejected")`."""
        return ("chosen",)

    def reads(self, setting: Setting) -> bool:
        """Whether its loss reads the proposal's rows. A head has them at hand; for others they are cached."""
        return any(loss.reads_proposal for loss in self.token_losses(setting))

    @property
    def edits(self) -> int | None:
        """How many neighbours of an edit count with it, where its loss looks at `Batch.edited`; None where it does not."""
        return None

    @property
    def prefixes(self) -> bool:
        """Whether it also learns from what everything is worth that a sample begins with (`Batch.prefix_rewards`)."""
        return False

    def compares(self, setting: Setting) -> bool:
        """Whether its loss compares with what the proposal gave the tokens of both answers, see `Batch.gain`."""
        return False

    def token_losses(self, setting: Setting) -> tuple[TokenLoss, ...]:
        """All that `loss` asks for in a look; the first is of −log-probabilities as the objective sees the model."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> Tensor:
        """One loss for each example `[B]`; the mean over examples is minimised."""
        raise NotImplementedError

    def tuned(self, setting: Setting) -> TokenLoss:
        """What the weight is tuned by on the development data."""
        return Decoded()

    def figures(self, setting: Setting) -> Mapping[str, TokenLoss]:
        """What is logged beside the diagnostics of every run: means over the wanted development tokens, by name."""
        return {}

    def has_reference(self, setting: Setting) -> bool:
        """Whether it prefers the decoded model to the proposal: likelihood is then no reason to leave the trained weight."""
        return False

    def arguments(self, setting: Setting) -> Mapping[str, Any]:
        """`transformers.TrainingArguments` whose defaults it has otherwise."""
        return {}

    def taught(self) -> "Objective | None":
        """What learns a teacher's rows in its place; None if it can learn from tokens alone."""
        return None

    def described(self) -> dict[str, Any]:
        """Its options as `run.json` has them.

        Those that are `later` are left out at their defaults: earlier runs, which do not have them, can be gone on with.
        """
        later = {field.name: field.default for field in dataclasses.fields(self) if field.metadata.get("later")}
        own = dataclasses.asdict(self)
        return {name: value for name, value in own.items() if name not in later or value != later[name]}


KINDS = (int, float, bool, str)
"""What an option of an objective may be, or None."""


def _check(value: Any) -> None:
    """Refuse an entry point's value that is no objective."""
    if not (isinstance(value, type) and issubclass(value, Objective)):
        raise InvalidOption("it is no subclass of trimtab.train.objectives.Objective")
    name = getattr(value, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise InvalidOption("its `name` must be an identifier, for manifests have it")
    if "__dataclass_fields__" not in vars(value):
        raise InvalidOption("it must be a frozen dataclass")
    if value.loss is Objective.loss or value.token_losses is Objective.token_losses:
        raise InvalidOption("it lacks `token_losses` or `loss`")
    try:
        kinds = option_kinds(value)
    except (NameError, TypeError) as error:
        raise InvalidOption(f"its annotations cannot be read: {error}") from error
    for field in dataclasses.fields(value):
        if "help" not in field.metadata:
            raise InvalidOption(f"its field '{field.name}' is no trimtab.options.option")
        if kinds[field.name] not in KINDS:
            raise InvalidOption(f"its option '{field.name}' must be an int, a float, a bool or a str, or one of these or None")


def option_kinds(kind: type[Objective]) -> dict[str, Any]:
    """The type of each option's value, None apart."""
    own = {field.name: field.type for field in dataclasses.fields(kind)}
    if any(isinstance(hint, str) for hint in own.values()):  # of a module that postpones annotations
        own = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in own}
    found = {}
    for name, hint in own.items():
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        found[name] = hint if not parts else parts[0] if isinstance(hint, types.UnionType) and len(parts) == 1 else None
    return found


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "trimtab.objectives", _check)
"""Every objective by its name."""
