"""What a run refuses before any work is done: options that contradict each other, or what the aligner is."""

from trimtab.errors import InvalidOption
from trimtab.train.objectives import Objective, Setting
from trimtab.train.options import TrainOptions
from trimtab.train.tune import RANGES

__all__ = ["refuse_contradictions"]


def refuse_contradictions(
    asked: TrainOptions, objective: Objective, setting: Setting, *, residual: bool, can_be_tempered: bool
) -> None:
    """Refuse options with which no run can be what was asked for.

    Args:
        asked: the options.
        objective: that is asked for, as it is.
        setting: what is known of the run.
        residual: whether the aligner becomes what the proposal lacks.
        can_be_tempered: whether temperatures can be fitted: the aligner's is free, and counts.

    Raises:
        InvalidOption: names the option and says why.
    """
    rule = setting.rule
    if rule.looks_back:
        raise InvalidOption(
            f"rule: '{rule}' looks at the text before a row, and aligners are trained on rows: train for another"
        )
    if setting.head:
        _refuse_beside_head(asked, setting)
    if objective.rewarded:
        _refuse_beside_rewards(asked, objective)
    if asked.max_kl is not None and rule.name not in RANGES:
        raise InvalidOption(f"max_kl bounds the weight that is tuned, and '{rule}' has none: leave it out")
    if asked.dev_samples and asked.proposal_endpoint:
        raise InvalidOption("dev_samples: text is sampled from a proposal that is here, not from an endpoint: leave it out")
    if asked.use_peft and asked.start == "uniform":
        raise InvalidOption("start 'uniform' retrains the output layer, which --use_peft keeps: choose one of them")
    if asked.start == "tempered" and not can_be_tempered:
        raise InvalidOption(
            "start 'tempered' fits the aligner's temperature for likelihood with product at a weight above 0:"
            " leave out --aligner_temperature, or choose another start"
        )
    if asked.train_draft and not (residual or setting.head):
        raise InvalidOption("train_draft: only a residual, which is likelihood with product, and a head need a drafter")
    if asked.keep_samples and not objective.keeps:  # whether it is a head, its folder says
        raise InvalidOption("keep_samples: only a head is kept at the proposal by its samples, under likelihood: leave it out")
    if asked.rewriter_template is not None and (
        asked.teacher_prompt is not None or asked.objective not in ("likelihood", "sft")
    ):
        raise InvalidOption(
            "rewriter_template: a rewriter learns wanted answers, by likelihood or sft: leave out"
            + (" --teacher_prompt" if asked.teacher_prompt is not None else f" objective {asked.objective}")
        )
    if asked.teacher_prompt is not None:
        _refuse_beside_teacher(asked, objective)
    if asked.proposal_endpoint and asked.proposal_temperature not in (None, 1) and asked.cache_top_k:
        raise InvalidOption(
            "an endpoint's rows have temperature 1: another proposal_temperature needs every entry, --cache_top_k 0"
        )


def _refuse_beside_head(asked: TrainOptions, setting: Setting) -> None:
    """What a head has no use for."""
    if asked.proposal_endpoint:
        why = "the aligner is a head" if asked.aligner else "without one a head is trained"
        raise InvalidOption(
            f"aligner: {why}, which reads the proposal's hidden states, and an endpoint gives none: name"
            " the model to train, or leave out --proposal_endpoint"
        )
    if asked.aligner and asked.start not in ("auto", "pretrained"):
        raise InvalidOption(f"start: a head is trained on as it is: leave out --start {asked.start}")
    if not asked.aligner and asked.start != "auto":
        raise InvalidOption(f"start: a head starts at the proposal, and at nothing else: leave out --start {asked.start}")
    if setting.rule.name == "product":
        raise InvalidOption(
            "rule: a head starts as the proposal, and product would multiply the proposal with itself: leave out --rule"
            " product, for geometric"
        )


