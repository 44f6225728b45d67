"""Which modules an adapter adapts, without PEFT: what PEFT itself chooses."""

from typing import Any

import pytest
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.layer import LoraLayer

from tiny import tiny_model
from trimtab.models.lora_plan import plan_of

V = 32
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def plan_of_peft(values: dict[str, Any], model: Any) -> dict[str, tuple[int, float]]:
    inject_adapter_in_model(LoraConfig(**values), model, low_cpu_mem_usage=True)
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer)]
    return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers}


CHOICES: dict[str, dict[str, Any]] = {
    "some": {"r": 2, "lora_alpha": 5, "target_modules": [*ATTENTION, "down_proj"], "layers_to_transform": [1]},
    "patterns": {
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"v_proj": 7, "layers.0.mlp.gate_proj": 1},
    },
    "defaults": {"target_modules": ["q_proj"]},
    "a path": {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"], "layers_to_transform": 0},
    "no layers": {"target_modules": ATTENTION, "layers_to_transform": []},
    "two layers": {"target_modules": ATTENTION, "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "patterns of layers": {"target_modules": MLP, "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "another pattern": {"target_modules": [*MLP, "lm_head"], "layers_to_transform": [1], "layers_pattern": ["mlp", "layers"]},
    "an end of a name": {"target_modules": ["q_proj"], "exclude_modules": ["proj", "0.self_attn.q_proj"]},
    "an excluded regex": {"target_modules": ATTENTION, "exclude_modules": r".*\.0\..*"},
    "a regex": {"target_modules": r"model\.layers\.\d\.self_attn\.[qk]_proj", "rank_pattern": {r"layers\.\d\..*q_proj": 3}},
    "the first pattern": {"target_modules": ATTENTION, "rank_pattern": {".*_proj": 3, "q_proj": 4, "k": 5}, "use_rslora": True},
    "fractions": {"target_modules": ATTENTION, "r": 3, "lora_alpha": 2.5, "alpha_pattern": {"self_attn.q_proj": 1}},
    "the output": {"target_modules": ["lm_head", "v_proj"]},
}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match:RuntimeWarning")
@pytest.mark.parametrize("kind", ["llama", "phi3", "qwen3_moe"])
@pytest.mark.parametrize("name", CHOICES)
def test_modules_ranks_and_scalings_are_those_of_peft(kind, name):
    model, values = tiny_model(kind, V), CHOICES[name]
    plan = plan_of(values, model)
    if plan is None:
        assert kind != "llama"
        return
    assert list(plan.items()) == list(plan_of_peft(values, model).items())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": []},
        {"target_modules": "all-linear"},
        {"target_modules": ["input_layernorm"]},
        {"target_modules": ["no_such_module"]},
        {"target_modules": ["q_proj"], "r": 0},
        {"target_modules": ["q_proj"], "r": "2"},
        {"target_modules": ["q_proj"], "lora_alpha": "16"},
        {"target_modules": ["q_proj"], "rank_pattern": None},
        {"target_modules": ["q_proj"], "layers_to_transform": ["1"]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "exclude_modules": 3},
    ],
)
def test_what_only_peft_knows_is_left_to_it(values):
    assert plan_of(values, tiny_model("llama", V)) is None


@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], r".*q_proj", "all-linear"])
def test_names_that_may_be_of_experts_are_left_to_peft(targets):
    assert plan_of({"target_modules": targets}, tiny_model("qwen3_moe", V)) is None
    assert plan_of({"target_modules": ["q_proj"]}, tiny_model("qwen3_moe", V)) is not None
