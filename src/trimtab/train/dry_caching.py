"""What the passes over the data will take before a training run: memory, operations, and bytes on disk.

They are those for the proposal's rows, and for a head those for its hidden states.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from trimtab.data.examples import Example, answers
from trimtab.models.loading import pick_device
from trimtab.models.shapes import FoundConfig
from trimtab.train.cache import ProposalCache, bytes_per_token, shard_bytes
from trimtab.train.head import hidden_answers
from trimtab.train.hidden import hidden_bytes
from trimtab.train.plan import Plan
from trimtab.train.rehearse_caching import rehearse_caching, rehearse_hidden
from trimtab.train.rows import Layout
from trimtab.train.taught_rows import TaughtCache

__all__ = ["Passes", "proposal_dtype"]

SAMPLED = 4
"""Examples that stand for all where operations are counted."""


def proposal_dtype(plan: Plan, proposal: FoundConfig) -> torch.dtype:
    """The dtype that the proposal is loaded in."""
    named = plan.asked.dtype if plan.asked.dtype != "auto" else getattr(proposal.config, "dtype", None) or torch.float32
    return getattr(torch, named) if isinstance(named, str) else named


class Passes(NamedTuple):
    """The passes over the data of a run.

    Attributes:
        plan: of the run.
        proposal: whose rows and states they are.
        vocab_size: V.
        tap: the first layer of a head; None where none is trained.
        examples: those that are trained on, or some like them; of a head the samples that it is kept by among them.
        development: those of development, or some like them.
    """

    plan: Plan
    proposal: FoundConfig
    vocab_size: int
    tap: int | None
    examples: Sequence[Example]
    development: Sequence[Example]

    def memory(self) -> dict[str, Any] | None:
        """Memory of the pass that takes most, and the operations of each for an example: for rows, and for hidden states.

        None where nothing is cached.
        """
        plan, config, dtype = self.plan, self.proposal.config, proposal_dtype(self.plan, self.proposal)
        device = pick_device(None if plan.asked.device == "auto" else plan.asked.device)
        found, flops = [], {"flops": 0.0, "hidden_flops": 0.0}
        if kinds := dict.fromkeys(which for _, which in plan.cached_answers):
            layout, temperature = plan.row_layout(self.vocab_size), plan.temperatures.proposal
            how = self.vocab_size, layout, temperature
            found.append(rehearse_caching(config, dtype, device, *how, *self._read(list(kinds))))
            flops["flops"] = found[-1].flops
        if self.tap:
            kinds = dict.fromkeys(which for _, which in self._hidden)
            found.append(rehearse_hidden(config, dtype, device, self.tap, *self._read(list(kinds))))
            flops["hidden_flops"] = found[-1].flops
        if not found:
            return None
        most = max(found, key=lambda one: one.keys_and_values + one.passing)
        total = most.weights + most.keys_and_values + most.passing
        return {"device": str(device), "dtype": str(dtype).removeprefix("torch."), **most._asdict(), **flops, "total": total}

    def flops(self, each: Mapping[str, Any], counts: Mapping[str, int]) -> float:
        """Operations of all passes over so many examples of `train` and of `dev`; `each` is what `memory` says."""
        rows = sum(counts[part] for part, _ in self.plan.cached_answers)
        return float(rows * each["flops"] + sum(counts[part] for part, _ in self._hidden) * each["hidden_flops"])

    def disk(self, *, known: bool) -> dict[str, Any]:
        """What is kept on disk; `bytes` and `tokens` in all where the examples are `known`.

        A token of an answer takes `bytes_per_token`, of a teacher's rows `teacher_bytes_per_token`, and a token of a prompt or
        an answer that a head reads `hidden_bytes_per_token`; they are left out where there are none.
        """
        plan, parts = self.plan, {"train": self.examples, "dev": self.development}
        plain: tuple[Layout, type[ProposalCache]] = plan.row_layout(self.vocab_size), ProposalCache
        taught: tuple[Layout, type[ProposalCache]] = plan.taught_layout(self.vocab_size), TaughtCache
        width, dtype = self.proposal.config.hidden_size, proposal_dtype(plan, self.proposal)
        size, tokens = 0, 0
        for part, which in plan.cached_answers:
            name, how = ("chosen", taught) if which == "teacher" else (which, plain)
            lengths = [len(getattr(example, name)) for example in parts[part]]
            size, tokens = size + sum(shard_bytes(lengths, *how)), tokens + sum(lengths)
        for part, which in self._hidden:
            lengths = [len(one.prompt) + len(one.chosen) for one in answers(parts[part], which)]
            size, tokens = size + sum(hidden_bytes(lengths, width, dtype)), tokens + sum(lengths)
        each = {"bytes_per_token": bytes_per_token(*plain)} if self.tap is None or plan.cached_answers else {}
        each |= {} if plan.asked.teacher_prompt is None else {"teacher_bytes_per_token": bytes_per_token(*taught)}
        each |= {} if not self.tap else {"hidden_bytes_per_token": width * dtype.itemsize}
        return {**each, "tokens": tokens if known else None, "bytes": size if known else None}

    @property
    def _hidden(self) -> list[tuple[str, str]]:
        """Which answers of which part hidden states are kept on."""
        if self.tap is None:
            return []
        return hidden_answers(self.tap, self.examples, self.development, pairs=self.plan.reads_rejected)

    def _read(self, kinds: Sequence[str]) -> tuple[int, list[Example]]:
        """Tokens of the longest sequence that the proposal reads on these answers, and some that stand for all."""
        sequences = [one for which in kinds for one in _passed((*self.examples, *self.development), which)]
        some = self.examples[:: max(1, len(self.examples) // SAMPLED)][:SAMPLED]
        longest = max(len(one.prompt) + len(one.chosen) for one in sequences)
        return longest, [one for which in kinds for one in _passed(some, which)]


def _passed(examples: Sequence[Example], which: str) -> list[Example]:
    """What the proposal reads on the `which` answers; for a teacher's rows, the answers in both contexts."""
    if which != "teacher":
        return answers(examples, which)
    return [Example([*e.prompt, *(e.teacher or e.prompt), *e.chosen], e.chosen, []) for e in examples]
