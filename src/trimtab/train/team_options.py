"""What `trimtab distil` can be told: a team of aligners, and the training run that makes one of them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.options import DataOptions
from trimtab.errors import InvalidOption
from trimtab.judges.rewards.team import TeamReward
from trimtab.knobs import MAX_FACTOR
from trimtab.options import Flag, check_ranges, check_required, help_of, option, same
from trimtab.train.objectives.base import option_kinds
from trimtab.train.objectives.tb import TrajectoryBalance
from trimtab.train.options import TrainOptions

__all__ = ["DistilOptions"]

BETA = 1.0
"""The price at which the target is the team."""


def _balance_flags() -> dict[str, Flag]:
    """Those of the objective, but for β."""
    kinds, options = option_kinds(TrajectoryBalance), dataclasses.fields(TrajectoryBalance)
    return {one.name: Flag(kinds[one.name], help_of(one)) for one in options if one.name != "beta"}


@dataclass(frozen=True)
class DistilOptions(DataOptions):
    """The team, the student, and those options of `trimtab train` that say something of such a run."""

    proposal: str = option("", "the frozen model of the team and of the student: a folder or a hub id", required=True)
    proposal_id: str | None = same(TrainOptions, "proposal_id")
    aligner: tuple[str, ...] = option((), "one of the team: a folder or a hub id; may repeat", required=True, metavar="A")
    weight: tuple[float, ...] = option(
        (),
        "the weight of each --aligner in the team, in their order; may repeat [default: what the manifests say, or the rule's]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    rule: str | None = option(
        None, "the rule that the team is decoded by, of those that can score [default: what the manifests say, or product]"
    )
    student: str = option(
        "",
        "the aligner to train: a model of the same vocabulary, or an adapter or head to train on: a folder or a hub id"
        " [default: a fresh head]",
    )
    head_layers: int | None = same(TrainOptions, "head_layers")
    dataset: str = option("", "prompts: JSONL(.gz), Parquet or a hub id; answers in it are not looked at", required=True)
    output_dir: str = option("", "where checkpoints, rounds and the finished student go", required=True)
    eval_dataset: str | None = same(TrainOptions, "eval_dataset")
    dev_fraction: float = same(TrainOptions, "dev_fraction")
    max_examples: int | None = same(TrainOptions, "max_examples")
    chat_template_path: str | None = same(TrainOptions, "chat_template_path")
    date: str | None = same(TrainOptions, "date")
    max_length: int = same(TrainOptions, "max_length")
    max_tokens: int | None = same(TrainOptions, "max_tokens", help="most tokens of an answer that is drawn [default: 256]")
    num_generations: int | None = same(
        TrainOptions, "num_generations", help="answers to a prompt that are compared with each other [default: 8]"
    )
    dev_prompts: int | None = same(
        TrainOptions, "dev_prompts", help="development prompts that a look draws --num_generations answers to [default: 32]"
    )
    max_num_seqs: int | None = same(TrainOptions, "max_num_seqs", help="most answers drawn at once [default: 32]")
    use_peft: bool = same(TrainOptions, "use_peft", help="train a LoRA adapter on --student instead of all of its weights")
    lora_r: int = same(TrainOptions, "lora_r")
    lora_alpha: int = same(TrainOptions, "lora_alpha")
    lora_dropout: float | None = same(TrainOptions, "lora_dropout", help="LoRA dropout [default: 0]")
    lora_target_modules: tuple[str, ...] = same(TrainOptions, "lora_target_modules")
    dtype: str = same(TrainOptions, "dtype", help="dtype of the proposal and the team; the student's weights are float32")
    device: str | None = same(TrainOptions, "device", help="device of all of them [default: the first GPU, or the CPU]")
    overwrite_output_dir: bool = same(TrainOptions, "overwrite_output_dir")
    balance: dict[str, Any] = field(
        default_factory=dict, metadata={"nested": _balance_flags, "title": "options of the objective, trajectory balance"}
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=next(one.metadata for one in dataclasses.fields(TrainOptions) if one.name == "training"),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be, whether of the team or of the run.

        Raises:
            InvalidOption: names the option and says why.
        """
        check_required(type(self), vars(self))
        check_ranges(self)
        run = self.training_run
        for aligner in self.aligner:
            if run.would_overwrite(aligner):
                raise InvalidOption(f"output_dir holds an aligner of the team, {aligner}: choose another one")

    @property
    def training_run(self) -> TrainOptions:
        """The run of `trimtab train` that this is: its reward is the team, at the price at which the target is the team."""
        how: dict[str, Any] = {"rule": self.rule, "dtype": self.dtype, "device": self.device}
        team = TeamReward(self.proposal, self.aligner, weight=self.weight or None, **how)
        apart = {"rule", "weight", "aligner"}
        names = {one.name for one in dataclasses.fields(self)} & {one.name for one in dataclasses.fields(TrainOptions)} - apart
        given = {name: getattr(self, name) for name in names}
        given |= {"aligner": self.student, "objective": TrajectoryBalance.name, "reward": (team,)}
        return TrainOptions(**given, objective_options={"beta": BETA, **self.balance})

    def idle(self) -> dict[str, str]:
        """What the run leaves unread."""
        return self.training_run.idle()
