"""Scored answers that somebody has, as samples to learn from."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from trimtab.data.encoding import Encoder
from trimtab.data.scored import Scored, read_scored, scored_file
from trimtab.decode.text import text_of
from trimtab.errors import DataError, InvalidRequest
from trimtab.journal import key_of
from trimtab.train.online.samples import Prompt, Sample

__all__ = ["Filed", "filed_samples", "read_filed", "with_answers"]

logger = logging.getLogger(__name__)


class Filed(NamedTuple):
    """A file of them."""

    path: str
    fingerprint: str
    rows: Mapping[str, Sequence[Scored]]
    """By prompt; those with a score."""


def read_filed(path: str) -> Filed:
    """Read a file of scored answers.

    Raises:
        InvalidOption: there is none.
        DataError: a row cannot be read, or no answer has a score.
    """
    _, fingerprint = scored_file(path)
    rows: dict[str, list[Scored]] = defaultdict(list)
    for row in read_scored(path):
        if row.score is not None:
            rows[key_of([row.prompt])].append(row)
    if not rows:
        raise DataError(f"{path}: no answer has a score")
    return Filed(path, fingerprint, rows)


def filed_samples(filed: Filed, prompts: Sequence[Prompt], encoder: Encoder, max_tokens: int) -> dict[int, list[Sample]]:
    """The answers to each prompt, by its place; longer ones than `max_tokens` are left out, and counted in the log.

    Raises:
        DataError: one cannot be encoded, or its ids are not its text, or do not end as it does.
    """
    found: dict[int, list[Sample]] = {}
    long = apart = 0
    for place, prompt in enumerate(prompts):
        some = []
        for row in filed.rows.get(key_of([prompt.record.prompt]), ()):
            tokens = _tokens(row, prompt, encoder)
            if tokens is None:
                apart += 1
            elif len(tokens) > max_tokens:
                long += 1
            else:
                reason = "length" if row.cut else "stop"
                some.append(Sample(0, place, tokens, row.completion, reason, 1.0, row.score))
        found[place] = some
    for count, why in ((long, f"have more than {max_tokens} tokens"), (apart, "begin within a token of the prompt's end")):
        if count:
            logger.warning("%s: %d answers %s: left out", filed.path, count, why)
    return found


def with_answers(
    part: str, prompts: Sequence[Prompt], filed: Filed, encoder: Encoder, max_tokens: int, most: int | None = None
) -> tuple[list[Prompt], dict[int, list[Sample]]]:
    """The prompts that have two answers or more, each once; others are counted in the log.

    Args:
        part: what messages call them.
        prompts: of the data.
        filed: the answers.
        encoder: the proposal's.
        max_tokens: of an answer.
        most: how many prompts are wanted, the first ones. Default: all.

    Raises:
        DataError: no prompt has two answers with different scores; or as `filed_samples`.
    """
    once = list({key_of([prompt.record.prompt]): prompt for prompt in prompts}.values())
    found = filed_samples(filed, once, encoder, max_tokens)
    kept = [place for place, some in found.items() if len(some) > 1]
    if left := len(once) - len(kept):
        logger.warning("%s: %d of %d %s prompts have no two answers: left out", filed.path, left, len(once), part)
    kept = kept[:most]
    if all(len({sample.score for sample in found[place]}) == 1 for place in kept):
        raise DataError(f"{filed.path}: no {part} prompt has two answers with different scores, and how they compare is learnt")
    moved = {new: [replace(sample, place=new) for sample in found[place]] for new, place in enumerate(kept)}
    return [once[place] for place in kept], moved


def _tokens(row: Scored, prompt: Prompt, encoder: Encoder) -> list[int] | None:
    """An answer's ids behind its prompt's; None if the two cannot be told apart."""
    try:
        if row.tokens is not None:
            return _given(row, row.tokens, prompt, encoder)
        before, tokens = encoder.pair(row.prompt, row.completion, ended=not row.cut)
    except InvalidRequest as error:
        raise DataError(f"{row.source}: {error}") from error
    return tokens if list(before) == list(prompt.ids) else None


def _given(row: Scored, given: Sequence[int], prompt: Prompt, encoder: Encoder) -> list[int]:
    """An answer's ids as the row has them, with an end of sequence if it came to its end.

    Raises:
        InvalidRequest: they are not the answer's.
    """
    tokens = encoder.prompt(given, "tokens")
    has_end = tokens[-1] in encoder.ends
    if any(token in encoder.ends for token in tokens[:-1]) or (has_end and row.cut):
        raise InvalidRequest("'tokens' go on behind an end of sequence, or have one and were cut: leave them out")
    said = tokens[:-1] if has_end else tokens
    if text_of(encoder.tokenizer, said, prompt.before).strip() != row.completion.strip():
        raise InvalidRequest("'tokens' are not the ids of 'completion': leave them out, or is this another tokenizer's?")
    return tokens if has_end or row.cut else [*tokens, encoder.end_of(row.prompt)]
