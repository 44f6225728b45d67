"""Texts of a study, split by prompt: to pretrain on, to align with, and held out."""

import gzip
import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

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


def read_answers(path: Path, seed: int) -> Texts:
    """Rows of `prompt`, `completion` and `score`; which prompt goes where depends on the seed."""
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        for row in map(json.loads, stream):
            if row["completion"].strip():
                answers[row["prompt"]].append(row)
    draw = random.Random(seed)
    texts = Texts([], [], [])
    for prompt, rows in answers.items():
        shown = f"### Instruction:\n{prompt}\n\n### Response:\n"
        if _part(prompt, seed) == "base":
            texts.base.extend(shown + row["completion"].strip() for row in rows if row["score"] <= WEAK)
            continue
        wanted = [row["completion"].strip() for row in rows if row["score"] >= PREFERRED]
        unwanted = [row["completion"].strip() for row in rows if row["score"] <= REJECTED]
        if unwanted:
            pairs = [{"prompt": shown, "chosen": answer, "rejected": draw.choice(unwanted)} for answer in wanted]
            getattr(texts, _part(prompt, seed)).extend(pairs)
    draw.shuffle(texts.base)
    return texts


def _part(prompt: str, seed: int) -> str:
    place = int(hashlib.sha256(f"{seed} {prompt}".encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, until in SHARES if place < until)
