"""Passes of a fixed shape, captured as CUDA graphs and replayed: no Python, and no launch of each kernel.

A small model's pass takes a GPU less time than Python takes to ask for it. So what differs from step to step is put into
tensors that stay: the tokens, how long each slot is, and how many tokens it takes. Shapes are rounded up, so that there are
few: surplus slots take no tokens, surplus columns are masked. A graph reads and writes the buffers of its state where they are,
so it belongs to that state and goes with it.

`CudaCapture` is all that needs a GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.transfer import to_device
from trimtab.models.lean import LeanDecoder
from trimtab.models.slots import SlotState

__all__ = ["Capture", "CudaCapture", "Graphs"]

Replay = Callable[[], Any]
Capture = Callable[[Callable[[], Tensor], torch.device], tuple[Replay, Tensor]]
"""From work on tensors that stay, and their device, to what does it again, and the tensor that its result is then in."""

WIDEST = 16
"""Tokens of a slot; longer passes read prompts, and take the GPU long enough."""
COLUMNS = 256
"""Columns are rounded up to a multiple."""
MET = 2
"""Passes of a shape that run without a graph, for many shapes are not met again."""
MOST = 64
"""Graphs of a state; further shapes run without."""


_Shape = tuple[int, int, int]
"""Slots, tokens of each, columns."""


class _Pass(NamedTuple):
    tokens: Tensor
    """`[B, K]`"""
    numbers: Tensor
    """`[2, B]` the lengths of the slots, and how many tokens each takes."""
    logits: Tensor
    """`[B, K, W]`, written by each replay."""
    replay: Replay
    tables: tuple[Tensor, Tensor]
    """The rotations that it reads; the decoder may have replaced them by longer ones."""


class Graphs:
    """The captured passes of a model. Each state has its own, in `SlotState.graphs`.

    Args:
        lean: the model; its weights stay where they are.
        capture: a `CudaCapture`.
    """

    def __init__(self, lean: LeanDecoder, capture: Capture) -> None:
        self._lean, self._capture = lean, capture

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
        used = max(length + count for length, count in zip(state.lengths, counts, strict=False))
        columns = min(-(-used // COLUMNS) * COLUMNS, state.capacity)
        shape = (min(1 << (slots - 1).bit_length(), len(state)), width, columns)
        graphs: dict[_Shape, _Pass | int] = state.graphs
        graph = graphs.setdefault(shape, 0)
        if isinstance(graph, int):
            if graph < MET or sum(isinstance(other, _Pass) for other in graphs.values()) >= MOST:
                graphs[shape] = graph + 1
                return None
            graph = graphs[shape] = self._make(state, shape, last_position, tokens)
        surplus = [0] * (shape[0] - slots)
        graph.tokens[:slots] = tokens
        graph.numbers.copy_(to_device([[*state.lengths[:slots], *surplus], [*counts, *surplus]], tokens.device))
        graph.replay()
        return graph.logits[:slots]

    def _make(self, state: SlotState, shape: _Shape, last_position: int, like: Tensor) -> _Pass:
        slots, width, columns = shape
        tokens, numbers = like.new_zeros(slots, width), like.new_zeros(2, slots)

        def work() -> Tensor:
            lengths, taken = numbers.unsqueeze(-1)
            state.step = state.lay_out(lengths, taken, width, columns, last_position)
            try:
                return self._lean(tokens, state.step, state.layers, last_only=False)
            finally:
                state.step = None

        replay, logits = self._capture(work, like.device)
        return _Pass(tokens, numbers, logits, replay, self._lean.tables)


class CudaCapture:
    """Records the kernels of some work in a CUDA graph.

    All graphs of one of these share memory for what is only needed on the way, so no two of them may be replayed at once.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor], device: torch.device) -> tuple[Replay, Tensor]:
        """How to do `work` again, and where its result is then. Other threads may go on using the GPU."""
        with torch.cuda.device(device):
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                work()  # what libraries set up at their first use on a stream cannot be recorded
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = work()
                finally:
                    graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay, result
