"""Rewards of token ids: what models say of an answer, token by token.

A text is not enough for them where answers are drawn: one that was cut at its limit has no end of sequence to be scored. So a
run that draws answers gives them ids; texts that somebody asks about are encoded as whole answers.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trimtab.errors import InvalidRequest, ModelError, VocabularyMismatch
from trimtab.judges.rewards.base import Ids, Reward
from trimtab.models.vocabulary import fingerprint_vocabulary

if TYPE_CHECKING:
    from trimtab.data.encoding import Encoder

__all__ = ["TokenReward"]

T = TypeVar("T")


class TokenReward(Reward):
    """Scores token ids.

    Attributes:
        encoder: makes ids of texts, once it is loaded.
    """

    encoder: "Encoder"

    @abstractmethod
    def score_tokens(self, prompts: Sequence[Any], ids: Ids) -> Sequence[float | None]:
        """A finite number for each answer; None for no score.

        Args:
            prompts: texts or chats.
            ids: of these prompts, and of an answer to each.

        Raises:
            ModelError: it fails, or an answer with its prompt is too long for a model of its.
        """

    def score(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]]
    ) -> Sequence[float | None]:
        """The same of texts, which count as whole answers: each has an end of sequence behind it."""
        pairs = [self._or_fail(self.encoder.pair, prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
        return self.score_tokens(prompts, Ids([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))

    def score_drawn(
        self, prompts: Sequence[Any], answers: Sequence[str], columns: Sequence[Mapping[str, Any]], ids: Ids
    ) -> Sequence[float | None]:
        """What the ids are worth."""
        return self.score_tokens(prompts, ids)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse ids that mean other tokens here."""
        if fingerprint_vocabulary(self.encoder.tokenizer) != fingerprint_vocabulary(tokenizer):
            raise VocabularyMismatch(
                f"{self.called or self.name} reads token ids, and its tokenizer is not the proposal's: choose models that share"
                " the proposal's vocabulary"
            )

    def identity(self) -> dict[str, Any]:
        """Its fingerprint, and how chats become texts."""
        return {"reward": self.fingerprint, **self.encoder.chat_settings}

    def _or_fail(self, function: Callable[..., T], *asked: Any) -> T:
        """What a function gives; what cannot be encoded or scored is an error of the reward."""
        try:
            return function(*asked)
        except InvalidRequest as error:
            raise ModelError(f"{self.called or self.name} cannot score an answer: {error}") from error
