"""The lean pass and packed weights: the same rows as the stock module, no weight held twice, and only where that is right."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tiny import tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.models.blocks import FAMILIES, LEAN
from trimtab.models.fingerprint import fingerprint_model
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.prepack import Linear

V = 32
IDS = torch.tensor([[5, 9, 1, 30, 2, 2, 17]])
VARIANTS = {
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "one_key_head": {"num_key_value_heads": 1},
    "all_key_heads": {"num_key_value_heads": 4},
    "llama3_rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}


def rows(model: HuggingFaceLM) -> torch.Tensor:
    return model.extend(model.new_state(1, 9), IDS, [IDS.shape[1]])


def stock_rows(model) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(IDS).logits.float(), -1)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_settings_of_a_llama_are_those_of_the_stock_module(settings):
    model = tiny_model("llama", V, **settings)
    assert HuggingFaceLM(model).kernels.startswith("lean pass")
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.normal_(1.0, 0.2, generator=torch.Generator().manual_seed(1))
    assert_close(rows(HuggingFaceLM(model)), stock_rows(model), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    "field", ["final_logit_softcapping", "attn_logit_softcapping", "embed_scale", "sliding_window_pattern"]
)
@pytest.mark.parametrize("kind", LEAN)
def test_fields_that_other_families_know_change_what_they_change_in_the_stock_module(kind, field):
    model = tiny_model(kind, V, **{field: 3.0})
    assert HuggingFaceLM(model).kernels.startswith("lean pass")
    assert_close(rows(HuggingFaceLM(model)), stock_rows(model), atol=5e-5, rtol=0)


def uncap_logits(model):
    model.config.final_logit_softcapping = None


def uncap_scores(model):
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None


def turn_off_rotation(model):
    model.model.layers[0].self_attn.use_rope = not model.model.layers[0].self_attn.use_rope


def other_mlp(model):
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    for parameter in model.model.layers[0].mlp.parameters():
        parameter.data.mul_(-1.5)


def swap_kinds(model):
    model.config.layer_types = model.config.layer_types[::-1]


def scale_scores(model):
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3


def turn_faster(model):
    model.model.rotary_emb.inv_freq.mul_(3)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gemma2", uncap_logits),
        ("gemma2", uncap_scores),
        ("smollm3", turn_off_rotation),
        ("qwen3_moe", other_mlp),
        ("llama", other_mlp),
        ("gemma3_text", swap_kinds),
        ("llama", scale_scores),
        ("llama", turn_faster),
    ],
)
def test_what_an_owner_changes_later_is_heeded(kind, change):
    model = tiny_model(kind, V, **({"final_logit_softcapping": 3.0} if kind == "gemma2" else {}))
    ours = HuggingFaceLM(model)
    plain = rows(ours)
    change(model)
    assert (stock_rows(model) - plain).abs().max() > 0.01
    assert_close(rows(ours), stock_rows(model), atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", LEAN)
def test_a_lent_model_goes_on_as_it_was_and_no_weight_is_held_twice(kind):
    model = tiny_model(kind, V)
    before, expected, fingerprint = copy.deepcopy(model.state_dict()), stock_rows(model), fingerprint_model(model)
    lean = HuggingFaceLM(model)
    assert_close(rows(lean), expected, atol=5e-5, rtol=0)
    assert torch.equal(stock_rows(model), expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert fingerprint_model(model) == lean.fingerprint == fingerprint
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(storages.values()) == sum(p.numel() * p.element_size() for p in model.parameters())
    assert all(linear.weight.untyped_storage().data_ptr() in storages for linear in lean._lean.linears)


def test_stacked_modules_are_views_of_one_weight():
    modules = [nn.Linear(8, n, bias=n != 3) for n in (5, 3, 4)]
    x = torch.linspace(-1, 1, 16).view(2, 8)
    expected = torch.cat([module(x) for module in modules], -1)
    stacked = Linear.of(*modules)
    assert_close(stacked(x), expected)
    assert_close(torch.cat([module(x) for module in modules], -1), expected, atol=0, rtol=0)
    assert modules[2].weight.untyped_storage().data_ptr() == stacked.weight.untyped_storage().data_ptr()


def test_a_hook_on_a_lent_model_is_heeded_now_and_later():
    """Steering vectors and the like are hooks: a module that has some does what it does, and so must we."""
    model = tiny_model("llama", V)
    lean = HuggingFaceLM(model)
    plain = rows(lean)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, out: out + torch.arange(32.0) / 8)
    assert (stock_rows(model) - plain).abs().max() > 1
    assert_close(rows(lean), stock_rows(model), atol=5e-5, rtol=0)
    assert_close(rows(HuggingFaceLM(model)), stock_rows(model), atol=5e-5, rtol=0)
    hook.remove()
    assert_close(rows(lean), plain, atol=5e-5, rtol=0)


@pytest.mark.parametrize("kind", LEAN)
def test_a_lent_model_may_go_on_learning(kind):
    """In-place updates and changes of dtype show in every wrapper around the module."""
    model = tiny_model(kind, V)
    wrappers = [HuggingFaceLM(model), HuggingFaceLM(model)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    for wrapper in wrappers:
        assert_close(rows(wrapper), stock_rows(model), atol=5e-5, rtol=0)
    if not FAMILIES[kind].experts:  # they know no float64
        model.double()
    for wrapper in wrappers:
        assert_close(rows(wrapper).float(), stock_rows(model), atol=5e-5, rtol=0)


def test_many_wrappers_around_a_module_share_its_weights():
    model = tiny_model("llama", V)
    first, second = HuggingFaceLM(model), HuggingFaceLM(model)
    for one, other in zip(first._lean.linears, second._lean.linears, strict=True):
        assert one.weight.data_ptr() == other.weight.data_ptr()


def test_a_lent_model_can_be_trained_after_it_was_decoded_with():
    """Also where its weights were moved, so that they are stacked again in the middle of decoding."""
    model = tiny_model("llama", 28)
    aligned = AlignedModel.from_pretrained(model, tokenizer=tiny_tokenizer())
    model.double()
    aligned.generate("abc", SamplingParams(max_tokens=3, seed=0))
    loss = model(IDS.clamp(max=27), labels=IDS.clamp(max=27)).loss
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert model(IDS.clamp(max=27), labels=IDS.clamp(max=27)).loss.item() < loss.item()
