"""A checkpoint of codes, or of more layers than its model has, is no model of which some part is left out: it is refused."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitNetQuantConfig

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import CheckpointError, ModelError
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.models.aligner import Aligner
from trimtab.models.layers import OF_LAYERS
from trimtab.models.loading import check_finite, load_model
from trimtab.models.supported import SUPPORTED

V = 28
WEIGHTS = "model.safetensors"
CURE = "quantization_config"
Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(params=["llama", "gpt2", "gpt_neox", "qwen3"])
def folder(request: Any, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", tiny_model(request.param, V), tiny_tokenizer())


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and "layers." in name + name.replace("h.", "layers.")


def coded(dtype: torch.dtype, scale: str | None) -> Callable[[Tensors], Tensors]:
    """Weights of layers as codes, with their scales beside them."""

    def change(tensors: Tensors) -> Tensors:
        for name, tensor in list(tensors.items()):
            if is_matrix(name, tensor):
                size = tensor.abs().amax() / 100
                tensors[name] = (tensor / size).to(dtype)
                if scale:
                    tensors[name.removesuffix("weight") + scale] = size.reshape(1)
        return tensors

    return change


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv", "SCB", None])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32])
def test_codes_are_refused_with_a_tensor_and_what_it_is_stored_as(dtype, scale, folder):
    rewrite(folder, coded(dtype, scale))
    stored = {torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}
    said = f"holds codes, not weights: .*weight, which is stored as {stored.get(dtype, 'I32')}: .*{CURE}"
    with pytest.raises(CheckpointError, match=said):
        load_model(folder, dtype="float32")
    with pytest.raises(CheckpointError, match="holds codes"):
        load_model(folder)


def in_blocks(tmp_path, block=32, cut=lambda scale: scale, **sizes):
    """A folder of floats of 8 bits with a scale for each block, as DeepSeek's are, and what its weights stand for."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "head_dim": 16} | sizes
    folder, expected = save_tiny(tmp_path / "model", tiny_model("llama", V, spread=0.2, **shape), tiny_tokenizer()), {}

    def change(tensors):
        made = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.ndim == 2:
                spread = [torch.arange(size) // block for size in tensor.shape]
                largest = torch.zeros(spread[0][-1] + 1, spread[1][-1] + 1)
                for row, column in itertools.product(*(range(count) for count in largest.shape)):
                    largest[row, column] = tensor[spread[0] == row][:, spread[1] == column].abs().max()
                scale = largest / 448
                whole = scale[spread[0]][:, spread[1]]
                made |= {name: (tensor / whole).to(torch.float8_e4m3fn), f"{name}_scale_inv": cut(scale)}
                expected[name] = made[name].float() * whole
        return made

    rewrite(folder, change)
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    edit(folder, quantization_config=config, dtype="bfloat16")
    return folder, expected


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_floats_of_8_bits_in_blocks_become_weights(dtype, tmp_path):
    """transformers makes them, where no GPU computes with them; all are of one dtype then."""
    folder, expected = in_blocks(tmp_path)
    loaded = load_model(folder, dtype=dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16 if dtype == "auto" else torch.float32}
    for name, weight in expected.items():
        torch.testing.assert_close(loaded.state_dict()[name].float(), weight, atol=1e-3, rtol=1e-2)
    with torch.no_grad():
        assert loaded(torch.arange(1, 9)[None]).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"intermediate_size": 48}, r"down_proj.weight_scale_inv has shape \[2, 2\], .* block of \[32, 32\] .* \[64, 48\]"),
        ({"cut": lambda scale: scale[:1]}, r"weight_scale_inv has shape \[1, \d\], which is not one scale for each block"),
    ],
)
def test_scales_that_do_not_fit_their_blocks_are_refused(settings, said, tmp_path):
    """transformers takes them for those of other blocks, and says nothing."""
    folder, _ = in_blocks(tmp_path, **settings)
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


def test_a_single_tensor_of_codes_is_enough(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())
    name = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors | {name: (tensors[name] * 50).to(torch.int8)})
    with pytest.raises(CheckpointError, match=f"1 tensors such as {name}, which is stored as I8"):
        load_model(folder)


def test_codes_in_one_of_several_files_are_found(tmp_path):
    tiny_model("llama", V).save_pretrained(tmp_path, max_shard_size="10KB")
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(part).items()}, part, {"format": "pt"})
    with pytest.raises(CheckpointError, match="holds codes"):
        load_model(tmp_path)


def test_files_that_are_not_loaded_do_not_count(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())
    codes = {name: tensor.to(torch.int8) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(codes, folder / "consolidated.safetensors", {"format": "pt"})
    load_model(folder)


@pytest.mark.parametrize("beside", ["weight_scale", "weight_scale_inv", "scales", "input_scale", "lora_A.weight", "bias"])
def test_a_scale_beside_a_weight_of_floats_is_left_over(beside, tmp_path):
    """Codes may be saved as floats, too; and a bias that the configuration does not have changes what comes out."""
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())
    name = f"model.layers.0.mlp.up_proj.{beside}"
    rewrite(folder, lambda tensors: tensors | {name: torch.ones(1)})
    said = f"holds 1 tensors that its model has no place for, such as {name}, which is stored as F32: .*{CURE}"
    with pytest.raises(CheckpointError, match=said):
        load_model(folder)


