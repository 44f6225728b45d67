"""How fast `trimtab serve` is, beside the same server's bare proposal and beside the engine without HTTP.

    python benchmarks/serve_speed.py --proposal demo-out/proposal --aligner demo-out/aligner [--adapters 100]

Contestants take turns; figures are medians. The client reads raw sockets, for it shares the machine's cores. With `--adapters`,
so many random LoRA adapters over the aligner are loaded, and streams that are spread over all of them are timed against
streams that share one.
"""

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

PROMPT = "def add_{}(a, b):\n"


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        names = make_adapters(Path(folder), options.aligner, options.adapters) if options.adapters else []
        flags = ["--proposal", options.proposal, "--aligner", f"aligned={options.aligner}", "--aligner_root", folder]
        for name in ("dtype", "num_speculative_tokens", "stream_interval"):
            flags += [f"--{name}", getattr(options, name)]
        server, port = start(flags)
        try:
            for name in names:
                post(port, "/v1/load_aligner", {"name": name, "path": name})
            report = measure(server.pid, port, options, names)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(report, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--adapters", type=int, default=0)
    parser.add_argument("--max_tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num_speculative_tokens", default="", help="default: adaptive")
    parser.add_argument("--rule", default=None)
    parser.add_argument("--stream_interval", default="", help="default: the server's own")
    return parser.parse_args()


def measure(pid: int, port: int, options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    from trimtab import AlignedModel, SamplingParams
    from trimtab.evaluate.speed import describe_machine

    engines = {"base": AlignedModel.from_pretrained(options.proposal, dtype=options.dtype)}
    engines["aligned"] = AlignedModel.from_pretrained(options.proposal, options.aligner, dtype=options.dtype)
    base = json.loads(urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").read())["data"][0]["id"]
    models = {"base": base, "aligned": "aligned"}

    def by_http(model: str, streams: int) -> Callable[[], Times]:
        return lambda: stream(port, [models.get(model, model)] * streams, options.max_tokens, options.rule)

    def by_engine(model: str, streams: int) -> Callable[[], Times]:
        def run() -> Times:
            params = SamplingParams(max_tokens=options.max_tokens, ignore_eos=True, seed=0, rule=options.rule)
            started, first = time.perf_counter(), 0.0
            for _ in engines[model].stream([PROMPT.format(i) for i in range(streams)], params):
                first = first or time.perf_counter() - started
            return Times(streams, options.max_tokens, first, time.perf_counter() - started)

        return run

    contests = {
        f"{where}, {count} stream{'s' * (count > 1)}": {m: make(m, count) for m in ("base", "aligned")}
        for count in (1, options.streams)
        for where, make in (("http", by_http), ("engine", by_engine))
    }
    runs = {(contest, name): [] for contest, contestants in contests.items() for name in contestants}
    for turn in range(options.repeats + 1):
        for contest, contestants in contests.items():
            for name, run in contestants.items():
                found = run()
                if turn:  # the first one warms up
                    runs[contest, name].append(found)
    report: dict[str, Any] = {**describe_machine(engines["base"].proposal.device), "max_tokens": options.max_tokens}
    for (contest, name), found in runs.items():
        report.setdefault(contest, {})[name] = {
            "tokens_per_second": round(statistics.median(times.tokens_per_second for times in found), 1),
            "first_token_ms": round(1000 * statistics.median(times.first for times in found), 2),
            "next_token_ms": round(1000 * statistics.median(times.next for times in found), 3),
        }
    one, many = report["http, 1 stream"], report[f"http, {options.streams} streams"]
    report["ratios"] = {
        "first token, aligned / base, 1 stream": round(one["aligned"]["first_token_ms"] / one["base"]["first_token_ms"], 3),
        "throughput, aligned / base, 1 stream": ratio(one, "aligned", "base"),
        f"throughput, aligned / base, {options.streams} streams": ratio(many, "aligned", "base"),
        **{
            f"time per token after the first, http / engine, {name}": round(
                one[name]["next_token_ms"] / report["engine, 1 stream"][name]["next_token_ms"], 3
            )
            for name in ("base", "aligned")
        },
    }
    report["event loop, 1 stream"] = time_event_loop(pid, port, base, options)
    if names:
        report["adapters"] = compare_adapters(port, options, names)
    return report


def time_event_loop(pid: int, port: int, base: str, options: argparse.Namespace) -> dict[str, float]:
    """Processor time of the server's event loop, which is its first thread, for each token of a stream of the base."""
    schedule = Path(f"/proc/{pid}/task/{pid}/schedstat")
    before, started, runs = int(schedule.read_text().split()[0]), time.perf_counter(), 2 * options.repeats
    for _ in range(runs):
        stream(port, [base], options.max_tokens, options.rule)
    spent, passed = (int(schedule.read_text().split()[0]) - before) / 1e9, time.perf_counter() - started
    tokens = runs * options.max_tokens
    return {"us_per_token": round(1e6 * spent / tokens, 1), "share_of_time": round(spent / passed, 3)}


def compare_adapters(port: int, options: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """Streams over all adapters against streams over one of them."""
    speeds: dict[str, list[float]] = {"one": [], "all": []}
    for turn in range(options.repeats + 1):
        start = turn * options.streams
        spread = [names[(start + i) % len(names)] for i in range(options.streams)]
        for name, wanted in (("one", [names[0]] * options.streams), ("all", spread)):
            times = stream(port, wanted, options.max_tokens, options.rule)
            if turn:
                speeds[name].append(times.tokens_per_second)
    found = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    return {**found, "all / one": round(found["all"] / found["one"], 3), "adapters": len(names)}


def ratio(found: dict[str, Any], above: str, below: str) -> float:
    return round(found[above]["tokens_per_second"] / found[below]["tokens_per_second"], 3)


class Times(NamedTuple):
    """Seconds of one run: until a stream's first token (the median), and in all."""

    streams: int
    max_tokens: int
    first: float
    total: float

    @property
    def tokens_per_second(self) -> float:
        return self.streams * self.max_tokens / self.total

    @property
    def next(self) -> float:
        """Seconds from one token of a stream to the next."""
        return (self.total - self.first) / (self.max_tokens - 1)


def stream(port: int, models: Sequence[str], max_tokens: int, rule: str | None) -> Times:
    """Ask for a stream from each of these models at once."""
    selector, started, firsts = selectors.DefaultSelector(), time.perf_counter(), dict.fromkeys(range(len(models)), 0.0)
    for i, model in enumerate(models):
        connection = socket.create_connection(("127.0.0.1", port))
        asked = {
            "model": model,
            "prompt": PROMPT.format(i),
            "max_tokens": max_tokens,
            "seed": i,
            "stream": True,
            "ignore_eos": True,
        }
        body = json.dumps(asked | ({"rule": rule} if rule else {})).encode()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        selector.register(connection, selectors.EVENT_READ, [i, b""])
    left = len(models)
    while left:
        for key, _ in selector.select():
            connection: Any = key.fileobj
            received = connection.recv(1 << 20)
            i, tail = key.data
            if not firsts[i] and b"data: " in received:
                firsts[i] = time.perf_counter() - started
            key.data[1] = (tail + received)[-200:]
            if not received or b"[DONE]" in key.data[1]:
                assert b"[DONE]" in key.data[1], key.data[1]
                selector.unregister(connection)
                connection.close()
                left -= 1
    return Times(len(models), max_tokens, statistics.median(firsts.values()), time.perf_counter() - started)


def start(flags: Sequence[str]) -> tuple["subprocess.Popen[str]", int]:
    """The server's process and port, once it is ready."""
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0"]
    given = [part for pair in zip(flags[::2], flags[1::2], strict=True) if pair[1] != "" for part in pair]
    server = subprocess.Popen([*command, *given], stderr=subprocess.PIPE, text=True)
    port = 0
    assert server.stderr is not None
    for line in server.stderr:
        if "listening on" in line:
            port = int(json.loads(line)["message"].rpartition(":")[2])
        if '"ready' in line:
            subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)  # or its log would fill the pipe
            return server, port
    raise SystemExit("the server did not start")


def post(port: int, path: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), method="POST")
    urllib.request.urlopen(request).read()


def make_adapters(folder: Path, base: str, count: int) -> list[str]:
    """Random LoRA adapters of rank 8 over all projections, each in a folder of its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    from trimtab.models.loading import load_model, load_tokenizer

    model = get_peft_model(load_model(base, device="cpu"), LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = str(Path(base).resolve())
    tokenizer = load_tokenizer(base)
    names = [f"lora-{i}" for i in range(count)]
    for i, name in enumerate(names):
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(0, 0.02, generator=generator)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return names


if __name__ == "__main__":
    main()
