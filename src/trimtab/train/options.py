"""What `trimtab train` can be told, checked before any work is done."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.core.rules import Geometric, Product, Rule, parse_rule
from trimtab.data.cut import CUT_ANSWERS
from trimtab.endpoints.settings import Limits, make_limits
from trimtab.errors import InvalidOption
from trimtab.files import expand_home
from trimtab.models.adapter_folder import base_of
from trimtab.models.aligner import OBJECTIVES, Description, Manifest
from trimtab.train.head_options import settle_head
from trimtab.train.refusals import STARTS, refuse_contradictions
from trimtab.train.rows import Layout

__all__ = ["ENDPOINT_OPTIONS", "Temperatures", "TrainOptions"]

logger = logging.getLogger(__name__)

SFT_WEIGHT = 0.3
"""Of the regulariser of a tempered start."""

CONTRAST = 1.0
"""Of the contrast, where a residual's records have rejected answers."""

BETA = 0.1
"""Of `preference`."""

CONTRAST_BETA = 1.0
"""Of the contrast, whose rewards are nats a token."""

KEPT = 64
"""Samples of the proposal's own that a head is to leave alone."""

TAIL_SAMPLES = 64
"""Tokens drawn from a row's tail, where they can be."""

SAMPLES = 8
"""Development prompts that are answered after training."""

ENDPOINT_OPTIONS = ("proposal_endpoint", "concurrency", "request_timeout", "max_retries")
"""Where rows come from, and not what they are."""


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


class Temperatures(NamedTuple):
    """Of the proposal's and of the aligner's rows, before the rule."""

    proposal: float
    aligner: float


