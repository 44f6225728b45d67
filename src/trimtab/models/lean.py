"""A lean forward pass for Llama-like decoders: the stock module's weights, without its machinery.

Small models spend most of a step in Python and in dozens of small operators; this pass has far fewer. It covers the families of
`trimtab.models.blocks` exactly as transformers has them (`trimtab.models.stock`); the stock module serves the rest, and is the
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
from trimtab.models.blocks import FAMILIES, LEAN, Norms, products_of
from trimtab.models.masks import Sight, layer_sights
from trimtab.models.prepack import Linear
from trimtab.models.slots import SlotLayer, Step

__all__ = ["Delta", "Deltas", "LeanDecoder", "no_lean_pass"]

Delta = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""What is added to a product of rows `[B·K, in]`: `[in, r]` and `[r, out]` by all slots, or `[G, r, in]` and `[G, r, out]` by G
groups of as many slots each. Behind the first kind may stand `[B, r]`: how much of each of the r every slot takes."""
Deltas = Sequence[Sequence[Delta | None]]
"""For each layer those of its four products, in the order of `_Layer`."""


_NO_DELTAS: Sequence[Delta | None] = (None, None, None, None)


class _Layer(NamedTuple):
    qkv: Linear
    out: Linear
    gate_up: Linear | None
    """None where experts take their place."""
    down: Linear | None
    experts: Any
    """The stock module of a mixture, which runs as it is; None for a plain MLP."""
    norms: Norms
    """Their weights `[H]`."""
    query_key_norm: tuple[Tensor, Tensor] | None
    """Weights `[D]`, or `[heads·D]`, where queries and keys are normalised."""
    rotation: str | None
    """Which of the rotations it takes; None for none."""


