"""Models of families that no test knows are tried on themselves: right ones run, and each way of being wrong is refused."""

import json
import types
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tiny import SHAPES, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel
from trimtab.errors import UnsupportedModel
from trimtab.models.huggingface import SUPPORTED, HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.models.trial import NARROW, narrowed

V = 32
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
UNKNOWN: dict[str, dict[str, Any]] = {
    "opt": SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": SIZE | {"intermediate_size": 48},
    "vaultgemma": SHAPES["gemma2"],
    "ministral3": SHAPES["llama"] | {"sliding_window": None},
}
"""Families that run, and are in no list."""


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return getattr(torch, request.param)


@pytest.fixture(autouse=True)
def unknown_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kind, shape in UNKNOWN.items():
        monkeypatch.setitem(SHAPES, kind, shape)


def unlisted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A Llama under another name."""
    model = tiny_model("llama", V, **settings).to(dtype)
    model.config.model_type = "odd"
    return model


def changed(model: Any, forward: Any) -> Any:
    """The model with another forward of its body."""
    stock = model.model.forward
    model.model.forward = types.MethodType(lambda self, *args, **how: forward(stock, *args, **how), model.model)
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


@pytest.mark.parametrize("wrong", [no_positions, no_mask, Recurrent(), own_place], ids=["positions", "mask", "state", "cache"])
def test_a_model_that_is_wrong_is_refused_each_time(wrong, dtype):
    HuggingFaceLM(unlisted(dtype))
    for _ in range(2):
        with pytest.raises(UnsupportedModel, match=r"'odd' model (is not decoded rightly: its rows are others|does not run)"):
            HuggingFaceLM(changed(unlisted(dtype), wrong))


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
    with pytest.raises(UnsupportedModel, match="'gpt_neo' model is not decoded rightly: its rows are others when"):
        HuggingFaceLM(tiny_model("gpt_neo", V, attention_types=[[["global", "local"], 1]]))


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


def test_a_loaded_model_is_tried_once_and_one_that_was_lent_each_time(tmp_path, caplog, monkeypatch):
    folder = save_tiny(tmp_path / "opt", tiny_model("opt", V), tiny_tokenizer())
    for said in (1, 1):
        AlignedModel.from_pretrained(folder)
        assert caplog.text.count("this one was tried") == said
    edited = json.loads((folder / "config.json").read_text()) | {"do_layer_norm_before": False}
    (folder / "config.json").write_text(json.dumps(edited))
    AlignedModel.from_pretrained(folder)
    assert caplog.text.count("this one was tried") == 2
    lent = load_model(folder)
    for said in (3, 4):
        AlignedModel.from_pretrained(lent)
        assert caplog.text.count("this one was tried") == said
