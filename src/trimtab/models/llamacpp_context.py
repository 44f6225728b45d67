"""llama.cpp's contexts, by llama-cpp-python's low-level calls: weights, caches, and the contexts that no state needs now."""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trimtab.errors import ModelError
from trimtab.extras import need

__all__ = ["MOST_ROWS", "MOST_SLOTS", "MOST_TOKENS", "Context", "Idle", "Token", "Weights", "library"]

logger = logging.getLogger(__name__)

MOST_TOKENS = 512
"""Of one call of `llama_decode`."""
AT_ONCE = 56
"""Of these llama.cpp computes so many together. From 64 on it sums attention in tiles: in another order, and with all that is
masked, where a NaN of somebody else would count."""
MOST_ROWS = 64
"""Of one call: llama.cpp keeps room for so many rows of logits."""
MOST_SLOTS = 256
"""Sequences that a context may have."""
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
    need("llamacpp", "the backend llamacpp", "llama_cpp")
    from llama_cpp import llama_cpp

    llama_cpp.llama_log_set(_LOG, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _log(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        logger.warning("llama.cpp: %s", text.decode(errors="replace").strip())


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_log)  # llama.cpp keeps no hold on it


Token = tuple[int, int, int, bool]
"""A token, its position, its sequence, and whether the row after it is wanted."""


class Weights:
    """A loaded file, which lives as long as anything that uses it. It is read, not mapped: later changes change nothing."""

    def __init__(self, path: Path) -> None:
        lib = library()
        params = lib.llama_model_default_params()
        params.load_mode = lib.LLAMA_LOAD_MODE_NONE
        self.pointer = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise ModelError(f"'{path}' is no GGUF file that llama.cpp can read")
        weakref.finalize(self, lib.llama_model_free, self.pointer)


class Context:
    """A llama.cpp context with its cache, for some sequences of so many tokens together.

    Raises:
        MemoryError: there is no room for it.
    """

    def __init__(self, weights: Weights, sequences: int, cells: int) -> None:
        lib = library()
        self.sequences, self.cells = sequences, cells
        self.spoilt = False
        """Whether there may be a NaN in what its cache holds and hides."""
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = cells, sequences
        params.n_batch, params.n_ubatch = MOST_TOKENS, AT_ONCE
        params.n_outputs_max = max(MOST_ROWS, sequences)
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.kv_unified = True  # sequences that take different numbers of tokens are one pass
        params.swa_full = True  # or what lies before a window is gone, and cannot be gone back to
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # it sums alike however many tokens are read at once
        params.no_perf = True
        self.pointer = lib.llama_init_from_model(weights.pointer, params)
        if not self.pointer:
            raise MemoryError(f"llama.cpp has no room for {cells} tokens of {sequences} sequences")
        self._batch = lib.llama_batch_init(MOST_TOKENS, 0, 1)
        weakref.finalize(self, _free, self.pointer, self._batch, weights)
        self.memory = lib.llama_get_memory(self.pointer)

    def decode(self, steps: Sequence[Token], vocab_size: int) -> np.ndarray[Any, Any]:
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

    def copy(self, sequence: int, to: int) -> None:
        """Make a sequence the same as another one."""
        self.forget(to, 0)
        library().llama_memory_seq_cp(self.memory, sequence, to, -1, -1)

    def save(self, sequence: int) -> bytes:
        """A sequence, as llama.cpp writes it."""
        lib = library()
        size = lib.llama_state_seq_get_size(self.pointer, sequence)
        data = (ctypes.c_uint8 * size)()
        if lib.llama_state_seq_get_data(self.pointer, data, size, sequence) != size:
            raise ModelError("llama.cpp could not save a sequence")
        return bytes(data)

    def load(self, data: bytes, sequence: int) -> None:
        """Make a sequence what was saved."""
        self.forget(sequence, 0)
        view = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        if not library().llama_state_seq_set_data(self.pointer, view, len(data), sequence):
            raise ModelError("llama.cpp could not load a sequence")


def _free(context: Any, batch: Any, weights: Weights) -> None:
    """Free a context; the weights that it refers to are held until then."""
    library().llama_free(context)
    library().llama_batch_free(batch)


class Idle:
    """Contexts that no state needs, for later ones."""

    def __init__(self) -> None:
        self._contexts: list[Context] = []
        self._lock = threading.RLock()  # a state may go, and give its context back, while this thread looks for one

    def __len__(self) -> int:
        return len(self._contexts)

    def add(self, context: Context) -> None:
        """Keep one, unless it is spoilt, and let the oldest go."""
        with self._lock:
            self._contexts = [*self._contexts, *([] if context.spoilt else [context])][-IDLE:]

    def find(self, slots: int, cells: int) -> Context | None:
        """One that is large enough and not far too large, emptied; None if there is none."""
        with self._lock:
            fitting = [c for c in self._contexts if slots <= c.sequences <= 2 * slots + 2 and cells <= c.cells <= 4 * cells]
            if not fitting:
                return None
            found = min(fitting, key=lambda c: c.cells)
            self._contexts = [context for context in self._contexts if context is not found]
        library().llama_memory_clear(found.memory, False)
        return found
