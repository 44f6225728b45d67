"""Training jobs in processes of their own on this machine, without a launcher that would clean up after them."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

HERE = Path(__file__).parent
SHARD = 8
"""Examples in a file of a cache here, so that each process makes several."""


def run_processes(
    folder: Path, jobs: Sequence[dict[str, Any]], *, count: int = 2, dies: str = "", timeout: float = 120
) -> list[tuple[int, str]]:
    """Run jobs, `{"name", "training", …options}` of `tiny_task`, one after another; each process's exit status and messages.

    `dies`: where the last process is killed, or fails: see `_install_death`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        where = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        paths = os.pathsep.join([str(HERE), str(HERE.parent / "src")])
        environment = os.environ | {name: str(value) for name, value in where.items()}
        environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "processes.py"), str(folder), json.dumps(jobs), dies]
        processes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        )
    try:
        return [(process.wait(timeout), process.stderr.read() if process.stderr else "") for process in reversed(processes)][
            ::-1
        ]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _work(folder: Path, jobs: Sequence[dict[str, Any]], dies: str) -> None:
    from tiny_task import task_options
    from trimtab.train import cache
    from trimtab.train.run import run_training as train

    cache.SHARD = SHARD
    if dies and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        _install_death(dies)
    for job in jobs:
        settings = dict(job)
        name, training = settings.pop("name"), settings.pop("training", {})
        options = task_options(folder, name, training, **settings)
        if "fsdp" in training:
            with _posing_as_accelerator():
                train(options)
        else:
            train(options)


def _posing_as_accelerator() -> Any:
    """accelerate shards weights over accelerators only, but what it then does works on processors too."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    kinds = {"_prepare_backend": lambda *_, **__: ("gloo", DistributedType.MULTI_XPU), "set_device": set_device}
    return patch.multiple(PartialState, **kinds)


def _install_death(where: str) -> None:
    """Have this process killed at the n-th call of something, said as `what n`; or fail, at `error`."""
    from transformers import Trainer

    from trimtab.models import aligner
    from trimtab.train import run
    from trimtab.train.rows import ModelRows
    from trimtab.train.trainer import AlignerTrainer

    what, _, number = where.partition(" ")
    if what == "error":

        def fails(*_: Any) -> Any:
            raise RuntimeError("no room")

        ModelRows.compress = fails  # type: ignore[method-assign, assignment]
        return
    owner, name = {
        "cache": (ModelRows, "compress"),
        "step": (AlignerTrainer, "compute_loss"),
        "checkpoint": (Trainer, "_save_rng_state"),
        "tune": (run, "tune_weight"),
        "save": (aligner, "write_json"),
    }[what]
    original, calls = getattr(owner, name), 0

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, killed)


if __name__ == "__main__":
    _work(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
