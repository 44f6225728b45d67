"""llama.cpp as a `LanguageModel`: a GGUF file as it is, in whatever quantisation, by llama-cpp-python's low-level calls.

A state is a context of llama.cpp's, and its slots are the context's sequences; forgetting is `llama_memory_seq_rm`. To make a
context is costly, so those of states that are gone are used again. A step is one call of `llama_decode`, or as many as its
tokens and rows need.

A sequence alone has the same rows, bit for bit, however many tokens are read at once, if its weights are quantised; with 16-bit
or 32-bit weights the last bits vary. Where several sequences share a context the last bits go by where their tokens lie in it.
So a seed's tokens are promised to be the same at every draft length for quantised files and one sequence at a time. The law is
the same always.
"""

import ctypes
import hashlib
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import InvalidOption, ModelError, UnsupportedModel
from trimtab.files import expand_home
from trimtab.models.base import State
from trimtab.models.digests import Seen, digest_file
from trimtab.models.llamacpp_context import MOST_ROWS, MOST_SLOTS, MOST_TOKENS, Context, Idle, Token, Weights, library

__all__ = ["LlamaCppLM"]

CELLS = 256
"""Tokens that a context has room for are a multiple of it, so that few sizes are made."""


class LlamaState(State):
    """Slots of a GGUF model: in a context from the first step on, and until then as what was copied into them."""

    def __init__(self, model: "LlamaCppLM", slots: int, capacity: int) -> None:
        super().__init__([0] * slots, capacity)
        self._model = weakref.ref(model)  # what is kept of a text must not keep its model
        self._saved: dict[int, bytes] = {}
        self._context: Context | None = None

    @property
    def context(self) -> Context:
        """The context that holds the slots; it is given back when this state goes."""
        if self._context is None:
            model = self._model()
            assert model is not None
            self._context = context = model.take(len(self), self.capacity)
            weakref.finalize(self, model.idle.add, context)
            for slot, data in self._saved.items():
                context.load(data, slot)
                context.forget(slot, self.lengths[slot])
            self._saved = {}
        return self._context

    def wipe(self, slot: int) -> None:
        """Forget all that a slot has held. What was a NaN stays, masked: others pass over it, but later states must not."""
        self._saved.pop(slot, None)
        if self._context is not None:
            self._context.spoilt = True
            self._context.forget(slot, 0)

    def forget(self, slot: int) -> None:
        """Drop what is behind a slot's length."""
        if self._context is not None:
            self._context.forget(slot, self.lengths[slot])

    def take_over(self, source: "LlamaState", slot: int, to: int) -> None:
        """Make a slot what another one is, of this state or another."""
        if self._context is not None and source is self:
            self._context.copy(slot, to)
        else:
            data = source._saved.get(slot) if source._context is None else source._context.save(slot)
            if data is None or not source.lengths[slot]:
                self._saved.pop(to, None)
            elif self._context is None:
                self._saved[to] = data
            else:
                self._context.load(data, to)
        self.lengths[to], self.adapters[to] = source.lengths[slot], source.adapters[slot]
        self.forget(to)


