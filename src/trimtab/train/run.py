"""One training run from options to a finished aligner, resumable after a kill at any point.

Records → examples → cached proposal rows → trainer → tuned weight → aligner folder → its drafter, if it gets one.
`run.json` in the output folder says what the run depends on, so that only the same run is resumed; `training.json` is its
record.
"""

import contextlib
import copy
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, answers, fingerprint_examples
from trimtab.files import finite, named_errors, only_writer, read_json, write_json
from trimtab.models.adapter_folder import Base
from trimtab.models.aligner import DRAFT_NAME, Aligner, Description, Manifest, describe, save_model
from trimtab.models.attention import without_cudnn
from trimtab.models.head import Head
from trimtab.models.loading import load_model
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import check_same_vocabulary, fingerprint_vocabulary, vocabulary_size
from trimtab.train.arguments import need_training, training_arguments
from trimtab.train.batches import ExampleDataset, collate
from trimtab.train.cache import ProposalCache
from trimtab.train.checks import warn_of_rule, warn_of_weight
from trimtab.train.draft import CHECKPOINTS, DraftTrainer, check_draft_start, draft_options
from trimtab.train.fit import fit, trained
from trimtab.train.folder import LOCK, is_finished, last_checkpoint, open_run, refuse_foreign
from trimtab.train.head import HeadStart, TrainedHead
from trimtab.train.head_draft import train_head_draft
from trimtab.train.head_options import stay_of
from trimtab.train.headroom import warn_of_memory
from trimtab.train.inputs import encode_parts, open_tokenizer, read_parts, run_date
from trimtab.train.options import ENDPOINT_OPTIONS, Temperatures, TrainOptions
from trimtab.train.pairs import settle_pairs
from trimtab.train.progress import CompactProgress
from trimtab.train.proposal import open_proposal
from trimtab.train.ranks import Ranks
from trimtab.train.rounds import settle
from trimtab.train.rows import Layout, ModelRows, RowSource
from trimtab.train.samples import draw_samples
from trimtab.train.start import describe_lora, load_start, prepare_model, read_lora
from trimtab.train.taught_rows import TaughtCache, TeacherRows, warn_of_ends
from trimtab.train.taught_trainer import trainer_of
from trimtab.train.teacher import Teacher, lack_answers
from trimtab.train.teacher_answers import draw_answers
from trimtab.train.temper import TOP_K, fit_temperatures
from trimtab.train.trainer import AlignerTrainer
from trimtab.train.tune import RANGES, tune_weight
from trimtab.train.whole_rows import tune_on_whole_rows, wants_whole_rows

__all__ = ["open_caches", "train", "training_of_effect"]

logger = logging.getLogger(__name__)


class _Run(NamedTuple):
    """What both trainings of a run share, the aligner's and its drafter's."""

    options: TrainOptions
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
        """Tokens of their wanted answers."""
        return sum(len(example.chosen) for example in self.examples) / len(self.examples)


def train(options: TrainOptions) -> dict[str, Any]:
    """Train an aligner and save it in `options.output_dir`.

    Returns:
        What `training.json` holds: `tokens`, `cache`, `contrast`, `equal_pairs`, `sft_weight`, `learning_rate`, `weight`,
        `weights_tried`, `kl` at the weight, `tuned_on` whole rows if those of the cache did not do, `metrics` at the end,
        `history`, `seconds`; `samples` and `sample_figures`; of a drafter, `draft` with its own `metrics`, `history` and
        `seconds`.

    Raises:
        TrimtabError: something cannot be read, used or combined; said before any work is done where that is possible.
    """
    need_training()
    found = describe(options.aligner) if options.aligner else None
    options = settle(options, found)
    warn_of_rule(options)
    output = Path(options.output_dir)
    arguments = training_arguments(options)
    ranks = Ranks(arguments.process_index, arguments.world_size)
    with contextlib.ExitStack() as stack:
        ranks.first_does(lambda: _take(stack, output, options.overwrite_output_dir))
        stack.enter_context(named_errors(output))
        stack.enter_context(without_cudnn(arguments.device))
        return _train(options, found, output, arguments, ranks)


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


