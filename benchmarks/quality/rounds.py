"""The data of a second round: pairs of an aligned model's own samples, ranked by a reward model that learnt from the first's.

As `trimtab propose --aligner A --reward_model RM` makes them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cell import MAX_LENGTH, Cell
from judge import Judge, train_judge
from transformers import AutoTokenizer
from wins import CUT

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.request import SamplingParams
from trimtab.judges.rewards.base import Reward
from trimtab.propose.local import propose
from trimtab.propose.ranking import Ranking

__all__ = ["reward_model", "sampled_pairs"]

SAMPLES = 16
"""Of each prompt."""

PAIRS = 6
"""That they make."""


class _OfTexts(Reward):
    """A judge that reads texts."""

    name = fingerprint = "reward"

    def __init__(self, judge: Judge, tokenizer: Any) -> None:
        self.judge = judge
        self.of_texts = tokenizer

    def score(self, prompts: Sequence[str], answers: Sequence[str], columns: Any) -> list[float]:
        """One score for each."""
        eos = [self.of_texts.eos_token_id]  # so that no answer is empty
        ids = [self.of_texts.encode(answer) + eos for answer in answers]
        return self.judge.score([self.of_texts.encode(prompt) for prompt in prompts], ids).tolist()


def reward_model(cell: Cell) -> Judge:
    """What learnt from the aligners' own pairs."""
    train_judge(cell.start, cell.split()[0], cell.common / "reward", cell.seed)
    return Judge.load(cell.common / "reward")


def sampled_pairs(cell: Cell, aligner: Path) -> Path:
    """The data, training and development prompts alike; made where they are not there yet."""
    out = cell.folder / "second_round.jsonl"
    if not out.exists():
        tokenizer = AutoTokenizer.from_pretrained(cell.data / "tokenizer")
        once = {record.prompt: record for record in cell.read("align")}.values()
        records = [record for record in once if len(tokenizer.encode(record.prompt)) < MAX_LENGTH]  # as in training
        scorer = _OfTexts(reward_model(cell), tokenizer)
        model = AlignedModel.from_pretrained(cell.proposal, aligner, draft="none", num_speculative_tokens=0, max_num_seqs=64)
        params = SamplingParams(n=SAMPLES, max_tokens=CUT, seed=21)
        propose(model, records, out, params, batch_size=4, ranking=Ranking(scorer, PAIRS))
    return out
