"""What `trimtab evolve` and `trimtab.evolve` can be told: what is collected, how a round is judged, and the training run."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from trimtab.data.options import TemplateOptions
from trimtab.decode.options import RowOptions
from trimtab.errors import InvalidOption
from trimtab.loop.trigger import Trigger, parse_trigger
from trimtab.options import check_ranges, option, same
from trimtab.train.options import TrainOptions, objective_flags

__all__ = ["LENGTH_BIAS", "EvolveOptions"]

LENGTH_BIAS = ("balance", "keep")
"""What becomes of votes for long answers."""

OF_ROUND = (
    "out", "feedback", "prompts", "refit_when", "rounds", "rollback", "proposal", "aligner", "held_out", "device",
    "max_num_seqs",
)  # fmt: skip
"""What a round that has begun does not depend on, or the loop's folder keeps."""


def _objective_help() -> str:
    return "what a round's training minimises, from pairs [default: preference]"


@dataclass(frozen=True)
class EvolveOptions(TemplateOptions):
    """The loop, and those options of `trimtab train` that say something of its rounds."""

    out: str = option("", "the loop's folder; OUT/current leads to the aligner in service", required=True, metavar="DIR")
    proposal: str = option("", "the frozen model, a folder or a hub id: to begin a loop, whose folder keeps it", metavar="P")
    aligner: str = option(
        "", "the aligner that a loop begins with; its folder keeps it [default: none: the first round trains a fresh head]",
        metavar="A",
    )  # fmt: skip
    feedback: tuple[str, ...] = option(
        (),
        "pairs of people's: what trimtab serve --feedback or the arena writes, or any data with 'chosen' and 'rejected';"
        " thumbs beside it count, too; may repeat",
        metavar="FILE",
    )
    prompts: str | None = option(
        None, "prompts to draw answers to, for --reward [default: those of lost votes alone]", metavar="D"
    )
    reward: str | None = option(
        None,
        "ranks answers that are drawn, and judges rounds without --feedback: what trimtab propose --reward takes",
        metavar="R",
    )
    expand: int | None = option(
        None,
        "so many prompts of each round, like those that the incumbent lost, get pairs of drawn answers [default: 64]",
        low=1,
    )
    num_generations: int = option(4, "answers to each of them, of which the best and the worst by --reward are a pair", low=2)
    max_tokens: int = option(256, "most tokens of an answer that is drawn", low=1)
    refit_when: str = option(
        "every(n=1)",
        "when a round begins: every(n=50) new votes, or drift(false_alarms=0.01, least=50, most=2000), when the incumbent"
        " explains new wanted answers less well than earlier ones",
        metavar="WHEN",
    )
    rounds: int = option(1, "rounds at most in this call", low=1)
    held_out: float | None = option(
        None,
        "share of the prompts that rounds are judged by, and that none is trained on; a loop keeps it [default: 0.2]",
        above=0,
        below=1,
    )
    false_promotions: float = option(
        0.01, "the chance that a loop ever promotes an aligner that is no better, over all its rounds", above=0, below=0.5
    )
    max_nll_loss: float = option(
        0.1, "nats a token that wanted held-out answers may be less likely than under the incumbent", low=0, high=100
    )
    key_share: float = option(
        0.1,
        "most that one key may count for, of everything, or twice an equal share if that is more; 1 trusts every key",
        above=0,
        high=1,
    )
    leave_out_key: tuple[str, ...] = option((), "a key, as feedback has it, that counts for nothing; may repeat", metavar="KEY")
    length_bias: str = option(
        "balance",
        "what becomes of too many votes for the longer answer: 'balance' weighs them down until both directions weigh alike,"
        " 'keep' learns them",
        choices=LENGTH_BIAS,
    )
    rollback: int | None = option(None, "put the aligner of an earlier round back into service, and do nothing else", low=0)
    objective: str = same(TrainOptions, "objective", default="preference", help=_objective_help)
    rule: str = same(TrainOptions, "rule")
    weight: float | None = same(TrainOptions, "weight")
    head_layers: int | None = same(TrainOptions, "head_layers")
    max_kl: float | None = same(TrainOptions, "max_kl")
    max_length: int = same(TrainOptions, "max_length")
    dev_fraction: float = same(TrainOptions, "dev_fraction")
    use_peft: bool = same(TrainOptions, "use_peft")
    lora_r: int = same(TrainOptions, "lora_r")
    lora_alpha: int = same(TrainOptions, "lora_alpha")
    lora_dropout: float | None = same(TrainOptions, "lora_dropout")
    lora_target_modules: tuple[str, ...] = same(TrainOptions, "lora_target_modules")
    dtype: str = same(TrainOptions, "dtype")
    device: str | None = same(TrainOptions, "device")
    max_num_seqs: int = same(RowOptions, "max_num_seqs")
    objective_options: dict[str, Any] = field(
        default_factory=dict, metadata={"nested": objective_flags, "title": "options of objectives"}
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata=next(one.metadata for one in dataclasses.fields(TrainOptions) if one.name == "training"),
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            InvalidOption: names the option and says why.
        """
        check_ranges(self)
        _ = self.trigger
        if self.length_bias not in LENGTH_BIAS:
            raise InvalidOption(f"--length_bias must be one of {', '.join(LENGTH_BIAS)}, not '{self.length_bias}'")
        if self.prompts is not None and self.reward is None:
            raise InvalidOption("--prompts are answered, and --reward says which answer is better: give both")
        if self.evolves and not (self.feedback or self.prompts is not None):
            raise InvalidOption("--reward ranks answers to --prompts, or to prompts of --feedback: give one of them")

    @property
    def evolves(self) -> bool:
        """Whether there is something to learn from; otherwise the call says where the loop stands."""
        return bool(self.feedback or self.prompts is not None or self.reward is not None)

    @property
    def trigger(self) -> Trigger:
        """When a round begins."""
        return parse_trigger(self.refit_when)

    @property
    def seed(self) -> int | None:
        """Of the loop: `TrainingArguments`' one, if it is given."""
        given = self.training.get("seed")
        return None if given is None else int(given)

    def idle(self) -> dict[str, str]:
        """What has no effect beside the others."""
        names = [one.name for one in dataclasses.fields(self) if one.name not in ("out", "rollback")]
        if self.rollback is not None:
            return dict.fromkeys(names, "has no effect with --rollback, which trains nothing")
        if not self.evolves:
            return dict.fromkeys(names, "has no effect without --feedback or --prompts: nothing is trained")
        idle: dict[str, str] = {}
        if self.reward is None:
            idle |= dict.fromkeys(("expand", "num_generations", "max_tokens"), "is for answers that are drawn: needs --reward")
        if not self.feedback:
            of_votes = ("refit_when", "key_share", "leave_out_key", "length_bias", "max_nll_loss")
            idle |= dict.fromkeys(of_votes, "is for votes: needs --feedback")
        return idle

    def depends_on(self) -> dict[str, Any]:
        """What a round that has begun depends on, as JSON has it."""
        told = {name: value for name, value in dataclasses.asdict(self).items() if name not in OF_ROUND}
        return dict(json.loads(json.dumps(told)))

    def training_run(
        self, proposal: str, aligner: str | None, dataset: str, output_dir: str, seed: int, date: str | None
    ) -> TrainOptions:
        """The run of `trimtab train` that a round has.

        Args:
            proposal: the loop's.
            aligner: the incumbent; None for a fresh head.
            dataset: pairs with weights.
            output_dir: where the aligner goes.
            seed: of the round.
            date: what chat templates take for today; None if they do not write it.

        Raises:
            InvalidOption: no such run can be.
        """
        apart = {"proposal", "aligner", "training", "date", "max_tokens", "num_generations", "reward", "max_num_seqs"}
        names = {one.name for one in dataclasses.fields(self)} & {one.name for one in dataclasses.fields(TrainOptions)} - apart
        given = {name: getattr(self, name) for name in names}
        given |= {
            "proposal": proposal,
            "aligner": aligner or "",
            "dataset": dataset,
            "output_dir": output_dir,
            "dev_samples": 0,
        }
        given |= {"training": {**self.training, "seed": seed}, "date": date}
        run = TrainOptions(**given, start="pretrained" if aligner else "auto")
        if run.asked_objective.rewarded:
            raise InvalidOption(f"--objective {self.objective} learns from rewards, and rounds from pairs: choose another")
        return run
