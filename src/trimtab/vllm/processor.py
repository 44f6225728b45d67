"""vLLM's logits processor: it follows the batch, and turns the proposal's logits into aligned ones."""

from typing import Any

from torch import Tensor

from trimtab.vllm import internals
from trimtab.vllm.aligners import Aligned, Aligners
from trimtab.vllm.cache import Request

__all__ = ["AlignerProcessor"]


class AlignerProcessor(internals.Aligning):
    """Aligns the rows of those requests that ask for it.

    vLLM makes one in each worker. Its `apply` comes too late, after logit bias, banned words and raw log-probabilities, which
    belong to the aligned row as they do to any model's; `internals.py` calls `align` before all of them.

    Args:
        vllm_config: vLLM's configuration.
        args: with the first model runner, the device and whether to pin memory; with the second, its requests.
    """

    def __init__(self, vllm_config: Any, *args: Any) -> None:
        self._aligned: dict[int, Aligned] = {}
        self._catalog = internals.check(vllm_config)
        self._aligners: Aligners | None = None
        self._config, self._args = vllm_config, args

    def load(self) -> None:
        """Load the aligners where tokens are drawn, if that has not been done.

        vLLM makes this processor before it loads the proposal: what is free then is not what aligners may take.

        Raises:
            ModelError: an aligner cannot be loaded.
            InvalidOption: an aligner's context is too short, or memory does not suffice.
        """
        if self._aligners is None and self._catalog is not None and internals.samples_here():
            limits, device = internals.limits(self._config), self._args[0]
            self._aligners = Aligners(self._catalog.settings, internals.tokenizer(self._config), limits, device)
            internals.logger.info("trimtab: %s", self._aligners.summary)

    @property
    def is_busy(self) -> bool:
        """Whether any request of the batch is aligned."""
        return bool(self._aligned)

    def update_state(self, batch_update: Any) -> None:
        """Follow who left the batch, who joined it, and who moved in it, in this order."""
        if batch_update is None or self._catalog is None:
            return
        for row in batch_update.removed:
            self._forget(row)
        for row, params, prompt, output in batch_update.added:
            self._forget(row)
            arguments = self._catalog.read(params.extra_args)
            if arguments is not None:
                self._aligned[row] = Aligned(Request(prompt, output), arguments)
        for source, target, direction in batch_update.moved:
            mover, other = self._aligned.pop(source, None), self._aligned.pop(target, None)
            if mover is not None:
                self._aligned[target] = mover
            if other is not None and internals.is_swap(direction):
                self._aligned[source] = other
            elif other is not None:
                other.request.gone = True

    def align(self, logits: Tensor, reading: dict[int, int]) -> Tensor:
        """The logits `[requests, columns]` of a step in float32, with aligned rows aligned.

        Args:
            logits: the proposal's.
            reading: the rows that draw nothing at this step, with how many tokens of their prompts vLLM had read before it.
        """
        assert self._aligners is not None
        return self._aligners.align(logits, self._aligned, reading)

    def apply(self, logits: Tensor, *args: Any) -> Tensor:
        """Nothing is left to do."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Aligning changes which token is the best."""
        return False

    def add_request(self, *args: Any) -> bool:
        """The second model runner asks whether a request is touched."""
        return False

    def _forget(self, row: int) -> None:
        gone = self._aligned.pop(row, None)
        if gone is not None:
            gone.request.gone = True
