"""From the models' rows to the aligned row: warps, then the rule, for a batch of requests that differ in both."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import Warp, gather, is_distribution, warp
from trimtab.core.rules import Context, Rule
from trimtab.core.transfer import to_device
from trimtab.errors import DeadRow

__all__ = ["BatchShaping", "Contexts", "Inputs", "Shaping", "explain_dead_row", "stack_warps"]

Inputs = tuple[Tensor, list[Tensor]]
"""The rule's inputs log p̃ and log q_1 … log q_n, each `[B, K, V]`."""

Contexts = Mapping[Rule, Context]
"""What each rule that looks back sees of the text before the rows `[b, K]` of its requests."""

NEUTRAL = Warp()
"""The warp that changes nothing."""

NOTHING: Contexts = {}
"""What no rule sees where none looks back."""


@dataclass(frozen=True, repr=False)
class Shaping:
    """How one request's aligned row comes about.

    Attributes:
        rule: the decoding rule, bound to the model's end-of-sequence ids.
        weights: one λ for each aligner.
        proposal: the warp of the proposal's row, in plain numbers.
        aligners: the warp of each aligner's row.
        draft_temperature: of the row that drafts are drawn from, on top of the request's own temperature.
        blend: λ of each aligner where their weights are blended, after which there is one; None where they are not.
    """

    rule: Rule
    weights: tuple[float, ...] = ()
    proposal: Warp = NEUTRAL
    aligners: tuple[Warp, ...] = ()
    draft_temperature: float = 1.0
    blend: tuple[float, ...] | None = None

    def __repr__(self) -> str:
        """The fields; a blend where there is one: resumed files compare it, those of earlier versions too."""
        shown = (field.name for field in fields(self) if field.name != "blend" or self.blend is not None)
        return f"Shaping({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @cached_property
    def reads_proposal(self) -> bool:
        """Whether the aligned row depends on the proposal's, given that the proposal holds no token for impossible."""
        return self.proposal.cuts or self.rule.reads_logp or self.rule.reads_proposal(self.weights)


