"""What everything is worth that samples begin with: each as an answer that ends there."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Self

from trimtab.data.encoding import Encoder
from trimtab.decode.text import TextStream
from trimtab.judges.rewards.base import Ids, Reward, checked_scores
from trimtab.train.online.samples import Prompt, Sample

__all__ = ["Ends", "with_prefix_scores"]


class Ends(NamedTuple):
    """How answers end."""

    tokenizer: Any
    token: int
    """The end of sequence that is put behind what a sample begins with."""

    @classmethod
    def of(cls, encoder: Encoder, prompt: Prompt) -> Self:
        """As an answer to the prompt ends: a chat template may have another end than texts, and models know several."""
        return cls(encoder.tokenizer, encoder.end_of(prompt.record.prompt))


def with_prefix_scores(samples: Sequence[Sample], prompts: Sequence[Prompt], reward: Reward, ends: Ends) -> list[Sample]:
    """The samples with `prefix_scores`. Nothing is asked twice: samples of a prompt begin alike.

    Raises:
        ModelError: the reward fails.
    """
    asked: dict[tuple[int, tuple[int, ...]], str] = {}
    for sample in samples:
        texts = _texts(ends.tokenizer, prompts[sample.place].before, sample.tokens[: _proper(sample)])
        asked |= {(sample.place, tuple(sample.tokens[:length])): text for length, text in enumerate(texts)}
    records = [prompts[place].record for place, _ in asked]
    ids = Ids([prompts[place].ids for place, _ in asked], [[*tokens, ends.token] for _, tokens in asked])
    columns: Sequence[Mapping[str, Any]] = [record.columns for record in records]
    given = reward.score_drawn([record.prompt for record in records], list(asked.values()), columns, ids)
    scores = dict(zip(asked, checked_scores(reward.called or reward.name, given, len(asked)), strict=True))
    found = []
    for sample in samples:
        known = [scores[sample.place, tuple(sample.tokens[:length])] for length in range(_proper(sample))]
        found.append(replace(sample, prefix_scores=known if sample.was_cut else [*known, sample.score]))
    return found


def _proper(sample: Sample) -> int:
    """Before how many of its tokens a sample would be another answer if it ended there."""
    return len(sample.tokens) - (not sample.was_cut)


def _texts(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> list[str]:
    """What an answer says before each of its tokens; bytes that are no whole character are a broken one, as at an end."""
    stream, found = TextStream(tokenizer, prompt=prompt), []
    for token in tokens:
        ended = stream.fork()
        ended.close()
        found.append(ended.text)
        stream.push(token)
    return found
