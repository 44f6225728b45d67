"""From a command's words to values: a flag in both spellings, and mistakes as one line that names what was meant."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from trimtab.errors import InvalidOption
from trimtab.options import meant

__all__ = ["Parser", "choice", "underscored"]


class Parser(argparse.ArgumentParser):
    """Flags as `--some_flag` or `--some-flag`; a truth value is `--flag`, `--flag false` or `--no_flag`.

    What is wrong is raised, where argparse would print its usage and end the process. Flags are declared with underscores, and
    what is not given is not set.
    """

    def __init__(self, prog: str, **more: Any) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, allow_abbrev=False, argument_default=argparse.SUPPRESS, formatter_class=raw, **more)
        self.verbatim: set[str] = set()
        """Flags whose value may look like a flag."""

    @property
    def flags(self) -> dict[str, argparse.Action]:
        """Every flag, dashes included, and what it does."""
        return {flag: action for action in self._actions for flag in action.option_strings}

    def read(self, words: Sequence[str]) -> dict[str, Any]:
        """The values that the words give.

        Raises:
            InvalidOption: a flag is not known, or a value is wrong.
        """
        found, rest = self.parse_known_args(list(self._respelt(words)))
        if rest:
            guess = meant(underscored(rest[0].partition("=")[0]), self.flags) if rest[0].startswith("-") else ""
            raise InvalidOption(f"unrecognized arguments: {' '.join(rest)}{guess}")
        return vars(found)

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print below its usage."""
        raise InvalidOption(message)

    def _respelt(self, words: Sequence[str]) -> Iterator[str]:
        """The words with flags as they are declared, and a value that begins with a dash tied to its flag."""
        flags, tied = self.flags, False
        for word, after in zip(words, [*words[1:], None], strict=False):
            flag, equals, value = word.partition("=")
            flag = underscored(flag)
            if tied:
                tied = False
            elif flag.startswith("--no_") and not equals and _is_switch(flags.get(f"--{flag[5:]}")) and flag not in flags:
                yield f"--{flag[5:]}=false"
            elif (action := flags.get(flag)) is None:
                yield word
            elif tied := not equals and action.nargs is None and self._is_value(after, flag):
                yield f"{flag}={after}"
            else:
                yield flag + equals + value

    def _is_value(self, word: str | None, flag: str) -> bool:
        """Whether argparse would take a flag's value for another flag."""
        if word is None or not word.startswith("-") or word in self.flags:
            return False
        return not word.startswith("--") or any(map(str.isspace, word)) or flag in self.verbatim


def underscored(flag: str) -> str:
    """A flag, or a key, in the spelling in which it is declared; the dashes that it begins with stay."""
    name = flag.lstrip("-")
    return flag[: len(flag) - len(name)] + name.replace("-", "_")


def choice(choices: Sequence[str]) -> Any:
    """The type of a value that must be one of these."""

    def read(text: str) -> str:
        if text not in choices:
            listed = f"(choose from {', '.join(choices)})"
            raise argparse.ArgumentTypeError(f"invalid choice: '{text}' {listed}{meant(text, choices)}")
        return text

    return read


def _is_switch(action: argparse.Action | None) -> bool:
    return action is not None and action.nargs == "?"