class _Rotation(NamedTuple):
    """A rotated x is x·cos + roll(x, R/2)·sin, of the first R numbers of a head."""

    cos: Tensor
    """`[…, R]`"""
    sin: Tensor
    """`[…, R]`, the first half negative."""

    def at(self, step: Step) -> "_Rotation":
        """Those `[B, K, 1, R]` of the tokens of a step."""
        if step.start is not None:
            return _Rotation(*(table[None, step.start : step.used, None] for table in self))
        return _Rotation(*(F.embedding(step.position_ids, table).unsqueeze(2) for table in self))

    def __call__(self, x: Tensor) -> Tensor:
        """Heads `[B, K, heads, D]`, rotated."""
        width = self.cos.shape[-1]
        if width == x.shape[-1] and x.dtype == self.cos.dtype:  # nearly always, and a view costs time, too
            return torch.addcmul(x * self.cos, x.roll(width // 2, -1), self.sin)
        part = x[..., :width].to(max(x.dtype, self.cos.dtype, key=lambda dtype: dtype.itemsize))
        rotated = torch.addcmul(part * self.cos, part.roll(width // 2, -1), self.sin).to(x.dtype)
        return rotated if width == x.shape[-1] else torch.cat([rotated, x[..., width:]], -1)


def no_lean_pass(kind: str) -> UnsupportedModel:
    """What is wrong with a proposal of a head whose layers cannot be run one by one."""
    return UnsupportedModel(
        f"a head runs layers of plain {', '.join(LEAN)} models, and this '{kind}' model is run by its stock modules; a small"
        " model of its vocabulary can align it"
    )


class LeanDecoder:
    """The forward pass of a stock causal language model.

    Args:
        model: one that `is_stock` says yes to.
    """

    def __init__(self, model: Any) -> None:
        body, config = model.model, model.config
        first = body.layers[0].self_attn
        self._block, self._config = FAMILIES[config.model_type], config
        self._shifted, self._silu = self._block.shifted, self._block.activation == "silu"
        self._head_dim, self._scaling = int(first.head_dim), float(first.scaling)
        self._heads, self._key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._eps = float(config.rms_norm_eps)
        self._softcap: float | None = getattr(first, "attn_logit_softcapping", None) if self._block.caps_scores else None
        self._final_softcap: float | None = config.final_logit_softcapping if self._block.caps_logits else None
        self._embedding: Tensor = body.embed_tokens.weight
        self._embed_scale: Tensor | None = getattr(body.embed_tokens, "embed_scale", None)
        self._norm: Tensor = body.norm.weight
        self._head = Linear.of(model.lm_head)
        self._layers = [self._read_layer(layer, i) for i, layer in enumerate(body.layers)]
        self._sights = layer_sights(config)
        self._rotary = body.rotary_emb
        empty = self._embedding.new_empty(0, self._head_dim)
        self._rotations = {layer.rotation: _Rotation(empty, empty) for layer in self._layers if layer.rotation is not None}

    @property
    def linears(self) -> list[Linear]:
        """Every matrix product of a pass."""
        return [linear for layer in self._layers for linear in layer[:4] if linear is not None] + [self._head]

    @property
    def tables(self) -> list[Tensor]:
        """The rotations' cosines and signed sines, as far as they were needed."""
        return [table for rotation in self._rotations.values() for table in rotation]

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
        logits = self._head(self._normalise(hidden.flatten(0, 1), self._norm)).view(*hidden.shape[:2], -1)
        return logits if self._final_softcap is None else (logits / self._final_softcap).tanh() * self._final_softcap

    def embed(self, tokens: Tensor) -> Tensor:
        """The first layer's input `[B, K, H]` of tokens `[B, K]`."""
        embedded = F.embedding(tokens, self._embedding)
        return embedded if self._embed_scale is None else embedded * self._embed_scale.to(embedded.dtype)

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
        layers, sights = self._layers[first:stop], self._sights[first:stop]
        rotations = {kind: self._rotate(kind, step) for kind in {layer.rotation for layer in layers} if kind is not None}
        x = hidden.flatten(0, 1)  # [B·K, H]: products of matrices, not of batches of them
        masks = {sight: self._mask(sight, step, x.dtype, group) for sight in set(sights)}
        for i, (layer, sight, slots) in enumerate(zip(layers, sights, cache, strict=True)):
            if tapped is not None and first + i in tapped:
                tapped[first + i] = x.view(batch, width, -1)
            to_qkv, to_out, to_gate_up, to_down = deltas[i] if deltas is not None else _NO_DELTAS
            norms = layer.norms
            qkv = _product(layer.qkv, x if norms.attention is None else self._normalise(x, norms.attention), to_qkv)
            qkv = qkv.view(batch, width, -1, self._head_dim)
            qk, v = qkv[:, :, :keys], qkv[:, :, keys:]
            if layer.query_key_norm is not None:
                qk = self._normalise_heads(qk, *layer.query_key_norm)
            if layer.rotation is not None:
                qk = rotations[layer.rotation](qk)
            past_keys, past_values = slots.update(qk[:, :, heads:].transpose(1, 2), v.transpose(1, 2))
            mixed = self._attend(_fold(qk[:, :, :heads], group), past_keys, past_values, masks[sight])
            mixed = _product(layer.out, _unfold(mixed, group).reshape(batch * width, -1), to_out)
            x = x + (mixed if norms.attention_out is None else self._normalise(mixed, norms.attention_out))
            rows = x if norms.mlp is None else self._normalise(x, norms.mlp)
            if layer.gate_up is None or layer.down is None:
                rows = layer.experts(rows.view(batch, width, -1)).flatten(0, 1)
            else:
                gate, up = _product(layer.gate_up, rows, to_gate_up).chunk(2, -1)
                rows = _product(layer.down, self._activate(gate) * up, to_down)
            x = x + (rows if norms.mlp_out is None else self._normalise(rows, norms.mlp_out))
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

    def _read_layer(self, layer: Any, place: int) -> _Layer:
        attention, mlp, block = layer.self_attn, layer.mlp, self._block
        experts = mlp if hasattr(mlp, "experts") else None
        kind = self._config.layer_types[place] if block.rotates_by_kind else ""
        linears = [[layer.get_submodule(path) for path in paths] for paths in products_of(block, sparse=experts is not None)]
        qkv, out, gate_up, down = (Linear.of(*modules) if modules else None for modules in linears)
        assert qkv is not None
        assert out is not None
        norms = [None if name is None else getattr(layer, name).weight for name in block.norms]
        of_heads = (attention.q_norm.weight, attention.k_norm.weight) if block.head_norms else None
        rotation = kind if getattr(attention, "use_rope", True) else None
        return _Layer(qkv, out, gate_up, down, experts, Norms(*norms), of_heads, rotation)

    def _normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Rows `[…, H]` by a norm of these weights."""
        if not self._shifted:
            return F.rms_norm(x, (x.shape[-1],), weight, self._eps)
        return F.rms_norm(x.float(), (x.shape[-1],), 1.0 + weight.float(), self._eps).to(x.dtype)

    def _normalise_heads(self, qk: Tensor, query_norm: Tensor, key_norm: Tensor) -> Tensor:
        """Queries and keys `[B, K, heads, D]` by norms of these weights."""
        heads, size = self._heads, (self._head_dim,)
        if self._block.head_norms == "all":
            parts = (qk[:, :, :heads].flatten(2), query_norm), (qk[:, :, heads:].flatten(2), key_norm)
            return torch.cat([self._normalise(part, weight) for part, weight in parts], -1).view(qk.shape)
        each = torch.cat([query_norm.expand(heads, -1), key_norm.expand(self._key_heads, -1)])
        if not self._shifted:
            return F.rms_norm(qk, size, None, self._eps) * each
        return (F.rms_norm(qk.float(), size, None, self._eps) * (1.0 + each.float())).to(qk.dtype)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What folded queries `[B, H, Q, D]` get from keys and values `[B, H, L, D]`."""
        if self._softcap is None:
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self._scaling)
        scores = (queries @ keys.mT * (self._scaling / self._softcap)).tanh() * self._softcap
        scores = scores if mask is None else scores + mask
        return scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values

    def _activate(self, gate: Tensor) -> Tensor:
        return F.silu(gate) if self._silu else F.gelu(gate, approximate="tanh")

    def _rotate(self, kind: str, step: Step) -> _Rotation:
        """A rotation of the tokens of a step."""
        if len(self._rotations[kind].cos) < step.reach:
            positions = torch.arange(max(step.reach, 2 * len(self._rotations[kind].cos)), device=self._embedding.device)
            args = (self._embedding, positions[None], *([kind] if kind else []))
            cos, sin = (table[0] for table in self._rotary(*args))
            half = cos.shape[-1] // 2
            self._rotations[kind] = _Rotation(cos, torch.cat([-sin[:, :half], sin[:, half:]], -1))
        return self._rotations[kind].at(step)


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
        down, up, *shares = delta
        if down.ndim == 2:
            narrow = torch.mm(x, down)
            for share in shares:
                taken = narrow.view(len(share), -1, share.shape[1]).mul_(share[:, None])
                if x.dtype == torch.float16:  # what overflows there is no slot's business that takes nothing of it
                    taken.masked_fill_((share == 0)[:, None], 0)
            return product.addmm_(narrow, up)
        rows = x.view(len(down), -1, x.shape[-1])
        # On a CPU each is the faster way round for its dtype: with the first, oneDNN would copy bfloat16 weights every time.
        narrow = torch.bmm(rows, down.mT) if x.dtype == torch.float32 else torch.bmm(down, rows.mT).mT
        product.view(len(up), -1, up.shape[-1]).baddbmm_(narrow, up)
    return product
