"""How fast a rewriter that changes little is, by its answer's drafts: ratios to the same rewriting without drafts, in one run.

    make real-model && python benchmarks/rewriter_speed.py

The real model is asked to write given texts again, and does so nearly letter by letter: a rewriter near to the identity. Texts
are the facts of towns (`benchmarks/real/towns.tsv`). It prints how alike answers and rewritings are, how many positions
drafts were right at, and the speeds as ratios, medians of interleaved repeats.
"""

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path

import torch

from trimtab.data.rewrite_template import RewriteTemplate
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.drafters.ngram import NgramDrafter
from trimtab.decode.pace import Tally
from trimtab.decode.request import SamplingParams
from trimtab.hardware import describe_hardware
from trimtab.models.loading import quiet_loading
from trimtab.rewriting.rewriter import Rewriter

TEMPLATE = RewriteTemplate("Repeat the following text word by word. Do not change anything.\n\n{answer}", chat=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("real-model/SmolLM2-135M-Instruct.Q4_1.gguf"))
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1, help="texts rewritten at once [default: %(default)s]")
    parser.add_argument("--temperature", type=float, default=0.0)
    said = parser.parse_args()
    quiet_loading()
    texts = _texts(said.texts)
    model = AlignedModel.from_pretrained(said.model, dtype="float32", draft="none", max_num_seqs=said.batch)
    plain, drafted = Rewriter(model, TEMPLATE, drafts=False), Rewriter(model, TEMPLATE)
    looked_up = Rewriter(model, TEMPLATE, drafts=False)
    looked_up.model = model.with_drafter(NgramDrafter())
    ways = {"none": plain, "ngram": looked_up, "answer": drafted}
    params = SamplingParams(max_tokens=200, temperature=said.temperature, seed=0)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    tallies: dict[str, Tally] = {}
    said_by: dict[str, Sequence[str]] = {}
    for _ in range(said.repeats + 1):  # the first run warms up
        for name, way in ways.items():
            way.model.pace.tally = Tally()
            began = time.perf_counter()
            done = [one for i in range(0, len(texts), said.batch) for one in _some(way, texts[i : i + said.batch], params)]
            seconds[name].append(time.perf_counter() - began)
            said_by[name], tallies[name] = [one.text for one in done], way.model.pace.tally
    tokens = sum(len(one.completion.tokens) for one in done if one.completion is not None)
    alike = [SequenceMatcher(None, text, new).ratio() for text, new in zip(texts, said_by["answer"], strict=True)]
    equal = all(other == said_by["none"] for other in said_by.values())
    print(f"{describe_hardware()}, {torch.get_num_threads()} threads, batch {said.batch}, temperature {said.temperature:g}")
    about = f"{len(texts)} texts, {tokens} tokens; likeness {sum(alike) / len(alike):.3f}"
    print(f"{about}; equal with and without drafts: {equal}")
    base = statistics.median(seconds["none"][1:])
    for name, tally in tallies.items():
        spent = statistics.median(seconds[name][1:])
        print(f"--draft {name:8} {base / spent:6.2f} x none   drafts right {tally.acceptance or 0:.3f}   {tally}")


def _some(way: Rewriter, texts: Sequence[str], params: SamplingParams) -> list:
    return way.rewrite(["Repeat."] * len(texts), texts, params)


def _texts(count: int) -> list[str]:
    with open(Path(__file__).parent / "real/towns.tsv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))[: 3 * count]
    words = [". ".join(f"The {name} is {value}" for name, value in row.items()) + "." for row in rows]
    return [" ".join(words[3 * i : 3 * i + 3]) for i in range(count)]


if __name__ == "__main__":
    main()