class LlamaCppLM:
    """A GGUF model that llama.cpp runs, on a CPU or wherever the installed llama-cpp-python was built for.

    Args:
        source: the file.
        vocab_size: V; logits beyond it are padding and dropped. Default: all that the file has.

    Raises:
        ModelError: it is not there, or llama.cpp cannot read it.
        UnsupportedModel: its cache cannot forget tokens, as that of recurrent and hybrid models; it is one of several files; or
            it has fewer columns than its tokenizer has tokens.
        InvalidOption: llama-cpp-python is not installed.
    """

    immutable = True
    max_slots = MOST_SLOTS
    """Sequences that may be decoded together."""
    device = torch.device("cpu")
    """Where rows come out, whatever computes them."""

    def __init__(self, source: str | Path, vocab_size: int | None = None) -> None:
        self.path = expand_home(source)
        if not self.path.is_file():
            raise ModelError(f"'{source}' does not exist")
        self._seen = Seen.at(self.path)
        lib, self._weights = library(), Weights(self.path)
        model = self._weights.pointer
        kinds = {"recurrent": lib.llama_model_is_recurrent, "hybrid": lib.llama_model_is_hybrid}
        kinds |= {"diffusion": lib.llama_model_is_diffusion, "encoder-decoder": lib.llama_model_has_encoder}
        if odd := [kind for kind, is_one in kinds.items() if is_one(model)]:
            raise UnsupportedModel(
                f"'{source}' holds a model of the {odd[0]} kind: only decoders whose cache can forget single tokens run"
            )
        parts = ctypes.create_string_buffer(16)
        if lib.llama_model_meta_val_str(model, b"split.count", parts, len(parts)) > 0 and int(parts.value) > 1:
            raise UnsupportedModel(
                f"'{source}' is one of {int(parts.value)} files: make one of them, by llama-gguf-split --merge"
            )
        self._vocab = lib.llama_model_get_vocab(model)
        self._columns: int = lib.llama_vocab_n_tokens(self._vocab)
        self.vocab_size = vocab_size or self._columns
        if self._columns < self.vocab_size:
            raise UnsupportedModel(f"'{source}' has {self._columns} output columns, but its tokenizer {self.vocab_size} tokens")
        self.max_length: int | None = lib.llama_model_n_ctx_train(model)
        self.num_bytes: int = lib.llama_model_size(model)
        """What the weights take."""
        self.idle = Idle()
        """Contexts for later states."""

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends an answer, by the file."""
        lib = library()
        return tuple(token for token in range(self._columns) if lib.llama_vocab_is_eog(self._vocab, token))

    @cached_property
    def kernels(self) -> str:
        """What computes a pass, for results and logs."""
        from importlib.metadata import version

        text = ctypes.create_string_buffer(256)
        library().llama_model_desc(self._weights.pointer, text, len(text))
        return f"llama.cpp (llama-cpp-python {version('llama-cpp-python')}), {text.value.decode(errors='replace')}"

    @property
    def fingerprint(self) -> str:
        """`sha256:…` of the file and of what runs it.

        Raises:
            ModelError: the file has changed since it was loaded.
        """
        return f"sha256:{hashlib.sha256(f'{digest_file(self._seen)} llama.cpp'.encode()).hexdigest()}"

    def new_state(self, slots: int, capacity: int) -> LlamaState:
        """Empty slots.

        Raises:
            InvalidOption: llama.cpp has no contexts for so many.
        """
        if slots > MOST_SLOTS:
            raise InvalidOption(f"max_num_seqs must be at most {MOST_SLOTS} for what llama.cpp runs")
        return LlamaState(self, slots, capacity)

    @cached_property
    def cache_bytes_per_token(self) -> int:
        """What a token takes in the cache, measured in a sequence of one and of two."""
        state, sizes = self.new_state(1, 2), []
        for _ in range(2):
            self.prefill(state, torch.zeros(1, 1, dtype=torch.long), [1])
            sizes.append(library().llama_state_seq_get_size(state.context.pointer, 0))
        return int(sizes[1] - sizes[0])

    def state_bytes(self, slots: int, capacity: int, adapters: Collection[Any] = ()) -> int:
        """Keys and values."""
        return slots * capacity * self.cache_bytes_per_token

    def extend(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, K, V]`, float32."""
        return self._step(state, tokens, counts, last_only=False)

    def prefill(self, state: State, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        """Append to every slot; log-probabilities `[B, 1, V]` after its last token, without computing K rows of logits."""
        return self._step(state, tokens, counts, last_only=True)

    def rollback(self, state: State, counts: Sequence[int]) -> None:
        """Forget the last tokens of each slot."""
        assert isinstance(state, LlamaState)
        state.check_rollback(counts)
        state.advance(counts, -1)
        for slot, count in enumerate(counts):
            if count:
                state.forget(slot)

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots."""
        assert isinstance(source, LlamaState)
        assert isinstance(target, LlamaState)
        for slot, other in zip(slots, to, strict=True):
            target.take_over(source, slot, other)

    def select(self, state: State, rows: Sequence[int]) -> LlamaState:
        """Copies of the given slots."""
        selected = self.new_state(len(rows), state.capacity)
        self.copy(state, rows, selected, range(len(rows)))
        return selected

    def take(self, slots: int, capacity: int) -> Context:
        """An empty context for so many slots."""
        cells = max(1, -(-slots * capacity // CELLS)) * CELLS
        return self.idle.find(slots, cells) or Context(self._weights, max(slots, 1), cells)

    def _step(self, state: State, tokens: Tensor, counts: Sequence[int], *, last_only: bool) -> Tensor:
        assert isinstance(state, LlamaState)
        state.check_room(tokens, counts)
        steps = [
            (new[j], state.lengths[slot] + j, slot, not last_only or j == count - 1)
            for slot, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True))
            for j in range(count)
        ]
        try:
            found = [
                row_from_logits(torch.from_numpy(state.context.decode(part, self._columns)), self.vocab_size)
                for part in _parts(steps)
            ]
        except ModelError:  # the calls before it are undone
            for slot in range(len(counts)):
                state.forget(slot)
            raise
        state.advance(counts)
        width = 1 if last_only else tokens.shape[1]
        places = [slot * width + j for slot, count in enumerate(counts) for j in range(min(count, width))]
        if len(places) == len(counts) * width:
            return torch.cat(found).view(len(counts), width, -1)
        rows = torch.zeros(len(counts) * width, self.vocab_size)
        if places:
            rows[places] = torch.cat(found)
        return rows.view(len(counts), width, -1)


def _parts(steps: Sequence[Token]) -> Iterator[Sequence[Token]]:
    """As few calls as take no more tokens, and want no more rows, than one may."""
    start = rows = 0
    for i, (*_, wanted) in enumerate(steps):
        if i - start == MOST_TOKENS or rows + wanted > MOST_ROWS:
            yield steps[start:i]
            start, rows = i, 0
        rows += wanted
    if start < len(steps):
        yield steps[start:]
