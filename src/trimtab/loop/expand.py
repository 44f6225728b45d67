"""More pairs: the incumbent answers prompts like those that it lost, and a reward picks the best and the worst answer of each.

A prompt is lost where the incumbent's odds are for the answer that was not preferred, or where an answer got a thumb down.
Alike are prompts that share words: by Jaccard's index, with the lost prompt that is nearest. Where nothing was lost, the pool's
prompts are taken in a random order. Prompts that are held out are never among them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.data.prompts import chat_columns, show_prompt
from trimtab.data.records import Record
from trimtab.decode.aligned import AlignedModel
from trimtab.files import json_digest
from trimtab.jsonlines import write_rows
from trimtab.judges.rewards.base import Reward
from trimtab.loop.votes import normal
from trimtab.propose import call

__all__ = ["expand", "pick_alike"]

MOST_LOST = 500
"""Lost prompts that others are compared with."""


def pick_alike(pool: Sequence[Record], lost: Sequence[Any], count: int, seed: int) -> list[Record]:
    """So many prompts, each once, those nearest to what was lost first.

    Args:
        pool: prompts to choose from; if it is empty, the lost ones themselves are.
        lost: prompts.
        count: how many at most.
        seed: of the order where nothing tells.
    """
    pool = pool or [Record(prompt, None, None, "a lost prompt") for prompt in lost]
    distinct = {normal(show_prompt(record.prompt)): record for record in reversed(pool)}
    words = [frozenset(normal(show_prompt(prompt)).split()) for prompt in lost[:MOST_LOST]]

    def rank(text: str) -> tuple[float, str]:
        own = frozenset(text.split())
        nearest = max((len(own & one) / max(1, len(own | one)) for one in words), default=0.0)
        return -nearest, json_digest([seed, text])

    return [distinct[text] for text in sorted(distinct, key=rank)[:count]]


def expand(
    model: AlignedModel, records: Sequence[Record], folder: Path, reward: Reward, *, n: int, max_tokens: int, seed: int
) -> None:
    """Write `pairs.jsonl`, pairs of drawn answers, into a round's folder; an interrupted call goes on."""
    path = folder / "prompts.jsonl"
    write_rows(path, [{**chat_columns(record.prompt), **record.columns} for record in records])
    how = {"n": n, "max_tokens": max_tokens, "temperature": 1.0, "seed": seed, "pairs": 1, "reward": reward}
    call.propose(model=model, dataset=str(path), out=str(folder / "pairs.jsonl"), leave_out_long=True, **how)
    path.unlink()
