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
import logging
import threading
import weakref
from collections.abc import Collection, Iterator, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import InvalidOption, ModelError, UnsupportedModel
from trimtab.files import expand_home
from trimtab.models.base import State
from trimtab.models.digests import Seen, digest_file

__all__ = ["LlamaCppLM"]

logger = logging.getLogger(__name__)

MOST_TOKENS = 512
"""Of one call of `llama_decode`."""
MOST_ROWS = 64
"""Of one call: llama.cpp keeps room for so many rows of logits."""
CELLS = 256
"""Tokens that a context has room for are a multiple of it, so that few sizes are made."""
IDLE = 4
"""Contexts that are kept for later states."""
ERROR = 4
"""llama.cpp's level of messages that tell of a failure; what is below is not shown."""


@cache
def library() -> Any:
    """llama-cpp-python's low-level calls, ready to use.

    Raises:
        InvalidOption: it is not installed.
    """
    try:
        from llama_cpp import llama_cpp
    except ImportError as error:
        how = "pip install 'trimtab[llamacpp]'"
        raise InvalidOption(f"llama.cpp needs the package llama-cpp-python ({error}): {how}") from error
    llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        logger.warning("llama.cpp: %s", text.decode(errors="replace").strip())


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)  # llama.cpp keeps no hold on it


_Token = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether the row after it is wanted."""


class _Weights:
    """A loaded file, which lives as long as anything that uses it."""

    def __init__(self, path: Path) -> None:
        lib = library()
        self.pointer = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.pointer:
            raise ModelError(f"'{path}' is no GGUF file that llama.cpp can read")
        weakref.finalize(self, lib.llama_model_free, self.pointer)


class _Context:
    """A llama.cpp context with its cache, for some sequences of so many tokens together.

    Raises:
        MemoryError: there is no room for it.
    """

    def __init__(self, weights: _Weights, sequences: int, cells: int) -> None:
        lib = library()
        self._weights, self.sequences, self.cells = weights, sequences, cells
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, sequences
        params.n_batch = params.n_ubatch = MOST_TOKENS
        params.n_outputs_max = MOST_ROWS
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.kv_unified = True  # sequences that take different numbers of tokens are one pass
        params.swa_full = True  # or what lies before a window is gone, and cannot be gone back to
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # it sums alike however many tokens are read at once
        params.no_perf = True
        self.pointer = lib.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise MemoryError(f"llama.cpp has no room for {cells} tokens of {sequences} sequences")
        weakref.finalize(self, lib.llama_free, self.pointer)
        self.memory = lib.llama_get_memory(self.pointer)
        self._batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)
        weakref.finalize(self, lib.llama_batch_free, self._batch)

    def decode(self, steps: Sequence[_Token], vocab_size: int) -> np.ndarray[Any, Any]:
        """Logits `[rows, V]`; the next call overwrites them.

        Raises:
            ModelError: llama.cpp could not.
        """
        lib, batch = library(), self._batch
        batch.n_tokens = len(steps)
        for i, (token, position, sequence, wanted) in enumerate(steps):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if code := lib.llama_decode(self.pointer, batch):
            raise ModelError(f"llama_decode ended with {code}, at {len(steps)} tokens of {self.sequences} sequences")
        rows = sum(wanted for *_, wanted in steps)
        if not rows:
            return np.empty((0, vocab_size), dtype=np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self.pointer), shape=(rows, vocab_size))

    def forget(self, sequence: int, start: int) -> None:
        """Drop a sequence's tokens from a position on."""
        library().llama_memory_seq_rm(self.memory, sequence, start, -1)

    def copy(self, sequence: int, target: "_Context", to: int) -> None:
        """Make sequence `to` of `target`, which may be this context, the same as one of these."""
        lib = library()
        target.forget(to, 0)
        if target is self:
            lib.llama_memory_seq_cp(self.memory, sequence, to, -1, -1)
            return
        size = lib.llama_state_seq_get_size(self.pointer, sequence)
        data = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.pointer, data, size, sequence) != size or not lib.llama_state_seq_set_data(
            target.pointer, data, size, to
        ):
            raise ModelError("llama.cpp could not copy a sequence")


class LlamaState(State):
    """Slots of a GGUF model. The context is taken when it is first needed, and given back when the state goes."""

    def __init__(self, model: "LlamaCppLM", slots: int, capacity: int) -> None:
        super().__init__([0] * slots, capacity)
        self._model = model
        self._context: _Context | None = None

    @property
    def context(self) -> _Context:
        """The context that holds the slots."""
        if self._context is None:
            self._context = context = self._model.take(len(self), self.capacity)
            weakref.finalize(self, self._model.give_back, context)
        return self._context

    def wipe(self, slot: int) -> None:
        """Forget all that a slot has held."""
        self.context.forget(slot, 0)


