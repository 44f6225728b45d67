"""A trial of models whose family no test of ours has proved: does the model itself decode over ragged slots?

A few random sequences go through it alone, without our cache and mask, and that is what is right. Then they are read at once,
token by token, side by side at different paces, and after a rollback. Windows and chunks are narrowed for the trial, or short
sequences would not reach them. What a difference counts for is measured, too: by how much rows change where the same last
tokens follow another past. A cache or a mask that is not heeded changes them as much; rounding does not. In 16 bits rounding
hides a good deal, so a copy in float32 is tried where it is not too large.

What begins beyond `LENGTH` tokens, other than a window or a chunk, is not seen.
"""

import contextlib
import copy
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import UnsupportedModel
from trimtab.models.base import LanguageModel, State
from trimtab.reasons import reason_of

__all__ = ["WAY_OUT", "narrowed", "try_out"]

logger = logging.getLogger(__name__)

LENGTH, SAME, NARROW = 14, 3, 5
"""Tokens of a sequence, how many last ones follow different pasts, and the window."""
SEQUENCES = 4
PACES = [[6, 1, 0, 5], [2, 7, 8, 0], [3, 1, 1, 4], [1, 5, 2, 5]]
"""How many tokens each sequence takes, step by step."""
FORGOTTEN = [3, 9, 0, 5]
SHARE = {2: 0.5, 4: 0.01, 8: 0.01}
"""Of what another past changes, what a row may be off by, by the bytes of a weight."""
LEAST = {2: 0.02, 4: 1e-5, 8: 1e-5}
"""What a row may be off by however little the past changes: rounding."""
COPIED = 2**33
"""Bytes that a copy in float32 may take."""

WAY_OUT = (
    "a vLLM server may run it: `trimtab serve --engine vllm`, or `trimtab train --proposal_endpoint` and `trimtab propose"
    " --endpoint`"
)


def try_out(model: Any) -> None:
    """Try a `HuggingFaceLM` that runs the stock module.

    Raises:
        UnsupportedModel: it gives other rows than alone, or cannot run; the message says when.
    """
    stock, started = model.model, time.monotonic()
    kind = stock.config.model_type
    try:
        model.model = _exact(stock)
        found = _first_failure(model, model.model)
        if found is not None and model.is_recurrent:
            model.tokenwise = True
            found = _first_failure(model, model.model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a module that was made for something else raises
        raise UnsupportedModel(f"a '{kind}' model does not run over ragged slots ({reason_of(error)}); {WAY_OUT}") from error
    finally:
        model.model = stock
    if found is not None:
        raise UnsupportedModel(f"a '{kind}' model is not decoded rightly: its rows are others {found}; {WAY_OUT}")
    logger.warning(
        "no test of ours knows '%s' models; this one was tried for %.1f s, gives the rows that it gives alone, and runs as its"
        " stock modules", kind, time.monotonic() - started,
    )  # fmt: skip


def _exact(stock: Any) -> Any:
    """A copy in float32 of a model of 16 bits, if that can be had; else the model."""
    parameters = list(stock.parameters())
    narrow = all(parameter.is_floating_point() for parameter in parameters) and stock.dtype.itemsize == 2
    if not narrow or 4 * sum(map(torch.Tensor.numel, parameters)) > COPIED:
        return stock
    return copy.deepcopy(stock).float()


@contextlib.contextmanager
def narrowed(config: Any) -> Iterator[None]:
    """A configuration whose windows and chunks, if it has any, are `NARROW`."""
    before = {name: size for name in ("sliding_window", "attention_chunk_size") if (size := getattr(config, name, None))}
    try:
        for name, size in before.items():
            setattr(config, name, min(size, NARROW))
        yield
    finally:
        for name, size in before.items():
            setattr(config, name, size)


@torch.no_grad()
def _first_failure(model: Any, stock: Any) -> str | None:
    """When rows are not what they are alone; None where they always are."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=random)
    others = torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=random)
    others[:, -SAME:] = ids[:, -SAME:]
    right = torch.cat([_alone(model, stock, one[None]) for one in ids])
    apart = right[:, -SAME:] - torch.cat([_alone(model, stock, one[None]) for one in others])[:, -SAME:]
    size = stock.dtype.itemsize
    most = max(SHARE[size] * float(apart.pow(2).mean().sqrt()), LEAST[size])

    def fails(rows: Tensor, expected: Tensor) -> bool:
        return not float((rows - expected).pow(2).mean(-1).sqrt().max()) <= most

    state = model.new_state(1, LENGTH)
    if fails(model.extend(state, ids[:1], [LENGTH]), right[:1]):
        return "with our cache and mask"
    state = model.new_state(1, LENGTH)
    steps = [model.extend(state, ids[:1, t : t + 1], [1]) for t in range(LENGTH)]
    if fails(torch.cat(steps, 1), right[:1]):
        return "when it reads token by token"
    state = model.new_state(SEQUENCES, LENGTH + 1)
    for slot, rows in enumerate(_read(model, state, ids)):
        if fails(rows, right[slot, : len(rows)]):
            return "when sequences of different lengths share a batch"
    left = [length - count for length, count in zip(state.lengths, FORGOTTEN, strict=True)]
    model.rollback(state, FORGOTTEN)
    rows = model.extend(state, others[:, :1], [1] * SEQUENCES)
    for slot, count in enumerate(left):
        again = torch.cat([ids[slot, :count], others[slot, :1]])[None]
        if fails(rows[slot, -1], _alone(model, stock, again)[0, -1]):
            return "after a rollback"
    return None


def _alone(model: LanguageModel, stock: Any, ids: Tensor) -> Tensor:
    """Rows `[1, T, V]` of one sequence by the stock model, without a cache."""
    logits = stock(input_ids=ids.to(model.device), use_cache=False).logits
    return row_from_logits(logits, model.vocab_size)


def _read(model: LanguageModel, state: State, ids: Tensor) -> list[Tensor]:
    """Rows of sequences that are read at their own paces."""
    got: list[list[Tensor]] = [[] for _ in ids]
    for counts in PACES:
        step = torch.zeros(len(ids), max(counts), dtype=torch.long)
        for slot, count in enumerate(counts):
            step[slot, :count] = ids[slot, state.lengths[slot] : state.lengths[slot] + count]
        rows = model.extend(state, step, counts)
        for slot, count in enumerate(counts):
            got[slot].append(rows[slot, :count])
    return [torch.cat(rows) for rows in got]
