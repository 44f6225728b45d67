"""The `trimtab` command: parse → options → one library call → print.

Each subcommand is a module with `Options` (a dataclass: its fields are the flags), `run(options)` that returns a JSON-able
report, and `render(report)` for people. What is imported to show `--help` is no more than that. A report whose `failed` is
above 0 did its work but for so many parts of it (completions that could not go on, say), and the exit status is 1.
"""

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence

from trimtab import __version__
from trimtab.cli.options import add_options, read_options
from trimtab.cli.parser import Parser
from trimtab.errors import InvalidOption, TrimtabError
from trimtab.hardware import keep_freed_memory
from trimtab.options import meant

__all__ = ["main"]

COMMANDS = {
    "demo": "the whole path on text that every Python has: pretrain, align, evaluate, report",
    "propose": "samples of a proposal, aligned or not, for every prompt of a data set, or preference pairs of them",
    "start": "make an aligner's start out of a proposal's own layers, where it has no small sibling",
    "train": "train an aligner against a frozen proposal",
    "distil": "train one aligner to decode as a team of several does, from samples of its own",
    "blend": "add aligners up into one: arithmetic on their weights, or on LoRA adapters of one base",
    "evolve": "improve an aligner from votes or rewards, round after round, and promote only what is better",
    "fit-weights": "a user's weights of several aligners, from a few preferences",
    "draft-table": "count what follows what in a corpus, to draft from: --draft corpus:FILE",
    "generate": "write aligned text",
    "score": "held-out negative log-likelihood of proposal, aligner and aligned model",
    "eval": "win rates and the rest, with intervals: is the aligned model better, by how much, and what does it cost",
    "bench": "speeds as ratios to the unaligned proposal, in one run",
    "serve": "many aligners over one frozen proposal, behind the API of OpenAI",
    "env": "versions, hardware and which weights this CPU packs, for a bug report",
}

SPELLINGS = (
    "A flag may be spelt with dashes or underscores: --some-flag is --some_flag, and --no_some_flag is --some_flag false."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status: 0 done, 1 failed, 2 wrong usage."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        _overview().print_help(sys.stderr)
        return 2
    command = f"trimtab {arguments[0]}" if arguments[0] in COMMANDS else "trimtab"
    try:
        return _run(arguments)
    except InvalidOption as error:
        return _complain(command, f"{error} (see {command} --help)", 2)
    except (TrimtabError, OSError) as error:
        return _complain(command, error, 1)
    except KeyboardInterrupt:
        return _complain(command, "interrupted", 130)
    except Exception as error:  # the last line of defence: a user gets a sentence, a developer asks for the traceback
        if os.environ.get("TRIMTAB_DEBUG"):
            raise
        hint = "TRIMTAB_DEBUG=1 shows the traceback"
        return _complain(command, f"{type(error).__name__}: {error} ({hint})", 1)


def _run(arguments: Sequence[str]) -> int:
    name = arguments[0]
    if name not in COMMANDS:
        if not name.startswith("-"):
            raise InvalidOption(f"there is no command '{name}'{meant(name, COMMANDS)}")
        _overview().read(arguments)  # --help and --version end here
        raise InvalidOption("name a command first")
    command = importlib.import_module(f"trimtab.cli.{name.replace('-', '_')}")
    given = _parser(name, command.Options).read(arguments[1:])
    keep_freed_memory()
    as_json = given.pop("json", False)
    options = read_options(command.Options, given)
    _log_to_stderr()
    with contextlib.redirect_stdout(sys.stderr):  # libraries print; standard output is for the result alone
        report = command.run(options)
    if not _is_first_process():
        return 0
    text = json.dumps(report, ensure_ascii=False, allow_nan=False) if as_json else command.render(report)
    with contextlib.suppress(BrokenPipeError):
        print(text, flush=True)  # noqa: T201 - this is the command's output
    failed = report.get("failed", 0)
    return _complain(f"trimtab {name}", f"{failed} could not be finished; the output says which, and why", 1) if failed else 0


def _overview() -> Parser:
    """What `trimtab --help` shows; no command's module is imported for it."""
    parser = Parser("trimtab", description="Steer a frozen large language model with a small, detachable aligner.")
    parser.add_argument("--version", action="version", version=f"trimtab {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary)
    return parser


def _parser(name: str, options: type) -> Parser:
    summary = COMMANDS[name]
    parser = Parser(f"trimtab {name}", description=f"{summary[0].upper()}{summary[1:]}.\n\n{SPELLINGS}")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of options; flags override it")
    parser.add_argument("--json", action="store_true", help="print one JSON object to standard output")
    add_options(parser, options)
    return parser


def _complain(command: str, error: object, status: int) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    print(f"{command}: error: {message}", file=sys.stderr)  # noqa: T201 - the command's one line
    return status


def _is_first_process() -> bool:
    """Whether this is the process that speaks, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("trimtab").setLevel(logging.INFO if _is_first_process() else logging.WARNING)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
