"""Twenty thousand requests against `trimtab serve`, a tenth cancelled midway and a tenth malformed: does anything leak?

    python benchmarks/soak.py --proposal demo-out/proposal --aligner demo-out/aligner

Aligners are loaded, replaced and unloaded all the while. It ends with an error if a good request fails, if anything is answered
with 5xx, if a malformed request is not refused, or if a slot is not given back; it prints memory as it goes.
"""

import argparse
import asyncio
import json
import random
import resource
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from serve_speed import make_adapters, start

MALFORMED: list[Any] = [
    b"{",
    b"",
    b"\xff\xfe\x00",
    b"[]",
    b'{"model": "aligned", "prompt": "a", "max_tokens": 1e400}',
    {"model": "nobody", "prompt": "a"},
    {"model": "aligned"},
    {"model": "aligned", "prompt": ""},
    {"model": "aligned", "prompt": "a", "temperature": -1},
    {"model": "aligned", "prompt": "a", "colour": "red"},
    {"model": "aligned", "prompt": [1, 10**8]},
    {"model": "aligned", "prompt": "a", "weight": [1, 2, 3]},
    {"model": "aligned", "prompt": "a", "rule": "candidates(n=100000000)"},
    {"model": "aligned", "prompt": "a " * 5000},
    {"model": "aligned", "prompt": "a", "logit_bias": {"1": "x"}},
    {"model": "aligned", "prompt": "a", "n": 10**6},
]


class Soak:
    def __init__(self, port: int, base: str, adapters: list[str], requests: int) -> None:
        self.port, self.base, self.adapters, self.requests = port, base, adapters, requests
        self.sent = 0
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, pid: int, workers: int) -> None:
        limits = httpx.Limits(max_connections=workers + 4)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=120, limits=limits) as client:
            watch = asyncio.create_task(self.watch(client, pid))
            swap = asyncio.create_task(self.swap(client))
            await asyncio.gather(*(self.work(client) for _ in range(workers)))
            for task in (watch, swap):
                task.cancel()
            await self.check_idle(client)
            print(f"{self.sent} requests; {resident(pid):.0f} MiB; {dict(self.counts)}")

    async def work(self, client: httpx.AsyncClient) -> None:
        while self.sent < self.requests:
            draw = random.Random(self.sent)
            self.sent += 1
            kind = draw.choices(("good", "cancelled", "malformed"), (8, 1, 1))[0]
            self.counts[kind] += 1
            await getattr(self, kind)(client, draw)

    async def good(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = self.body(draw, draw.randint(1, 12))
        if draw.random() < 0.3:
            body |= {"logprobs": draw.randint(0, 5), "echo": draw.random() < 0.5}
        if draw.random() < 0.2:
            body |= {"rule": draw.choice(["geometric", "nucleus", "kl_gate(tau=1.0)", "mixture", "nudge"]), "top_p": 0.9}
        body["stream"] = draw.random() < 0.5
        while True:
            answer = await client.post("/v1/completions", json=body)
            if answer.status_code != 429:
                break
            self.counts["429"] += 1
            await asyncio.sleep(0.2)
        if answer.status_code != 200 or (body["stream"] and ('data: {"error"' in answer.text or "[DONE]" not in answer.text)):
            self.wrong.append(f"good: {answer.status_code} {answer.text[-300:]} for {body}")

    async def cancelled(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = self.body(draw, 200) | {"stream": draw.random() < 0.7, "ignore_eos": True}
        task = asyncio.create_task(client.post("/v1/completions", json=body))
        await asyncio.wait({task}, timeout=draw.random() * 0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def malformed(self, client: httpx.AsyncClient, draw: random.Random) -> None:
        body = draw.choice(MALFORMED)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await client.post("/v1/completions", content=content)
        if not 400 <= answer.status_code < 500 or "message" not in answer.json()["error"]:
            self.wrong.append(f"malformed: {answer.status_code} {answer.text[:300]} for {body}")

    def body(self, draw: random.Random, max_tokens: int) -> dict[str, Any]:
        model = draw.choice([self.base, "aligned", *self.adapters])
        prompts = ["def f(x):\n", "class A:\n    def close(self):\n", "import os\n" * draw.randint(1, 8)]
        return {"model": model, "prompt": draw.choice(prompts), "max_tokens": max_tokens, "seed": draw.randrange(10**6)}

    async def swap(self, client: httpx.AsyncClient) -> None:
        """Replace and unload an aligner for ever."""
        for turn in range(10**9):
            name = self.adapters[turn % len(self.adapters)]
            for path, body in (("load", {"name": "passing", "path": name}), ("unload", {"name": "passing"})):
                answer = await client.post(f"/v1/{path}_aligner", json=body)
                if answer.status_code != 200:
                    self.wrong.append(f"{path}: {answer.status_code} {answer.text[:300]}")
            await asyncio.sleep(0.2)

    async def watch(self, client: httpx.AsyncClient, pid: int) -> None:
        started, step = time.monotonic(), max(1, self.requests // 10)
        for count in range(step, self.requests, step):
            while self.sent < count:
                await asyncio.sleep(0.05)
            print(f"{count} requests, {time.monotonic() - started:.0f} s, {resident(pid):.0f} MiB", flush=True)

    async def check_idle(self, client: httpx.AsyncClient) -> None:
        for _ in range(100):
            lines = dict(line.rsplit(" ", 1) for line in (await client.get("/metrics")).text.splitlines() if line[:1] != "#")
            busy = [float(lines[f"trimtab:num_requests_{state}"]) for state in ("running", "waiting")]
            if not any(busy):
                return
            await asyncio.sleep(0.05)
        self.wrong.append(f"slots are not given back: {busy}")


def resident(pid: int) -> float:
    """MiB of memory that a process uses."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=48)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(Path(folder), options.aligner, 8)
        flags = ["--proposal", options.proposal, "--aligner", f"aligned={options.aligner}", "--aligner_root", folder]
        server, port = start([*flags, "--served_model_name", "base"])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                for name in adapters:
                    client.post("/v1/load_aligner", json={"name": name, "path": name}).raise_for_status()
            soak = Soak(port, "base", adapters, options.requests)
            asyncio.run(soak.run(server.pid, options.workers))
        finally:
            server.terminate()
            server.wait()
    for line in soak.wrong[:10]:
        print("WRONG:", line)
    raise SystemExit(f"{len(soak.wrong)} things went wrong" if soak.wrong else 0)


if __name__ == "__main__":
    main()
