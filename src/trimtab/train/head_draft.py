"""A drafter for a head: some of the proposal's layers with few output rows, distilled from what the aligned model says.

Training prompts → answers of the aligned model, with its best tokens at each position → the tokens that it says most often →
distillation → OUTPUT_DIR/draft (`trimtab.models.reduced`). The answers are drawn here, at temperature 1, because a drafter is
asked about the aligned model's own text; and their rows come with the draws, so no further pass is made.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trimtab.data.examples import Example
from trimtab.decode.request import Completion, SamplingParams
from trimtab.errors import DataError
from trimtab.files import finite
from trimtab.jsonlines import ResumableLines
from trimtab.models.aligner import DRAFT_NAME
from trimtab.models.head import Head
from trimtab.models.loading import load_model
from trimtab.models.reduced import reduce_model, save_reduced
from trimtab.train.arguments import training_arguments
from trimtab.train.batches import ExampleDataset, answer_logits, cached_batch, collate, rows_at
from trimtab.train.distil import DistilTrainer, Target
from trimtab.train.draft import draft_plan
from trimtab.train.folder import last_checkpoint
from trimtab.train.pieces import Piece
from trimtab.train.plan import Plan
from trimtab.train.progress import CompactProgress
from trimtab.train.ranks import Ranks
from trimtab.train.rows import CachedRows
from trimtab.train.samples import open_aligned, pick_prompts
from trimtab.train.trainer import fit, trained

__all__ = ["Answer", "ReducedTrainer", "frequent_tokens", "train_head_draft"]

logger = logging.getLogger(__name__)

LAYERS = 2
"""The proposal's first, which are better here than the first and the last (LOG.md)."""
VOCABULARY = 4096
"""Tokens that a drafter says, at most."""
PROMPTS, DEVELOPMENT = 1024, 64
"""Training and development prompts that are answered, at most."""
EACH = 2
"""Answers to a prompt."""
MAX_TOKENS = 64
"""Of an answer."""
TOGETHER = 64
"""Prompts whose answers are written together: several times what decodes at once, for some answers are long."""
TOP = 32
"""Tokens whose probability is kept at each position."""
EPOCHS = 3


class Answer(NamedTuple):
    """What the aligned model said, and what else it might have said."""

    example: Example
    ids: Tensor
    """`[T, k]` the best tokens at each position, best first."""
    logp: Tensor
    """`[T, k]` their aligned log-probabilities."""


def train_head_draft(
    plan: Plan,
    output: Path,
    place: Path,
    head: Head,
    tokenizer: Any,
    parts: tuple[Sequence[Example], Sequence[Example]],
    ranks: Ranks,
    learning_rate: float,
) -> dict[str, Any]:
    """Distil the drafter of the finished head in the output folder, and save it there.

    Args:
        plan: of the run.
        output: the head's folder; the drafter goes into its folder `draft`.
        place: where answers and checkpoints are kept, for a run that is killed.
        head: what the head's manifest says.
        tokenizer: the proposal's.
        parts: training and development examples, of which the prompts are used.
        ranks: the processes that train together.
        learning_rate: the head's.

    Returns:
        `metrics`, `history`, `seconds`, `layers` and `tokens`, the size of its vocabulary.
    """
    started = time.monotonic()
    own = draft_plan(plan, learning_rate, EPOCHS)
    arguments = training_arguments(own)
    prompts = [pick_prompts(part, most) for part, most in zip(parts, (PROMPTS, DEVELOPMENT), strict=True)]
    path = place / "answers.jsonl"
    ends = ranks.first_does(lambda: _answer(plan, output, tokenizer, prompts[0] + prompts[1], path, arguments.seed))
    answers, development = _read(path, len(prompts[0]) * EACH)
    whole = load_model(plan.asked.proposal, dtype=torch.float32, device="cpu")
    token_ids = frequent_tokens(answers, ends, VOCABULARY)
    layers = tuple(range(min(LAYERS, head.layers)))
    model = reduce_model(whole, layers, token_ids)
    model.get_input_embeddings().requires_grad_(False)  # it stays the proposal's
    del whole
    trainer = ReducedTrainer(
        own,
        len(token_ids),
        sum(len(answer.ids) for answer in answers) / len(answers),
        ranks=ranks,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=_dataset(answers, token_ids),
        eval_dataset=_dataset(development, token_ids),
    )
    CompactProgress.install(trainer, "draft")
    fit(trainer, ranks.first_does(lambda: last_checkpoint(Path(own.asked.output_dir))))
    report = {"layers": list(layers), "tokens": len(token_ids), "metrics": trainer.evaluate()}
    report |= {"history": trainer.state.log_history, "seconds": time.monotonic() - started}
    model, weights = trained(trainer)
    ranks.first_does(lambda: save_reduced(model, token_ids, head.proposal, tokenizer, output / DRAFT_NAME, weights))
    return dict(finite(report))


def frequent_tokens(answers: Sequence[Answer], ends: Sequence[int], most: int) -> Tensor:
    """The tokens that are said most often in expectation, and those that end a text: `[N]`, ascending, N ≤ `most`."""
    ids, mass = (torch.cat([getattr(answer, name).flatten() for answer in answers]) for name in ("ids", "logp"))
    expected = torch.zeros(max([*ends, int(ids.max())]) + 1, dtype=torch.float64)
    expected.index_add_(0, ids, mass.double().exp())
    expected[list(ends)] = torch.inf
    best = expected.sort(descending=True, stable=True).indices[: min(most, int((expected > 0).sum()))]
    return best.sort().values


