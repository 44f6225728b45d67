"""Short answers to AlpacaEval's instructions, of those that a judge liked and that end by themselves.

Answers that were cut teach to stop anywhere: only those are taken that end with the punctuation of an end. Instructions are
dealt to the parts; all answers to one are in the same part.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chats import Record, Task, answer, place, question

__all__ = ["TASK", "split"]

WORDS = 80
"""Most words of an answer."""
SCORE = 0.3
"""Least score, from 0 to 1."""
ENDS = (".", "!", "?", '."', '!"', '?"', ".)")

SHARES = {"test": 0.3, "dev": 0.4, "train": 1.0}
"""Up to this share of the instructions."""
MOST = {"train": 8, "dev": 2, "test": 2}
"""Answers to one instruction: the best, each text once."""

SYSTEM_PROMPT = "Answer in a few plain sentences, at most eighty words. Be helpful and exact, and finish what you begin."


def make(path: Path) -> dict[str, list[Record]]:
    """All parts."""
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return split(map(json.loads, stream))


def split(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Record]]:
    """Answers by part, the instructions in the order of their hashes."""
    answers: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        text = row["completion"].strip()
        if row["score"] >= SCORE and text.endswith(ENDS) and len(text.split()) <= WORDS:
            answers[row["prompt"]][text] = max(row["score"], answers[row["prompt"]].get(text, 0.0))
    parts: dict[str, list[Record]] = {name: [] for name in ("train", "dev", "test")}
    for prompt in sorted(answers, key=place):
        name = next(name for name, until in SHARES.items() if place(prompt) <= until)
        best = sorted(answers[prompt], key=lambda text: (-answers[prompt][text], text))[: MOST[name]]
        parts[name] += [{"prompt": question(prompt), "completion": answer(text), "group": prompt} for text in best]
    return parts


TASK = Task("short answers", make, SYSTEM_PROMPT, 128, file="alpaca_eval_answers.jsonl.gz")
