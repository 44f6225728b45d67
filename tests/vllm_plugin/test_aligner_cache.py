"""The aligner's cache: whatever requests do, each row is that of the request's tokens alone, in a fresh state."""

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.models.adapters import AdapterPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.vllm.cache import PATIENCE, AlignerCache, Ask, Request

V = 28
CAPACITY = 24


def make_model(kind: str = "llama", **settings: Any) -> HuggingFaceLM:
    return HuggingFaceLM(tiny_model(kind, V, seed=3, spread=0.2, **settings))


@pytest.fixture(scope="module")
def model() -> HuggingFaceLM:
    return make_model()


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterPool, list[Any]]:
    """A base, and its adapters of different ranks and modules."""
    folder = tmp_path_factory.mktemp("pool")
    base: Path = save_tiny(folder / "base", tiny_model("llama", V, seed=7, spread=0.2), tiny_tokenizer())
    pool = AdapterPool(load_model(base))
    kinds = [{"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"r": 5, "target_modules": ["down_proj", "k_proj"]}]
    loras = [save_lora(folder / str(i), base, seed=i, **kind) for i, kind in enumerate(kinds)]
    return pool, [pool.read(lora, lora.name).adapter for lora in loras]


Row = tuple[Any, tuple[int, ...], torch.Tensor]
"""Adapter, tokens, and the row after them."""


def check_rows(model: HuggingFaceLM, rows: Sequence[Row], atol: float = 1e-5) -> None:
    """Compare with each sequence read at once in a state of its own."""
    alone: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
    for adapter, tokens, row in sorted(rows, key=lambda entry: -len(entry[1])):
        if (id(adapter), tokens) not in alone:
            state = model.new_state(1, len(tokens))
            state.adapters = [adapter]
            expected = model.extend(state, torch.tensor([tokens]), [len(tokens)])[0]
            alone |= {(id(adapter), tokens[: t + 1]): expected[t] for t in range(len(tokens))}
        assert_close(row, alone[id(adapter), tokens], atol=atol, rtol=0)


@dataclass
class Job:
    """A request with all of its life."""

    prompt: list[int]
    adapters: list[Any]
    request: Request
    computed: int = 0
    """How much of it vLLM has read; less than all while it draws nothing."""
    truth: list[int] = field(default_factory=list)
    """The same as its output, apart from vLLM's own list."""

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.truth)


class Schedule:
    """Plays vLLM at random: requests arrive, are read in parts, draw, leave, and come back.

    Args:
        seed: of all choices.
        room: the most requests at a step.
        adapters: what they may use; None for the model itself.
        kinds: the most adapters of one request.
    """

    def __init__(self, seed: int, room: int, adapters: Sequence[Any] = (None,), kinds: int = 1) -> None:
        self.random = random.Random(seed)
        self.room, self.adapters, self.kinds = room, adapters, kinds
        self.active: list[Job] = []
        self.parked: list[Job] = []
        self.prompts: list[list[int]] = []
        self.happened: set[str] = set()

    def draw(self, count: int) -> list[int]:
        return [self.random.randrange(V) for _ in range(count)]

    def arrive(self) -> None:
        lengths = [1, 2, self.random.randint(3, 12), CAPACITY - 1, CAPACITY]
        if self.prompts and self.random.random() < 0.3:
            prompt = self.random.choice(self.prompts)  # one more sample of the same list
            self.happened.add("shared")
        else:
            prompt = self.draw(self.random.choice(lengths))
            self.prompts.append(prompt)
        adapters = self.random.sample(list(self.adapters), self.random.randint(1, self.kinds))
        self.active.append(Job(prompt, adapters, Request(prompt, []), self.start(len(prompt))))

    def start(self, length: int) -> int:
        """How much of a newcomer is there at once: all of it, or less, as with another cache that knows a part."""
        return self.random.choice([length, self.random.randrange(length)])

    def leave(self, job: Job) -> None:
        self.active.remove(job)
        job.request.gone = True
        if self.random.random() < 0.7:
            self.parked.append(job)

    def come_back(self, job: Job) -> None:
        self.parked.remove(job)
        change = self.random.choice(["same", "copied", "longer", "shorter", "other"])
        if change in ("longer", "other"):
            kept = len(job.truth) // 2 if change == "other" else len(job.truth)
            job.truth = [*job.truth[:kept], *self.draw(self.random.randint(0, CAPACITY - len(job.prompt) - kept))]
        elif change == "shorter":
            del job.truth[self.random.randint(0, len(job.truth)) :]
        self.happened.add(change)
        output = job.request.output if change == "same" else list(job.truth)
        job.request, job.computed = Request(job.prompt, output), self.start(len(job.tokens))
        self.active.append(job)

    def step(self, cache: AlignerCache) -> list[Row]:
        """One of vLLM's steps; the rows that it had."""
        for job in list(self.active):
            if len(job.tokens) == CAPACITY or self.random.random() < 0.12:
                self.leave(job)
        while len(self.active) < self.room and self.random.random() < 0.4:
            if self.parked and self.random.random() < 0.5:
                self.come_back(self.random.choice(self.parked))
            else:
                self.arrive()
        if self.random.random() < 0.3:
            self.random.shuffle(self.active)
        for job in self.active:
            if job.truth and self.random.random() < 0.05:  # a load that failed takes tokens back
                keep = self.random.randrange(len(job.truth))
                del job.truth[keep:], job.request.output[keep:]  # type: ignore[attr-defined]
                job.computed = self.start(len(job.tokens))
                self.happened.add("taken back")
        asks, drawing = [], []
        for job in self.active:
            limit = None if job.computed >= len(job.tokens) else job.computed
            asks += [Ask(job.request, adapter, limit) for adapter in job.adapters]
            if limit is None:
                drawing += [(adapter, job.tokens) for adapter in job.adapters]
            else:
                self.happened.add("read behind its prompt" if limit > len(job.prompt) else "read in parts")
        rows = cache.rows(asks)
        assert rows.shape == (len(drawing), V)
        for job in self.active:
            if job.computed < len(job.tokens):
                job.computed += self.random.randint(1, len(job.tokens) - job.computed)
            elif self.random.random() < 0.9 and len(job.tokens) < CAPACITY:  # now and then a drawn token does not count
                job.truth += (token := self.draw(1))
                job.request.output += token  # type: ignore[operator]
                job.computed = len(job.tokens)
        return [(*key, row) for key, row in zip(drawing, rows, strict=True)]


EVERYTHING = {"shared", "same", "copied", "longer", "shorter", "other", "taken back", "read in parts", "read behind its prompt"}


def buffers(cache: AlignerCache) -> list[int]:
    return [buffer.data_ptr() for layer in cache._state.layers for buffer in (layer.keys, layer.values)]


def play(cache: AlignerCache, schedule: Schedule, steps: int) -> list[Row]:
    before, size = buffers(cache), cache.num_bytes
    rows = [row for _ in range(steps) for row in schedule.step(cache)]
    assert (buffers(cache), cache.num_bytes) == (before, size), "memory never grows"
    assert schedule.happened == EVERYTHING
    return rows


@pytest.mark.parametrize(("room", "chunk"), [(1, 1), (3, 1), (3, 7), (5, 1000)])
def test_rows_are_those_of_each_request_alone(room, chunk, model):
    for seed in range(2):
        cache = AlignerCache(model, room, CAPACITY, chunk)
        rows = play(cache, Schedule(seed, room), 200)
        assert len(rows) > 100
        check_rows(model, rows)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "gemma", "falcon_h1", "lfm2"])
