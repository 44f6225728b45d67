"""What decoding costs behind a hand-over, against the proposal alone at the same place of the same text.

    python benchmarks/handover_speed.py --proposal P --aligner A

Each answer is handed over after its first tokens, and goes on beside a bare proposal whose prompt ends with them, a token of
each in turn. Both are greedy and nobody drafts, so that the texts are the same; both run the same weights, for two copies of
them differ in speed by more than what is measured. The clock is the process's own; run it on one thread.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator

import torch
from draft_speed import prompts_of
from lockstep import in_lockstep

from trimtab import AlignedModel, SamplingParams, TokenEvent
from trimtab.hardware import describe_hardware

WARM = 4
"""Tokens behind the hand-over, and of the bare proposal's, that are not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--window", type=int, default=6, help="tokens before the hand-over")
    parser.add_argument("--prompts", type=int, default=4, help="of each kind")
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AlignedModel.from_pretrained(options.proposal, options.aligner, draft="none", prefix_cache_tokens=0)
    alone = model.with_aligners([])
    handover = f"confidence(window={options.window}, threshold=0)"
    asked = SamplingParams(max_tokens=options.max_tokens, temperature=0, handover=handover, ignore_eos=True)
    kinds = prompts_of(model, options.prompts, None)
    per_token: dict[str, list[float]] = {"handed over": [], "alone": [], "aligned": []}
    for prompt in [prompt for prompts in kinds.values() for prompt in prompts]:
        ids = model.encoder.prompt(prompt)
        (begun,) = model.generate(prompt, SamplingParams(max_tokens=options.window, temperature=0, handover=handover))
        if len(begun.tokens) < options.window:
            continue
        rest = SamplingParams(max_tokens=options.max_tokens - options.window, temperature=0, ignore_eos=True)
        streams = {
            "handed over": _from(model.stream([ids], asked), options.window),
            "alone": alone.stream([[*ids, *begun.tokens]], rest),
            "aligned": _from(model.stream([ids], dataclasses.replace(asked, handover=None)), options.window),
        }
        runs = in_lockstep(streams)
        assert runs["handed over"].tokens == runs["alone"].tokens, "the texts differ"
        for name, run in runs.items():
            per_token[name] += run.seconds[WARM:-1]
    medians = {name: statistics.median(times) for name, times in per_token.items()}
    report = {
        "hardware": describe_hardware(),
        "threads": options.threads,
        "tokens": len(per_token["alone"]),
        "milliseconds_per_token": {name: 1000 * median for name, median in medians.items()},
        "ratio_to_alone": {name: median / medians["alone"] for name, median in medians.items()},
    }
    print(json.dumps(report))


def _from(stream: Iterator[TokenEvent], start: int) -> Iterator[TokenEvent]:
    """A stream behind its first tokens."""
    for _ in range(start):
        next(stream)
    return stream


if __name__ == "__main__":
    main()
