"""What a drafter is: it says how texts may go on, it is told how they did, and it decides nothing.

*Certain* drafts are looked up somewhere, text by text, before a step (`Drafter.look`). They play no part in the tokens of a
seed: those are what they are without drafts. So a drafter of certain tokens may learn from whatever it sees, other texts too.

Other drafts are *drawn* from rows. A step hands a drafter the texts that are decoded together (`Step`), and gets tokens and
their rows (`Drafted`). The law of a text is the rule's whatever is drafted, but the tokens of a seed depend on what is drafted
at each position. So such a draft must depend on the text before its position alone: not on how many are asked for, nor on the
neighbours. `tests/decode/test_drafters.py` holds every drafter to all that.

A drafter of one's own inherits from `TextDrafter`, if it looks tokens up, or from `Drafter`, and is brought by an entry point
in the group `trimtab.drafters` (docs/extending.md), or given as `AlignedModel(..., draft=…)`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption
from trimtab.models.base import LanguageModel
from trimtab.registry import Registry

__all__ = ["DRAFTERS", "Drafted", "Drafter", "Given", "Guess", "Step", "TextDrafter", "check_drafter", "register"]


LONGEST = 80
"""Characters of a drafter's settings that are shown; of longer ones, such as a table, a digest stands for them."""


class Guess(NamedTuple):
    """The next tokens of one text, as far as they were looked up."""

    tokens: Sequence[int] = ()
    """Each as if those before it had been accepted. `NO_TOKEN` ends them."""
    odds: Sequence[float] | None = None
    """How likely each is to stay if those before it do; None to leave that to what became of the text's earlier guesses."""


class Drafted(NamedTuple):
    """Drafts for b texts at their next P positions, the bonus position included."""

    tokens: Tensor | None = None
    """`[b, P]` int64, one for each position; None if there is none at all. `NO_TOKEN` where there is none.
    `[b, P − 1]`, none for the bonus position, will do where the step is `greedy`, or they are certain."""
    rows: Tensor | None = None
    """Log-probabilities `[b, P, V]` that all of them were drawn from with `Step.draw`: the law depends on it. None where they
    are certain, or the step is `greedy`."""
    read: Mapping[int, Tensor] = {}
    """Rows `[b, P, V]` of models that have read all these tokens on the way, by their places, see `Step.rows`."""


class Step(NamedTuple):
    """What a drafter is given."""

    memories: Sequence[Any]
    """What the drafter's own `start` made for each text, and `accepted` kept up to date."""
    limits: Sequence[int]
    """How many drafts of each text may be accepted."""
    able: Sequence[bool]
    """Whether drafts of each text can be verified; those of others are not looked at."""
    newest: Tensor
    """`[b, 1]` the last token of each text; drafts belong on its device."""
    greedy: bool
    """Whether all texts take the best token: then a draft is the drafter's best one, and nothing is drawn."""
    aligners: int
    """How many aligners there are: the drafter's own models have the places behind theirs."""
    vocab_size: int
    """V"""
    draw: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor | None]]
    """From a drafting model's row `[b, 1, V]` and the drafts `[b]` before it to the next draft `[b, 1]`, and the row that it
    was drawn from, with the texts' own sampling knobs; None for a row where the step is `greedy`."""
    rows: Callable[[int, Tensor | None, Sequence[int]], Tensor]
    """The next rows `[b, 1, V]` of the model at a place: 1 … n for aligners, from n + 1 on for the drafter's own. It reads what
    it has not read of each text, for the token None; then token by token `[b, 1]`. Texts whose count is 0 are left out."""

    @property
    def width(self) -> int:
        """P: the most drafts of a text, and the bonus position."""
        return max(self.limits) + 1


def refuse_to_load(source: str) -> LanguageModel:
    """Where nothing is loaded.

    Raises:
        InvalidOption: always.
    """
    raise InvalidOption(f"draft: name '{source}' to AlignedModel.from_pretrained, which loads models, or give a loaded one")


class Given(NamedTuple):
    """What a drafter that is named in text may be made of."""

    tokenizer: Any
    """The proposal's; None where there are only ids."""
    load: Callable[[str], LanguageModel] = refuse_to_load
    """Loads a model from a folder or a hub id, and checks that it has the proposal's vocabulary."""


