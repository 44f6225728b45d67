"""The beginning of an answer, as it grows in the leader's tokens and is read in the proposal's."""

import re
from collections.abc import Collection

from trimtab.core.rules.confidence import Confidence
from trimtab.data.encoding import Encoder, common_length
from trimtab.decode.request import SamplingParams, TokenEvent
from trimtab.handover.sides import Begun

__all__ = ["Draft"]

FIRST_LOOK = 16
"""Tokens of the leader's after which the proposal looks at a draft for the first time; then after twice as many each time.

So the leader writes at most twice as much as is needed, and all earlier looks read no more than the last one.
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
        return self.finish_reason is not None or self.handover_at is not None or self.full

    @property
    def goes_on(self) -> bool:
        """Whether the proposal is to write the rest."""
        return self.handover_at is not None and self.handover_at < self.params.max_tokens

    @property
    def begun(self) -> Begun:
        """The answer so far, in the proposal's tokens."""
        return Begun(self.prompt, self.tokens, self.params)

    def take(self, event: TokenEvent) -> bool:
        """Add a token of the leader's; whether the proposal is to look at the draft now."""
        self.text += event.text
        self._written += 1
        if event.completion is not None:
            self.finish_reason, self.error = event.completion.finish_reason, event.completion.error
        return event.completion is not None or self._written >= self._next_look

    def settle(self) -> bool:
        """Tokenise what is settled of the text; whether that is long enough for a hand-over."""
        self._next_look = 2 * self._written
        ids, most = self._settled(), self.params.max_tokens
        ids = ids[: next((i for i, token in enumerate(ids) if token in self._ends), None)]
        self.tokens, self.full = ids[:most], len(ids) > most
        return len(self.tokens) >= self._rule.window

    def look(self, logps: list[float]) -> None:
        """Note how likely the proposal finds the tokens, and end the draft where it is confident."""
        self.handover_at = self._rule.hands_over_at(logps)
        self.tokens = self.tokens[: self.handover_at]

    def _settled(self) -> list[int]:
        """The proposal's ids of the text, up to where more text might make others of them.

        That is the space before its last word: what tokenizers merge does not reach over it. They are the ids that the whole
        text has there.
        """
        whole = self._encode(self.text)
        if self.finish_reason is not None:
            return whole
        word = LAST_WORD.search(self.text)
        return whole[: common_length(whole, self._encode(self.text[: word.start()]))] if word else []

    def _encode(self, text: str) -> list[int]:
        return self._encoder.split(self.prompt, text)[1] if text else []