def _refuse_beside_rewards(asked: TrainOptions, objective: Objective) -> None:
    """What a run cannot be told that samples as it trains, and what it must be told."""
    if not asked.reward and asked.rewards is None:
        raise InvalidOption(f"reward: objective '{objective.name}' learns from one: give --reward MODULE.py:FUNCTION")
    if asked.rewards is not None:
        _refuse_beside_filed(asked, objective)
    beta = getattr(objective, "beta", None)
    if asked.max_kl is not None and not objective.budgeted:
        raise InvalidOption(
            f"max_kl: objective '{objective.name}' has a price of divergence, --beta, and no budget: leave it out"
        )
    if objective.budgeted and (beta is None) == (asked.max_kl is None):
        said = "one of them" if beta is None else "only one of them, for each settles the other"
        raise InvalidOption(f"beta says what a nat from the proposal costs, and max_kl how many there may be: give {said}")
    if asked.max_kl is not None and asked.objective_options.get("beta_start") is not None:
        raise InvalidOption("beta_start: max_kl settles beta in every round: leave one of them out")
    if asked.max_kl is not None and asked.proposal_temperature not in (None, 1):
        raise InvalidOption("max_kl: samples tell of the proposal at temperature 1: leave out --proposal_temperature")
    if asked.proposal_top_p not in (None, 1):
        raise InvalidOption("proposal_top_p: rewards train on whole rows, and what is cut has no gradient: leave it out")
    if asked.proposal_endpoint:
        raise InvalidOption(
            "proposal_endpoint: the proposal trains along here; --sampling_endpoint names who draws the samples"
        )
    if asked.sampling_endpoint and asked.max_kl is not None:
        raise InvalidOption(
            "max_kl: β is found by what samples here tell of the proposal: give --beta beside --sampling_endpoint"
        )
    if asked.sampling_endpoint and not asked.reward:
        raise InvalidOption("sampling_endpoint: without --reward nothing is drawn to learn from: leave it out")
    if asked.teacher_prompt is not None:
        raise InvalidOption(f"teacher_prompt: objective '{objective.name}' learns from rewards: leave it out")
    if asked.dry_run:
        raise InvalidOption(f"dry_run: what rounds of '{objective.name}' take depends on the answers: leave it out")


def _refuse_beside_filed(asked: TrainOptions, objective: Objective) -> None:
    """What cannot be learnt from answers of anybody's, and what has no effect where none are drawn."""
    if not hasattr(objective, "replay_share"):
        raise InvalidOption(f"rewards: '{objective.name}' learns from its own samples alone: take tb, or leave out --rewards")
    if objective.prefixes:
        raise InvalidOption(
            f"rewards: a file does not say what its answers' beginnings are worth, which this '{objective.name}' learns from:"
            " take tb"
        )
    if asked.reward:
        return
    if asked.max_kl is not None:
        raise InvalidOption("max_kl: β is found by samples that are drawn: name a --reward, or give --beta")
    drawn = ("tempered_share", "lowest_temperature", "highest_temperature", "replay_share")
    if told := [name for name in drawn if asked.objective_options.get(name) is not None]:
        raise InvalidOption(f"{told[0]}: without --reward nothing is drawn to learn from: leave it out")


def _refuse_beside_teacher(asked: TrainOptions, objective: Objective) -> None:
    """What a run cannot be told beside `teacher_prompt`."""
    if objective.taught() is None:
        raise InvalidOption(
            f"teacher_prompt is learnt from whole rows, by objective likelihood, and '{objective.name}' looks at tokens:"
            " leave one of them out"
        )
    if asked.keep_samples:
        raise InvalidOption("keep_samples: with --teacher_prompt every row is learnt from the proposal: leave it out")
    if asked.proposal_endpoint:
        raise InvalidOption(
            "teacher_prompt needs the proposal here: an endpoint names the best tokens of a row, and not how likely those are"
            " that are best behind the other prompt; leave out --proposal_endpoint"
        )
    if asked.cache_top_k and asked.cache_tail_samples == 0:
        raise InvalidOption(
            "cache_tail_samples 0 would leave out the tail of the teacher's rows: give at least 1, or keep every entry with"
            " --cache_top_k 0"
        )
