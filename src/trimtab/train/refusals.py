"""What `TrainOptions` refuses before any work is done: values out of range, and options that contradict each other."""

import math
from typing import TYPE_CHECKING

from trimtab.core.rules import Geometric, Product
from trimtab.data.cut import CUT_ANSWERS
from trimtab.data.records import parse_columns
from trimtab.data.template import check_date
from trimtab.errors import InvalidOption
from trimtab.models.aligner import OBJECTIVES
from trimtab.train.teacher import refuse_beside_teacher
from trimtab.train.tune import RANGES

if TYPE_CHECKING:
    from trimtab.train.options import TrainOptions

__all__ = ["STARTS", "refuse_contradictions"]

STARTS = ("auto", "tempered", "pretrained", "uniform")
"""Where training may start."""


def refuse_contradictions(options: "TrainOptions") -> None:
    """Refuse options with which no run can be what was asked for.

    Raises:
        InvalidOption: names the option and says why.
    """
    for name in ("proposal", "dataset", "output_dir"):
        if not getattr(options, name):
            raise InvalidOption(f"--{name} is required")
    check_date(options.date)
    if options.aligner and options.would_overwrite(options.aligner):
        raise InvalidOption(f"output_dir holds the aligner, {options.aligner}: choose another one")
    if options.objective not in OBJECTIVES:
        raise InvalidOption(f"objective must be one of {', '.join(OBJECTIVES)}, not '{options.objective}'")
    if options.start not in STARTS:
        raise InvalidOption(f"start must be one of {', '.join(STARTS)}, not '{options.start}'")
    for name, low, high in (
        ("alpha", 0, math.inf),
        ("dev_fraction", 1e-9, 0.9),
        ("beta", 1e-9, math.inf),
        ("contrast", 0, math.inf),
        ("sft_weight", 0, math.inf),
        ("proposal_temperature", 1e-3, math.inf),
        ("aligner_temperature", 1e-3, math.inf),
        ("proposal_top_p", 1e-9, 1),
        ("max_kl", 1e-9, math.inf),
        ("dev_samples", 0, math.inf),
        ("max_length", 2, math.inf),
        ("max_examples", 2, math.inf),
        ("cache_top_k", 0, math.inf),
        ("cache_tail_samples", 0, math.inf),
        ("teacher_max_tokens", 1, math.inf),
        ("head_layers", 1, math.inf),
        ("keep_samples", 0, math.inf),
        ("lora_r", 1, math.inf),
        ("lora_dropout", 0, 1),
    ):
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise InvalidOption(f"{name} must be from {low:g} to {high:g}, not {value}")
    if options.cut_answers not in CUT_ANSWERS:
        raise InvalidOption(f"cut_answers must be one of {', '.join(CUT_ANSWERS)}, not '{options.cut_answers}'")
    if options.weight is not None and not math.isfinite(options.weight):
        raise InvalidOption(f"weight must be a finite number, not {options.weight}")
    rule = options.parsed_rule
    if rule.looks_back:
        raise InvalidOption(
            f"rule: '{rule}' looks at the text before a row, and aligners are trained on rows: train for another"
        )
    if options.objective == "likelihood" and not isinstance(rule, (Product, Geometric)):
        raise InvalidOption(f"likelihood trains product or geometric, for '{rule}' use sft")
    if options.max_kl is not None and rule.name not in RANGES:
        raise InvalidOption(f"max_kl bounds the weight that is tuned, and '{rule}' has none: leave it out")
    if options.dev_samples and options.proposal_endpoint:
        raise InvalidOption("dev_samples: text is sampled from a proposal that is here, not from an endpoint: leave it out")
    for name in ("contrast", "sft_weight"):
        if getattr(options, name) and options.objective != "likelihood":
            raise InvalidOption(f"{name} is a part of likelihood, and '{options.objective}' has none: leave it out")
    if options.use_peft and options.start == "uniform":
        raise InvalidOption("start 'uniform' retrains the output layer, which --use_peft keeps: choose one of them")
    if options.start == "tempered" and not options.can_be_tempered:
        raise InvalidOption(
            "start 'tempered' fits the aligner's temperature for likelihood with product at a weight above 0:"
            " leave out --aligner_temperature, or choose another start"
        )
    if options.train_draft and not (options.trains_residual or options.trains_head):
        raise InvalidOption("train_draft: only a residual, which is likelihood with product, and a head need a drafter")
    if options.keep_samples and options.objective != "likelihood":  # whether it is a head, its folder says
        raise InvalidOption("keep_samples: only a head is kept at the proposal by its samples, under likelihood: leave it out")
    if options.keep_samples and options.teacher_prompt is not None:
        raise InvalidOption("keep_samples: with --teacher_prompt every row is learnt from the proposal: leave it out")
    if options.teacher_prompt is not None:
        refuse_beside_teacher(options)
    _ = options.limits, parse_columns(options.columns)  # raise where they cannot be
    if options.proposal_endpoint and options.proposal_temperature not in (None, 1) and options.cache_top_k:
        raise InvalidOption(
            "an endpoint's rows have temperature 1: another proposal_temperature needs every entry, --cache_top_k 0"
        )
    if options.cache_tail_samples and (why := options.no_tail_samples):
        raise InvalidOption(f"cache_tail_samples must be 0 here: {why}")