class LlamaCppLM:
    """A GGUF model that llama.cpp runs, on a CPU or wherever the installed llama-cpp-python was built for.

    Args:
        source: the file.
        vocab_size: V; logits beyond it are padding and dropped. Default: all that the file has.

    Raises:
        ModelError: it is not there, or llama.cpp cannot read it.
        UnsupportedModel: its cache cannot forget tokens, as that of recurrent and hybrid models.
        InvalidOption: llama-cpp-python is not installed.
    """

    immutable = True
    device = torch.device("cpu")
    """Where rows come out, whatever computes them."""

    def __init__(self, source: str | Path, vocab_size: int | None = None) -> None:
        self.path = expand_home(source)
        if not self.path.is_file():
            raise ModelError(f"'{source}' does not exist")
        self._seen = Seen.at(self.path)
        lib, self._weights = library(), _Weights(self.path)
        model = self._weights.pointer
        kinds = {"recurrent": lib.llama_model_is_recurrent, "hybrid": lib.llama_model_is_hybrid}
        kinds |= {"diffusion": lib.llama_model_is_diffusion, "encoder-decoder": lib.llama_model_has_encoder}
        if odd := [kind for kind, is_one in kinds.items() if is_one(model)]:
            raise UnsupportedModel(f"'{source}' holds a model of the {odd[0]} kind, whose cache cannot forget single tokens")
        self._vocab = lib.llama_model_get_vocab(model)
        self._columns: int = lib.llama_vocab_n_tokens(self._vocab)
        self.vocab_size = vocab_size or self._columns
        self.max_length: int | None = lib.llama_model_n_ctx_train(model)
        self.num_bytes: int = lib.llama_model_size(model)
        """What the weights take."""
        self._idle: list[_Context] = []
        self._lock = threading.RLock()  # a state may go, and give its context back, while this thread looks for one

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
        """Empty slots."""
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
                state.context.forget(slot, state.lengths[slot])

    def copy(self, source: State, slots: Sequence[int], target: State, to: Sequence[int]) -> None:
        """Copy slots."""
        assert isinstance(source, LlamaState)
        assert isinstance(target, LlamaState)
        for slot, other in zip(slots, to, strict=True):
            source.context.copy(slot, target.context, other)
            target.lengths[other], target.adapters[other] = source.lengths[slot], source.adapters[slot]

    def select(self, state: State, rows: Sequence[int]) -> LlamaState:
        """Copies of the given slots."""
        selected = self.new_state(len(rows), state.capacity)
        self.copy(state, rows, selected, range(len(rows)))
        return selected

    def take(self, slots: int, capacity: int) -> _Context:
        """An empty context for so many slots: an idle one that is large enough, and not far too large, or a new one."""
        cells = max(1, -(-slots * capacity // CELLS)) * CELLS
        with self._lock:
            fitting = [c for c in self._idle if slots <= c.sequences <= 2 * slots + 2 and cells <= c.cells <= 4 * cells]
            if fitting:
                context = min(fitting, key=lambda c: c.cells)
                self._idle.remove(context)
                library().llama_memory_clear(context.memory, False)
                return context
        return _Context(self._weights, max(slots, 1), cells)

    def give_back(self, context: _Context) -> None:
        """Keep a context that no state needs any more."""
        with self._lock:
            self._idle.append(context)
            del self._idle[:-IDLE]

    def _step(self, state: State, tokens: Tensor, counts: Sequence[int], *, last_only: bool) -> Tensor:
        assert isinstance(state, LlamaState)
        state.check_room(tokens, counts)
        steps = [
            (new[j], state.lengths[slot] + j, slot, not last_only or j == count - 1)
            for slot, (new, count) in enumerate(zip(tokens.tolist(), counts, strict=True))
            for j in range(count)
        ]
        found = [
            row_from_logits(torch.from_numpy(state.context.decode(part, self._columns)), self.vocab_size)
            for part in _parts(steps)
        ]
        state.advance(counts)
        width = 1 if last_only else tokens.shape[1]
        places = [slot * width + j for slot, count in enumerate(counts) for j in range(min(count, width))]
        if len(places) == len(counts) * width:
            return torch.cat(found).view(len(counts), width, -1)
        rows = torch.zeros(len(counts) * width, self.vocab_size)
        if places:
            rows[places] = torch.cat(found)
        return rows.view(len(counts), width, -1)


def _parts(steps: Sequence[_Token]) -> Iterator[Sequence[_Token]]:
    """As few calls as take no more tokens, and want no more rows, than one may."""
    start = rows = 0
    for i, (*_, wanted) in enumerate(steps):
        if i - start == MOST_TOKENS or rows + wanted > MOST_ROWS:
            yield steps[start:i]
            start, rows = i, 0
        rows += wanted
    if start < len(steps):
        yield steps[start:]
