"""Kill `trimtab evolve` at random times until it has been killed often enough: nothing is lost, and the end is the same.

    make demo && python benchmarks/loop_kills.py --demo demo-out --kills 50

Votes are the demo's docstrings against those of other functions. Two rounds are played once without a kill, and then again and
again with `SIGKILL` after a random time, each time going on from what is left, until the loop ends; then a fresh one begins.
What is compared are the weights of both rounds' aligners, bit by bit, and the history but for times.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from trimtab.jsonlines import write_rows

TRAINING = ("--num_train_epochs", "1", "--learning_rate", "1e-3", "--report_to", "none", "--disable_tqdm", "true")
VOTES = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo-out"))
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="after which it is killed at the latest [default: %(default)s]"
    )
    parser.add_argument("--seed", type=int, default=0)
    said = parser.parse_args()
    draw, kills, loops = random.Random(said.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = [json.loads(line) for line in (said.demo / "data/align.jsonl").read_text(encoding="utf-8").splitlines()]
        votes = [
            {"prompt": one["prompt"], "chosen": one["completion"], "rejected": other["completion"], "key": f"user {i % 20}"}
            for i, (one, other) in enumerate(zip(rows[:VOTES], rows[VOTES : 2 * VOTES], strict=True))
        ]
        whole = _play(said.demo, folder / "whole", votes, None)
        while kills < said.kills:
            killed = _play(said.demo, folder / "killed", votes, lambda: draw.uniform(0, said.seconds))
            kills, loops = kills + killed[2], loops + 1
            assert killed[0] == whole[0], "the histories differ"
            assert all(torch.equal(a[name], b[name]) for a, b in zip(whole[1], killed[1], strict=True) for name in a)
            print(f"{loops} loops ended as the first one did, after {kills} kills", flush=True)
            shutil.rmtree(folder / "killed")


def _play(demo: Path, out: Path, votes: list[dict[str, Any]], delay: Any) -> tuple[Any, list[Any], int]:
    """Two rounds; their history, their weights, and how often they were killed."""
    kills = 0
    for part in (VOTES // 2, VOTES):
        said = out.with_name(f"{out.name}.jsonl")
        write_rows(said, votes[:part])
        words = ["evolve", "--proposal", str(demo / "proposal"), "--out", str(out), "--feedback", str(said), *TRAINING]
        while True:
            process = subprocess.Popen(
                [sys.executable, "-m", "trimtab", *words], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            try:
                status = process.wait(None if delay is None else delay())
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            if status:
                raise SystemExit(f"trimtab evolve ended with {status}")
            break
    rounds = json.loads((out / "history.json").read_text())["rounds"]
    kept = [{name: value for name, value in one.items() if name not in ("time", "seconds")} for one in rounds]
    weights = [load_file(out / f"rounds/{number:03d}/aligner/adapter_model.safetensors") for number in (1, 2)]
    return kept, weights, kills


if __name__ == "__main__":
    main()
