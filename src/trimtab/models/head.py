"""Heads: aligners that read the hidden states of their proposal instead of its tokens.

A head runs the proposal's own layers with a LoRA adapter, from the input of one layer on (its *tap*); at tap 0 that is the
embedding of a token. The layers below are run once, for the proposal and for all heads; those above are run for the proposal
itself only where somebody reads its rows (`Rule.reads_proposal`). So a head is the language model that the adapter
would make of the proposal, at the price of the layers that it touches: no weights but the adapter's, and keys and values of
its own for no other layers. On disk it is that adapter, which PEFT loads into the proposal, with the tap in `trimtab.json`.

`HeadPool` is one proposal's layers from one tap on, which all heads with that tap share: the slots of a batch may use another
head each (`trimtab.models.adapters`). It is a `LanguageModel` but for what it reads: hidden states `[B, K, H]` in the place of
tokens `[B, K]` (`HuggingFaceLM.extend_tapped` has them). `trimtab.decode.reading` brings the two together.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import InvalidOption, InvalidRequest, ManifestError, UnsupportedModel
from trimtab.models.adapters import AdapterStore
from trimtab.models.base import LanguageModel, State, last_of
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.lean import LeanDecoder
from trimtab.models.slots import SlotState

__all__ = ["Head", "HeadPool", "check_heads", "tap_of"]


def check_heads(proposal: LanguageModel, aligners: Sequence[LanguageModel], drafting: Sequence[LanguageModel]) -> None:
    """Refuse heads that do not read this very proposal, and one that is to draft.

    Raises:
        UnsupportedModel: a head reads another model's hidden states.
        InvalidOption: the drafter is a head.
    """
    for i, model in enumerate(aligners):
        pool = getattr(model, "pool", model)
        if isinstance(pool, HeadPool) and pool.proposal is not proposal:
            raise UnsupportedModel(
                f"aligners[{i}] is a head that reads another proposal's hidden states: load its folder together with this one"
            )
    if any(tap_of(model) is not None for model in drafting):
        raise InvalidOption("draft: a head reads what the proposal has read, and cannot draft: name another model")


def tap_of(model: LanguageModel) -> int | None:
    """The layer of the proposal whose input a head reads; None for a model that reads tokens."""
    return getattr(getattr(model, "pool", model), "tap", None)


@dataclass(frozen=True)
class Head:
    """What a manifest says of a head.

    Attributes:
        tap: the first layer of the proposal that it runs again, counted from 0.
        layers: how many the proposal has.
        proposal: `HuggingFaceLM.digest` of the only proposal that it fits.
    """

    tap: int
    layers: int
    proposal: str

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read the `head` of a manifest.

        Raises:
            ManifestError: it is not whole, or cannot be.
        """
        if not isinstance(values, Mapping) or set(values) != {"tap", "layers", "proposal"}:
            raise ManifestError(f"head must be {{'tap': …, 'layers': …, 'proposal': …}}, not {values!r}")
        head = cls(**values)
        if type(head.tap) is not int or type(head.layers) is not int or not 0 <= head.tap < head.layers:
            raise ManifestError(f"head: tap must be a layer from 0 to layers − 1, not {head.tap!r} of {head.layers!r}")
        if not isinstance(head.proposal, str) or not head.proposal.startswith("sha256:"):
            raise ManifestError(f"head: proposal must be a digest 'sha256:…', not {head.proposal!r}")
        return head

    def check(self, proposal: LanguageModel, name: str) -> HuggingFaceLM:
        """The proposal, if the head belongs to it.

        Raises:
            UnsupportedModel: it belongs to another one, or this one's hidden states are not to be had.
        """
        if not isinstance(proposal, HuggingFaceLM):
            raise UnsupportedModel(
                f"'{name}' is a head: it reads the hidden states of its proposal, and a {type(proposal).__name__} gives none"
            )
        lean = proposal.lean
        if lean.depth != self.layers or proposal.digest != self.proposal:
            hint = "; weights that are stored in float32 are not recognised in float16: choose another --dtype"
            raise UnsupportedModel(
                f"'{name}' is a head of another proposal: a head reads hidden states, and fits only the model that it was"
                f" trained on, which its trimtab.json names{hint if proposal.model.dtype == torch.float16 else ''}"
            )
        return proposal


