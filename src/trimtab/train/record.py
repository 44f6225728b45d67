"""What is written of a run: `run.json`, which only the same run goes on from, the manifest, the aligner's folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trimtab.data.rewrite_template import read_template
from trimtab.files import write_json
from trimtab.models.aligner import Aligner, Manifest
from trimtab.models.head import Head
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.train.defaults import training_of_effect
from trimtab.train.head import HeadStart, TrainedHead
from trimtab.train.online.options import OnlineOptions
from trimtab.train.options import ENDPOINT_OPTIONS, OF_DRY_RUN, TrainOptions
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.trainer import AlignerTrainer, trained

__all__ = ["describe_run", "make_manifest", "save_trained"]

OBJECTIVE_OPTIONS = {"alpha": 1e-4, "beta": None, "contrast": None, "sft_weight": None}
"""What `run.json` says of our objectives' options where nobody has named them; those of other packages stand apart."""


def describe_run(plan: Plan, arguments: TrainingArguments, data: str) -> dict[str, Any]:
    """What a run's result depends on, as plain JSON."""
    apart = {"output_dir", "overwrite_output_dir", "train_draft", "dev_samples"}  # a finished aligner may get these two later
    ignored = {*apart, "training", "objective_options", "proposal_cache", "device", *ENDPOINT_OPTIONS, *OF_DRY_RUN}
    names = {field.name for field in dataclasses.fields(TrainOptions)} - ignored
    online = {field.name for field in dataclasses.fields(OnlineOptions)}
    said = {"max_tokens", "num_generations", "dev_prompts"}  # what a reward is, its label says
    names -= online - said if plan.objective.rewarded else online
    described = {name: getattr(plan.asked, name) for name in names}  # copies nothing: a reward may hold models
    asked = {name: value for name, value in plan.asked.objective_options.items() if value is not None}
    described |= OBJECTIVE_OPTIONS | {name: value for name, value in asked.items() if name in OBJECTIVE_OPTIONS}
    own = plan.asked.asked_objective.described()
    if others := {name: value for name, value in own.items() if name not in OBJECTIVE_OPTIONS}:
        described["objective_options"] = others
    described |= {
        "lora_dropout": plan.lora_dropout,
        "training": training_of_effect(plan.asked.training),
        "seed": arguments.seed,
        "data": data,
    }
    return dict(json.loads(json.dumps(described, sort_keys=True, default=str)))


def make_manifest(plan: Plan, tokenizer: Any, weight: float, head: Head | None) -> Manifest:
    """How the aligner is to be decoded."""
    return Manifest(
        vocabulary=fingerprint_vocabulary(tokenizer),
        proposal={"id": plan.asked.proposal_id or plan.asked.proposal, "revision": None},
        rule=plan.asked.rule,
        weight=weight,
        proposal_temperature=plan.temperatures.proposal,
        proposal_top_p=1.0 if plan.asked.proposal_top_p is None else plan.asked.proposal_top_p,
        aligner_temperature=plan.temperatures.aligner,
        objective=plan.asked.objective,
        head=None if head is None else dataclasses.asdict(head),
        rewriter_template=None if plan.asked.rewriter_template is None else str(read_template(plan.asked.rewriter_template)),
    )


def save_trained(
    trainer: AlignerTrainer, aligner: Aligner, report: dict[str, Any], output: Path, ranks: Ranks, head: HeadStart | None
) -> None:
    """Write what came of it."""
    model, weights = trained(trainer)
    aligner.model = model if head is None else TrainedHead(model, head.source, head.head)

    def write() -> None:
        write_json(output / "training.json", report)
        aligner.save_pretrained(output, weights=weights)

    ranks.first_does(write)
