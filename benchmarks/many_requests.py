"""Ten thousand short requests through one engine: does its memory stay flat?

python benchmarks/many_requests.py --proposal demo-out/proposal --aligner demo-out/aligner
"""

import argparse
import random
import resource
import time
from pathlib import Path

import torch

from trimtab import AlignedModel, SamplingParams
from trimtab.decode.engine import Engine
from trimtab.hardware import describe_hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AlignedModel.from_pretrained(options.proposal, options.aligner)
    engine = Engine(model.proposal, model.pace, max_num_seqs=32)
    draw, sent, done, tokens = random.Random(0), 0, 0, 0
    started = time.perf_counter()
    while done < options.requests:
        while len(engine) < 48 and sent < options.requests:
            prompt = [draw.randrange(model.proposal.vocab_size) for _ in range(draw.randint(1, 40))]
            engine.submit(model.prepare(prompt, SamplingParams(max_tokens=draw.randint(1, 8), seed=sent), sent))
            sent += 1
        for event in engine.step():
            tokens += 1
            if event.finish_reason:
                done += 1
                if done % (options.requests // 10) == 0:
                    print(f"{done} requests, {tokens} tokens, {time.perf_counter() - started:.0f} s, {resident():.0f} MiB")
    print(describe_hardware())


def resident() -> float:
    """MiB of memory in use now, where the system says; otherwise the most so far."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
