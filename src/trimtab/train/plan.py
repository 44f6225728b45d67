"""From what was asked to what a run does: `resolve`, a pure function of the options and of what is known so far.

A run learns of its aligner's folder, of its records and of the temperatures that fit, in this order, and resolves again each
time, always from what was asked. So no plan is made from a plan, and a dry run, which knows less, has the same plan as far as
it goes. Everything else reads the plan.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

from trimtab.core.rules import Product, Rule, parse_rule
from trimtab.errors import InvalidOption
from trimtab.models.adapter_folder import base_of
from trimtab.models.aligner import Description, Manifest
from trimtab.train.objectives import Objective, Setting
from trimtab.train.options import TrainOptions
from trimtab.train.refusals import refuse_contradictions
from trimtab.train.rows import Layout
from trimtab.train.tune import CHEAPEST, Stay

__all__ = ["Facts", "Plan", "Temperatures", "announce_round", "resolve"]

logger = logging.getLogger(__name__)

KEPT = 64
"""Samples of the proposal's own that a head is to leave alone."""

TAIL_SAMPLES = 64
"""Tokens drawn from a row's tail, where they can be."""

LORA_DROPOUT = 0.05

SAMPLES = 8
"""Development prompts that are answered after training."""

OF_MANIFEST = ("weight", "proposal_temperature", "proposal_top_p", "aligner_temperature")
"""What a later round takes over from the manifest of an earlier one."""


class Temperatures(NamedTuple):
    """Of the proposal's and of the aligner's rows, before the rule."""

    proposal: float
    aligner: float


class Facts(NamedTuple):
    """What is known so far beside the options."""

    aligner: Description | None = None
    """The folder of the aligner to train; None where there is none, or it is not at hand."""
    records: int | None = None
    """How many records there are; None while they are not read."""
    lacking: int = 0
    """How many of them have no rejected answer."""
    fitted: Temperatures | None = None
    """The temperatures that fit best, where a start at them is wanted."""


@dataclass(frozen=True)
class Plan:
    """What a run does.

    Attributes:
        asked: the options, with what the aligner's folder settles of them.
        objective: with its defaults filled in, as far as they can be yet.
        rule: to train for.
        setting: what objectives may know of the run.
        given: the temperatures that are given, and 1 where none is.
        fits_temperatures: whether temperatures are to be fitted before training.
        temperatures: those to train at: given, or fitted.
        trains_draft: whether a drafter is distilled after training.
        kept_samples: how many samples of the proposal's own are to stay as likely as they are.
    """

    asked: TrainOptions
    objective: Objective
    rule: Rule
    setting: Setting
    given: Temperatures
    fits_temperatures: bool
    temperatures: Temperatures
    trains_draft: bool
    kept_samples: int

    @property
    def weight(self) -> float:
        """The weight to train at."""
        return self.setting.weight

    @property
    def trains_head(self) -> bool:
        """Whether the aligner is a head of the proposal (`trimtab.models.head`)."""
        return self.setting.head

    @property
    def reads_rejected(self) -> bool:
        """Whether the loss looks at unwanted answers."""
        return "rejected" in self.objective.answers

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's rows are learnt."""
        return self.asked.teacher_prompt is not None

    @property
    def lora_dropout(self) -> float:
        """Of fresh adapters; none for rewards, where it is noise in what samples are compared by."""
        given = self.asked.lora_dropout
        return (0.0 if self.objective.rewarded else LORA_DROPOUT) if given is None else given

    @property
    def samples(self) -> int:
        """How many development prompts are answered after training; behind an endpoint none."""
        asked = self.asked
        return SAMPLES * (not asked.proposal_endpoint) if asked.dev_samples is None else asked.dev_samples

    @property
    def stay(self) -> Stay | None:
        """Where the tuned weight stays: a head's at 1, and at the trained one if it learnt preferences."""
        if self.objective.has_reference(self.setting):
            return Stay(self.weight, math.inf)
        return CHEAPEST if self.trains_head else None

    @property
    def wants_whole_rows(self) -> bool:
        """Whether the tuned weight needs more than cached rows, and more can be had: a head has had them all along."""
        alone = self.trains_head or self.asked.proposal_endpoint or self.has_teacher
        return self.rule.name == "geometric" and self.asked.cache_top_k != 0 and not alone

    def row_layout(self, vocab_size: int) -> Layout:
        """What the cache keeps of a proposal row of V entries."""
        asked = self.asked.cache_tail_samples
        drawn = 0 if no_tail_samples(self.asked, self.rule) else TAIL_SAMPLES if asked is None else asked
        return Layout.of(self.asked.cache_top_k, drawn, vocab_size)

    def taught_layout(self, vocab_size: int) -> Layout:
        """What the cache keeps of a pair of rows: draws stand for the tail under every rule that can be taught."""
        return Layout.of(self.asked.cache_top_k, self.asked.cache_tail_samples or TAIL_SAMPLES, vocab_size)

    @property
    def cached_answers(self) -> list[tuple[str, str]]:
        """Which answers of which part the proposal's rows are needed on.

        On development's wanted ones for the diagnostics and the weight, on others where the loss needs them, or the drafter's;
        `teacher` is the wanted ones again, behind the teacher's prompt too. A head's own layers have the proposal's rows, so
        that only what compares with what the proposal gave each token reads a cache.
        """
        compares = self.objective.compares(self.setting)
        reads = compares or self.objective.reads(self.setting)
        pairs = self.reads_rejected and (compares if self.trains_head else reads)
        both = [("dev", "chosen"), ("train", "chosen")]
        teachers = [("dev", "teacher"), ("train", "teacher")] * self.has_teacher
        unwanted = [("dev", "rejected"), ("train", "rejected")] * pairs
        if self.trains_head:
            return both * compares + teachers + unwanted
        needed = self.trains_draft if self.has_teacher else reads
        return both[: 1 + needed] + teachers + unwanted


