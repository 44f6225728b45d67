"""The transformers backend: a stock causal language model as a `LanguageModel` over ragged slots.

The model is used as it is: we pass a cache, positions and ready 4-D masks, which transformers hands on untouched. That is
right only for attention with positions that do not depend on the batch. `SUPPORTED` architectures are known to be of that kind,
by the contract suite; a model of another one is tried when it is loaded (`trimtab.models.trial`), and refused if it fails.
"""

import hashlib
import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models.base import LanguageModel, State, last_of
from trimtab.models.blocks import LEAN
from trimtab.models.fingerprint import Files, digest_model, fingerprint_model
from trimtab.models.graphs import Capture, Graphs
from trimtab.models.int8 import IN, OUT, can_be_int8
from trimtab.models.lean import Deltas, LeanDecoder, no_lean_pass
from trimtab.models.masks import POINTWISE_LAYERS, RECURRENT_LAYERS, TOKENWISE, is_recurrent, sights_of
from trimtab.models.peft_kinds import check_adapters
from trimtab.models.prepack import prepack
from trimtab.models.recurrent import Reader
from trimtab.models.recurrent_slots import RecurrentState, layout_of
from trimtab.models.slots import SlotState, Step
from trimtab.models.stock import is_stock
from trimtab.models.supported import SUPPORTED, check_supported
from trimtab.models.trial import narrowed, try_out

__all__ = ["HuggingFaceLM", "describe_kernels"]

QUANTIZE = ("int8",)
"""How weights may be kept."""


def describe_kernels(model: LanguageModel) -> str | None:
    """What computes a model's passes, or those of the base that an adapter shares; None for models of other kinds."""
    kernels: str | None = getattr(getattr(model, "pool", model), "kernels", None)
    return kernels


