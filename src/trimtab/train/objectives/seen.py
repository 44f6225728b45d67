"""What a loss sees: a run's setting, the rows of some answer tokens, and the examples of a batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from trimtab.core.objectives import per_example
from trimtab.core.rules import Rule
from trimtab.errors import InvalidOption
from trimtab.train.batches import cached_batch, log_mass, rows_at
from trimtab.train.rows import CachedRows, TaughtRows

__all__ = ["Batch", "Logits", "Rows", "Setting", "TokenLoss"]


class Setting(NamedTuple):
    """What an objective may know of the run that it is for."""

    rule: Rule
    weight: float
    """λ, that is trained or looked at."""
    temperature: float = 1.0
    """Of the aligner's rows."""
    head: bool = False
    """Whether the aligner is a head, which starts as the proposal and has its rows at hand."""
    taught: bool = False
    """Whether a teacher's rows are learnt."""
    tempered: bool = False
    """Whether the start is at temperatures that are fitted first."""
    records: int | None = None
    """How many there are; None while that is not known."""
    lacking: int = 0
    """How many of them have no rejected answer."""
    end: int | None = None
    """The end of sequence behind everything that a sample begins with, where the objective learns from that."""


class Rows(NamedTuple):
    """What a loss sees of n answer tokens."""

    tokens: Tensor
    """`[n]`."""
    logq: Tensor
    """`[n, V]` log-probabilities of the aligner, at its temperature."""
    proposal: Tensor | None
    """`[n, V]` log-probabilities of the proposal, at its temperature; None where they are not read."""
    setting: Setting
    taught: TaughtRows | None = None
    """A teacher's rows and the proposal's, where there is one."""
    level: Tensor | None = None
    """`[n]` log of the mass of the aligner's logits at its temperature; where it is read."""

    @property
    def logp(self) -> Tensor:
        """The proposal's rows `[n, V]`.

        Raises:
            InvalidOption: the loss does not say that it reads them.
        """
        if self.proposal is None:
            raise InvalidOption("objective: a token loss looks at rows.logp, and does not say reads_proposal = True")
        return self.proposal


class Logits(NamedTuple):
    """The same before a row has been made: for losses that need none. The proposal's rows are made when they are asked for."""

    logits: Tensor
    """`[M, W]` of the aligner, W ≥ V, in its own precision and at temperature 1."""
    positions: Tensor
    """`[n]`, which of them predict the tokens."""
    tokens: Tensor
    """`[n]`."""
    vocab_size: int
    setting: Setting
    proposal: Callable[[], CachedRows]
    teacher: Callable[[], TaughtRows]

    def rows(self, *, proposal: bool, level: bool = False) -> Rows:
        """As `TokenLoss.of_rows` takes them, with the proposal's or without, and with levels or without."""
        logq = rows_at(self.logits, self.positions, self.vocab_size, self.setting.temperature)
        logp = self.proposal().rebuild(self.vocab_size) if proposal else None
        teacher = self.teacher() if self.setting.taught else None
        where = self.logits, self.positions, self.vocab_size, self.setting.temperature
        return Rows(self.tokens, logq, logp, self.setting, teacher, log_mass(*where) if level else None)


@dataclass(frozen=True)
class TokenLoss:
    """A number for each answer token. Instances are values: equal ones are computed once for a batch."""

    reads_proposal: ClassVar[bool] = False
    """Whether `of_rows` looks at the proposal's rows."""
    reads_level: ClassVar[bool] = False
    """Whether it looks at `Rows.level`."""

    def of_rows(self, rows: Rows) -> Tensor:
        """The numbers `[n]`, differentiable in `rows.logq`."""
        raise NotImplementedError

    def of_logits(self, logits: Logits) -> Tensor:
        """The same from logits, with less work if there is a way: the contract suite holds it to `of_rows`."""
        return self.of_rows(logits.rows(proposal=self.reads_proposal, level=self.reads_level))


