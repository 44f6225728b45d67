"""What can be said of the models and of how they decode, as options of commands; and what they become."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from trimtab.data.options import LengthOptions, TemplateOptions
from trimtab.decode.pace import MAX_DRAFT
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.knobs import DrawingKnobs, EndingKnobs, ShapingKnobs
from trimtab.options import check_ranges, option, same
from trimtab.registry import names_of

__all__ = [
    "DRAFTER_NAMES",
    "ModelOptions",
    "RowOptions",
    "SamplingOptions",
    "check_prompts",
    "facts_of",
    "kernels_of",
    "load_aligned_model",
    "make_sampling_params",
    "places_that_fit",
    "refuse_beside_loaded",
    "settings_of",
]

logger = logging.getLogger(__name__)

RULE_NAMES = (
    *("candidates", "confidence", "gate", "geometric", "kl_gate", "mixture", "nucleus", "nudge", "product", "proposal"),
)
"""Our rules. They stand in `trimtab.core.rules`, which a text of help does not wait for."""

DRAFTER_NAMES = ("aligner", "corpus", "model", "ngram", "none")
"""Our drafters: `trimtab.decode.drafters`."""


def _rule_help() -> str:
    """What `--rule` takes, those of other packages included."""
    names = ", ".join(names_of("trimtab.rules", RULE_NAMES))
    return f"decoding rule: {names}; settings in brackets, 'candidates(n=8)' [default: the manifest's, or product]"


def _draft_help() -> str:
    """What `--draft` takes, the drafters of other packages included."""
    names = ", ".join(names_of("trimtab.drafters", DRAFTER_NAMES))
    default = "[default: the first aligner; for a residual or a head, its own drafter or ngram]"
    return f"who drafts: {names}, with more behind a colon where it is wanted, or a model {default}"


@dataclass(frozen=True)
class PairOptions:
    """Which models."""

    proposal: str = option("", "the frozen model: a folder or a hub id", required=True, metavar="P")
    aligner: tuple[str, ...] = option(
        (), "an aligner: a folder or a hub id; may repeat; none for the bare proposal", metavar="A"
    )


@dataclass(frozen=True)
class RowOptions(ShapingKnobs, PairOptions):
    """Which models, and how their rows are combined."""

    rule: str | None = same(ShapingKnobs, "rule", help=_rule_help)
    handover: str | None = same(ShapingKnobs, "handover")
    weight: tuple[float, ...] = same(
        ShapingKnobs, "weight", default=(), help="weight of each --aligner, in order [default: the manifest's, or the rule's]"
    )
    dtype: str = option("auto", "auto, float32, bfloat16 or float16")
    aligner_dtype: str | None = option(None, "that of aligners and drafters that are models of their own [default: --dtype]")
    device: str | None = option(None, "cpu, cuda, cuda:1, or auto to spread [default: the first GPU, or the CPU]")
    cuda_graphs: bool | None = option(None, "replay short passes as CUDA graphs [default: on one GPU, where a model can]")
    quantize: str | None = option(None, "keep weights in 8 bits: faster on a CPU, and close", choices=("int8",))
    backend: str | None = option(None, "who runs GGUF files [default: torch, in float32]", choices=("llamacpp",))
    max_num_seqs: int = option(32, "most sequences in a batch", low=1)

    def __post_init__(self) -> None:
        """Refuse values that cannot be, and weights that are not one for each aligner."""
        from trimtab.decode.drafters import source_of
        from trimtab.decode.request import SamplingParams
        from trimtab.models.loading import check_dtype

        check_ranges(self)  # of options made by hand, too
        if self.aligner and len(self.weight) not in (0, len(self.aligner)):
            raise InvalidOption(f"{len(self.weight)} --weight for {len(self.aligner)} --aligner: give one for each, in order")
        try:
            rule = SamplingParams(rule=self.rule, handover=None if self.has_leader else self.handover).asked_rule
        except InvalidRequest as error:
            raise InvalidOption(str(error)) from None
        if rule is not None:
            for weights in self.weights_of_a_row:
                rule.check_weights(weights)
        check_dtype(self.dtype)
        if self.aligner_dtype is not None:
            check_dtype(self.aligner_dtype, "aligner_dtype")
            if not self.aligns and source_of(getattr(self, "draft", None)) is None:
                raise InvalidOption("--aligner_dtype is that of aligners and drafters, and there is none: leave it out")

    @property
    def weights_of_a_row(self) -> list[tuple[float, ...]]:
        """Which of the weights are of aligners that make one row together."""
        return [self.weight]

    @property
    def aligns(self) -> bool:
        """Whether there is, or may come, an aligner."""
        return bool(self.aligner)

    @property
    def has_leader(self) -> bool:
        """Whether a model leads that is no aligner, so that a hand-over is between texts."""
        return False

    def idle(self) -> dict[str, str]:
        """What says nothing of a bare proposal; weights are of aligners that are named here."""
        without: tuple[str, ...] = () if self.aligns else ("rule", "blend", "rule_weight", "aligner_temperature")
        without += () if self.aligns or self.has_leader else ("handover",)
        idle = {} if self.blend == "weights" else {"rule_weight": "is for --blend weights"}
        return idle | dict.fromkeys(without if self.aligner else (*without, "weight"), "needs an --aligner")


@dataclass(frozen=True)
class ModelOptions(RowOptions):
    """The same, to decode with them."""

    draft: str | None = option(None, _draft_help, metavar="MODEL")
    draft_temperature: float | None = option(
        None, "temperature of the row that drafts are drawn from [default: 1, or the rule's]", above=0, below=math.inf
    )
    num_speculative_tokens: int | None = option(
        None, "tokens to draft ahead; 0 decodes token by token [default: as many as pay]", low=0, high=MAX_DRAFT
    )

    def __post_init__(self) -> None:
        """Refuse a drafter that cannot be, too."""
        from trimtab.decode.drafters import read_draft

        super().__post_init__()
        if self.draft is not None:
            read_draft(self.draft)

    @property
    def _draft_has_rows(self) -> bool:
        from trimtab.decode.drafters import read_draft

        return self.draft is not None and read_draft(self.draft)[0].has_rows

    @property
    def no_drafts(self) -> str | None:
        """Why nobody will draft, whatever an aligner's manifest says; None if somebody may."""
        if self.draft == "none":
            return "has no effect with --draft none"
        return None if self.draft not in (None, "aligner") or self.aligns else "needs an --aligner, or --draft"

    def idle(self) -> dict[str, str]:
        """What says how to draft where nobody does. A draft length of 0 is no reason: who drafts decides what a seed means."""
        idle = {} if self.draft != "aligner" or self.aligns else {"draft": "'aligner' needs an aligner"}
        if self.draft is not None and not self._draft_has_rows:
            idle["draft_temperature"] = f"is for a model that drafts, and --draft {self.draft} has no row"
        if why := self.no_drafts:
            idle["draft_temperature"] = why
            idle |= {"num_speculative_tokens": why} if self.num_speculative_tokens else {}
        return idle


