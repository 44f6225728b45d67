"""cuDNN's attention is out while a pass runs on a GPU, and as it was behind it."""

from contextlib import nullcontext

import pytest
import torch

from tiny import tiny_model
from trimtab.models import graphs, slots
from trimtab.models.attention import without_cudnn
from trimtab.models.huggingface import HuggingFaceLM


@pytest.mark.parametrize("before", [True, False])
def test_it_is_out_for_a_while(before):
    torch.backends.cuda.enable_cudnn_sdp(before)
    try:
        with without_cudnn(torch.device("cuda")):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
        with without_cudnn(torch.device("cpu")):
            assert torch.backends.cuda.cudnn_sdp_enabled() == before
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_every_pass_is_inside(monkeypatch):
    """Lean, stock, below a head, captured: all of them go by `without_cudnn`, with the model's device."""
    seen: list[tuple[str, torch.device]] = []
    for where in (slots, graphs):
        name = where.__name__.rpartition(".")[2]
        monkeypatch.setattr(where, "without_cudnn", lambda device, name=name: seen.append((name, device)) or nullcontext())
    ids = torch.ones(1, 1, dtype=torch.long)
    for model in (HuggingFaceLM(tiny_model("llama")), HuggingFaceLM(tiny_model("gpt2"))):
        model.extend(model.new_state(1, 4), ids, [1])
    model = HuggingFaceLM(tiny_model("llama"), owned=True, capture=lambda work: (lambda: None, work()))
    state = model.new_state(1, 8)
    model.extend_below(state, ids, [1], [1])
    model.prefill(state, ids, [1])
    assert seen == 4 * [("slots", torch.device("cpu"))]
    for _ in range(3):
        model.extend(state, ids, [1])
    assert seen[4:] == [("graphs", torch.device("cpu"))]
