"""Batches: prompts padded on the left, answers on the right, so that all answers begin in one column.

Then the rows that predict answers are the last columns of every sequence, and a model computes logits for no others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from trimtab.core.logprobs import row_from_logits
from trimtab.train.cache import CachedRows, ProposalCache
from trimtab.train.examples import Example

__all__ = ["ExampleDataset", "answer_rows", "collate"]


class ExampleDataset(torch.utils.data.Dataset[Any]):
    """Examples, with the proposal's cached rows where there are any."""

    def __init__(self, examples: Sequence[Example], cache: ProposalCache | None = None) -> None:
        self.examples, self.cache = examples, cache

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> tuple[Example, CachedRows | None]:
        """One example."""
        return self.examples[index], None if self.cache is None else self.cache[index]


def collate(items: Sequence[tuple[Example, CachedRows | None]]) -> dict[str, Any]:
    """Tensors of a batch: `chosen_*` and, where the data have them, `rejected_*` and `proposal_*`."""
    examples = [example for example, _ in items]
    batch = _answers("chosen", [e.prompt for e in examples], [e.chosen for e in examples])
    if all(example.rejected for example in examples):
        batch |= _answers("rejected", [e.prompt for e in examples], [e.rejected for e in examples])
    rows = [row for _, row in items if row is not None]
    if rows:
        for name in CachedRows._fields:
            batch[f"proposal_{name}"] = pad_sequence([getattr(row, name) for row in rows], batch_first=True)
    return batch


def cached_rows(batch: Mapping[str, Tensor], vocab_size: int) -> Tensor:
    """The proposal's rows `[B, T, V]` of a batch; what stands after the end of an answer means nothing."""
    return CachedRows(*(batch[f"proposal_{name}"] for name in CachedRows._fields)).rebuild(vocab_size)


def answer_rows(model: Any, batch: Mapping[str, Tensor], which: str, vocab_size: int) -> Tensor:
    """The model's log-probabilities `[B, T, V]` at each token of the `which` answers."""
    width = batch[f"{which}_tokens"].shape[1]
    logits = model(
        input_ids=batch[f"{which}_ids"],
        attention_mask=batch[f"{which}_attention"],
        position_ids=batch[f"{which}_positions"],
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits[:, :-1]
    return row_from_logits(logits, vocab_size)


def _answers(which: str, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    left = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    prompt_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    tokens = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
    mask = pad_sequence([torch.ones(len(answer), dtype=torch.bool) for answer in answers], batch_first=True)
    attention = torch.cat([left, mask.long()], 1)
    return {
        f"{which}_ids": torch.cat([prompt_ids, tokens], 1),
        f"{which}_attention": attention,
        f"{which}_positions": (attention.cumsum(1) - 1).clamp(min=0),
        f"{which}_tokens": tokens,
        f"{which}_mask": mask,
    }
