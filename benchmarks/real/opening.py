"""How a study on the real model begins: its options, its log, and what must be there."""

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

from fetch import FILE

from trimtab.errors import InvalidOption
from trimtab.hardware import keep_freed_memory
from trimtab.models.loading import quiet_loading

__all__ = ["add_training", "open_study"]

SEEDS = (0, 1, 2)


def add_training(parser: argparse.ArgumentParser, rounds: int, ways: Iterable[str] = ()) -> None:
    """Options of a study that trains heads: `--rounds`, `--head_layers`; where there are several ways, `--way` and `--seed`."""
    if ways:
        parser.add_argument("--way", action="append", choices=[*ways], help="only these; may repeat [default: all]")
        parser.add_argument("--seed", action="append", type=int, help=f"only these; may repeat [default: {SEEDS}]")
    parser.add_argument("--rounds", type=int, default=rounds, help="of samples [default: %(default)s]")
    parser.add_argument("--head_layers", type=int, default=10, help="[default: %(default)s]")


def open_study(name: str, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """What is asked of a study, beside its own options `--out` and `--proposal`; it and `demo` log from then on.

    Raises:
        InvalidOption: the model is not there.
    """
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--proposal", type=Path, default=Path("real-model") / FILE, help="[default: %(default)s]")
    said = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for one in (name, "demo"):
        logging.getLogger(one).setLevel(logging.INFO)
    quiet_loading()
    keep_freed_memory()
    if not said.proposal.exists():
        raise InvalidOption(f"proposal: there is no '{said.proposal}'; `make real-model` fetches it")
    return said