@dataclass(frozen=True)
class SamplingOptions(DrawingKnobs):
    """How to draw from the aligned row."""

    stop: tuple[str, ...] = same(EndingKnobs, "stop", help="text that ends a completion; may repeat")
    seed: int | None = same(EndingKnobs, "seed")

    def idle(self) -> dict[str, str]:
        """What says which tokens to draw from where none is drawn."""
        greedy = "has no effect with --temperature 0, which takes the most probable token"
        cut = {"top_p": self.top_p < 1, "top_k": self.top_k > 0, "min_p": self.min_p > 0}
        return {name: greedy for name, cuts in cut.items() if cuts and self.temperature == 0}


def kernels_of(model: Any) -> dict[str, Any]:
    """What computes the passes of an `AlignedModel`, for a report: it decides the last bits, and so what a seed gives."""
    from trimtab.models.huggingface import describe_kernels

    return {"proposal": describe_kernels(model.proposal), "aligners": [describe_kernels(part) for part in model.aligners]}


def facts_of(options: ModelOptions, model: Any) -> dict[str, Any]:
    """What decides the texts of an `AlignedModel` beside the options that made it: for files that are resumed."""
    from trimtab.decode.drafters import DRAFTERS
    from trimtab.models.fingerprint import fingerprint_of

    facts = {**model.encoder.chat_settings, "weights": [fingerprint_of(part) for part in model.models.all]}
    if (options.draft or "").partition(":")[0] in set(DRAFTERS) - {"aligner", "model"}:
        facts["draft"] = model.drafter  # what it drafts from, if that means anything, and not where it was named
    return facts


