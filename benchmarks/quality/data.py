"""Texts of a study, split by prompt: to pretrain on, to align with, and held out."""

import gzip
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.demo.corpus import read_corpus

__all__ = ["DEMO", "Texts", "read_texts"]

DEMO = Path("demo")
"""The data set's name for the text that every Python install has."""

PREFERRED = 0.5
"""Answers with at least this score are wanted."""

REJECTED = 0.05
"""Answers with at most this score are unwanted."""

WEAK = 0.2
"""Proposals learn to write from answers with at most this score, to prompts that no aligner sees."""

SHARES = (("base", 0.45), ("align", 0.75), ("held_out", 1.0))
"""Parts, each up to this share of the prompts."""


class Texts(NamedTuple):
    base: list[str]
    """Documents to pretrain on: prompt and answer."""
    align: list[dict[str, str]]
    """Pairs to align with: `prompt`, `chosen`, `rejected`."""
    held_out: list[dict[str, str]]
    """Pairs of other prompts."""
    judge: list[dict[str, str]]
    """Pairs of yet other prompts: what a judge learns from."""


def read_texts(dataset: Path, seed: int) -> Texts:
    """The demo, or a file of rows of `prompt`, `completion` and `score`; the seed says which prompt goes where."""
    return _read_demo(seed) if dataset == DEMO else _read_answers(dataset, seed)


def _read_demo(seed: int) -> Texts:
    """Signatures of functions with their docstrings, and, as what nobody wants, with those of others."""
    corpus, draw = read_corpus(), random.Random(seed)
    texts = Texts(draw.sample(corpus.pretrain, len(corpus.pretrain)), [], [], [])
    for records, parts in ((corpus.align, ("judge", "align")), (corpus.held_out, ("held_out", "held_out"))):
        for record in records:
            part = parts[_part(record["prompt"], seed) != "base"]
            pair = {"prompt": record["prompt"], "chosen": record["completion"], "rejected": draw.choice(records)["completion"]}
            getattr(texts, part).append(pair)
    return texts


def _read_answers(path: Path, seed: int) -> Texts:
    """Answers that were scored."""
    draw, own = random.Random(seed), random.Random(seed)
    texts = Texts([], [], [], [])
    for prompt, rows in _answers(path).items():
        part = _part(prompt, seed)
        if part == "base":
            texts.base.extend(_shown(prompt) + row["completion"].strip() for row in rows if row["score"] <= WEAK)
            texts.judge.extend(_pairs(prompt, rows, own))
        else:
            getattr(texts, part).extend(_pairs(prompt, rows, draw))
    draw.shuffle(texts.base)
    return texts


def _answers(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows by prompt, in the file's order, without those that say nothing."""
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            if row["completion"].strip():
                answers[row["prompt"]].append(row)
    return answers


def _pairs(prompt: str, rows: list[dict[str, Any]], draw: random.Random) -> list[dict[str, str]]:
    """Every wanted answer to a prompt with one of the unwanted, where there are any."""
    wanted = [row["completion"].strip() for row in rows if row["score"] >= PREFERRED]
    unwanted = [row["completion"].strip() for row in rows if row["score"] <= REJECTED]
    if not unwanted:
        return []
    return [{"prompt": _shown(prompt), "chosen": answer, "rejected": draw.choice(unwanted)} for answer in wanted]


def _shown(prompt: str) -> str:
    return f"### Instruction:\n{prompt}\n\n### Response:\n"


def _part(prompt: str, seed: int) -> str:
    place = int(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, until in SHARES if place < until)