def _train(
    options: TrainOptions, found: Description | None, output: Path, arguments: TrainingArguments, ranks: Ranks
) -> dict[str, Any]:
    started = time.monotonic()
    teacher = Teacher.read(options.teacher_prompt) if options.teacher_prompt is not None else None
    tokenizer = open_tokenizer(options, options.proposal)
    if found is not None:
        check_same_vocabulary(tokenizer, found.tokenizer, options.aligner)
    start = None if found is None or options.trains_head else load_start(options, found)
    proposal = open_proposal(options, tokenizer)
    head = None if start else HeadStart.of(options, proposal, found)
    context = min(context_of(start.model.config) if start else proposal.context, proposal.context)
    options = dataclasses.replace(options, date=ranks.first_does(lambda: run_date(options, tokenizer)))
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), proposal.eos_token_ids, options.date)
    parts = read_parts(options, tokenizer)
    examples, development = encode_parts(parts, options, encoder, context, proposal.context)
    settled = settle_pairs(options, examples, development)
    everything = examples + development
    run = _describe_run(options, arguments, fingerprint_examples(everything, rejected=True))
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
    if options.trains_draft:
        needs = vocabulary_size(tokenizer), min(options.max_length, context)
        drafting = {"draft_weights": check_draft_start(found.draft, *needs) if start and found and found.draft else None}
    ranks.first_does(lambda: _open(output, run, drafting, options.overwrite_output_dir))
    options, examples, development, equal = settled
    if drawn := teacher is not None and lack_answers(parts):
        parts = draw_answers(options, proposal, encoder, output, arguments.seed, ranks, parts)
        examples, development = encode_parts(parts, options, encoder, context, proposal.context)
    fitting = partial(_temperatures, options, arguments, output, start and start.model, proposal.rows, development)
    fitted = ranks.first_does(fitting)
    scaled = copy.copy(arguments)  # logits that count for less are learnt at a rate that is larger by as much
    scaled.learning_rate *= fitted.aligner / options.temperatures.aligner
    options = options.at(fitted)
    room, pairs = min(options.max_length, context), options.needs_rejected
    kept = head.kept_samples(encoder, room, arguments.seed, ranks, pairs=pairs) if head else []
    if ranks.count == 1 and not is_finished(output):
        whole = proposal.model and proposal.model.model
        model, plan = (start.model, None) if start else (whole, head.plan if head else None)
        lora = read_lora(found.folder) if start and found and found.is_adapter else None
        warn_of_memory(options, arguments, vocabulary_size(tokenizer), model, whole, plan, lora, examples, kept)
    caches = open_caches(options, proposal.rows, tokenizer, examples + kept, development, ranks)
    if teacher is not None and not drawn:
        ranks.first_does(partial(warn_of_ends, caches["dev"]["teacher"], development, proposal.eos_token_ids))
    hidden = head.caches(examples + kept, development, ranks, pairs=pairs) if head else {"train": {}, "dev": {}}
    data = {
        "train_dataset": ExampleDataset(examples + kept, caches["train"], hidden["train"], len(kept)),
        "eval_dataset": ExampleDataset(development, caches["dev"], hidden["dev"]),
    }
    del proposal, fitting
    this = _Run(options, arguments, output, ranks, tokenizer, data, equal, start and start.draft, teacher, head)
    if ranks.first_does(lambda: is_finished(output)):
        logger.info("%s is already trained with these settings", output)
        report = dict(read_json(output / "training.json"))
    else:
        model = prepare_model(start.model, options, arguments.seed) if start else head and head.prepare(arguments.seed)
        report = _train_aligner(this, scaled, model, started)
        del model
    if wants_whole_rows(options) and not report["weights_tried"]:
        report |= ranks.first_does(partial(tune_on_whole_rows, options, output, tokenizer, development))
        ranks.first_does(lambda: write_json(output / "training.json", report))
    draw = partial(draw_samples, options, output, tokenizer, development)
    if "samples" not in report and (sampled := ranks.first_does(draw)):
        report |= sampled
        ranks.first_does(lambda: write_json(output / "training.json", report))
    if options.trains_draft and "draft" not in report:
        report["draft"] = _train_head_draft(this, head.head) if head else _train_draft(this, report["weight"])
        ranks.first_does(lambda: write_json(output / "training.json", report))
    return report