@dataclass(frozen=True)
class TrainOptions:
    """Everything but what `transformers.TrainingArguments` already has; those go into `training`."""

    proposal: str = _option("", "the frozen model: a folder or a hub id", required=True)
    proposal_id: str | None = _option(None, "what the manifest calls the proposal [default: --proposal]")
    aligner: str = _option(
        "",
        "the model to train, of the same vocabulary, or an adapter or head to train on: a folder or a hub id [default: a fresh"
        " head, which is a LoRA adapter of the proposal itself, or of its upper layers]",
    )
    head_layers: int | None = _option(None, "how many of the proposal's layers a head adapts, the upper ones [default: all]")
    keep_samples: int | None = _option(
        None,
        "likelihood, for a head: so many prompts and answers that the proposal says itself are trained on beside the data, with"
        " KL(proposal‖aligned) as their loss, so that it goes on saying elsewhere what it said [default: 64; 0 without a head]",
    )
    dataset: str = _option("", "training data in a TRL layout: JSONL(.gz), Parquet or a hub id", required=True)
    output_dir: str = _option("", "where checkpoints and the finished aligner go", required=True)
    objective: str = _option("likelihood", "what to minimise", choices=OBJECTIVES)
    rule: str = _option(
        "",
        "the decoding rule to train for; goes into the manifest [default: product; for a head geometric, or what it was trained"
        " for]",
    )
    weight: float | None = _option(None, "the rule's weight while training [default: 1 for a head, otherwise the rule's own]")
    alpha: float = _option(1e-4, "ram: weight of the proposal's samples")
    beta: float | None = _option(
        None,
        "inverse temperature of the reward, which is summed over an answer in preference, and averaged in the contrast of"
        " likelihood [default: 0.1, and 1]",
    )
    contrast: float | None = _option(
        None,
        "likelihood: weight of length-normalised DPO between chosen and rejected answers, for the aligned model against the"
        " proposal [default: 1 for product where every record has a rejected answer, otherwise 0]",
    )
    proposal_temperature: float | None = _option(
        None, "temperature of the proposal's rows; goes into the manifest [default: fitted by a tempered start, otherwise 1]"
    )
    proposal_top_p: float | None = _option(None, "for the manifest; training sees the whole distribution [default: 1]")
    aligner_temperature: float | None = _option(
        None, "temperature of the aligner's rows; goes into the manifest [default: fitted by a tempered start, otherwise 1]"
    )
    start: str = _option(
        "auto",
        "where to start: 'pretrained' takes the aligner as it is, at its manifest's weight and temperatures if likelihood"
        " trained it for the same rule; 'tempered' also fits the two temperatures at which it and the proposal explain the data"
        " best together, and multiplies the learning rate with the aligner's; 'uniform' zeroes its output layer, so that the"
        " aligned model starts at the proposal; 'auto' is 'tempered' for likelihood with product, otherwise 'pretrained'",
        choices=STARTS,
    )
    sft_weight: float | None = _option(
        None,
        "likelihood: weight of −log Q(y|x) in the training loss, which keeps the aligner a language model and so from"
        " overfitting [default: 0.3 with a tempered start, otherwise 0]",
    )
    eval_dataset: str | None = _option(None, "development data; without it, some prompts of --dataset are kept aside")
    dev_fraction: float = _option(0.1, "share of the prompts kept aside for development")
    dataset_split: str = _option("train", "split of a hub data set; 'train[:1000]' is a part of it", kept=True)
    dataset_config: str | None = _option(None, "configuration of a hub data set that has several", kept=True)
    dataset_data_dir: str | None = _option(None, "folder of a hub data set that is sorted into folders", kept=True)
    columns: tuple[str, ...] = _option(
        (),
        "the column to read a field of the layout from, such as prompt=post; others are then not looked at; may repeat",
        metavar="FIELD=COLUMN",
    )
    max_examples: int | None = _option(None, "take only the first so many records of --dataset [default: all]")
    chat_template_path: str | None = _option(
        None, "a Jinja file: the chat template of the tokenizer, in training and in what is saved [default: its own]"
    )
    date: str | None = _option(
        None,
        "what a chat template that writes the date takes for today, YYYY-MM-DD [default: today; a resumed run keeps its own]",
    )
    cut_answers: str = _option(
        "auto",
        "what answers that stop in the middle of a sentence teach: 'auto' leaves out the end of sequence where they pile up at"
        " one length or stand among whole ones, and warns; 'continue' wherever an answer stops at a letter or a comma; 'end'"
        " never. The data's own column 'unfinished' counts in any case",
        choices=CUT_ANSWERS,
    )
    max_kl: float | None = _option(
        None,
        "product, geometric: a budget for KL(aligned‖proposal) on the development answers, in nats a token, the proposal at"
        " proposal_temperature: the tuned weight stays within it, and checkpoints are compared at weights within it"
        " [default: none]",
    )
    dev_samples: int | None = _option(
        None,
        "answer so many development prompts greedily after training, by the proposal and aligned, for the log and"
        " training.json; the proposal is loaded once more for it; 0 leaves it out [default: 8, behind an endpoint 0]",
    )
    max_length: int = _option(1024, "longest prompt and answer together, in tokens")
    cache_top_k: int = _option(64, "entries kept of each proposal row; 0 keeps all")
    cache_tail_samples: int | None = _option(
        None,
        "tokens drawn from the rest of each proposal row, to stand for it; 0 spreads it evenly [default: 64 for rule product if"
        " the proposal runs here, else 0]",
    )
    proposal_cache: str | None = _option(None, "folder of the cached rows [default: OUTPUT_DIR/proposal_cache]")
    teacher_prompt: str | None = _option(
        None,
        "a prompt to make an aligner of: messages (.json, .jsonl) or a text (any other file) that goes before every prompt; the"
        " aligned model learns to say without it what the proposal says with it, on the data's answers, or where the data have"
        " none on the proposal's own",
        metavar="FILE",
    )
    teacher_max_tokens: int | None = _option(None, "longest answer that is drawn behind --teacher_prompt [default: 256]")
    train_draft: bool | None = _option(
        None,
        "distil a drafter, OUTPUT_DIR/draft, from the aligned model after training; of a head, from answers that are drawn for"
        " it [default: true for likelihood with product, unless an adapter is trained that has none]",
    )
    use_peft: bool = _option(
        False, "train a LoRA adapter instead of all weights; an --aligner that is one is trained on as it is"
    )
    lora_r: int = _option(16, "LoRA rank")
    lora_alpha: int = _option(32, "LoRA scale")
    lora_dropout: float = _option(0.05, "LoRA dropout")
    lora_target_modules: tuple[str, ...] = _option((), "modules to adapt; repeat the flag [default: all linear layers]")
    dtype: str = _option("auto", "dtype of the proposal; the aligner's master weights are float32")
    device: str | None = _option(None, "device of the proposal [default: the first GPU, or the CPU]")
    proposal_endpoint: tuple[str, ...] = _option(
        (),
        "a vLLM server that has the proposal, such as http://localhost:8000/v1, for the cached rows: then of --proposal only"
        " tokenizer and configuration are loaded; may repeat",
        metavar="URL",
    )
    concurrency: int | None = _option(None, "most requests in flight for each endpoint [default: 16]")
    request_timeout: float | None = _option(None, "seconds that one request may take [default: 600]")
    max_retries: int | None = _option(None, "tries after the first, of a request or for an endpoint in a row [default: 6]")
    overwrite_output_dir: bool = _option(False, "discard what an earlier run left in OUTPUT_DIR instead of resuming it")
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse contradictions."""
        settle_head(self)
        refuse_contradictions(self)

    @property
    def limits(self) -> Limits:
        """How much is asked of the endpoints."""
        local = {"dtype": None if self.dtype == "auto" else self.dtype, "device": self.device}
        remote = {name: getattr(self, name) for name in ENDPOINT_OPTIONS[1:]}
        return make_limits("proposal_endpoint", self.proposal_endpoint, local, remote)

    @property
    def parsed_rule(self) -> Rule:
        """The rule as an object; where none is given, that of what is trained."""
        return parse_rule(self.rule or ("geometric" if self.trains_head else "product"))

    @property
    def no_tail_samples(self) -> str | None:
        """Why nothing can be drawn from the tails of the proposal's rows; None if it can."""
        if not self.cache_top_k:
            return "--cache_top_k 0 keeps every entry"
        if self.proposal_endpoint:
            return "an endpoint does not say what is in the tail of its rows"
        return (
            None if isinstance(self.parsed_rule, Product) else f"draws can stand for the tail in product, not in '{self.rule}'"
        )

    def row_layout(self, vocab_size: int) -> Layout:
        """What the cache keeps of a proposal row of V entries."""
        drawn = TAIL_SAMPLES if self.cache_tail_samples is None else self.cache_tail_samples
        return Layout.of(self.cache_top_k, 0 if self.no_tail_samples else drawn, vocab_size)

    def taught_layout(self, vocab_size: int) -> Layout:
        """What the cache keeps of a pair of rows: draws stand for the tail under every rule that can be taught."""
        return Layout.of(self.cache_top_k, self.cache_tail_samples or TAIL_SAMPLES, vocab_size)

    @property
    def samples(self) -> int:
        """How many development prompts are answered after training."""
        return SAMPLES * (not self.proposal_endpoint) if self.dev_samples is None else self.dev_samples

    @property
    def starting_weight(self) -> float:
        """The weight to train at."""
        default = 1.0 if self.trains_head else self.parsed_rule.default_weights(1)[0]
        return default if self.weight is None else self.weight

    @property
    def trains_head(self) -> bool:
        """Whether the aligner is a head of the proposal (`trimtab.models.head`).

        One that is trained on has its number of layers here as soon as its folder has been read (`trimtab.train.rounds`).
        """
        return not self.aligner or self.head_layers is not None

    @property
    def kept_samples(self) -> int:
        """How many samples of the proposal's own are to stay as likely as they are."""
        default = KEPT if self.trains_head and self.objective == "likelihood" and self.teacher_prompt is None else 0
        return default if self.keep_samples is None else self.keep_samples

    @property
    def is_plain(self) -> bool:
        """Whether what is decoded is the aligner's own row, as `geometric` has it at weight 1: no proposal's row is needed."""
        return isinstance(self.parsed_rule, Geometric) and self.starting_weight == 1 and self.temperatures.aligner == 1

    @property
    def needs_rejected(self) -> bool:
        """Whether the loss looks at unwanted answers."""
        return self.objective == "preference" or (self.objective == "ram" and self.alpha > 0) or bool(self.contrast)

    @property
    def has_reference(self) -> bool:
        """Whether `preference` compares with the proposal: a head's reward is log Q − log P, of a residual P cancels."""
        return self.trains_head and self.objective == "preference"

    @property
    def cached_answers(self) -> list[tuple[str, str]]:
        """Which answers of which part the proposal's rows are needed on.

        On development's wanted ones for the diagnostics and the weight, on others where the loss needs them, or the drafter's;
        `teacher` is the wanted ones again, behind the teacher's prompt too. A head's own layers have the proposal's rows, so
        that only what compares with what the proposal gave each token reads a cache: the contrast, and its `preference`.
        """
        taught, contrasted = self.teacher_prompt is not None, bool(self.contrast) or self.has_reference
        both = [("dev", "chosen"), ("train", "chosen")]
        teachers = [("dev", "teacher"), ("train", "teacher")] * taught
        unwanted = [("dev", "rejected"), ("train", "rejected")] * contrasted
        if self.trains_head:
            return both * contrasted + teachers + unwanted
        needed = self.trains_draft if taught else self.objective == "likelihood" and not (self.is_plain and not contrasted)
        return both[: 1 + needed] + teachers + unwanted

    @property
    def starts_tempered(self) -> bool:
        """Whether temperatures are fitted before training."""
        return self.start in ("auto", "tempered") and self.can_be_tempered

    @property
    def can_be_tempered(self) -> bool:
        """Whether temperatures can be fitted: the aligner's is free, and counts."""
        return self.trains_residual and self.starting_weight > 0 and self.aligner_temperature is None

    @property
    def temperatures(self) -> Temperatures:
        """Those that are given, and 1 where none is."""
        return Temperatures(*(1.0 if t is None else t for t in (self.proposal_temperature, self.aligner_temperature)))

    @property
    def regulariser(self) -> float:
        """The weight of −log Q(y|x)."""
        default = SFT_WEIGHT * (self.starts_tempered and self.teacher_prompt is None)
        return default if self.sft_weight is None else self.sft_weight

    @property
    def inverse_temperature(self) -> float:
        """β, of a whole answer's reward for `preference`, and of its mean over tokens for the contrast."""
        default = BETA if self.objective == "preference" else CONTRAST_BETA
        return default if self.beta is None else self.beta

    @property
    def default_contrast(self) -> float:
        """Of pairs, where none is given."""
        heads = self.trains_head and self.objective == "likelihood"
        return CONTRAST if (self.trains_residual or heads) and self.teacher_prompt is None else 0.0

    def with_contrast_for(self, examples: int, *, lacking: int) -> "TrainOptions":
        """The same with the contrast settled, for so many examples of which some may lack a rejected answer."""
        if self.contrast is not None or not self.default_contrast:
            return dataclasses.replace(self, contrast=self.contrast or 0.0)
        if lacking and self.beta is not None:
            raise InvalidOption("beta: records without a rejected answer have no contrast: leave it out")
        if not lacking:
            dpo = "; where they say what is preferred and not what to say, take --objective preference" * self.trains_head
            logger.info("every record has a rejected answer: --contrast %g; 0 leaves it out%s", self.default_contrast, dpo)
        elif lacking < examples:
            logger.warning("%d of %d records have no rejected answer: none of the others is learnt from", lacking, examples)
        return dataclasses.replace(self, contrast=0.0 if lacking else self.default_contrast)

    def continuing(self, manifest: Manifest | None) -> "TrainOptions":
        """The same where an earlier round of the same training stopped: with its settings, where none are given.

        Raises:
            InvalidOption: they cannot be had here.
        """
        if manifest is None or (manifest.objective, self.objective) != ("likelihood", "likelihood"):
            return self
        if self.start != "pretrained" and not self.trains_head:
            return self
        if parse_rule(manifest.rule) != self.parsed_rule:
            return self
        names = ("weight", "proposal_temperature", "proposal_top_p", "aligner_temperature")
        found = {name: getattr(manifest, name) for name in names if getattr(self, name) is None}
        if found.get("weight") == 0:  # at which nothing is learnt
            del found["weight"]
        logger.info("going on from %s, at %s", self.aligner, ", ".join(f"{name} {value}" for name, value in found.items()))
        try:
            return dataclasses.replace(self, **found)
        except InvalidOption as error:
            raise InvalidOption(f"{self.aligner} was trained at other settings: {error}") from None

    def of_adapter(self, found: Description) -> "TrainOptions":
        """The same where the aligner is a LoRA adapter, which is trained on as it is, around its frozen base.

        Raises:
            InvalidOption: the start or a setting of fresh adapters is asked for, or the base would be overwritten.
        """
        if self.would_overwrite(base_of(found.folder).source):
            raise InvalidOption(
                f"output_dir '{self.output_dir}' holds the base of the adapter '{self.aligner}': choose another"
            )
        if self.start == "uniform":
            raise InvalidOption(
                f"start 'uniform' retrains the output layer, and '{self.aligner}' is an adapter: choose another"
            )
        for option in dataclasses.fields(self):
            if option.name.startswith("lora_") and getattr(self, option.name) != option.default:
                raise InvalidOption(f"{option.name}: '{self.aligner}' is an adapter, and keeps its own: leave it out")
        drafting = self.train_draft or (found.draft is not None and self.train_draft is None and self.trains_residual)
        return dataclasses.replace(self, use_peft=True, train_draft=drafting)

    def would_overwrite(self, model: str) -> bool:
        """Whether a model, if it is a folder, is in the output's."""
        folder = expand_home(model).resolve()
        return expand_home(self.output_dir).resolve() in (folder, *folder.parents)

    def at(self, fitted: Temperatures) -> "TrainOptions":
        """The same at temperatures that were fitted around those that are given."""
        return dataclasses.replace(
            self,
            proposal_temperature=fitted.proposal,
            aligner_temperature=fitted.aligner,
            sft_weight=self.regulariser,
        )

    @property
    def trains_residual(self) -> bool:
        """Whether the aligner becomes what the proposal lacks under `product`, and so is no language model."""
        return self.objective == "likelihood" and isinstance(self.parsed_rule, Product)

    @property
    def trains_draft(self) -> bool:
        """Whether a drafter is trained; beside an adapter only if asked for, as its weights would be as many as the base's."""
        return self.trains_residual and not self.use_peft if self.train_draft is None else self.train_draft
