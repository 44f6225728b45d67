"""One training run from options to a finished aligner, resumable after a kill at any point.

Records → examples → cached proposal rows → trainer → tuned weight → aligner folder → its drafter, if it gets one.
`run.json` in the output folder says what the run depends on, so that only the same run is resumed; `training.json` is its
record.
"""

import contextlib
import copy
import dataclasses
import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainingArguments

from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, fingerprint_examples, mean_tokens
from trimtab.files import finite, named_errors, only_writer, read_json, write_json
from trimtab.models.adapter_folder import Base
from trimtab.models.aligner import Aligner, describe
from trimtab.models.attention import without_cudnn
from trimtab.models.head import Head
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import check_same_vocabulary, vocabulary_size
from trimtab.train.arguments import need_training, training_arguments
from trimtab.train.batches import ExampleDataset, collate
from trimtab.train.caches import open_caches
from trimtab.train.checks import warn_of_rule, warn_of_weight
from trimtab.train.draft import CHECKPOINTS, check_draft_start, train_draft
from trimtab.train.folder import LOCK, is_finished, last_checkpoint, open_run, refuse_foreign
from trimtab.train.head import HeadStart
from trimtab.train.head_draft import train_head_draft
from trimtab.train.headroom import warn_of_memory
from trimtab.train.inputs import (
    count_lacking,
    encode_parts,
    open_proposal,
    open_tokenizer,
    read_parts,
    run_date,
    settle_pairs,
)
from trimtab.train.online.run import run_online
from trimtab.train.options import TrainOptions
from trimtab.train.plan import Facts, Plan, Temperatures, announce_round, resolve
from trimtab.train.progress import CompactProgress
from trimtab.train.ranks import Ranks
from trimtab.train.record import describe_run, make_manifest, save_trained
from trimtab.train.rows import Layout, RowSource
from trimtab.train.samples import draw_samples
from trimtab.train.start import describe_lora, load_start, prepare_model, read_lora
from trimtab.train.taught_rows import warn_of_ends
from trimtab.train.teacher import Teacher, lack_answers
from trimtab.train.teacher_answers import draw_answers
from trimtab.train.temper import TOP_K, fit_temperatures
from trimtab.train.trainer import AlignerTrainer, fit
from trimtab.train.tune import RANGES, tune_weight
from trimtab.train.whole_rows import tune_on_whole_rows

__all__ = ["run_training"]

logger = logging.getLogger(__name__)


class _Run(NamedTuple):
    """What both trainings of a run share, the aligner's and its drafter's."""

    plan: Plan
    """At the temperatures that were fitted."""
    arguments: TrainingArguments
    output: Path
    ranks: Ranks
    tokenizer: Any
    data: dict[str, ExampleDataset]
    """What trainers call them: `train_dataset` and `eval_dataset`."""
    equal_pairs: int
    """How many pairs have two equal answers."""
    draft_start: Base | None
    """What a drafter starts from: the one that the aligner came with, otherwise the aligner itself, or an adapter's base.

    None for a head, whose drafter starts from the proposal's layers."""
    teacher: Teacher | None
    head: HeadStart | None

    @property
    def examples(self) -> Sequence[Example]:
        """Those of the data that are trained on, without what the proposal said itself."""
        return self.data["train_dataset"].given

    @property
    def mean_length(self) -> float:
        """Tokens of their wanted answers, by weight."""
        return mean_tokens(self.examples)


def run_training(asked: TrainOptions) -> dict[str, Any]:
    """Train an aligner and save it in `asked.output_dir`.

    Returns:
        What `training.json` holds: `tokens`, `cache`, `contrast`, `equal_pairs`, `sft_weight`, `learning_rate`, `weight`,
        `weights_tried`, `kl` at the weight, `tuned_on` whole rows if those of the cache did not do, `metrics` at the end,
        `history`, `seconds`; `samples` and `sample_figures`; of a drafter, `draft` with its own `metrics`, `history` and
        `seconds`.

    Raises:
        TrimtabError: something cannot be read, used or combined; said before any work is done where that is possible.
    """
    need_training()
    facts = Facts(describe(asked.aligner) if asked.aligner else None)
    plan = resolve(asked, facts)
    announce_round(asked, plan)
    warn_of_rule(plan)
    output = Path(asked.output_dir)
    arguments = training_arguments(plan)
    ranks = Ranks(arguments.process_index, arguments.world_size)
    with contextlib.ExitStack() as stack:
        ranks.first_does(lambda: _take(stack, output, asked.overwrite_output_dir))
        stack.enter_context(named_errors(output))
        stack.enter_context(without_cudnn(arguments.device))
        how = run_online if plan.objective.rewarded else _train
        return how(asked, facts, output, arguments, ranks)


def _take(stack: contextlib.ExitStack, output: Path, overwrite: bool) -> None:
    """Make sure that this run, and no other, writes into the output folder."""
    refuse_foreign(output, overwrite)
    stack.enter_context(only_writer(output / LOCK))


