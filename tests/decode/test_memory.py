"""The memory budget is kept by what is really allocated, and is not much larger: every buffer of every cache is counted."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.decode.prefixes import Prefixes
from trimtab.decode.request import SamplingParams
from trimtab.errors import InvalidRequest
from trimtab.models.adapter_mixing import Gathered
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.slots import SlotLayer, SlotState

V = 28


class Meter:
    """Bytes of keys, values and adapters side by side that are alive, and the most there ever were."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def add(self, *tensors: torch.Tensor) -> None:
        for tensor in tensors:
            self.alive += tensor.nbytes
            weakref.finalize(tensor, self._gone, tensor.nbytes)
        self.peak = max(self.peak, self.alive)

    def _gone(self, num_bytes: int) -> None:
        self.alive -= num_bytes


@pytest.fixture
def meter(monkeypatch: pytest.MonkeyPatch) -> Meter:
    meter, allocate, gather = Meter(), SlotLayer.lazy_initialization, Gathered.__init__

    def allocating(self: SlotLayer, *args: Any) -> None:
        allocate(self, *args)
        meter.add(self.keys, self.values)

    def gathering(self: Gathered, layout: Any, shape: Any, flat: torch.Tensor) -> None:
        gather(self, layout, shape, flat)
        meter.add(flat)

    monkeypatch.setattr(SlotLayer, "lazy_initialization", allocating)
    monkeypatch.setattr(Gathered, "__init__", gathering)
    return meter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, AlignedModel]:
    """A bare proposal, with an aligner, with two, with a drafter, and with each of two adapters over one base."""
    root, tokenizer = tmp_path_factory.mktemp("memory"), tiny_tokenizer()
    loaded = [HuggingFaceLM(tiny_model("llama", V, seed=seed, spread=0.3), owned=True) for seed in range(4)]
    bare = AlignedModel.from_pretrained(loaded[0], tokenizer=tokenizer, draft=loaded[3], eos_token_ids=[0])
    plain = AlignedModel.from_pretrained(loaded[0], tokenizer=tokenizer, eos_token_ids=[0])
    base = save_tiny(root / "base", tiny_model("llama", V, seed=9), tokenizer)
    loader = Loader(tokenizer, dtype="auto", device="cpu")
    found = {"bare": plain, "drafted": bare, "one": plain.with_aligners([loader.load(loaded[1]).model])}
    found["two"] = plain.with_aligners([loader.load(model).model for model in loaded[1:3]])
    for seed, name in enumerate(("red", "blue")):
        folder: Path = save_lora(root / name, base, seed=seed, r=2 + 6 * seed, target_modules=["q_proj", "down_proj"])
        tokenizer.save_pretrained(folder)
        found[name] = plain.with_aligners([loader.load(str(folder)).model])
    for model in found.values():
        model.proposal = plain.proposal
    return found


def run(
    models: dict[str, AlignedModel], names: list[str], asked: dict[str, Any] | None = None, **limits: Any
) -> tuple[Engine, list[Any]]:
    """Requests of all lengths, some with several completions, that come while others run."""
    proposal = models["bare"].proposal
    engine = Engine(proposal, models["bare"].pace, max_num_batched_tokens=16, **limits)
    everyone = []
    for i in range(24):
        model = models[names[i % len(names)]]
        params = SamplingParams(max_tokens=3 + 7 * (i % 5), seed=i, ignore_eos=True, n=1 + 2 * (i % 7 == 0), **asked or {})
        group = model.prepare([1 + i % 9] * (2 + 11 * (i % 3)), params, i)
        engine.submit(group)
        everyone += group
        engine.step()
    while engine:
        engine.step()
        assert not engine.failed
    return engine, everyone


MIXES = [["bare"], ["one"], ["two"], ["drafted"], ["red", "blue"], ["bare", "one", "two", "red", "blue", "drafted"]]


@pytest.mark.parametrize("names", MIXES, ids="+".join)
@pytest.mark.parametrize(("share", "prefixes"), [(1.0, None), (3.0, None), (1.0, 500), (3.0, 500)])
def test_what_is_allocated_stays_within_the_budget_and_the_text_is_the_same(models, names, share, prefixes, meter):
    """With just enough for the largest request, and with room for some at a time; prefixes are kept in what is left."""
    engine = Engine(models["bare"].proposal, models["bare"].pace)
    largest = [models[name].prepare([1] * 24, SamplingParams(max_tokens=31), 0) for name in names]
    alone = max(least_bytes(engine, group[0]) for group in largest)
    _, free = run(models, names)
    meter.peak = meter.alive
    before, budget = meter.alive, int(share * alone)
    _, kept = run(models, names, max_cache_bytes=budget, prefixes=None if prefixes is None else Prefixes(prefixes))
    assert 0.4 * budget < meter.peak - before <= budget
    assert [s.tokens for s in kept] == [s.tokens for s in free]


@pytest.mark.parametrize("names", [["one"], ["red", "blue"], MIXES[-1]], ids="+".join)
@pytest.mark.parametrize("share", [1.0, 2.0, 3.0])
def test_it_stays_there_where_requests_leave_their_aligners(models, names, share, meter):
    """After two tokens or more. A further completion of a prompt whose first ones have left reads it again, and that counts."""
    asked = {"handover": "confidence(window=2, threshold=0.02)"}
    engine = Engine(models["bare"].proposal, models["bare"].pace)
    alone = max(least_bytes(engine, models[name].prepare([1] * 24, SamplingParams(max_tokens=31), 0)[0]) for name in names)
    _, free = run(models, names, asked)
    meter.peak = meter.alive
    before, budget = meter.alive, int(share * alone)
    _, kept = run(models, names, asked, max_cache_bytes=budget, prefixes=Prefixes(300))
    assert meter.peak - before <= budget
    assert [s.tokens for s in kept] == [s.tokens for s in free]
    assert any(s.handover_at and not s.has_aligners for s in kept)


