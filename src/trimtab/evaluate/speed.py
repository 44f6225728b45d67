"""How fast decoding is, as ratios to the unaligned proposal, all contestants taking turns in one run.

proposal_hf          transformers' `generate` of the proposal alone: the baseline
assisted_hf          the same with the aligner as transformers' assistant (batch 1, equal padding)
two_model_hf         the plain two-model loop that a user would write, with both caches
proposal_engine      the proposal alone in our engine
aligned_tokenwise    both models in our engine, token by token
aligned_speculative  both models in our engine, as `generate` decodes by default
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.core.noise import uniforms
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.pace import Tally
from trimtab.decode.request import SamplingParams
from trimtab.errors import DeadRow
from trimtab.hardware import describe_hardware
from trimtab.models.aligner import Aligner
from trimtab.models.head import tap_of
from trimtab.models.huggingface import describe_kernels

__all__ = [
    "Stock",
    "Throughput",
    "describe_machine",
    "load_stock",
    "measure_speed",
    "random_prompts",
    "stream_times",
    "throughput",
]


@dataclass(frozen=True)
class Stock:
    """Stock transformers modules, loaded apart from the engine's: those may be packed.

    Attributes:
        proposal: P_M.
        aligner: Q, the first one if there are several.
    """

    proposal: Any
    aligner: Any


class Throughput(NamedTuple):
    """How fast some answers were made.

    Attributes:
        tokens_per_second: of all answers together; None where no time passed.
        acceptance: share of the tested drafts that stayed; None without drafts.
        tokens_per_proposal_call: what a sequence gains when the proposal is called once; None without calls.
    """

    tokens_per_second: float | None
    acceptance: float | None
    tokens_per_proposal_call: float | None


def throughput(tokens: int, tally: Tally, seconds: float) -> Throughput:
    """The speed of a generation that was timed from outside.

    Args:
        tokens: in the completions. The tally cannot say: it also counts those behind a stop, which are thrown away.
        tally: `model.pace.tally`, set to `Tally()` before the generation, for it counts on from one to the next.
        seconds: wall-clock time.
    """
    return Throughput(tokens / seconds if seconds > 0 else None, tally.acceptance, tally.tokens_per_call)


def measure_speed(
    model: AlignedModel, stock: Stock, prompts: Sequence[Sequence[int]], params: SamplingParams, repeats: int
) -> dict[str, Any]:
    """Time every contestant on the same prompts.

    Args:
        model: proposal and aligner, with the draft settings to measure.
        stock: the same weights for the baselines.
        prompts: ids, all of one length: the batch.
        params: `max_tokens` tokens are generated for each prompt whatever they are; `temperature` 0 is greedy for all.
        repeats: timed runs of each contestant, after one to warm up; the median counts.

    Returns:
        `batch`, `context`, `tokens_per_second`, `ratio_to_proposal_hf` and `ratio_to_proposal_engine` by contestant;
        `kernels`, what computes the passes of proposal and aligner in our engine; `acceptance`, `tokens_per_proposal_call` and
        `draft_length` of speculation; `floor_ratio`, its time over the time in which memory could be read; `first_token_ms` and
        `next_token_ms`.
    """
    params, model = replace(params, ignore_eos=True), model.with_prefix_cache(0)  # every run reads its prompts
    ids = torch.tensor([list(prompt) for prompt in prompts], device=stock.proposal.device)
    contestants = _contestants(model, stock, ids, params)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats + 1):
        model.pace.tally = Tally() if turn == 1 else model.pace.tally
        for name, run in contestants.items():
            _wait(ids.device)
            started = time.perf_counter()
            run()
            _wait(ids.device)
            times[name].append(time.perf_counter() - started)
    made = len(prompts) * params.max_tokens
    speeds = {name: made / statistics.median(values[1:]) for name, values in times.items()}
    tally = model.pace.tally
    return {
        "batch": len(prompts),
        "context": len(prompts[0]),
        "tokens_per_second": speeds,
        "ratio_to_proposal_hf": {name: speed / speeds["proposal_hf"] for name, speed in speeds.items()},
        "ratio_to_proposal_engine": {name: speed / speeds["proposal_engine"] for name, speed in speeds.items()},
        "kernels": {"proposal": describe_kernels(model.proposal), "aligner": describe_kernels(model.aligners[0])},
        "acceptance": tally.acceptance,
        "tokens_per_proposal_call": tally.tokens_per_call,
        "draft_length": tally.drafted / tally.calls if tally.calls else 0.0,
        "floor_ratio": _floor_ratio(model, stock, params, tally, speeds["aligned_speculative"], len(prompts)),
        **stream_times(model, prompts, params),
    }


def stream_times(model: AlignedModel, prompts: Sequence[Any], params: SamplingParams) -> dict[str, float]:
    """Milliseconds to the first token of each prompt, and from one token to the next: medians over prompts and tokens."""
    started = time.perf_counter()
    arrivals: dict[int, list[float]] = {}
    for event in model.stream(prompts, params):
        arrivals.setdefault(event.prompt_index, []).append(time.perf_counter() - started)
    firsts = [seen[0] for seen in arrivals.values()]
    means = [(seen[-1] - seen[0]) / max(1, len(seen) - 1) for seen in arrivals.values()]
    return {"first_token_ms": 1e3 * statistics.median(firsts), "next_token_ms": 1e3 * statistics.median(means)}


def read_bandwidth(device: torch.device, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second at which a large tensor is read."""
    data = torch.ones(size // 4, device=device)
    best = 0.0
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        data.sum()
        _wait(device)
        best = max(best, size / (time.perf_counter() - started))
    return best


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, for the report."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = device.type == "cuda"
    return {
        "hardware": describe_hardware(),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else peak,
        "bytes_per_second": read_bandwidth(device),
    }


def _contestants(model: AlignedModel, stock: Stock, ids: Tensor, params: SamplingParams) -> dict[str, Callable[[], object]]:
    prompts = ids.tolist()
    alone = AlignedModel(model.proposal, (), model.tokenizer, model.eos_token_ids, max_num_seqs=model.max_num_seqs)
    alone = alone.with_prefix_cache(0)
    tokenwise = model.with_draft_length(0)
    contestants: dict[str, Callable[[], object]] = {
        "proposal_hf": lambda: _generate(stock.proposal, ids, params),
        "two_model_hf": lambda: _two_model_loop(stock, ids, params),
        "proposal_engine": lambda: _complete(alone, prompts, replace(params, weight=None, rule=None)),
        "aligned_tokenwise": lambda: _complete(tokenwise, prompts, params),
        "aligned_speculative": lambda: _complete(model, prompts, params),
    }
    if len(ids) == 1 and _width(stock.proposal) == _width(stock.aligner):
        contestants["assisted_hf"] = lambda: _generate(stock.proposal, ids, params, assistant_model=stock.aligner)
    return contestants


def _complete(model: AlignedModel, prompts: Sequence[Sequence[int]], params: SamplingParams) -> None:
    """Generate, and refuse to time what could not go on."""
    if errors := [one.error for one in model.generate(prompts, params) if one.error is not None]:
        raise DeadRow(errors[0])


def _generate(module: Any, ids: Tensor, params: SamplingParams, **more: Any) -> None:
    """Transformers' own loop, for as many tokens and not fewer."""
    sampling = {"do_sample": True, "temperature": params.temperature} if params.temperature else {"do_sample": False}
    length = {"max_new_tokens": params.max_tokens, "min_new_tokens": params.max_tokens}
    module.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, use_cache=True, **length, **sampling, **more)