def test_so_are_those_of_models_on_the_stock_pass(kind):
    model = HuggingFaceLM(tiny_model(kind, V, seed=3, spread=0.2), lean=False)
    check_rows(model, play(AlignerCache(model, 3, CAPACITY, 8), Schedule(0, 3), 150))


def test_so_are_those_of_a_context_that_is_all_used():
    model = make_model("gpt2", n_positions=CAPACITY)
    assert model.max_length == CAPACITY
    rows = play(AlignerCache(model, 3, CAPACITY, 8), Schedule(1, 3), 200)
    assert max(len(tokens) for _, tokens, _ in rows) == CAPACITY
    check_rows(model, rows)


@pytest.mark.parametrize(("dtype", "atol"), [("float64", 1e-10), ("bfloat16", 6e-2)])
def test_so_are_those_in_another_precision(dtype, atol):
    model = HuggingFaceLM(tiny_model("llama", V, seed=3, spread=0.1).to(getattr(torch, dtype)))
    cache = AlignerCache(model, 3, CAPACITY, 8)
    rows = play(cache, Schedule(0, 3), 150)
    assert cache.num_bytes == 3 * (CAPACITY + 1) * model.cache_bytes_per_token
    check_rows(model, rows, atol)


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_so_are_those_of_adapters_over_one_base(chunk, pool):
    base, adapters = pool
    for seed in range(2):
        cache = AlignerCache(base, 4 * 2, CAPACITY, chunk)
        rows = play(cache, Schedule(seed, 4, adapters, kinds=2), 120)
        assert {id(adapter) for adapter, _, _ in rows} == set(map(id, adapters))
        check_rows(base, rows)


