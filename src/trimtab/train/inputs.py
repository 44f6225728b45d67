"""What a run reads before it trains: the tokenizer with its template and date, and the data as examples."""

from pathlib import Path
from typing import Any

from trimtab.data.cut import mark_cut
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, encode_records, split_by_prompt
from trimtab.data.records import read_records
from trimtab.data.template import pick_date, read_chat_template, reads_date, refuse_idle_date
from trimtab.files import read_json
from trimtab.models.loading import load_tokenizer
from trimtab.train.options import TrainOptions
from trimtab.train.teacher import Parts, teach

__all__ = ["encode_parts", "open_tokenizer", "read_parts", "run_date"]


def open_tokenizer(options: TrainOptions, source: str, revision: str | None = None) -> Any:
    """The proposal's tokenizer, with the chat template that was asked for."""
    template = read_chat_template(options.chat_template_path)
    tokenizer = load_tokenizer(source, revision=revision)
    if template is not None:
        tokenizer.chat_template = template
    refuse_idle_date(options.date, tokenizer)
    return tokenizer


def read_parts(options: TrainOptions, tokenizer: Any) -> Parts:
    """Training and development records, behind a teacher's prompt, too, if there is one: then they may lack answers.

    Answers that were cut are marked, see `trimtab.data.cut`; not where the tokenizer is not at hand, which is None then.
    """
    need = "rejected" if options.needs_rejected else "chosen" if options.teacher_prompt is None else "prompt"
    records = read_records(options.dataset, need=need, how=options, limit=options.max_examples)
    if options.eval_dataset is None:
        records, kept = split_by_prompt(records, options.dev_fraction, seed=0)
    else:
        kept = read_records(options.eval_dataset, need=need, how=options)
    parts = teach(options, (records, kept))
    if tokenizer is None:
        return parts
    records, kept = mark_cut(parts, options.cut_answers, tokenizer)
    return records, kept


def run_date(options: TrainOptions, tokenizer: Any) -> str | None:
    """The date of the run in the output folder, or of a new one; None where no chat template writes it."""
    if not reads_date(tokenizer):
        return None
    path = Path(options.output_dir) / "run.json"
    kept = read_json(path) if path.exists() and not options.overwrite_output_dir else None
    return pick_date(options.date, kept.get("date") if isinstance(kept, dict) else None)


def encode_parts(
    parts: Parts, options: TrainOptions, encoder: Encoder, context: int, taught_context: int
) -> tuple[list[Example], list[Example]]:
    """Training and development examples, within the context, and the proposal's own behind a teacher's prompt."""
    how = encoder, min(options.max_length, context), taught_context if options.teacher_prompt is not None else None
    return encode_records(parts[0], *how), encode_records(parts[1], *how)
