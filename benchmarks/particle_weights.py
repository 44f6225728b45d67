"""How uneven the weights of particles become with the length of a text: whether the sequence-level law can be sampled at all.

    trimtab demo --out demo-out
    cd demo-out && python ../benchmarks/particle_weights.py --proposal proposal --aligner aligner --input data/held_out.jsonl

For each number of tokens, medians over prompts: the standard deviation of log weights without resampling, in nats, and what the
particles are then worth; with resampling, the same, how many of the first particles the last ones descend from, and the spread
of the estimate of log Z over runs, which is what the figures before it can hide.
"""

import argparse
import dataclasses
import logging
import math
import statistics
from typing import Any

from trimtab import AlignedModel, SamplingParams
from trimtab.data.records import read_records
from trimtab.hardware import describe_hardware


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--input", required=True, help="JSON Lines with a prompt each")
    parser.add_argument("--rule", help="default: the manifest's")
    parser.add_argument("--weight", type=float)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=4, help="of each prompt, for the spread of log Z")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 20, 50, 90])
    parser.add_argument("--ignore_eos", action="store_true", help="texts of one length")
    options = parser.parse_args()
    logging.getLogger("trimtab.decode.particles").setLevel(logging.ERROR)
    model = AlignedModel.from_pretrained(
        options.proposal, options.aligner, rule=options.rule, weight=options.weight, max_num_seqs=128
    )
    prompts = [record.prompt for record in read_records(options.input, need="prompt", answers=False)][: options.prompts]
    shaping = model.shaping(model.defaults)
    print(describe_hardware())
    print(f"rule {shaping.rule}, weights {list(shaping.weights)}, {options.particles} particles, {len(prompts)} prompts")
    print("tokens | length | sd of log w | worth | | worth, resampled | origins | resamplings | sd of log Z-hat")
    for tokens in options.tokens:
        params = SamplingParams(max_tokens=tokens, seed=0, ignore_eos=options.ignore_eos)
        alone = model.generate(prompts, params, sequence_level=f"particles={options.particles},ess=0")
        several = dataclasses.replace(params, n=options.runs)
        done = model.generate(prompts, several, sequence_level=f"particles={options.particles}")
        estimates = [[one.particles.log_z for one in done[i : i + options.runs]] for i in range(0, len(done), options.runs)]
        row = [
            f"{median(len(c.tokens) for d in alone for c in d.particles.completions):.0f}",
            f"{median(spread(d.particles) for d in alone):.1f}",
            f"{median(d.particles.effective_size for d in alone):.1f}",
            "",
            f"{median(d.particles.effective_size for d in done):.1f}",
            f"{median(d.particles.origins for d in done):.0f}",
            f"{median(len(d.particles.resampled) for d in done):.0f}",
            f"{median(map(statistics.stdev, estimates)):.2f}",
        ]
        print(f"{tokens} | {' | '.join(row)}", flush=True)


def spread(particles: Any) -> float:
    """The standard deviation of the log weights, in nats."""
    return statistics.stdev(math.log(max(weight, 1e-300)) for weight in particles.weights)


def median(values: Any) -> float:
    return statistics.median(list(values))


if __name__ == "__main__":
    main()