# ---- what is read


@pytest.fixture
def passes(model, monkeypatch) -> list[list[int]]:
    """The counts of each pass that reads prompts."""
    seen: list[list[int]] = []
    theirs = model.prefill

    def prefill(state: Any, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        seen.append(list(counts))
        return theirs(state, tokens, counts)

    monkeypatch.setattr(model, "prefill", prefill)
    return seen


def read(passes: list[list[int]]) -> int:
    """Tokens since the last time."""
    total = sum(map(sum, passes))
    passes.clear()
    return total


def test_each_token_is_read_once(model, passes):
    cache, request = AlignerCache(model, 2, CAPACITY, 100), Request(list(range(10)), [])
    assert cache.rows([Ask(request, limit=0)]).shape == (0, V)
    assert read(passes) == 0
    cache.rows([Ask(request, limit=4)])
    assert read(passes) == 4
    cache.rows([Ask(request, limit=4)])
    assert read(passes) == 0
    cache.rows([Ask(request)])
    assert read(passes) == 5, "all but the last token, which the drawing pass reads"
    request.output.append(1)
    cache.rows([Ask(request)])
    assert read(passes) == 0


def test_a_limit_beyond_the_tokens_leaves_the_last_for_the_draw(model, passes):
    cache, request = AlignerCache(model, 1, CAPACITY, 100), Request([1, 2, 3], [4, 5])
    cache.rows([Ask(request, limit=99)])
    assert read(passes) == 4
    check_rows(model, [(None, (1, 2, 3, 4, 5), cache.rows([Ask(request)])[0])])


def test_prompts_of_one_token_and_of_the_whole_context(model, passes):
    cache = AlignerCache(model, 2, CAPACITY, 100)
    one, whole = Request([5], []), Request([i % V for i in range(CAPACITY)], [])
    rows = cache.rows([Ask(one), Ask(whole)])
    assert read(passes) == CAPACITY - 1
    check_rows(model, [(None, (5,), rows[0]), (None, tuple(whole.prompt), rows[1])])


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_no_pass_reads_more_than_a_chunk(chunk, model, passes):
    cache = AlignerCache(model, 3, CAPACITY, chunk)
    cache.rows([Ask(Request([1] * length, [])) for length in (20, 3, 9)])
    assert max(map(sum, passes)) <= max(chunk, 3)
    assert read(passes) == 19 + 2 + 8


def test_nobody_asks(model):
    assert AlignerCache(model, 2, CAPACITY, 4).rows([]).shape == (0, V)


def leave(request: Request) -> Request:
    """The same request as vLLM adds it once more, with a copy of its output."""
    request.gone = True
    return Request(request.prompt, list(request.output))


def test_a_request_that_comes_back_goes_on_where_it_was(model, passes):
    cache, request = AlignerCache(model, 2, CAPACITY, 100), Request([1, 2, 3, 4, 5], [6])
    cache.rows([Ask(request)])
    assert read(passes) == 5
    again = leave(request)
    again.output += [7, 8]
    row = cache.rows([Ask(again)])[0]
    assert read(passes) == 1, "of 7 and 8, the last is read by the pass that draws"
    check_rows(model, [(None, (1, 2, 3, 4, 5, 6, 7, 8), row)])


def test_so_does_another_sample_of_a_prompt_only(model, passes):
    """A seat that holds [1, 2, 3] and 4 behind it is of no use to the sample that drew 5."""
    cache, prompt = AlignerCache(model, 3, CAPACITY, 100), [1, 2, 3]
    first = Request(prompt, [])
    cache.rows([Ask(first, limit=2)])
    second = Request(prompt, [5])
    first.gone = True
    row = cache.rows([Ask(second)])[0]
    assert read(passes) == 2 + 1
    second.gone = True
    third = Request(prompt, [4])
    other = cache.rows([Ask(third)])[0]
    assert read(passes) == 3
    check_rows(model, [(None, (1, 2, 3, 5), row), (None, (1, 2, 3, 4), other)])


def test_a_token_that_was_taken_back_is_forgotten(model, passes):
    """Read 6, then 7 in its place: the seat is for whoever comes back with 7, and not with 6."""
    cache, prompt = AlignerCache(model, 2, CAPACITY, 100), [1, 2, 3]
    request = Request(prompt, [6])
    cache.rows([Ask(request)])
    request.output[:] = [7]  # type: ignore[index]
    rows: list[Row] = [(None, (1, 2, 3, 7), cache.rows([Ask(request)])[0])]
    request.output += [8]  # type: ignore[operator]
    rows.append((None, (1, 2, 3, 7, 8), cache.rows([Ask(request)])[0]))
    request.gone = True
    again = Request(prompt, [6, 8, 9])
    rows.append((None, (1, 2, 3, 6, 8, 9), cache.rows([Ask(again)])[0]))
    assert read(passes) == 3 + 5
    check_rows(model, rows)


def test_a_seat_with_another_adapter_is_of_no_use(pool):
    base, (first, second) = pool
    cache, request = AlignerCache(base, 2, CAPACITY, 100), Request([1, 2, 3], [])
    rows = [(first, (1, 2, 3), cache.rows([Ask(request, first)])[0])]
    again = leave(request)
    rows.append((second, (1, 2, 3), cache.rows([Ask(again, second)])[0]))
    check_rows(base, rows)


def test_a_seat_is_kept_for_a_while_only(model, passes):
    cache, lasting = AlignerCache(model, 4, CAPACITY, 100), Request([9], [])
    for away, expected in ((PATIENCE, 0), (PATIENCE + 1, 4)):
        request = Request([1, 2, 3, 4, 5], [])
        cache.rows([Ask(lasting), Ask(request)])
        assert read(passes) == 4
        again = leave(request)
        for _ in range(away):
            cache.rows([Ask(lasting)])
        cache.rows([Ask(lasting), Ask(again)])
        assert read(passes) == expected
        again.gone = True


def test_whoever_left_first_makes_room_first(model, passes):
    cache = AlignerCache(model, 3, CAPACITY, 100)
    early, late, lasting = Request([1, 2, 3], []), Request([4, 5, 6], []), Request([7, 8, 9], [])
    cache.rows([Ask(early), Ask(late), Ask(lasting)])
    early = leave(early)
    cache.rows([Ask(late), Ask(lasting)])
    late = leave(late)
    rows = cache.rows([Ask(lasting), Ask(newcomer := Request([0, 0], []))])
    read(passes)
    more = cache.rows([Ask(late), Ask(newcomer), Ask(lasting)])
    assert read(passes) == 0, "late's seat is there"
    late.gone = True
    again = cache.rows([Ask(early), Ask(lasting)])
    assert read(passes) == 2, "early's is not"
    texts = [(7, 8, 9), (0, 0), (4, 5, 6), (0, 0), (7, 8, 9), (1, 2, 3), (7, 8, 9)]
    check_rows(model, [(None, text, row) for text, row in zip(texts, torch.cat([rows, more, again]), strict=True)])


def test_a_prompt_whose_place_in_memory_is_reused_is_another_prompt(model):
    """Lists that are collected give their `id` to others; a seat must not take those for its own."""
    cache = AlignerCache(model, 1, CAPACITY, 100)
    rows: list[Row] = []
    for i in range(30):
        request = Request([1, 2, 3, i % V], [])
        rows.append((None, tuple(request.prompt), cache.rows([Ask(request)])[0]))
        request.gone = True
        del request
        gc.collect(0)
    check_rows(model, rows)


def test_rows_come_in_the_order_of_the_asks(model):
    cache = AlignerCache(model, 4, CAPACITY, 100)
    requests = [Request([i, i + 1], []) for i in range(4)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2], [1, 3]):
        rows = cache.rows([Ask(requests[i]) for i in order])
        check_rows(model, [(None, (i, i + 1), row) for i, row in zip(order, rows, strict=True)])


def test_all_memory_is_taken_at_the_start_and_is_what_was_said(model):
    cache = AlignerCache(model, 5, CAPACITY, 100)
    assert len(buffers(cache)) == 2 * 2
    assert cache.num_bytes == 5 * (CAPACITY + 1) * model.cache_bytes_per_token
