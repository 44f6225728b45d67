"""What `trimtab train` can be told. What becomes of it is a `trimtab.train.plan.Plan`."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.core.rules import RULES, parse_rule
from trimtab.data.cut import CUT_ANSWERS
from trimtab.data.options import DataOptions
from trimtab.data.records import parse_columns
from trimtab.data.rewrite_template import read_template
from trimtab.data.template import check_date
from trimtab.endpoints.options import AskingOptions
from trimtab.endpoints.settings import Limits, make_limits
from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.judges.rewards.options import RewardOptions
from trimtab.knobs import MAX_FACTOR
from trimtab.models.aligner import manifest_of
from trimtab.models.estimates import DryRunOptions
from trimtab.options import Flag, check_ranges, check_required, help_of, option, same
from trimtab.train.defaults import IDLE, OWNED, training_flags
from trimtab.train.objectives import OBJECTIVES, Objective
from trimtab.train.objectives.base import option_kinds
from trimtab.train.online.options import OnlineOptions

__all__ = ["ENDPOINT_OPTIONS", "OF_DRY_RUN", "STARTS", "TrainOptions", "make_objective", "objective_flags"]

logger = logging.getLogger(__name__)

STARTS = ("auto", "tempered", "pretrained", "uniform")
"""Where training may start."""

ENDPOINT_OPTIONS = ("proposal_endpoint", "concurrency", "request_timeout", "max_retries")
"""Where rows come from, and not what they are."""

OF_COMMANDS = {"config", "json", "help"}
"""Flags that every command has, so that no objective's option can be one."""

OF_ANSWERS = ("cut_answers", "cache_top_k", "cache_tail_samples", "proposal_cache", "keep_samples", "dev_samples")
"""What only training on answers reads."""

OF_DRY_RUN = (*(one.name for one in dataclasses.fields(DryRunOptions)), "expected_aligner", "assume_tflops")
"""What says nothing of a run."""


def _rule_help() -> str:
    """What `--rule` takes, those of other packages included."""
    default = "[default: product; for a head geometric, or what it was trained for]"
    return f"the decoding rule to train for: {', '.join(sorted(RULES))}; goes into the manifest {default}"


def objective_flags() -> dict[str, Flag]:
    """The options of all objectives by name; those of one name share a flag.

    An objective of another package that cannot be used, or whose options have names that are taken, has none: a warning says
    so, and to choose it is an error.
    """
    found: dict[str, Flag] = {}
    for name in OBJECTIVES:
        try:
            found |= _flags_of(name, found)
        except InvalidOption as error:
            logger.warning("%s", error)
    return found


def _flags_of(name: str, known: Mapping[str, Flag]) -> dict[str, Flag]:
    """The flags of one objective, beside those that are known.

    Raises:
        InvalidOption: it cannot be used, or an option has the name of another one.
    """
    kind = OBJECTIVES[name]
    kinds, flags = option_kinds(kind), {}
    taken = {one.name for one in dataclasses.fields(TrainOptions)} | training_flags().keys() | OWNED | IDLE | OF_COMMANDS
    for one in dataclasses.fields(kind):
        before, choices = known.get(one.name), tuple(one.metadata.get("choices", ()))
        if one.name in taken or (before is not None and (before.kind, before.choices) != (kinds[one.name], choices)):
            raise InvalidOption(f"objective: the option '{one.name}' of '{name}' has the name of another one: rename it")
        text = f": {help_of(one)}"
        said = ""
        if before is not None:
            said = f"{before.text.removesuffix(text)}, " if before.text.endswith(text) else f"{before.text}; "
        flags[one.name] = Flag(kinds[one.name], f"{said}{name}{text}", choices)
    return flags