def resolve(asked: TrainOptions, facts: Facts = Facts()) -> Plan:  # noqa: B008 - it is a constant
    """What a run of these options does, as far as it is known.

    Raises:
        InvalidOption: options that contradict each other, or what is known.
    """
    found = facts.aligner
    manifest = None if found is None else found.manifest
    asked = _of_objective(_of_folder(asked, found, manifest), manifest)
    continued = _of_manifest(asked, manifest)
    try:
        return _resolve(continued, facts)
    except InvalidOption as error:
        if continued is not asked:
            _resolve(asked, facts)  # what is refused in any case is no matter of the manifest
            raise InvalidOption(f"{asked.aligner} was trained at other settings: {error}") from None
        raise


def _resolve(asked: TrainOptions, facts: Facts) -> Plan:
    rule = parse_rule(asked.rule or "product")
    head = not asked.aligner or asked.head_layers is not None
    objective, taught = asked.asked_objective, asked.teacher_prompt is not None
    given = Temperatures(*(1.0 if t is None else t for t in (asked.proposal_temperature, asked.aligner_temperature)))
    weight = (1.0 if head else rule.default_weights(1)[0]) if asked.weight is None else asked.weight
    rule.check_weights([weight])
    residual = objective.residual and isinstance(rule, Product)
    can_be_tempered = residual and weight > 0 and asked.aligner_temperature is None and not objective.rewarded
    tempered = asked.start in ("auto", "tempered") and can_be_tempered
    setting = Setting(rule, weight, given.aligner, head, taught, tempered, facts.records, facts.lacking)
    refuse_contradictions(asked, objective, setting, residual=residual, can_be_tempered=can_be_tempered)
    if asked.cache_tail_samples and (why := no_tail_samples(asked, rule)):
        raise InvalidOption(f"cache_tail_samples must be 0 here: {why}")
    learner = (objective.taught() or objective) if taught else objective
    temperatures = facts.fitted or given
    kept = KEPT if head and learner.keeps else 0
    return Plan(
        asked=asked,
        objective=learner.settle(setting),
        rule=rule,
        setting=setting._replace(temperature=temperatures.aligner),
        given=given,
        fits_temperatures=tempered,
        temperatures=temperatures,
        trains_draft=(residual and not asked.use_peft) if asked.train_draft is None else asked.train_draft,
        kept_samples=kept if asked.keep_samples is None else asked.keep_samples,
    )


