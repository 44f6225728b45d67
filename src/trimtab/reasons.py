"""What a library's error says, in one line: the reason, and not the heading that stands above it."""

import re

__all__ = ["reason_of"]

LONGEST = 500
"""Characters of a reason; the beginning says what is wrong."""
_HEADING = re.compile(
    r".*:|\d+ validation errors? for .*|\d{3} (Client|Server) Error\b.*|An error occurred while generating the dataset.*"
)
"""A line that announces the next one, or the error's cause: torch's, transformers' and huggingface_hub's strict classes;
pydantic's; huggingface_hub's over HTTP; datasets'."""


def reason_of(error: BaseException) -> str:
    """The first line of an error that says something, behind the headings above it; of a bare heading, the error's cause.

    Further lines are advice, or further faults of the same kind: they are left out.
    """
    said: list[str] = []
    for line in filter(None, map(str.strip, str(error).splitlines())):
        said.append(line)
        if not _HEADING.fullmatch(line):
            break
    nothing = all(map(_HEADING.fullmatch, said))
    cause = error.__cause__ or error.__context__
    if nothing and cause is not None:
        said.append(reason_of(cause))
    elif not said or isinstance(error, KeyError):
        said.insert(0, type(error).__name__ + ":" * bool(said))
    text = " ".join(said).removesuffix(":")
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
