"""Captured passes: the rows of passes that are not, whatever the slots do. CUDA's graphs need a GPU; a tape of operators has
their semantics: what is recorded is done again on the same tensors, and no Python decides anything in between."""

import logging
import math
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tiny import EOS, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.decode.assemble import make_capture
from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models import graphs
from trimtab.models.base import State, vacate
from trimtab.models.huggingface import HuggingFaceLM

V, CAPACITY = 32, 40


class Tape(TorchDispatchMode):
    """Notes each operator with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> dict[int, Tensor]:
        """Do all of it again; the new result for each one's id."""
        new: dict[int, Tensor] = {}

        def current(tensor: Tensor) -> Tensor:
            return new.get(id(tensor), tensor)

        for func, args, kwargs, result in self.calls:
            again = func(*tree_map_only(Tensor, current, args), **tree_map_only(Tensor, current, kwargs))
            olds, news = ([r] if isinstance(r, Tensor) else list(r) for r in (result, again))
            new |= {id(old): one for old, one in zip(olds, news, strict=True) if isinstance(old, Tensor)}
        return new


class Recorder:
    """Captures like `CudaCapture`, on a CPU, and counts. Results share memory there: a replay spoils all others here."""

    def __init__(self, captures: int = 1000) -> None:
        self.captured = self.replayed = 0
        self._most, self._results = captures, weakref.WeakSet[Tensor]()

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        if self.captured == self._most:
            raise RuntimeError("CUDA error: out of memory")
        self.captured += 1
        with Tape() as tape:
            result = work()
        self._results.add(result)

        def replay() -> None:
            self.replayed += 1
            for other in self._results:
                other.fill_(math.nan)
            result.copy_(tape.replay()[id(result)])

        return replay, result


