"""The arena's votes, on disk in the layout that `trimtab train --objective preference` reads.

A vote for one side is a line of `prompt`, `chosen` and `rejected`. A vote for neither has nothing to prefer; it goes to a file
beside, `votes.ties.jsonl` for `votes.jsonl`, with the texts as `left` and `right`. So the first file is
trainable as it is.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trimtab.appended import append_row
from trimtab.data.prompts import Message
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.files import expand_home

__all__ = ["Verdict", "VoteBook"]

Verdict = Literal["left", "right", "tie", "both_bad"]
_VERDICTS = ("left", "right", "tie", "both_bad")
_RESERVED = {"prompt", "chosen", "rejected", "completion", "messages", "left", "right", "verdict"}


class VoteBook:
    """Appends votes, one JSON line each; several threads and processes may append to the same files.

    A line is on disk, whole, when `append` returns. What a crash left of a last line is moved to `votes.jsonl.torn` by the next
    vote, so that it spoils neither its own file nor the vote.

    Args:
        path: a `.jsonl` file; it and its folder are made by the first vote.

    Raises:
        InvalidOption: it is a folder, or has another name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = expand_home(path)
        if self.path.suffix != ".jsonl":
            raise InvalidOption(f"votes: {path} must end in .jsonl, which is what training reads")
        if self.path.is_dir():
            raise InvalidOption(f"votes: {path} is a folder; name a file")
        self.ties = self.path.with_name(f"{self.path.stem}.ties.jsonl")
        """Where votes for neither side go."""

    def append(self, prompt: str | Sequence[Message], left: str, right: str, verdict: Verdict, **facts: Any) -> dict[str, Any]:
        """Write one vote.

        Args:
            prompt: a text, or messages; then the answers are written as messages too.
            left: one answer.
            right: the other.
            verdict: which is better, or that both are as good or as bad.
            facts: whatever else is to be kept with it, such as models, rule, weight, seed, time: anything JSON has.

        Returns:
            The record as it was written.

        Raises:
            InvalidRequest: the vote could not be trained on, or has facts that JSON does not have.
            OSError: the disk is full or cannot be written; nothing of the vote is left on it.
        """
        record = _record(prompt, left, right, verdict, facts)
        append_row(self.path if "chosen" in record else self.ties, record, "the vote")
        return record


def _record(
    prompt: str | Sequence[Message], left: str, right: str, verdict: Verdict, facts: Mapping[str, Any]
) -> dict[str, Any]:
    if verdict not in _VERDICTS:
        raise InvalidRequest(f"verdict must be one of {', '.join(_VERDICTS)}, not {verdict!r}")
    if not isinstance(left, str) or not isinstance(right, str):
        raise InvalidRequest("left and right must be texts")
    if taken := sorted(_RESERVED & facts.keys()):
        raise InvalidRequest(f"{taken[0]} is a field of the vote's own: call the fact something else")
    if isinstance(prompt, str):
        answers: tuple[Any, Any] = (left, right)
    else:
        prompt = [_message(message, f"prompt[{i}]") for i, message in enumerate(prompt)]
        answers = ([{"role": "assistant", "content": left}], [{"role": "assistant", "content": right}])
    if not prompt:
        raise InvalidRequest("prompt is empty")
    if verdict in ("tie", "both_bad"):
        return {"prompt": prompt, "left": answers[0], "right": answers[1], "verdict": verdict, **facts}
    chosen, rejected = answers if verdict == "left" else answers[::-1]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "verdict": verdict, **facts}


def _message(message: Any, name: str) -> dict[str, Any]:
    fits = isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
    if not fits:
        raise InvalidRequest(f"{name} must be a message whose 'role' and 'content' are texts")
    return dict(message)
