"""Throughput of vLLM with aligners, against vLLM alone, in one run.

VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/vllm_speed.py --proposal pair/proposal --aligner pair/aligner

Run it in an environment with vLLM (docs/vllm.md). Three engines live at a time, each in a process of its own: vLLM that does
not find the plugin, the same again, and vLLM with it, which is asked for bare text, too. They take turns.
"""

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

CONTESTANTS: dict[str, tuple[str, dict[str, str]]] = {
    "alone": ("alone", {}),
    "alone again": ("alone again", {}),  # the same twice: how far two engines differ that do the same
    "bare": ("plugin", {}),
    "aligned": ("plugin", {"aligner": "aligned"}),
}
"""Which engine each asks, and what for."""
PROMPT = 32
"""Tokens of each prompt; all differ."""


def main() -> None:
    options = parse()
    context = multiprocessing.get_context("spawn")
    engines: dict[str, Connection] = {}
    for kind in ("alone", "alone again", "plugin"):
        engines[kind], theirs = context.Pipe()
        context.Process(target=engine, args=(theirs, kind == "plugin", vars(options))).start()
        theirs.close()  # so that an engine that fails is noticed
        ready = engines[kind].recv()
    report: dict[str, Any] = {**ready, "max_tokens": options.max_tokens, "dtype": options.dtype}
    bound = report["proposal_bytes"] / (report["proposal_bytes"] + report["aligner_bytes"])
    report["proposal / (proposal + aligner) bytes"] = round(bound, 3)
    for batch in options.batch:
        speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        for turn in range(options.repeats + 1):
            names = list(CONTESTANTS)
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                kind, asked = CONTESTANTS[name]
                engines[kind].send((batch, asked, turn))
                speeds[name].append(engines[kind].recv())
        middle = {name: statistics.median(found[1:]) for name, found in speeds.items()}  # the first turn warms up
        report[f"{batch} at once"] = {
            "tokens_per_second": {name: round(speed, 1) for name, speed in middle.items()},
            **{f"{name} / alone": round(middle[name] / middle["alone"], 3) for name in CONTESTANTS if name != "alone"},
        }
    for connection in engines.values():
        connection.send(None)
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--max_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    return parser.parse_args()


def engine(connection: Connection, plugin: bool, options: dict[str, Any]) -> None:
    """One engine: answers (batch, extra_args, seed) with tokens a second, until it is sent None."""
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    if not plugin:
        hide_plugin()
    from vllm import LLM, SamplingParams

    from trimtab.hardware import describe_hardware
    from trimtab.models.loading import load_model

    config = {"trimtab": {"aligners": {"aligned": options["aligner"]}}} if plugin else {}
    llm = LLM(
        options["proposal"],
        dtype=options["dtype"],
        max_model_len=PROMPT + options["max_tokens"] + 16,
        max_num_seqs=max(options["batch"]),
        distributed_executor_backend="uni",
        gpu_memory_utilization=0.25,
        enable_prefix_caching=False,
        additional_config=config,
    )
    sizes = [sum(p.nbytes for p in load_model(options[name]).parameters()) for name in ("proposal", "aligner")]
    facts = {"hardware": describe_hardware(), "proposal_bytes": sizes[0], "aligner_bytes": sizes[1]}
    connection.send(facts | ({"plugin, microseconds of a bare step": time_hooks(llm)} if plugin else {}))
    vocabulary = llm.get_tokenizer().vocab_size
    while (work := connection.recv()) is not None:
        batch, asked, turn = work
        params = SamplingParams(max_tokens=options["max_tokens"], ignore_eos=True, extra_args=asked or None)
        prompts: list[Any] = [
            {"prompt_token_ids": [1 + (7919 * (turn * batch + i) + 31 * j) % (vocabulary - 1) for j in range(PROMPT)]}
            for i in range(batch)
        ]
        started = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        connection.send(batch * options["max_tokens"] / (time.perf_counter() - started))


def time_hooks(llm: Any, steps: int = 10_000) -> float:
    """What the plugin does at a step without aligned requests."""
    from trimtab.vllm import internals

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    processor = internals._ours(runner.input_batch.logitsprocs)
    started = time.perf_counter()
    for _ in range(steps):
        processor.update_state(None)
        internals._sample(lambda *_: None, runner, None, None)
        internals._bookkeeping_sync(lambda *_: None, runner)
    return round(1e6 * (time.perf_counter() - started) / steps, 1)


def hide_plugin() -> None:
    """Let vLLM find no entry point of ours in this process."""
    theirs = importlib.metadata.entry_points

    def others(**wanted: Any) -> Any:
        found = theirs(**wanted)
        return [p for p in found if p.name != "trimtab"] if str(wanted.get("group")).startswith("vllm.") else found

    importlib.metadata.entry_points = others


if __name__ == "__main__":
    main()