def _open(output: Path, run: dict[str, Any], drafting: dict[str, Any] | None, overwrite: bool) -> None:
    """Make the folder this run's own; what only a drafter depends on is kept with its checkpoints, for it may come later."""
    open_run(output, run, overwrite)
    if drafting is not None:
        (output / CHECKPOINTS).mkdir(exist_ok=True)
        open_run(output / CHECKPOINTS, drafting, overwrite)


def _train(asked: TrainOptions, facts: Facts, output: Path, arguments: TrainingArguments, ranks: Ranks) -> dict[str, Any]:
    started, found, plan = time.monotonic(), facts.aligner, resolve(asked, facts)
    teacher = Teacher.read(plan.asked.teacher_prompt) if plan.asked.teacher_prompt is not None else None
    tokenizer = open_tokenizer(plan, asked.proposal)
    if found is not None:
        check_same_vocabulary(tokenizer, found.tokenizer, plan.asked.aligner)
    start = None if found is None or plan.trains_head else load_start(plan, found)
    proposal = open_proposal(plan, tokenizer)
    head = None if start else HeadStart.of(plan, proposal, found)
    context = min(context_of(start.model.config) if start else proposal.context, proposal.context)
    asked = dataclasses.replace(asked, date=ranks.first_does(partial(run_date, plan, tokenizer)))
    plan = resolve(asked, facts)
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), proposal.eos_token_ids, plan.asked.date)
    parts = read_parts(plan, tokenizer)
    examples, development = encode_parts(parts, plan, encoder, context, proposal.context)
    everything = examples + development
    facts = facts._replace(records=len(everything), lacking=count_lacking(everything))
    plan = resolve(asked, facts)
    asked.asked_objective.announce(plan.setting)
    settled = settle_pairs(plan, examples, development)
    run = describe_run(plan, arguments, fingerprint_examples(everything, rejected=True, weights=True))
    run["teacher_prompt"] = teacher and teacher.digest
    run |= {"proposal_weights": proposal.rows.fingerprint}
    if began := start or (head and head.earlier):
        run["aligner_weights"] = began.files.fingerprint
    if head is not None:  # the default was another one once
        run["head_layers"] = head.head.layers - head.head.tap
    if found is not None and found.is_adapter:  # the options' settings are of fresh adapters
        run = {name: value for name, value in run.items() if not name.startswith("lora_")} | {
            "lora": describe_lora(found.folder)
        }
    drafting: dict[str, Any] | None = None
    if plan.trains_draft:
        needs = vocabulary_size(tokenizer), min(plan.asked.max_length, context)
        drafting = {"draft_weights": check_draft_start(found.draft, *needs) if start and found and found.draft else None}
    ranks.first_does(lambda: _open(output, run, drafting, plan.asked.overwrite_output_dir))
    examples, development, equal = settled
    if drawn := teacher is not None and lack_answers(parts):
        parts = draw_answers(plan, proposal, encoder, output, arguments.seed, ranks, parts)
        examples, development = encode_parts(parts, plan, encoder, context, proposal.context)
    scaled = copy.copy(arguments)
    if plan.fits_temperatures:
        fitting = partial(_temperatures, plan, arguments, output, start and start.model, proposal.rows, development)
        facts = facts._replace(fitted=ranks.first_does(fitting))
        del fitting
        plan = resolve(asked, facts)
        # logits that count for less are learnt at a rate that is larger by as much
        scaled.learning_rate *= plan.temperatures.aligner / plan.given.aligner
    room, pairs = min(plan.asked.max_length, context), plan.reads_rejected
    kept = head.kept_samples(encoder, room, arguments.seed, ranks, pairs=pairs) if head else []
    if ranks.count == 1 and not is_finished(output):
        whole = proposal.model and proposal.model.model
        model, made_of = (start.model, None) if start else (whole, head.plan if head else None)
        lora = read_lora(found.folder) if start and found and found.is_adapter else None
        warn_of_memory(plan, arguments, vocabulary_size(tokenizer), model, whole, made_of, lora, examples, kept)
    caches = open_caches(plan, proposal.rows, tokenizer, examples + kept, development, ranks)
    if teacher is not None and not drawn:
        ranks.first_does(partial(warn_of_ends, caches["dev"]["teacher"], development, proposal.eos_token_ids))
    hidden = head.caches(examples + kept, development, ranks, pairs=pairs) if head else {"train": {}, "dev": {}}
    data = {
        "train_dataset": ExampleDataset(examples + kept, caches["train"], hidden["train"], len(kept)),
        "eval_dataset": ExampleDataset(development, caches["dev"], hidden["dev"]),
    }
    del proposal
    this = _Run(plan, arguments, output, ranks, tokenizer, data, equal, start and start.draft, teacher, head)
    if ranks.first_does(lambda: is_finished(output)):
        logger.info("%s is already trained with these settings", output)
        report = dict(read_json(output / "training.json"))
    else:
        model = prepare_model(start.model, plan, arguments.seed) if start else head and head.prepare(arguments.seed)
        report = _train_aligner(this, scaled, model, started)
        del model
    if plan.wants_whole_rows and not report["weights_tried"]:
        report |= ranks.first_does(partial(tune_on_whole_rows, plan, output, tokenizer, development))
        ranks.first_does(lambda: write_json(output / "training.json", report))
    draw = partial(draw_samples, plan, output, tokenizer, development)
    if "samples" not in report and (sampled := ranks.first_does(draw)):
        report |= sampled
        ranks.first_does(lambda: write_json(output / "training.json", report))
    if plan.trains_draft and "draft" not in report:
        report["draft"] = _train_head_draft(this, head.head) if head else _train_draft(this, report["weight"])
        ranks.first_does(lambda: write_json(output / "training.json", report))
    return report


