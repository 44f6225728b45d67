"""Does the engine do on this GPU what it does on a CPU, and how fast is it there? One command, at most eight minutes.

    python benchmarks/gpu_check.py --out gpu_check.json

rows     the lean pass against transformers' modules, in float32 and bfloat16, beyond a window, too
graphs   passes replayed as CUDA graphs against the same passes without
tokens   sixty requests that come and go, with drafts and CUDA graphs, against one at a time without either: the same tokens
waits    how often a decoding step waits for the device, as torch's own debug mode sees it
law      samples in bfloat16 against the law that the same rows have: chi-square
speed    a pair of 8B and 1B with random weights, made on the device: what `trimtab bench` measures, for batches of 1, 8 and 32,
         with CUDA graphs and without, as ratios to transformers' `generate` and to the time in which memory could be read

On a CPU all of it runs with tiny shapes: work that would be captured is done again instead, and waits are not counted. Nothing
is fetched. The exit status is 1 if a check fails; speeds fail nothing. What there was no time for is said in the report.
"""

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from trimtab import AlignedModel, SamplingParams
from trimtab.evaluate.speed import Stock, describe_machine, measure_speed, random_prompts
from trimtab.files import write_json
from trimtab.models.graphs import Capture, CudaCapture
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.shapes import make_config

PAIR = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B")
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "query_pre_attn_scalar": 16},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
}
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.15}
"""Of a log-probability. Products of float32 may be in TF32 on a GPU."""
LIKELY = 1e-5
"""A law is doubted where its chi-square is less likely than this."""
BATCHES = (1, 8, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the report, as JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[default: %(default)s]")
    parser.add_argument("--seconds", type=float, default=450.0, help="begin nothing new after so many [default: 450]")
    raise SystemExit(check(**vars(parser.parse_args())))


def check(out: Path, device: str, seconds: float) -> int:
    """Run everything, write the report, print it; the exit status."""
    started, place = time.monotonic(), torch.device(device)
    report: dict[str, Any] = {"torch": torch.__version__, "checks": {}, "speed": [], "left_out": []}
    checks: dict[str, Callable[[torch.device], dict[str, Any]]]
    checks = {"rows": check_rows, "graphs": check_graphs, "tokens": check_tokens, "waits": check_waits, "law": check_law}
    for name, run in checks.items():
        report["checks"][name] = found = run(place)
        print(f"{name:8}{'passed' if found['passed'] else 'FAILED'}  {found}", flush=True)
    models = [make(make_config(name, **({} if place.type == "cuda" else TINY)), place, torch.bfloat16) for name in PAIR]
    for captured in (True, False):
        for batch in BATCHES:
            if time.monotonic() - started > seconds:
                report["left_out"].append({"batch": batch, "cuda_graphs": captured})
                continue
            found = speed(models, place, batch, captured=captured)
            report["speed"].append(found)
            print(table(found), flush=True)
    report |= {**describe_machine(place), "seconds": time.monotonic() - started}
    write_json(out, report)
    print(f"{report['hardware']}: {report['seconds']:.0f} s, left out: {report['left_out'] or 'nothing'}; the report is {out}")
    return int(not all(found["passed"] for found in report["checks"].values()))


def make(config: Any, device: torch.device, dtype: torch.dtype, seed: int = 0, spread: float = 0.02) -> Any:
    """A model with normal weights of this size, made where it is to be."""
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread, generator=generator)
    return model


def tiny(kind: str, device: torch.device, dtype: torch.dtype, seed: int = 0, **fields: Any) -> Any:
    config = CONFIG_MAPPING[kind](**TINY | FAMILIES[kind] | fields)
    return make(config, device, dtype, seed, spread=0.3 if dtype == torch.float32 else 0.1)


def capture_on(device: torch.device) -> Capture:
    """CUDA graphs; on a CPU, work that is done again."""
    return CudaCapture(device) if device.type == "cuda" else again