class Batch:
    """B examples as a loss sees them.

    Args:
        inputs: tensors of the batch, see `trimtab.train.batches.collate`.
        setting: of the run.
        mean_length: mean number of tokens in the training answers; losses are sums over tokens, divided by it.
        tokens: gives a token loss on the answers of a kind.
        training: whether a gradient is wanted; looks leave out what only keeps training in bounds.
    """

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        setting: Setting,
        mean_length: float,
        tokens: Callable[[TokenLoss, str], Tensor],
        *,
        training: bool,
    ) -> None:
        self._inputs, self._tokens = inputs, tokens
        self.setting, self.mean_length, self.training = setting, mean_length, training
        self._found: dict[tuple[TokenLoss, str], Tensor] = {}

    def tokens(self, loss: TokenLoss, which: str = "chosen") -> Tensor:
        """A loss that `Objective.token_losses` names, of each token of the `which` answers `[N]`."""
        if (loss, which) not in self._found:
            self._found[loss, which] = self._tokens(loss, which)
        return self._found[loss, which]

    def sum(self, values: Tensor, which: str = "chosen", *, edits: bool = False) -> Tensor:
        """Values `[N]` of tokens, or with `edits` of those that are `edited`, added up by example: `[B]`."""
        if edits:
            values = torch.where(self.edited(which), values, 0.0)
        return per_example(values, self._inputs[f"{which}_owner"], len(self._inputs["share"]))

    def gain(self, losses: Tensor, which: str = "chosen", *, edits: bool = False) -> Tensor:
        """By how much the `which` answers' log-probabilities `[B]` are above the proposal's, from each token's negative one.

        With `edits` those of tokens that are `edited`. For objectives that `compares` says it of.
        """
        return -self.sum(losses + cached_batch(self._inputs, which).token_logp, which, edits=edits)

    def edited(self, which: str = "chosen") -> Tensor:
        """Which tokens of the `which` answers are edits of the other answer, or as near to one as is asked for: `[N]`.

        Raises:
            InvalidOption: the objective does not say that it looks at them.
        """
        if f"{which}_edited" not in self._inputs:
            raise InvalidOption("objective: a loss looks at batch.edited, and its `edits` is None")
        return self._inputs[f"{which}_edited"]

    @cached_property
    def differs(self) -> Tensor:
        """`[B]`, whether the two answers of an example differ."""
        return self._inputs["differs"]

    def of_tokens(self, values: Tensor, which: str = "chosen") -> Tensor:
        """What examples have `[B]`, for each token of their `which` answers `[N]`."""
        return values[self._inputs[f"{which}_owner"]]

    def ends(self, which: str = "chosen") -> Tensor:
        """`[N]`, whether a token of the `which` answers is its answer's last one."""
        owner = self._inputs[f"{which}_owner"]
        return torch.cat([owner[1:] != owner[:-1], owner.new_ones(1, dtype=torch.bool)])

    @property
    def rewards(self) -> Tensor:
        """`[B]`; for objectives that are `rewarded`, as what follows."""
        return self._inputs["reward"]

    @property
    def prefix_rewards(self) -> Tensor:
        """`[N]` in float64, what each answer is worth that ends in a token's place, NaN for no score.

        Raises:
            InvalidOption: the objective does not say that it looks at them.
        """
        if "prefix_reward" not in self._inputs:
            raise InvalidOption("objective: a loss looks at batch.prefix_rewards, and its `prefixes` is False")
        return self._inputs["prefix_reward"]

    @property
    def cut(self) -> Tensor:
        """`[B]`, which samples their limit has cut; they have no end of sequence."""
        return self._inputs["cut"]

    @property
    def owner(self) -> Tensor:
        """`[N]`, which sample a token is of."""
        return self._inputs["chosen_owner"]

    @property
    def groups(self) -> Tensor:
        """`[B]`, numbers from 0 on that samples of one prompt share."""
        return self._inputs["group"]

    @property
    def beta(self) -> Tensor:
        """`[B]`, β as it is now."""
        return self._inputs["beta"]
