"""What a decoding step does to its rows, in time, as glibc gives memory and as the commands ask it to.

OMP_NUM_THREADS=1 python benchmarks/row_cost.py
"""

import subprocess
import sys
import time
from collections.abc import Callable

import torch

from trimtab.core.noise import uniforms
from trimtab.core.rules import Product
from trimtab.core.speculation import draft_tokens, verify
from trimtab.hardware import describe_hardware, keep_freed_memory

SHAPES = ((1, 2048), (32, 2048), (1, 32_000), (32, 32_000), (8, 151_936))


def main() -> None:
    for kept in (False, True):
        subprocess.run([sys.executable, __file__, "kept" if kept else "given back"], check=True)
    print(describe_hardware())


def measure(kept: bool) -> None:
    if kept:
        keep_freed_memory()
    print(f"freed memory {'kept' if kept else 'given back'}; microseconds, the least of nine")
    generator = torch.Generator().manual_seed(0)
    for batch, vocab in SHAPES:
        logp, logq = (torch.randn(batch, 1, vocab, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
        noise = uniforms(range(batch), [0] * batch, [0] * batch, 1, 3)
        drafts, limits, one = draft_tokens(logq, noise), torch.zeros(batch, dtype=torch.long), torch.ones(batch, 1, 1)
        costs = {
            "rule": least(lambda p=logp, q=logq, w=one: Product().target(p, [q], w)),
            "draft": least(lambda q=logq, u=noise: draft_tokens(q, u)),
            "verify": least(lambda p=logp, d=drafts, q=logq, n=limits, u=noise: verify(p, d, q, n, u)),
        }
        print(f"  {batch:3} rows of {vocab:7}: " + ", ".join(f"{name} {cost:7.0f}" for name, cost in costs.items()))


def least(work: Callable[[], object]) -> float:
    """Microseconds of the fastest of nine runs."""
    times = []
    for _ in range(10):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times[1:])


if __name__ == "__main__":
    measure(sys.argv[1] == "kept") if sys.argv[1:] else main()
