"""How the families of the lean pass build a layer: everything in which one differs from another.

A family is a line of `FAMILIES`. What a line cannot say, a family must not differ in: `trimtab.models.stock` looks whether a
model is built exactly so, module by module, and `trimtab.models.lean` computes it.
"""

from typing import Any, NamedTuple

__all__ = ["FAMILIES", "LEAN", "Block", "Norms", "products_of", "projections_of", "sparse_layers"]


class Norms(NamedTuple):
    """What stands for each of a layer's norms, its name or its weight; None where there is none."""

    attention: Any = None
    """Of what attention reads."""
    attention_out: Any = None
    """Of what it adds."""
    mlp: Any = None
    mlp_out: Any = None


BEFORE = Norms(attention="input_layernorm", mlp="post_attention_layernorm")
BEHIND = Norms(attention_out="post_attention_layernorm", mlp_out="post_feedforward_layernorm")
AROUND = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Block(NamedTuple):
    """One family.

    Attributes:
        classes: how the names of its classes begin.
        package: where transformers has them, if its name is not the family's.
        body: how that of the body goes on.
        embedding: how that of the embedding goes on, if it multiplies by its `embed_scale`; None for torch's own.
        norms: of a layer.
        shifted: whether a norm multiplies by 1 + its weight.
        head_norms: whether queries and keys are normalised: `"each"` head by itself, `"all"` together, or None.
        rotates_by_kind: whether the rotation goes by the kind of layer.
        rotates_part: whether it may leave the last numbers of a head as they are.
        caps_scores: whether attention caps its scores, at `attn_logit_softcapping`.
        caps_logits: whether logits are capped, at `final_logit_softcapping`.
        activation: its name, as configurations have it.
        fused: whether query, key and value projections are one module, and gate and up.
        experts: whether the MLPs of some layers are mixtures of experts; those run as they are.
        dropouts: modules of a layer that do nothing here.
    """

    classes: str
    package: str | None = None
    body: str = "Model"
    embedding: str | None = None
    norms: Norms = BEFORE
    shifted: bool = False
    head_norms: str | None = None
    rotates_by_kind: bool = False
    rotates_part: bool = False
    caps_scores: bool = False
    caps_logits: bool = False
    activation: str = "silu"
    fused: bool = False
    experts: bool = False
    dropouts: tuple[str, ...] = ()


FAMILIES = {
    "gemma": Block("Gemma", embedding="TextScaledWordEmbedding", shifted=True, activation="gelu_pytorch_tanh"),
    "gemma2": Block(
        "Gemma2",
        embedding="TextScaledWordEmbedding",
        norms=AROUND,
        shifted=True,
        caps_scores=True,
        caps_logits=True,
        activation="gelu_pytorch_tanh",
    ),
    "gemma3_text": Block(
        "Gemma3",
        package="gemma3",
        body="TextModel",
        embedding="TextScaledWordEmbedding",
        norms=AROUND,
        shifted=True,
        head_norms="each",
        rotates_by_kind=True,
        caps_logits=True,
        activation="gelu_pytorch_tanh",
    ),
    "llama": Block("Llama"),
    "ministral": Block("Ministral"),
    "mistral": Block("Mistral"),
    "olmo2": Block("Olmo2", norms=BEHIND, head_norms="all"),
    "olmo3": Block("Olmo3", norms=BEHIND, head_norms="all", rotates_by_kind=True),
    "phi3": Block("Phi3", rotates_part=True, fused=True, dropouts=("resid_attn_dropout", "resid_mlp_dropout")),
    "qwen2": Block("Qwen2"),
    "qwen3": Block("Qwen3", head_norms="each"),
    "qwen3_moe": Block("Qwen3Moe", head_norms="each", experts=True),
    "smollm3": Block("SmolLM3"),
}
"""By `model_type`."""

LEAN = tuple(FAMILIES)
"""`model_type` of the models that have a lean pass."""


def products_of(block: Block, *, sparse: bool) -> tuple[tuple[str, ...], ...]:
    """The paths of the linear layers of each of a layer's four products, in their order; none where experts stand for them."""
    qkv = ("self_attn.qkv_proj",) if block.fused else tuple(f"self_attn.{name}_proj" for name in "qkv")
    gate_up = ("mlp.gate_up_proj",) if block.fused else ("mlp.gate_proj", "mlp.up_proj")
    inner: tuple[tuple[str, ...], ...] = ((), ()) if sparse else (gate_up, ("mlp.down_proj",))
    return qkv, ("self_attn.o_proj",), *inner


def projections_of(config: Any) -> list[str]:
    """The names of the linear layers that adapters of such a model may adapt."""
    block = FAMILIES[config.model_type]
    products = [products_of(block, sparse=sparse) for sparse in sorted(set(sparse_layers(block, config)))]
    return list(dict.fromkeys(path.rpartition(".")[2] for one in products for paths in one for path in paths))


def sparse_layers(block: Block, config: Any) -> tuple[bool, ...]:
    """Which layers have experts, as a family's modules read the configuration."""
    count = int(config.num_hidden_layers)
    if not block.experts or config.num_experts <= 0:
        return (False,) * count
    every, never = int(config.decoder_sparse_step), set(config.mlp_only_layers)
    return tuple(i not in never and (i + 1) % every == 0 for i in range(count))
