"""How much faster drafts that are looked up make aligned text, and that they leave it as it is.

    python benchmarks/draft_speed.py --proposal P --aligner A --draft ngram --draft corpus:answers.table

Every prompt is answered with all drafters at once, a token of each in turn, so that whatever else the machine does slows all
of them; `none` is the baseline. Prompts of three kinds are made of what every Python has: *code* to be repeated (the standard
library), *text* to be copied (the topics of its help), and *random* tokens, where nothing matches. Those of a data set can be
added. The clock is the process's own; run it on one thread.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from lockstep import in_lockstep

from trimtab import AlignedModel, SamplingParams
from trimtab.core.noise import uniforms
from trimtab.data.records import read_records
from trimtab.decode.drafters import Given, as_drafter
from trimtab.decode.pace import Pace
from trimtab.hardware import describe_hardware

KINDS = ("code", "text", "random", "dataset")
CHARACTERS = 900
"""Of what is to be copied."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", help="without one, the bare proposal")
    parser.add_argument("--draft", action="append", default=[], help="beside none; may repeat")
    parser.add_argument("--dataset", help="further prompts, in a TRL layout")
    parser.add_argument("--kind", action="append", choices=KINDS, help="of prompts; may repeat [default: all there are]")
    parser.add_argument("--prompts", type=int, default=6, help="of each kind")
    parser.add_argument("--max_tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, action="append", help="may repeat [default: 0, 0.7 and 1]")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if "dataset" in (options.kind or ()) and not options.dataset:
        parser.error("--kind dataset needs --dataset")
    torch.set_num_threads(options.threads)
    base = AlignedModel.from_pretrained(options.proposal, options.aligner, draft="none", prefix_cache_tokens=0)
    models = {"none": base} | {draft: with_drafter(base, draft) for draft in options.draft or ["ngram"]}
    report: dict[str, Any] = {"hardware": describe_hardware(), "threads": options.threads, "runs": []}
    every = prompts_of(base, options.prompts, options.dataset)
    for kind, prompts in {kind: every[kind] for kind in options.kind or every}.items():
        for temperature in options.temperature or [0.0, 0.7, 1.0]:
            found = measure(models, prompts, options.max_tokens, temperature)
            report["runs"].append({"kind": kind, "temperature": temperature, **found})
            print(json.dumps(report["runs"][-1]), flush=True)
    print(json.dumps(report))


def with_drafter(base: AlignedModel, draft: str) -> AlignedModel:
    """The same models with another drafter, which has learned nothing yet."""
    drafter = as_drafter(draft, Given(base.tokenizer))
    how: dict[str, Any] = {"manifests": base._manifests, "draft": drafter, "prefix_cache_tokens": 0}
    return AlignedModel(base.proposal, base.aligners, base.tokenizer, base.eos_token_ids, **how)


def prompts_of(model: AlignedModel, count: int, dataset: str | None) -> dict[str, list[Any]]:
    """Prompts of each kind: chats where the model has a template for them."""
    chats = bool(getattr(model.tokenizer, "chat_template", None))

    def ask(words: str, what: str) -> Any:
        text = f"{words}\n{what[:CHARACTERS]}"
        return [{"role": "user", "content": text}] if chats else f"{text}\n\n{what[:80]}"

    files = sorted(Path(json.__file__).parent.parent.glob("[e-m]*.py"))[:count]
    topics = __import__("pydoc_data.topics", fromlist=["topics"]).topics
    texts = [topics[name] for name in sorted(topics) if len(topics[name]) > CHARACTERS][:: max(1, len(topics) // (3 * count))][
        :count
    ]
    noise = uniforms(range(count), [0] * count, [0] * count, 40, 1)[..., 0] * model.proposal.vocab_size
    prompts = {
        "code": [ask("Repeat this code:", file.read_text(encoding="utf-8")[2000:]) for file in files],
        "text": [ask("Copy this text, word for word:", text) for text in texts],
        "random": noise.long().tolist(),
    }
    if dataset:
        prompts["dataset"] = [record.prompt for record in read_records(dataset, need="prompt", limit=count)]
    return prompts


def measure(models: dict[str, AlignedModel], prompts: list[Any], max_tokens: int, temperature: float) -> dict[str, Any]:
    """Speeds as ratios to `none`, over all prompts but the first, which warms up."""
    seconds: dict[str, float] = dict.fromkeys(models, 0.0)
    tokens = differing = 0
    for model in models.values():
        model.pace = Pace()
    for i, prompt in enumerate(prompts):
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=i)
        streams = {name: model.stream(prompt, params) for name, model in models.items()}
        runs = in_lockstep(streams)
        for name, run in runs.items():
            seconds[name] += sum(run.seconds) * (i > 0)
        found = {name: run.tokens for name, run in runs.items()}
        tokens += len(found["none"]) * (i > 0)
        differing += any(one != found["none"] for one in found.values())
    tallies = {name: model.pace.tally for name, model in models.items()}
    return {
        "tokens": tokens,
        "texts_that_differ": differing,
        "tokens_per_second": {name: tokens / spent for name, spent in seconds.items()},
        "ratio_to_none": {name: seconds["none"] / spent for name, spent in seconds.items()},
        "acceptance": {name: tally.acceptance for name, tally in tallies.items()},
        "tokens_per_proposal_call": {name: tally.tokens_per_call for name, tally in tallies.items()},
    }


if __name__ == "__main__":
    main()
