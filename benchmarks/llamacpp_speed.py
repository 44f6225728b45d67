"""How fast is a GGUF model by `--backend llamacpp`, bare and aligned, against llama.cpp's own server? One stream, greedy.

    pip install -c constraints.txt '.[llamacpp]' xllamacpp
    python benchmarks/llamacpp_speed.py model.gguf --aligner aligner.gguf

The contestants: llama.cpp's server (PyPI's xllamacpp) on the same file, with as many threads; our engine with the proposal
alone; and with each aligner, token by token and as it drafts by default. Each has a process of its own, for threads of several
get in each other's way, and they take turns. A turn is some answers behind one that does not count, prompts included.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from trimtab import AlignedModel, SamplingParams
from trimtab.hardware import describe_hardware

PROMPT = "Write about the sea, the ships that cross it, and the small rudder that turns the large one."
SERVER, BARE = "llama.cpp's server", "bare"
ANSWERS = 3
"""Of a turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--aligner", action="append", default=[], help="a GGUF file or a folder; may repeat")
    parser.add_argument("--max_tokens", type=int, default=128, help="[default: %(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[default: %(default)s]")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.only is not None:
        measure(contestant(said.model, said.only, said.max_tokens))
        return
    names = [SERVER, BARE, *(f"{name}, {how}" for name in said.aligner for how in ("token by token", "with drafts"))]
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(said.turns):
        for name in names:
            command = [sys.executable, __file__, said.model, "--max_tokens", str(said.max_tokens), "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            times[name] += map(float, done.stdout.splitlines()[-1].split())
    speeds = {name: said.max_tokens / statistics.median(taken) for name, taken in times.items()}
    for name, speed in speeds.items():
        print(f"{name:48}{speed:8.1f} tokens/s{speed / speeds[SERVER]:8.2f}")
    print(f"{said.model}, {describe_hardware()}")


def measure(run: Callable[[], None]) -> None:
    """Print the seconds of each answer but the first."""
    taken = []
    for _ in range(ANSWERS + 1):
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    print(*taken[1:])


def contestant(model: str, name: str, tokens: int) -> Callable[[], None]:
    """What writes so many tokens."""
    if name == SERVER:
        return server(model, tokens)
    params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    aligner, _, how = name.rpartition(", ")
    loaded = AlignedModel.from_pretrained(model, aligner or None, backend="llamacpp", prefix_cache_tokens=0)
    loaded = loaded.with_draft_length(0) if how == "token by token" else loaded

    def run() -> None:
        if (error := loaded.generate([PROMPT], params)[0].error) is not None:
            raise SystemExit(error)

    return run


def server(model: str, tokens: int) -> Callable[[], None]:
    """llama.cpp's own."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = model, 1024, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    running = xllamacpp.Server(params)
    asked = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def run() -> None:
        made = running.handle_completions(asked)["usage"]["completion_tokens"]
        if made != tokens:
            raise SystemExit(f"the server wrote {made} tokens, not {tokens}")

    return run


if __name__ == "__main__":
    main()