def again(work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
    result = work()
    return lambda: result.copy_(work()), result


def check_rows(device: torch.device) -> dict[str, Any]:
    """Fourteen tokens at once and one by one, by each family's lean pass, against `model(ids)`."""
    worst: dict[str, float] = {}
    ids = torch.arange(1, 15, device=device)[None] * 7 % 128
    for kind in FAMILIES:
        for dtype in TOLERANCES:
            model = tiny(kind, device, dtype)
            with torch.no_grad():
                expected = torch.log_softmax(model(ids).logits.float(), -1)
            ours = HuggingFaceLM(model)
            state = ours.new_state(1, 14)
            one_by_one = torch.cat([ours.extend(state, ids[:, [i]], [1]) for i in range(14)], 1)
            found = [ours.extend(ours.new_state(1, 14), ids, [14]), one_by_one]
            lean = ours.kernels.startswith("lean")
            far = max(float((rows - expected).abs().max()) for rows in found) if lean else float("inf")
            worst[f"{kind}, {str(dtype).removeprefix('torch.')}"] = far
    limits = [TOLERANCES[dtype] for _ in FAMILIES for dtype in TOLERANCES]
    return {"passed": all(far <= limit for far, limit in zip(worst.values(), limits, strict=True)), "furthest": worst}


def check_graphs(device: torch.device) -> dict[str, Any]:
    """Ragged slots, some passes each of several shapes, until they are replayed."""
    model = tiny("llama", device, torch.bfloat16)
    replayed: Counter[str] = Counter()
    capture = capture_on(device)

    def counted(work: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        replay, result = capture(work)

        def run() -> None:
            replayed["passes"] += 1
            replay()

        return run, result

    plain, captured = HuggingFaceLM(model, owned=True), HuggingFaceLM(model, owned=True, capture=counted)
    furthest, states = 0.0, [one.new_state(4, 100) for one in (plain, captured)]
    for turn in range(24):
        width = (1, 4)[turn % 2]
        counts = [1 + (turn + slot) % width for slot in range(4)]
        tokens = torch.arange(4 * width, device=device).view(4, width) * (turn + 3) % 128
        rows = [one.extend(state, tokens, counts) for one, state in zip((plain, captured), states, strict=True)]
        for slot, count in enumerate(counts):
            furthest = max(furthest, float((rows[0][slot, :count] - rows[1][slot, :count]).abs().max()))
    return {"passed": furthest <= TOLERANCES[torch.bfloat16] and replayed["passes"] > 8, "furthest": furthest, **replayed}


def check_tokens(device: torch.device) -> dict[str, Any]:
    """Requests that differ in all that a batch makes of them; four slots, so that they wait, come and go."""
    models = [tiny("llama", device, torch.float32, seed) for seed in (1, 2)]
    prompts = [[1 + (i * j) % 126 for j in range(1, 3 + i % 23)] for i in range(60)]
    params = [
        SamplingParams(max_tokens=1 + i * 7 % 40, temperature=(1.0, 0.0, 0.7)[i % 3], top_p=(1.0, 0.9)[i % 2], seed=i)
        for i in range(60)
    ]
    capture = capture_on(device)
    fast = [HuggingFaceLM(model, owned=True, capture=capture) for model in models]
    slow = [HuggingFaceLM(model, lean=False) for model in models]
    drafting = AlignedModel(fast[0], fast[1:], eos_token_ids=[0], max_num_seqs=4)
    plain = AlignedModel(slow[0], slow[1:], eos_token_ids=[0], max_num_seqs=1, num_speculative_tokens=0)
    found = [one.tokens for one in drafting.generate(prompts, params)]
    expected = [one.tokens for one in plain.generate(prompts, params)]
    same = sum(map(tuple.__eq__, map(tuple, found), map(tuple, expected)))
    return {"passed": same == len(prompts), "same": same, "of": len(prompts), "drafts_accepted": drafting.pace.tally.accepted}


def check_waits(device: torch.device) -> dict[str, Any]:
    """One wait a step, its reading of what was decided; None on a CPU."""
    model = AlignedModel(*pair_of(device, torch.bfloat16), num_speculative_tokens=3, prefix_cache_tokens=0)
    params = SamplingParams(max_tokens=48, seed=0, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    model.generate(prompts, params)
    if device.type != "cuda":
        return {"passed": True, "waits_per_step": None}
    before = model.pace.tally.calls
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            model.generate(prompts, params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = (model.pace.tally.calls - before) / len(prompts)
    waits = sum("called a synchronizing" in str(warning.message) for warning in seen) / max(steps, 1)
    return {"passed": waits <= 2, "waits_per_step": waits}  # the first steps of a request have some more


def check_law(device: torch.device) -> dict[str, Any]:
    """Two tokens behind a prompt, with drafts, four thousand times."""
    vocab, count = 6, 4000
    model = AlignedModel(*pair_of(device, torch.bfloat16, vocab_size=vocab), eos_token_ids=[0], num_speculative_tokens=2)
    params = SamplingParams(max_tokens=2, seed=0, ignore_eos=True, n=count)
    drawn = Counter(tuple(one.tokens) for one in model.generate([[1, 2, 3]], params))
    texts = [[one, two] for one in range(vocab) for two in range(vocab)]
    expected = [count * torch.tensor(sum(s.aligned)).exp().item() for s in model.score([[1, 2, 3]] * len(texts), texts)]
    common = [(drawn[tuple(text)], e) for text, e in zip(texts, expected, strict=True) if e >= 5]
    rest = (count - sum(o for o, _ in common), count - sum(e for _, e in common))
    cells = [*common, *([rest] if rest[1] >= 5 else [])]
    statistic = sum((o - e) ** 2 / e for o, e in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    likelihood = float(torch.special.gammaincc(half[0], half[1]))
    return {"passed": likelihood > LIKELY, "chi_square": statistic, "cells": len(cells), "p": likelihood}


def pair_of(device: torch.device, dtype: torch.dtype, **fields: Any) -> tuple[HuggingFaceLM, list[HuggingFaceLM]]:
    """A tiny proposal and its aligner."""
    proposal, aligner = (HuggingFaceLM(tiny("llama", device, dtype, seed, **fields), owned=True) for seed in (1, 2))
    return proposal, [aligner]


def speed(models: Sequence[Any], device: torch.device, batch: int, *, captured: bool) -> dict[str, Any]:
    """`trimtab bench` of one batch."""
    capture = capture_on(device) if captured else None
    proposal, aligner = (HuggingFaceLM(model, owned=True, capture=capture) for model in models)
    aligned = AlignedModel(proposal, [aligner], max_num_seqs=batch)
    context, tokens = (128, 48) if device.type == "cuda" else (8, 4)
    prompts = random_prompts(proposal.vocab_size, batch, context, 0)
    params = SamplingParams(max_tokens=tokens, seed=0, temperature=0.7)
    return {"cuda_graphs": captured, **measure_speed(aligned, Stock(*models), prompts, params, repeats=2)}


def table(found: dict[str, Any]) -> str:
    """What was measured of one batch."""
    graphs = "with" if found["cuda_graphs"] else "without"
    floor = "" if found["floor_ratio"] is None else f", {found['floor_ratio']:.1f} × the bandwidth floor"
    lines = [f"batch {found['batch']}, {graphs} CUDA graphs{floor}"]
    for name, value in found["tokens_per_second"].items():
        lines.append(f"  {name:24}{value:12.1f} tokens/s{found['ratio_to_proposal_hf'][name]:8.2f} × generate")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
