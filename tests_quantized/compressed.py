"""Folders as compressed-tensors writes them: scales from each weight's largest numbers, then its own compression."""

from pathlib import Path

from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

GROUP = 32
"""Weights that share a scale, where a preset has groups."""


def save(plain: Path, folder: Path, preset: str) -> None:
    """Quantise the linear layers of a model but its output matrix, by one of the library's presets, and save it."""
    model = AutoModelForCausalLM.from_pretrained(plain)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    if scheme.weights.group_size:
        scheme.weights.group_size = GROUP
    apply_quantization_config(model, QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        rows = len(module.weight)
        grouped = module.weight.detach().reshape(rows, -1, scheme.weights.group_size or module.weight.shape[1])
        scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), scheme.weights)
        module.weight_scale.data.copy_(scale)
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
