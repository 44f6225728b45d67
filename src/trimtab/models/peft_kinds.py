"""Which PEFT adapters can be decoded with: those that act by their layers alone.

Trimtab calls the model inside a PEFT model, with its own cache and mask. What an adapter does in its layers happens there, too.
What PEFT does around them (virtual tokens, routers that look at the text, the invocation tokens of aLoRA) would be left out in
silence, so only what tests/models/test_peft_kinds.py finds equal to PEFT's own forward pass is taken, and the rest refused.
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from trimtab.errors import UnsupportedModel

__all__ = ["KINDS", "check_adapters", "check_known"]

KINDS = (
    *("LORA", "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA"),
    *("IA3", "LN_TUNING", "LOHA", "LOKR", "MISS", "OFT", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA"),
    *("SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
)
"""PEFT's names of them."""
_LORA = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "lora_bias", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters", "modules_to_save"),
    *("trainable_token_indices", "ensure_weight_tying", "layer_replication", "use_dora", "use_qalora", "qalora_group_size"),
    *("init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config", "velora_config"),
    *("monteclora_config", "runtime_config", "megatron_core"),
}
"""Settings of a `LoraConfig` that may have a value; those of a later PEFT are refused until they are tested."""
_WAY_OUT = "where PEFT can merge it into its base (merge_and_unload), save what comes of it and use that; or use LoRA or IA3"


def check_adapters(configs: Mapping[str, Any], model: str) -> None:
    """Refuse adapters of which a part would be left out.

    Args:
        configs: `PeftConfig` by the adapter's name, as `model.peft_config` has them.
        model: what to call the model in the message.

    Raises:
        UnsupportedModel: names the kind or the setting, and the way out.
    """
    for config in configs.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if getattr(config, "is_prompt_learning", False):
            raise UnsupportedModel(f"{model}: PEFT adapters that add virtual tokens to the prompt ({kind}) are not supported")
        if kind not in KINDS:
            raise UnsupportedModel(f"{model}: PEFT adapters of type {kind} do not act by their layers alone: {_WAY_OUT}")
        if kind != "LORA":
            continue
        if config.alora_invocation_tokens:
            raise UnsupportedModel(
                f"{model}: this LoRA adapter is an aLoRA, which begins to act at its alora_invocation_tokens, and Trimtab's"
                " adapters act on every token: use one that was trained without them"
            )
        further = sorted(name for name, value in vars(config).items() if value and name not in _LORA)
        if further:
            raise UnsupportedModel(f"{model}: LoRA adapters with {further[0]} are not supported: {_WAY_OUT}")


def check_known(values: Mapping[str, Any], config: Any, model: str) -> None:
    """Refuse settings of an adapter's file that this version of PEFT does not know, and would leave out with a warning.

    Args:
        values: what adapter_config.json holds.
        config: the `PeftConfig` that PEFT made of it.
        model: what to call the model in the message.

    Raises:
        UnsupportedModel: names the setting, and the way out.
    """
    unknown = sorted(name for name, value in values.items() if value and not hasattr(config, name))
    if unknown:
        name = unknown[0]
        raise UnsupportedModel(
            f"{model}: adapter_config.json sets {name} to {values[name]!r}, which PEFT {version('peft')} does not know: install"
            f" a PEFT that does; or remove {name}, if the adapter is right without it"
        )
