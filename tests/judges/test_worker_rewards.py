"""Reward functions in worker processes: the same scores as here, and no hang, crash or leftover, whatever a function does."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from rewards_of import write_functions
from trimtab.errors import InvalidOption, ModelError
from trimtab.judges.rewards.base import Failures
from trimtab.judges.rewards.kinds import make_reward
from trimtab.judges.rewards.workers import WorkerReward

ODD = '''
"""Functions that do what their completions say."""

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path


def odd(completions, **kwargs):
    print("asked for", completions)
    (said,) = completions
    if said == "sleeps":
        time.sleep(60)
    if said == "holds the lock":
        re.match("(a+)+$", "a" * 50 + "b")
    if said == "exits":
        os._exit(3)
    if said == "is killed":
        os.kill(os.getpid(), 9)
    if said == "raises":
        raise ValueError("no")
    if said == "leaves":
        sys.exit("gone")
    if said == "loses its connection":
        os.closerange(3, 256)
    return {"nan": [float("nan")], "word": ["good"], "two": [1, 2], "object": [object]}.get(said, [len(said)])


def process(completions):
    return [os.getpid()]


def child(completions):
    return [subprocess.Popen(["sleep", "60"]).pid]


def raises_once(completions, seen):
    if not Path(seen[0]).exists():
        Path(seen[0]).touch()
        raise ValueError("only once")
    return [1.0]


def threads(completions):
    return [int(os.environ["OMP_NUM_THREADS"]) + 10 * (threading.current_thread() is threading.main_thread())]


def torch_is_there(completions):
    return ["torch" in sys.modules]
'''

PROMPTS, ANSWERS = [f"p{i}" for i in range(12)], ["x" * (i * 7 % 12) for i in range(12)]
COLUMNS = [{"answer": answer if i % 3 else "no", "more": {"i": i}} for i, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    write_functions(folder)
    (folder / "odd.py").write_text(ODD, encoding="utf-8")
    return folder


def asked(prompts, columns=None):
    sources = [f"d.jsonl:{i + 1}" for i in range(len(prompts))]
    return SimpleNamespace(prompts=prompts, columns=columns or [{}] * len(prompts), sources=sources)


def scores(reward, *answers, columns=None):
    with reward:
        return list(reward.score(PROMPTS[: len(answers)], answers, columns or [{}] * len(answers)))


def is_there(pid):
    """Whether a process runs; one that has ended and is not waited for by who took it over does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=10.0):
    end = time.monotonic() + seconds
    while any(map(is_there, pids)) and time.monotonic() < end:
        time.sleep(0.01)
    return not any(map(is_there, pids))


@pytest.mark.parametrize("name", ["wordy", "picky", "slow", "graded"])
@pytest.mark.parametrize("workers", [1, 3])
def test_scores_are_those_of_this_process_in_their_order(name, workers, folder):
    """Columns, None, async functions and chats included."""
    text = f"{folder}/rewards.py:{name}"
    here = make_reward(text, {})
    prompts = [PROMPTS[0], [{"role": "user", "content": "hi"}], *PROMPTS[2:]]
    with WorkerReward(text, workers=workers, timeout=20) as there:
        for reward in (here, there):
            reward.check(asked(prompts, COLUMNS))
        there.load(asked(prompts, COLUMNS), "2026-11-30")
        assert (there.name, there.fingerprint, there.label()) == (here.name, here.fingerprint, here.label())
        assert (there.reads_columns, there.identity()) == (here.reads_columns, here.identity())
        assert there.score([], [], []) == []
        for _ in range(2):
            assert there.score(prompts, ANSWERS, COLUMNS) == here.score(prompts, ANSWERS, COLUMNS)
        assert there.failures == Failures()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("raises", r"raised ValueError: no \(line 25 of odd.py\)"),
        ("leaves", r"raised SystemExit: gone \(line 27 of odd.py\)"),
        ("nan", "gave nan, but a score is a finite number, or None"),
        ("word", "gave 'good', but a score is a finite number, or None"),
        ("object", "gave <class 'object'>, but a score is a finite number, or None"),
        ("two", "must give a list of 1 score, one for each completion, not 2 scores"),
        ("exits", r"ended its worker process \(exit status 3\)"),
        ("is killed", r"ended its worker process \(SIGKILL, as when memory runs out\)"),
        ("loses its connection", "ended its worker process"),
    ],
)
def test_a_completion_that_a_function_fails_for_is_named_with_its_prompt(said, message, folder):
    text = f"{folder}/odd.py:odd"
    reward = WorkerReward(text, workers=2)
    reward.called = f"--reward {text}"
    reward.check(asked(PROMPTS))
    where = re.escape(f"--reward {text}, for the completion '{said}' of the prompt 'p1' (d.jsonl:2): ")
    with pytest.raises(ModelError, match=f"^{where}{message}"):
        scores(reward, "good", said, "fine")