def least_bytes(engine: Engine, sequence: Any) -> int:
    """The smallest budget that lets a sequence in."""
    for num_bytes in range(2**10, 2**22, 2**10):
        engine._cache_bytes = num_bytes
        try:
            engine.submit([sequence])
        except InvalidRequest:
            continue
        engine.cancel([sequence])
        return num_bytes
    raise AssertionError


def test_what_no_budget_would_ever_hold_is_refused_at_once(models):
    engine = Engine(models["one"].proposal, models["one"].pace, max_cache_bytes=2**10)
    with pytest.raises(
        InvalidRequest, match=r"prompt and max_tokens, 8 tokens, need 0\.\d MiB of caches, but 0\.0 MiB are allowed"
    ):
        engine.submit(models["one"].prepare([1, 2, 3], SamplingParams(max_tokens=5), 0))
    assert not engine


def test_usage_is_what_running_requests_may_come_to_hold(models):
    model = models["one"]
    engine = Engine(model.proposal, model.pace, max_cache_bytes=2**20)
    engine.submit(model.prepare([1, 2, 3], SamplingParams(max_tokens=7, ignore_eos=True), 0))
    engine.step()
    assert engine.cache_usage == 2 * 11 * model.proposal.cache_bytes_per_token / 2**20


def test_with_room_as_many_as_may_run_at_once(models):
    engine, _ = run(models, ["one"], max_cache_bytes=2**30)
    assert engine._batch.size.slots >= 4


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "qwen3"])
def test_a_state_takes_what_it_says(kind, meter):
    model = AlignedModel.from_pretrained(tiny_model(kind, V), tokenizer=tiny_tokenizer()).proposal
    state = model.new_state(3, 9)
    model.extend(state, torch.tensor([[1]] * 3), [1] * 3)
    assert meter.alive == model.state_bytes(3, 9)


@pytest.mark.parametrize("where", ["copy", "prefill"])
def test_memory_that_newcomers_lack_ends_them_alone(models, where, monkeypatch):
    """While their cache is made, and while their prompts are read."""
    model = models["one"]
    engine = Engine(model.proposal, model.pace)
    params = SamplingParams(max_tokens=12, seed=1, ignore_eos=True)
    expected = [c.tokens for c in model.generate([[1, 2, 3]], params)]
    (first,), (second,) = model.prepare([1, 2, 3], params, 0), model.prepare([4] * 30, params, 1)
    engine.submit([first])
    engine.step()
    engine.submit([second])
    if where == "copy":
        copy = SlotState.copy

        def failing(self: SlotState, slots: Any, target: SlotState, to: Any) -> None:
            if target.capacity > 30 and len(target) > 1 and self.capacity < 30:
                raise RuntimeError("out of memory")
            copy(self, slots, target, to)

        monkeypatch.setattr(SlotState, "copy", failing)
    else:

        def refusing(*_: Any) -> None:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(type(model.proposal), "prefill", refusing)
    engine.step()
    assert engine.failed == [second]
    assert "out of memory" in str(second.error)
    monkeypatch.undo()
    while engine:
        engine.step()
        assert not engine.failed
    assert [first.tokens] == expected


def test_prefixes_go_before_a_request_has_to_wait_for_their_memory(models, meter):
    model = models["bare"]
    (large,) = model.prepare([1] * 40, SamplingParams(max_tokens=20, seed=0, ignore_eos=True))
    budget = least_bytes(Engine(model.proposal, model.pace), large)
    before, prefixes = meter.alive, Prefixes(500)
    engine = Engine(model.proposal, model.pace, max_cache_bytes=budget, prefixes=prefixes)
    for i in range(5):
        engine.submit(model.prepare([i] * 20, SamplingParams(max_tokens=2, seed=0, ignore_eos=True)))
        while engine:
            engine.step()
    assert prefixes.num_bytes > 0.3 * budget
    engine.submit([large])
    while engine:
        engine.step()
    assert large.finish_reason == "length"
    assert meter.peak - before <= budget


@pytest.mark.parametrize("seqs", [1, 4])
def test_prefixes_of_requests_that_end_with_their_first_token_stay_within_the_budget(models, meter, seqs):
    """Their prompts' states are still there while a prefix is kept, and so is what an idle batch holds."""
    model, before = models["one"], meter.alive
    budget = 10 * sum(part.state_bytes(1, 40) for part in model.models.all)
    engine = Engine(model.proposal, model.pace, max_cache_bytes=budget, prefixes=Prefixes(5000))
    for turn in range(4):
        tokens = 1 if turn else 20
        for i in range(seqs):
            prompt = [1 + turn * seqs + i] * (39 if turn else 10)
            engine.submit(model.prepare(prompt, SamplingParams(max_tokens=tokens, seed=0, ignore_eos=True)))
        while engine:
            engine.step()
    assert engine.prefixes.num_tokens > 0
    assert meter.peak - before <= budget