class HeadPool:
    """A proposal's layers from one on, which all heads with that tap share; a slot without a head is the proposal itself.

    Args:
        proposal: whose layers they are.
        tap: the first of them.

    Attributes:
        proposal, tap: as above.
        store: reads the adapters of heads.

    Raises:
        UnsupportedModel: the proposal has no lean pass.
    """

    def __init__(self, proposal: HuggingFaceLM, tap: int) -> None:
        self.proposal, self.tap = proposal, tap
        _ = proposal.lean  # raises where there is none
        self.vocab_size, self.max_length = proposal.vocab_size, proposal.max_length
        self.device, self.dtype = proposal.device, proposal.model.dtype
        self.store = AdapterStore(proposal.model, self.dtype, self.device, tap)

    @property
    def _lean(self) -> LeanDecoder:
        """What the proposal's own passes take: of a lent one, as its owner has left it."""
        return self.proposal.lean

    @property
    def immutable(self) -> bool:
        """Whether the proposal is."""
        return self.proposal.immutable

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of the proposal and the tap."""
        return f"sha256:{hashlib.sha256(f'{self.proposal.fingerprint} {self.tap}'.encode()).hexdigest()}"

    @property
    def kernels(self) -> str:
        """What computes a pass."""
        return f"layers {self.tap} to {self._lean.depth - 1} of the proposal's {self.proposal.kernels}"

    def new_state(self, slots: int, capacity: int) -> SlotState:
        """Empty slots without heads.

        Raises:
            UnsupportedModel: the proposal was lent, and its owner has changed its dtype or added something to it.
        """
        if self.proposal.model.dtype != self.dtype:
            raise UnsupportedModel("the proposal of these heads is not what it was: its dtype has changed")
        return SlotState([0] * slots, capacity, self._lean.depth - self.tap)

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Keys and values of these layers, and where slots differ in their heads, their weights side by side."""
        share = (self._lean.depth - self.tap) / self._lean.depth
        return int(self.proposal.state_bytes(slots, capacity) * share) + self.store.mixing_bytes(slots, adapters)

    @torch.no_grad()
    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append hidden states `[B, K, H]` to every slot; log-probabilities `[B, K, V]` in float32 or better."""
        return row_from_logits(self._lean.logits(self._run(state, tokens, counts)), self.vocab_size)

    @torch.no_grad()
    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append hidden states to every slot; log-probabilities `[B, 1, V]` after its last one."""
        return row_from_logits(self._lean.logits(last_of(self._run(state, tokens, counts), counts)), self.vocab_size)

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last tokens of each slot by lowering its length."""
        self.proposal.rollback(state, counts)

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots, heads included."""
        self.proposal.copy(source, slots, target, to)

    def select(self, state: State, rows: Sequence[int]) -> SlotState:
        """Copies of the given slots, heads included."""
        return self.proposal.select(state, rows)

    @torch.no_grad()
    def _run(self, state: State, hidden: Tensor, counts: Sequence[int]) -> Tensor:
        assert isinstance(state, SlotState)
        if hidden.ndim != 3:
            raise InvalidRequest("a head reads its proposal's hidden states [B, K, H]: it cannot be used without its proposal")
        state.check_room(hidden[..., 0], counts)
        last_position = (self.max_length or state.capacity) - 1
        with state.stepping(counts, hidden.shape[1], last_position, self.device) as step:
            return self._lean.upper(hidden, step, state.layers, self.store.deltas(state, len(counts)), first=self.tap)
