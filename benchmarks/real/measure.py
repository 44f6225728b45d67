"""What is measured of a system in a cell, as one object of JSON: lists hold a value for each prompt.

parts      by test set: `prompts` (their names), `nll` and `tokens` of the wanted answers, of unwanted ones too where there
           are pairs; greedy `answers`, of HH to the first prompts alone, how many tokens they have and why they ended, and
           after how many they were handed over, or null, where a rule hands over;
           `rougeL` and `chrf` against the wanted answers; `obeyed` and `right` where a program can tell
kl         divergence from the proposal on own samples of the test prompts, and their tokens; a bound for best-of-n
outside    NLL of the proposal's own greedy answers to prompts outside the task: the loss against the proposal is harm
speed      tokens a second of greedy answers, one at a time; the ratio to transformers' `generate` of the proposal, and that
           ratio where nothing is kept of earlier prompts
training   seconds and bytes; null if nothing is trained
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cell import Cell
from chats import Record, question
from constraints import obeys, states
from outside import PROMPTS
from rivals import RIVALS, open_proposal, wanted
from systems import BOUND, System

from trimtab.decode.prefixes import PREFIX_CACHE_TOKENS
from trimtab.decode.request import SamplingParams
from trimtab.files import read_json, write_json
from trimtab.judges.references import ReferenceMetric
from trimtab.models.loading import load_model

__all__ = ["WARM_UP", "measure", "measure_outside", "measure_part", "measure_speed"]

PARTS = ("test", "transfer")
OUTSIDE_TOKENS = 64
SPEED_PROMPTS, WARM_UP = 12, 3
SPEED_TOKENS = 48
PREFIX_CACHES = {"kept": PREFIX_CACHE_TOKENS, "read whole": 0}
"""Tokens of earlier prompts that are kept."""


def measure(cell: Cell) -> dict[str, Any]:
    """Everything about a cell; what is to be trained is trained first."""
    rival = RIVALS[cell.system]
    system, bare = rival.open(cell), open_proposal(cell)
    test = cell.read("test")
    chats = [chat for chat, _ in _by_prompt(test)][: cell.task.answered]
    sampling = SamplingParams(max_tokens=cell.task.max_tokens, temperature=1.0, seed=cell.seed)
    parts = {part: measure_part(cell, system, records) for part in PARTS if (records := cell.read(part))}
    if system.referee is None:
        divergence = system.divergence(bare, chats, sampling)
    else:  # whose answers are samples
        divergence = [(BOUND, count) for count in parts["test"]["answer_tokens"]]
    return {
        "parts": parts,
        "kl": {
            "kl": [kl for kl, _ in divergence],
            "tokens": [count for _, count in divergence],
            "bound": system.referee is not None,
        },
        "outside": measure_outside(cell, system, bare, PROMPTS[: cell.max_examples]),
        "speed": measure_speed(cell.proposal, system, chats[: SPEED_PROMPTS + WARM_UP]),
        "training": rival.cost(cell) if rival.cost else None,
    }


def measure_part(cell: Cell, system: System, records: Sequence[Record]) -> dict[str, Any]:
    """One test set: as the module's docstring has it."""
    grouped = _by_prompt(records)
    greedy = SamplingParams(max_tokens=cell.task.max_tokens, temperature=0.0, seed=cell.seed)
    completions = system.answers([chat for chat, _ in grouped[: cell.task.answered]], greedy)
    answers = [one.text for one in completions]
    found: dict[str, Any] = {
        "prompts": [hashlib.sha256(same[0]["group"].encode()).hexdigest()[:12] for _, same in grouped],
        "answers": answers,
        "answer_tokens": [len(one.tokens) for one in completions],
        "finish_reasons": [one.finish_reason for one in completions],
    }
    if system.model.shaping(greedy).rule.hands_over:
        found["handover_at"] = [one.handover_at for one in completions]
    if system.referee is None:  # what best-of-n says has no likelihood that can be had
        for name in ("nll", "rejected") if "rejected" in records[0] else ("nll",):
            found |= _likelihood(system, grouped, name)
    if "completion" in records[0]:
        references = [[wanted(record)[0]["content"] for record in same] for _, same in grouped]
        for metric in (ReferenceMetric("rougeL", tokenizer="unicode"), ReferenceMetric("chrf")):
            found[metric.name] = metric.score(answers, references)
    if "constraint" in records[0]:
        judged = [(same[0], text) for (_, same), text in zip(grouped, answers, strict=True)]
        found["kinds"] = [record["constraint"]["kind"] for record, _ in judged]
        found["obeyed"] = [obeys(record["constraint"], text) for record, text in judged]
        found["right"] = [states(record["facts"], text) for record, text in judged]
    return found


