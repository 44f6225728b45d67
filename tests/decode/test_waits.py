"""A step waits for its device once. Torch's `meta` device stands in for a GPU: whoever reads a number there gets an error,
unless it is the step's own reading, which is counted; and what is copied there is watched."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

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
    "candidates": {"rule": "candidates(n=2)"},
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
    """Notes whatever goes to the device in a way that CUDA waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = isinstance(args[0], Tensor) and args[0].device.type == "cpu" if args else False
        result = func(*args, **kwargs)
        arrived = isinstance(result, Tensor) and result.device.type == "meta"
        if arrived and (func in (torch.tensor, torch.as_tensor) or (given and not kwargs.get("non_blocking"))):
            self.waited.append(getattr(func, "__name__", str(func)))
        return result


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers were read from the device each time: all zeros, which is the token 0 and no draft accepted."""
    sizes: list[int] = []
    tolist = Tensor.tolist

    def read(self: Tensor) -> Any:
        if self.device.type != "meta":
            return tolist(self)
        sizes.append(self.numel())
        return [0.0] * self.numel()

    monkeypatch.setattr("trimtab.models.huggingface.fingerprint_model", lambda model: str(id(model)))
    monkeypatch.setattr(Tensor, "tolist", read)
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


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        torch.tensor([1], device="meta")
        torch.zeros(1).to("meta")
        to_device([1], "meta")
    assert watch.waited == ["tensor", "to"]
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.zeros(1, device="meta"))
