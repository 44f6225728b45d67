"""One cell of the study, a regime and a seed: where its parts are, and how its data and models are made."""

import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from judge import train_judge
from transformers import AutoTokenizer

from data import read_texts
from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, encode_records, split_by_prompt
from trimtab.data.records import Record, read_records
from trimtab.demo.pretrain import Size, pretrain, train_tokenizer
from trimtab.files import atomic_folder

__all__ = ["DEV_FRACTION", "MAX_LENGTH", "REGIMES", "Cell", "make_models"]

REGIMES = {"stronger": Size(256, 4, 6500, 2e-3), "comparable": Size(128, 3, 3000, 3e-3)}
"""Proposals, by how they compare with the model that aligners start from."""

START = Size(64, 1, 1500, 5e-3)
"""That model. It sees a quarter of what proposals learn from."""

JUDGE = Size(96, 2, 1500, 3e-3)
"""The judge's body: another one than any aligner's."""

MAX_LENGTH = 192
DEV_FRACTION = 0.2

ANSWERS = 2
"""Wanted answers to a prompt that are scored."""


class Cell(NamedTuple):
    """Paths. Data, start, judges and aligners that see no proposal belong to all regimes of a seed."""

    out: Path
    regime: str
    seed: int

    @property
    def common(self) -> Path:
        """What the regimes of a seed share."""
        return self.out / str(self.seed)

    @property
    def folder(self) -> Path:
        """What is this cell's own."""
        return self.common / self.regime

    @property
    def proposal(self) -> Path:
        """P_M."""
        return self.folder / "proposal"

    @property
    def start(self) -> Path:
        """The model that aligners start from."""
        return self.common / "start"

    @property
    def data(self) -> Path:
        """`align.jsonl` and `held_out.jsonl`."""
        return self.common / "data"

    @property
    def other(self) -> "Cell":
        """The same seed in the other regime: the same data and start, and a proposal that no aligner here has seen."""
        return self._replace(regime=next(regime for regime in REGIMES if regime != self.regime))

    def held_out(self) -> list[Example]:
        """Some pairs of each prompt that only reports see."""
        return _thinned(self.encode(self.read("held_out")))

    def split(self) -> tuple[list[Example], list[Example]]:
        """Training pairs, and some pairs of each development prompt."""
        training, development = map(self.encode, split_by_prompt(self.read("align"), DEV_FRACTION, seed=0))
        return training, _thinned(development)

    def read(self, part: str) -> list[Record]:
        """Pairs as texts."""
        return read_records(str(self.data / f"{part}.jsonl"), need="rejected")

    def encode(self, records: list[Record]) -> list[Example]:
        """Pairs as token ids."""
        tokenizer = AutoTokenizer.from_pretrained(self.data / "tokenizer")
        return encode_records(records, Encoder(tokenizer, len(tokenizer), [tokenizer.eos_token_id]), MAX_LENGTH)

    def names(self, examples: list[Example], *, once: bool = False) -> list[str]:
        """What their prompts are called, the same for every seed's tokenizer; with `once`, each in its first place only."""
        tokenizer = AutoTokenizer.from_pretrained(self.data / "tokenizer")
        texts = [tokenizer.decode(example.prompt) for example in examples]
        return [hashlib.sha256(text.encode()).hexdigest()[:12] for text in (dict.fromkeys(texts) if once else texts)]


def make_models(cell: Cell, dataset: Path) -> None:
    """Data, tokenizer, models and the judge, where they are not there yet."""
    texts = read_texts(dataset, cell.seed)
    if not cell.data.exists():
        with atomic_folder(cell.data) as staging:
            for name in ("align", "held_out", "judge"):
                lines = [json.dumps(pair, ensure_ascii=False) for pair in getattr(texts, name)]
                (staging / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            train_tokenizer(texts.base).save_pretrained(staging / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(cell.data / "tokenizer")
    quarter = texts.base[: len(texts.base) // 4]
    body = cell.common / "judge_body"
    for folder, size, base, seed in (
        (cell.proposal, REGIMES[cell.regime], texts.base, cell.seed),
        (cell.start, START, quarter, cell.seed),
        (body, JUDGE, texts.base, cell.seed + 1000),
    ):
        if not (folder / "config.json").exists():  # transformers makes the folder before there is a model
            pretrain(base, tokenizer, size, folder, seed, folder.name)
    train_judge(body, cell.encode(cell.read("judge")), cell.common / "judge", cell.seed)


def _thinned(examples: list[Example]) -> list[Example]:
    """At most so many examples of each prompt, in the order of the prompts."""
    by_prompt: dict[tuple[int, ...], list[Example]] = defaultdict(list)
    for example in examples:
        by_prompt[tuple(example.prompt)].append(example)
    draw = random.Random(0)
    return [one for found in by_prompt.values() for one in draw.sample(found, min(ANSWERS, len(found)))]
