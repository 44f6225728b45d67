"""Which models the lean pass was written for: exactly transformers' own of some families (`blocks`), as they come.

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

from trimtab.models.blocks import FAMILIES, Block, products_of, sparse_layers

__all__ = ["is_stock"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_FUNCTIONS = ("apply_rotary_pos_emb", "eager_attention_forward", "repeat_kv", "rotate_half")
"""Those that every family's file has of its own."""
TRUSTED = ("torch", "transformers", "dataclasses")
"""Whose functions these files may hold."""
_CALLED = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "forward")
"""What runs when a module is called."""


def is_stock(model: Any) -> bool:
    """Whether a model is one of `FAMILIES`, all of it unchanged, with weights of one dtype on one device."""
    family = model.config.model_type
    if family not in FAMILIES:
        return False
    block = FAMILIES[family]
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = _kinds(family, sparse_layers(block, model.config))
    if modules.keys() != kinds.keys() or any(type(module) not in kinds[path] for path, module in modules.items()):
        return False
    return (
        all(map(_is_untouched, {type(module) for module in modules.values()} - {nn.ModuleList}))
        and _computes_as_written(_modeling(family), model.config)
        and not any(map(_is_changed, modules.values()))
        and _has_plain_weights(modules.values())
        and _has_one_shape(model, block)
    )


@cache
def _kinds(family: str, sparse: tuple[bool, ...]) -> dict[str, tuple[type, ...]]:
    """The classes that each module may be of, by its path; of layers which have experts or have none."""
    from transformers.activations import ACT2CLS

    block, modeling = FAMILIES[family], _modeling(family)
    places: dict[str, Any] = {
        "": "ForCausalLM",
        "model": block.body,
        "model.embed_tokens": block.embedding or nn.Embedding,
        "model.layers": nn.ModuleList,
        "model.norm": "RMSNorm",
        "model.rotary_emb": "RotaryEmbedding",
        "lm_head": nn.Linear,
    }
    for i, has_experts in enumerate(sparse):
        places |= {f"model.layers.{i}{path}": kind for path, kind in _layer(block, has_experts=has_experts).items()}
    acts = ACT2CLS[block.activation]
    known: dict[Any, tuple[type, ...]] = {"ACT": (nn.SiLU, acts) if block.activation == "silu" else (acts,)}
    for kind in set(places.values()) - known.keys():
        known[kind] = (getattr(modeling, block.classes + kind, type(None)) if isinstance(kind, str) else kind,)
    return {path: known[kind] for path, kind in places.items()}


def _layer(block: Block, *, has_experts: bool) -> dict[str, Any]:
    """What a layer's modules are, by their paths: a class, the end of its name, or `"ACT"` for the activation."""
    places: dict[str, Any] = {"": "DecoderLayer", ".self_attn": "Attention"}
    places |= {f".{path}": nn.Linear for paths in products_of(block, sparse=has_experts) for path in paths}
    places |= {f".self_attn.{name}_norm": "RMSNorm" for name in "qk" if block.head_norms}
    places |= {f".{name}": "RMSNorm" for name in block.norms if name is not None}
    places |= {f".{name}": nn.Dropout for name in block.dropouts}
    if has_experts:
        mixture = {"": "SparseMoeBlock", ".gate": "TopKRouter", ".experts": "Experts", ".experts.act_fn": "ACT"}
        return places | {f".mlp{path}": kind for path, kind in mixture.items()}
    activation = "activation_fn" if block.fused else "act_fn"
    return places | {".mlp": "MLP", f".mlp.{activation}": "ACT"}


def _modeling(family: str) -> ModuleType:
    package = FAMILIES[family].package or family
    return importlib.import_module(f"transformers.models.{package}.modeling_{package}")


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
    """Whether a function says that it is of this module, and it and all that it wraps are of `TRUSTED` ones."""
    if getattr(function, "__module__", None) != module:
        return False
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] not in TRUSTED:
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
    named = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
    held = [weight for weight in named if weight is not None]
    held += [weight for module in modules for weight in module.parameters(recurse=False)]
    plain = all(type(weight) is nn.Parameter and weight.layout is torch.strided for weight in held)
    return plain and len({(weight.device, weight.dtype) for weight in held}) == 1 and held[0].dtype in DTYPES


def _has_one_shape(model: Any, block: Block) -> bool:
    """Whether the settings that modules hold are those of the configuration, the same in all layers."""
    config, body = model.config, model.model
    heads, keys, size = config.num_attention_heads, config.num_key_value_heads, body.layers[0].self_attn.head_dim
    scaling, cap = body.layers[0].self_attn.scaling, getattr(config, "attn_logit_softcapping", None)
    if block.caps_scores and cap is not None and config._attn_implementation == "sdpa":  # transformers before 5.21 allow it
        return False
    norms = [body.norm]
    for i, layer in enumerate(body.layers):
        attention = layer.self_attn
        linears = [attention.qkv_proj] if block.fused else [attention.q_proj, attention.k_proj, attention.v_proj]
        wanted = [(heads + 2 * keys) * size] if block.fused else [heads * size, keys * size, keys * size]
        settings = (attention.layer_idx, attention.head_dim, attention.scaling, attention.num_key_value_groups)
        if settings != (i, size, scaling, heads // keys) or [len(linear.weight) for linear in linears] != wanted:
            return False
        if getattr(attention, "attn_logit_softcapping", cap) != cap:
            return False
        of_heads = [attention.q_norm, attention.k_norm] if block.head_norms else []
        widths = [heads * size, keys * size] if block.head_norms == "all" else [size, size]
        if any(len(norm.weight) != width for norm, width in zip(of_heads, widths, strict=False)):
            return False
        norms += [*(getattr(layer, name) for name in block.norms if name is not None), *of_heads]
    same_eps = {getattr(norm, "eps" if block.shifted else "variance_epsilon") for norm in norms} == {config.rms_norm_eps}
    frequencies = [buffer for name, buffer in body.rotary_emb.named_buffers() if name.endswith("inv_freq")]
    rotated = {2 * buffer.numel() for buffer in frequencies}
    rotates_all = rotated == {size} or (block.rotates_part and max(rotated) <= size)
    return rotates_all and same_eps and body.embed_tokens.max_norm is None
