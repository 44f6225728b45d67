"""`AnswerDrafter`: the answer that is being rewritten drafts, from where the rewriting is in it.

As long as the text is the answer's, the answer's next tokens are the draft. Where it departs, the text's own n-grams draft,
among them those of the prompt, which has the answer in it; where its last three tokens stand in the answer again, the draft
goes on from there. Drafts are certain, so texts are what they are without them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from trimtab.decode.drafters.base import Guess, TextDrafter
from trimtab.decode.drafters.lookup import LONGEST, Lookup
from trimtab.decode.pace import Hope

__all__ = ["AnswerDrafter"]

COPIED = 0.9
"""How often the answer's next token comes true, before a text has shown more."""


class _Memory:
    """Where a text is in the answer, and what else is known of it."""

    def __init__(self, tokens: Sequence[int], answer: Sequence[int]) -> None:
        self._answer, self._at, self._hope = list(answer), 0, Hope()
        self._inside = bool(self._answer)
        self._lookup, self._tail = Lookup(tokens), list[int]()
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for end in range(LONGEST, len(self._answer) + 1):
            self._places[tuple(self._answer[end - LONGEST : end])].append(end)

    def extend(self, tokens: Sequence[int]) -> None:
        self._lookup.extend(tokens)
        for token in tokens:
            self._tail = [*self._tail[1 - LONGEST :], token]
            if self._inside and self._at < len(self._answer):
                self._inside = self._answer[self._at] == token
                self._hope.observe(self._inside, 1)
            self._at += self._inside
            if not self._inside and (places := self._places.get(tuple(self._tail))):
                self._at = next((place for place in places if place >= self._at), places[-1])
                self._inside = True

    def guess(self, count: int) -> Guess:
        if self._inside and (tokens := self._answer[self._at : self._at + count]):
            return Guess(tokens, [self._hope.estimate(COPIED)] * len(tokens))
        return self._lookup.guess(count)


class AnswerDrafter(TextDrafter):
    """What is being rewritten, by the prompts that ask for it.

    Args:
        answers: token ids of an answer for each prompt's ids. Whoever rewrites may change it between two calls.
    """

    name: ClassVar[str] = "answer"

    def __init__(self, answers: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        self._answers = answers

    @property
    def who(self) -> str:
        """In words."""
        return "the answer that is rewritten"

    def start(self, tokens: Sequence[int]) -> _Memory:
        """At the answer's beginning."""
        return _Memory(tokens, self._answers.get(tuple(tokens), ()))

    def accepted(self, memory: _Memory, tokens: Sequence[int]) -> None:
        """Go on in it, or leave it."""
        memory.extend(tokens)

    def guess(self, memory: _Memory, count: int) -> Guess:
        """The answer's next tokens, or what the n-grams say."""
        return memory.guess(count)
