"""`trimtab evolve` from options to a report: rounds, a rollback, or where the loop stands."""

import contextlib
import logging
from typing import Any

from trimtab.data.template import today
from trimtab.errors import InvalidOption
from trimtab.files import atomic_write, expand_home
from trimtab.judges.asked import AskedRecords
from trimtab.judges.rewards.base import Reward, check_loaded
from trimtab.judges.rewards.kinds import make_reward
from trimtab.loop.folder import LoopFolder
from trimtab.loop.options import EvolveOptions
from trimtab.loop.page import render_page
from trimtab.loop.stages import Loop, open_loop, play_round

__all__ = ["run"]

logger = logging.getLogger(__name__)

SEED, HELD_OUT = 42, 0.2
"""Where nobody says, and transformers' own seed."""


def run(options: EvolveOptions) -> dict[str, Any]:
    """What `trimtab.loop.call.evolve` says of it holds."""
    folder = LoopFolder(options.out)
    if not folder.path.exists() and (options.rollback is not None or not options.evolves):
        raise InvalidOption(
            f"--out {options.out}: there is no loop yet: begin one with --proposal and --feedback, or --prompts"
        )
    with folder.writing():
        if options.rollback is not None:
            folder.roll_back(options.rollback)
        done, waiting = _evolve(options, folder) if options.evolves else ([], None)
        if not folder.history:
            raise InvalidOption(f"--out {options.out}: there is no loop yet")
        if folder.is_written:
            with atomic_write(folder.path / "index.html") as stream:
                stream.write(render_page(folder.history))
    current = folder.current
    return {
        "out": str(options.out),
        "current": current,
        "aligner": folder.aligner(current),
        "rounds": done,
        "waiting": waiting,
        "history": folder.rounds,
        "page": str(folder.path / "index.html"),
    }


def _evolve(options: EvolveOptions, folder: LoopFolder) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rounds, as many as are wanted and due; and why no further one is due, if that is what ended it."""
    if not folder.history and not options.proposal:
        raise InvalidOption("--proposal is required")
    with contextlib.ExitStack() as stack:
        reward = _reward(options, stack)
        loop = open_loop(options, folder, reward)
        kept = {name: folder.history.get(name) for name in ("proposal", "aligner", "seed", "held_out")}
        folder.begin(
            {
                "proposal": _place(options.proposal) or kept["proposal"],
                "aligner": _place(options.aligner) or kept["aligner"],
                "seed": next(seed for seed in (options.seed, kept["seed"], SEED) if seed is not None),
                "held_out": options.held_out or kept["held_out"] or HELD_OUT,
            }
        )
        options.training_run(loop.proposal, folder.aligner(folder.current), "-", str(folder.path / "-"), loop.seed, None)
        _load(loop)
        done: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            found = play_round(loop)
            if "waiting" in found:
                return done, found["waiting"]
            done.append(found)
    return done, None


def _place(source: str) -> str | None:
    """A folder wherever the next call is made from, links resolved; a hub id as it is."""
    path = expand_home(source)
    return (str(path.resolve()) if path.exists() else source) if source else None


def _reward(options: EvolveOptions, stack: contextlib.ExitStack) -> Reward | None:
    """What ranks answers, checked but not loaded."""
    if options.reward is None:
        return None
    try:
        return stack.enter_context(make_reward(options.reward, {"dtype": options.dtype, "device": options.device}))
    except InvalidOption as error:
        raise InvalidOption(f"--reward: {error}") from error


def _load(loop: Loop) -> None:
    """Load the reward, which can take all prompts that there are."""
    if loop.reward is not None:
        asked = AskedRecords([*loop.pool, *(vote.record for vote in loop.said.votes)])
        loop.reward.check(asked)
        loop.reward.load(asked, loop.options.date or today())
        check_loaded(loop.reward)
