"""The bookkeeping of one completion while it grows."""

import math
from collections.abc import Hashable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, Self

from trimtab.core.draw import NO_TOKEN
from trimtab.core.rules import Product
from trimtab.decode.draft import Models
from trimtab.decode.drafters import NgramDrafter
from trimtab.decode.history import Place
from trimtab.decode.outcome import Drawn
from trimtab.decode.pace import Chances, Hope, Looked, Steady, Tally
from trimtab.decode.reading import taps_of
from trimtab.decode.request import Completion, SamplingParams, TokenEvent, TokenLogprobs
from trimtab.decode.shaping import Shaping
from trimtab.decode.text import TextStream
from trimtab.errors import DeadRow, InvalidOption

__all__ = ["Sequence"]

PRIOR = 0.6
"""The acceptance of drafts that nothing is known of."""


class Sequence:
    """One of a request's `n` completions.

    Args:
        prompt_index: the request's place among the prompts.
        index: which of its completions this is.
        prompt: the prompt's ids; completions of one request share the list.
        models: what it is decoded with.
        params: what was asked for, with a seed.
        shaping: how its aligned row comes about.
        limit: the most tokens it may get, by `max_tokens` and by the context.
        eos_token_ids: ids that end it.
        tokenizer: for its text, or None.
        answers: whether its text is a text of its own, a chat's answer, and does not go on with the prompt's.
    """

    def __init__(
        self,
        prompt_index: int,
        index: int,
        prompt: list[int],
        models: Models,
        params: SamplingParams,
        shaping: Shaping,
        limit: int,
        eos_token_ids: Seq[int],
        tokenizer: Any,
        *,
        answers: bool = False,
    ) -> None:
        assert params.seed is not None
        self.prompt_index, self.index, self.prompt = prompt_index, index, prompt
        self.models = models
        self.params, self.shaping, self.limit, self.seed = params, shaping, limit, params.seed
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self.hope = Hope()
        self.tally = Tally()
        self.memory: Any = None
        """What its drafter keeps of its text, once it has `started`."""
        self.started = False
        self.guess: list[int] = []
        """Its next tokens as its drafter has looked them up, if that looks."""
        self.place: Place | None = None
        """Where the memory of its text is, if its rule looks back and it is under way."""
        self.cached_tokens = 0
        """Tokens of its prompt that were not read for it, but taken over (`trimtab.decode.prefixes`)."""
        self.log_z: list[float] = []
        """Observed log Z, if the engine tracks it."""
        self.error: Exception | None = None
        """Why it cannot go on: itself, or because the engine failed."""
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else frozenset(eos_token_ids))
        self._text = TextStream(tokenizer, params.stop, () if answers else prompt)
        self._drawn: list[Drawn] = []
        self._marked = 0
        self._rule = shaping.rule
        """What was asked for, wherever it stands."""
        self.handover_at: int | None = None
        """The tokens that it had when a rule that hands over did so, if it did."""
        self._has_no_head = not taps_of(models.aligners)
        self.has_aligners = True
        """Whether whatever aligners were asked for are still there."""

    @property
    def next_input(self) -> int:
        """The newest token, which the models have not read yet."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    def behind(self, length: int) -> list[int]:
        """The tokens of prompt and completion behind the first `length`."""
        start = length - len(self.prompt)
        return self.tokens[start:] if start >= 0 else [*self.prompt[length:], *self.tokens]

    def remember(self) -> Any:
        """What its drafter keeps of its text."""
        if not self.started:
            self.memory, self.started = self.models.drafter.start([*self.prompt, *self.tokens]), True
        return self.memory

    @property
    def can_draft(self) -> bool:
        """Whether drafts for it can be verified, and somebody drafts."""
        return self.shaping.rule.has_row and self.models.drafter.drafts

    def chances(self, known: Hope, longest: int) -> Chances:
        """What drafts for its next tokens are hoped to bring; those that are looked up are its `guess` then.

        Args:
            known: what is known of requests like it.
            longest: the most tokens to look up.

        Raises:
            InvalidOption: a guess is no token.
        """
        acceptance = self.hope.estimate(known.estimate(PRIOR))
        if not self.models.drafter.looks:
            return Steady(acceptance)
        count = min(longest, self.room - 1)
        if not count:
            self.guess = []
            return Looked([])
        name, size = self.models.drafter.name, self.models.proposal.vocab_size
        found = self.models.drafter.look(self.remember(), count)
        tokens = list(found.tokens)[:count]
        for token in tokens:
            if not NO_TOKEN <= token < size:
                raise InvalidOption(f"draft: '{name}' guessed {token}, and ids are from 0 to {size - 1}")
        self.guess = tokens[: tokens.index(NO_TOKEN)] if NO_TOKEN in tokens else tokens
        return Looked([acceptance] * len(self.guess) if found.odds is None else found.odds[: len(self.guess)])

    def drafts(self, wanted: int) -> int:
        """How many drafts there will be if so many are wanted."""
        if not self.can_draft:
            return 0
        return min(wanted, self.room - 1, len(self.guess) if self.models.drafter.looks else wanted)

    def judge(self, taken: Seq[int], known: Hope) -> None:
        """Learn from the tokens that came how good a guess was, whether it was verified or not."""
        kept = next((i for i, (one, other) in enumerate(zip(self.guess, taken, strict=False)) if one != other), None)
        most = min(len(self.guess), len(taken))
        for hope in (self.hope, known):
            hope.observe(most if kept is None else kept, most if kept is None else kept + 1)

    @property
    def room(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.tokens)

    @property
    def reads_proposal(self) -> bool:
        """Whether anything that comes of it depends on the proposal's rows.

        Always without a head: other proposals than those of heads may hold tokens for impossible, or be broken.
        """
        return self._has_no_head or self.shaping.reads_proposal or self.params.logprobs

    @property
    def kind(self) -> Hashable:
        """What its acceptance depends on, as far as it can be known."""
        return id(self.models) if self.has_aligners else None, self.shaping, self.params.temperature

    @property
    def leaves(self) -> bool:
        """Whether its aligners have no further part in it, and it still holds on to them.

        Those who want to know what aligners say of each token keep them.
        """
        handed = self.handover_at is not None and self._rule.lets_go
        return handed and self.has_aligners and not self.params.logprobs and not self.finish_reason

    def leave(self) -> None:
        """Go on with the proposal alone, which draws the same tokens; whoever looks drafts up goes on doing so."""
        drafter = self.models.drafter
        if drafter.models or not (drafter.looks or not drafter.drafts):  # whoever needs rows has no models any more
            drafter, self.memory, self.started = NgramDrafter(), None, False
        self.models = Models(self.models.proposal, (), drafter, adapters=self.models.adapters[:1])
        self.shaping, self.place, self.has_aligners = Shaping(Product(), (), self.shaping.proposal), None, False
        self.hope, self._has_no_head = Hope(), True

    def observe_log_z(self, value: float) -> None:
        """Note log Z at one position; NaN, from a rule without one, is dropped."""
        if value == value:
            self.log_z.append(value)

    def fork(self) -> Self:
        """Another completion of the same request, with the same text so far and a way of its own; it remembers no drafts."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other.tokens, other.log_z, other._drawn = list(self.tokens), list(self.log_z), list(self._drawn)
        other.hope, other.tally, other.memory, other.started = Hope(), Tally(), None, False
        other._text = self._text.fork()
        return other

    def accept(self, drawn: Drawn) -> TokenEvent:
        """Take the next token."""
        if drawn.marked and self._rule.hands_over and self.handover_at is None:
            self.handover_at = len(self.tokens)
        self.tokens.append(drawn.token)
        self._marked += drawn.marked or not self.has_aligners
        if self.params.logprobs:
            self._drawn.append(drawn)
        ended = drawn.token in self._ends
        text = self._text.push(drawn.token, ends=ended)
        if ended or self._text.stopped:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        if self.finish_reason:
            text += self._text.close()
            if self._text.stopped:
                self.finish_reason = "stop"
        completion = self._completion() if self.finish_reason else None
        event = TokenEvent(self.prompt_index, self.index, drawn.token, text, self.finish_reason, completion)
        if not self.params.logprobs:
            return event
        proposal, *aligners, aligned = drawn.logprobs
        aligner = aligners[0] if len(aligners) == 1 else aligners
        top_proposal, top_aligned = self._tops(drawn) or (None, None)
        return replace(
            event,
            proposal=proposal,
            aligner=aligner,
            aligned=aligned,
            top_proposal=top_proposal,
            top_aligned=top_aligned,
        )

    def fail(self, error: DeadRow) -> TokenEvent:
        """End here, for there is no next token; what has come so far stays."""
        self.error, self.finish_reason = error, "error"
        text = self._text.close()
        return TokenEvent(self.prompt_index, self.index, None, text, self.finish_reason, self._completion())

    def _completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(
            text=self._text.text,
            tokens=self.tokens,
            finish_reason=self.finish_reason,
            index=self.index,
            seed=self.seed,
            prompt_tokens=len(self.prompt),
            logprobs=self._logprobs() if self.params.logprobs else None,
            fallbacks=None if self._rule.marks is None else self._marked,
            handover_at=self.handover_at,
            error=None if self.error is None else str(self.error),
        )

    def _logprobs(self) -> TokenLogprobs:
        rows = len(self.models.aligners) + 2
        proposal, *aligners, aligned = ([d.logprobs[i] for d in self._drawn] for i in range(rows))
        tops = [[self._tops(d)[i] for d in self._drawn] for i in range(2 if self.params.top_logprobs else 0)]
        return TokenLogprobs(proposal, aligners[0] if len(aligners) == 1 else aligners, aligned, *tops)

    def _tops(self, drawn: Drawn) -> Seq[list[tuple[int, float]]]:
        """As many of the best tokens as were asked for, those that are possible."""
        wanted = self.params.top_logprobs
        return [[(i, value) for i, value in best[:wanted] if value > -math.inf] for best in drawn.tops] if wanted else ()
