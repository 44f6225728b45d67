"""Models of families that no test knows are tried on themselves: right ones run, and each way of being wrong is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiny import SHAPES, tiny_model
from trimtab.errors import UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.supported import SUPPORTED
from trimtab.models.trial import NARROW, narrowed

V = 32
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
UNKNOWN: dict[str, dict[str, Any]] = {
    "opt": SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": SIZE | {"intermediate_size": 48},
    "vaultgemma": SHAPES["gemma2"],
    "ministral3": SHAPES["llama"] | {"sliding_window": 5},
    "phimoe": {name: value for name, value in SHAPES["mixtral"].items() if name != "head_dim"},
}
"""Families that run, and are in no list."""


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def unknown_shapes(monkeypatch: pytest.MonkeyPatch):
    for kind, shape in UNKNOWN.items():
        monkeypatch.setitem(SHAPES, kind, shape)


def unlisted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A Llama under another name."""
    model = tiny_model("llama", V, **settings).to(dtype)
    model.config.model_type = "odd"
    return model


def changed(model: Any, forward: Any, part: str = "model") -> Any:
    """The model with another forward of its body, or of a part."""
    module = model.get_submodule(part)
    kind = type(module)
    own = {"forward": lambda self, *args, **how: forward(partial(kind.forward, self), *args, **how)}
    module.__class__ = type("Changed", (kind,), own)
    return model


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_family_that_is_in_no_list_runs_if_its_rows_are_right(kind, dtype, caplog):
    assert kind not in SUPPORTED
    model = tiny_model(kind, V).to(dtype)
    ours = HuggingFaceLM(model)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.float().log_softmax(-1)
    state = ours.new_state(1, 12)
    rows = torch.cat([ours.extend(state, ids[:, i : i + 4], [4]) for i in (0, 4, 8)], 1)
    assert (rows - expected).abs().mean() < (1e-4 if dtype == torch.float32 else 0.1)
    assert f"no test of ours knows '{kind}' models; this one was tried" in caplog.text
    assert ours.kernels == "stock modules"


def no_positions(stock, *args, position_ids=None, **how):
    return stock(*args, position_ids=torch.zeros_like(position_ids) if position_ids is not None else None, **how)


def no_mask(stock, *args, attention_mask=None, **how):
    return stock(*args, attention_mask=None if attention_mask is None else torch.ones_like(attention_mask), **how)


class Recurrent:
    """Adds what it has seen before, in no cache of ours."""

    def __init__(self) -> None:
        self.seen = 0.0

    def __call__(self, stock, *args, **how):
        found = stock(*args, **how)
        found.last_hidden_state = found.last_hidden_state + self.seen
        self.seen = found.last_hidden_state.mean(1, keepdim=True)[:1]
        return found


def own_place(stock, *args, past_key_values=None, **how):
    """Keeps nothing: each step is the first one."""
    return stock(*args, past_key_values=None, **how)


WRONG = {
    "positions": (no_positions, "model"),
    "mask": (no_mask, "model"),
    "the mask of one layer": (no_mask, "model.layers.1"),
    "state": (Recurrent(), "model"),
    "cache": (own_place, "model"),
}


@pytest.mark.parametrize("spread", [0.05, 0.5])
@pytest.mark.parametrize(("wrong", "part"), WRONG.values(), ids=WRONG)
def test_a_model_that_is_wrong_is_refused_each_time(wrong, part, spread, dtype):
    HuggingFaceLM(unlisted(dtype, spread=spread))
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=r"'odd' model (is not decoded rightly: its rows are others|.*shape)"):
            HuggingFaceLM(changed(unlisted(dtype, spread=spread), wrong, part))


def test_what_raises_is_refused_with_its_reason_and_a_way_out():
    def broken(stock, *args, past_key_values=None, **how):
        if past_key_values is not None:
            raise AttributeError("no attribute 'conv_states'")
        return stock(*args, **how)

    with pytest.raises(UnsupportedModel, match=r"does not run over ragged slots \(.*conv_states.*--engine vllm"):
        HuggingFaceLM(changed(unlisted(), broken))


def test_local_attention_that_goes_by_columns_of_its_own_is_refused(monkeypatch):
    shape = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 5, "max_position_embeddings": 64}
    monkeypatch.setitem(SHAPES, "gpt_neo", shape)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(UnsupportedModel, match="'gpt_neo' model is not decoded rightly: its rows are others when"):
            HuggingFaceLM(tiny_model("gpt_neo", V, attention_types=[[["global", "local"], 1]]).to(dtype))


def test_a_window_is_narrowed_for_the_trial_and_only_for_it():
    model = tiny_model("vaultgemma", V, sliding_window=40)
    ours = HuggingFaceLM(model)
    assert model.config.sliding_window == 40
    assert {sight.window for sight in ours._sights.values()} == {40, None}
    with narrowed(model.config):
        assert model.config.sliding_window == NARROW
    ids = torch.arange(60)[None] % V
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
    assert_close(ours.extend(ours.new_state(1, 60), ids, [60]), expected, atol=1e-4, rtol=0)