class HuggingFaceLM:
    """A transformers causal language model, or a PEFT model around one, over ragged slots.

    Args:
        model: the loaded model; it is put into evaluation mode, and its weights stay what they are. Its dtype and device are
            used.
        vocab_size: V; logits beyond it are padding and dropped. Default: all of the model's columns.
        owned: nobody else uses `model`, so its weights may move to where they are read fastest; it is of no use by itself
            after that.
        lean: take the lean forward pass where there is one, which is for unchanged models of transformers' classes only; False
            for the stock module's.
        files: what it was loaded from, to tell it from others; None to go by the weights in memory.
        capture: a `trimtab.models.graphs.CudaCapture`, to replay short passes as CUDA graphs, of an owned model with a lean
            pass; others run every pass, as all do with None.
        quantize: `"int8"` to keep the weights of an owned model in 8 bits (`trimtab.models.int8`); None for as they are.

    Raises:
        UnsupportedModel: an architecture that ragged slots would decode wrongly, or that fails its trial; adapters of which a
            part would be left out.
        InvalidOption: `quantize` is unknown, or this model cannot have it.
    """

    def __init__(
        self,
        model: Any,
        vocab_size: int | None = None,
        *,
        owned: bool = False,
        lean: bool = True,
        files: Files | None = None,
        capture: Capture | None = None,
        quantize: str | None = None,
    ) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        check_supported(inner.config)
        check_adapters(getattr(model, "peft_config", {}), f"this '{inner.config.model_type}' model")
        self._plain = {"output_router_logits": False} if hasattr(inner.config, "output_router_logits") else {}
        """Passed beside the inputs, for what is done with them does not take masks like ours."""
        attends = "cache_params" not in inspect.signature(inner.forward).parameters
        self._cache = "past_key_values" if attends else "cache_params"
        """What a model calls its cache; the latter's layers know no attention, and take no mapping of masks."""
        self._attention, self._sights = inner.config._attn_implementation, sights_of(inner.config)
        if self._attention not in ("sdpa", "eager"):
            raise UnsupportedModel(f"attention '{self._attention}' takes no ready mask; load the model with 'sdpa'")
        self._layout = layout_of(inner.config) if is_recurrent(inner.config) else None
        self.tokenwise = inner.config.model_type in TOKENWISE
        """Whether states that have read some tokens are to read others one by one, see `trimtab.models.recurrent`."""
        self._patterns: dict[torch.dtype, RecurrentState] = {}
        self._token_bytes: dict[torch.dtype, int] = {}
        self.model = inner.eval()
        columns = inner.get_output_embeddings().weight.shape[0]
        self.vocab_size = vocab_size or columns
        if columns < self.vocab_size:
            raise UnsupportedModel(
                f"the model has {columns} output columns, but its tokenizer {self.vocab_size} tokens: resize its embeddings"
            )
        self.max_length: int | None = getattr(inner.config, "max_position_embeddings", None)
        self.device: torch.device = inner.get_input_embeddings().weight.device
        """Where token ids go in; on a model spread over devices, its first."""
        self.files = files
        packs = owned and self.device.type == "cpu"  # which changes the module
        self._fingerprint = fingerprint_model(inner) if packs and files is None else None
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        """What the weights take, however they are packed."""
        self._lean = LeanDecoder(inner) if lean and inner is model and is_stock(inner) else None
        self._digest = digest_model(inner) if self._lean is not None and owned else None  # as above
        self._owned = owned
        self._graphs: Graphs | None = None
        self.quantized = quantize
        """How its weights are kept, if not as they came."""
        if quantize is not None:
            self._quantize(inner, adapted=inner is not model)
        if self._lean is not None and owned:
            whole = [linear for linear in self._lean.linears if linear.weight is not None]
            prepack(whole, shared=inner.get_input_embeddings().weight)
            self._graphs = Graphs(self._lean, capture) if capture else None
        if inner.config.model_type not in SUPPORTED:
            with narrowed(inner.config):
                self._sights = sights_of(inner.config)
                try_out(self)
            self._sights = sights_of(inner.config)

    def _quantize(self, inner: Any, *, adapted: bool) -> None:
        """Keep what fits in 8 bits so."""
        if self.quantized not in QUANTIZE:
            raise InvalidOption(f"quantize must be {' or '.join(QUANTIZE)}, not {self.quantized!r}")
        if self._lean is None or not self._owned:
            kind = inner.config.model_type
            why = f"this '{kind}' model is run by its stock modules" if self._owned else "this one was lent"
            if adapted:
                why = f"this is a '{kind}' model with an adapter that cannot share its base"
            raise InvalidOption(f"quantize: only plain {', '.join(LEAN)} models that are loaded here can be, and {why}")
        fitting = [linear for linear in self._lean.linears if linear.weight is not None and can_be_int8(linear.weight)]
        if not fitting:
            why = f"they must be float32 or bfloat16 on an x86 CPU, and multiples of {OUT} by {IN}"
            raise InvalidOption(f"quantize: none of the weights can be kept in 8 bits: {why}")
        embedding = inner.get_input_embeddings().weight
        for linear in fitting:
            assert linear.weight is not None
            keep, before = linear.weight.data_ptr() == embedding.data_ptr(), linear.weight.nbytes
            self.num_bytes += linear.quantize(keep=keep) - (0 if keep else before)

    @property
    def kernels(self) -> str:
        """What computes a pass, and so decides the last bits of its rows: for results and logs."""
        if self._lean is None:
            return "stock modules"
        linears = self._lean.linears
        in_8_bits = sum(linear.is_int8 for linear in linears)
        packed = sum(linear.weight is None for linear in linears) - in_8_bits
        integers = f", {in_8_bits} in int8" if in_8_bits else ""
        graphs = ", CUDA graphs" if self._graphs is not None else ""
        return f"lean pass, {packed} of {len(linears)} weights packed{integers}{graphs}"

    @property
    def is_recurrent(self) -> bool:
        """Whether some of its layers keep states, so that slots that take several tokens read one after the other."""
        return self._layout is not None

    @property
    def has_graphs(self) -> bool:
        """Whether short passes are replayed as CUDA graphs."""
        return self._graphs is not None

    @property
    def immutable(self) -> bool:
        """Whether its weights stay what they are: a lent model's owner may train it."""
        return self._owned

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of all that decides its numbers: of the files it was loaded from, or of a lent model as it is now.

        Raises:
            ModelError: the files have changed since.
        """
        found = self.files.fingerprint if self.files is not None else self._fingerprint or fingerprint_model(self.model)
        if self.quantized is None:
            return found
        return f"sha256:{hashlib.sha256(f'{found} {self.quantized}'.encode()).hexdigest()}"

    @property
    def digest(self) -> str:
        """`sha256:…` of what tells it from others in every dtype, see `digest_model`; of a lent model as it is now."""
        return self._digest or digest_model(self.model)

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token of a slot takes in the key/value cache, and where states are kept, as an id."""
        if (dtype := self.model.dtype) not in self._token_bytes:  # a lent model's owner may change it
            self._token_bytes = {dtype: self._look_up_token_bytes()}
        return self._token_bytes[dtype]

    @torch.no_grad()
    def _look_up_token_bytes(self) -> int:
        """Looked up in a cache, for families keep different things there."""
        state: SlotState | None = self._pattern
        if state is None:
            state = SlotState([0], 1, self.model.config.num_hidden_layers)
            self._forward(state, torch.zeros(1, 1, dtype=torch.long), [1], last_only=True)
        written = [layer for layer in state.layers if layer.is_initialized]  # some families' layers share those of others
        keys_and_values = sum(part.nbytes for layer in written for part in (layer.keys, layer.values)) // (state.capacity + 1)
        return keys_and_values + (torch.long.itemsize if self.is_recurrent else 0)

    @property
    @torch.no_grad()
    def _pattern(self) -> RecurrentState | None:
        """What states of slots look like in memory, after a pass; None where no layer keeps any."""
        if self._layout is None:
            return None
        if (dtype := self.model.dtype) not in self._patterns:  # a lent model's owner may change it
            pattern = RecurrentState([0], 1, self._layout)
            self._one_pass(pattern, torch.zeros(1, 1, dtype=torch.long, device=self.device), [1], 1)
            self._patterns = {dtype: pattern}
        return self._patterns[dtype]

    def new_state(self, slots: int, capacity: int) -> SlotState:
        """Empty slots; the buffers are allocated by the first step."""
        check_adapters(getattr(self.model, "peft_config", {}), f"this '{self.model.config.model_type}' model")
        if self._lean is not None and not self._owned:  # its owner may have changed anything since
            self._lean = LeanDecoder(self.model) if is_stock(self.model) else None
        if self._layout is not None:
            return RecurrentState([0] * slots, capacity, self._layout, self._pattern)
        return SlotState([0] * slots, capacity, self.model.config.num_hidden_layers)

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Keys and values, with the column for what no slot uses, and what recurrent layers keep."""
        pattern = self._pattern
        return slots * ((capacity + 1) * self.cache_bytes_per_token + (pattern.fixed_bytes if pattern is not None else 0))

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, K, V]`, float32 (float64 for a float64 model)."""
        return self._rows(self._forward(state, tokens, counts, last_only=False))

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, 1, V]` after its last token, without computing K rows of logits."""
        return self._rows(self._forward(state, tokens, counts, last_only=True))

    @property
    def lean(self) -> LeanDecoder:
        """What runs its layers one by one, for heads.

        Raises:
            UnsupportedModel: this model has no lean pass.
        """
        if self._lean is None:
            raise no_lean_pass(self.model.config.model_type)
        return self._lean

    def extend_tapped(
        self, state: State, tokens: Tensor, counts: Sequence[int], layers: Collection[int], *, last_only: bool = False
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """`extend`, or with `last_only` `prefill`, which also gives the inputs `[B, K, H]` of these layers, for heads on them.

        Raises:
            UnsupportedModel: the model has no lean pass.
        """
        _ = self.lean
        tapped = dict.fromkeys(layers, tokens)  # placeholders
        return self._rows(self._forward(state, tokens, counts, last_only=last_only, tapped=tapped)), tapped

    @torch.no_grad()
    def extend_below(self, state: State, tokens: Tensor, counts: Sequence[int], layers: Collection[int]) -> dict[int, Tensor]:
        """Append to every slot by as many layers as it takes to have the inputs `[B, K, H]` of these ones, for heads on them.

        No later row of these slots means anything, for the layers above have not seen the tokens.

        Raises:
            UnsupportedModel: the model has no lean pass.
        """
        assert isinstance(state, SlotState)
        state.check_room(tokens, counts)
        tapped = dict.fromkeys(layers, tokens)  # placeholders
        with state.stepping(counts, tokens.shape[1], self._last_position(state), self.device) as step:
            self.lean.lower(tokens.to(self.device), step, state.layers, tapped)
        return tapped

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last tokens of each slot by lowering its length."""
        state.check_rollback(counts)
        state.advance(counts, -1)

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots."""
        assert isinstance(source, SlotState)
        assert isinstance(target, SlotState)
        source.copy(slots, target, to)

    def select(self, state: State, rows: Sequence[int]) -> SlotState:
        """Copies of the given slots."""
        assert isinstance(state, SlotState)
        return state.select(rows)

    @torch.no_grad()
    def _forward(
        self,
        state: State,
        tokens: Tensor,
        counts: Sequence[int],
        *,
        last_only: bool,
        tapped: dict[int, Tensor] | None = None,
    ) -> Tensor:
        assert isinstance(state, SlotState)
        state.check_room(tokens, counts)
        if isinstance(state, RecurrentState):
            if not any(counts):
                return torch.zeros(len(counts), 1 if last_only else tokens.shape[1], self.vocab_size, device=self.device)
            reader = Reader(self._one_pass, tokenwise=self.tokenwise)  # not kept: it refers to this model
            return reader.read(state, tokens.to(self.device), counts, last_only=last_only)
        last_position = self._last_position(state)
        tokens, deltas = tokens.to(self.device), self._deltas(state, len(counts))
        if self._graphs is not None and deltas is None and not last_only and not tapped:
            logits = self._graphs.extend(state, tokens, counts, last_position)
            if logits is not None:
                state.advance(counts)
                return logits
        with state.stepping(counts, tokens.shape[1], last_position, self.device) as step:
            last = counts if last_only else None
            if self._lean is None:
                return self._stock(tokens, step, state, last)
            return self._lean(tokens, step, state.layers, last=last, deltas=deltas, tapped=tapped)

    def _one_pass(self, state: RecurrentState, tokens: Tensor, counts: Sequence[int], wanted: int) -> Tensor:
        """Logits `[B, wanted, W]` of the last tokens of slots whose states have read all before."""
        with state.stepping(counts, tokens.shape[1], self._last_position(state), self.device) as step:
            return self._stock(tokens, step, state, counts if wanted == 1 else None)[:, -wanted:]

    def _rows(self, logits: Tensor) -> Tensor:
        return row_from_logits(logits, self.vocab_size)

    def _last_position(self, state: State) -> int:
        return (self.max_length or state.capacity) - 1

    def _deltas(self, state: SlotState, slots: int) -> Deltas | None:
        """What the first slots add to the weights: nothing here, something in an `AdapterPool`."""
        return None

    def _stock(self, tokens: Tensor, step: Step, state: SlotState, last: Sequence[int] | None) -> Tensor:
        """Logits `[B, K, W]`, or `[B, 1, W]` of each slot's last token of so many."""
        kept = sorted({max(count, 1) - 1 for count in last}) if last is not None else []
        logits: Tensor = self.model(
            input_ids=tokens,
            attention_mask=self._masks(step),
            position_ids=step.position_ids,
            use_cache=True,
            logits_to_keep=1 if kept == [tokens.shape[1] - 1] else kept or 0,  # a list, for the last layer may be elsewhere
            **{self._cache: state.cache},
            **self._plain,
        ).logits
        return logits if last is None else last_of(logits, [kept.index(max(count, 1) - 1) + 1 for count in last])

    def _masks(self, step: Step) -> Any:
        """A mask, or one for each kind of layer: SDPA takes booleans, the eager attention adds its mask to the scores."""
        boolean, dtype = self._attention == "sdpa", self.model.dtype
        masks = {
            name: step.mask(sight) if boolean else step.additive_mask(dtype, sight) for name, sight in self._sights.items()
        }
        if self._layout is not None:  # a mask would say what is padding, and nothing is
            return (
                dict.fromkeys(("full_attention", *POINTWISE_LAYERS, *RECURRENT_LAYERS)) | masks
                if self._cache == "past_key_values"
                else None
            )
        return masks if len(masks) > 1 else next(iter(masks.values()))
