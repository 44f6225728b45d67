"""Which models the lean pass was written for: exactly transformers' own Llama, Mistral, Qwen2 and Qwen3, as they come.

The lean pass reads a model's weights and does the arithmetic itself. So it is right only where every module is of the class it
was written for, in its place, and does what that class does. A quantised linear layer holds codes and scales, a subclass may
do anything, a hook or another `forward` changes what comes out: any of these runs as it is, in the stock module.
"""

import importlib
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

__all__ = ["FAMILIES", "is_stock"]

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""By `model_type`, how the names of the classes begin."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_MODEL = {
    "": "ForCausalLM",
    "model": "Model",
    "model.embed_tokens": nn.Embedding,
    "model.layers": nn.ModuleList,
    "model.norm": "RMSNorm",
    "model.rotary_emb": "RotaryEmbedding",
    "lm_head": nn.Linear,
}
_LAYER = {
    "": "DecoderLayer",
    ".self_attn": "Attention",
    **{f".self_attn.{name}_proj": nn.Linear for name in "qkvo"},
    ".mlp": "MLP",
    **{f".mlp.{name}_proj": nn.Linear for name in ("gate", "up", "down")},
    ".mlp.act_fn": nn.SiLU,
    ".input_layernorm": "RMSNorm",
    ".post_attention_layernorm": "RMSNorm",
}
_FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv", "rotate_half")
"""Those that every family's file has of its own."""
_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "forward")
"""What runs when a module is called."""
_QWEN3_LAYER = {".self_attn.q_norm": "RMSNorm", ".self_attn.k_norm": "RMSNorm"}


def is_stock(model: Any) -> bool:
    """Whether a model is one of `FAMILIES`, all of it unchanged, with weights of one dtype on one device."""
    family = model.config.model_type
    if family not in FAMILIES:
        return False
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = _kinds(family, model.config.num_hidden_layers)
    if modules.keys() != kinds.keys() or any(type(module) not in kinds[path] for path, module in modules.items()):
        return False
    return (
        all(map(_is_untouched, {type(module) for module in modules.values()} - {nn.ModuleList}))
        and _computes_as_written(_modeling(family), model.config)
        and not any(map(_is_changed, modules.values()))
        and _has_plain_weights(modules.values())
        and _has_one_shape(model)
    )


@cache
def _kinds(family: str, layers: int) -> dict[str, tuple[type, ...]]:
    """The classes that each module may be of, by its path."""
    from transformers.activations import SiLUActivation

    layer = _LAYER | (_QWEN3_LAYER if family == "qwen3" else {})
    places: dict[str, Any] = _MODEL | {f"model.layers.{i}{path}": kind for i in range(layers) for path, kind in layer.items()}
    known: dict[Any, tuple[type, ...]] = {nn.SiLU: (nn.SiLU, SiLUActivation)}
    for kind in set(places.values()) - known.keys():
        known[kind] = (getattr(_modeling(family), FAMILIES[family] + kind) if isinstance(kind, str) else kind,)
    return {path: known[kind] for path, kind in places.items()}


def _modeling(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _is_untouched(kind: type) -> bool:
    """Whether a class is transformers' or torch's, with its own `forward`, and is called as they call modules."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    if not (_is_own(kind.__module__, forward) and forward.__qualname__ == f"{kind.__qualname__}.forward"):
        return False
    return all(_is_own(method.__module__, method) for method in (getattr(kind, name) for name in _CALLED))


def _computes_as_written(modeling: ModuleType, config: Any) -> bool:
    """Whether the functions that a family's modules call are its own: other kernels may have been put in their place."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, modeling.eager_attention_forward)
    functions = [value for value in vars(modeling).values() if isinstance(value, FunctionType)]
    return all(_is_own(modeling.__name__, getattr(modeling, name)) for name in _FUNCTIONS) and all(
        _is_own(function.__module__, function) for function in (attend, *functions)
    )


def _is_own(module: str, function: Any) -> bool:
    """Whether a function says that it is of this module of torch or transformers, and it and all that it wraps are."""
    if getattr(function, "__module__", None) != module:
        return False
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] not in ("torch", "transformers"):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does something else than its class: by hooks, another forward, a wrapper in its place."""
    hooks = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks
    return (
        any((*hooks, module._forward_hooks, module._forward_pre_hooks))
        or any(name in vars(module) for name in _CALLED)
        or hasattr(module, "_hf_hook")
    )


def _has_plain_weights(modules: Any) -> bool:
    """Whether all weights are dense floating-point parameters of one dtype on one device, and no subclass of a tensor."""
    weights = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    held = [weight for weight in weights if weight is not None]
    plain = all(type(weight) is nn.Parameter and weight.layout is torch.strided for weight in held)
    return plain and len({(weight.device, weight.dtype) for weight in held}) == 1 and held[0].dtype in DTYPES


def _has_one_shape(model: Any) -> bool:
    """Whether the settings that modules hold are those of the configuration, the same in all layers."""
    config, body = model.config, model.model
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, body.layers[0].self_attn.head_dim
    scaling = body.layers[0].self_attn.scaling
    norms = [body.norm]
    for i, layer in enumerate(body.layers):
        attention = layer.self_attn
        rows = [len(linear.weight) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
        settings = (attention.layer_idx, attention.head_dim, attention.scaling, attention.num_key_value_groups)
        if settings != (i, size, scaling, heads // keys) or rows != [heads * size, keys * size, keys * size]:
            return False
        of_heads = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        if any(len(norm.weight) != size for norm in of_heads):
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm, *of_heads]
    rotates_all = 2 * body.rotary_emb.inv_freq.numel() == size
    same_eps = {norm.variance_epsilon for norm in norms} == {config.rms_norm_eps}
    return rotates_all and same_eps and body.embed_tokens.max_norm is None
