"""PEFT adapters of every kind: what is taken gives the rows of PEFT's own forward pass, and what is not is refused by name."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner
from trimtab.errors import CheckpointError, ModelError, UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.peft_kinds import KINDS
from trimtab.models.weight_files import WEIGHTS_NAME

V = 28
IDS = torch.tensor([[1, 5, 9, 3, 7, 2, 11, 4]])
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
CONFIGS = {getattr(kind, "value", kind): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3], "target_modules": ["embed_tokens"]},
    "VBLORA": {"target_modules": ["q_proj"], "vector_length": 4, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 10},
}
LORA: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "biases of the base": {"bias": "lora_only"},
    "a bias of its own": {"lora_bias": True},
    "saved modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": {"trainable_token_indices": [1, 2, 5]},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "parameters": {"target_parameters": ["q_proj.weight"], "target_modules": []},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head"]},
}


LOADERS = (
    Aligner.from_pretrained,
    lambda folder: AlignedModel.from_pretrained(tiny_model("llama", V), folder, tokenizer=tiny_tokenizer()),
)


def make(kind: str, settings: dict[str, Any], base: Path | None = None) -> Any:
    """A model with an adapter whose trained weights are random, so that it changes every row."""
    from trimtab.models.loading import load_model

    model = tiny_model("llama", V) if base is None else load_model(base)
    model = get_peft_model(model, CONFIGS[kind](task_type="CAUSAL_LM", **TARGETS | settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    return model.eval()


def whole(model: Any) -> torch.Tensor:
    """PEFT's own rows."""
    with torch.no_grad():
        return torch.log_softmax(model(IDS).logits, -1)


def stepwise(model: Any) -> torch.Tensor:
    """Ours: three tokens at once, and the others one by one."""
    lm = HuggingFaceLM(model)
    state = lm.new_state(1, 16)
    parts = [(0, 3), *((i, i + 1) for i in range(3, 8))]
    return torch.cat([lm.extend(state, IDS[:, start:end], [end - start]) for start, end in parts], 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tiny_model("llama", V), tiny_tokenizer())


@pytest.mark.filterwarnings("ignore")  # PEFT's advice on settings
@pytest.mark.parametrize(
    ("kind", "settings"),
    [*((kind, SETTINGS.get(kind, {})) for kind in KINDS), *(("LORA", settings) for settings in LORA.values())],
    ids=[*KINDS, *LORA],
)
def test_rows_are_those_of_pefts_own_forward_pass(kind, settings, base, tmp_path):
    model = make(kind, settings, base)
    expected = whole(model)
    assert (expected - whole(tiny_model("llama", V))).abs().max() > 0.1, "the adapter must matter"
    assert_close(stepwise(model), expected, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    assert_close(whole(Aligner.from_pretrained(tmp_path).model), expected, atol=0, rtol=0)


def refused(model: Any, message: str, folder: Path) -> None:
    """As an object, and as a folder before its base is read."""
    with pytest.raises(UnsupportedModel, match=message):
        HuggingFaceLM(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": "/nowhere"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(folder)
    for load in LOADERS:
        with pytest.raises(UnsupportedModel, match=message):
            load(folder)


def test_alora_which_acts_from_its_invocation_on_is_refused(tmp_path):
    model = make("LORA", {"alora_invocation_tokens": [9, 3]})
    with torch.no_grad():
        inner = torch.log_softmax(model.get_base_model()(IDS).logits, -1)
    assert (whole(model) - inner).abs().max() > 0.1, "the model inside does not do what PEFT does"
    refused(model, "aLoRA, which begins to act at its alora_invocation_tokens", tmp_path)


def test_alora_that_transformers_put_into_the_model_is_refused():
    model = tiny_model("llama", V)
    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", **TARGETS, alora_invocation_tokens=[9, 3]))
    with pytest.raises(UnsupportedModel, match="alora_invocation_tokens"):
        HuggingFaceLM(model)


def test_an_inactive_adapter_of_such_a_kind_is_refused_too():
    model = make("LORA", {})
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", **TARGETS, alora_invocation_tokens=[9, 3]))
    with pytest.raises(UnsupportedModel, match="alora_invocation_tokens"):
        HuggingFaceLM(model)


@pytest.mark.parametrize("by", ["PEFT", "transformers"])
def test_one_that_is_added_later_is_refused_at_the_next_text(by):
    model = make("LORA", {}) if by == "PEFT" else tiny_model("llama", V)
    lm = HuggingFaceLM(model)
    lm.new_state(1, 8)
    config = LoraConfig(task_type="CAUSAL_LM", **TARGETS, alora_invocation_tokens=[9, 3])
    if by == "PEFT":
        model.add_adapter("second", config)
        model.set_adapter("second")
    else:
        model.add_adapter(config)
    with pytest.raises(UnsupportedModel, match="alora_invocation_tokens"):
        lm.new_state(1, 8)


def test_a_kind_that_is_not_known_to_act_by_its_layers_alone_is_refused(tmp_path):
    model = make("LILY", {})
    inner = model.get_base_model()
    assert "LILY" not in KINDS
    refused(model, r"adapters of type LILY .*merge_and_unload", tmp_path)
    assert inner.peft_config


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig", "CPTConfig"])
@pytest.mark.filterwarnings("ignore")
def test_virtual_tokens_are_refused(kind, tmp_path):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(get_peft_model(tiny_model("llama", V), config), "add virtual tokens to the prompt", tmp_path)


def test_a_setting_of_lora_that_was_never_tried_is_refused():
    model = make("LORA", {})
    model.peft_config["default"].of_next_year = 1
    with pytest.raises(UnsupportedModel, match="LoRA adapters with of_next_year"):
        HuggingFaceLM(model)


@pytest.mark.filterwarnings("error:Unexpected keyword arguments")
@pytest.mark.parametrize("kind", ["LORA", "IA3", "LOHA"])
def test_a_setting_of_a_later_peft_is_refused(kind, base, tmp_path):
    make(kind, SETTINGS.get(kind, {}), base).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"brand_new_field": 3}))
    for load in LOADERS:
        with pytest.raises(UnsupportedModel, match=r"sets brand_new_field to 3, which PEFT \S+ does not know"):
            load(tmp_path)
    path.write_text(json.dumps(values | {"brand_new_field": None}))
    for load in LOADERS:
        load(tmp_path)


# ---- every tensor of the file, and every place in the model


@pytest.fixture(params=["LORA", "IA3"])
def saved(request, base, tmp_path) -> Path:
    make(request.param, SETTINGS.get(request.param, {}), base).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME)


def test_a_tensor_without_a_place_is_refused(saved):
    rewrite(saved, lambda tensors: tensors | {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"has no place for 1 keys, such as .*layers\.9\.mlp\.up_proj"):
        Aligner.from_pretrained(saved)


def test_a_place_without_a_tensor_is_refused(saved):
    gone = min(load_file(saved / WEIGHTS_NAME))
    rewrite(saved, lambda tensors: {key: value for key, value in tensors.items() if key != gone})
    with pytest.raises(CheckpointError, match=f"lacks 1 keys, such as {gone}"):
        Aligner.from_pretrained(saved)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(saved):
    key, tensor = min(load_file(saved / WEIGHTS_NAME).items())
    rewrite(saved, lambda tensors: tensors | {key: torch.zeros(7, 5)})
    name = key.removesuffix(".weight").replace(".", r"\.")
    held = str(list(tensor.shape)).replace("[", r"\[").replace("]", r"\]")
    for load in LOADERS:
        with pytest.raises(ModelError, match=rf"{name}.*\[7, 5\].*{held}"):
            load(saved)
