"""A rewriter: (prompt, answer) → a better answer, by a small model on top of anything that writes texts (arXiv 2402.02416).

Its law is the model's own, given the template's prompt. The answer drafts for it (`AnswerDrafter`): what the rewriter leaves as
it is takes few passes, and no token depends on it. Further rounds rewrite what the round before has written, and end where it
changes nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from trimtab.core.noise import fresh_seed, seed_after
from trimtab.data.prompts import are_ids
from trimtab.data.rewrite_template import RewriteTemplate
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.drafters.answer import AnswerDrafter
from trimtab.decode.request import Completion, SamplingParams
from trimtab.errors import InvalidRequest

__all__ = ["Rewriter", "Rewritten"]


class Rewritten(NamedTuple):
    """What became of an answer.

    Attributes:
        text: the last round's, without white space around it.
        before: the answers that were rewritten: the given one, and those of the rounds between.
        completion: the last round's; None where nothing was rewritten.
        error: why an answer could not be rewritten; its `text` is the last one that there is.
    """

    text: str
    before: tuple[str, ...]
    completion: Completion | None
    error: str | None = None

    @property
    def finish_reason(self) -> str:
        """Why it ended: that of the last completion, or `error`."""
        return "error" if self.error is not None or self.completion is None else str(self.completion.finish_reason)

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(self.before)


class Rewriter:
    """Rewrites answers.

    Args:
        model: what writes; its drafter is replaced.
        template: how it is asked.
        rounds: at most.
        drafts: whether the answer drafts; the texts are the same without.
    """

    def __init__(self, model: AlignedModel, template: RewriteTemplate, *, rounds: int = 1, drafts: bool = True) -> None:
        self.template, self.rounds = template, rounds
        self._answers: dict[tuple[int, ...], list[int]] = {}
        self.model = model.with_drafter(AnswerDrafter(self._answers) if drafts else "none")

    def rewrite(
        self, prompts: Sequence[Any], answers: Sequence[str], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Rewritten]:
        """Better answers.

        Args:
            prompts: texts or chats.
            answers: one for each.
            params: how the rewriter draws, for all or for each; `n` is 1. Later rounds have seeds of their own.

        Raises:
            InvalidRequest: the parameters ask for several, or there are not as many of one as of another. An answer that cannot
                be put to the rewriter, such as one too long for it, stays as it is, with an `error`.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if not len(prompts) == len(answers) == len(each):
            raise InvalidRequest(f"there are {len(prompts)} prompts, {len(answers)} answers and {len(each)} params")
        if any(map(are_ids, prompts)):
            raise InvalidRequest("a rewriter is told prompts in words: give texts or chats, not token ids")
        if any(one.n != 1 for one in each):
            raise InvalidRequest("n: an answer is rewritten once: leave it at 1")
        each = [one if one.seed is not None else dataclasses.replace(one, seed=fresh_seed()) for one in each]
        found = [Rewritten(answer, (), None) for answer in answers]
        going = list(range(len(answers)))
        for number in range(self.rounds):
            how = [self._seeded(each[i], number) for i in going]
            done = self._round([prompts[i] for i in going], [found[i].text for i in going], how)
            left = []
            for i, one in zip(going, done, strict=True):
                if isinstance(one, str) or one.error is not None:
                    why = one if isinstance(one, str) else one.error
                    found[i] = found[i]._replace(error=why)
                    continue
                before = (*found[i].before, found[i].text)
                text = one.text.strip()
                if text != found[i].text.strip():
                    left.append(i)
                found[i] = Rewritten(text, before, one)
            going = left
            if not going:
                break
        return found

    def _round(
        self, prompts: Sequence[Any], answers: Sequence[str], params: Sequence[SamplingParams]
    ) -> list[Completion | str]:
        """A completion for each answer, or why there is none."""
        self._answers.clear()
        asked: list[Any] = []
        failed: dict[int, str] = {}
        for i, (prompt, answer, one) in enumerate(zip(prompts, answers, params, strict=True)):
            text = self.template.ask(prompt, answer)
            try:
                self.model.prepare(text, one, name="the rewriter's prompt")
                if answer.strip():
                    self._expect(text, answer)
            except InvalidRequest as error:
                failed[i] = str(error)
            asked.append(text)
        going = [i for i in range(len(asked)) if i not in failed]
        try:
            done = iter(self.model.generate([asked[i] for i in going], [params[i] for i in going]) if going else [])
        finally:
            self._answers.clear()
        return [failed[i] if i in failed else next(done) for i in range(len(asked))]

    def _expect(self, asked: Any, answer: str) -> None:
        """Let an answer draft behind the prompt that asks for a better one."""
        encoder = self.model.encoder
        [ids] = encoder.answers(asked, [self.template.wanted(answer)], "prompt", ["answer"], [False]).answers
        self._answers[tuple(encoder.prompt(asked))] = ids

    @staticmethod
    def _seeded(params: SamplingParams, number: int) -> SamplingParams:
        assert params.seed is not None  # as `rewrite` sees to
        return params if not number else dataclasses.replace(params, seed=seed_after(params.seed, number))