def no_tail_samples(asked: TrainOptions, rule: Rule) -> str | None:
    """Why nothing can be drawn from the tails of the proposal's rows; None if it can."""
    if not asked.cache_top_k:
        return "--cache_top_k 0 keeps every entry"
    if asked.proposal_endpoint:
        return "an endpoint does not say what is in the tail of its rows"
    return None if isinstance(rule, Product) else f"draws can stand for the tail in product, not in '{asked.rule}'"


def _of_folder(asked: TrainOptions, found: Description | None, manifest: Manifest | None) -> TrainOptions:
    """The options with what kind of aligner it is: a fresh head, one that is trained on, an adapter, or a model.

    Raises:
        InvalidOption: an option that does not go with it.
    """
    if not asked.aligner:
        return dataclasses.replace(asked, rule=asked.rule or "geometric", use_peft=True)
    head = None if manifest is None else manifest.parsed_head
    if found is not None and manifest is not None and head is not None:
        layers = head.layers - head.tap
        if asked.head_layers not in (None, layers):
            raise InvalidOption(f"head_layers: '{asked.aligner}' is a head of {layers} layers, and keeps them: leave it out")
        asked = dataclasses.replace(asked, head_layers=layers, rule=asked.rule or manifest.rule, use_peft=True)
        _check_adapter(asked, found)
        return asked
    for name in ("head_layers", "keep_samples"):
        if getattr(asked, name) is not None:
            raise InvalidOption(f"{name} is for heads, and '{asked.aligner}' is none: leave it out")
    asked = dataclasses.replace(asked, rule=asked.rule or "product")
    if found is None or not found.is_adapter:
        return asked
    _check_adapter(asked, found)
    residual = asked.asked_objective.residual and isinstance(parse_rule(asked.rule), Product)
    drafting = bool(asked.train_draft or (found.draft is not None and asked.train_draft is None and residual))
    return dataclasses.replace(asked, use_peft=True, train_draft=drafting)


def _of_objective(asked: TrainOptions, manifest: Manifest | None) -> TrainOptions:
    """The options with where rewards start: at the proposal, which their target is near to, or where a residual has come to."""
    if not asked.asked_objective.rewarded or asked.start != "auto" or not asked.aligner or asked.use_peft:
        return asked
    fresh = parse_rule(asked.rule) == Product() and not (manifest is not None and manifest.is_residual)
    return dataclasses.replace(asked, start="uniform" if fresh else "pretrained")


def _check_adapter(asked: TrainOptions, found: Description) -> None:
    """Refuse what cannot be had where an adapter is trained on as it is, around its frozen base."""
    if asked.would_overwrite(base_of(found.folder).source):
        raise InvalidOption(f"output_dir '{asked.output_dir}' holds the base of the adapter '{asked.aligner}': choose another")
    if asked.start == "uniform" and asked.head_layers is None:
        raise InvalidOption(f"start 'uniform' retrains the output layer, and '{asked.aligner}' is an adapter: choose another")
    for option in dataclasses.fields(asked):
        if option.name.startswith("lora_") and getattr(asked, option.name) != option.default:
            raise InvalidOption(f"{option.name}: '{asked.aligner}' is an adapter, and keeps its own: leave it out")


def _of_manifest(asked: TrainOptions, manifest: Manifest | None) -> TrainOptions:
    """The options where an earlier round of the same training stopped: with its settings, where none are given."""
    if manifest is None or not asked.asked_objective.residual:
        return asked
    if manifest.objective != asked.objective and not (asked.asked_objective.rewarded and manifest.is_residual):
        return asked
    if asked.start != "pretrained" and asked.head_layers is None:
        return asked
    if parse_rule(manifest.rule) != parse_rule(asked.rule):
        return asked
    found = {name: getattr(manifest, name) for name in OF_MANIFEST if getattr(asked, name) is None}
    if found.get("weight") == 0:  # at which nothing is learnt
        del found["weight"]
    return dataclasses.replace(asked, **found) if found else asked


def announce_round(asked: TrainOptions, plan: Plan) -> None:
    """Log what a later round takes over from the manifest of an earlier one."""
    taken = [f"{name} {getattr(plan.asked, name)}" for name in OF_MANIFEST if getattr(plan.asked, name) != getattr(asked, name)]
    if taken:
        logger.info("going on from %s, at %s", asked.aligner, ", ".join(taken))