def settings_of(options: RowOptions) -> dict[str, Any]:
    """The flags beside the models' names, as keyword arguments of `AlignedModel.from_pretrained`, whose names they have.

    Where there are no flags that say who drafts, nobody does: nothing is drawn there.
    """
    kind = ModelOptions if isinstance(options, ModelOptions) else RowOptions
    models = {field.name for field in fields(PairOptions)}
    given = {field.name: getattr(options, field.name) for field in fields(kind) if field.name not in models}
    return {"draft": "none", **given, "weight": list(options.weight) or None}


def load_aligned_model(options: RowOptions, chats: TemplateOptions | None = None, kept_date: Any = None) -> Any:
    """The models that the flags name, ready to decode, or to score without the flags that say who drafts.

    Args:
        options: the models' flags.
        chats: how chats become texts; None where there are none.
        kept_date: the date of the run that is resumed, if one is.
    """
    from trimtab.data.template import pick_date, read_chat_template
    from trimtab.decode.aligned import AlignedModel
    from trimtab.decode.draft import who_drafts
    from trimtab.models.loading import quiet_loading

    template = read_chat_template(chats.chat_template_path) if chats is not None else None
    quiet_loading()
    date = None if chats is None else pick_date(chats.date, kept_date)
    try:
        model = AlignedModel.from_pretrained(options.proposal, list(options.aligner), date=date, **settings_of(options))
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error
    if template is not None:
        model.tokenizer.chat_template = template
    if isinstance(options, ModelOptions) and (options.aligner or options.draft):
        logger.info("who drafts: %s", who_drafts(model))
    return model


def places_that_fit(
    options: LengthOptions, model: Any, prompts: Sequence[Any], answers: Sequence[Any], sources: Sequence[str]
) -> list[int]:
    """The places of the prompts that fit into the context with their answers, if only those are wanted; otherwise all."""
    if not options.leave_out_long:
        return list(range(len(prompts)))
    kept = []
    for place, (prompt, answer, source) in enumerate(zip(prompts, answers, sources, strict=True)):
        try:
            if model.fits(prompt, answer):
                kept.append(place)
        except InvalidRequest as error:
            raise DataError(f"{source}: {error}") from error
    if not kept:
        raise DataError(f"no record is left: none fits into a context of {model.max_length} tokens")
    if len(kept) < len(prompts):
        logger.warning("%d of %d records do not fit into the context, and are left out", len(prompts) - len(kept), len(prompts))
    return kept


def refuse_beside_loaded(options: Any, model: Any) -> None:
    """Refuse options that say what to load, and how, beside models that are loaded already.

    Raises:
        InvalidOption: naming the first that differs from its default; or what is loaded is no `AlignedModel`.
    """
    from trimtab.decode.aligned import AlignedModel

    if not isinstance(model, AlignedModel):
        raise InvalidOption(f"model must be a trimtab.AlignedModel, not {model!r}")
    loading = {field.name for kind in (ModelOptions, TemplateOptions) for field in fields(kind)}
    for field in fields(options):
        if field.name in loading and getattr(options, field.name) != field.default:
            raise InvalidOption(f"--{field.name} is for models that are loaded here, and model is loaded: leave it out")


def check_prompts(records: Sequence[Any], check: Callable[[Any], Any]) -> None:
    """Refuse a prompt that cannot be decoded before any is, naming where it stands; `check` raises for one."""
    for record in records:
        try:
            check(record.prompt)
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error


def make_sampling_params(options: Any, **more: Any) -> Any:
    """The sampling parameters among a command's flags; a bad one is wrong usage."""
    from trimtab.decode.request import SamplingParams

    try:
        asked = {field.name: getattr(options, field.name) for field in fields(SamplingOptions) if hasattr(options, field.name)}
        return SamplingParams(**asked | more)
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error
