"""A trial of models whose family no test of ours has proved: does the model itself decode over ragged slots?

A few random sequences go through it alone, without our cache and mask, and that is what is right. Then they are read at once,
token by token, side by side at different paces, and after a rollback. Windows and chunks are narrowed for the trial, or short
sequences would not reach them. What a difference counts for is measured, too: by how much rows change where the same last
tokens follow another past. A cache or a mask that is not heeded changes them as much; rounding does not.

A family that passes is remembered in the user's cache, by its configuration and the versions of torch and transformers.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import UnsupportedModel
from trimtab.files import cache_folder, write_json
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
SHARE = {2: 0.5, 4: 0.02, 8: 0.02}
"""Of what another past changes, what a difference may be, by the bytes of a weight."""

WAY_OUT = (
    "a vLLM server may run it: `trimtab serve --engine vllm`, or `trimtab train --proposal_endpoint` and `trimtab propose"
    " --endpoint`"
)


def try_out(model: LanguageModel, stock: Any, *, keep: bool) -> None:
    """Try a model.

    Args:
        model: over ragged slots.
        stock: the transformers model that it runs.
        keep: remember that it passes, and believe what is remembered: nobody else has changed the module.

    Raises:
        UnsupportedModel: it gives other rows than alone, or cannot run; the message says when.
    """
    place = _place(stock) if keep else None
    if place is not None and place.exists():
        return
    kind, started = stock.config.model_type, time.monotonic()
    try:
        found = _first_failure(model, stock)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a module that was made for something else raises
        raise UnsupportedModel(f"a '{kind}' model does not run over ragged slots ({reason_of(error)}); {WAY_OUT}") from error
    if found is not None:
        raise UnsupportedModel(f"a '{kind}' model is not decoded rightly: its rows are others {found}; {WAY_OUT}")
    logger.warning(
        "no test of ours knows '%s' models; this one was tried for %.1f s, gives the rows that it gives alone, and runs as its"
        " stock modules", kind, time.monotonic() - started,
    )  # fmt: skip
    if place is not None:
        with contextlib.suppress(OSError):
            write_json(place, {"model_type": kind})


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
def _first_failure(model: LanguageModel, stock: Any) -> str | None:
    """When rows are not what they are alone; None where they always are."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=random)
    others = torch.randint(model.vocab_size, (SEQUENCES, LENGTH), generator=random)
    others[:, -SAME:] = ids[:, -SAME:]
    right = torch.cat([_alone(model, stock, one[None]) for one in ids])
    apart = right[:, -SAME:] - torch.cat([_alone(model, stock, one[None]) for one in others])[:, -SAME:]
    most = SHARE[stock.dtype.itemsize] * float(apart.pow(2).mean().sqrt())

    def fails(rows: Tensor, expected: Tensor) -> bool:
        return not float((rows - expected).pow(2).mean().sqrt()) <= most

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


def _place(stock: Any) -> Path | None:
    """Where it is remembered that such a model passes; None where there is no such place."""
    folder = cache_folder("trials")
    facts = [type(stock).__qualname__, stock.config.to_json_string(), str(stock.dtype), stock.device.type]
    facts += [str(stock.config._attn_implementation), torch.__version__, transformers.__version__]
    return None if folder is None else folder / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()}.json"
