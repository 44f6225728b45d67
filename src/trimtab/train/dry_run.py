"""What a training run will take, before it starts: no weights are read, and nothing is written.

Options, configurations, tokenizers and data are checked by the code that the run goes through, as far as they are at hand.
What is not is said; figures that depend on it are left out (None), or are for the longest batch that `max_length` allows, of
pairs if there may be any.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainingArguments

from trimtab.data.at_hand import why_not_at_hand
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example
from trimtab.data.records import parse_columns
from trimtab.data.template import read_chat_template
from trimtab.errors import UnsupportedModel, VocabularyMismatch
from trimtab.files import expand_home
from trimtab.hardware import describe_hardware, free_memory, measure_matmul_rate
from trimtab.models.adapter_folder import Base, base_of
from trimtab.models.aligner import Description, describe
from trimtab.models.masks import context_of
from trimtab.models.shapes import SHAPES, FoundConfig, find_config, is_here
from trimtab.models.supported import check_supported
from trimtab.models.vocabulary import check_same_vocabulary, find_eos_token_ids, vocabulary_size
from trimtab.train.arguments import need_training, training_arguments
from trimtab.train.checkpointing import checkpoints
from trimtab.train.checks import warn_of_rule
from trimtab.train.dry_caching import Passes, proposal_dtype
from trimtab.train.folder import refuse_foreign
from trimtab.train.head import KEPT_TOKENS, HeadPlan, plan_head
from trimtab.train.inputs import encode_parts, open_tokenizer, read_parts, run_date
from trimtab.train.options import Temperatures, TrainOptions
from trimtab.train.own_samples import longest_sample
from trimtab.train.pairs import settle_pairs
from trimtab.train.rehearsal import Rehearsal, largest_step
from trimtab.train.rounds import settle
from trimtab.train.start import read_lora
from trimtab.train.teacher import Teacher, lack_answers

__all__ = ["Expected", "estimate"]

SAMPLED = 4
"""Batches that stand for all where operations are counted."""


@dataclass(frozen=True)
class Expected:
    """What the user knows of things that are not there yet.

    Attributes:
        proposal, aligner: models of the same shape, for folders that an earlier command will make.
        examples: how many records the data will have.
        tflops: what the device does in a second, instead of a measurement.
    """

    proposal: str | None = None
    aligner: str | None = None
    examples: int | None = None
    tflops: float | None = None


class _Data(NamedTuple):
    """Training and development examples, or how many there will be."""

    examples: list[Example] | None
    development: list[Example] | None
    counts: tuple[int, int] | None
    why: str | None
    """Why the examples are not known."""
    lacking: int | None = None
    """How many records have no rejected answer, if that is known."""
    equal: int | None = None
    """How many pairs have two equal answers, if that is known."""


def estimate(options: TrainOptions, expected: Expected) -> dict[str, Any]:
    """Check a run and say what it will take: bytes, steps, floating-point operations and seconds, for one process.

    Raises:
        TrimtabError: what the run itself would raise, as far as it can be known.
    """
    need_training()
    if not torch.accelerator.is_available():  # transformers refuses bf16 here, which is meant for another machine
        options = dataclasses.replace(options, training={"use_cpu": True} | options.training)
    here = describe(options.aligner) if options.aligner and expand_home(options.aligner).is_dir() else None
    options = settle(options, here)
    warn_of_rule(options)
    if options.teacher_prompt is not None:
        Teacher.read(options.teacher_prompt)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as scratch, _alone():  # the trainer wants a folder; the run's own stays as it is
        arguments = training_arguments(options)
        refuse_foreign(Path(options.output_dir), options.overwrite_output_dir)
        arguments.output_dir = scratch
        return _estimate(options, here, expected, arguments, processes)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the other processes of a launch: one is looked at, and waiting for the rest would only take time."""
    hidden = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _estimate(
    options: TrainOptions, here: Description | None, expected: Expected, arguments: TrainingArguments, processes: int
) -> dict[str, Any]:
    proposal = find_config(options.proposal, expected.proposal)
    adapter = here.folder if here and here.is_adapter else None
    head = _plan_head(options, here, proposal) if options.trains_head else None
    start = base_of(adapter) if adapter else Base(options.aligner)
    aligner = proposal if head else find_config(start.source, expected.aligner, revision=start.revision)
    for found in (proposal, aligner):
        check_supported(found.config)
    tokenizer, vocab_size = _vocabulary(options, proposal, aligner, here.tokenizer if here else None)
    context = context_of(proposal.config) - bool(options.proposal_endpoint)
    longest = min(options.max_length, context_of(aligner.config), context)
    data = _data(options, expected, tokenizer, proposal, longest, context)
    if data.examples is not None and data.development is not None:
        options, examples, development, equal = settle_pairs(options, data.examples, data.development)
        data = data._replace(examples=examples, development=development, counts=(len(examples), len(development)), equal=equal)
    elif data.lacking is None and options.contrast is None:  # whatever takes more, unless the columns say otherwise
        columns = parse_columns(options.columns)
        options = dataclasses.replace(options, contrast=options.default_contrast * (not columns or "rejected" in columns))
    else:
        options = options.with_contrast_for(sum(data.counts or (0,)), lacking=data.lacking or 0)
    options = options.at(Temperatures(2.0, 2.0)) if options.starts_tempered else options  # whatever but 1
    of_one = Example([0], [0] * (longest - 1), [0] * (longest - 1) if options.needs_rejected else [])
    batch_size = arguments.train_batch_size
    examples = data.examples or [of_one] * batch_size
    development = data.development or [of_one] * arguments.eval_batch_size
    mean_length = sum(len(example.chosen) for example in examples) / len(examples)
    kept = _kept(options, tokenizer, longest)
    trained = [*examples, *kept]

    lora = read_lora(adapter) if adapter and not head else None
    rehearsal = Rehearsal(options, arguments, aligner.config, vocab_size, mean_length, lora, head)
    parameters = rehearsal.parameters
    step = largest_step(rehearsal, examples, kept, batch_size)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    evaluating = rehearsal.evaluation(trained, development)
    training = weights + step.batch + step.peak
    report: dict[str, Any] = {
        "dry_run": True,
        "device": str(arguments.device),
        "accelerator": torch.accelerator.is_available(),
        "hardware": describe_hardware(),
        "processes": processes,
        "proposal": _describe(options.proposal, proposal, None),
        "aligner": _describe(options.aligner, aligner, parameters),
        "head": head and {"layers": head.layers, "of": proposal.config.num_hidden_layers, "kept_samples": len(kept)},
        "vocabulary": {"tokens": vocab_size, "checked": tokenizer is not None},
        "data": {
            "at_hand": data.why is None,
            "why_not": data.why,
            "examples": data.counts and data.counts[0],
            "development": data.counts and data.counts[1],
            "tokens": sum(len(e.chosen) for e in data.examples) if data.examples else None,
            "longest": max(example.length for example in examples),
            "equal_pairs": data.equal,
        },
        "contrast": options.contrast,
        "rejected": options.needs_rejected and ("known" if data.lacking is not None else "assumed"),
        "memory": {
            "weights": weights,
            "gradients": step.gradients,
            "optimizer": step.optimizer,
            "batch": step.batch,
            "passing": step.peak - step.gradients - step.optimizer,
            "total": training,
            "saved_for_backward": step.saved,
            "rows_at_peak": step.wide_at_peak,
            "rebuilt_rows": step.rebuilt,
            "activation_checkpointing": checkpoints(arguments),
            "total_if_checkpointing_were_otherwise": weights + step.batch + step.peak_otherwise,
            "evaluation": weights + step.optimizer + evaluating,
            "free": free_memory(arguments.device),
        },
    }
    counts = {"train": data.counts[0] + len(kept), "dev": data.counts[1]} if data.counts else None
    report |= _steps(rehearsal, arguments, counts, processes)
    report["draft_steps"] = (None if head else report["steps"]) if options.trains_draft else 0
    passes = Passes(options, proposal, vocab_size, head.tap if head else None, trained, development)
    report["caching"] = None if options.proposal_endpoint else passes.memory()
    report["cache"] = passes.disk(known=data.examples is not None)
    flops: dict[str, Any] = {"micro_batch": _flops(rehearsal, examples, kept, batch_size), "at_most": data.why is not None}
    done = report["micro_batches"]
    flops["training"] = flops["micro_batch"] * done if done is not None else None
    if report["caching"] is not None:
        flops["caching"] = passes.flops(report["caching"], counts) if counts else None
    return report | _work(expected, arguments, flops, report["caching"])


