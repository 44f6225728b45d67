"""Prometheus metrics: vLLM's names under `trimtab:`, and what only an aligned model has."""

from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.decode.pace import Tally

if TYPE_CHECKING:
    from trimtab.serve.registry import Registry
    from trimtab.serve.worker import Job, Worker

__all__ = ["CONTENT_TYPE", "Metrics"]

M = TypeVar("M", Counter, Gauge, Histogram)

CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
LATENCIES = (
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
PACES = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
MAX_LABELS = 500
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """All metrics of one server. `model_name` is an aligner's name, the base's, or `several` for combinations."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._all: list[Counter | Gauge | Histogram] = []
        """Those that have a `model_name`."""
        count, measure = self._counter, self._histogram
        self._prompt = count("prompt_tokens", "Tokens of prompts.")
        self._queried = count("prefix_cache_queries", "Tokens of prompts, of which the cache of prefixes may have some.")
        self._hits = count("prefix_cache_hits", "Tokens of prompts that were taken over from it, and not read.")
        self._generated = count("generation_tokens", "Tokens generated.")
        self._finished = count("request_success", "Sequences that came to their end.", "finished_reason")
        self._failed = count("request_failure", "Requests that did not.", "reason")
        self._first = measure("time_to_first_token_seconds", "From a request's arrival to its first token.", LATENCIES)
        self._next = measure("request_time_per_output_token_seconds", "Mean time of a request's later tokens.", PACES)
        self._whole = measure("e2e_request_latency_seconds", "From a request's arrival to its end.", LATENCIES)
        self._prompt_sizes = measure("request_prompt_tokens", "Tokens of a prompt.", SIZES)
        self._generation_sizes = measure("request_generation_tokens", "Tokens of a completion.", SIZES)
        self._drafts = count("spec_decode_num_drafts", "Steps of a sequence that verified drafts.")
        self._drafted = count("spec_decode_num_draft_tokens", "Draft tokens verified.")
        self._tested = count("spec_decode_num_tested_tokens", "Of those, up to the first that failed.")
        self._accepted = count("spec_decode_num_accepted_tokens", "Draft tokens that stayed; of the tested, the acceptance.")
        self._calls = count("proposal_calls", "Passes of the proposal, once for each sequence in them.")
        self._handovers = count("handovers", "Sequences that a rule has handed over, such as confidence.")
        self._before = count("handover_tokens", "Tokens of those before they were.")
        self._log_z_count = count("log_z_observations", "Positions at which log Z was observed.")
        self._acceptance = self._gauge("acceptance", "Share of tested draft tokens that stayed, since the start.")
        self._per_call = self._gauge("tokens_per_proposal_call", "Tokens of a sequence for each pass of the proposal.")
        self._mean_log_z = self._gauge("log_z", "Mean log Z, the log of what the unnormalised target sums to, in nats.")
        self.requests = 0
        """Requests that are over."""
        self._tallies: dict[str, tuple[Tally, list[float]]] = {}

    def watch(self, worker: "Worker", registry: "Registry") -> None:
        """Show the engine's and the aligners' state from now on."""
        engine = worker.engine
        for name, text, read in (
            ("num_requests_running", "Sequences that are being decoded.", lambda: engine.running),
            (
                "num_requests_waiting",
                "Sequences that wait for a slot, or read their prompts.",
                lambda: len(engine) - engine.running,
            ),
            ("kv_cache_usage_perc", "Share of the cache that sequences may come to use.", lambda: engine.cache_usage),
            ("aligners_loaded", "Aligners in memory.", lambda: sum(e.loaded is not None for e in registry.entries)),
            ("aligners_known", "Aligners that can be asked for.", lambda: len(registry.entries)),
            ("aligner_memory_bytes", "What aligners take in memory.", lambda: registry.num_bytes),
        ):
            Gauge(f"trimtab:{name}", text, registry=self._registry).set_function(read)

    def finish(self, label: str, job: "Job", seconds: float, outcome: str) -> None:
        """Count a request that is over.

        Args:
            label: its model.
            job: what it was.
            seconds: how long it took.
            outcome: `"ok"`, or why it failed.
        """
        self.requests += 1
        label = self._known(label)
        prompts = {s.prompt_index: len(s.prompt) for s in job.sequences}
        tokens = sum(len(s.tokens) for s in job.sequences)
        self._prompt.labels(label).inc(sum(prompts.values()))
        self._queried.labels(label).inc(sum(prompts.values()))
        self._hits.labels(label).inc(sum(s.cached_tokens for s in job.readers))
        self._generated.labels(label).inc(tokens)
        for size in prompts.values():
            self._prompt_sizes.labels(label).observe(size)
        for s in job.sequences:
            self._generation_sizes.labels(label).observe(len(s.tokens))
            if s.finish_reason:
                self._finished.labels(label, s.finish_reason).inc()
        if outcome != "ok":
            self._failed.labels(label, outcome).inc()
        self._whole.labels(label).observe(seconds)
        if job.first_token is not None:
            first = job.first_token - job.arrived
            self._first.labels(label).observe(first)
            longest = max(len(s.tokens) for s in job.sequences)
            if longest > 1:
                self._next.labels(label).observe((seconds - first) / (longest - 1))
        self._tell_speculation(label, job)

    def _known(self, label: str) -> str:
        """What a model is called here: combinations of aligners share a name, or clients could make up series without end."""
        label = "several" if "+" in label else label
        if label not in self._tallies and len(self._tallies) >= MAX_LABELS:
            return "other"
        return label

    def forget(self, name: str) -> None:
        """Drop the series of an aligner that is gone."""
        self._tallies.pop(name, None)
        for metric in self._all:
            metric.remove_by_labels({"model_name": name})

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self._registry)

    def _tell_speculation(self, label: str, job: "Job") -> None:
        total, log_z = self._tallies.setdefault(label, (Tally(), [0.0, 0.0]))
        for s in job.sequences:
            self._drafts.labels(label).inc(s.tally.calls if s.tally.drafted else 0)
            self._drafted.labels(label).inc(s.tally.drafted)
            self._tested.labels(label).inc(s.tally.tested)
            self._accepted.labels(label).inc(s.tally.accepted)
            self._calls.labels(label).inc(s.tally.calls)
            if s.handover_at is not None:
                self._handovers.labels(label).inc()
                self._before.labels(label).inc(s.handover_at)
            total.add(s.tally)
            self._log_z_count.labels(label).inc(len(s.log_z))
            log_z[0] += sum(s.log_z)
            log_z[1] += len(s.log_z)
        for gauge, value in (
            (self._acceptance, total.acceptance),
            (self._per_call, total.tokens_per_call),
            (self._mean_log_z, log_z[0] / log_z[1] if log_z[1] else None),
        ):
            if value is not None:
                gauge.labels(label).set(value)

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        return self._add(Counter(f"trimtab:{name}", text, ["model_name", *more], registry=self._registry))

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._add(Gauge(f"trimtab:{name}", text, ["model_name"], registry=self._registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return self._add(Histogram(f"trimtab:{name}", text, ["model_name"], buckets=buckets, registry=self._registry))

    def _add(self, metric: M) -> M:
        self._all.append(metric)
        return metric
