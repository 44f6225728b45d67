"""What a library's error says, in one line: the reason, and not the heading that stands above it."""

import re

__all__ = ["reason_of"]

LONGEST = 500
"""Characters of a reason; the beginning says what is wrong."""
_ASIDE = re.compile(
    r"^.*Traceback \(most recent call last\):\n(?:[ \t]+.*(?:\n|\Z))*"
    r"|(?<=Weights only load failed\. )(?s:.*?)(?=WeightsUnpickler error)"
    r"|^[ \t]*For further information visit .*$",
    re.MULTILINE,
)
"""What says nothing of the reason, wherever it stands: where it was raised; torch's and pydantic's advice."""
_HEADING = re.compile(
    r".*:|\d+ validation errors? for .*|\d{3} (Client|Server) Error\b.*|An error occurred while generating the dataset.*"
    r"|Caught \w+ in .*|.*\(\d+ sub-exceptions?\)"
)
"""A line that announces the next one, or the error's cause, by its words: torch's, transformers' and huggingface_hub's strict
classes; pydantic's; huggingface_hub's over HTTP; datasets'; that of a worker of torch's; a group's."""
_ITEM = re.compile(r"\s*(?:[-*•]|\(?\d+[.)]) ")


def reason_of(error: BaseException) -> str:
    """The first line of an error that says something, behind the headings above it; of a bare heading, the error's cause.

    Further lines are advice, or further faults of the same kind: they are left out.
    """
    lines = [line for line in _ASIDE.sub("", str(error)).splitlines() if re.search(r"\w", line)]
    headings = list(map(_is_heading, lines, [*lines[1:], ""]))
    said = [line.strip() for line in lines[: headings.index(False) + 1 if False in headings else None]]
    cause = next(iter(getattr(error, "exceptions", ())), error.__cause__ or error.__context__)
    if all(headings) and isinstance(cause, BaseException):
        said.append(reason_of(cause))
    elif not said or isinstance(error, KeyError):
        said.insert(0, type(error).__name__ + ":" * bool(said))
    text = " ".join(said).removesuffix(":")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _is_heading(line: str, following: str) -> bool:
    """Whether a line announces another one: by its words, or because what follows stands further in or is an item of a list."""
    if _HEADING.fullmatch(line.strip()):
        return True
    return _indent(following) > _indent(line) or bool(_ITEM.match(following) and not _ITEM.match(line))


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