class ReducedTrainer(DistilTrainer):
    """Distil a model of `reduce_model` on answers whose rows are known; V is the number of its tokens."""

    figure_names: ClassVar[tuple[str, ...]] = ("acceptance_on_answers", "greedy_acceptance")

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What of KL(aligned‖draft) is in the kept tokens that the drafter knows, weighed as an aligner's loss is."""
        logits, positions = answer_logits(model, inputs, "chosen")
        cached = cached_batch(inputs)
        losses = _kl(cached, _at(rows_at(logits, positions, self._vocab_size), cached))
        loss = self._weigh(losses, inputs)
        return (loss, {}) if return_outputs else loss

    def measure(self, target_of: Target, piece: Piece) -> list[Tensor]:
        """The loss, and the chances that a draft stays, drawn and greedy.

        The first chance is Σ min(aligned, draft) over the kept tokens alone, and so no more than the true one.
        """
        assert piece.cached is not None
        logp, there = piece.cached.logp, _at(piece.logq, piece.cached)
        best = (logp[:, 0] > -torch.inf) & (piece.logq.argmax(-1) == piece.cached.ids[:, 0])
        return [_kl(piece.cached, there), torch.minimum(logp, there).exp().sum(-1), best.float()]


def _at(logd: Tensor, cached: CachedRows) -> Tensor:
    """The drafter's log-probabilities `[n, k]` of the kept tokens; of no meaning where it does not know them."""
    return logd.gather(-1, cached.ids.long())


def _kl(cached: CachedRows, there: Tensor) -> Tensor:
    """Σ p·(log p − log d) `[n]` over the kept tokens that the drafter knows."""
    known = cached.logp > -torch.inf
    logp = torch.where(known, cached.logp, 0.0)
    return torch.where(known, logp.exp() * (logp - there), 0.0).sum(-1)


def _dataset(answers: Sequence[Answer], token_ids: Tensor) -> ExampleDataset:
    """The answers with their rows, in which a token is called by its place among the drafter's; others have −inf."""
    rows = []
    for answer in answers:
        places = torch.searchsorted(token_ids, answer.ids).clamp(max=len(token_ids) - 1)
        known = token_ids[places] == answer.ids
        token = torch.tensor(answer.example.chosen, dtype=torch.int32)
        none = torch.zeros(len(token))
        logp = torch.where(known, answer.logp, -torch.inf)
        rows.append(CachedRows(places.int(), logp, token, none, none, token.new_zeros(len(token), 0)))
    caches: dict[str, Any] = {"chosen": rows}  # in memory: they are few
    return ExampleDataset([answer.example for answer in answers], caches)


def _answer(plan: Plan, output: Path, tokenizer: Any, examples: Sequence[Example], path: Path, seed: int) -> Sequence[int]:
    """Let the aligned model answer prompts, going on where a killed run stopped; the ends of sequence."""
    model = open_aligned(plan, output, tokenizer)
    if path.exists():
        return model.eos_token_ids
    header = {"models": model.fingerprints, "seed": seed, "prompts": len(examples)}
    with ResumableLines(path, header, EACH) as lines:
        for first in range(lines.done, len(examples), TOGETHER):
            some = examples[first : first + TOGETHER]
            params = [
                SamplingParams(seed=seed + i, n=EACH, max_tokens=MAX_TOKENS, logprobs=True, top_logprobs=TOP)
                for i in range(first, first + len(some))
            ]
            drawn = model.generate([list(example.prompt) for example in some], params)
            prompts = [example.prompt for example in some for _ in range(EACH)]
            lines.write(_row(prompt, completion) for prompt, completion in zip(prompts, drawn, strict=True))
            logger.info("drafter: %d of %d prompts are answered", first + len(some), len(examples))
    return model.eos_token_ids


def _row(prompt: Sequence[int], completion: Completion) -> Mapping[str, Any]:
    if completion.error is not None or completion.logprobs is None:
        return {"error": completion.error}
    best = completion.logprobs.top_aligned or []
    ids, logp = ([[pair[i] for pair in row] for row in best] for i in (0, 1))
    return {"prompt": list(prompt), "answer": completion.tokens, "ids": ids, "logp": [[round(x, 4) for x in r] for r in logp]}


def _read(path: Path, training: int) -> tuple[list[Answer], list[Answer]]:
    """The answers to training prompts, which are the first so many, and to development prompts.

    Raises:
        DataError: of one kind none is left.
    """
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    parts: tuple[list[Answer], list[Answer]] = ([], [])
    for i, row in enumerate(rows):
        if "error" not in row:
            example = Example(row["prompt"], row["answer"], [])
            some = (("ids", 0), ("logp", -torch.inf))  # where top-p or top-k leaves fewer tokens, others of no mass
            ids, logp = (torch.tensor([[*r, *[pad] * (TOP - len(r))] for r in row[name]]) for name, pad in some)
            parts[i >= training].append(Answer(example, ids, logp))
    if not all(parts):
        raise DataError(f"{path}: no answer of the aligned model could go on: a drafter has nothing to learn from")
    return parts