@pytest.mark.parametrize("said", ["sleeps", "holds the lock"])
def test_what_takes_too_long_is_ended_and_named_within_the_limit(said, folder):
    with WorkerReward(f"{folder}/odd.py:odd", workers=2, timeout=0.3) as reward:
        reward.load(asked(PROMPTS), "2026-11-30")
        begin = time.monotonic()
        message = f"for the completion '{said}' of the prompt 'p1': took more than 0.3 seconds, and was ended"
        with pytest.raises(ModelError, match=message):
            reward.score(PROMPTS[:3], ["good", said, "fine"], [{}] * 3)
        assert time.monotonic() - begin < 5
        assert reward.score(PROMPTS[:2], ["good", "fine!"], [{}] * 2) == [4.0, 5.0]


def test_a_completion_that_a_function_fails_for_may_have_no_score_and_the_rest_is_scored(folder):
    reward = WorkerReward(f"{folder}/odd.py:odd", workers=2, timeout=1, on_error="none")
    given = ["good", "exits", "fine!", "nan", "sleeps", "raises", "", "is killed", "last"]
    assert scores(reward, *given) == [4.0, None, 5.0, None, None, None, 0.0, None, 4.0]
    assert reward.failures.count == 5
    assert re.search(
        "for the completion '(exits|nan|raises|is killed|sleeps)' of the prompt 'p[13457]': ", reward.failures.first
    )


def test_what_raises_once_is_an_error_the_once(folder, tmp_path):
    seen = [{"seen": str(tmp_path / "seen")}]
    with WorkerReward(f"{folder}/odd.py:raises_once") as reward:
        with pytest.raises(ModelError, match="raised ValueError: only once"):
            reward.score(["p"], ["x"], seen)
        assert reward.score(["p"], ["x"], seen) == [1.0]


def test_closed_workers_are_gone_with_what_they_started_and_others_come(folder):
    reward = WorkerReward(f"{folder}/odd.py:process", workers=2)
    reward.load(asked(PROMPTS), "2026-11-30")
    first = {*reward.score(PROMPTS, ANSWERS, COLUMNS)}
    assert 1 <= len(first) <= 2
    assert all(map(is_there, map(int, first)))
    reward.close()
    reward.close()
    assert not any(map(is_there, map(int, first)))
    second = {*scores(reward, *ANSWERS)}
    assert not first & second
    assert wait_until_gone(map(int, scores(WorkerReward(f"{folder}/odd.py:child"), "a", "b")))


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("", 0),
        ("raise KeyboardInterrupt", -2),
        ("os.kill(os.getpid(), 15)", -15),
        ("os.kill(os.getpid(), 9)", -9),
        ("threading.Timer(0.3, os.kill, [os.getpid(), 2]).start(); reward.score(['p'], ['sleeps'], [{}])", -2),
        ("threading.Timer(0.3, os.kill, [os.getpid(), 9]).start(); reward.score(['p'], ['sleeps'], [{}])", -9),
    ],
)
def test_no_worker_outlives_the_process_that_it_works_for(end, status, folder):
    """However that ends, between calls or within one; and its standard output has nothing of the function's."""
    code = f"""
import json, os, signal, threading
from trimtab.judges.rewards.workers import WorkerReward

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have been told to ignore it
asked = WorkerReward({f"{folder}/odd.py:process"!r}, workers=2)
reward = WorkerReward({f"{folder}/odd.py:odd"!r}, workers=2)
reward.load(None, "")
pids = [worker._process.pid for worker in reward._pool._workers]
print(json.dumps([*pids, *asked.score(["p"], ["x"], [{{}}])]), flush=True)
{end}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, len(json.loads(done.stdout))) == (status, 3)
    assert wait_until_gone(map(int, json.loads(done.stdout)))


def test_a_worker_ends_though_an_interrupt_has_left_its_lock_taken(folder, monkeypatch):
    """`Popen.poll` takes a lock before its `try`: an interrupt there leaves it taken, and a plain `wait` would be for ever."""
    monkeypatch.setattr("trimtab.judges.rewards.worker.GONE", 0.2)
    reward = WorkerReward(f"{folder}/odd.py:process")
    reward.load(None, "")
    process = reward._pool._workers[0]._process
    process._waitpid_lock.acquire()
    reward.close()
    assert Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z"
    process._waitpid_lock.release()
    assert process.wait(5) == -9


def test_a_worker_starts_without_torch_and_calls_on_its_main_thread_with_one_thread(folder):
    assert scores(WorkerReward(f"{folder}/odd.py:threads"), "a") == [11.0]
    assert scores(WorkerReward(f"{folder}/odd.py:torch_is_there"), "a") == [0.0]


def test_a_script_is_not_run_once_more_in_its_workers(folder, tmp_path):
    """It needs no `if __name__ == "__main__"`."""
    code = f"""
