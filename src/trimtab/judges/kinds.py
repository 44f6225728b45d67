"""The kinds of judges, ours and other packages', and what a user's text means.

A package adds one with an entry point in the group `trimtab.judges`: a `JudgeKind`. docs/extending.md has an example.
"""

from collections.abc import Mapping
from typing import Any

from trimtab.endpoints.settings import without_password
from trimtab.errors import InvalidOption
from trimtab.judges.base import Judge, JudgeKind
from trimtab.judges.endpoint import ENDPOINT
from trimtab.judges.references import METRICS, REFERENCE
from trimtab.judges.reward import REWARD
from trimtab.options import meant
from trimtab.registry import Registry, check_is, help_of

__all__ = ["JUDGES", "judge_help", "make_judge", "options_read", "parse_judge"]

JUDGES: Registry[JudgeKind] = Registry("judge", "trimtab.judges", check_is(JudgeKind))
OURS = (ENDPOINT, REFERENCE, REWARD)
for _kind in OURS:
    JUDGES.add(_kind.name, _kind)


def parse_judge(text: str) -> tuple[JudgeKind, str]:
    """The kind and the argument that a text names: `KIND:ARGUMENT`, or an argument alone that only one of our kinds takes.

    Raises:
        InvalidOption: it names none, or a package's kind that cannot be used.
    """
    for kind in OURS:
        if (argument := kind.short(text)) is not None:
            return kind, argument
    name, colon, argument = text.partition(":")
    if colon and name in JUDGES:
        return JUDGES[name], argument
    raise InvalidOption(
        f"--judge '{text}' is none: give URL#MODEL, a reward model's folder or hub id, or one of {', '.join(METRICS)};"
        f" or KIND:ARGUMENT with a kind of {', '.join(sorted(JUDGES))}{meant(name, JUDGES)}"
    )


def options_read(judge: str | Judge) -> frozenset[str]:
    """Which options of `trimtab eval` a judge reads; one that is made already reads none."""
    if isinstance(judge, Judge):
        return frozenset()
    kind, argument = parse_judge(judge)
    return frozenset(kind.reads(argument))


def make_judge(text: str, options: Mapping[str, Any]) -> Judge:
    """The judge that a text names.

    Args:
        text: what `parse_judge` takes.
        options: those of `trimtab eval`, by name; it is given those that its kind says it reads.

    Raises:
        InvalidOption: the text names none, or an option does not fit.
    """
    kind, argument = parse_judge(text)
    reads = kind.reads(argument)
    if unknown := [name for name in reads if name not in options]:
        raise InvalidOption(f"--judge {text}: the kind '{kind.name}' reads '{unknown[0]}', which is no option of evaluations")
    judge = kind.make(argument, {name: options[name] for name in reads})
    judge.called = f"--judge {without_password(text)}"
    return judge


def judge_help() -> str:
    """What `--judge` takes, with the kinds that are installed."""
    return f"who compares, KIND:ARGUMENT; may repeat. {help_of(JUDGES)}"
