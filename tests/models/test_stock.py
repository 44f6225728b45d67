"""The lean pass is for transformers' own classes alone: whatever else stands in a model runs as it is, with its own numbers."""

import functools
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaRMSNorm

from tiny import tiny_model
from trimtab.errors import UnsupportedModel
from trimtab.models.adapters import AdapterPool
from trimtab.models.blocks import FAMILIES
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.stock import is_stock

V = 32
IDS = torch.tensor([[5, 9, 1, 30, 2, 2, 17]])


def rows(model: HuggingFaceLM) -> torch.Tensor:
    return model.extend(model.new_state(1, 9), IDS, [IDS.shape[1]])


def stock_rows(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(IDS).logits.float(), -1)


class QuantLinear(nn.Linear):
    """A quantised layer as in `transformers.integrations`: codes in the weight, and a scale."""

    __module__ = "transformers.integrations.something"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
        self.scale = nn.Parameter(linear.weight.abs().amax() / 7)
        self.weight.data = (linear.weight / self.scale).round()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * self.scale)


class Codes(torch.Tensor):
    """A weight that quantises itself where it is used, as torchao's do, inside a plain `nn.Linear`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1].as_subclass(torch.Tensor)
            return F.linear(args[0], (weight * 2).round() / 2, *args[2:])
        return super().__torch_function__(func, types, args, kwargs or {})


class QuietMLP(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 2


class ShiftedNorm(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 0.5


class ScaledLM(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


class Doubled(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


def layers(model: Any) -> Any:
    return model.model.layers


def quantise(model: Any) -> None:
    for layer in layers(model):
        layer.mlp.down_proj = QuantLinear(layer.mlp.down_proj)


def bitnet(model: Any) -> None:
    """transformers' own layer, whose quantisers ask for a compiler: they run as they are written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function: function)
        from transformers.integrations.bitnet import AutoBitLinear
    for layer in layers(model):
        old = layer.mlp.up_proj
        new = AutoBitLinear(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        layer.mlp.up_proj = new


def embed_codes(model: Any) -> None:
    weight = layers(model)[0].self_attn.k_proj.weight
    layers(model)[0].self_attn.k_proj.weight = nn.Parameter(weight.detach().clone().as_subclass(Codes), requires_grad=False)


def replace_mlp(model: Any) -> None:
    old = layers(model)[1].mlp
    layers(model)[1].mlp = QuietMLP(model.config)
    layers(model)[1].mlp.load_state_dict(old.state_dict())


def replace_norm(model: Any) -> None:
    model.model.norm = ShiftedNorm(32)


def replace_model(model: Any) -> None:
    model.__class__ = ScaledLM


def replace_embedding(model: Any) -> None:
    model.model.embed_tokens.__class__ = Doubled


def replace_activation(model: Any) -> None:
    for layer in layers(model):
        layer.mlp.act_fn = nn.GELU()


def clip_embedding(model: Any) -> None:
    model.model.embed_tokens.max_norm = 0.5


def wrap(model: Any) -> None:
    layers(model)[0].self_attn.q_proj = nn.Sequential(layers(model)[0].self_attn.q_proj, nn.Tanh())


def normalise_weight(model: Any) -> None:
    parametrizations.spectral_norm(layers(model)[0].mlp.gate_proj)


def old_weight_norm(model: Any) -> None:
    torch.nn.utils.spectral_norm(layers(model)[0].mlp.gate_proj)


def patch_instance(model: Any) -> None:
    norm = layers(model)[0].input_layernorm
    forward = norm.forward
    norm.forward = lambda x: forward(x) * 1.5


def hook(model: Any) -> None:
    layers(model)[0].register_forward_hook(lambda module, args, out: out + 1)


def other_eps(model: Any) -> None:
    layers(model)[0].input_layernorm.variance_epsilon = 3.0


def other_scaling(model: Any) -> None:
    layers(model)[1].self_attn.scaling = 0.9


def fewer_layers(model: Any) -> None:
    model.config.num_hidden_layers = 1


def same_layer_twice(model: Any) -> None:
    layers(model)[1].mlp = layers(model)[0].mlp
    layers(model)[1].mlp.down_proj = QuantLinear(layers(model)[1].mlp.down_proj)


def another_layer_type(model: Any) -> None:
    other = tiny_model("mistral", V, seed=4)
    other.model.layers[1].self_attn.scaling = 0.7
    layers(model)[1].self_attn = other.model.layers[1].self_attn


CHANGES = [
    *(quantise, bitnet, embed_codes, replace_mlp, replace_norm, replace_model, replace_embedding, replace_activation),
    *(clip_embedding, wrap, normalise_weight, old_weight_norm, patch_instance, hook, other_eps, other_scaling),
    *(fewer_layers, same_layer_twice, another_layer_type),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("owned", [False, True])
def test_what_is_not_stock_runs_as_it_is(change, owned):
    model = tiny_model("llama", V)
    plain = stock_rows(model)
    change(model)
    model.eval()
    expected = stock_rows(model)
    assert (expected - plain).abs().max() > 1e-2, "the change must matter"
    ours = HuggingFaceLM(model, owned=owned)
    assert ours.kernels == "stock modules"
    assert_close(rows(ours), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_runs_as_it_is(change):
    model = tiny_model("llama", V)
    ours = HuggingFaceLM(model)
    assert ours.kernels == "lean pass, 0 of 9 weights packed"
    change(model)
    model.eval()
    assert_close(rows(ours), stock_rows(model), atol=5e-5, rtol=0)
    assert ours.kernels == "stock modules"


def test_other_parameters_in_place_of_the_old_ones_are_read():
    """Norms and biases too, which no product fuses."""
    model = tiny_model("qwen3", V, attention_bias=True)
    ours = HuggingFaceLM(model)
    rows(ours)
    layers(model)[0].self_attn.q_norm.weight = nn.Parameter(torch.linspace(0.5, 2, 8))
    assert_close(rows(ours), stock_rows(model), atol=5e-5, rtol=0)
    layers(model)[1].self_attn.o_proj.bias = nn.Parameter(torch.ones(32))
    assert_close(rows(ours), stock_rows(model), atol=5e-5, rtol=0)
    layers(model)[1].self_attn.k_proj.bias = nn.Parameter(torch.ones(16))
    assert_close(rows(ours), stock_rows(model), atol=5e-5, rtol=0)
    assert ours.kernels.startswith("lean pass")


def modeling_of(kind: str) -> Any:
    package = FAMILIES[kind].package or kind
    return importlib.import_module(f"transformers.models.{package}.modeling_{package}")


def class_of(kind: str, place: str) -> type:
    block = FAMILIES[kind]
    place = "SparseMoeBlock" if place == "MLP" and block.experts else place
    return nn.Linear if place == "Linear" else getattr(modeling_of(kind), block.classes + place)


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) * 2 + 0.5  # a norm behind it would undo a factor alone

    return run


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("place", ["RMSNorm", "MLP", "Linear"])
def test_a_forward_that_was_put_into_a_class_is_heeded(kind, place, monkeypatch):
    model = tiny_model(kind, V)
    ours, plain = HuggingFaceLM(model), stock_rows(model)
    changed = class_of(kind, place)
    monkeypatch.setattr(changed, "forward", doubled(changed.forward))
    expected = stock_rows(model)
    assert (expected - plain).abs().max() > 1e-2
    assert_close(rows(ours), expected, atol=5e-5, rtol=0)
    assert_close(rows(HuggingFaceLM(model)), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", FAMILIES)
def test_other_rotations_are_heeded(kind, monkeypatch):
    """As kernels of other packages are put in: a function of the modelling file is replaced."""
    modeling = modeling_of(kind)
    monkeypatch.setattr(modeling, "apply_rotary_pos_emb", lambda q, k, cos, sin, unsqueeze_dim=1: (q, k))
    model = tiny_model(kind, V)
    assert not is_stock(model)
    assert_close(rows(HuggingFaceLM(model)), stock_rows(model), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "change", [lambda x: x, functools.partial(torch.mul, 2), torch.neg], ids=["python", "partial", "torch"]
)
@pytest.mark.parametrize("kind", FAMILIES)
def test_another_function_that_the_rotation_calls_is_heeded(kind, change, monkeypatch):
    modeling = modeling_of(kind)
    model = tiny_model(kind, V)
    ours, plain = HuggingFaceLM(model), stock_rows(model)
    monkeypatch.setattr(modeling, "rotate_half", change)
    expected = stock_rows(model)
    assert (expected - plain).abs().max() > 1e-2
    assert_close(rows(ours), expected, atol=5e-5, rtol=0)
    assert not is_stock(model)


@pytest.mark.parametrize("name", ["repeat_kv", "eager_attention_forward", "apply_rotary_pos_emb", "create_causal_mask"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_no_function_of_a_familys_file_may_be_another(kind, name, monkeypatch):
    modeling = modeling_of(kind)
    monkeypatch.setattr(modeling, name, doubled(getattr(modeling, name)))
    assert not is_stock(tiny_model(kind, V))


@pytest.mark.parametrize("place", ["Attention", "MLP", "DecoderLayer", "RMSNorm", "Linear"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_call_that_was_put_into_a_class_is_heeded(kind, place, monkeypatch):
    model = tiny_model(kind, V)
    ours, plain = HuggingFaceLM(model), stock_rows(model)
    changed = class_of(kind, place)
    call = changed.__call__

    def bent(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = call(self, *args, **kwargs)
        return (out[0] * 2 + 0.5, *out[1:]) if isinstance(out, tuple) else out * 2 + 0.5

    monkeypatch.setattr(changed, "__call__", bent)
    expected = stock_rows(model)
    assert (expected - plain).abs().max() > 1e-2
    assert_close(rows(ours), expected, atol=5e-5, rtol=0)
    assert not is_stock(model)


def test_a_call_of_every_module_or_of_one_is_heeded(monkeypatch):
    model = tiny_model("llama", V)
    assert is_stock(model)
    layers(model)[0].mlp._call_impl = doubled(layers(model)[0].mlp._call_impl)
    assert not is_stock(model)
    del layers(model)[0].mlp._call_impl
    assert is_stock(model)
    monkeypatch.setattr(nn.Module, "_call_impl", doubled(nn.Module._call_impl))
    assert not is_stock(model)


def test_a_hook_on_every_module_is_heeded():
    model = tiny_model("llama", V)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.Linear) else None
    )
    try:
        assert_close(rows(HuggingFaceLM(model)), stock_rows(model), atol=5e-5, rtol=0)
        assert not is_stock(model)
    finally:
        handle.remove()
    assert is_stock(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", FAMILIES)
def test_stock_models_of_every_float_are_stock(kind, dtype):
    assert is_stock(tiny_model(kind, V).to(dtype))


def test_what_is_not_one_dtype_or_one_of_the_families_is_not():
    assert not is_stock(tiny_model("gpt2", V))
    assert not is_stock(tiny_model("granite", V))
    mixed = tiny_model("llama", V)
    layers(mixed)[0].mlp.to(torch.bfloat16)
    assert not is_stock(mixed)
    assert not is_stock(tiny_model("llama", V).to(torch.float8_e4m3fn))
    assert not is_stock(get_peft_model(tiny_model("llama", V), LoraConfig(task_type="CAUSAL_LM")).get_base_model())


def test_a_quantised_base_is_not_shared_by_adapters():
    model = tiny_model("llama", V)
    quantise(model)
    with pytest.raises(UnsupportedModel, match="adapters can share a plain model"):
        AdapterPool(model)
