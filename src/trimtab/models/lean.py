"""A lean forward pass for Llama-like decoders: the stock module's weights, without its machinery.

Small models spend most of a step in Python and in dozens of small operators; this pass has far fewer. It covers Llama, Mistral,
Qwen2 and Qwen3 exactly as transformers has them (`trimtab.models.stock`); the stock module serves the rest, and is the
reference that this one is tested against.

Query, key and value projections become one matrix, and so do gate and up. The stock module's parameters are then views of
those, so no weight is held twice and the stock module goes on working.

Each product may add a `Delta`, a pair of narrow matrices for each group of slots: `trimtab.models.adapters` makes them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.errors import UnsupportedModel
from trimtab.models.base import last_of
from trimtab.models.masks import Sight, layer_sights
from trimtab.models.prepack import Linear
from trimtab.models.slots import SlotLayer, Step
from trimtab.models.stock import FAMILIES, is_stock

__all__ = ["LEAN", "Delta", "Deltas", "LeanDecoder", "no_lean_pass"]

LEAN = tuple(FAMILIES)
"""`model_type` of the models that have a lean pass."""

Delta = tuple[Tensor, Tensor]
"""What is added to a product of rows `[B·K, in]`: `[in, r]` and `[r, out]` by all slots, or `[G, r, in]` and `[G, r, out]` by G
groups of as many slots each."""
Deltas = Sequence[Sequence[Delta | None]]
"""For each layer those of its four products, in the order of `_Layer`."""


_NO_DELTAS: Sequence[Delta | None] = (None, None, None, None)


class _Layer(NamedTuple):
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    attention_norm: Tensor
    mlp_norm: Tensor
    query_key_norm: tuple[Tensor, Tensor] | None
    """Weights `[D]`, where queries and keys are normalised head by head (Qwen3)."""


def no_lean_pass(kind: str) -> UnsupportedModel:
    """What is wrong with a proposal of a head whose layers cannot be run one by one."""
    return UnsupportedModel(
        f"a head runs layers of plain {', '.join(LEAN)} models, and this '{kind}' model is run by its stock modules"
    )


class LeanDecoder:
    """The forward pass of a stock causal language model.

    Args:
        model: one that `is_stock` says yes to.
    """

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        first = body.layers[0].self_attn
        self._head_dim, self._scaling = int(first.head_dim), float(first.scaling)
        self._heads, self._key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        self._embedding: Tensor = body.embed_tokens.weight
        self._norm: Tensor = body.norm.weight
        self._head = Linear.of(model.lm_head)
        self._layers = [self._read_layer(layer) for layer in body.layers]
        self._sights = layer_sights(config)
        self._unfused = _unfused(model)
        self._rotary = body.rotary_emb
        self._cos = self._sin = self._embedding.new_empty(0, self._head_dim)

    def is_current(self, model: Any) -> bool:
        """Whether a model that others use too still has the weights, and nothing but the weights, that are used here."""
        if not is_stock(model) or not all(linear.is_current for linear in self.linears):
            return False
        return all(one is other for one, other in zip(self._unfused, _unfused(model), strict=True))

    @property
    def linears(self) -> list[Linear]:
        """Every matrix product of a pass."""
        return [linear for layer in self._layers for linear in layer[:4]] + [self._head]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """The rotations' cosines and signed sines, as far as they were needed."""
        return self._cos, self._sin

    def __call__(
        self,
        tokens: Tensor,
        step: Step,
        cache: Sequence[SlotLayer],
        *,
        last: Sequence[int] | None = None,
        deltas: Deltas | None = None,
        tapped: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Logits `[B, K, W]` of tokens `[B, K]`, or `[B, 1, W]` of each slot's last of so many; `tapped` is as in `upper`."""
        hidden = self.upper(self.embed(tokens), step, cache, deltas, tapped=tapped)
        return self.logits(hidden if last is None else last_of(hidden, last))

    def lower(self, tokens: Tensor, step: Step, cache: Sequence[SlotLayer], tapped: dict[int, Tensor]) -> None:
        """Run tokens `[B, K]` through the layers below the highest of `tapped`, and no further; it is as in `upper`."""
        stop = max(tapped)
        self.upper(self.embed(tokens), step, cache[:stop], stop=stop, tapped=tapped)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[B, K, W]` of hidden states `[B, K, H]`."""
        normed = F.rms_norm(hidden.flatten(0, 1), (hidden.shape[-1],), self._norm, self._eps)
        return self._head(normed).view(*hidden.shape[:2], -1)

    def embed(self, tokens: Tensor) -> Tensor:
        """The first layer's input `[B, K, H]` of tokens `[B, K]`."""
        return F.embedding(tokens, self._embedding)

    def upper(
        self,
        hidden: Tensor,
        step: Step,
        cache: Sequence[SlotLayer],
        deltas: Deltas | None = None,
        *,
        first: int = 0,
        stop: int | None = None,
        tapped: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states `[B, K, H]` behind the last layer, or before layer `stop`.

        Args:
            hidden: the input `[B, K, H]` of layer `first`.
            step: where the tokens go.
            cache: keys and values of these layers.
            deltas: what is added to these layers' products.
            first: the layer to begin with, counted from 0.
            stop: the layer to end before; None runs all.
            tapped: by their numbers, the layers whose inputs `[B, K, H]` are wanted; they are put there.
        """
        batch, width = hidden.shape[:2]
        heads, keys, group = self._heads, self._heads + self._key_heads, self._heads // self._key_heads
        cos, sin = self._rotations(step)
        x = hidden.flatten(0, 1)  # [B·K, H]: products of matrices, not of batches of them
        masks = {sight: self._mask(sight, step, x.dtype, group) for sight in set(self._sights[first:stop])}
        size = (x.shape[-1],)
        for i, (layer, sight, slots) in enumerate(zip(self._layers[first:stop], self._sights[first:stop], cache, strict=True)):
            if tapped is not None and first + i in tapped:
                tapped[first + i] = x.view(batch, width, -1)
            to_qkv, to_out, to_gate_up, to_down = deltas[i] if deltas is not None else _NO_DELTAS
            qkv = _product(layer.qkv, F.rms_norm(x, size, layer.attention_norm, self._eps), to_qkv)
            qkv = qkv.view(batch, width, -1, self._head_dim)
            qk, v = qkv[:, :, :keys], qkv[:, :, keys:]
            if layer.query_key_norm is not None:
                query_norm, key_norm = layer.query_key_norm
                each = torch.cat([query_norm.expand(heads, -1), key_norm.expand(self._key_heads, -1)])
                qk = F.rms_norm(qk, (self._head_dim,), None, self._eps) * each
            qk = torch.addcmul(qk * cos, qk.roll(self._head_dim // 2, -1), sin)
            past_keys, past_values = slots.update(qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2))
            queries = _fold(qk[:, :, :heads], group)
            mixed = F.scaled_dot_product_attention(queries, past_keys, past_values, attn_mask=masks[sight], scale=self._scaling)
            x = x + _product(layer.out, _unfold(mixed, group).reshape(batch * width, -1), to_out)
            gate_up = _product(layer.gate_up, F.rms_norm(x, size, layer.mlp_norm, self._eps), to_gate_up)
            gate, up = gate_up.chunk(2, -1)
            x = x + _product(layer.down, F.silu(gate) * up, to_down)
        x = x.view(batch, width, -1)
        if tapped is not None and stop is not None and stop in tapped:
            tapped[stop] = x
        return x

    def _mask(self, sight: Sight, step: Step, dtype: torch.dtype, group: int) -> Tensor | None:
        """What is added to the scores of folded queries; None where all see everything."""
        unmasked = step.unmasked and sight.sees_all(step.used)
        return None if unmasked else _repeat(step.additive_mask(dtype, sight), group)

    @property
    def depth(self) -> int:
        """How many layers it has."""
        return len(self._layers)

    def _read_layer(self, layer: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norm = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
        return _Layer(
            qkv=Linear.of(attention.q_proj, attention.k_proj, attention.v_proj),
            out=Linear.of(attention.o_proj),
            gate_up=Linear.of(mlp.gate_proj, mlp.up_proj),
            down=Linear.of(mlp.down_proj),
            attention_norm=layer.input_layernorm.weight,
            mlp_norm=layer.post_attention_layernorm.weight,
            query_key_norm=norm,
        )

    def _rotations(self, step: Step) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines `[B, K, 1, D]`: a rotated x is x·cos + roll(x, D/2)·sin."""
        if len(self._cos) < step.reach:
            positions = torch.arange(max(step.reach, 2 * len(self._cos)), device=self._embedding.device)
            cos, sin = (table[0] for table in self._rotary(self._embedding, positions[None]))
            half = self._head_dim // 2
            self._cos, self._sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)
        if step.start is not None:
            return self._cos[None, step.start : step.used, None], self._sin[None, step.start : step.used, None]
        return F.embedding(step.position_ids, self._cos).unsqueeze(2), F.embedding(step.position_ids, self._sin).unsqueeze(2)


def _unfused(model: Any) -> list[Tensor]:
    """The parameters that no product reads: those of norms, and the embedding."""
    return [parameter for name, parameter in model.named_parameters() if "norm" in name or "embed" in name]


def _fold(queries: Tensor, group: int) -> Tensor:
    """Queries `[B, K, H, D]` to `[B, H/group, K·group, D]`: heads that share a key become so many queries of one head.

    Attention reads each key once so. With `enable_gqa` it takes up to eleven times as long on a CPU, and on a GPU the kernels
    that take a mask do not know it.
    """
    if group == 1:
        return queries.transpose(1, 2)
    batch, width, _, head_dim = queries.shape
    return queries.reshape(batch, width, -1, group, head_dim).transpose(1, 2).flatten(2, 3)


def _unfold(mixed: Tensor, group: int) -> Tensor:
    """What comes of them to `[B, K, …]`, the heads in their order."""
    if group == 1:
        return mixed.transpose(1, 2)
    batch, keys, _, head_dim = mixed.shape
    return mixed.reshape(batch, keys, -1, group, head_dim).transpose(1, 2)


def _repeat(mask: Tensor, group: int) -> Tensor:
    """The mask `[B, 1, K, …]` of folded queries."""
    if group == 1:
        return mask
    return mask.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


def _product(linear: Linear, x: Tensor, delta: Delta | None) -> Tensor:
    """Rows `[B·K, in]` to `[B·K, out]`."""
    product = linear(x)
    if delta is not None:
        down, up = delta
        if down.ndim == 2:
            return product.addmm_(torch.mm(x, down), up)
        rows = x.view(len(down), -1, x.shape[-1])
        # On a CPU each is the faster way round for its dtype: with the first, oneDNN would copy bfloat16 weights every time.
        narrow = torch.bmm(rows, down.mT) if x.dtype == torch.float32 else torch.bmm(down, rows.mT).mT
        product.view(len(up), -1, up.shape[-1]).baddbmm_(narrow, up)
    return product