print("run")
from trimtab.judges.rewards.workers import WorkerReward
with WorkerReward({f"{folder}/odd.py:odd"!r}) as reward:
    print(reward.score(["p"], ["abc"], [{{}}]))
"""
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "run\n[3.0]\n"
    assert done.stderr == "asked for ['abc']\n"


def test_a_worker_that_dies_while_nobody_asks_it_is_replaced(folder):
    with WorkerReward(f"{folder}/odd.py:process") as reward:
        seen = set()
        for _ in range(3):
            (score,) = reward.score(["p"], ["a"], [{}])
            (worker,) = reward._pool._workers
            assert score == worker._process.pid
            seen.add(score)
            os.kill(worker._process.pid, signal.SIGKILL)
            assert worker._process.wait(10) == -signal.SIGKILL  # all of its threads, so that its connection is closed
        assert len(seen) == 3


def test_what_cannot_be_sent_is_named(folder):
    class Local:
        pass

    with WorkerReward(f"{folder}/rewards.py:wordy") as reward:
        message = "the column 'mine' cannot be sent to a worker process: .*Can't"
        with pytest.raises(ModelError, match=message):
            reward.score(["p"], ["a"], [{"fine": 1, "mine": Local()}])
        assert reward.score(["p"], ["a"], [{"fine": 1}]) == [1.0]


def test_a_class_that_a_worker_cannot_import_is_named(folder, monkeypatch):
    module = type(sys)("only_here")
    exec("class Here:\n    pass", vars(module))
    monkeypatch.setitem(sys.modules, "only_here", module)
    with (
        WorkerReward(f"{folder}/rewards.py:wordy") as reward,
        pytest.raises(ModelError, match="a worker process cannot read what the data have: ModuleNotFoundError"),
    ):
        reward.score(["p"], ["a"], [{"mine": module.Here()}])


@pytest.mark.parametrize(
    ("there", "message"),
    [
        (
            "import os\nif 'OPENBLAS_NUM_THREADS' in os.environ:\n    raise OSError('no room')",
            "cannot be imported: OSError: no room",
        ),
        ("import os\nif 'OPENBLAS_NUM_THREADS' in os.environ:\n    os._exit(4)", r"ended its worker process \(exit status 4\)"),
    ],
)
def test_a_function_that_a_worker_cannot_import_is_refused_when_it_is_loaded(there, message, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    (tmp_path / "r.py").write_text(f"{there}\ndef f(completions):\n    return [1]\n", encoding="utf-8")
    reward = WorkerReward(f"{tmp_path}/r.py:f", workers=2, on_error="none")
    with pytest.raises(ModelError, match=message):
        reward.load(asked(PROMPTS), "2026-11-30")
    with pytest.raises(ModelError, match=message):
        reward.score(["p"], ["a"], [{}])


def test_a_file_that_changes_during_a_run_is_refused_and_the_folder_may_change(tmp_path, monkeypatch):
    file = tmp_path / "r.py"
    file.write_text("def f(completions):\n    return [1]\n", encoding="utf-8")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    reward = WorkerReward("r.py:f")
    monkeypatch.chdir("other")
    assert scores(reward, "a") == [1.0]
    file.write_text("def f(completions):\n    return [2]\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"r\.py:f is another one than when the run began: its file has changed"):
        reward.load(asked(PROMPTS), "2026-11-30")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers must be at least 1, not 0"),
        ({"timeout": 0}, "timeout must be above 0 and finite, not 0"),
        ({"timeout": float("nan")}, "timeout must be above 0 and finite, not nan"),
        ({"on_error": "skip"}, "on_error must be one of stop, none"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, folder):
    with pytest.raises(InvalidOption, match=message):
        WorkerReward(f"{folder}/odd.py:odd", **settings)


def test_a_copy_of_the_process_ends_no_workers(folder):
    """As data loaders make them."""
    code = f"""
import os
from trimtab.judges.rewards.workers import WorkerReward
reward = WorkerReward({f"{folder}/odd.py:process"!r})
pid = reward.score(["p"], ["a"], [{{}}])
if copy := os.fork():
    os.waitpid(copy, 0)
    print(reward.score(["p"], ["a"], [{{}}]) == pid)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("True\n", "")
