"""The prompts of an evaluation: read, made chats, and parted where some are to tune on."""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.data.prompts import show_prompt
from trimtab.data.records import read_records
from trimtab.errors import DataError, InvalidOption
from trimtab.evaluate.alpaca import read_outputs
from trimtab.evaluate.options import EvalOptions
from trimtab.evaluate.systems import Prompts, System, answer_from_file

__all__ = ["read_prompts", "split_prompts"]

logger = logging.getLogger(__name__)


def read_prompts(options: EvalOptions, baseline: System, *, columns: bool = False) -> tuple[Prompts, Prompts | None]:
    """The prompts to report on, and the development prompts of a sweep.

    Args:
        options: which data.
        baseline: whose file of outputs says what was asked, if nothing else does.
        columns: whether a judge reads the data's other columns.

    Raises:
        DataError: naming the place in the data.
        InvalidOption: a split leaves one side empty.
    """
    if options.dataset is not None:
        prompts = _read(options.dataset, options, columns=columns)
    else:
        _, prompts, _ = answer_from_file(baseline, None)
    prompts = prompts.pick(range(min(options.max_prompts or len(prompts), len(prompts))))
    prompts = _as_chats(prompts) if options.apply_chat_template else prompts
    if not options.sweep_weight:
        return prompts, None
    if options.dev_dataset is None:
        return split_prompts(prompts, options.dev_fraction)
    development = _read(options.dev_dataset, options, columns=columns)
    development = _as_chats(development) if options.apply_chat_template else development
    reported = set(map(show_prompt, prompts.prompts))
    kept = [i for i, prompt in enumerate(development.prompts) if show_prompt(prompt) not in reported]
    if len(kept) < len(development):
        logger.warning("%d prompts of --dev_dataset are reported on, and left out of it", len(development) - len(kept))
    if not kept:
        raise DataError(f"{options.dev_dataset}: every prompt is also one that is reported on")
    return prompts, development.pick(kept)


def split_prompts(prompts: Prompts, fraction: float) -> tuple[Prompts, Prompts]:
    """Prompts to report on and to tune on, by the prompt's text: the same text is never on both sides."""
    hashes = [hashlib.sha256(show_prompt(prompt).encode(errors="replace")).hexdigest() for prompt in prompts.prompts]
    distinct = sorted(set(hashes))
    chosen = set(distinct[: round(fraction * len(distinct))])
    sides: tuple[list[int], list[int]] = ([], [])
    for i, digest in enumerate(hashes):
        sides[digest in chosen].append(i)
    if not all(sides):
        raise InvalidOption(f"--dev_fraction {fraction:g} of {len(distinct)} different prompts leaves one side empty")
    return prompts.pick(sides[0]), prompts.pick(sides[1])


def _read(dataset: str, options: EvalOptions, *, columns: bool) -> Prompts:
    if Path(dataset).name.endswith((".json", ".json.gz")):
        rows = read_outputs(dataset, need_output=False)
        sources = [f"{dataset} entry {i}" for i in range(1, len(rows) + 1)]
        others: list[Mapping[str, Any]] = [
            {k: v for k, v in row.items() if k not in ("instruction", "output")} for row in rows if columns
        ]
        return Prompts([row["instruction"] for row in rows], [row["output"] for row in rows], sources, others)
    records = read_records(dataset, need="prompt", how=options, others=columns)
    return Prompts(
        [record.prompt for record in records],
        [_text(record.chosen) for record in records],
        [record.source for record in records],
        [record.columns for record in records if columns],
    )


def _text(answer: Any) -> str | None:
    """A wanted answer as a text; None if there is none."""
    if answer is None or isinstance(answer, str):
        return answer
    content = answer[-1]["content"] if answer else None
    return None if content is None else str(content)


def _as_chats(prompts: Prompts) -> Prompts:
    asked = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts.prompts]
    return dataclasses.replace(prompts, prompts=asked)
