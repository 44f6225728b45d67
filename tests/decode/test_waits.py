"""A step waits for its device once. Torch's `meta` device stands in for a GPU: whoever reads a number there gets an error,
unless it is the step's own reading, which is counted; and what is copied there is watched."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from looking import Handover, Opening, Tiring
from tiny import EOS, tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.core.transfer import to_device
from trimtab.decode.engine import Engine
from trimtab.models.huggingface import HuggingFaceLM

ASKED: dict[str, dict[str, Any]] = {
    "product": {},
    "geometric": {"rule": "geometric", "weight": 0.5},
    "nucleus": {"rule": "nucleus", "proposal_top_p": 0.9},
    "nucleus that ends": {"rule": "nucleus(force_eos=true)"},
    "kl_gate": {"rule": "kl_gate(tau=0.5)"},
    "mixture": {"rule": "mixture", "weight": 0.4},
    "gate": {"rule": "gate(rule=nucleus(force_eos=True), by=entropy)"},
    "candidates": {"rule": "candidates(n=2)"},
    "a window, its log p̃ and a state": {"rule": Handover()},
    "a count": {"rule": Tiring()},
    "positions": {"rule": Opening()},
    "every knob": {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "logit_bias": {3: 1.0},
    },
    "greedy": {"temperature": 0.0},
    "logprobs": {"logprobs": True, "top_logprobs": 3},
}


class Watch(TorchFunctionMode):
    """Notes whatever goes to the device in a way that CUDA waits for: not from pinned memory, or not queued."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        result = func(*args, **kwargs)
        there = any(is_there(value) for value in (result, *given))
        here = [value for value in given if value.device.type == "cpu"]
        queued = kwargs.get("non_blocking") and all(getattr(value, "pinned", False) for value in here)
        if there and (here or func in (torch.tensor, torch.as_tensor)) and not queued:
            self.waited.append(getattr(func, "__name__", str(func)))
        return result


def is_there(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were read from the device each time: all zeros, which is the token 0 and no draft accepted."""
    sizes: list[int] = []
    tolist = Tensor.tolist

    def read(self: Tensor) -> Any:
        if not is_there(self):
            return tolist(self)
        sizes.append(self.numel())
        return [0.0] * self.numel()

    def pin(self: Tensor) -> Tensor:
        pinned = self.clone()
        pinned.pinned = self.is_contiguous()  # type: ignore[attr-defined]  # from anything else, the copy makes one that is not
        return pinned

    monkeypatch.setattr("trimtab.models.huggingface.fingerprint_model", lambda model: str(id(model)))
    monkeypatch.setattr("trimtab.core.transfer.QUEUED", ("meta",))
    monkeypatch.setattr(Tensor, "tolist", read)
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return sizes


def far_model(seed: int) -> HuggingFaceLM:
    return HuggingFaceLM(tiny_model(seed=seed).to("meta"))


@pytest.mark.parametrize("draft", ["aligner", "ngram", "none"])
@pytest.mark.parametrize("asked", ASKED)
def test_a_step_waits_for_its_device_once(reads: list[int], asked: str, draft: str) -> None:
    model = AlignedModel(far_model(0), [far_model(1)], eos_token_ids=[EOS], draft=draft, num_speculative_tokens=3)
    engine = Engine(model.proposal, model.pace)
    for seed in range(3):
        params = SamplingParams(max_tokens=9, ignore_eos=True, seed=seed, **ASKED[asked])
        engine.submit(model.prepare([1, 2, 3 + seed][: 2 + seed], params))
    with Watch() as watch:
        for steps in range(1, 6):
            assert engine.step()
            assert len(reads) == steps
    assert watch.waited == []


def test_so_does_a_step_of_several_groups(reads: list[int]) -> None:
    base = AlignedModel(far_model(0), eos_token_ids=[EOS])
    models = [base, *(base.with_aligners([far_model(seed)]) for seed in (1, 2))]
    engine = Engine(base.proposal, base.pace)
    with Watch() as watch:
        for model in (*models, *models[1:]):
            engine.submit(model.prepare([1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True, seed=0)))
        for steps in range(1, 6):
            assert engine.step()
            assert len(reads) == steps
    assert watch.waited == []


def test_so_does_a_step_of_particles(reads: list[int]) -> None:
    """All draw the token 0 with log Z 0, so that nothing is drawn anew."""
    model = AlignedModel(far_model(0), [far_model(1)], eos_token_ids=[EOS])
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=0, n=2)
    with Watch() as watch:
        model.generate([[1, 2, 3], [1]], params, sequence_level="particles=3")
    assert len(reads) == 9
    assert watch.waited == []


def test_the_watch_sees_what_waits(reads: list[int]) -> None:
    far, near = torch.zeros(2, device="meta"), torch.zeros(2)
    with Watch() as watch:
        to_device([1], "meta")
        to_device(torch.zeros(2, 3).mT, "meta")
    assert watch.waited == []
    with Watch() as watch:
        torch.tensor([1], device="meta")
        near.to("meta", non_blocking=True)
        torch.zeros(2, 3).mT.pin_memory().to("meta", non_blocking=True)
        far.copy_(near)
        far[:1] = near[:1]
    assert watch.waited == ["tensor", "to", "to", "copy_", "__setitem__"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(1, device="meta"))
