"""Some of a model's layers as a model of their own: whose weights they are, for every supported family, and what is refused."""

import copy

import pytest
import torch

from tiny import SHAPES, save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import InvalidOption, UnsupportedModel
from trimtab.models.layers import choose_layers, parse_layers, pick_layers
from trimtab.models.loading import load_model
from trimtab.models.masks import STATEFUL, TOKENWISE
from trimtab.models.supported import SUPPORTED

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def deep_model(kind="llama", **settings):
    return tiny_model(kind, **{"n_layer" if "n_layer" in SHAPES[kind] else "num_hidden_layers": 5, **settings})


def without_other_layers(model, layers):
    """The model itself, with the others taken out of its list."""
    model = copy.deepcopy(model)
    (blocks,) = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 5)
    for i in reversed([i for i in range(5) if i not in layers]):
        del blocks[i]
    for place, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    model.config.num_hidden_layers = len(layers)
    for name in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if values := getattr(model.config, name, None):
            setattr(model.config, name, [values[i] for i in layers])
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind not in (*STATEFUL, *TOKENWISE)])
def test_the_layers_that_are_picked_compute_what_they_do_in_the_model(kind, tied, tmp_path):
    """So do embedding, last norm and output matrix; and what is saved is what was picked."""
    model = deep_model(kind, tie_word_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    small = pick_layers(model, [0, 2, 4])
    with torch.no_grad():
        assert torch.equal(small(IDS).logits, without_other_layers(model, [0, 2, 4])(IDS).logits)
        save_tiny(tmp_path, small, tiny_tokenizer("abcde"))
        assert torch.equal(load_model(tmp_path)(IDS).logits, small(IDS).logits)
    assert small.config.num_hidden_layers == 3
    assert (small.get_input_embeddings().weight is small.get_output_embeddings().weight) == tied
    assert small.generation_config.eos_token_id == model.generation_config.eos_token_id
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 5


def test_layers_that_keep_states_are_not_picked():
    with pytest.raises(UnsupportedModel, match="layers: those of a 'lfm2' model, some of which keep states, cannot be picked"):
        pick_layers(deep_model("lfm2"), [0, 1])


def test_all_layers_are_the_model_in_float32():
    model = deep_model().to(torch.bfloat16)
    whole = pick_layers(model, range(5))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in model.float().state_dict().items())
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


def test_layer_types_go_with_their_layers():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = deep_model("qwen3", layer_types=types, sliding_window=64, use_sliding_window=True)
    assert pick_layers(model, [1, 4]).config.layer_types == ["sliding_attention", "full_attention"]


def test_a_layer_that_is_scaled_by_its_place_is_so_by_its_new_one(tmp_path):
    """GPT-2 may divide attention scores by the layer's number: what is trained is then what is loaded."""
    small = pick_layers(deep_model("gpt2", scale_attn_by_inverse_layer_idx=True), [1, 4])
    save_tiny(tmp_path, small, tiny_tokenizer("abcde"))
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path)(IDS).logits, small(IDS).logits)


def test_picking_leaves_the_global_generator_alone():
    model = deep_model()
    before = torch.get_rng_state()
    pick_layers(model, [0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("1", (0,)), ("2", (0, 29)), ("4", (0, 10, 19, 29)), ("30", tuple(range(30))), ("0,1,29", (0, 1, 29)), ("7,", (7,))],
)
def test_layers_are_named_by_how_many_or_which(text, layers):
    assert parse_layers(text, 30) == layers
    assert parse_layers("2") == ()


def test_a_choice_has_as_many_layers_as_are_asked_for():
    for total in range(1, 40):
        for count in range(1, total + 1):
            chosen = choose_layers(count, total)
            assert len(set(chosen)) == count
            assert chosen[0] == 0
            assert chosen[-1] < total


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("two", "layers must be how many, such as 2, or which ones, such as 0,1,29, not 'two'"),
        ("", "layers must be how many"),
        ("0,-1", "layers must be how many"),
        ("0", "layers must be from 1 to 30, not 0"),
        ("31", "layers must be from 1 to 30, not 31"),
        ("0,30", "layers: there is no layer 30; the proposal's are 0 to 29"),
        ("5,1", "layers must be in order, each once, not '5,1'"),
        ("1,1", "layers must be in order, each once"),
    ],
)
def test_other_words_are_refused(text, message):
    with pytest.raises(InvalidOption, match=message):
        parse_layers(text, 30)


def test_quantised_weights_are_refused():
    model = deep_model()
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(UnsupportedModel, match="quantised weights cannot be"):
        pick_layers(model, [0])


def test_layers_that_do_not_fit_their_new_places_are_refused():
    """DeepSeek's first layer is dense, the others are mixtures of experts."""
    with pytest.raises(
        UnsupportedModel, match=r"'deepseek_v3' model is goes by its place, and \[1, 3\] do not fit the first 2"
    ):
        pick_layers(deep_model("deepseek_v3"), [1, 3])
