"""`model`: a language model of the same vocabulary that only drafts."""

from dataclasses import dataclass
from typing import ClassVar, Self

from trimtab.decode.drafters.base import Drafted, Drafter, Given, Step
from trimtab.decode.drafters.rows import draft_from_rows
from trimtab.errors import InvalidOption
from trimtab.models.base import LanguageModel
from trimtab.models.fingerprint import fingerprint_of

__all__ = ["ModelDrafter"]


@dataclass(frozen=True)
class ModelDrafter(Drafter):
    """Drafts from a model's rows.

    Attributes:
        model: it.
    """

    name: ClassVar[str] = "model"
    takes: ClassVar[str | None] = "PATH"
    model: LanguageModel

    @classmethod
    def make(cls, argument: str | None, given: Given) -> Self:
        """From a folder or a hub id."""
        if not argument:
            raise InvalidOption("draft: 'model' wants to know which: model:PATH, a folder or a hub id")
        return cls(given.load(argument))

    @property
    def identity(self) -> str:
        """The model's fingerprint."""
        return fingerprint_of(self.model)

    @property
    def who(self) -> str:
        """By the name that it was loaded by, if it has one."""
        name = getattr(getattr(self.model, "model", None), "name_or_path", "")
        return f"the drafter {name}" if name else "a drafter"

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """The model."""
        return (self.model,)

    def on(self, models: tuple[LanguageModel, ...]) -> "ModelDrafter":
        """Another one's."""
        return ModelDrafter(*models)

    def draft(self, step: Step) -> Drafted:
        """From its rows."""
        return draft_from_rows(step, step.aligners + 1)
