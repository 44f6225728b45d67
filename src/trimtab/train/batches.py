"""Batches: prompts padded on the left, answers on the right, so that all answers begin in one column.

Then the rows that predict answers are the last columns of every sequence, and a model computes logits for no others.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.core.logprobs import Warp, row_from_logits, warp
from trimtab.data.edits import find_edits
from trimtab.data.examples import Example
from trimtab.train.cache import ProposalCache
from trimtab.train.hidden import HiddenCache
from trimtab.train.order import Pick
from trimtab.train.rows import CachedRows, TaughtRows

__all__ = [
    "ExampleDataset",
    "Item",
    "answer_logits",
    "cached_batch",
    "cached_rows",
    "collate",
    "kept_of",
    "log_mass",
    "rows_at",
]


class Item(NamedTuple):
    """An example of a batch."""

    example: Example
    rows: Mapping[str, CachedRows | TaughtRows] = MappingProxyType({})
    """The proposal's, on its `chosen` and `rejected` answers, as far as the loss wants them; `teacher`, on the wanted ones."""
    share: float = 1.0
    """What its loss is multiplied with in training; in looks its example's weight is."""
    hidden: Mapping[str, Tensor] = MappingProxyType({})
    """`[T, H]`, the proposal's hidden states on the prompt with its `chosen` or `rejected` answer, where a head reads them."""
    kept: bool = False
    """Whether the proposal said it itself, and it is to stay as likely as it is."""


class ExampleDataset(torch.utils.data.Dataset[Item]):
    """Examples, with what is cached of the proposal on their `chosen` and `rejected` answers: rows, and hidden states.

    The last `kept` ones are what the proposal said itself.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        caches: Mapping[str, ProposalCache] = MappingProxyType({}),
        hidden: Mapping[str, HiddenCache] = MappingProxyType({}),
        kept: int = 0,
    ) -> None:
        self.examples, self.caches, self.hidden, self._kept = examples, caches, hidden, kept

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def given(self) -> Sequence[Example]:
        """Those of the data."""
        return self.examples[: len(self) - self._kept]

    def __getitem__(self, pick: Pick) -> Item:
        """One example."""
        rows = {which: cache[pick.place] for which, cache in self.caches.items()}
        hidden = {which: cache[pick.place] for which, cache in self.hidden.items()}
        return Item(self.examples[pick.place], rows, pick.share, hidden, pick.place >= len(self) - self._kept)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt with the longer of its answers."""
        return [example.length for example in self.examples]

    @property
    def weights(self) -> list[float]:
        """How often each example counts."""
        return [example.weight for example in self.examples]


def collate(items: Sequence[Item], edits: int | None = None) -> dict[str, Any]:
    """Tensors of a batch: `share`, `weight`, `chosen_*` and, where the data have them, `kept_*`, `rejected_*` and `differs`.

    `share`, `weight` and `differs` are `[B]`.

    `*_ids`, `*_attention`, `*_positions` and `*_mask` are padded `[B, L]` or `[B, T]`; `*_tokens` `[N]`, their `*_owner`s
    and `*_column`s and the proposal's rows, `*_proposal_*`, have no padding: the answers stand end to end. So do the marks of
    edits, `*_edited` `[N]`, which pairs have where the loss looks at them.

    Args:
        items: the examples.
        edits: how many neighbours of an edit count with it, see `trimtab.data.edits`; None without marks.
    """
    examples = [item.example for item in items]
    prompts = [example.prompt for example in examples]
    batch = {"share": torch.tensor([item.share for item in items])}
    batch["weight"] = torch.tensor([example.weight for example in examples])
    batch |= _answers("chosen", prompts, [example.chosen for example in examples])
    if kept := [place for place, item in enumerate(items) if item.kept]:
        batch |= _mark(batch, kept)
    if all(example.rejected for example in examples):
        batch |= _answers("rejected", prompts, [example.rejected for example in examples])
        batch["differs"] = torch.tensor([example.differs for example in examples])
        if edits is not None:
            batch |= _edited(examples, edits)
    for which in items[0].hidden:
        ids = batch[f"{which}_ids"]
        batch[f"{which}_hidden"] = _lay_out([item.hidden[which] for item in items], prompts, ids)
    for which, rows in items[0].rows.items():
        for name in rows._fields:
            batch[f"{which}_proposal_{name}"] = torch.cat([getattr(item.rows[which], name) for item in items])
    return batch


def cached_batch(batch: Mapping[str, Tensor], which: str = "chosen") -> CachedRows:
    """The proposal's compressed rows of N tokens, for the `which` answers of a batch."""
    return CachedRows(*(batch[f"{which}_proposal_{name}"] for name in CachedRows._fields))


