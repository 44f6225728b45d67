"""The transformers backend: a stock causal language model as a `LanguageModel` over ragged slots.

The model is used as it is: we pass a cache, positions and a ready 4-D mask, which transformers hands on untouched. That is
right only for plain full attention with positions that do not depend on the batch, so an architecture is accepted when it is
known to be of that kind and passes the contract suite, and refused otherwise.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import UnsupportedModel
from trimtab.models.base import LanguageModel, State, last_of
from trimtab.models.fingerprint import Files, digest_model, fingerprint_model
from trimtab.models.graphs import Capture, Graphs
from trimtab.models.lean import LEAN, Deltas, LeanDecoder, no_lean_pass
from trimtab.models.peft_kinds import check_adapters
from trimtab.models.prepack import prepack
from trimtab.models.slots import SlotState, Step
from trimtab.models.stock import is_stock

__all__ = ["SUPPORTED", "HuggingFaceLM", "check_supported", "describe_kernels"]

SUPPORTED = ("gemma", "gpt2", "gpt_neox", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3")
"""`model_type` of the architectures that pass the contract suite; tests/models/test_contract.py runs each of them."""


def check_supported(config: Any) -> None:
    """Refuse a configuration that ragged slots would decode wrongly.

    Raises:
        UnsupportedModel: the architecture is not on the list, or a setting takes it off plain full attention.
    """
    name = config.model_type
    if name not in SUPPORTED:
        raise UnsupportedModel(
            f"model type '{name}' has not passed Trimtab's contract suite; supported are {', '.join(SUPPORTED)}. "
            "See docs/models.md for how to add one"
        )
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModel("per_layer_config: layers that are not all alike are not supported")
    _check_attention(config)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise UnsupportedModel(f"rope type '{rope}' makes positions depend on the rest of the batch; it is not supported")
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"this '{name}' model has cross-attention; only decoders are supported")


def _check_attention(config: Any) -> None:
    """Refuse layers that do not see the whole text, by the fields that transformers' own code reads.

    `layer_types` decides, or `sliding_window` where there is none: in the modules of Qwen2 and Qwen3, and for every family in
    transformers' cache, which looks at `attention_chunk_size` last. Mistral's modules read `sliding_window` alone.
    `use_sliding_window` is a field of Qwen2 and Qwen3, whose configurations drop the window where it is false; other families
    do not know it.
    """
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    layers = set(getattr(config, "layer_types", None) or ())
    if window is not None and (not layers or config.model_type == "mistral"):
        layers.add("sliding_attention")
    if odd := layers - {"full_attention", "sliding_attention"}:
        raise UnsupportedModel(f"layer_types: {min(odd)} is not supported, only full attention")
    limit = config.max_position_embeddings
    if "sliding_attention" in layers and (window is None or window < limit):
        raise UnsupportedModel(
            f"this '{config.model_type}' model uses a sliding attention window (sliding_window {window}, context {limit}); "
            "only full attention is supported, or a window as long as the context"
        )
    if chunk is not None and not layers and chunk < limit:
        raise UnsupportedModel(
            f"this '{config.model_type}' model attends in chunks (attention_chunk_size {chunk}, context {limit}); only full"
            " attention is supported, or a chunk as long as the context"
        )


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
        capture: a `trimtab.models.graphs.CudaCapture`, to replay short passes of an owned model as CUDA graphs; None runs every
            pass.

    Raises:
        UnsupportedModel: an architecture that ragged slots would decode wrongly; adapters of which a part would be left out; or
            a model without a lean pass, with `capture`.
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
    ) -> None:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        check_supported(inner.config)
        check_adapters(getattr(model, "peft_config", {}), f"this '{inner.config.model_type}' model")
        self._attention = inner.config._attn_implementation
        if self._attention not in ("sdpa", "eager"):
            raise UnsupportedModel(f"attention '{self._attention}' takes no ready mask; load the model with 'sdpa'")
        self.model = inner.eval()
        columns = inner.get_output_embeddings().weight.shape[0]
        self.vocab_size = vocab_size or columns
        if columns < self.vocab_size:
            raise UnsupportedModel(
                f"the model has {columns} output columns, but its tokenizer {self.vocab_size} tokens: resize its embeddings"
            )
        self.max_length: int | None = inner.config.max_position_embeddings
        self.device: torch.device = inner.get_input_embeddings().weight.device
        """Where token ids go in; on a model spread over devices, its first."""
        self.files = files
        self._fingerprint = fingerprint_model(inner) if owned and files is None else None  # packing changes the module
        self.num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        """What the weights take, however they are packed."""
        self._lean = LeanDecoder(inner) if lean and inner is model and is_stock(inner) else None
        self._digest = digest_model(inner) if self._lean is not None and owned else None  # as above
        self._owned = owned
        self._graphs: Graphs | None = None
        if self._lean is not None and owned:
            prepack(self._lean.linears, shared=inner.get_input_embeddings().weight)
            self._graphs = Graphs(self._lean, capture) if capture else None
        elif capture is not None:
            kind = inner.config.model_type
            plain = f"plain {', '.join(LEAN)} models"
            raise UnsupportedModel(
                f"cuda_graphs: only {plain} can be captured, without adapters of their own; this is a '{kind}'"
            )

    @property
    def kernels(self) -> str:
        """What computes a pass, and so decides the last bits of its rows: for results and logs."""
        if self._lean is None:
            return "stock modules"
        linears = self._lean.linears
        packed = sum(linear.weight is None for linear in linears)
        graphs = ", CUDA graphs" if self._graphs is not None else ""
        return f"lean pass, {packed} of {len(linears)} weights packed{graphs}"

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of all that decides its numbers: of the files it was loaded from, or of a lent model as it is now.

        Raises:
            ModelError: the files have changed since.
        """
        if self.files is not None:
            return self.files.fingerprint
        return self._fingerprint or fingerprint_model(self.model)

    @property
    def digest(self) -> str:
        """`sha256:…` of what tells it from others in every dtype, see `digest_model`; of a lent model as it is now."""
        return self._digest or digest_model(self.model)

    @property
    def cache_bytes_per_token(self) -> int:
        """What a token of a slot takes in the key/value cache."""
        config = self.model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * head_dim * self.model.dtype.itemsize)

    def new_state(self, slots: int, capacity: int) -> SlotState:
        """Empty slots; the buffers are allocated by the first step."""
        check_adapters(getattr(self.model, "peft_config", {}), f"this '{self.model.config.model_type}' model")
        if self._lean is not None and not self._owned and not self._lean.is_current(self.model):
            self._lean = LeanDecoder(self.model) if is_stock(self.model) else None
        return SlotState([0] * slots, capacity, self.model.config.num_hidden_layers)

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Keys and values, with the column for what no slot uses."""
        return slots * (capacity + 1) * self.cache_bytes_per_token

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, K, V]`, float32 (float64 for a float64 model)."""
        return self._rows(self._forward(state, tokens, counts, last_only=False))

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, 1, V]` after its last token, without computing K rows of logits."""
        return self._rows(self._forward(state, tokens, counts, last_only=True))

    @property
    def lean(self) -> LeanDecoder:
        """What runs its layers one by one.

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
            attention_mask=self._mask(step),
            position_ids=step.position_ids,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1 if kept == [tokens.shape[1] - 1] else kept or 0,  # a list, for the last layer may be elsewhere
        ).logits
        return logits if last is None else last_of(logits, [kept.index(max(count, 1) - 1) + 1 for count in last])

    def _mask(self, step: Step) -> Tensor:
        """What this attention wants: SDPA takes booleans, the eager one adds its mask to the scores."""
        return step.mask() if self._attention == "sdpa" else step.additive_mask(self.model.dtype)
