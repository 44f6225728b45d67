"""A small sibling for a proposal that has none: some of its own layers, distilled until they are a language model.

Layers → prompts and answers → cached proposal rows → distillation → a plain transformers folder, which is a start for
`trimtab train`, or a drafter. The folder is a training run's, see `trimtab.train.folder`: a kill costs nothing, and
`training.json` is its record.
"""

import contextlib
import dataclasses
import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, encode_records, fingerprint_examples, mean_tokens, split_examples
from trimtab.data.records import Record, read_records
from trimtab.decode.aligned import AlignedModel
from trimtab.errors import CheckpointError
from trimtab.files import finite, json_digest, named_errors, only_writer, read_json, write_json
from trimtab.models.aligner import save_model
from trimtab.models.fingerprint import Files
from trimtab.models.layers import parse_layers, pick_layers
from trimtab.models.loading import load_model
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import find_eos_token_ids, vocabulary_size
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, collate
from trimtab.train.caches import open_caches
from trimtab.train.defaults import training_of_effect
from trimtab.train.distil import DistilTrainer
from trimtab.train.folder import LOCK, last_checkpoint, open_run, refuse_foreign
from trimtab.train.inputs import open_proposal, open_tokenizer, run_date
from trimtab.train.own_samples import draw_samples, read_samples
from trimtab.train.plan import Plan
from trimtab.train.progress import CompactProgress
from trimtab.train.ranks import Ranks
from trimtab.train.sibling_options import StartOptions
from trimtab.train.trainer import fit, trained

__all__ = ["make_start"]

logger = logging.getLogger(__name__)


def make_start(options: StartOptions) -> dict[str, Any]:
    """Make an aligner's start out of a proposal's layers, and save it in `options.out`.

    Returns:
        What `training.json` holds: `layers`, `of_layers`, `parameters`, `examples`, `tokens`, `cache`, the figures on the
        development prompts `before` and after the distillation (`metrics`), `history`, `seconds`.

    Raises:
        TrimtabError: something cannot be read, used or combined; said before any work is done where that is possible.
    """
    output, settings = Path(options.out), options.plan
    arguments = training_arguments(settings)
    ranks = Ranks(arguments.process_index, arguments.world_size)
    with contextlib.ExitStack() as stack:
        ranks.first_does(lambda: _take(stack, output, options.overwrite_output_dir))
        stack.enter_context(named_errors(output))
        return _make(options, settings, output, arguments, ranks)


def _take(stack: contextlib.ExitStack, output: Path, overwrite: bool) -> None:
    refuse_foreign(output, overwrite, "out")
    stack.enter_context(only_writer(output / LOCK))


def _make(options: StartOptions, settings: Plan, output: Path, arguments: TrainingArguments, ranks: Ranks) -> dict[str, Any]:
    started = time.monotonic()
    tokenizer = open_tokenizer(settings, options.proposal)
    date = ranks.first_does(lambda: run_date(settings, tokenizer))
    options = dataclasses.replace(options, date=date)
    settings = options.plan
    records = _records(options)
    model, layers, total, weights = _pick(options)
    max_length = min(options.max_length, context_of(model.config))
    given = None
    if options.answers == "given" and records is not None:
        encoder = Encoder(tokenizer, vocabulary_size(tokenizer), find_eos_token_ids(model, tokenizer), date)
        given = encode_records(records, encoder, max_length)
    data = json_digest(record.prompt for record in records or []) if given is None else fingerprint_examples(given)
    run = {**options.describe(), "training": training_of_effect(options.training), "seed": arguments.seed, "data": data}
    run |= {"layers": layers, "proposal_weights": weights}
    run = json.loads(json.dumps(run, default=str))  # as it is read again
    ranks.first_does(lambda: open_run(output, run, options.overwrite_output_dir, "out"))
    if ranks.first_does(lambda: (output / "training.json").exists()):
        logger.info("%s is already made with these settings", output)
        return dict(read_json(output / "training.json"))
    if given is None:
        ranks.first_does(lambda: _sample(options, records, output, max_length, arguments.seed))
    examples, development = split_examples(given or read_samples(output / "samples.jsonl"), options.dev_fraction)
    trainer = _make_trainer(settings, arguments, ranks, tokenizer, model, examples, development)
    CompactProgress.install(trainer, "start")
    before = trainer.evaluate()
    fit(trainer, ranks.first_does(lambda: last_checkpoint(output)))
    report = {
        "layers": list(layers),
        "of_layers": total,
        "parameters": model.num_parameters(),
        "examples": len(examples),
        "tokens": sum(len(example.chosen) for example in examples),
        "cache": trainer.train_dataset.caches["chosen"].facts,
        "before": before,
        "metrics": trainer.evaluate(),
        "history": trainer.state.log_history,
        "seconds": time.monotonic() - started,
    }
    report = dict(finite(report))
    model, gathered = trained(trainer)

    def write() -> None:
        save_model(model, tokenizer, output, weights=gathered)
        write_json(output / "training.json", report)  # the last: with it, the start is made

    ranks.first_does(write)
    return report


def _make_trainer(
    settings: Plan,
    arguments: TrainingArguments,
    ranks: Ranks,
    tokenizer: Any,
    model: Any,
    examples: list[Example],
    development: list[Example],
) -> DistilTrainer:
    """What distils the small model, with the proposal's rows cached."""
    rows = open_proposal(settings, tokenizer).rows
    caches = open_caches(settings, rows, tokenizer, examples, development, ranks)
    return DistilTrainer(
        settings,
        rows.vocab_size,
        mean_tokens(examples),
        ranks=ranks,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=ExampleDataset(examples, caches["train"]),
        eval_dataset=ExampleDataset(development, caches["dev"]),
    )


def _records(options: StartOptions) -> list[Record] | None:
    """The records of the data set, if there is one."""
    if options.dataset is None:
        return None
    given = options.answers == "given"
    need = "chosen" if given else "prompt"
    return read_records(options.dataset, need=need, how=options, limit=options.max_examples, answers=given, weights=given)


def _pick(options: StartOptions) -> tuple[Any, tuple[int, ...], int, str]:
    """The small model, which layers it has, of how many, and the fingerprint of the proposal's weights."""
    try:
        whole, files = Files.of(partial(load_model, options.proposal, dtype="auto", device="cpu"), (options.proposal, None))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; a start is made of the proposal's own weights, so they must be here: without them, give trimtab train"
            " any small model of its vocabulary as the --aligner, and samples of trimtab propose --endpoint as the --dataset"
        ) from error
    total = whole.config.num_hidden_layers
    layers = parse_layers(options.layers, total)
    logger.info("the start has layers %s of the proposal's %d", ", ".join(map(str, layers)), total)
    return pick_layers(whole, layers), layers, total, files.fingerprint


def _sample(options: StartOptions, records: list[Record] | None, output: Path, max_length: int, seed: int) -> None:
    """Draw the answers to distil on, unless they are all there."""
    path = output / "samples.jsonl"
    if path.exists():
        return
    model = AlignedModel.from_pretrained(
        options.proposal,
        dtype=options.dtype,
        device=options.device,
        max_num_seqs=options.max_num_seqs,
        date=options.date,
    )
    draw_samples(
        model,
        records,
        path,
        {"proposal": model.fingerprints[0], **model.encoder.chat_settings},
        count=options.samples,
        max_tokens=options.max_tokens,
        max_length=max_length,
        seed=seed,
    )
