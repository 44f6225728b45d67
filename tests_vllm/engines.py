"""Tiny models that vLLM can run, and a loop that lets requests arrive and leave at chosen steps."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.platforms.cpu import CpuPlatform

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer

LETTERS = "abcdef"
V = 1 + len(LETTERS)
CONTEXT = 128
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Models:
    """Folders."""

    root: Path
    proposal: str
    aligners: dict[str, str]


def make_models(root: Path) -> Models:
    """A proposal, two aligners of their own, and two LoRA adapters over a third."""
    tokenizer = tiny_tokenizer(LETTERS)

    def save(name: str, seed: int, kind: str = "llama", spread: float = 0.15) -> Path:
        model = tiny_model(kind, V, seed=seed, spread=spread, max_position_embeddings=CONTEXT, **SHAPE)
        return save_tiny(root / name, model, tokenizer)

    base = save("base", 3)
    loras = {}
    for i, name in enumerate(("red", "blue")):
        folder = save_lora(root / name, base, seed=i, r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        tokenizer.save_pretrained(folder)
        loras[name] = str(folder)
    proposal = save("proposal", 0)
    return Models(root, str(proposal), {"first": str(save("first", 1)), "second": str(save("second", 2, "qwen3")), **loras})


_KEPT: list[LLM] = []
"""An engine that is collected takes vLLM's globals along, which the next one in this process uses, too."""


DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": CONTEXT,
    "max_num_seqs": 32,
    "distributed_executor_backend": "uni",
    "disable_log_stats": True,
    "kv_cache_memory_bytes": 2**26,
    "gpu_memory_utilization": 0.3,  # of this machine's memory
}


def make_llm(models: Models, aligners: dict[str, Any] | None = None, *, config: Any = None, **settings: Any) -> LLM:
    """An engine in this process."""
    if config is None:
        config = {"trimtab": {"aligners": aligners or models.aligners, "max_aligners": 2}}
    llm = LLM(models.proposal, **{**DEFAULTS, "additional_config": config, **settings})
    _KEPT.append(llm)
    return llm


class _Nothing:
    """An event or a stream where there is no device: all is done at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *args: Any) -> None:
        pass

    def record(self, *args: Any) -> None:
        pass

    synchronize = wait_stream = record


def allow_scheduling_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM plan a step before the one before it is done, as it does on GPUs, here on the CPU."""
    theirs = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def keep(cls: type, vllm_config: Any) -> None:
        wanted = vllm_config.scheduler_config.async_scheduling
        theirs(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = wanted

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
    for name in ("Event", "Stream", "stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, _Nothing)


@dataclass
class Job:
    """A request, and when it comes and goes."""

    prompt: list[int]
    params: SamplingParams
    arrives: int = 0
    leaves: int | None = None
    """The step at which it is cancelled."""
    tokens: list[int] = field(default_factory=list)
    """What was drawn, once it is done."""
    logprobs: list[dict[int, Any]] = field(default_factory=list)


def run(llm: LLM, jobs: Sequence[Job]) -> None:
    """Carry out all jobs, each from its own step on."""
    engine: Any = llm.llm_engine
    waiting = sorted(enumerate(jobs), key=lambda pair: pair[1].arrives)
    known: dict[str, Job] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1].arrives <= step:
            number, job = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": list(job.prompt)}, job.params.clone())
            known[str(number)] = job
        gone = [name for name, job in known.items() if job.leaves is not None and job.leaves <= step]
        for name in gone:
            engine.abort_request([name])
            del known[name]
        for output in engine.step():
            if output.finished and output.request_id in known:
                job = known.pop(output.request_id)
                job.tokens = list(output.outputs[0].token_ids)
                job.logprobs = list(output.outputs[0].logprobs or [])
        step += 1