def make_objective(name: str, settings: Mapping[str, Any]) -> Objective:
    """An objective with some of its options; None stands for the default, and 0 of an option that it lacks asks for nothing.

    Raises:
        InvalidOption: there is none of that name, it has no such option, or a value is out of range.
    """
    if not isinstance(name, str):
        raise InvalidOption(f"objective must be the name of one, not {name!r}")
    kind = OBJECTIVES.find(name)
    known = {one.name for one in dataclasses.fields(kind)}
    given = {key: value for key, value in settings.items() if value is not None and (value or key in known)}
    if odd := sorted(set(given) - known):
        *others, last = _owners(odd[0]) or ["(none)"]
        owners = f"{', '.join(others)} or {last}" if others else last
        raise InvalidOption(f"--{odd[0]} is for --objective {owners}, and '{name}' has none: leave it out")
    return kind(**given)


def _owners(option_name: str) -> list[str]:
    """The objectives that have an option."""
    found = []
    for name in OBJECTIVES:
        with contextlib.suppress(InvalidOption):  # one that cannot be used has none
            found += [name] * (option_name in option_kinds(OBJECTIVES[name]))
    return found


@dataclass(frozen=True)
class TrainOptions(OnlineOptions, DryRunOptions, DataOptions):
    """What is asked for; `trimtab.train.plan.resolve` makes a plan of it.

    The options of the objective go into `objective_options`, and those of `transformers.TrainingArguments` into `training`; in
    calls of `trimtab.train` and on the command line all are named alike.
    """

    proposal: str = option("", "the frozen model: a folder or a hub id", required=True)
    proposal_id: str | None = option(None, "what the manifest calls the proposal [default: --proposal]")
    aligner: str = option(
        "",
        "the model to train, of the same vocabulary, or an adapter or head to train on: a folder or a hub id [default: a fresh"
        " head, which is a LoRA adapter of the proposal itself, or of its upper layers]",
    )
    head_layers: int | None = option(
        None, "how many of the proposal's layers a head adapts, the upper ones [default: all]", low=1
    )
    keep_samples: int | None = option(
        None,
        "likelihood, for a head: so many prompts and answers that the proposal says itself are trained on beside the data, with"
        " KL(proposal‖aligned) as their loss, so that it goes on saying elsewhere what it said [default: 64; 0 without a head]",
        low=0,
    )
    dataset: str = option("", "training data in a TRL layout: JSONL(.gz), Parquet or a hub id", required=True)
    output_dir: str = option("", "where checkpoints and the finished aligner go", required=True)
    objective: str = option("likelihood", "what to minimise", choices=OBJECTIVES)
    rule: str = option("", _rule_help)
    weight: float | None = option(
        None,
        "the rule's weight while training [default: 1 for a head, otherwise the rule's own]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    proposal_temperature: float | None = option(
        None,
        "temperature of the proposal's rows; goes into the manifest [default: fitted by a tempered start, otherwise 1]",
        low=1e-3,
    )
    proposal_top_p: float | None = option(
        None, "for the manifest; training sees the whole distribution [default: 1]", above=0, high=1
    )
    aligner_temperature: float | None = option(
        None,
        "temperature of the aligner's rows; goes into the manifest [default: fitted by a tempered start, otherwise 1]",
        low=1e-3,
    )
    start: str = option(
        "auto",
        "where to start: 'pretrained' takes the aligner as it is, at its manifest's weight and temperatures if likelihood"
        " trained it for the same rule; 'tempered' also fits the two temperatures at which it and the proposal explain the data"
        " best together, and multiplies the learning rate with the aligner's; 'uniform' zeroes its output layer, so that the"
        " aligned model starts at the proposal; 'auto' is 'tempered' for likelihood with product, otherwise 'pretrained'",
        choices=STARTS,
    )
    eval_dataset: str | None = option(None, "development data; without it, some prompts of --dataset are kept aside")
    dev_fraction: float = option(0.1, "share of the prompts kept aside for development", above=0, high=0.9)
    max_examples: int | None = option(None, "take only the first so many records of --dataset [default: all]", low=2)
    chat_template_path: str | None = option(
        None, "a Jinja file: the chat template of the tokenizer, in training and in what is saved [default: its own]"
    )
    date: str | None = option(
        None,
        "what a chat template that writes the date takes for today, YYYY-MM-DD [default: today; a resumed run keeps its own]",
    )
    cut_answers: str = option(
        "auto",
        "what answers that stop in the middle of a sentence teach: 'auto' leaves out the end of sequence where they pile up at"
        " one length or stand among whole ones, and warns; 'continue' wherever an answer stops at a letter or a comma; 'end'"
        " never. The data's own column 'unfinished' counts in any case",
        choices=CUT_ANSWERS,
    )
    max_kl: float | None = option(
        None,
        "product, geometric: a budget for KL(aligned‖proposal) on the development answers, in nats a token, the proposal at"
        " proposal_temperature: the tuned weight stays within it, and checkpoints are compared at weights within it; for tb and"
        " soft_q in nats an answer, in the place of beta, which it settles [default: none]",
        above=0,
    )
    dev_samples: int | None = option(
        None,
        "answer so many development prompts greedily after training, by the proposal and aligned, for the log and"
        " training.json; the proposal is loaded once more for it; 0 leaves it out [default: 8, behind an endpoint 0]",
        low=0,
    )
    max_length: int = option(1024, "longest prompt and answer together, in tokens", low=2)
    cache_top_k: int = option(64, "entries kept of each proposal row; 0 keeps all", low=0)
    cache_tail_samples: int | None = option(
        None,
        "tokens drawn from the rest of each proposal row, to stand for it; 0 spreads it evenly [default: 64 for rule product if"
        " the proposal runs here, else 0]",
        low=0,
    )
    proposal_cache: str | None = option(None, "folder of the cached rows [default: OUTPUT_DIR/proposal_cache]")
    teacher_prompt: str | None = option(
        None,
        "a prompt to make an aligner of: messages (.json, .jsonl) or a text (any other file) that goes before every prompt; the"
        " aligned model learns to say without it what the proposal says with it, on the data's answers, or where the data have"
        " none on the proposal's own",
        metavar="FILE",
    )
    teacher_max_tokens: int | None = option(None, "longest answer that is drawn behind --teacher_prompt [default: 256]", low=1)
    rewriter_template: str | None = option(
        None,
        "train a rewriter: of each pair, the wanted answer is learnt behind the prompt and the unwanted answer, put as this"
        " says: aligner, chat, or a file with {prompt} and {answer} (chat:FILE for a user's message)",
        metavar="T",
    )
    train_draft: bool | None = option(
        None,
        "distil a drafter, OUTPUT_DIR/draft, from the aligned model after training; of a head, from answers that are drawn for"
        " it [default: true for likelihood with product, unless an adapter is trained that has none]",
    )
    use_peft: bool = option(
        False, "train a LoRA adapter instead of all weights; an --aligner that is one is trained on as it is"
    )
    lora_r: int = option(16, "LoRA rank", low=1)
    lora_alpha: int = option(32, "LoRA scale")
    lora_dropout: float | None = option(None, "LoRA dropout [default: 0.05; 0 for rewards]", low=0, high=1)
    lora_target_modules: tuple[str, ...] = option((), "modules to adapt; repeat the flag [default: all linear layers]")
    dtype: str = option("auto", "dtype of the proposal; the aligner's master weights are float32")
    device: str | None = option(None, "device of the proposal [default: the first GPU, or the CPU]")
    proposal_endpoint: tuple[str, ...] = option(
        (),
        "a vLLM server that has the proposal, such as http://localhost:8000/v1, for the cached rows: then of --proposal only"
        " tokenizer and configuration are loaded; may repeat",
        metavar="URL",
    )
    concurrency: int | None = same(AskingOptions, "concurrency")
    request_timeout: float | None = same(AskingOptions, "request_timeout")
    max_retries: int | None = same(AskingOptions, "max_retries")
    overwrite_output_dir: bool = option(False, "discard what an earlier run left in OUTPUT_DIR instead of resuming it")
    objective_options: dict[str, Any] = field(
        default_factory=dict, metadata={"nested": objective_flags, "title": "options of objectives"}
    )
    training: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "nested": training_flags,
            "title": "transformers.TrainingArguments",
            "text": "as in TRL; see transformers' documentation",
        },
    )

    expected_aligner: str | None = option(None, "for --dry_run: the same for --aligner", metavar="A", kept=True)
    assume_tflops: float | None = option(
        None, "for --dry_run: 10¹² operations a second of the device [default: measured on this one]", kept=True, above=0
    )

    def __post_init__(self) -> None:
        """Refuse values that cannot be, whatever the others are.

        Raises:
            InvalidOption: names the option and says why.
        """
        check_required(type(self), vars(self))
        check_date(self.date)
        if self.aligner and self.would_overwrite(self.aligner):
            raise InvalidOption(f"output_dir holds the aligner, {self.aligner}: choose another one")
        for name, choices in (("start", STARTS), ("cut_answers", CUT_ANSWERS)):
            if getattr(self, name) not in choices:
                raise InvalidOption(f"{name} must be one of {', '.join(choices)}, not '{getattr(self, name)}'")
        check_ranges(self)
        if self.rule:
            parse_rule(self.rule)
        if self.rewriter_template is not None:
            read_template(self.rewriter_template)
        _ = self.asked_objective, self.limits, parse_columns(self.columns)  # raise where they cannot be

    @property
    def asked_objective(self) -> Objective:
        """The objective with the options that are asked for."""
        return make_objective(self.objective, self.objective_options)

    @property
    def limits(self) -> Limits:
        """How much is asked of the endpoints."""
        local = {"dtype": None if self.dtype == "auto" else self.dtype, "device": self.device}
        remote = {name: getattr(self, name) for name in ENDPOINT_OPTIONS[1:]}
        if self.sampling_endpoint:
            return make_limits("sampling_endpoint", self.sampling_endpoint, {"max_num_seqs": self.max_num_seqs}, remote)
        return make_limits("proposal_endpoint", self.proposal_endpoint, local, remote)

    def would_overwrite(self, model: str) -> bool:
        """Whether a model, if it is a folder, is in the output's."""
        folder = expand_home(model).resolve()
        return expand_home(self.output_dir).resolve() in (folder, *folder.parents)

    def idle(self) -> dict[str, str]:
        """What a teacher, a head, fresh adapters, or files leave unread."""
        idle = {}
        if self.teacher_prompt is None:
            idle["teacher_max_tokens"] = "needs --teacher_prompt"
        manifest = manifest_of(expand_home(self.aligner)) if self.aligner else None
        if not self.aligner or (manifest is not None and manifest.head is not None):
            idle["use_peft"] = "has no effect on a head, which is an adapter anyway"
            if self.teacher_prompt is None:
                idle["cache_top_k"] = "has no effect on a head, whose own layers have the proposal's rows"
        elif not self.use_peft:
            names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            idle |= dict.fromkeys(names, "is for the adapters of --use_peft")
        if not self.aligner:
            idle["expected_aligner"] = "is for --aligner"
        if OBJECTIVES.find(self.objective).rewarded:
            idle |= dict.fromkeys(OF_ANSWERS, f"is for wanted answers, and '{self.objective}' learns from rewards")
            idle |= RewardOptions.idle(self)
        else:
            online = [one.name for one in dataclasses.fields(OnlineOptions)]
            if self.reward_errors == "none":  # which is otherwise a word for an option that is off
                raise InvalidOption("--reward_errors is for rewards, as of --objective tb")
            idle |= dict.fromkeys(online, f"is for rewards, as of --objective tb, and '{self.objective}' learns from answers")
        if self.eval_dataset is not None:
            idle["dev_fraction"] = "has no effect with --eval_dataset"
        return idle