def _train_aligner(this: _Run, arguments: TrainingArguments, model: Any, started: float) -> dict[str, Any]:
    """Train, tune and save an aligner; returns the report."""
    options, output, ranks, tokenizer = this.options, this.output, this.ranks, this.tokenizer
    caches = {**this.data["eval_dataset"].caches, **this.data["train_dataset"].caches}
    trainer = trainer_of(options)(
        options,
        vocabulary_size(tokenizer),
        this.mean_length,
        ranks=ranks,
        model=model,
        args=arguments,
        data_collator=collate,
        **this.data,
    )
    CompactProgress.install(trainer, options.objective)
    fit(trainer, ranks.first_does(lambda: last_checkpoint(output)))
    report: dict[str, Any] = {
        "tokens": sum(len(example.chosen) for example in this.examples),
        "cache": caches["chosen"].facts if "chosen" in caches else None,
        "contrast": options.contrast,
        "equal_pairs": this.equal_pairs,
        "sft_weight": options.regulariser if options.objective == "likelihood" else 0.0,
        "learning_rate": arguments.learning_rate,
        "metrics": trainer.evaluate(),
        "weight": options.starting_weight,
        "weights_tried": [],
    }
    if options.parsed_rule.name in RANGES and not wants_whole_rows(options):
        tuned = tune_weight(options.parsed_rule, trainer.losses_at, ranks, options.max_kl, stay=stay_of(options))
        warn_of_weight(options, tuned)
        report |= {"weight": tuned.weight, "weights_tried": tuned.tried, "kl": tuned.kl}
    if this.teacher is not None:
        report["teacher"] = {"prompt": this.teacher.digest, "cache": caches["teacher"].facts}
    report["history"] = trainer.state.log_history
    report["seconds"] = time.monotonic() - started
    report = dict(finite(report))
    manifest = _manifest(options, tokenizer, report["weight"], this.head)
    _save(trainer, Aligner(None, tokenizer, manifest, str(output)), report, output, ranks, this.head)
    return report


def _temperatures(
    options: TrainOptions, arguments: TrainingArguments, output: Path, model: Any, rows: RowSource, examples: list[Example]
) -> Temperatures:
    """The temperatures to train at where the options name none; `start.json` keeps what was fitted."""
    if not options.starts_tempered:
        return options.temperatures
    path = output / "start.json"
    if not path.exists():
        taught = options.teacher_prompt is not None  # the proposal is its own teacher: its temperature is nothing to fit
        given = options.temperatures.proposal if taught else options.proposal_temperature
        layout = Layout.of(TOP_K, 0, rows.vocab_size)
        if options.proposal_endpoint and options.cache_top_k:  # these rows have temperature 1, and no more entries
            given, layout = 1.0, options.row_layout(rows.vocab_size)
        fitted = fit_temperatures(model, rows, examples, arguments.eval_batch_size, given, layout)
        fitted = fitted._replace(aligner=fitted.aligner * options.starting_weight)
        write_json(path, fitted._asdict())
    fitted = Temperatures(**read_json(path))
    logger.info("the start fits best at proposal_temperature %g and aligner_temperature %g", *fitted)
    return fitted


def _train_draft(this: _Run, weight: float) -> dict[str, Any]:
    """Distil the finished aligner's drafter from the aligned model, and save it; returns its report."""
    started = time.monotonic()
    options, output, ranks, tokenizer = this.options, this.output, this.ranks, this.tokenizer
    assert this.draft_start is not None  # as for all but heads
    base, own = this.draft_start, training_arguments(draft_options(options, this.arguments.learning_rate))
    trainer = DraftTrainer(
        options,
        vocabulary_size(tokenizer),
        this.mean_length,
        aligner=Aligner.from_pretrained(output, dtype=torch.float32, device="cpu").model,
        weight=weight,
        ranks=ranks,
        model=load_model(base.source, dtype=torch.float32, device="cpu", revision=base.revision),
        args=own,
        data_collator=collate,
        **this.data,
    )
    CompactProgress.install(trainer, "draft")
    fit(trainer, ranks.first_does(lambda: last_checkpoint(Path(own.output_dir))))
    report = {"metrics": trainer.evaluate(), "history": trainer.state.log_history, "seconds": time.monotonic() - started}
    model, weights = trained(trainer)
    ranks.first_does(lambda: save_model(model, tokenizer, output / DRAFT_NAME, weights=weights))
    return dict(finite(report))


