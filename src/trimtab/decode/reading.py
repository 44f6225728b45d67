"""One step of several models over the same texts: the proposal first, for heads read its hidden states."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimtab.models.base import LanguageModel, State
from trimtab.models.head import tap_of

__all__ = ["extend_all", "extend_proposal", "input_of", "prefill_all", "taps_of"]


def taps_of(models: Sequence[LanguageModel]) -> set[int]:
    """The layers of the proposal whose inputs the heads among some models read."""
    return {tap for model in models if (tap := tap_of(model)) is not None}


def extend_proposal(
    proposal: Any,
    state: State,
    tokens: Tensor,
    counts: Sequence[int],
    taps: set[int],
    *,
    wanted: bool = True,
    last_only: bool = False,
) -> tuple[Tensor | None, dict[int, Tensor]]:
    """The proposal's rows `[B, K, V]`, or `[B, 1, V]` after each slot's last token, and the inputs `[B, K, H]` of these layers.

    Where the rows are not `wanted`, now or later, and heads take the place of the layers above, those are not run.
    """
    if not taps:
        return (proposal.prefill if last_only else proposal.extend)(state, tokens, counts), {}
    if not wanted:
        return None, proposal.extend_below(state, tokens, counts, taps)
    rows, tapped = proposal.extend_tapped(state, tokens, counts, taps, last_only=last_only)
    return rows, tapped


def extend_all(models: Sequence[LanguageModel], states: Sequence[State], tokens: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Append tokens `[B, K]` to every model's slots; each one's rows `[B, K, V]`, on the first one's device.

    Args:
        models: the proposal first, if heads are among them.
        states: one for each.
        tokens: ids.
        counts: how many tokens each slot takes.
    """
    device = models[0].device
    first, tapped = extend_proposal(models[0], states[0], tokens.to(device), counts, taps_of(models[1:]))
    assert first is not None
    rest = [
        model.extend(state, input_of(model, tokens, tapped), counts).to(device)
        for model, state in zip(models[1:], states[1:], strict=True)
    ]
    return [first, *rest]


def prefill_all(
    models: Sequence[LanguageModel], states: Sequence[State], tokens: Tensor, counts: Sequence[int], *, wanted: bool = True
) -> list[Tensor | None]:
    """`extend_all` where only the rows `[B, 1, V]` after each slot's last token count.

    None stands for the proposal's, where they are not `wanted`, now or later, and heads take its place.
    """
    device, taps = models[0].device, taps_of(models[1:])
    first, tapped = extend_proposal(models[0], states[0], tokens.to(device), counts, taps, wanted=wanted, last_only=True)
    rest = [
        model.prefill(state, input_of(model, tokens, tapped), counts).to(device)
        for model, state in zip(models[1:], states[1:], strict=True)
    ]
    return [first, *rest]


def input_of(model: LanguageModel, tokens: Tensor, tapped: dict[int, Tensor]) -> Tensor:
    """What a model reads of a step: tokens, or hidden states if it is a head."""
    tap = tap_of(model)
    return tokens.to(model.device) if tap is None else tapped[tap]