@pytest.mark.parametrize("kind", [kind for kind in SUPPORTED if kind != "olmo_hybrid"])  # which has two at least
def test_layers_that_the_configuration_does_not_count_are_refused(kind, tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model(kind, V), tiny_tokenizer())
    load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    fewer = {name: values[:1] for name, values in config.items() if name in OF_LAYERS}
    edit(folder, **fewer, **{"n_layer" if "n_layer" in config else "num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match="that its model has no place for") as error:
        load_model(folder)
    assert ".1." in str(error.value)
    assert "number of layers" in str(error.value)


def test_norms_of_another_family_are_refused(tmp_path):
    """Qwen3's weights, read as a Llama, lose the norms of queries and keys."""
    folder = save_tiny(tmp_path / "model", tiny_model("qwen3", V), tiny_tokenizer())
    edit(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(CheckpointError, match=r"such as model\.layers\.0\.self_attn\.k_norm\.weight"):
        load_model(folder)


def test_what_old_checkpoints_carry_along_does_no_harm(tmp_path):
    masks = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "attn.masked_bias": torch.tensor(-1e4)}
    gpt2 = save_tiny(tmp_path / "gpt2", tiny_model("gpt2", V), tiny_tokenizer())
    rewrite(
        gpt2,
        lambda tensors: (
            {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
            | {f"h.0.{name}": mask for name, mask in masks.items() if name == "attn.bias"}
        ),
    )
    load_model(gpt2)
    neox = save_tiny(tmp_path / "neox", tiny_model("gpt_neox", V), tiny_tokenizer())
    old = {"attention.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "attention.rotary_emb.inv_freq": torch.ones(2)}
    rewrite(neox, lambda tensors: tensors | {f"gpt_neox.layers.1.{name}": tensor for name, tensor in old.items()})
    load_model(neox)
    llama = save_tiny(tmp_path / "llama", tiny_model("llama", V), tiny_tokenizer())
    further = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "v_head.weight": torch.ones(1, 32)}
    rewrite(llama, lambda tensors: tensors | further | {"score.weight": torch.ones(1, 32)})
    load_model(llama)


def test_a_second_copy_of_a_tied_embedding_does_no_harm(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V, tie_word_embeddings=True), tiny_tokenizer())
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    load_model(folder)


def test_an_unknown_quantiser_is_none(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())
    edit(folder, quantization_config={"quant_method": "nobody_knows", "bits": 8})
    load_model(folder)  # plain weights after all
    rewrite(folder, coded(torch.int8, "weight_scale"))
    with pytest.raises(CheckpointError, match="holds codes"):
        load_model(folder)


def test_a_known_quantiser_reads_its_own_codes(tmp_path, monkeypatch):
    """BitNet's ternary weights, packed four to a byte: transformers' business, as before."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())

    def pack(tensors: Tensors) -> Tensors:
        for name, tensor in list(tensors.items()):
            if "_proj" in name:
                tensors[name] = torch.zeros(len(tensor) // 4, tensor.shape[1], dtype=torch.uint8)
                tensors[f"{name}_scale"] = torch.ones(1)
        return tensors

    rewrite(folder, pack)
    with pytest.raises(CheckpointError):
        load_model(folder)
    edit(folder, quantization_config=BitNetQuantConfig(modules_to_not_convert=["lm_head"]).to_dict())
    model = load_model(folder)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "BitLinear"
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8


def test_aligners_and_reward_models_too(tmp_path):
    folder = save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())
    rewrite(folder, coded(torch.int8, "weight_scale"))
    with pytest.raises(CheckpointError, match="holds codes"):
        Aligner.from_pretrained(folder)

    def classify(tensors: Tensors) -> Tensors:
        del tensors["lm_head.weight"]
        return tensors | {"score.weight": torch.ones(1, 32)}

    rewrite(folder, classify)
    edit(folder, num_labels=1, id2label={"0": "good"}, label2id={"good": 0})
    with pytest.raises(CheckpointError, match="holds codes"):
        RewardModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "X", "_data": {}, "_version": 1}}},
            "pip install torchao",
        ),
        ({"quant_method": "gptq", "bits": 4}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4}, "pip install gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, "pip install compressed-tensors"),
        ({"quant_method": "quanto", "weights": "int8"}, "pip install optimum-quanto"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else "",
)
def test_the_package_that_a_quantised_folder_needs_is_named(settings, package, tmp_path):
    save_tiny(tmp_path, tiny_model("llama", 28), tiny_tokenizer())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(ModelError, match=re.escape(package)):
        load_model(tmp_path)


class _Codes(torch.Tensor):
    """As a quantiser keeps weights: codes that know no arithmetic but what they stand for."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func not in (torch.Tensor.detach, torch.Tensor.dequantize, torch.Tensor.requires_grad.__get__):
            raise NotImplementedError(f"{func} of codes")
        if func is torch.Tensor.dequantize:
            return args[0].as_subclass(torch.Tensor) * 0.5
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("broken", [False, True])
def test_weights_of_a_quantiser_are_finite_if_what_they_stand_for_is(broken):
    weight = torch.tensor([1.0, math.nan if broken else 2.0]).as_subclass(_Codes)
    model = SimpleNamespace(named_parameters=lambda: [("layer.weight", weight)])
    if not broken:
        check_finite(model, "folder")
        return
    with pytest.raises(CheckpointError, match=r"'folder' contains NaN or infinite weights in layer\.weight"):
        check_finite(model, "folder")
