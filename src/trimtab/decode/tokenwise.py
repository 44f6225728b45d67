"""Decode token by token: one row of every model, one draw, one token. The reference that every faster way must equal.

Prefill reads all of a prompt but its last token; that one is the first step's input. A prompt with several completions is
read once and its slots are copied. One transfer a step brings the tokens, and what was asked about them, to the host.
"""

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from trimtab.core.logprobs import gather
from trimtab.core.noise import uniforms
from trimtab.core.rules import KLGate
from trimtab.decode.prefill import prefill
from trimtab.decode.request import TokenEvent
from trimtab.decode.sampler import Sampler
from trimtab.decode.sequence import Sequence as Growing
from trimtab.decode.shaping import BatchShaping
from trimtab.errors import DeadRow
from trimtab.models.base import LanguageModel, State

__all__ = ["decode_tokenwise"]

NOISE_BLOCK = 64
"""Positions for which noise is drawn at once."""


def decode_tokenwise(proposal: LanguageModel, aligners: Sequence[LanguageModel], batch: list[Growing]) -> Iterator[TokenEvent]:
    """Grow every sequence of a batch to its end, yielding an event for each token as it comes.

    Args:
        proposal: P_M.
        aligners: Q_1 … Q_n.
        batch: sequences to decode together; the caller bounds their number.

    Raises:
        DeadRow: a next-token distribution is NaN or has no mass.
    """
    models = [proposal, *aligners]
    states = [_read_prompts(model, batch) for model in models]
    run = _Run(proposal, batch)
    while True:
        inputs = torch.tensor([[s.next_input] for s in run.sequences], device=proposal.device)
        counts = [int(s.finish_reason is None) for s in run.sequences]
        rows = [model.extend(state, inputs, counts).to(proposal.device) for model, state in zip(models, states, strict=True)]
        yield from run.step(rows[0], rows[1:])
        unfinished = [slot for slot, s in enumerate(run.sequences) if s.finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) <= len(run.sequences) // 2:  # moving the others costs a copy of their cache: only when it pays
            states = [model.select(state, unfinished) for model, state in zip(models, states, strict=True)]
            run = _Run(proposal, [run.sequences[slot] for slot in unfinished])


class _Run:
    """A batch of sequences with its settings as tensors, until sequences leave."""

    def __init__(self, proposal: LanguageModel, sequences: list[Growing]) -> None:
        self.sequences = sequences
        self._device = proposal.device
        self._shaping = BatchShaping([s.shaping for s in sequences], self._device)
        contexts = [s.prompt + s.tokens for s in sequences]
        self._sampler = Sampler([s.params for s in sequences], contexts, proposal.vocab_size, self._device)
        self._draws = max(s.shaping.rule.draws for s in sequences)
        self._gated = any(isinstance(s.shaping.rule, KLGate) for s in sequences)
        self._logprobs = any(s.params.logprobs for s in sequences)
        self._noise = torch.empty(0)
        self._noise_left = 0

    def step(self, logp: Tensor, logqs: list[Tensor]) -> Iterator[TokenEvent]:
        """Draw a token for every sequence from the models' rows `[B, 1, V]` and hand it over."""
        inputs = self._shaping.inputs(logp, logqs)
        target = self._shaping.target(inputs)
        noise = self._next_noise()
        tokens = self._shaping.sample(inputs, noise, self._sampler.draw(target, noise[..., 0]))
        self._sampler.note(tokens)
        columns = [tokens]
        if self._gated:
            columns.append(self._shaping.fallbacks(inputs))
        if self._logprobs:
            columns += [gather(rows, tokens.clamp(min=0)) for rows in (logp, *logqs, target)]
        values = torch.cat([column.double() for column in columns], dim=-1).tolist()  # the step's only wait for the device
        for slot, (sequence, (token, *rest)) in enumerate(zip(self.sequences, values, strict=True)):
            if sequence.finish_reason is None:
                if token < 0:
                    _explain(sequence, slot, logp, logqs)
                yield sequence.accept(int(token), rest[self._gated :], bool(self._gated and rest[0]))

    def _next_noise(self) -> Tensor:
        """Uniforms `[B, 1, draws]` for each sequence's own next position."""
        if self._noise_left == 0:
            seeds, indices, starts = zip(*((s.seed, s.index, len(s.tokens)) for s in self.sequences), strict=True)
            self._noise = uniforms(seeds, indices, starts, NOISE_BLOCK, self._draws, self._device)
            self._noise_left = NOISE_BLOCK
        at = NOISE_BLOCK - self._noise_left
        self._noise_left -= 1
        return self._noise[:, at : at + 1]


def _read_prompts(model: LanguageModel, batch: list[Growing]) -> State:
    """A state with a slot for each sequence, holding all of its prompt but the last token."""
    first: dict[int, Growing] = {}
    for sequence in batch:
        first.setdefault(sequence.prompt_index, sequence)
    prompts = [sequence.prompt[:-1] for sequence in first.values()]
    state = prefill(model, prompts, max(len(s.prompt) + s.limit for s in batch))
    slot_of = {prompt_index: slot for slot, prompt_index in enumerate(first)}
    slots = [slot_of[sequence.prompt_index] for sequence in batch]
    return state if slots == list(range(len(prompts))) else model.select(state, slots)


def _explain(sequence: Growing, slot: int, logp: Tensor, logqs: list[Tensor]) -> NoReturn:
    """Say which model is to blame for a row without a token."""
    where = f"after {len(sequence.tokens)} tokens of completion {sequence.index} of prompt {sequence.prompt_index}"
    names = ["the proposal", *(f"aligner {i}" for i in range(len(logqs)))]
    for name, rows in zip(names, [logp, *logqs], strict=True):
        if bool(rows[slot].isnan().any()):
            raise DeadRow(f"{name} gives NaN probabilities {where}: are its weights or its dtype sound?")
    raise DeadRow(f"rule '{sequence.shaping.rule}' leaves no possible token {where}: loosen top-k, top-p or logit_bias")
