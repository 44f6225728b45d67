"""Every system of the study by name, and how it is made for a cell."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lora
import trained
from cell import Cell
from chats import Record
from constraints import KINDS
from systems import OF, System

from trimtab.decode.aligned import AlignedModel
from trimtab.models.loading import load_tokenizer

__all__ = ["EXAMPLES", "PROPOSAL", "RIVALS", "SIX", "Rival", "examples", "open_proposal", "wanted"]

PROPOSAL = "proposal"
SIX = "six examples"
EXAMPLES = 6
BATCH = 16
"""Sequences at once."""

WEIGHTS = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5)
"""Of proxy-tuning; the best on the development prompts is taken."""


class Rival(NamedTuple):
    """How a system is made.

    Attributes:
        open: the system, loaded; what has to be trained for it is trained now, unless it was.
        seeded: whether anything about it depends on the seed.
        needs_pairs: whether it needs unwanted answers.
        needs_trl: whether TRL must be installed.
        cost: seconds of training and bytes of what was trained; None if nothing is.
    """

    open: Callable[[Cell], System]
    seeded: bool = True
    needs_pairs: bool = False
    needs_trl: bool = False
    cost: Callable[[Cell], dict[str, Any]] | None = None


def open_proposal(cell: Cell) -> System:
    """The frozen model as it is."""
    return System(AlignedModel.from_pretrained(cell.proposal, draft="none", max_num_seqs=BATCH))


def examples(cell: Cell) -> tuple[dict[str, str], ...]:
    """Six training examples as turns of a chat, drawn by the seed from the shorter half; of constraints, one of each kind."""
    draw = random.Random(cell.seed)
    records = sorted(cell.read("train"), key=_length)
    if "constraint" in records[0]:
        kinds = {kind: [record for record in records if record["constraint"]["kind"] == kind] for kind in KINDS}
        chosen = [draw.choice(of_kind) for of_kind in kinds.values() if of_kind]
    else:
        chosen = draw.sample(records[: max(EXAMPLES, len(records) // 2)], EXAMPLES)
    draw.shuffle(chosen)
    return tuple(message for record in chosen for message in [*record["prompt"], *wanted(record)])


def wanted(record: Record) -> list[dict[str, str]]:
    """The answer that is to be learnt."""
    return record["completion"] if "completion" in record else record["chosen"]


def _length(record: Record) -> int:
    return sum(len(message["content"]) for message in [*record["prompt"], *wanted(record)])


def _with_examples(open_one: Callable[[Cell], System]) -> Callable[[Cell], System]:
    return lambda cell: replace(open_one(cell), before=examples(cell))


def _with_system_prompt(cell: Cell) -> System:
    return replace(open_proposal(cell), before=({"role": "system", "content": cell.task.system_prompt},))


def _best_of(cell: Cell) -> System:
    """Samples of the bare proposal; the proposal with six examples picks."""
    bare = open_proposal(cell)
    return replace(bare, referee=replace(bare, before=examples(cell)))


def _proxy_tuning(cell: Cell) -> System:
    """P·(Q_sft/Q_start)^λ (Liu et al., "Tuning Language Models by Proxy", arXiv 2401.08565)."""
    pair = [trained.train(trained.SFT, cell), trained.start_of(cell)]
    parts = AlignedModel.from_pretrained(cell.proposal, pair, rule="product", draft="none")
    records = cell.read("dev")
    prompts, answers = [record["prompt"] for record in records], [wanted(record)[0] for record in records]

    def at(weight: float) -> System:
        models = (parts.proposal, parts.aligners, parts.tokenizer, parts.eos_token_ids)
        return System(AlignedModel(*models, rule="product", weight=[weight, -weight], draft="none", max_num_seqs=BATCH))

    return min(map(at, WEIGHTS), key=lambda system: sum(total for total, _ in system.nll(prompts, answers)))


def _aligned(name: str) -> Callable[[Cell], System]:
    """What `trimtab train` made, as its manifest says."""
    return lambda cell: System(AlignedModel.from_pretrained(cell.proposal, trained.train(name, cell), max_num_seqs=BATCH))


def _tuned(name: str) -> Callable[[Cell], System]:
    """The proposal itself with an adapter."""

    def open_one(cell: Cell) -> System:
        model = lora.merged(cell.proposal, lora.tune(name, cell))
        tokenizer = load_tokenizer(str(cell.proposal))
        return System(AlignedModel.from_pretrained(model, tokenizer=tokenizer, draft="none", max_num_seqs=BATCH))

    return open_one


def _cost(of: Callable[[Path], dict[str, Any]], name: str) -> Callable[[Cell], dict[str, Any]]:
    return lambda cell: of(cell.model(name))


def _both(name: str, rival: Rival) -> dict[str, Rival]:
    """A system, and the same with six examples."""
    return {name: rival, f"{name}, {SIX}": rival._replace(open=_with_examples(rival.open))}


RIVALS: dict[str, Rival] = {
    PROPOSAL: Rival(open_proposal, seeded=False),
    "system prompt": Rival(_with_system_prompt, seeded=False),
    SIX: Rival(_with_examples(open_proposal)),
    f"best of {OF}": Rival(_best_of),
}
for _name in trained.TRAINED:
    _rival = Rival(_aligned(_name), needs_pairs=trained.learns_pairs(_name), cost=_cost(trained.cost_of, _name))
    RIVALS |= _both(_name, _rival)
RIVALS["proxy-tuning"] = Rival(_proxy_tuning, cost=_cost(trained.cost_of, trained.SFT))
for _name, (_method, _) in lora.CEILINGS.items():
    _rival = Rival(_tuned(_name), needs_pairs=_method == "DPO", needs_trl=True, cost=_cost(lora.cost_of, _name))
    RIVALS |= _both(_name, _rival)
