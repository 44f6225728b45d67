"""A small judge of answers: a Bradley-Terry reward model of pairs, for where no wanted answer can be compared with a sample.

A language model's body reads prompt and answer, and a linear head scores the mean of its hidden states over the answer's
tokens. A study has two: one judges every system, and learns from answers to prompts that no aligner sees; the other is the
reward model of best-of-n, and learns from the very pairs that aligners do.

What it judges is an answer's wording: so small a model does not tell an answer from a good one to another prompt. From pairs
alone it does not learn to mind repetition or disorder either, so it is also shown answers that were spoiled, which lose to the
same answers as they were written.
"""

import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from trimtab.core.objectives import preference
from trimtab.data.examples import Example
from trimtab.files import atomic_folder

__all__ = ["Judge", "accuracy", "spoil", "train_judge"]

logger = logging.getLogger(__name__)

CUT = 64
"""Tokens of an answer that are read: as many as are sampled, so that length alone tells no sample from a real answer."""

EPOCHS = 2
RATE = 5e-4
PAIRS = 16
"""Pairs in a training step."""

BATCH = 64
"""Answers scored at once."""

HEAD = "score.safetensors"
"""The head's file: the last by name, so where it is, the judge is whole."""


class Judge(torch.nn.Module):
    """Prompts and answers in, one score per answer out: only differences between answers to one prompt mean anything."""

    def __init__(self, body: PreTrainedModel) -> None:
        super().__init__()
        self.body = body
        self.head = torch.nn.Linear(body.config.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(self.head.weight)

    @classmethod
    def load(cls, folder: Path) -> "Judge":
        """Read what `train_judge` wrote."""
        judge = cls(AutoModel.from_pretrained(folder))
        judge.head.load_state_dict(load_file(folder / HEAD))
        return judge.eval()

    def save(self, folder: Path) -> None:
        """Write the body as transformers does, and the head beside it."""
        with atomic_folder(folder) as staging:
            self.body.save_pretrained(staging)
            save_file(self.head.state_dict(), staging / HEAD)

    def forward(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Tensor:
        """Scores `[B]` of one batch.

        Raises:
            ValueError: an answer has no token.
        """
        if not all(answers):
            raise ValueError("an answer without a token has no score")
        rows = [torch.tensor(prompt + answer[:CUT]) for prompt, answer in zip(prompts, answers, strict=True)]
        ids = pad_sequence(rows, batch_first=True)
        place = torch.arange(ids.shape[1])
        start = torch.tensor([[len(prompt)] for prompt in prompts])
        real = place < torch.tensor([[len(row)] for row in rows])
        hidden = self.body(input_ids=ids, attention_mask=real.long(), use_cache=False).last_hidden_state
        answered = (real & (place >= start)).unsqueeze(-1)
        return self.head((hidden * answered).sum(1) / answered.sum(1)).squeeze(-1)

    @torch.no_grad()
    def score(self, prompts: list[list[int]], answers: list[list[int]]) -> Tensor:
        """Scores `[answers]`, each of an answer to the prompt in its place; batches are of like length."""
        order = sorted(range(len(answers)), key=lambda i: len(prompts[i]) + min(len(answers[i]), CUT))
        scores = torch.empty(len(answers))
        for chunk in (order[i : i + BATCH] for i in range(0, len(order), BATCH)):
            scores[chunk] = self([prompts[i] for i in chunk], [answers[i] for i in chunk])
        return scores


def train_judge(body: Path, examples: Sequence[Example], folder: Path, seed: int) -> None:
    """Fit a judge to pairs, from the body of the causal language model in `body`, and save it in `folder` if none is there.

    The seed says in which order the pairs come; nothing else is random.
    """
    if (folder / HEAD).exists():
        return
    judge, draw = Judge(AutoModel.from_pretrained(body)), random.Random(seed)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.1)
    for epoch in range(EPOCHS):
        order = draw.sample(examples, len(examples))
        losses = 0.0
        for pairs in (order[i : i + PAIRS] for i in range(0, len(order), PAIRS)):
            prompts, chosen, rejected = zip(*pairs, strict=True)
            real = tuple(draw.choice(both) for both in zip(chosen, rejected, strict=True))
            spoiled = tuple(spoil(answer, draw) for answer in real)
            better, worse = judge(prompts * 4, chosen + real + rejected + spoiled).chunk(2)
            loss = preference(better, worse, beta=1.0)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            losses += float(loss.detach().sum())
        logger.info("%s: epoch %d, loss %.3f", folder.name, epoch + 1, losses / len(examples) / 2)
    judge.save(folder)


def spoil(answer: list[int], draw: random.Random) -> list[int]:
    """An answer of the same length that nobody wants: shuffled, or a loop of a few of its tokens from some place on."""
    read = answer[:CUT]
    if draw.random() < 0.5:
        return draw.sample(read, len(read))
    start, period = draw.randrange(len(read) // 2 + 1), draw.randint(1, 16)
    return [read[i if i < start + period else start + (i - start) % period] for i in range(len(read))]


def accuracy(judge: Judge, examples: Sequence[Example]) -> Tensor:
    """Whether the judge prefers the chosen answer of each pair: `[examples]`, 1 or 0, and 0.5 for a tie."""
    prompts = [example.prompt for example in examples]
    chosen = judge.score(prompts, [example.chosen for example in examples])
    rejected = judge.score(prompts, [example.rejected for example in examples])
    return (torch.sign(chosen - rejected) + 1) / 2