def _plan_head(options: TrainOptions, here: Description | None, proposal: FoundConfig) -> HeadPlan:
    """What a head is made of, if the proposal can have it."""
    depth = proposal.config.num_hidden_layers
    known = here and here.manifest and here.manifest.parsed_head
    if known and known.layers != depth:
        raise UnsupportedModel(
            f"'{options.aligner}' is a head of another proposal: of one with {known.layers} layers, and this one has {depth}"
        )
    tap, lora = plan_head(options, proposal.config, here)
    return HeadPlan(tap, depth - tap, lora, proposal_dtype(options, proposal))


def _kept(options: TrainOptions, tokenizer: Any, longest: int) -> list[Example]:
    """As many examples as a head is kept at the proposal by, as long as they may be; they are yet to be drawn."""
    if not options.kept_samples:
        return []
    encoder = None
    if tokenizer is not None:
        encoder = Encoder(tokenizer, vocabulary_size(tokenizer), (), run_date(options, tokenizer))
    one = longest_sample(encoder, KEPT_TOKENS, longest)
    return [one._replace(rejected=one.chosen if options.needs_rejected else one.rejected)] * options.kept_samples


def _vocabulary(options: TrainOptions, proposal: FoundConfig, aligner: FoundConfig, own: Any) -> tuple[Any, int]:
    """The proposal's tokenizer, if it and the aligner's `own` are at hand and agree, and V."""
    read_chat_template(options.chat_template_path)
    here = [is_here(found.source, "tokenizer_config.json", found.revision) for found in (proposal, aligner)]
    tokenizer = open_tokenizer(options, proposal.source) if here[0] else None
    own = open_tokenizer(options, aligner.source, aligner.revision) if own is None and here[1] else own
    if tokenizer is not None and own is not None:
        check_same_vocabulary(tokenizer, own, options.aligner)
    known = {found.source: SHAPES[found.source].tokens for found in (proposal, aligner) if found.source in SHAPES}
    if len(set(known.values())) > 1:
        counts = " and ".join(f"{name} has {tokens} tokens" for name, tokens in known.items())
        raise VocabularyMismatch(f"the aligner '{options.aligner}' does not share the proposal's vocabulary: {counts}")
    columns = min(found.config.vocab_size for found in (proposal, aligner))
    size = vocabulary_size(tokenizer) if tokenizer is not None else next(iter(known.values()), columns)
    if columns < size:
        raise UnsupportedModel(f"a model has {columns} output columns, but the tokenizer {size} tokens: resize its embeddings")
    return tokenizer, size


