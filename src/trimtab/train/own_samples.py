"""What a proposal says itself: examples to distil from, drawn here, as token ids, and resumably.

Prompts come from a data set, or from the proposal, too. A chat model is given what its template writes before a user's first
message, and so speaks as the user; then it answers that (the idea of Magpie, arXiv 2406.08464). A model without a template
goes on from its begin of sequence, or from its end of sequence if it has no other. Every sample has seeds of its own, so an
interrupted run draws the same ones.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.data.encoding import MARK, Encoder
from trimtab.data.examples import Example
from trimtab.data.prompts import Chat
from trimtab.data.records import Record
from trimtab.data.template import render_chat
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import Completion, SamplingParams
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.jsonlines import ResumableLines

__all__ = ["draw_samples", "longest_sample", "read_samples"]

logger = logging.getLogger(__name__)

QUESTION = 128
"""Most tokens of what a proposal says as the user; no more than a quarter of `max_length`."""


def draw_samples(
    model: AlignedModel,
    records: Sequence[Record] | None,
    out: Path,
    header: Mapping[str, Any],
    *,
    count: int,
    max_tokens: int,
    max_length: int,
    seed: int,
) -> None:
    """Write a proposal's samples to `out`, going on where an interrupted run stopped: `{"prompt": ids, "answer": ids}` each.

    Args:
        model: the bare proposal.
        records: the prompts, taken in turn; None to let the proposal say them.
        out: a `.jsonl` file.
        header: what tells this run from others.
        count: how many samples.
        max_tokens: most tokens of an answer.
        max_length: most tokens of a prompt and its answer; prompts of a data set that leave no room are left out.
        seed: of the first sample.

    Raises:
        DataError: a prompt cannot be encoded, or none leaves room.
        InvalidOption: nothing says where the proposal should begin without prompts.
    """
    asks = records is None and bool(model.tokenizer.chat_template)
    known = [] if asks else [_beginning(model)] if records is None else _encoded(model, records, max_length)
    with ResumableLines(out, header) as lines:
        for first in range(lines.done, count, model.max_num_seqs):
            places = range(first, min(count, first + model.max_num_seqs))
            if asks:
                prompts = _questions(model, [seed + 2 * i + 1 for i in places], min(QUESTION, max_length // 4))
            else:
                prompts = [known[i % len(known)] for i in places]
            if (longest := max(map(len, prompts))) >= max_length:
                raise InvalidOption(f"max_length {max_length} leaves no room for an answer to {longest} tokens: raise it")
            params = [
                SamplingParams(seed=seed + 2 * i, max_tokens=min(max_tokens, max_length - len(prompt)))
                for i, prompt in zip(places, prompts, strict=True)
            ]
            drawn = model.generate(prompts, params)
            lines.write(_row(prompt, completion) for prompt, completion in zip(prompts, drawn, strict=True))
            logger.info("drew %d of %d samples", places[-1] + 1, count)


def read_samples(path: Path) -> list[Example]:
    """The samples in a file that `draw_samples` wrote, those that could not go on left out.

    Raises:
        DataError: fewer than two are left.
    """
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    examples = [Example(row["prompt"], row["answer"], []) for row in rows if "error" not in row]
    if len(examples) < len(rows):
        logger.warning("%d of %d samples could not go on, and are left out", len(rows) - len(examples), len(rows))
    if len(examples) < 2:
        raise DataError(f"{path}: of {len(rows)} samples {len(examples)} are left, and two are needed")
    return examples


def longest_sample(encoder: Encoder | None, max_tokens: int, max_length: int) -> Example:
    """An example with the longest prompt and the longest answer that those without given prompts may have; ids mean nothing.

    Together they may be longer than `max_length`: so a batch of such samples is padded.

    Args:
        encoder: the proposal's; None where it is not at hand: then prompts count as a chat model's, without its template.
        max_tokens: most tokens of the answer.
        max_length: most tokens of prompt and answer.
    """
    prompt = min(QUESTION, max_length // 4)
    if encoder is not None:
        chat = bool(encoder.tokenizer.chat_template)
        prompt = prompt + len(encoder.prompt([{"role": "user", "content": "x"}])) if chat else 1
    most = max_length - 1
    return Example([0] * min(prompt, most), [0] * min(max_tokens, most), [])


def _row(prompt: Sequence[int], completion: Completion) -> dict[str, Any]:
    if completion.error is not None:
        return {"error": completion.error}
    return {"prompt": list(prompt), "answer": list(completion.tokens)}


def _encoded(model: AlignedModel, records: Sequence[Record], max_length: int) -> list[list[int]]:
    """The ids of the prompts that leave room for an answer."""
    prompts = []
    for record in records:
        try:
            prompts.append(model.encoder.prompt(record.prompt))
        except InvalidRequest as error:
            raise DataError(f"{record.source}: {error}") from error
    kept = [prompt for prompt in prompts if len(prompt) < max_length]
    if not kept:
        raise DataError(f"no record is left: every prompt has {max_length} tokens or more; raise max_length")
    if len(kept) < len(prompts):
        logger.warning(
            "%d of %d prompts have %d tokens or more, and are left out", len(prompts) - len(kept), len(prompts), max_length
        )
    return kept


def _beginning(model: AlignedModel) -> list[int]:
    """The token that a text begins after."""
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, *model.eos_token_ids):
        if token is not None:
            return [token]
    raise InvalidOption("dataset: the tokenizer has neither a chat template nor a begin or end of sequence; give prompts")


def _questions(model: AlignedModel, seeds: Sequence[int], most: int) -> list[list[int]]:
    """Prompts of chats whose first message the model says itself, one for each seed."""
    tokenizer, date = model.tokenizer, model.encoder.date
    try:
        written = render_chat(tokenizer, Chat([{"role": "user", "content": MARK}], [], {}), "a chat", answer=False, date=date)
        before, mark, behind = written.partition(MARK)
        before = before.rstrip(" ")  # a message's first token has the space before it
        if not mark or not before:
            raise InvalidRequest("the chat template writes nothing before a message")
        start = model.encoder.prompt(before)
        stop = behind.strip()
        params = [SamplingParams(seed=seed, max_tokens=most, stop=(stop,) if stop else ()) for seed in seeds]
        said = [completion.text.strip() for completion in model.generate([start] * len(seeds), params)]
        return [model.encoder.prompt([{"role": "user", "content": text}]) for text in said]
    except InvalidRequest as error:
        raise InvalidOption(f"dataset: the proposal cannot be asked for prompts of its own ({error}); give some") from error
