"""Who answers: a model, what is put before every prompt, and whether the best of several answers is taken."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import Completion, SamplingParams
from trimtab.evaluate.distribution import trace

__all__ = ["BOUND", "OF", "System"]

Chat = Sequence[dict[str, str]]

OF = 8
"""Answers that the best is picked from."""
BOUND = math.log(OF) - (OF - 1) / OF
"""Most nats by which the law of a whole answer that is the best of `OF` diverges (Beirami et al., arXiv 2401.01879)."""


@dataclass(frozen=True)
class System:
    """A system of the study.

    Attributes:
        model: the proposal, alone or with aligners, as it is to be decoded.
        before: messages before every prompt: examples, or instructions.
        referee: if there is one, each answer is the best of `OF` samples: the one that is likeliest a token to it.
    """

    model: AlignedModel
    before: tuple[dict[str, str], ...] = ()
    referee: "System | None" = None

    def prompts(self, chats: Sequence[Chat]) -> list[list[dict[str, str]]]:
        """What the model is shown."""
        return [[*self.before, *chat] for chat in chats]

    def answers(self, chats: Sequence[Chat], params: SamplingParams) -> list[Completion]:
        """One answer to each prompt. Those of one that picks are samples at temperature 1, whatever `params` say of it.

        Raises:
            ValueError: prompts that are sampled would share their random numbers, for `params` have no seed.
        """
        if self.referee is None and params.temperature == 0:
            return self.model.generate(self.prompts(chats), params)
        if params.seed is None:
            raise ValueError("samples need a seed")
        count = 1 if self.referee is None else OF
        drawn = dataclasses.replace(params, temperature=1.0, n=count)
        each = [dataclasses.replace(drawn, seed=1_000_000 * params.seed + i) for i in range(len(chats))]
        samples = self.model.generate(self.prompts(chats), each)
        if self.referee is None:
            return samples
        repeated = [chat for chat in chats for _ in range(count)]
        sums = self.referee.nll(repeated, [list(sample.tokens) for sample in samples])
        means = [total / len(sample.tokens) for (total, _), sample in zip(sums, samples, strict=True)]
        groups = [range(start, start + count) for start in range(0, len(samples), count)]
        return [samples[min(group, key=means.__getitem__)] for group in groups]

    def nll(self, chats: Sequence[Chat], completions: Sequence[Any]) -> list[tuple[float, int]]:
        """Negative log-likelihood of each completion in nats, and its number of tokens, the end of sequence counted.

        Completions are messages, or token ids, which are taken as they are.
        """
        scores = self.model.score(self.prompts(chats), list(completions))
        return [(-math.fsum(score.aligned), len(score.tokens)) for score in scores]

    def divergence(self, bare: "System", chats: Sequence[Chat], params: SamplingParams) -> list[tuple[float, int]]:
        """KL from the bare proposal in nats on an own sample to each prompt, and its number of tokens.

        Where aligners steer the proposal, the sum of the rows' exact divergences (see `trimtab.evaluate.distribution.trace`);
        where something stands before the prompt, or the weights are others, the log-ratio of the sample itself, which varies
        more. Both are unbiased for the KL of a whole answer's law. Of the best of n only `BOUND` is known.
        """
        assert self.referee is None
        samples = [list(sample.tokens) for sample in self.answers(chats, dataclasses.replace(params, temperature=1.0))]
        if self.model.aligners and not self.before:
            return [(math.fsum(one.kl), len(one.kl)) for one in trace(self.model, self.prompts(chats), samples)]
        pairs = zip(self.nll(chats, samples), bare.nll(chats, samples), strict=True)
        return [(theirs - own, count) for (own, count), (theirs, _) in pairs]
