"""What a drafter is: it says how texts may go on, it is told how they did, and it decides nothing.

A step hands a drafter the texts that are decoded together (`Step`), and gets tokens for their next positions (`Drafted`), which
the aligned model then verifies. *Certain* tokens were looked up somewhere. Others were drawn from rows, which come with them.
The law of a text is the rule's whatever is drafted; for a seed, tokens depend on what is drafted at each position. So a draft
must depend on the text before its position alone: not on how many are asked for, nor on the neighbours.
`tests/decode/test_drafters.py` holds every drafter to that.

A drafter of one's own inherits from `TextDrafter`, if it looks tokens up, or from `Drafter`, and is brought by an entry point
in the group `trimtab.drafters` (docs/extending.md), or given as `AlignedModel(..., draft=…)`.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from trimtab.core.draw import NO_TOKEN
from trimtab.core.transfer import to_device
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption
from trimtab.models.base import LanguageModel
from trimtab.registry import Registry

__all__ = ["DRAFTERS", "Drafted", "Drafter", "Given", "Step", "TextDrafter", "check_drafter", "register"]


LONGEST = 80
"""Characters of a drafter's settings that are shown; of longer ones, such as a table, a digest stands for them."""


class Drafted(NamedTuple):
    """Drafts for b texts at their next P positions, the bonus position included."""

    tokens: Tensor | None = None
    """`[b, P]` int64, one for each position; None if there is none at all. Where certain tokens end, `NO_TOKEN` stands.
    `[b, P − 1]`, none for the bonus position, will do where the step is `greedy`."""
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
    """Whether drafts are drawn from rows, so that a draft temperature means something."""
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
        """What tells it from others, as far as it decides which tokens a seed gives. It is part of what files keep."""
        drafter: Any = self
        if not (dataclasses.is_dataclass(drafter) and dataclasses.fields(drafter)):
            return self.name
        said = repr(self)
        return said if len(said) <= LONGEST else f"{self.name} sha256:{hashlib.sha256(said.encode()).hexdigest()[:16]}"

    @property
    def who(self) -> str:
        """Who drafts, in words."""
        return f"the drafter {self.identity}"

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

    def draft(self, step: Step) -> Drafted:
        """Draft for the next positions of some texts, never waiting for the device."""
        raise NotImplementedError


class TextDrafter(Drafter):
    """One that looks tokens up: its drafts are certain, and come from the text or from what it has kept elsewhere."""

    has_rows: ClassVar[bool] = False

    def guess(self, memory: Any, count: int) -> Sequence[int]:
        """The next tokens of a text, up to `count`, each as if those before it had been accepted; fewer if it knows no more.

        `NO_TOKEN` stands for a place of which it knows nothing.
        """
        raise NotImplementedError

    def draft(self, step: Step) -> Drafted:
        """What is guessed, on the device.

        Raises:
            InvalidOption: a guess is no token.
        """
        guesses = [list(self.guess(memory, step.width))[: step.width] for memory in step.memories]
        for token in (token for guess in guesses for token in guess if not NO_TOKEN <= token < step.vocab_size):
            raise InvalidOption(f"draft: '{self.name}' guessed {token}, and ids are from 0 to {step.vocab_size - 1}")
        padded = [[*guess, *[NO_TOKEN] * (step.width - len(guess))] for guess in guesses]
        return Drafted(to_device(padded, step.newest.device))


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


DRAFTERS: Registry[type[Drafter]] = Registry("drafter", "trimtab.drafters", check_drafter)
"""Every kind of drafter by its name: ours, and those of other packages' entry points."""


def register(drafter: type[Drafter]) -> None:
    """Put a kind of drafter into `DRAFTERS`."""
    check_drafter(drafter)
    DRAFTERS.register(drafter)
