"""Passes of a fixed shape, captured as CUDA graphs and replayed: no Python, and no launch of each kernel.

A small model's pass takes a GPU less time than Python takes to ask for it. So what differs from step to step is put into
tensors that stay: the tokens, how long each slot is, and how many tokens it takes. Shapes are rounded up, so that there are
few: surplus slots take no tokens, surplus columns are masked. A graph reads and writes the buffers of its state where they are,
so it belongs to that state and goes with it.

`CudaCapture` is all that needs a GPU.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.models.attention import without_cudnn
from trimtab.models.lean import LeanDecoder
from trimtab.models.slots import SlotState

__all__ = ["Capture", "CudaCapture", "Graphs"]

logger = logging.getLogger(__name__)

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""From work on tensors that stay, to what does it again, and the tensor that its result is in until anything is replayed."""

WIDEST = 17
"""Tokens of a slot, the most drafts and one; longer passes read prompts, and take the GPU long enough."""
COLUMNS = 256
"""Columns are rounded up to a multiple."""
MOST = 64
"""Graphs of a state; the one that was used longest ago makes room for a new one."""

_Shape = tuple[int, int, int]
"""Slots, tokens of each, columns."""


class _Pass(NamedTuple):
    tokens: Tensor
    """`[B, K]`"""
    numbers: Tensor
    """`[2, B]` the lengths of the slots, and how many tokens each takes."""
    hidden: Tensor
    """`[B, K, H]`, written by each replay."""
    replay: Replay
    tables: list[Tensor]
    """The rotations that it reads; the decoder may have replaced them by longer ones."""


class Graphs:
    """The captured passes of a model. Each state has its own, in `SlotState.graphs`. One thread at a time may use them.

    Args:
        lean: the model; its weights stay where they are.
        capture: a `CudaCapture`.
    """

    def __init__(self, lean: LeanDecoder, capture: Capture) -> None:
        self._lean = lean
        self._capture: Capture | None = capture

    def extend(self, state: SlotState, tokens: Tensor, counts: Sequence[int], last_position: int) -> Tensor | None:
        """Logits `[B, K, W]` of tokens `[B, K]`, or None if this pass is to run without a graph.

        Args:
            state: the lengths are left to the caller.
            tokens: ids, of which slot b takes the first `counts[b]`.
            counts: how many tokens each slot takes.
            last_position: the last place of a token that the model knows.
        """
        slots, width = tokens.shape
        if width > WIDEST:
            return None
        used = max(1, *(length + count for length, count in zip(state.lengths, counts, strict=False)))
        columns = min(-(-used // COLUMNS) * COLUMNS, state.capacity)
        shape = (min(1 << (slots - 1).bit_length(), len(state)), width, columns)
        graphs: dict[_Shape, _Pass] = state.graphs
        graph = graphs.pop(shape, None) or self._make(state, shape, last_position, tokens)
        if graph is None:
            return None
        graphs[shape] = graph  # the one used last stands last
        surplus = [0] * (shape[0] - slots)
        graph.tokens[:slots] = tokens
        graph.numbers.copy_(to_device([[*state.lengths[:slots], *surplus], [*counts, *surplus]], tokens.device))
        graph.replay()
        return self._lean.logits(graph.hidden[:slots])

    def _make(self, state: SlotState, shape: _Shape, last_position: int, like: Tensor) -> _Pass | None:
        """Capture a pass, unless capturing has failed before: then no pass is captured any more.

        It is captured when it is first met: so what a step costs is known from its second one on (`trimtab.decode.pace`).
        """
        if self._capture is None or not all(layer.is_initialized for layer in state.layers):
            return None
        if len(state.graphs) >= MOST:
            del state.graphs[next(iter(state.graphs))]
        slots, width, columns = shape
        tokens, numbers = like.new_zeros(slots, width), like.new_zeros(2, slots)

        def work() -> Tensor:
            lengths, taken = numbers.unsqueeze(-1)
            state.step = state.lay_out(lengths, taken, width, columns, last_position)
            try:
                with without_cudnn(tokens.device):
                    return self._lean.upper(self._lean.embed(tokens), state.step, state.layers)
            finally:
                state.step = None

        try:
            replay, hidden = self._capture(work)
        except RuntimeError as error:
            logger.warning("a pass could not be captured as a CUDA graph, so this model runs without from now on: %s", error)
            self._capture = None
            return None
        return _Pass(tokens, numbers, hidden, replay, self._lean.tables)


class CudaCapture:
    """Records the kernels of some work in a CUDA graph. Other threads may go on using the GPU.

    All graphs share the memory for what is only needed on the way, results included: so they are replayed one at a time.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None
        self._stream: Any = None
        self._anchor: torch.cuda.CUDAGraph | None = None  # memory is shared for as long as one graph of it lives

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """How to do `work` again, and where its result is then."""
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream()):  # a failed capture leaves its own
            if self._anchor is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._anchor, _ = self._record(lambda: torch.zeros(1, device=self._device))
                self._pool = self._anchor.pool()
            work()  # what kernels and libraries set up when they are first used cannot be recorded
            graph, result = self._record(work)
        return graph.replay, result

    def _record(self, work: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph, result
