"""A run's output folder: whose it is, and how far the run in it has come."""

import shutil
from pathlib import Path
from typing import Any

from trimtab.errors import DataError, InvalidOption
from trimtab.files import LEFTOVERS, read_json, remove_leftovers, write_json
from trimtab.models.aligner import MANIFEST_NAME

__all__ = ["LOCK", "is_finished", "last_checkpoint", "open_run", "refuse_foreign"]

LOCK = ".run.lock"
"""The file that keeps a second writer out."""


def _foreign(output: Path) -> list[str]:
    """What is in the output folder apart from what a run has before its `run.json` is written."""
    ours = {LOCK, *(item.name for item in output.glob(LEFTOVERS))}
    return sorted(item.name for item in output.iterdir() if item.name not in ours) if output.is_dir() else []


def refuse_foreign(output: Path, overwrite: bool, flag: str = "output_dir") -> None:
    """Before anything is written: refuse a folder, which `flag` names, that holds something, but no run."""
    if output.exists() and not output.is_dir():
        raise InvalidOption(f"{flag}: {output} is a file; name a folder")
    if _foreign(output) and not (output / "run.json").exists():
        what = "holds something that no training run left there" if overwrite else "is not empty and holds no training run"
        raise InvalidOption(f"{flag}: {output} {what}; name another folder")


def open_run(output: Path, run: dict[str, Any], overwrite: bool, flag: str = "output_dir") -> None:
    """Make the output folder, which `flag` names, this run's own, or refuse it."""
    for folder in (output, *output.glob("proposal_cache/*")):
        remove_leftovers(folder)
    if overwrite:
        for name in sorted(_foreign(output), key=lambda name: name == "run.json"):  # the last to go: a kill leaves it
            item = output / name
            shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
    if not (output / "run.json").exists():
        write_json(output / "run.json", run)
        return
    found = read_json(output / "run.json")
    if not isinstance(found, dict):
        raise DataError(f"{output / 'run.json'}: must be a JSON object")
    for key in sorted(set(found) | set(run), key=lambda key: (key.endswith(("data", "_weights")), key)):  # a setting says more
        if found.get(key) != run.get(key):
            weights = " (another model's, or an earlier Trimtab's mark of the same)" if key.endswith("_weights") else ""
            raise InvalidOption(
                f"{flag}: {output} holds a run with {key}={found.get(key)!r}{weights}, now it is {run.get(key)!r}; name "
                "another folder, or discard that run with --overwrite_output_dir"
            )


def is_finished(output: Path) -> bool:
    """Whether there is an aligner with its report; its drafter may still be missing."""
    return (output / MANIFEST_NAME).exists() and (output / "training.json").exists()


def last_checkpoint(output: Path) -> Path | None:
    """The newest whole checkpoint. A kill may leave a torn one: its state file, written last, is missing then."""
    found = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for folder in found:
        if (folder / "trainer_state.json").exists():
            try:
                read_json(folder / "trainer_state.json")
            except DataError:
                continue
            return folder
    return None
