"""What samples are drawn from: the aligned model with the weights as they are now.

The proposal samples and is never touched. A head trains on a copy of its modules that shares all of their weights, for PEFT
puts its adapters into the modules themselves.
"""

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.assemble import make_capture
from trimtab.models.adapters import Adapted
from trimtab.models.aligner import Aligner
from trimtab.models.base import LanguageModel
from trimtab.models.head import Head, HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train.head import TrainedHead
from trimtab.train.hidden import hidden_states
from trimtab.train.plan import Plan
from trimtab.train.record import make_manifest
from trimtab.train.rows import ModelRows, Proposal

__all__ = ["Policies", "Policy", "Split", "split_proposal"]


class Policy(Protocol):
    """What samples are drawn from."""

    def generate(self, prompts: Any, params: Any) -> Sequence[Any]:
        """Completions, as `AlignedModel.generate` gives them: with `text`, `tokens`, `finish_reason`, `error`, `logprobs`."""


class Split(NamedTuple):
    """A proposal twice, with the very same weights."""

    trained_on: Proposal
    """Its modules may be changed."""
    sampled: Proposal
    """It is as fast as in decoding: on a CPU its weights are packed, which takes their memory once more."""
    frozen: Any
    """The transformers model of the first one."""
    rows: ModelRows
    """Of the second one."""


def split_proposal(proposal: Proposal, device: str | None) -> Split:
    """Make two of it; the one that is given is of no other use after that."""
    assert proposal.model is not None  # as `_refuse_beside_rewards` has it
    model, vocab_size = proposal.model.model, proposal.model.vocab_size
    shared: dict[int, Tensor] = {id(b): b for b in model.buffers()}
    shared |= {id(p): torch.nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}  # packing empties the other ones
    twin = copy.deepcopy(model, shared)
    sampler = HuggingFaceLM(model, vocab_size, owned=True, capture=make_capture(None, device))
    rows = ModelRows(sampler, proposal.rows.fingerprint, proposal.eos_token_ids)
    return Split(proposal._replace(model=HuggingFaceLM(twin, vocab_size)), proposal._replace(model=sampler), twin, rows)


class Policies:
    """Makes aligned models of an aligner that trains.

    Args:
        plan: of the run.
        proposal: that samples.
        tokenizer: of both.
        head: what a head's manifest says; None for an aligner that reads tokens.
        max_num_seqs: the most answers drawn at once.
        date: what chat templates take for today.
    """

    def __init__(
        self, plan: Plan, proposal: Proposal, tokenizer: Any, head: Head | None, max_num_seqs: int, date: str | None
    ) -> None:
        assert proposal.model is not None  # as `_refuse_beside_rewards` has it
        self._frozen, self._head, self._source = proposal.model, head, plan.asked.proposal
        self._pool = None if head is None else HeadPool(proposal.model, head.tap)
        how: dict[str, Any] = {"tokenizer": tokenizer, "eos_token_ids": proposal.eos_token_ids, "date": date}
        how |= {"max_num_seqs": max_num_seqs}
        self._bare, self._kept = (AlignedModel(proposal.model, **how) for _ in range(2))
        """The proposal alone; and again, for what is learnt about the speed of drafts is kept for all rounds."""
        self._manifest, self._tokenizer = make_manifest(plan, tokenizer, plan.weight, head), tokenizer

    @property
    def bare(self) -> Policy:
        """The proposal alone."""
        return self._bare

    def of(self, model: Any, weight: float) -> Policy:
        """The aligned model of a trained one as it is now, at a weight of the rule."""
        model.eval()  # what is sampled is what is decoded; a training step puts it back
        with torch.random.fork_rng(devices=[]):  # so that a round that is read, and not drawn, leaves the same random numbers
            found = self._wrap(model)
        return self._kept.with_aligners([found], [dataclasses.replace(self._manifest, weight=weight)])

    def save(self, model: Any, weight: float, folder: Path) -> None:
        """Write a trained one as it is now as an aligner's folder, to be decoded at a weight of the rule."""
        whole = model if self._head is None else TrainedHead(model, self._source, self._head)
        Aligner(whole, self._tokenizer, dataclasses.replace(self._manifest, weight=weight), str(folder)).save_pretrained(folder)

    def close(self) -> None:
        """Let go of what is not this process's own; here, of nothing."""

    def hidden(self, examples: Sequence[Example], tap: int) -> list[dict[str, Tensor]]:
        """What a head reads of prompts and answers in training: inputs of a layer; nothing where it reads tokens."""
        if not tap:
            return [{} for _ in examples]
        return [{"chosen": states} for states in hidden_states(self._frozen, examples, tap)]

    def _wrap(self, model: Any) -> LanguageModel:
        if self._pool is None or self._head is None:
            return HuggingFaceLM(model, self._frozen.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            TrainedHead(model, self._source, self._head).save_pretrained(Path(folder))
            return Adapted(self._pool, self._pool.store.read(folder, "the head as it is"))
