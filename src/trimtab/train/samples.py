"""What the finished aligner writes: greedy answers to development prompts, beside the proposal's and the wanted ones.

Likelihood alone does not tell an aligner that flattens what the proposal knows, loops, or never ends. Text does. Nor does the
divergence from a teacher say what the teacher is worth: its own answers stand beside those of whoever learnt from it.
"""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.data.examples import Example
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import Completion, SamplingParams
from trimtab.train.checks import Written, check_texts
from trimtab.train.plan import Plan

__all__ = ["LIMIT", "draw_samples", "open_aligned", "pick_prompts"]

logger = logging.getLogger(__name__)

LIMIT = 64
"""Tokens of an answer at most."""

SHOWN = 3
"""Prompts in the log; all of them are in the report."""


def draw_samples(plan: Plan, output: Path, tokenizer: Any, development: Sequence[Example]) -> dict[str, Any]:
    """Answer some development prompts greedily, by the proposal and by the aligned model that is in the output folder.

    And by the proposal behind the teacher's prompt, if there is one.

    The proposal, which training drops once its rows are cached, is loaded once more, and again dropped.

    Returns:
        `samples`, each with `prompt`, `proposal`, `teacher` (if there is one), `aligned` and `wanted` as texts, the last one
        cut where the others are;
        `sample_figures`, see `check_texts`, which warns where they are bad. Nothing where no samples are wanted, or the
        proposal is behind endpoints.
    """
    if not plan.samples:
        if plan.asked.proposal_endpoint:
            logger.info("no samples of the development prompts are drawn: the proposal is not here, but behind an endpoint")
        return {}
    gc.collect()  # a trainer is a ring of references, and holds its optimizer's state until it is collected
    logger.info("answering %d development prompts, by the proposal and aligned", plan.samples)
    aligned = open_aligned(plan, output, tokenizer)
    examples = pick_prompts(development, plan.samples)
    prompts = [list(example.prompt) for example in examples]
    greedy = SamplingParams(max_tokens=LIMIT, temperature=0.0, seed=0)
    bare, taught = aligned.with_aligners([]), [list(example.teacher) for example in examples]
    written = {"proposal": _written(bare.generate(prompts, greedy))}
    if plan.asked.teacher_prompt is not None:
        written["teacher"] = _written(bare.generate(taught, greedy))
    written["aligned"] = _written(aligned.generate(prompts, greedy))
    cut = [tokenizer.decode(example.chosen[:LIMIT], skip_special_tokens=True).strip() for example in examples]
    ends = [len(example.chosen) <= LIMIT and example.chosen[-1] in aligned.eos_token_ids for example in examples]
    asked = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
    written["wanted"] = Written(cut, ends)
    texts = [asked, *(side.texts for side in written.values())]
    samples = [dict(zip(("prompt", *written), row, strict=True)) for row in zip(*texts, strict=True)]
    for sample in samples[:SHOWN]:
        logger.info("sample\n%s", "\n".join(f"  {name + ':':10}{_short(text)}" for name, text in sample.items()))
    return {"samples": samples, "sample_figures": check_texts(**written)}


def open_aligned(plan: Plan, output: Path, tokenizer: Any) -> AlignedModel:
    """The aligned model of a finished output folder, without a drafter."""
    return AlignedModel.from_pretrained(
        plan.asked.proposal,
        output,
        tokenizer=tokenizer,
        dtype=plan.asked.dtype,
        device=plan.asked.device,
        draft="none",
        num_speculative_tokens=0,
    )


def pick_prompts(examples: Sequence[Example], count: int) -> list[Example]:
    """So many examples from all over the data, each with a prompt of its own, or as many as there are."""
    distinct = list({example.prompt.tobytes(): example for example in reversed(examples)}.values())[::-1]
    count = min(count, len(distinct))
    return [distinct[i * len(distinct) // count] for i in range(count)]


def _written(completions: Sequence[Completion]) -> Written:
    return Written([one.text.strip() for one in completions], [one.finish_reason == "stop" for one in completions])


def _short(text: str) -> str:
    """One line of a text, and of a long one the end."""
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"…{line[-300:]}"