@torch.no_grad()
def _two_model_loop(stock: Stock, ids: Tensor, params: SamplingParams) -> Tensor:
    """Product decoding as one writes it in an afternoon: both models, both caches, one token at a time."""
    vocab_size = min(_width(stock.proposal), _width(stock.aligner))
    caches: list[Any] = [None, None]
    token, made = ids, []
    noise = uniforms([0], [0], [0], params.max_tokens, len(ids), ids.device)[0]
    for step in range(params.max_tokens):
        rows = []
        for i, module in enumerate((stock.proposal, stock.aligner)):
            out = module(input_ids=token, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
            caches[i] = out.past_key_values
            rows.append(torch.log_softmax(out.logits[:, -1, :vocab_size].float(), -1))
        probs = ((rows[0] + rows[1]) / (params.temperature or 1.0)).softmax(-1)
        if params.temperature:
            token = torch.searchsorted(probs.cumsum(-1), noise[step].float()[:, None]).clamp(max=probs.shape[-1] - 1)
        else:
            token = probs.argmax(-1, keepdim=True)
        made.append(token)
    return torch.cat(made, 1)


def _floor_ratio(
    model: AlignedModel, stock: Stock, params: SamplingParams, tally: Tally, speed: float, batch: int
) -> float | None:
    """Time per token over the least time: reading every weight that a step needs once, at the measured bandwidth.

    None where our engine keeps the weights in other formats than the stock model: in 8 bits, or as llama.cpp has them.
    """
    whole = sum(parameter.numel() * parameter.element_size() for parameter in stock.proposal.parameters())
    if not tally.calls or tally.tokens_per_call is None or getattr(model.proposal, "num_bytes", whole) != whole:
        return None
    read = _step_bytes(model, stock, params, tally.drafted / tally.calls)
    floor = read / (read_bandwidth(stock.proposal.device) * tally.tokens_per_call * batch)
    return 1 / (speed * floor)


def _step_bytes(model: AlignedModel, stock: Stock, params: SamplingParams, length: float) -> float:
    """Bytes of weights that a step reads with so many drafts.

    An aligner that drafts reads its own once more than that, and so does a drafter, unless all is greedy.
    """
    proposal, aligner = _weight_bytes(stock.proposal), _weight_bytes(stock.aligner)
    tap = tap_of(model.aligners[0])
    if tap is not None:
        layers = sum(p.numel() * p.element_size() for p in stock.proposal.model.layers[:tap].parameters())
        aligner -= layers
        if not model.shaping(params).reads_proposal:
            proposal = layers
    drafter = model.models.drafter
    if drafter.from_aligner:
        return proposal + (length + 1) * aligner
    own = sum(int(getattr(part, "num_bytes", 0)) for part in drafter.models)
    return proposal + aligner + (length + (params.temperature != 0)) * own


def _width(module: Any) -> int:
    return int(module.get_output_embeddings().weight.shape[0])


def _weight_bytes(module: Any) -> int:
    """Bytes of the weights that a step reads: all but an embedding table that is only looked up."""
    table = module.get_input_embeddings().weight
    tied = table.data_ptr() == module.get_output_embeddings().weight.data_ptr()
    total: int = sum(p.numel() * p.element_size() for p in module.parameters())
    return total if tied else total - int(table.numel() * table.element_size())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def load_stock(source: str, dtype: str, device: str | None) -> Any:
    """A stock module from a model's or an aligner's folder."""
    return Aligner.from_pretrained(source, dtype=dtype, device=device).model


def random_prompts(vocab_size: int, batch: int, length: int, seed: int) -> list[list[int]]:
    """Random token ids `[batch, length]`."""
    ids: list[list[int]] = (uniforms([seed], [0], [0], batch * length, 1).view(batch, length) * vocab_size).long().tolist()
    return ids
