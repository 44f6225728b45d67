"""What rules that look back remember of vLLM's requests.

vLLM draws the tokens, and we see them a step later, as the request's newest ids. So a request's memory is the `Context` of its
last row, with log p̃ of that row: when the next row is asked for, the token that was drawn there moves the memory on.

A request that is preempted, or left out of steps, comes back as another object with the same prompt and a continuation of its
ids. Its memory is kept for that, on the device: a few numbers and one row.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.rules import Context, Rule
from trimtab.core.rules.context import first_context, follow
from trimtab.core.transfer import to_device
from trimtab.vllm.cache import Request

__all__ = ["Recall"]

logger = logging.getLogger(__name__)

MOST = 256
"""Memories that are kept of requests that have left the batch; the oldest are dropped first."""


class _Row(NamedTuple):
    """One row of a request, as it was when the row was asked for."""

    after: int
    """Tokens of the output before it."""
    context: Context
    """Without leading dimensions."""
    logp: Tensor
    """`[V]` log p̃."""


class _Memory:
    """A request's last two rows: vLLM may ask for the last one again, when what was drawn there does not count."""

    def __init__(self, request: Request, rule: Rule) -> None:
        self.owner, self.rule = request, rule
        self.rows: list[_Row] = []
        self.output: list[int] = []
        """What stood before the last row."""

    def suits(self, request: Request, rule: Rule) -> bool:
        """Whether it is of the same text, whose request had left the batch."""
        same = self.owner.gone and self.owner.prompt is request.prompt and self.rule == rule
        return same and list(request.output[: len(self.output)]) == self.output

    def row(self, after: int, output: Sequence[int]) -> _Row | None:
        """The row behind so many tokens of an output, if it is here and what was drawn before it still counts."""
        last = slice(max(after - 1, 0), max(after, 0))
        same = list(output[last]) == self.output[last]
        return next((row for row in self.rows if row.after == after and same), None)


class Recall:
    """The memories of all requests whose rules look back."""

    def __init__(self) -> None:
        self._memories: list[_Memory] = []

    def contexts(self, rule: Rule, requests: Sequence[Request], device: torch.device) -> Context:
        """The contexts `[b, 1]` of the next rows of requests."""
        memories = [self._find(request, rule) for request in requests]
        self._forget()
        found: list[Context] = []
        for request, memory in zip(requests, memories, strict=True):
            count = len(request.output)
            here, before = memory.row(count, request.output), memory.row(count - 1, request.output)
            if here is not None:
                found.append(here.context)
            elif before is not None:
                found.append(_go_on(rule, before.context, request.output[-1], before.logp))
            else:
                found.append(_begin(rule, request, device))
        return Context(*(torch.stack(part).unsqueeze(1) for part in zip(*found, strict=True)))

    def note(self, rule: Rule, requests: Sequence[Request], contexts: Context, logp: Tensor) -> None:
        """Remember rows that were made.

        Args:
            rule: theirs.
            requests: whose they are.
            contexts: `[b, 1]` of the rows.
            logp: log p̃ `[b, V]` there.
        """
        for i, request in enumerate(requests):
            memory, count = self._find(request, rule), len(request.output)
            weighed = logp[i].clone() if rule.reads_logp else logp.new_empty(0)  # a view would keep the whole batch's rows
            row = _Row(count, Context(*(part[i, 0].clone() for part in contexts)), weighed)
            memory.rows = [*(old for old in memory.rows if old.after == count - 1), row]
            del memory.output[count:]
            memory.output += request.output[len(memory.output) : count]

    def _find(self, request: Request, rule: Rule) -> _Memory:
        """A request's memory: its own, or that of what it was before it left the batch, or a new one."""
        for memory in self._memories:
            if memory.owner is request:
                return memory
        memory = next((memory for memory in self._memories if memory.suits(request, rule)), _Memory(request, rule))
        memory.owner = request
        if memory not in self._memories:
            self._memories.append(memory)
        return memory

    def _forget(self) -> None:
        gone = [memory for memory in self._memories if memory.owner.gone]
        if dropped := gone[: max(len(gone) - MOST, 0)]:
            self._memories = [memory for memory in self._memories if memory not in dropped]


def _go_on(rule: Rule, context: Context, token: int, logp: Tensor) -> Context:
    """The context of the next row, once a token was drawn."""
    drawn = to_device(token, logp.device)
    weighed = gather(logp, drawn).double() if rule.reads_logp else torch.full_like(drawn, torch.nan, dtype=torch.float64)
    return follow(rule, context, drawn, weighed)


def _begin(rule: Rule, request: Request, device: torch.device) -> Context:
    """The context behind what a request has already: after its prompt alone, unless its memory was lost."""
    (*parts,) = (part[0] for part in first_context(rule, [request.prompt], device))
    context = Context(*parts)
    if len(request.output):
        logger.warning("what rule '%s' knew of a request is lost: log p̃ of %d tokens is not known", rule, len(request.output))
        unknown = to_device(torch.nan, device, torch.float64)
        for token in request.output:
            context = follow(rule, context, to_device(token, device), unknown)
    return context