def _train_head_draft(this: _Run, head: Head) -> dict[str, Any]:
    """The same for a finished head."""
    parts = this.examples, this.data["eval_dataset"].examples
    output, rate = this.output, this.arguments.learning_rate
    return train_head_draft(this.options, output, output / CHECKPOINTS, head, this.tokenizer, parts, this.ranks, rate)


def _save(
    trainer: AlignerTrainer, aligner: Aligner, report: dict[str, Any], output: Path, ranks: Ranks, head: HeadStart | None
) -> None:
    """Write what came of it."""
    model, weights = trained(trainer)
    aligner.model = model if head is None else TrainedHead(model, head.source, head.head)

    def write() -> None:
        write_json(output / "training.json", report)
        aligner.save_pretrained(output, weights=weights)

    ranks.first_does(write)


def open_caches(
    options: TrainOptions, rows: RowSource, tokenizer: Any, examples: list[Example], development: list[Example], ranks: Ranks
) -> dict[str, dict[str, ProposalCache]]:
    """The cached rows of both parts, by the kind of answer that they are on."""
    folder = Path(options.proposal_cache or Path(options.output_dir) / "proposal_cache")
    parts = {"train": examples, "dev": development}
    caches: dict[str, dict[str, ProposalCache]] = {part: {} for part in parts}
    for part, which in options.cached_answers:
        name = part if which == "chosen" else f"{part}_{which}"
        source, kind, some, layout = rows, ProposalCache, parts[part], options.row_layout
        if which == "teacher":
            assert isinstance(rows, ModelRows)  # as `refuse_beside_teacher` has it
            source, kind, layout = TeacherRows(rows), TaughtCache, options.taught_layout
        cache = caches[part][which] = kind.build(
            folder / name,
            source,
            fingerprint_vocabulary(tokenizer),
            some if which == "teacher" else answers(some, which),
            layout=layout(rows.vocab_size),
            temperature=options.temperatures.proposal,
            ranks=ranks,
        )
        facts = cache.facts
        error = "an error that is not known"
        mean, rms = (facts[name] for name in kind.losses[2:])
        if mean is not None:
            error = f"an error of {mean:.2g} nats a token (root mean square {rms:.2g}) in {kind.of}"
        logger.info("%s cache: %d tokens, %.0f bytes a token; %s", name, facts["tokens"], facts["bytes_per_token"], error)
    return caches


def _describe_run(options: TrainOptions, arguments: TrainingArguments, data: str) -> dict[str, Any]:
    """What a run's result depends on, as plain JSON."""
    apart = {"output_dir", "overwrite_output_dir", "train_draft", "dev_samples"}  # a finished aligner may get these two later
    ignored = {*apart, "training", "proposal_cache", "device", *ENDPOINT_OPTIONS}
    names = {field.name for field in dataclasses.fields(TrainOptions)} - ignored
    described = {key: value for key, value in dataclasses.asdict(options).items() if key in names}
    described |= {"training": training_of_effect(options.training), "seed": arguments.seed, "data": data}
    return dict(json.loads(json.dumps(described, sort_keys=True, default=str)))


def training_of_effect(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the given `TrainingArguments` that a result depends on."""
    reporting = ("dir", "logging", "report", "run_name", "save_total", "hub", "tqdm", "log_level")
    return {key: value for key, value in given.items() if not any(word in key for word in reporting)}


def _manifest(options: TrainOptions, tokenizer: Any, weight: float, head: HeadStart | None) -> Manifest:
    return Manifest(
        vocabulary=fingerprint_vocabulary(tokenizer),
        proposal={"id": options.proposal_id or options.proposal, "revision": None},
        rule=options.rule,
        weight=weight,
        proposal_temperature=options.temperatures.proposal,
        proposal_top_p=1.0 if options.proposal_top_p is None else options.proposal_top_p,
        aligner_temperature=options.temperatures.aligner,
        objective=options.objective,
        head=None if head is None else dataclasses.asdict(head.head),
    )
