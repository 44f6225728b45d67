"""Judges and what they are given: pairs of answers to one instruction, and a preference for each.

A judge prefers the second answer by a number from 1 to 2, as AlpacaEval writes it. A user asks for one by `KIND:ARGUMENT`, and
a `JudgeKind` makes it; `trimtab.judges.kinds` has all kinds. A judge keeps what it finds in a `Journal` and looks there first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from trimtab.journal import Journal

__all__ = ["Asked", "Judge", "JudgeKind", "Judgement", "Pair"]


@dataclass(frozen=True)
class Pair:
    """Two answers to compare.

    Attributes:
        prompt: what was asked: a text or messages.
        instruction: the same as a text to show.
        output_1, output_2: the baseline's answer and the system's.
        reference: a wanted answer, if there is one.
        columns: what else the data have of the prompt, by column; empty where no judge reads that.
    """

    prompt: Any
    instruction: str
    output_1: str
    output_2: str
    reference: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """A judge's opinion of a pair.

    Attributes:
        preference: 1 to 2, 2 where the second is better; None if there is none.
        orders: what an endpoint said with the first answer shown first, and with the second shown first, both from 1 to 2 as
            above; None for judges that do not see both, or were asked once.
        scores: the scores of the two answers, from judges that score.
        why_missing: why there is no preference.
    """

    preference: float | None
    orders: tuple[float, float] | None = None
    scores: tuple[float, float] | None = None
    why_missing: str = ""


class Asked(Protocol):
    """What will be asked, before anybody has answered; all of one length."""

    @property
    def prompts(self) -> Sequence[Any]:
        """Texts or chats."""

    @property
    def references(self) -> Sequence[str | None]:
        """Wanted answers, or None."""

    @property
    def columns(self) -> Sequence[Mapping[str, Any]]:
        """What else the data have of each prompt; empty altogether where nobody reads it."""

    @property
    def sources(self) -> Sequence[str]:
        """Where each came from, for errors."""


class Judge(ABC):
    """Compares pairs. A run calls `reach`, `check`, `load`, then `judge`; what a judge needs none of it leaves as it is.

    Attributes:
        kind: what results call its kind.
        name: what results, reports and files call it.
        called: what messages call it: the option and its value.
        questions: how many questions of a pair it puts to somebody who may want to be paid; 0 for none.
        by_reference: whether it compares with the data's wanted answers, which are then no contest for it.
        reads_columns: whether it looks at `Pair.columns`.
        tokenizer: the tokenizer whose chat template it uses, once it is loaded; None without one.
    """

    kind: ClassVar[str]
    name: str
    called: str = ""
    questions: int = 0
    by_reference: bool = False
    reads_columns: bool = False
    tokenizer: Any = None

    def reach(self) -> None:  # noqa: B027 - not every judge has to
        """See whether whoever it asks is there; it is soon said if not.

        Raises:
            EndpointError: nobody is.
        """

    def check(self, asked: Asked, where: str) -> None:  # noqa: B027 - not every judge has to
        """Refuse prompts that it could not judge the answers to, before anything is loaded.

        Args:
            asked: what will be asked.
            where: what the data set is called.

        Raises:
            DataError, InvalidOption: naming the place in the data.
        """

    def load(self, asked: Asked, date: str) -> None:  # noqa: B027 - not every judge has to
        """Load what it needs, and refuse prompts that only this can tell of.

        Args:
            asked: what will be asked.
            date: what chat templates take for today, `YYYY-MM-DD`.

        Raises:
            ModelError, DataError: it cannot be loaded, or cannot take a prompt.
        """

    @abstractmethod
    def judge(self, pairs: Sequence[Pair], journal: Journal) -> list[Judgement]:
        """An opinion of each pair, asking only for what the journal does not have."""

    def describe(self) -> Mapping[str, Any]:
        """What it is, for the record, as JSON has it."""
        return {}

    def cost(self) -> Mapping[str, Any] | None:
        """What it has cost, earlier parts of the run included; None if it is free."""
        return None


@dataclass(frozen=True)
class JudgeKind:
    """A kind of judge: how `KIND:ARGUMENT` becomes one.

    Attributes:
        name: the `KIND`.
        help: one line for `--help`: what `ARGUMENT` is, and who judges.
        make: from the argument, and the options that it reads by name, a judge. It checks both, and asks and loads nothing.
            It raises `InvalidOption` for what cannot be.
        reads: which options of `trimtab eval` a judge of this argument reads.
        short: the argument that a text without a kind stands for; None if it is none of this kind.
    """

    name: str
    help: str
    make: Callable[[str, Mapping[str, Any]], Judge]
    reads: Callable[[str], Sequence[str]] = lambda argument: ()
    short: Callable[[str], str | None] = lambda text: None
