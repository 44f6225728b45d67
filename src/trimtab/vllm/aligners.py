"""The configured aligners in memory, each with its cache, and the aligned rows of a step."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.decode.assemble import Loader
from trimtab.errors import InvalidOption
from trimtab.hardware import free_memory
from trimtab.models.adapter_values import Blend
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.vocabulary import vocabulary_size
from trimtab.vllm.cache import AlignerCache, Ask, Request, blends
from trimtab.vllm.mixing import Mixer
from trimtab.vllm.settings import KEY, Arguments, Settings

__all__ = ["Aligned", "Aligners", "Limits"]


class Limits(NamedTuple):
    """What vLLM was started with."""

    max_num_seqs: int
    """The most requests at a step."""
    max_model_len: int
    """The most tokens of a request."""
    max_num_batched_tokens: int
    """The most tokens that are read at a step."""


class Aligned(NamedTuple):
    """An aligned request in vLLM's batch."""

    request: Request
    arguments: Arguments


class Aligners:
    """Loads all aligners and takes the memory that they will need, or refuses.

    Args:
        settings: the operator's.
        tokenizer: the proposal's.
        limits: what vLLM was started with.
        device: where the proposal's logits are.

    Attributes:
        summary: what they take, in words.

    Raises:
        ModelError: an aligner cannot be loaded.
        InvalidOption: an aligner's context is too short, or memory does not suffice; the message says what would do.
    """

    def __init__(self, settings: Settings, tokenizer: Any, limits: Limits, device: torch.device) -> None:
        self._models: dict[str, tuple[HuggingFaceLM, Any]] = {}
        loader = Loader(tokenizer, dtype=settings.dtype, device=device, cuda_graphs=False)
        for name, path in settings.aligners.items():
            model: Any = loader.load(path).model
            base: Any
            base, adapter = (model.pool, model.adapter) if isinstance(model, Adapted) else (model, None)
            if base.max_length is not None and base.max_length < limits.max_model_len:
                contexts = f"the context of aligner '{name}' holds {base.max_length} tokens, vLLM's {limits.max_model_len}"
                raise InvalidOption(f"{KEY}: {contexts}: start vLLM with --max-model-len {base.max_length}")
            self._models[name] = base, adapter
        self._slots = self._count_slots(settings, limits)
        self.summary = self._check_memory(settings, limits, device)
        self._caches = {
            base: AlignerCache(base, slots, limits.max_model_len, limits.max_num_batched_tokens, self._adapters(base))
            for base, slots in self._slots.items()
        }
        self.vocab_size = vocabulary_size(tokenizer)
        self._mixers: dict[int, Mixer] = {}

    def align(self, logits: Tensor, aligned: dict[int, Aligned], reading: dict[int, int]) -> Tensor:
        """Logits in float32 with the rows of aligned requests aligned; where it can, it writes to `logits`.

        Args:
            logits: `[requests, columns]` the proposal's.
            aligned: the aligned requests of the batch, by their row.
            reading: those of them that draw nothing at this step, with how much of their prompts may be read.
        """
        asks: dict[HuggingFaceLM, list[Ask]] = {}
        places: dict[tuple[int, int], tuple[HuggingFaceLM, int]] = {}  # batch row, aligner: whose rows, and which of them
        drawn: dict[HuggingFaceLM, int] = {}
        groups: dict[int, list[int]] = {}
        for row, (request, arguments) in aligned.items():
            models = self._asked(arguments)
            for i, (base, adapter) in enumerate(models):
                asks.setdefault(base, []).append(Ask(request, adapter, reading.get(row)))
                if row not in reading:
                    places[row, i] = base, drawn.get(base, 0)
                    drawn[base] = drawn.get(base, 0) + 1
            if row not in reading:
                groups.setdefault(len(models), []).append(row)
        rows = {base: self._caches[base].rows(wanted) for base, wanted in asks.items()}
        mixed = logits.float()
        for count, members in groups.items():
            mixer = self._mixers.setdefault(count, Mixer(self.vocab_size))
            logqs = [_collect(rows, [places[row, i] for row in members]) for i in range(count)]
            asked = [aligned[row] for row in members]
            mixer.mix(mixed, members, logqs, [one.arguments.shaping for one in asked], [one.request for one in asked])
        return mixed

    def _asked(self, arguments: Arguments) -> list[tuple[HuggingFaceLM, Any]]:
        """The model and adapter of each aligner of a request; of aligners whose weights are blended, of the one they make."""
        models = [self._models[name] for name in arguments.names]
        if arguments.shaping.blend is None:
            return models
        base, blend = models[0][0], Blend(zip((adapter for _, adapter in models), arguments.shaping.blend, strict=True))
        return [(base, blend if blend.parts else None)]

    def _adapters(self, base: HuggingFaceLM) -> list[Any]:
        return [adapter for of, adapter in self._models.values() if of is base and adapter is not None]

    def _stacked_bytes(self, base: HuggingFaceLM) -> int:
        """What a model's adapters take once more, for blends of them."""
        adapters = self._adapters(base)
        return base.store.stacked_bytes(adapters) if isinstance(base, AdapterPool) and blends(adapters) else 0

    def _count_slots(self, settings: Settings, limits: Limits) -> dict[HuggingFaceLM, int]:
        """Slots of each model: one for every request, or for every adapter that a request may combine."""
        bases = [base for base, _ in self._models.values()]
        return {base: limits.max_num_seqs * min(settings.max_aligners, bases.count(base)) for base in bases}

    def _check_memory(self, settings: Settings, limits: Limits, device: torch.device) -> str:
        """Refuse caches that do not fit; what all of it takes, in words."""
        per_request = sum(
            base.state_bytes(slots, limits.max_model_len, self._adapters(base)) // limits.max_num_seqs
            for base, slots in self._slots.items()
        )
        shared = sum(map(self._stacked_bytes, self._slots))
        cache = per_request * limits.max_num_seqs + shared
        weights = sum(base.num_bytes + sum(adapter.num_bytes for adapter in self._adapters(base)) for base in self._slots)
        allowed = None if settings.memory is None else settings.memory - weights
        rooms = [room for room in (free_memory(device), allowed) if room is not None]
        shape = f"{limits.max_num_seqs} requests of {limits.max_model_len} tokens"
        if rooms and cache > min(rooms):
            fit = max((min(rooms) - shared) // per_request, 0)
            advice = f"--max-num-seqs {fit} fits" if fit else "not even one request fits; lower --max-model-len"
            if allowed is not None and allowed <= 0:
                advice = f"the weights alone take more than {KEY}.memory_gib; raise it"
            wanted = f"beside {_size(weights)} of weights, the aligners' caches for {shape} take {_size(cache)}"
            raise InvalidOption(f"{KEY}: {wanted}, but {_size(max(min(rooms), 0))} are left: {advice}")
        taken = f"{_size(weights)} of weights and {_size(cache)} of cache"
        return f"aligners {', '.join(self._models)} take {taken} ({shape}) on {device}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _collect(rows: dict[HuggingFaceLM, Tensor], places: list[tuple[HuggingFaceLM, int]]) -> Tensor:
    """The rows `[n, V]` at these places; without a copy where they are all of one model's, in order."""
    base = places[0][0]
    if places == [(base, i) for i in range(len(rows[base]))]:
        return rows[base]
    return torch.stack([rows[base][i] for base, i in places])
