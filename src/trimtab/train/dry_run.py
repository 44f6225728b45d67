"""What a training run will take, before it starts: no weights are read, and nothing is written.

Options, configurations, tokenizers and data are checked by the code that the run goes through, as far as they are at hand.
What is not is said; figures that depend on it are left out (None), or are for the longest batch that `max_length` allows, of
pairs if there may be any.
"""

import contextlib
import dataclasses
import math
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
from trimtab.data.examples import Example, mean_tokens
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
from trimtab.train.arguments import checkpoints, need_training, training_arguments
from trimtab.train.checks import warn_of_rule
from trimtab.train.dry_caching import Passes, proposal_dtype
from trimtab.train.folder import refuse_foreign
from trimtab.train.head import KEPT_TOKENS, HeadPlan, plan_head
from trimtab.train.inputs import encode_parts, open_tokenizer, read_parts, run_date, settle_pairs
from trimtab.train.options import TrainOptions
from trimtab.train.own_samples import longest_sample
from trimtab.train.plan import Facts, Plan, Temperatures, announce_round, resolve
from trimtab.train.rehearsal import Rehearsal, largest_step
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


def estimate(asked: TrainOptions, expected: Expected) -> dict[str, Any]:
    """Check a run and say what it will take: bytes, steps, floating-point operations and seconds, for one process.

    Raises:
        TrimtabError: what the run itself would raise, as far as it can be known.
    """
    need_training()
    if not torch.accelerator.is_available():  # transformers refuses bf16 here, which is meant for another machine
        asked = dataclasses.replace(asked, training={"use_cpu": True} | asked.training)
    facts = Facts(describe(asked.aligner) if asked.aligner and expand_home(asked.aligner).is_dir() else None)
    plan = resolve(asked, facts)
    announce_round(asked, plan)
    warn_of_rule(plan)
    if asked.teacher_prompt is not None:
        Teacher.read(asked.teacher_prompt)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as scratch, _alone():  # the trainer wants a folder; the run's own stays as it is
        arguments = training_arguments(plan)
        refuse_foreign(Path(asked.output_dir), asked.overwrite_output_dir)
        arguments.output_dir = scratch
        return _estimate(asked, facts, expected, arguments, processes)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hide the other processes of a launch: one is looked at, and waiting for the rest would only take time."""
    hidden = {name: os.environ.pop(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _estimate(
    asked: TrainOptions, facts: Facts, expected: Expected, arguments: TrainingArguments, processes: int
) -> dict[str, Any]:
    here, plan = facts.aligner, resolve(asked, facts)
    proposal = find_config(plan.asked.proposal, expected.proposal)
    adapter = here.folder if here and here.is_adapter else None
    head = _plan_head(plan, here, proposal) if plan.trains_head else None
    start = base_of(adapter) if adapter else Base(plan.asked.aligner)
    aligner = proposal if head else find_config(start.source, expected.aligner, revision=start.revision)
    for found in (proposal, aligner):
        check_supported(found.config)
    tokenizer, vocab_size = _vocabulary(plan, proposal, aligner, here.tokenizer if here else None)
    context = context_of(proposal.config) - bool(plan.asked.proposal_endpoint)
    longest = min(plan.asked.max_length, context_of(aligner.config), context)
    data = _data(plan, expected, tokenizer, proposal, longest, context)
    facts = _settled(plan, facts, data)
    plan = resolve(asked, facts)
    if data.lacking is not None:
        asked.asked_objective.announce(plan.setting)
    if data.examples is not None and data.development is not None:
        examples, development, equal = settle_pairs(plan, data.examples, data.development)
        data = data._replace(examples=examples, development=development, counts=(len(examples), len(development)), equal=equal)
    of_one = Example([0], [0] * (longest - 1), [0] * (longest - 1) if plan.reads_rejected else [])
    batch_size = arguments.train_batch_size
    examples = data.examples or [of_one] * batch_size
    development = data.development or [of_one] * arguments.eval_batch_size
    mean_length = mean_tokens(examples)
    kept = _kept(plan, tokenizer, longest)
    trained = [*examples, *kept]

    lora = read_lora(adapter) if adapter and not head else None
    rehearsal = Rehearsal(plan, arguments, aligner.config, vocab_size, mean_length, lora, head)
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
        "proposal": _describe(plan.asked.proposal, proposal, None),
        "aligner": _describe(plan.asked.aligner, aligner, parameters),
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
        "contrast": dataclasses.asdict(plan.objective).get("contrast", 0.0),
        "rejected": plan.reads_rejected and ("known" if data.lacking is not None else "assumed"),
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
    in_turn = counts and data.examples and {"train": sum(math.ceil(e.weight) for e in data.examples) + len(kept)}
    report |= _steps(rehearsal, arguments, in_turn or counts, processes)
    report["draft_steps"] = (None if head else report["steps"]) if plan.trains_draft else 0
    passes = Passes(plan, proposal, vocab_size, head.tap if head else None, trained, development)
    report["caching"] = None if plan.asked.proposal_endpoint else passes.memory()
    report["cache"] = passes.disk(known=data.examples is not None)
    flops: dict[str, Any] = {"micro_batch": _flops(rehearsal, examples, kept, batch_size), "at_most": data.why is not None}
    done = report["micro_batches"]
    flops["training"] = flops["micro_batch"] * done if done is not None else None
    if report["caching"] is not None:
        flops["caching"] = passes.flops(report["caching"], counts) if counts else None
    return report | _work(expected, arguments, flops, report["caching"])


def _settled(plan: Plan, facts: Facts, data: _Data) -> Facts:
    """The facts with what the data say; where they are not at hand, with whatever takes more, unless columns say otherwise."""
    if data.lacking is None:
        columns = parse_columns(plan.asked.columns)
        records, lacking = sum(data.counts or (1,)), int(bool(columns) and "rejected" not in columns)
    else:
        records, lacking = sum(data.counts or (0,)), data.lacking
    return facts._replace(records=records, lacking=lacking, fitted=Temperatures(2.0, 2.0) if plan.fits_temperatures else None)


def _plan_head(plan: Plan, here: Description | None, proposal: FoundConfig) -> HeadPlan:
    """What a head is made of, if the proposal can have it."""
    depth = proposal.config.num_hidden_layers
    known = here and here.manifest and here.manifest.parsed_head
    if known and known.layers != depth:
        raise UnsupportedModel(
            f"'{plan.asked.aligner}' is a head of another proposal: of one with {known.layers} layers, and this one has {depth}"
        )
    tap, lora = plan_head(plan, proposal.config, here)
    return HeadPlan(tap, depth - tap, lora, proposal_dtype(plan, proposal))


def _kept(plan: Plan, tokenizer: Any, longest: int) -> list[Example]:
    """As many examples as a head is kept at the proposal by, as long as they may be; they are yet to be drawn."""
    if not plan.kept_samples:
        return []
    encoder = None
    if tokenizer is not None:
        encoder = Encoder(tokenizer, vocabulary_size(tokenizer), (), run_date(plan, tokenizer))
    one = longest_sample(encoder, KEPT_TOKENS, longest)
    return [one._replace(rejected=one.chosen if plan.reads_rejected else one.rejected)] * plan.kept_samples


def _vocabulary(plan: Plan, proposal: FoundConfig, aligner: FoundConfig, own: Any) -> tuple[Any, int]:
    """The proposal's tokenizer, if it and the aligner's `own` are at hand and agree, and V."""
    read_chat_template(plan.asked.chat_template_path)
    here = [is_here(found.source, "tokenizer_config.json", found.revision) for found in (proposal, aligner)]
    tokenizer = open_tokenizer(plan, proposal.source) if here[0] else None
    own = open_tokenizer(plan, aligner.source, aligner.revision) if own is None and here[1] else own
    if tokenizer is not None and own is not None:
        check_same_vocabulary(tokenizer, own, plan.asked.aligner)
    known = {found.source: SHAPES[found.source].tokens for found in (proposal, aligner) if found.source in SHAPES}
    if len(set(known.values())) > 1:
        counts = " and ".join(f"{name} has {tokens} tokens" for name, tokens in known.items())
        raise VocabularyMismatch(f"the aligner '{plan.asked.aligner}' does not share the proposal's vocabulary: {counts}")
    columns = min(found.config.vocab_size for found in (proposal, aligner))
    size = vocabulary_size(tokenizer) if tokenizer is not None else next(iter(known.values()), columns)
    if columns < size:
        raise UnsupportedModel(f"a model has {columns} output columns, but the tokenizer {size} tokens: resize its embeddings")
    return tokenizer, size


def _data(plan: Plan, expected: Expected, tokenizer: Any, proposal: FoundConfig, longest: int, context: int) -> _Data:
    """The examples, if data and tokenizer are at hand; otherwise their number, if that is known."""
    missing = [why for name in (plan.asked.dataset, plan.asked.eval_dataset) if name and (why := why_not_at_hand(name))]
    if missing:
        return _Data(None, None, _counts(plan, expected.examples), missing[0])
    records, kept = read_parts(plan, tokenizer)
    lacking = sum(record.rejected is None for record in records + kept)
    if tokenizer is None:
        why = f"the tokenizer of {plan.asked.proposal} is not on this machine"
        return _Data(None, None, (len(records), len(kept)), why, lacking)
    if plan.asked.teacher_prompt is not None and lack_answers((records, kept)):
        return _Data(None, None, (len(records), len(kept)), "the answers are yet to be drawn behind teacher_prompt", lacking)
    ends = find_eos_token_ids(proposal, tokenizer)
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), ends, run_date(plan, tokenizer))
    examples, development = encode_parts((records, kept), plan, encoder, longest, context)
    return _Data(examples, development, (len(examples), len(development)), None, lacking)


def _counts(plan: Plan, records: int | None) -> tuple[int, int] | None:
    """Of training and development, if every record has a prompt of its own."""
    if records is None:
        return None
    records = min(records, plan.asked.max_examples or records)
    kept = max(1, round(plan.asked.dev_fraction * records)) if plan.asked.eval_dataset is None else 0
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
