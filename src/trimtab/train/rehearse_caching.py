"""A piece of the caching pass on a proposal without weights: what it takes of memory and arithmetic."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM
from transformers.cache_utils import LinearAttentionLayer

from trimtab.core.logprobs import row_from_logits
from trimtab.data.examples import Example
from trimtab.decode.prefill import CHUNK
from trimtab.decode.scoring import ROW_BUDGET
from trimtab.models.loading import attention_for
from trimtab.train.footprint import Ledger, check_rehearsable, count_flops, nbytes
from trimtab.train.rows import BATCH, Layout, compress_each

__all__ = ["Caching", "rehearse_caching", "rehearse_hidden"]


class Caching(NamedTuple):
    """What the proposal takes while its rows or its hidden states are cached, in bytes."""

    parameters: int
    weights: int
    keys_and_values: int
    """With the states of layers that keep some."""
    passing: int
    """Activations and rows of the vocabulary, at most; of the stock forward pass."""
    flops: float
    """Floating-point operations of an example."""


def rehearse_caching(
    config: Any,
    dtype: torch.dtype,
    device: torch.device,
    vocab_size: int,
    layout: Layout,
    temperature: float,
    longest: int,
    examples: Sequence[Example],
) -> Caching:
    """The pieces in which `ModelRows` takes a batch: a part of the prompts, and rows of a part of the answers.

    Args:
        config: the proposal's.
        dtype: what it is loaded in.
        device: where.
        vocab_size: V.
        layout: what is kept of a row.
        temperature: of the rows.
        longest: tokens of the longest example.
        examples: some that stand for all where operations are counted.
    """
    width = min(max(1, ROW_BUDGET // (BATCH * vocab_size)), longest)
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_for(config)).eval()
        check_rehearsable(model)
        parameters = list(model.parameters())
        with Ledger() as prefill:
            _logits(model, BATCH, min(CHUNK, longest), 1)
        with Ledger() as scoring:
            rows = row_from_logits(_logits(model, BATCH, width, width), vocab_size)
            tokens = torch.empty(BATCH, width, dtype=torch.long)
            points = [torch.empty(width, layout.samples, dtype=torch.float64)] * BATCH
            list(compress_each(rows, tokens, points, layout.top_k, temperature, ends=(0,)))
        with count_flops() as flops:
            for example in examples:
                _logits(model, 1, len(example.prompt) + len(example.chosen) - 1, len(example.chosen))
        cached = _kept(model, longest)
    passing = max(prefill.peak, scoring.peak)
    return Caching(sum(map(Tensor.numel, parameters)), nbytes(parameters), cached, passing, flops() / len(examples))


def rehearse_hidden(
    config: Any, dtype: torch.dtype, device: torch.device, tap: int, longest: int, examples: Sequence[Example]
) -> Caching:
    """The pieces in which `hidden_states` takes a batch.

    Args:
        config: the proposal's.
        dtype: what it is loaded in.
        device: where.
        tap: the layer that the pass stops before.
        longest: tokens of the longest example.
        examples: some that stand for all where operations are counted.
    """
    width = min(CHUNK, longest)
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention_for(config)).eval()
        check_rehearsable(model)
        parameters = list(model.parameters())
        below = model.get_decoder()
        below.layers = below.layers[:tap]
        with Ledger() as prefill:
            below(input_ids=torch.empty(BATCH, width, dtype=torch.long), use_cache=False)
        with count_flops() as flops:
            for example in examples:
                below(input_ids=torch.empty(1, len(example.prompt) + len(example.chosen), dtype=torch.long), use_cache=False)
        cached = _kept(below, longest)
    return Caching(sum(map(Tensor.numel, parameters)), nbytes(parameters), cached, prefill.peak, flops() / len(examples))


def _kept(model: Any, longest: int) -> int:
    """Bytes that a batch keeps: keys and values of every token, and of layers that keep states those and a copy of each."""
    output = model(input_ids=torch.empty(1, 1, dtype=torch.long), use_cache=True)
    cache = output.past_key_values if hasattr(output, "past_key_values") else output.cache_params
    attending = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    recurrent = [layer for layer in cache.layers if isinstance(layer, LinearAttentionLayer)]
    states = [state for layer in recurrent for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    of_a_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in attending)
    return int(BATCH * (longest * of_a_token + 2 * sum(state.nbytes for state in states if state is not None)))


def _logits(model: Any, batch: int, length: int, keep: int) -> Tensor:
    logits: Tensor = model(input_ids=torch.empty(batch, length, dtype=torch.long), use_cache=False, logits_to_keep=keep).logits
    return logits
