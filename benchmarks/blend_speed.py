"""A hundred requests with a blend of LoRA aligners each: what do their blends cost, if all differ, beside one for all?

OMP_NUM_THREADS=1 python benchmarks/blend_speed.py

The models are random ones of a given shape. Times are medians of repeats that take turns. *Pass* is one step of the aligners'
base alone, where blends cost most; *engine* is whole decoding with a proposal, tokens of a hundred requests a second.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab import AlignedModel, SamplingParams
from trimtab.hardware import describe_hardware, keep_freed_memory
from trimtab.models import adapter_mixing
from trimtab.models.adapter_layout import Layout, Shape
from trimtab.models.adapter_values import Adapter
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.blends import blended
from trimtab.models.huggingface import HuggingFaceLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--hidden", type=int, nargs=2, default=(256, 192), help="of the proposal and of the aligners' base")
    parser.add_argument("--layers", type=int, nargs=2, default=(4, 4))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--adapters", type=int, nargs="+", default=(3, 8, 16, 32))
    parser.add_argument("--parts", type=int, default=3, help="adapters of a blend")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    keep_freed_memory()
    large, small = (model(hidden, layers) for hidden, layers in zip(options.hidden, options.layers, strict=True))
    proposal, pool = HuggingFaceLM(large, owned=True), AdapterPool(small, owned=True)
    print(f"{options.requests} requests, {options.parts} parts of rank {options.rank} a blend; ratios to one blend for all")
    for count in options.adapters:
        adapters = [adapter(pool, options.rank, seed) for seed in range(count)]
        draw = random.Random(count)
        different = [weights(draw, count, options.parts) for _ in range(options.requests)]
        for name, run in (("pass", passes), ("engine", engine)):
            few, contests = adapter_mixing.FEW, {}
            for way, limit in (("stacked", 10**6), ("gathered", 0)):
                contests[f"different, {way}"] = run(pool, proposal, adapters, different, limit, options)
            contests["one"] = run(pool, proposal, adapters, different[:1] * options.requests, few, options)
            taken: dict[str, list[float]] = {contest: [] for contest in contests}
            for _ in range(options.repeats):
                for contest, work in contests.items():
                    taken[contest].append(work())
            adapter_mixing.FEW = few
            one = statistics.median(taken["one"])
            ratios = {contest: one / statistics.median(times) for contest, times in taken.items()}
            used = "stacked" if count <= few else "gathered"
            shown = ", ".join(f"{contest} {ratio:.2f}" for contest, ratio in ratios.items())
            print(f"  {count:3} adapters, {name:6}: one {1e3 * one:7.1f} ms; {shown} (in use: {used})", flush=True)
    print(describe_hardware())


def model(hidden: int, layers: int) -> Any:
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(config).eval()


def adapter(pool: AdapterPool, rank: int, seed: int) -> Adapted:
    """A random one of all linear layers."""
    layout, shape = Layout(pool.model), Shape(rank, (0, 1, 2, 3))
    flat = torch.randn(layout.size(shape), generator=torch.Generator().manual_seed(seed)).mul_(0.01)
    return Adapted(pool, Adapter(str(seed), flat, shape, layout))


def weights(draw: random.Random, count: int, parts: int) -> list[float]:
    found = [0.0] * count
    for place in draw.sample(range(count), min(parts, count)):
        found[place] = draw.uniform(-1, 1)
    return found


def passes(pool: Any, _: Any, adapters: Any, asked: Any, limit: int, options: Any) -> Callable[[], float]:
    """Seconds of one step of all requests; the first, which puts adapters side by side, is not timed."""
    tokens, counts = torch.zeros(len(asked), 1, dtype=torch.long), [1] * len(asked)

    def work() -> float:
        adapter_mixing.FEW = limit
        state = pool.new_state(len(asked), 16)
        state.adapters = [blended(adapters, weights).adapter for weights in asked]
        pool.extend(state, tokens, counts)
        started = time.perf_counter()
        for _ in range(3):
            pool.extend(state, tokens, counts)
        return (time.perf_counter() - started) / 3

    return work


def engine(_: Any, proposal: Any, adapters: Any, asked: Any, limit: int, options: Any) -> Callable[[], float]:
    """Seconds of whole decoding, prompts and what is put side by side included."""
    aligned = AlignedModel(proposal, adapters, num_speculative_tokens=0, max_num_seqs=len(asked), prefix_cache_tokens=0)
    prompts = [[1 + i % 9, 2, 3, 4] for i in range(len(asked))]
    params = [
        SamplingParams(max_tokens=options.tokens, ignore_eos=True, seed=i, blend="weights", weight=weights, rule_weight=0.5)
        for i, weights in enumerate(asked)
    ]

    def work() -> float:
        adapter_mixing.FEW = limit
        started = time.perf_counter()
        aligned.generate(prompts, params)
        return time.perf_counter() - started

    return work


if __name__ == "__main__":
    main()
