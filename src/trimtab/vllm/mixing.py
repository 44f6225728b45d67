"""The proposal's logits and the aligners' rows become aligned logits, for all aligned requests of a step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.core.transfer import to_device
from trimtab.decode.shaping import BatchShaping, Shaping
from trimtab.vllm.cache import Request
from trimtab.vllm.recall import Recall

__all__ = ["Mixer"]

CUT = 1e6
"""Nats: e^−CUT is 0 in float32, at any temperature below 1,000."""


class Mixer:
    """Writes aligned rows over the proposal's logits.

    Args:
        vocab_size: V; columns beyond it are padding, which an aligned row never draws.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._last: tuple[list[Shaping], BatchShaping] | None = None
        self._recall = Recall()

    def mix(
        self,
        logits: Tensor,
        rows: Sequence[int],
        logqs: Sequence[Tensor],
        shapings: Sequence[Shaping],
        requests: Sequence[Request] = (),
    ) -> None:
        """Put the log-probabilities of aligned models where the proposal's logits were.

        Args:
            logits: `[requests, columns]` float32, changed in place.
            rows: which of them are aligned.
            logqs: `[n, V]` the rows of their first aligner, of their second, …: n requests with the same number of aligners.
            shapings: how each is to be aligned.
            requests: whose they are, for rules that look back.
        """
        index = slice(None) if list(rows) == list(range(len(logits))) else torch.tensor(list(rows), device=logits.device)
        logp = row_from_logits(logits[index][:, None], self._vocab_size)
        shaping = self._shaping(list(shapings), logits.device)
        inputs = shaping.inputs(logp, [logq[:, None].to(logp) for logq in logqs])
        contexts = {}
        for rule, members in shaping.members.items():
            if rule.looks_back:
                asking = [requests[i] for i in members]
                contexts[rule] = self._recall.contexts(rule, asking, logits.device)
                mine = inputs[0][to_device(members, logits.device), 0]
                self._recall.note(rule, asking, contexts[rule], mine)
        target = shaping.target(inputs, contexts)
        # What a cut leaves out has no probability, but comes before what vLLM forbids later, such as an early end: where only
        # such tokens are left, the proposal decides among them.
        target = torch.where(target.isneginf(), logp - CUT, target)
        logits[index, : self._vocab_size] = target[:, 0].to(logits.dtype)
        logits[index, self._vocab_size :] = -math.inf

    def _shaping(self, shapings: list[Shaping], device: torch.device) -> BatchShaping:
        """A batch is mostly that of the step before."""
        if self._last is None or self._last[0] != shapings:
            self._last = shapings, BatchShaping(shapings, device)
        return self._last[1]