def pair(kind: str = "llama", *, seed: int = 0, **settings: Any) -> tuple[HuggingFaceLM, HuggingFaceLM, Recorder]:
    """The same model without and with captured passes."""
    recorder = Recorder()
    captured = HuggingFaceLM(tiny_model(kind, V, seed=seed, **settings), owned=True, capture=recorder)
    return HuggingFaceLM(tiny_model(kind, V, seed=seed, **settings)), captured, recorder


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a tiny model: few columns."""
    monkeypatch.setattr(graphs, "COLUMNS", 16)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_rows_are_those_of_passes_that_are_not_captured_whatever_the_slots_do(kind):
    plain, captured, recorder = pair(kind)
    draw = random.Random(0)
    states = [(model, model.new_state(6, CAPACITY)) for model in (plain, captured)]
    for round_ in range(120):
        live = 6 - round_ // 30  # the last slot in use is vacated now and then
        lengths = list(states[0][1].lengths[:live])
        forget = [length - 2 if length + 4 > CAPACITY else draw.randrange(min(length, 3) + 1) for length in lengths]
        width = draw.choice([1, 1, 3, 4])
        counts = [draw.randrange(width + 1) for _ in range(live)]
        tokens = torch.tensor([[draw.randrange(V) for _ in range(width)] for _ in range(live)])
        rows = []
        for model, state in states:
            model.rollback(state, forget)
            rows.append(model.extend(state, tokens, counts))
            if round_ % 30 == 29:
                vacate(model, state, 1, live - 1)
        for slot, count in enumerate(counts):
            assert_close(rows[1][slot, :count], rows[0][slot, :count], atol=5e-5, rtol=0)
    assert recorder.replayed > 60
    assert recorder.captured < 20


ASKED: dict[str, dict[str, Any]] = {
    "product": {},
    "nucleus": {"rule": "nucleus", "proposal_top_p": 0.9},
    "greedy": {"temperature": 0.0},
    "penalised": {"repetition_penalty": 1.3, "top_k": 9},
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("drafts", [None, 3, 0])
def test_tokens_of_a_seed_are_the_same(asked, drafts):
    (proposal, captured, recorder), (aligner, small, more) = pair("qwen2", seed=1), pair("llama", seed=2)
    prompts, params = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], SamplingParams(max_tokens=30, n=2, seed=7, **ASKED[asked])
    models = [
        AlignedModel(p, [q], eos_token_ids=[EOS], num_speculative_tokens=drafts)
        for p, q in ((proposal, aligner), (captured, small))
    ]
    texts = [[completion.tokens for completion in model.generate(prompts, params)] for model in models]
    assert texts[0] == texts[1]
    assert recorder.replayed > 5
    assert more.replayed > 5


def repeat(model: HuggingFaceLM, state: State, *widths: int) -> list[Tensor]:
    """The rows of passes over two slots that are taken back each time."""
    rows = []
    for width in widths:
        rows.append(model.extend(state, torch.ones(2, width, dtype=torch.long), [1, 1])[:, 0])
        model.rollback(state, [1, 1])
    return rows


def test_the_number_of_graphs_is_bounded(monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    _, model, recorder = pair()
    state = model.new_state(2, CAPACITY)
    repeat(model, state, 1, 1, 2, 1, 3, 1)
    assert recorder.captured == 3  # of 3, which took the place of 2, for 1 was used since
    repeat(model, state, 1, 3)
    assert recorder.captured == 3
    repeat(model, state, 2)
    assert recorder.captured == 4
    assert len(state.graphs) == 2


@pytest.mark.parametrize("captured", [True, False])
def test_a_state_goes_at_once_and_its_graphs_with_it(captured):
    _, model, recorder = pair()
    state = model.new_state(2, CAPACITY)
    repeat(model, state, *([1, 1] if captured else [1]))
    assert recorder.captured == captured
    gone = [weakref.ref(state), *(weakref.ref(graph.replay) for graph in state.graphs.values() if captured)]
    del state
    assert [one() for one in gone] == [None] * len(gone)
    assert recorder.captured == captured
    repeat(model, model.new_state(2, CAPACITY), 1, 1)
    assert recorder.captured == captured + 1


def test_rotations_that_a_graph_reads_outlive_longer_ones():
    plain, model, _ = pair()
    state, reference = model.new_state(2, 8), repeat(plain, plain.new_state(2, 8), 1)[0]
    repeat(model, state, 1, 1)
    (graph,) = state.graphs.values()
    tables = graph.tables
    repeat(model, model.new_state(2, CAPACITY), 1)
    assert graph.tables is tables
    assert model._lean.tables[0] is not tables[0]
    assert_close(repeat(model, state, 1)[0], reference, atol=5e-5, rtol=0)


def test_where_capturing_fails_passes_run_without_and_say_so_once(caplog):
    plain, _, _ = pair()
    model = HuggingFaceLM(tiny_model("llama", V), owned=True, capture=Recorder(captures=1))
    with caplog.at_level(logging.WARNING):
        rows = repeat(model, model.new_state(2, CAPACITY), 1, 1, 2, 2, 3, 3, 2)
    assert [record.message for record in caplog.records] == [
        "a pass could not be captured as a CUDA graph, so this model runs without from now on: CUDA error: out of memory"
    ]
    for row in rows:
        assert_close(row, repeat(plain, plain.new_state(2, CAPACITY), 1)[0], atol=5e-5, rtol=0)


def test_prompts_and_long_passes_are_not_captured():
    _, model, recorder = pair()
    for _ in range(3):
        state = model.new_state(1, CAPACITY)
        for _ in range(3):
            model.prefill(state, torch.ones(1, 2, dtype=torch.long), [2])
        for _ in range(3):
            model.extend(state, torch.ones(1, 18, dtype=torch.long), [18])
            model.rollback(state, [18])
    assert recorder.captured == 0


def test_models_that_cannot_be_captured_run_without_unless_graphs_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.decode.assemble.make_capture", lambda wanted, device: Recorder())
    monkeypatch.setattr("trimtab.decode.assemble.check_graphs", lambda device: None)
    save_tiny(tmp_path, tiny_model("gpt2", 28), tiny_tokenizer())
    assert not AlignedModel.from_pretrained(tmp_path).proposal.has_graphs
    with pytest.raises(
        UnsupportedModel, match=r"cuda_graphs: only plain gemma, gemma2, .*, smollm3 models can .* this is a 'gpt2'"
    ):
        AlignedModel.from_pretrained(tmp_path, cuda_graphs=True)


def test_what_is_loaded_is_captured_and_what_is_passed_or_shared_is_not(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("trimtab.decode.assemble.make_capture", lambda wanted, device: recorder if wanted else None)
    monkeypatch.setattr("trimtab.decode.assemble.check_graphs", lambda device: None)
    for seed, name in enumerate(("proposal", "aligner")):
        save_tiny(tmp_path / name, tiny_model("llama", 28, seed=seed), tiny_tokenizer())
    for proposal, aligner, models in (
        (tmp_path / "proposal", tmp_path / "aligner", 2),
        (tiny_model("llama", 28), tmp_path / "aligner", 1),
        (tmp_path / "proposal", tiny_model("llama", 28), 1),
    ):
        model = AlignedModel.from_pretrained(proposal, aligner, eos_token_ids=[EOS], device="cpu", cuda_graphs=True)
        assert sum(one._graphs is not None for one in (model.proposal, *model.aligners)) == models
    before = recorder.replayed
    model.generate([[1, 2, 3]], SamplingParams(max_tokens=20, ignore_eos=True))
    assert recorder.replayed > before
    plain = AlignedModel.from_pretrained(tmp_path / "proposal", tmp_path / "aligner", device="cpu")
    assert all(one._graphs is None for one in (plain.proposal, *plain.aligners))


@pytest.mark.parametrize(
    ("device", "where"), [("cpu", "a GPU, and these are on cpu"), ("auto", "one GPU, and 'auto' may spread")]
)
def test_graphs_want_a_gpu_before_anything_is_loaded(device, where):
    with pytest.raises(InvalidOption, match=f"cuda_graphs needs models on {where}"):
        AlignedModel.from_pretrained("no/such-folder", device=device, cuda_graphs=True)


@pytest.mark.parametrize(("wanted", "device", "graphs"), [
    (None, "cuda", True), (True, "cuda:1", True), (False, "cuda", False), (None, "cpu", False), (None, "auto", False),
    (None, None, False),
])  # fmt: skip
def test_graphs_are_what_one_gpu_gets(wanted, device, graphs, monkeypatch):
    """By default, too; nothing of this asks for the GPU yet."""
    monkeypatch.setattr("trimtab.decode.assemble.pick_device", lambda device: torch.device(device or "cpu"))
    assert (make_capture(wanted, device) is not None) == graphs
