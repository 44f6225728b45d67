"""The text model of a model that holds others too: the same rows, and nothing of its own left behind in the files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText, Gemma3Config, Mistral3Config, Qwen2VLConfig, Qwen3_5Config

from tiny import SHAPES, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.errors import CheckpointError, UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_configs, load_model

V = 28
IDS = torch.tensor([[5, 9, 1, 27, 2, 2, 17, 3, 4, 8, 11]])
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


def text(kind: str) -> dict[str, Any]:
    return {"model_type": kind, "vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None, **SHAPES[kind]}


def save_whole(folder: Path, config: Any) -> Any:
    """The folder of a composite model with random weights, and the model."""
    model = AutoModelForImageTextToText.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def gemma3() -> Any:
    return Gemma3Config(text_config=text("gemma3_text"), vision_config=VISION | {"patch_size": 14}, mm_tokens_per_image=4)


def mistral3(**tied: bool) -> Any:
    vision = VISION | {"model_type": "pixtral", "patch_size": 14, "head_dim": 8}
    return Mistral3Config(text_config=text("mistral"), vision_config=vision, **tied)


def untied() -> Any:
    return mistral3(tie_word_embeddings=False)


def qwen3_5() -> Any:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    return Qwen3_5Config(text_config=text("qwen3_5_text"), vision_config=vision)


@pytest.mark.parametrize(
    ("config", "kind"),
    [(gemma3, "gemma3_text"), (mistral3, "mistral"), (untied, "mistral"), (qwen3_5, "qwen3_5_text")],
    ids=["gemma3", "mistral3", "untied", "qwen3_5"],
)
@pytest.mark.parametrize("new", [False, True], ids=["names on the hub", "new names"])
def test_rows_are_those_of_the_whole_model(config, kind, new, tmp_path, caplog):
    whole = save_whole(tmp_path, config())
    file = tmp_path / "model.safetensors"
    if new:  # as transformers calls them in memory
        save_file(
            {name.replace("language_model.model.", "model.language_model."): t for name, t in load_file(file).items()}, file
        )
    caplog.set_level("INFO")
    loaded = load_model(tmp_path)
    assert loaded.config.model_type == kind
    assert f"its text model is used: '{kind}'" in caplog.text
    assert "LOAD REPORT" not in caplog.text
    model = HuggingFaceLM(loaded, owned=True)
    assert model.kernels.startswith("stock" if model.is_recurrent else "lean pass")
    with torch.no_grad():
        expected = torch.log_softmax(whole(IDS).logits.float(), -1)
    assert_close(model.extend(model.new_state(1, 11), IDS, [11]), expected, atol=3e-5, rtol=0)
    assert load_configs(tmp_path)[0].model_type == kind


def test_a_user_generates_with_one(tmp_path):
    save_whole(tmp_path, gemma3())
    model = AlignedModel.from_pretrained(tmp_path)
    assert len(model.generate("the fox", SamplingParams(max_tokens=6, seed=0, ignore_eos=True))[0].tokens) == 6


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ({"language_model.model.layers.0.mlp.down_proj.weight_scale": torch.ones(1)}, "has no place for, such as"),
        (
            {"language_model.model.layers.0.mlp.down_proj.weight": torch.ones(32, 48, dtype=torch.int8)},
            "holds codes, not weights",
        ),
        ({"language_model.model.layers.1.mlp.down_proj.weight": None}, "missing_keys, such as"),
    ],
)
def test_files_that_do_not_fill_the_text_model_are_refused(plant, message, tmp_path):
    save_whole(tmp_path, gemma3())
    file = tmp_path / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(file) | plant).items() if tensor is not None}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def test_a_lent_one_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(UnsupportedModel, match="holds a text model and others; only text models run: name one"):
        HuggingFaceLM(save_whole(tmp_path, gemma3()))


def test_a_text_model_without_a_class_of_its_own_is_refused(tmp_path):
    Qwen2VLConfig(text_config={"hidden_size": 32}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="'qwen2_vl_text', for which transformers has no class of its own"):
        load_configs(tmp_path)


def test_a_quantised_one_is_not_taken_apart(tmp_path):
    config = gemma3()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="a quantised one is not taken apart"):
        load_configs(tmp_path)
