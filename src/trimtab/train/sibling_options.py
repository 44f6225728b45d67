"""What `trimtab start` can be told, checked before any work is done."""

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.models.layers import parse_layers
from trimtab.train.defaults import training_flags
from trimtab.train.options import ENDPOINT_OPTIONS, TrainOptions
from trimtab.train.plan import Plan, resolve

__all__ = ["ANSWERS", "TRAINING", "StartOptions"]

ANSWERS = ("samples", "given")
"""Which answers a start is distilled on."""

TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "eval_steps": 0.25,
    "save_steps": 0.25,
}
"""Where a distillation differs from a training run in `TrainingArguments`."""

_OF_TRAINING = {option.name: option for option in dataclasses.fields(TrainOptions)}


def _as_in_train(name: str, **changes: Any) -> Any:
    """The option of that name of `trimtab train`."""
    own = _OF_TRAINING[name]
    return field(default=changes.pop("default", own.default), metadata={**own.metadata, **changes})


@dataclass(frozen=True)
class StartOptions:
    """Everything but what `transformers.TrainingArguments` already has; those go into `training`."""

    proposal: str = field(default="", metadata={"help": "whose layers to take: a folder or a hub id", "required": True})
    out: str = field(
        default="",
        metadata={"help": "the folder of the start, and of what it is made with", "required": True, "metavar": "A"},
    )
    layers: str = field(
        default="2",
        metadata={
            "help": "how many of the proposal's layers to take, such as 4, spread evenly from the first to the last; or which"
            " ones, counted from 0, such as 0,1,29",
        },
    )
    dataset: str | None = field(
        default=None,
        metadata={
            "help": "prompts to sample answers for, in a TRL layout: JSONL(.gz), Parquet or a hub id [default: the proposal"
            " says the prompts, too]",
            "metavar": "D",
        },
    )
    answers: str = field(
        default="samples",
        metadata={
            "help": "what to distil on: 'samples' draws answers from the proposal, 'given' takes those in --dataset",
            "choices": ANSWERS,
        },
    )
    samples: int = field(default=512, metadata={"help": "how many answers to draw; the prompts of --dataset come in turn"})
    max_tokens: int = field(default=128, metadata={"help": "most tokens of an answer that is drawn"})
    max_num_seqs: int = field(default=32, metadata={"help": "most answers drawn at once"})
    max_length: int = _as_in_train("max_length")
    dev_fraction: float = _as_in_train("dev_fraction", help="share of the prompts kept aside, on which KL is measured")
    dataset_split: str = _as_in_train("dataset_split")
    dataset_config: str | None = _as_in_train("dataset_config")
    dataset_data_dir: str | None = _as_in_train("dataset_data_dir")
    columns: tuple[str, ...] = _as_in_train("columns")
    max_examples: int | None = _as_in_train("max_examples")
    date: str | None = _as_in_train("date")
    cache_top_k: int = _as_in_train("cache_top_k")
    cache_tail_samples: int | None = _as_in_train(
        "cache_tail_samples",
        help="tokens drawn from the rest of each proposal row, to stand for it; 0 spreads it evenly [default: 64 if the"
        " proposal runs here, else 0]",
    )
    proposal_cache: str | None = _as_in_train("proposal_cache", help="folder of the cached rows [default: A/proposal_cache]")
    dtype: str = _as_in_train("dtype", help="dtype of the proposal; the start is float32")
    device: str | None = _as_in_train("device")
    proposal_endpoint: tuple[str, ...] = _as_in_train(
        "proposal_endpoint",
        help="a vLLM server that has the proposal, such as http://localhost:8000/v1, for the cached rows of given answers;"
        " the layers are read from --proposal all the same; may repeat",
    )
    concurrency: int | None = _as_in_train("concurrency")
    request_timeout: float | None = _as_in_train("request_timeout")
    max_retries: int | None = _as_in_train("max_retries")
    overwrite_output_dir: bool = _as_in_train(
        "overwrite_output_dir", help="discard what an earlier run left in A instead of resuming it"
    )
    training: dict[str, Any] = field(
        default_factory=dict, metadata={**_OF_TRAINING["training"].metadata, "nested": partial(training_flags, TRAINING)}
    )

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        for name in ("proposal", "out"):
            if not getattr(self, name):
                raise InvalidOption(f"--{name} is required")
        parse_layers(self.layers)
        if self.answers not in ANSWERS:
            raise InvalidOption(f"answers must be one of {', '.join(ANSWERS)}, not '{self.answers}'")
        if self.answers == "given" and self.dataset is None:
            raise InvalidOption("answers 'given' are those of a data set: name one with --dataset")
        if self.proposal_endpoint and self.answers != "given":
            raise InvalidOption(
                "proposal_endpoint: samples are drawn by a proposal that runs here; draw them by trimtab propose --endpoint,"
                " and give that file as --dataset, with --answers given"
            )
        for name, low in (("samples", 2), ("max_tokens", 1), ("max_num_seqs", 1)):
            if getattr(self, name) < low:
                raise InvalidOption(f"{name} must be at least {low}, not {getattr(self, name)}")
        folder, output = expand_home(self.proposal).resolve(), expand_home(self.out).resolve()
        if output in (folder, *folder.parents):
            raise InvalidOption(f"out holds the proposal, {self.proposal}: choose another folder")
        _ = self.plan  # the rest is checked there

    @property
    def plan(self) -> Plan:
        """That of the training run that the distillation is: of rows that sums over them are right for, as `product` wants."""
        names = {option.name for option in dataclasses.fields(self)} & set(_OF_TRAINING)
        given = {name: getattr(self, name) for name in names}
        given |= {"aligner": self.proposal, "output_dir": self.out, "dataset": self.dataset or f"{self.out}/samples.jsonl"}
        given |= {"start": "pretrained", "training": {**TRAINING, **self.training}}
        return resolve(TrainOptions(**given, objective_options={"contrast": 0.0}))

    def describe(self) -> dict[str, Any]:
        """What the result depends on, beside weights, data and `TrainingArguments`."""
        apart = {"out", "training", "overwrite_output_dir", "proposal_cache", "max_num_seqs", "device", *ENDPOINT_OPTIONS}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in apart}