def _data(
    options: TrainOptions, expected: Expected, tokenizer: Any, proposal: FoundConfig, longest: int, context: int
) -> _Data:
    """The examples, if data and tokenizer are at hand; otherwise their number, if that is known."""
    missing = [why for name in (options.dataset, options.eval_dataset) if name and (why := why_not_at_hand(name))]
    if missing:
        return _Data(None, None, _counts(options, expected.examples), missing[0])
    records, kept = read_parts(options, tokenizer)
    lacking = sum(record.rejected is None for record in records + kept)
    if tokenizer is None:
        why = f"the tokenizer of {options.proposal} is not on this machine"
        return _Data(None, None, (len(records), len(kept)), why, lacking)
    if options.teacher_prompt is not None and lack_answers((records, kept)):
        return _Data(None, None, (len(records), len(kept)), "the answers are yet to be drawn behind teacher_prompt", lacking)
    ends = find_eos_token_ids(proposal, tokenizer)
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), ends, run_date(options, tokenizer))
    examples, development = encode_parts((records, kept), options, encoder, longest, context)
    return _Data(examples, development, (len(examples), len(development)), None, lacking)


def _counts(options: TrainOptions, records: int | None) -> tuple[int, int] | None:
    """Of training and development, if every record has a prompt of its own."""
    if records is None:
        return None
    records = min(records, options.max_examples or records)
    kept = max(1, round(options.dev_fraction * records)) if options.eval_dataset is None else 0
    return records - kept, kept


def _describe(name: str, found: FoundConfig, parameters: Sequence[torch.Tensor] | None) -> dict[str, Any]:
    described: dict[str, Any] = {"name": name, "shape_of": found.source, "shape_from": found.origin}
    if parameters is not None:
        described["parameters"] = sum(parameter.numel() for parameter in parameters)
        described["trainable"] = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return described


def _steps(
    rehearsal: Rehearsal, arguments: TrainingArguments, counts: Mapping[str, int] | None, processes: int
) -> dict[str, Any]:
    accumulation = arguments.gradient_accumulation_steps
    batch = arguments.train_batch_size * accumulation * processes
    if counts is None and arguments.max_steps <= 0:
        return {"steps": None, "micro_batches": None, "batch": batch}
    steps, micro = rehearsal.steps(counts["train"] if counts else batch, processes)
    return {"steps": steps, "micro_batches": micro, "batch": batch}


def _flops(rehearsal: Rehearsal, examples: Sequence[Example], kept: Sequence[Example], size: int) -> float:
    """Of a micro-batch, the mean of a few that are spread over the data, and of one of what is kept, by their numbers."""
    count = min(SAMPLED, max(1, len(examples) // size))
    starts = range(0, count * (len(examples) // count), len(examples) // count)
    batches = [[examples[(start + i) % len(examples)] for i in range(size)] for start in starts]
    found = sum(map(rehearsal.flops, batches)) / count
    if not kept:
        return found
    own = rehearsal.flops([kept[0]] * size, size)
    return (len(examples) * found + len(kept) * own) / (len(examples) + len(kept))


def _work(
    expected: Expected, arguments: TrainingArguments, flops: Mapping[str, Any], caching: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Floating-point operations, and the least time for them: of the training and of the caching pass, for this process."""
    half = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    passes = {"training": (arguments.device, half)}
    if caching is not None:
        passes["caching"] = (torch.device(caching["device"]), getattr(torch, caching["dtype"]))
    rates = {
        name: measure_matmul_rate(*where) if expected.tflops is None else expected.tflops * 1e12
        for name, where in passes.items()
    }
    seconds = {name: flops[name] / rate if flops[name] is not None else None for name, rate in rates.items()}
    return {"flops": flops, "rate": {"assumed": expected.tflops is not None, **rates}, "seconds": seconds}
