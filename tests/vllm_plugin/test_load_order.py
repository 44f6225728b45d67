"""When aligners are loaded: vLLM makes the processor, loads the proposal, and then asks what its cache is made of."""

import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import trimtab.vllm
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import InvalidOption
from trimtab.vllm.aligners import Limits
from trimtab.vllm.settings import Catalog, Settings

LETTERS = "abcdef"
CPU = torch.device("cpu")
OURS = ("internals", "processor")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin, installed in classes that stand for vLLM's; `runner` is its model runner's."""

    class Runner:
        input_batch: Any

        def get_kv_cache_spec(self) -> str:
            return "spec"

        def _sample(self) -> None: ...

        def _bookkeeping_sync(self) -> None: ...

    class Config:
        use_v2_model_runner = property(lambda self: False)

    others = type("Others", (), dict.fromkeys(("create_engine_config", "_make_sampling_metadata"), lambda self: None))
    others._build_logits_processors_params_validator = lambda self: None  # type: ignore[attr-defined]
    classes = {
        "vllm.config": {"VllmConfig": Config},
        "vllm.engine.arg_utils": {"EngineArgs": others},
        "vllm.v1.engine.input_processor": {"InputProcessor": others},
        "vllm.v1.worker.gpu_input_batch": {"InputBatch": others},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": Runner},
        "vllm.v1.worker.gpu.sample.logits_processor": {"LogitsProcessor": object},
    }
    for name, members in classes.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
        for parent in [name[:i] for i, letter in enumerate(name) if letter == "."]:
            if parent not in classes:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    internals, processor = (importlib.import_module(f"trimtab.vllm.{name}") for name in OURS)
    monkeypatch.setattr(internals, "version", lambda: "0.32.0")
    internals.install()
    yield SimpleNamespace(internals=internals, processor=processor, runner=Runner)
    for name in OURS:  # they are of no use without what stood for vLLM
        del sys.modules[f"trimtab.vllm.{name}"]
        delattr(trimtab.vllm, name)


@pytest.fixture
def runner(plugin: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model runner with our processor, as vLLM has it before the proposal is loaded."""
    tokenizer = tiny_tokenizer(LETTERS)
    path = save_tiny(tmp_path / "q", tiny_model("llama", 1 + len(LETTERS)), tokenizer)
    catalog = Catalog(Settings({"q": str(path)}), tokenizer, [0])
    for name, answer in (("check", catalog), ("samples_here", True), ("limits", Limits(4, 20, 8)), ("tokenizer", tokenizer)):
        monkeypatch.setattr(plugin.internals, name, lambda *_, answer=answer: answer)
    runner = plugin.runner()
    ours = plugin.processor.AlignerProcessor(SimpleNamespace(), CPU, False)
    runner.input_batch = SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=[ours]))
    return runner


def test_aligners_are_loaded_when_the_proposal_is_there_and_once(runner, monkeypatch):
    (ours,) = runner.input_batch.logitsprocs.non_argmax_invariant
    assert ours._aligners is None
    assert runner.get_kv_cache_spec() == "spec"
    loaded = ours._aligners
    assert "aligners q take" in loaded.summary
    monkeypatch.setattr("trimtab.vllm.aligners.free_memory", lambda device: 0)
    assert runner.get_kv_cache_spec() == "spec"
    assert ours._aligners is loaded


def test_what_the_proposal_took_is_not_free(runner, monkeypatch):
    """Memory that sufficed when the processor was made, and does not any more."""
    monkeypatch.setattr("trimtab.vllm.aligners.free_memory", lambda device: 2**10)
    with pytest.raises(InvalidOption, match="lower --max-model-len"):
        runner.get_kv_cache_spec()


def test_a_runner_without_aligners_is_left_alone(plugin):
    runner = plugin.runner()
    runner.input_batch = SimpleNamespace(logitsprocs=SimpleNamespace(non_argmax_invariant=[]))
    assert runner.get_kv_cache_spec() == "spec"