def cached_rows(batch: Mapping[str, Tensor], vocab_size: int, which: str = "chosen") -> Tensor:
    """The proposal's rows `[N, V]` for the `which` answers of a batch."""
    return cached_batch(batch, which).rebuild(vocab_size)


def rows_at(logits: Tensor, positions: Tensor, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[n, V]` at a temperature, from the logits `[M, W]` at n positions."""
    rows = row_from_logits(logits.index_select(0, positions), vocab_size)
    return rows if temperature == 1 else warp(rows, Warp(temperature))


def log_mass(logits: Tensor, positions: Tensor, vocab_size: int, temperature: float = 1.0) -> Tensor:
    """Log of Σ_v e^{logit/temperature} `[n]` at n positions of logits `[M, W]`, in float32 or better."""
    some = logits.index_select(0, positions)[:, :vocab_size]
    return (some.to(torch.promote_types(some.dtype, torch.float32)) / temperature).logsumexp(-1)


def answer_logits(model: Any, batch: Mapping[str, Tensor], which: str) -> tuple[Tensor, Tensor]:
    """The model's logits `[M, W]`, W ≥ V, in its own precision; and which of them `[N]` predict the `which` answers' tokens."""
    mask = batch[f"{which}_mask"]
    hidden = batch.get(f"{which}_hidden")
    read = {"input_ids": batch[f"{which}_ids"]} if hidden is None else {"inputs_embeds": hidden}
    logits: Tensor = model(
        **read,
        attention_mask=batch[f"{which}_attention"],
        position_ids=batch[f"{which}_positions"],
        use_cache=False,
        logits_to_keep=mask.shape[1] + 1,
    ).logits
    rows = batch.get(f"{which}_row", batch[f"{which}_owner"])
    return logits.flatten(0, 1), rows * logits.shape[1] + batch[f"{which}_column"]


def kept_of(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Those of a batch that are kept, with their wanted answers alone; and which of the N wanted tokens are theirs.

    The first one of a batch in which none is.
    """
    marks = batch if "kept_rows" in batch else _mark(batch, [0])
    names = [f"chosen_{name}" for name in ("ids", "attention", "positions", "mask", "hidden")]
    some = {name: batch[name].index_select(0, marks["kept_rows"]) for name in names if name in batch}
    return some | {f"chosen_{name}": marks[f"kept_{name}"] for name in ("owner", "column")}, marks["kept_places"]


def _mark(batch: Mapping[str, Tensor], kept: Sequence[int]) -> dict[str, Tensor]:
    """Which rows of a batch are kept, which of the N wanted tokens are theirs, and where those are among the kept rows."""
    mask = batch["chosen_mask"]
    rows = torch.tensor(kept, device=mask.device)
    owner, column = mask[rows].nonzero().unbind(1)
    places = torch.isin(batch["chosen_owner"], rows).nonzero().squeeze(-1)
    return {"kept_rows": rows, "kept_owner": owner, "kept_column": column, "kept_places": places}


def _edited(examples: Sequence[Example], margin: int) -> dict[str, Tensor]:
    """Which tokens of both answers are edits, or so near to one. For each batch anew: 2 × 2,000 tokens take milliseconds."""
    found = [find_edits(example.chosen, example.rejected, margin) for example in examples]
    return {
        "chosen_edited": torch.tensor([mark for edits in found for mark in edits.inserted], dtype=torch.bool),
        "rejected_edited": torch.tensor([mark for edits in found for mark in edits.deleted], dtype=torch.bool),
    }


def _lay_out(hidden: Sequence[Tensor], prompts: Sequence[Sequence[int]], ids: Tensor) -> Tensor:
    """Hidden states `[B, L, H]` in the places of their tokens in ids `[B, L]`, zeros elsewhere."""
    whole = hidden[0].new_zeros(*ids.shape, hidden[0].shape[-1])
    longest = max(map(len, prompts))
    for row, prompt, states in zip(whole, prompts, hidden, strict=True):
        start = longest - len(prompt)
        row[start : start + len(states)] = states
    return whole


def _answers(which: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    left = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    prompt_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    answer_ids = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
    mask = pad_sequence([torch.ones(len(answer), dtype=torch.bool) for answer in answers], batch_first=True)
    attention = torch.cat([left, mask.long()], 1)
    owner, column = mask.nonzero().unbind(1)
    return {
        f"{which}_ids": torch.cat([prompt_ids, answer_ids], 1),
        f"{which}_attention": attention,
        f"{which}_positions": (attention.cumsum(1) - 1).clamp(min=0),
        f"{which}_mask": mask,
        f"{which}_tokens": answer_ids[mask],
        f"{which}_owner": owner,
        f"{which}_column": column,
    }