def _train_aligner(this: _Run, arguments: TrainingArguments, model: Any, started: float) -> dict[str, Any]:
    """Train, tune and save an aligner; returns the report."""
    plan, output, ranks, tokenizer = this.plan, this.output, this.ranks, this.tokenizer
    caches = {**this.data["eval_dataset"].caches, **this.data["train_dataset"].caches}
    trainer = AlignerTrainer(
        plan,
        vocabulary_size(tokenizer),
        this.mean_length,
        ranks=ranks,
        model=model,
        args=arguments,
        data_collator=partial(collate, edits=plan.objective.edits),
        **this.data,
    )
    CompactProgress.install(trainer, plan.asked.objective)
    fit(trainer, ranks.first_does(lambda: last_checkpoint(output)))
    report: dict[str, Any] = {
        "tokens": sum(len(example.chosen) for example in this.examples),
        "cache": caches["chosen"].facts if "chosen" in caches else None,
        "objective": {"name": plan.objective.name, **dataclasses.asdict(plan.objective)},
        "contrast": getattr(plan.objective, "contrast", 0.0),
        "sft_weight": getattr(plan.objective, "sft_weight", 0.0),
        "equal_pairs": this.equal_pairs,
        "learning_rate": arguments.learning_rate,
        "metrics": trainer.evaluate(),
        "weight": plan.weight,
        "weights_tried": [],
    }
    if plan.rule.name in RANGES and not plan.wants_whole_rows:
        tuned = tune_weight(plan.rule, trainer.losses_at, ranks, plan.asked.max_kl, stay=plan.stay)
        warn_of_weight(plan, tuned)
        report |= {"weight": tuned.weight, "weights_tried": tuned.tried, "kl": tuned.kl}
    if this.teacher is not None:
        report["teacher"] = {"prompt": this.teacher.digest, "cache": caches["teacher"].facts}
    report["history"] = trainer.state.log_history
    report["seconds"] = time.monotonic() - started
    report = dict(finite(report))
    manifest = make_manifest(plan, tokenizer, report["weight"], None if this.head is None else this.head.head)
    save_trained(trainer, Aligner(None, tokenizer, manifest, str(output)), report, output, ranks, this.head)
    return report


def _temperatures(
    plan: Plan, arguments: TrainingArguments, output: Path, model: Any, rows: RowSource, examples: list[Example]
) -> Temperatures:
    """The temperatures to train at where none is given; `start.json` keeps what was fitted."""
    path = output / "start.json"
    if not path.exists():
        # with a teacher the proposal is its own: its temperature is nothing to fit
        given = plan.given.proposal if plan.has_teacher else plan.asked.proposal_temperature
        layout = Layout.of(TOP_K, 0, rows.vocab_size)
        if plan.asked.proposal_endpoint and plan.asked.cache_top_k:  # these rows have temperature 1, and no more entries
            given, layout = 1.0, plan.row_layout(rows.vocab_size)
        fitted = fit_temperatures(model, rows, examples, arguments.eval_batch_size, given, layout)
        fitted = fitted._replace(aligner=fitted.aligner * plan.weight)
        write_json(path, fitted._asdict())
    fitted = Temperatures(**read_json(path))
    logger.info("the start fits best at proposal_temperature %g and aligner_temperature %g", *fitted)
    return fitted


def _train_draft(this: _Run, weight: float) -> dict[str, Any]:
    """Distil the finished aligner's drafter from the aligned model, and save it; returns its report."""
    assert this.draft_start is not None  # as for all but heads
    how = this.draft_start, weight, this.mean_length, this.arguments.learning_rate
    return train_draft(this.plan, this.output, this.tokenizer, this.ranks, *how, this.data)


def _train_head_draft(this: _Run, head: Head) -> dict[str, Any]:
    """The same for a finished head."""
    parts = this.examples, this.data["eval_dataset"].examples
    output, rate = this.output, this.arguments.learning_rate
    return train_head_draft(this.plan, output, output / CHECKPOINTS, head, this.tokenizer, parts, this.ranks, rate)
