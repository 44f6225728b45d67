"""What a run reads before it trains: tokenizer, template and date, the data as examples and pairs, and its proposal."""

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from trimtab.data.cut import mark_cut
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, encode_records, split_by_prompt
from trimtab.data.prompts import answer_text
from trimtab.data.records import Record, read_records
from trimtab.data.rewrite_template import read_template
from trimtab.data.template import pick_date, read_chat_template, reads_date, refuse_idle_date
from trimtab.errors import DataError
from trimtab.files import read_json
from trimtab.models.fingerprint import Files
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_configs, load_model, load_tokenizer
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import find_eos_token_ids, vocabulary_size
from trimtab.train.endpoint_rows import EndpointRows
from trimtab.train.plan import Plan
from trimtab.train.rows import ModelRows, Proposal
from trimtab.train.teacher import Parts, teach

__all__ = [
    "Pairs",
    "count_lacking",
    "encode_parts",
    "open_proposal",
    "open_tokenizer",
    "read_parts",
    "run_date",
    "settle_pairs",
]

logger = logging.getLogger(__name__)


def open_proposal(plan: Plan, tokenizer: Any) -> Proposal:
    """Load the model; or, where endpoints have it, no more than its configuration."""
    if not plan.asked.proposal_endpoint:
        load = partial(load_model, plan.asked.proposal, dtype=plan.asked.dtype, device=plan.asked.device)
        model, files = Files.of(load, (plan.asked.proposal, None))
        ends = find_eos_token_ids(model, tokenizer)
        here = HuggingFaceLM(model, vocabulary_size(tokenizer))
        return Proposal(ModelRows(here, files.fingerprint, ends), context_of(model.config), ends, here)
    config, generation = load_configs(plan.asked.proposal)
    described = SimpleNamespace(config=config, generation_config=generation)
    remote = EndpointRows(plan.asked.proposal_endpoint, plan.asked.limits, plan.asked.proposal, vocabulary_size(tokenizer))
    context = context_of(config.get_text_config()) - 1  # vLLM does not score without drawing a token
    return Proposal(remote, context, find_eos_token_ids(described, tokenizer), None)


def open_tokenizer(plan: Plan, source: str, revision: str | None = None) -> Any:
    """The proposal's tokenizer, with the chat template that was asked for."""
    template = read_chat_template(plan.asked.chat_template_path)
    tokenizer = load_tokenizer(source, revision=revision)
    if template is not None:
        tokenizer.chat_template = template
    refuse_idle_date(plan.asked.date, tokenizer)
    return tokenizer


def read_parts(plan: Plan, tokenizer: Any) -> Parts:
    """Training and development records, behind a teacher's prompt, too, if there is one: then they may lack answers.

    Answers that were cut are marked, see `trimtab.data.cut`; not where the tokenizer is not at hand, which is None then.
    """
    pairs = plan.reads_rejected or plan.asked.rewriter_template is not None
    need = "rejected" if pairs else "prompt" if plan.has_teacher else "chosen"
    records = read_records(plan.asked.dataset, need=need, how=plan.asked, limit=plan.asked.max_examples, weights=True)
    if plan.asked.eval_dataset is None:
        records, kept = split_by_prompt(records, plan.asked.dev_fraction, seed=0)
    else:
        kept = read_records(plan.asked.eval_dataset, need=need, how=plan.asked, weights=True)
    parts = teach(plan, (ask_rewriter(plan, records), ask_rewriter(plan, kept)))
    if tokenizer is None:
        return parts
    records, kept = mark_cut(parts, plan.asked.cut_answers, tokenizer)
    return records, kept


def ask_rewriter(plan: Plan, records: list[Record]) -> list[Record]:
    """The records as a rewriter learns from them, if one is trained: a better answer, behind a prompt with the answer in it."""
    if plan.asked.rewriter_template is None:
        return records
    template = read_template(plan.asked.rewriter_template)
    return [
        dataclasses.replace(
            record,
            prompt=template.ask(record.prompt, answer_text(record.rejected)),
            chosen=template.wanted(answer_text(record.chosen)),
            rejected=None,
            unfinished=record.unfinished - {"rejected"},
        )
        for record in records
    ]


def run_date(plan: Plan, tokenizer: Any) -> str | None:
    """The date of the run in the output folder, or of a new one; None where no chat template writes it."""
    if not reads_date(tokenizer):
        return None
    path = Path(plan.asked.output_dir) / "run.json"
    kept = read_json(path) if path.exists() and not plan.asked.overwrite_output_dir else None
    return pick_date(plan.asked.date, kept.get("date") if isinstance(kept, dict) else None)


def encode_parts(
    parts: Parts, plan: Plan, encoder: Encoder, context: int, taught_context: int
) -> tuple[list[Example], list[Example]]:
    """Training and development examples, within the context, and the proposal's own behind a teacher's prompt."""
    how = encoder, min(plan.asked.max_length, context), taught_context if plan.asked.teacher_prompt is not None else None
    return encode_records(parts[0], *how), encode_records(parts[1], *how)


class Pairs(NamedTuple):
    """What is trained on, once the pairs are known."""

    examples: list[Example]
    development: list[Example]
    equal: int
    """Pairs of two equal answers, in both parts of the data: nothing in them says what to prefer."""


def count_lacking(examples: Sequence[Example]) -> int:
    """How many have no rejected answer."""
    return sum(not example.rejected for example in examples)


def settle_pairs(plan: Plan, examples: list[Example], development: list[Example]) -> Pairs:
    """Leave out what the objective learns nothing from.

    Answers are compared as the loss sees them, as ids that are cut at `max_length`.

    Raises:
        DataError: the loss is of pairs, and none has two different answers.
    """
    everything, of_equal = [*examples, *development], plan.objective.equal_pairs
    equal = sum(not example.differs for example in everything)
    if not equal or not plan.reads_rejected:
        return Pairs(examples, development, equal)
    for part, some in {"training": examples, "development": development}.items():
        needed = of_equal.needed and (of_equal.dropped or some is examples)
        if needed and not any(example.differs for example in some):
            raise DataError(
                f"every {part} pair has two equal answers within max_length={plan.asked.max_length}: there is nothing to"
                f" prefer; give other pairs, or {of_equal.instead}"
            )
    logger.warning("%d of %d pairs have two equal answers, and are %s", equal, len(everything), of_equal.does)
    if of_equal.dropped:
        examples, development = ([example for example in some if example.differs] for some in (examples, development))
    return Pairs(examples, development, equal)