class BatchShaping:
    """The shapings of B requests, laid out as tensors; all rows are `[B, K, V]`.

    Args:
        shapings: one for each request, all with the same number of aligners.
        device: where the rows are.
        alone: whether nobody reads the proposal's rows, which then may be any.

    Attributes:
        members: which of the requests have which rule.
    """

    def __init__(self, shapings: Sequence[Shaping], device: torch.device, *, alone: bool = False) -> None:
        self._proposal = stack_warps([s.proposal for s in shapings], device)
        self._aligners = [stack_warps(warps, device) for warps in zip(*(s.aligners for s in shapings), strict=True)]
        self._weights = to_device([s.weights for s in shapings], device, torch.float64)[:, None, :]
        members: dict[Rule, list[int]] = {}
        for row, shaping in enumerate(shapings):
            members.setdefault(shaping.rule, []).append(row)
        self.members = members
        self._groups = [(rule, to_device(rows, device)) for rule, rows in members.items()]
        self._marking = [(rule, index) for rule, index in self._groups if rule.marks and self._aligners]
        self._own = alone and all(s.rule.is_aligner(s.weights) for s in shapings)
        """Whether each aligned row is the only aligner's."""
        self._leaving = [(rule, index) for rule, index in self._groups if rule.lets_go and self._aligners]
        self._rowless = [(rule, rows) for rule, rows in members.items() if not rule.has_row]

    def inputs(self, logp: Tensor, logqs: Sequence[Tensor]) -> Inputs:
        """The warped rows that the rules see, from the models' own."""
        return warp(logp, self._proposal), [warp(logq, how) for logq, how in zip(logqs, self._aligners, strict=True)]

    @property
    def marks(self) -> bool:
        """Whether any of the rules marks rows."""
        return bool(self._marking)

    def target(self, inputs: Inputs, contexts: Contexts = NOTHING) -> Tensor:
        """The aligned rows; rows of a rule without a closed form keep log p̃, and rows without mass are NaN.

        Args:
            inputs: the rules'.
            contexts: of the rules that look back.
        """
        logp, logqs = inputs
        if self._own:
            return logqs[0]
        if len(self._groups) == 1 and self._groups[0][0].has_row:
            rule = self._groups[0][0]
            return rule.target(*self._part(inputs, None), **_seen(rule, contexts))
        rows = logp.clone()
        for rule, index in self._groups:
            if rule.has_row:
                rows[index] = rule.target(*self._part(inputs, index), **_seen(rule, contexts)).to(rows.dtype)
        return rows

    def sample(
        self,
        inputs: Inputs,
        uniforms: Callable[[list[int], int], Tensor],
        tokens: Tensor,
        contexts: Contexts = NOTHING,
    ) -> Tensor:
        """Replace the first of the `tokens` `[B, K]` by a draw for those requests whose rule can only sample.

        Args:
            inputs: the rule's.
            uniforms: makes `[b, 1, draws]` for given requests and a number of draws.
            tokens: what was drawn from rows.
            contexts: of the rules that look back.
        """
        for rule, rows in self._rowless:
            index = to_device(rows, tokens.device)
            logp, logqs, weights = self._part((inputs[0][:, :1], [logq[:, :1] for logq in inputs[1]]), index)
            drawn = rule.sample(logp, logqs, weights, uniforms(rows, rule.draws), **_seen(rule, contexts, first=True))
            tokens = tokens.index_copy(0, index, torch.cat([drawn, tokens[index][:, 1:]], 1))
        return tokens

    def marked(self, inputs: Inputs, contexts: Contexts = NOTHING) -> Tensor:
        """Which positions `[B, K]` the rules mark; False under rules that mark none."""
        marked = torch.zeros(inputs[0].shape[:-1], dtype=torch.bool, device=inputs[0].device)
        for rule, index in self._marking:
            marked[index] = rule.marked(*self._part(inputs, index), **_seen(rule, contexts))
        return marked

    def alone(self, inputs: Inputs, contexts: Contexts) -> Tensor | None:
        """At which positions `[B, K]` no aligner plays a part any more, see `Rule.lets_go`; None if that cannot be."""
        if not self._leaving:
            return None
        alone = torch.zeros(inputs[0].shape[:-1], dtype=torch.bool, device=inputs[0].device)
        for rule, index in self._leaving:
            alone[index] = rule.marked(*self._part(inputs, index), **_seen(rule, contexts))
        return alone

    def log_z(self, inputs: Inputs, target: Tensor, tokens: Tensor, contexts: Contexts = NOTHING) -> Tensor:
        """Log Z `[B, 1]` at the first position, the log of the mass that normalising divides by; NaN where a rule has none.

        It is what log weight and log target of any possible token differ by.

        Args:
            inputs: the rules'.
            target: the aligned rows.
            tokens: `[B, 1]` a token for each request that its row makes possible.
            contexts: of the rules that look back.
        """
        at = tokens.clamp(min=0)
        first = inputs[0][:, :1], [logq[:, :1] for logq in inputs[1]]
        found = torch.full_like(at, math.nan, dtype=target.dtype)
        for rule, index in self._groups:
            if rule.weighs_tokens and inputs[1]:
                logw = rule.log_weights(*self._part(first, index), **_seen(rule, contexts, first=True))
                found[index] = gather(logw, at[index])
        return found - gather(target[:, :1], at)

    def weigh(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The aligned rows `[B, K, V]`, and the log of the mass `[B, K]` that each was divided by: −inf where there is none.

        Of rules that all weigh tokens and do not look back; there are aligners. A row that means nothing has NaN for its mass.
        """
        logp, _ = inputs
        rows, log_z = torch.empty_like(logp), torch.empty_like(logp[..., 0])
        for rule, index in self._groups:
            if len(self._groups) == 1:
                return rule.weigh(*self._part(inputs, None))
            rows[index], log_z[index] = rule.weigh(*self._part(inputs, index))
        return rows, log_z

    def _part(self, inputs: Inputs, index: Tensor | None) -> tuple[Tensor, list[Tensor], Tensor]:
        """Some requests' inputs and weights, as a rule takes them; all of them without an index."""
        logp, logqs = inputs
        weights = self._weights.to(logp.dtype)
        if index is None:
            return logp, logqs, weights
        return logp[index], [logq[index] for logq in logqs], weights[index]


def _seen(rule: Rule, contexts: Contexts, *, first: bool = False) -> dict[str, Any]:
    """The keywords by which a rule is given its context: that of the first rows alone, if only those are asked for."""
    if not rule.looks_back:
        return {}
    context = contexts.get(rule)
    return {"context": Context(*(part[:, :1] for part in context)) if first and context is not None else context}


def explain_dead_row(shaping: Shaping, rows: Sequence[Tensor], where: str) -> DeadRow:
    """Say who is to blame for an aligned row without a token.

    Args:
        shaping: how it came about; an aligner of weight 0 is never to blame.
        rows: the models' own `[V]`: the proposal's, then each aligner's. Further ones are left out.
        where: the place, for the message.
    """
    weighed = [("the proposal", 1.0), *((f"aligner {i}", weight) for i, weight in enumerate(shaping.weights))]
    for (name, weight), row in zip(weighed, rows, strict=False):
        if weight and not bool(is_distribution(row)):
            what = "NaN probabilities" if bool(row.isnan().any()) else "no distribution"
            return DeadRow(f"{name} gives {what} {where}: are its weights or its dtype sound?")
    return DeadRow(f"rule '{shaping.rule}' leaves no possible token {where}: loosen top-k, top-p or logit_bias")


def stack_warps(warps: Sequence[Warp], device: torch.device) -> Warp:
    """One warp for B requests from their plain ones: columns `[B, 1]`, and None for a step that no request wants."""

    def column(values: list[float | int | Tensor | None], neutral: float) -> Tensor | None:
        numbers = [neutral if value is None else value for value in values]
        if all(number == neutral for number in numbers):
            return None
        return to_device(numbers, device, torch.float64).unsqueeze(-1)

    top_k = column([min(w.top_k, 2**31) if isinstance(w.top_k, int) else w.top_k for w in warps], 0)
    return Warp(
        temperature=column([w.temperature for w in warps], 1.0),
        top_k=None if top_k is None else top_k.long(),
        top_p=column([w.top_p for w in warps], 1.0),
        min_p=column([w.min_p for w in warps], 0.0),
        max_top_k=max((w.top_k for w in warps if isinstance(w.top_k, int)), default=0),
    )