class Drafter:
    """What drafters have in common. Equal drafters are interchangeable: requests that differ in nothing else share a group."""

    name: ClassVar[str]
    takes: ClassVar[str | None] = None
    """What stands behind `NAME:` where it is named, in a word, such as `FILE`; None where nothing does."""
    drafts: ClassVar[bool] = True
    """Whether it drafts at all."""
    has_rows: ClassVar[bool] = True
    """Whether drafts are drawn from rows, so that a draft temperature means something, and a seed means other tokens."""
    looks: ClassVar[bool] = False
    """Whether it looks its drafts up with `look`, before a step, so that how many are worth verifying can depend on them."""
    from_aligner: ClassVar[bool] = False
    """Whether the first aligner drafts, whose rows are needed anyway."""

    @classmethod
    def make(cls, argument: str | None, given: Given) -> Self:
        """One from its name and what stands behind the colon.

        Args:
            argument: that; None if there is no colon.
            given: what it may be made of.

        Raises:
            InvalidOption: nothing may stand there, or something must, or it cannot be used.
        """
        if cls.takes is None and argument is not None:
            raise InvalidOption(f"draft: '{cls.name}' takes nothing behind its name, not '{argument}'")
        if cls.takes is not None and not argument:
            raise InvalidOption(f"draft: '{cls.name}' wants to know more: {cls.name}:{cls.takes}")
        return cls() if cls.takes is None else cls(argument)  # type: ignore[call-arg]

    @property
    def identity(self) -> str:
        """What tells it from others, as far as it decides which tokens a seed gives. It is part of what files keep.

        Certain drafts decide nothing, as if nobody drafted.
        """
        if not self.has_rows:
            return "none"
        return _describe(self)

    @property
    def who(self) -> str:
        """Who drafts, in words."""
        return f"the drafter {_describe(self)}"

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """Models that are run for it alone: they read each prompt, and keep what they have read."""
        return ()

    def on(self, models: tuple[LanguageModel, ...]) -> "Drafter":
        """The same with other `models`: those that adapters are on."""
        return self

    def temperature(self, shaping: Shaping, wanted: float | None) -> float:
        """That of the rows that drafts are drawn from, on top of a request's own.

        Args:
            shaping: how the request's aligned row comes about.
            wanted: what the user says, if anything.
        """
        return wanted or 1.0

    def start(self, tokens: Sequence[int]) -> Any:
        """What it keeps of a text: a memory that starts with these tokens."""
        return None

    def accepted(self, memory: Any, tokens: Sequence[int]) -> None:
        """Tell a text's memory the tokens by which the text has grown: the drafts that stayed, and the one behind them."""

    def look(self, memory: Any, count: int) -> Guess:
        """The next tokens of a text, up to `count`, for a drafter that `looks`."""
        raise NotImplementedError

    def draft(self, step: Step) -> Drafted:
        """Draft for the next positions of some texts, never waiting for the device; for a drafter that does not `look`."""
        raise NotImplementedError


class TextDrafter(Drafter):
    """One that looks tokens up: its drafts are certain, and come from the text or from what it has kept elsewhere."""

    has_rows: ClassVar[bool] = False
    looks: ClassVar[bool] = True

    def guess(self, memory: Any, count: int) -> Sequence[int] | Guess:
        """The next tokens of a text, up to `count`, each as if those before it had been accepted; fewer if it knows no more.

        A `Guess` says besides how likely they are.
        """
        raise NotImplementedError

    def look(self, memory: Any, count: int) -> Guess:
        """What is guessed."""
        found = self.guess(memory, count)
        return found if isinstance(found, Guess) else Guess(found)


def check_drafter(drafter: Any) -> None:
    """Refuse what cannot be a drafter that is asked for by name.

    Raises:
        InvalidOption: it is no class of drafters with a name that text can say.
    """
    if not (isinstance(drafter, type) and issubclass(drafter, Drafter)):
        raise InvalidOption(f"a drafter is a class that inherits from trimtab.decode.drafters.Drafter, and this is {drafter!r}")
    name = getattr(drafter, "name", None)
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise InvalidOption(f"{drafter.__name__} needs a name of letters, digits, '_' and '-', such as 'my_drafter'")


def _describe(drafter: Any) -> str:
    """A drafter's name with its settings, or their digest where they are long."""
    name, said = str(drafter.name), repr(drafter)
    if not (dataclasses.is_dataclass(drafter) and dataclasses.fields(drafter)):
        return name
    return said if len(said) <= LONGEST else f"{name} sha256:{hashlib.sha256(said.encode()).hexdigest()[:16]}"


DRAFTERS: Registry[type[Drafter]] = Registry("drafter", "trimtab.drafters", check_drafter)
"""Every kind of drafter by its name: ours, and those of other packages' entry points."""


def register(drafter: type[Drafter]) -> None:
    """Put a kind of drafter into `DRAFTERS`."""
    check_drafter(drafter)
    DRAFTERS.register(drafter)
