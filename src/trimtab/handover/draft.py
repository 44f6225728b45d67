"""The beginning of an answer, as it grows in the leader's tokens and is read in the proposal's."""

import re
from collections.abc import Collection

from trimtab.core.rules.confidence import Confidence
from trimtab.data.encoding import Encoder, common_length
from trimtab.decode.request import SamplingParams, TokenEvent
from trimtab.decode.text import TextStream
from trimtab.handover.sides import Begun

__all__ = ["Draft"]

FIRST_LOOK = 16
"""Tokens of the leader's after which the proposal looks at a draft for the first time; then after twice as many each time.

So the leader writes at most twice as much as is needed where words have spaces between them, and all earlier looks together
read no more than the last one.
"""
LAST_WORD = re.compile(r"\s\S+\s*\Z")
"""A text's last word, and the space before it."""


class Draft:
    """What the leader has written of one answer.

    Args:
        encoder: of the proposal.
        eos_token_ids: the proposal's ends of sequence.
        prompt: the proposal's ids of the prompt.
        params: what is asked of the proposal, with a seed; `max_tokens` is what fits into its context.
        index: which of the request's completions this is.
        rule: when it hands over.
    """

    def __init__(
        self,
        encoder: Encoder,
        eos_token_ids: Collection[int],
        prompt: list[int],
        params: SamplingParams,
        index: int,
        rule: Confidence,
    ) -> None:
        self._encoder, self._ends, self._rule = encoder, eos_token_ids, rule
        self.prompt, self.params, self.index = prompt, params, index
        self.text = ""
        self.tokens: list[int] = []
        """The proposal's tokens of what is settled of the text, and up to the hand-over if there is one."""
        self.full = False
        """Whether the text has more tokens than are asked for."""
        self.finish_reason: str | None = None
        """The leader's, once it has ended."""
        self.error: str | None = None
        self.handover_at: int | None = None
        """After how many of the tokens the proposal goes on, once it does."""
        self._written = 0
        self._next_look = FIRST_LOOK

    @property
    def done(self) -> bool:
        """Whether nothing of what the leader may still write is needed."""
        return self.finish_reason is not None or self.handover_at is not None or self.full or self.stopped

    @property
    def goes_on(self) -> bool:
        """Whether the proposal is to write the rest."""
        return self.handover_at is not None and self.handover_at < self.params.max_tokens and not self.stopped

    @property
    def begun(self) -> Begun:
        """What the proposal can read of the answer: up to an end of sequence of its own, which a text may spell."""
        end = next((i for i, token in enumerate(self.tokens) if token in self._ends), None)
        return Begun(self.prompt, self.tokens[:end], self.params)

    @property
    def stop_at(self) -> int | None:
        """Where in the text the first stop text begins; None if there is none."""
        return min((at for stop in self.params.stop if (at := self.text.find(stop)) >= 0), default=None)

    @property
    def stopped(self) -> bool:
        """Whether the settled tokens hold a stop text."""
        if self.stop_at is None:
            return False
        stream = TextStream(self._encoder.tokenizer, self.params.stop, self.prompt)
        for token in self.tokens:
            stream.push(token)
        return stream.stopped

    def take(self, event: TokenEvent) -> bool:
        """Add a token of the leader's; whether the proposal is to look at the draft now."""
        self.text += event.text
        self._written += 1
        if event.completion is not None:
            self.finish_reason = event.completion.finish_reason
            self.error = event.completion.error and f"the leader: {event.completion.error}"
        return event.completion is not None or self._written >= self._next_look or self.stop_at is not None

    def settle(self) -> bool:
        """Tokenise what is settled of the text; whether that is long enough for a hand-over."""
        self._next_look = 2 * self._written
        ids, most = self._settled(), self.params.max_tokens
        self.tokens, self.full = ids[:most], len(ids) > most
        return len(self.begun.tokens) >= self._rule.window

    def look(self, logps: list[float], error: str | None) -> None:
        """Note how likely the proposal finds the tokens, and end the draft where it is confident.

        Args:
            logps: of the tokens of `begun`, or of the first of them, behind which there is an error.
            error: why the proposal has nothing to say behind them.
        """
        self.handover_at = self._rule.hands_over_at(logps)
        self.tokens = self.tokens[: self.handover_at]
        if error is not None and self.handover_at is None:
            self.finish_reason, self.error = "error", error
            self.tokens, self.full = self.tokens[: len(logps)], False

    def _settled(self) -> list[int]:
        """The proposal's ids of the text, up to where more text might make others of them.

        That is the space before its last word: tokenizers that split at spaces merge nothing over it. They are the ids that the
        whole text has there.
        """
        whole = self._encode(self.text)
        if self.finish_reason is not None:
            return whole
        word = LAST_WORD.search(self.text)
        return whole[: common_length(whole, self._encode(self.text[: word.start()]))] if word else []

    def _encode(self, text: str) -> list[int]:
        return self._encoder.split(self.prompt, text)[1] if text else []