def _likelihood(system: System, grouped: list[tuple[Any, list[Record]]], name: str) -> dict[str, list[float]]:
    """Sums over the answers to each prompt: `nll` of the wanted ones, or of the `rejected` ones."""
    pairs = [
        (i, chat, (record["rejected"] if name == "rejected" else wanted(record))[0])
        for i, (chat, same) in enumerate(grouped)
        for record in same
    ]
    sums, sizes = [0.0] * len(grouped), [0] * len(grouped)
    scored = system.nll([chat for _, chat, _ in pairs], [answer for _, _, answer in pairs])
    for (i, _, _), (total, count) in zip(pairs, scored, strict=True):
        sums[i] += total
        sizes[i] += count
    return {name: sums, "tokens" if name == "nll" else f"{name}_tokens": sizes}


def _by_prompt(records: Sequence[Record]) -> list[tuple[Any, list[Record]]]:
    """Each prompt once, with all records that have it, in order."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(json.dumps(record["prompt"]), []).append(record)
    return [(same[0]["prompt"], same) for same in found.values()]


def measure_outside(cell: Cell, system: System, bare: System, texts: Sequence[str]) -> dict[str, Any] | None:
    """NLL of the proposal's own answers to texts outside the task; None of a system that picks.

    The proposal's answers are made once for all cells of a study.
    """
    if system.referee is not None:
        return None
    path, chats = cell.out / "outside.json", [question(text) for text in texts]
    if not path.exists():
        completions = bare.answers(chats, SamplingParams(max_tokens=OUTSIDE_TOKENS, temperature=0.0))
        ids = [list(one.tokens) for one in completions]
        nll = [total for total, _ in bare.nll(chats, ids)]
        write_json(path, {"answers": [one.text for one in completions], "tokens": ids, "nll": nll})
    said = read_json(path)
    scored = system.nll(chats, said["tokens"])
    own, counts = ([one[i] for one in scored] for i in (0, 1))
    return {"nll": own, "proposal_nll": said["nll"], "tokens": counts}


def measure_speed(proposal: Path, system: System, chats: Sequence[Any]) -> dict[str, float]:
    """Tokens a second, and as a ratio to transformers' `generate` of the proposal in float32.

    The contestants take turns, one prompt at a time: ours answers it greedily to the end, theirs writes as many tokens to it.
    The last prompts come first and warm up; what counts is all tokens of the others over all of their time, prompts included.
    What prompts begin with alike, ours reads once, as it does by default; `ratio_prompts_read_whole` is without that.
    """
    stock = load_model(str(proposal), dtype=torch.float32, device=None)
    params = SamplingParams(max_tokens=SPEED_TOKENS, temperature=0.0, seed=0)
    fresh = {name: replace(system, model=system.model.with_prefix_cache(size)) for name, size in PREFIX_CACHES.items()}
    tokens, seconds = 0, dict.fromkeys([*fresh, "stock"], 0.0)
    measured = max(1, len(chats) - WARM_UP)
    for turn, chat in enumerate([*chats[measured:], *chats[:measured]]):
        spent = {}
        for name, one in fresh.items():
            started = time.perf_counter()
            count = len(one.answers([chat], params)[0].tokens)
            spent[name] = time.perf_counter() - started
        ids = torch.tensor([system.model.encoder.prompt(chat, "prompt")], device=stock.device)
        length = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        started = time.perf_counter()
        stock.generate(ids, attention_mask=torch.ones_like(ids), **length)
        spent["stock"] = time.perf_counter() - started
        if turn >= len(chats) - measured:
            tokens += count
            seconds = {name: seconds[name] + spent[name] for name in seconds}
    return {
        "tokens_per_second": tokens / seconds["kept"],
        "ratio_to_transformers": seconds["stock"] / seconds["kept"],
        "ratio_prompts_read_whole": seconds["stock"] / seconds["read whole"],
    }
