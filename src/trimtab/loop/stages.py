"""One round, from votes to a verdict. Each stage leaves a whole file, so a round that is killed goes on where it was.

begin (`begun.json`) → expand (`pairs.jsonl`) → train (`aligner/`) → judge (the verdict, in the loop's history). What a stage
does follows from what the ones before have left and from the options alone, so the end is the same, however often a round is
killed.
"""

import hashlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trimtab.data.options import TemplateOptions
from trimtab.data.prompts import chat_columns, show_prompt
from trimtab.data.records import Record, read_records
from trimtab.data.template import reads_date, today
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.options import RowOptions, load_aligned_model
from trimtab.decode.request import SamplingParams
from trimtab.errors import DataError, InvalidOption
from trimtab.files import json_digest, write_json
from trimtab.jsonlines import write_rows
from trimtab.judges.rewards.base import Reward
from trimtab.loop.expand import expand, pick_alike
from trimtab.loop.folder import LoopFolder
from trimtab.loop.gate import Odds, answers_of, compare_answers, compare_odds, level_of, odds_of, verdict_of
from trimtab.loop.options import EvolveOptions
from trimtab.loop.sift import sift, told_apart
from trimtab.loop.votes import Said, normal, read_said
from trimtab.train import call

__all__ = ["Loop", "open_loop", "play_round"]

logger = logging.getLogger(__name__)

EXPANDED = 64
"""Prompts of a round that get pairs of drawn answers, where nobody says how many."""
JUDGED = 256
"""Prompts of the pool that a round is judged by, at most."""


class Loop(NamedTuple):
    """What the stages share."""

    options: EvolveOptions
    folder: LoopFolder
    said: Said
    """What people said, all of it."""
    pool: list[Record]
    """Prompts to draw answers to."""
    reward: Reward | None

    @property
    def proposal(self) -> str:
        return str(self.folder.history["proposal"])

    @property
    def seed(self) -> int:
        return int(self.folder.history["seed"])

    def open(self, number: int, date: str | None) -> AlignedModel:
        """The aligned model of a round, 0 for what the loop began with; the proposal is who it was.

        Raises:
            InvalidOption: the proposal is another one.
        """
        options, aligner = self.options, self.folder.aligner(number)
        how: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "max_num_seqs": options.max_num_seqs}
        rows = RowOptions(self.proposal, (aligner,) if aligner else (), **how)
        chats = TemplateOptions(options.chat_template_path, date)
        model: AlignedModel = load_aligned_model(rows, chats)
        kept, found = self.folder.history.get("proposal_weights"), model.fingerprints[0]
        if kept not in (None, found):
            raise InvalidOption(
                f"the proposal '{self.proposal}' is another model than the loop in {self.folder.path} began with"
            )
        return model

    def is_held_out(self, prompt: Any) -> bool:
        """Whether a prompt is one that rounds are judged by, for the whole of the loop."""
        text = f"{self.folder.history['seed']} {normal(show_prompt(prompt))}"
        share = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:8]) / 2**64
        return bool(share < self.folder.history["held_out"])


def play_round(loop: Loop) -> dict[str, Any]:
    """Play the round that is under way, or the next one if it is time; its verdict, or `waiting`, why it is not time.

    Raises:
        TrimtabError: something cannot be read or used, or there is too little to learn from.
    """
    number = loop.folder.next
    began = time.monotonic()
    begun = loop.folder.begun(number) or _begin(loop, number)
    if "waiting" in begun:
        return begun
    if begun["depends_on"] != loop.options.depends_on():
        now = loop.options.depends_on()
        names = [*now, *begun["depends_on"]]
        name = next(name for name in names if now.get(name) != begun["depends_on"].get(name))
        raise InvalidOption(
            f"round {number} in {loop.folder.path} has begun with {name}={begun['depends_on'].get(name)!r}, and now it is"
            f" {now.get(name)!r}: let it end as it began, or remove {loop.folder.round(number)}"
        )
    _expand(loop, number, begun)
    _train(loop, number, begun)
    verdict = {"round": number, "incumbent": begun["incumbent"], **_judge(loop, number, begun)}
    verdict |= {"began": begun["why"], "pairs": begun["pairs"], "drawn": _count(loop.folder.round(number) / "pairs.jsonl")}
    loop.folder.finish({**verdict, "seconds": round(time.monotonic() - began, 1)})
    logger.info("round %d: %s", number, verdict["why"])
    return loop.folder.rounds[-1]


def _begin(loop: Loop, number: int) -> dict[str, Any]:
    """See whether it is time, and if it is, settle what the round learns from and is judged by.

    Otherwise what is returned has nothing but `waiting`.
    """
    options, folder = loop.options, loop.folder
    taken = folder.taken()
    new = [vote for vote in loop.said.votes if vote.digest not in taken]
    how: dict[str, Any] = {"key_share": options.key_share, "leave_out": options.leave_out_key}
    fresh = told_apart(loop.said.votes, taken, **how)
    date = options.date or today()
    model = None
    if options.feedback:
        if options.trigger.reads_losses and fresh:
            model = loop.open(folder.current, date)
            earlier = [v.record for v in loop.said.votes if v.digest in taken and loop.is_held_out(v.record.prompt)]
            told = options.trigger.asks(len(fresh), _losses(model, [v.record for v in fresh]), _losses(model, earlier))
        else:
            told = options.trigger.asks(len(fresh), [], [])
        logger.info("round %d: %s", number, told["why"])
        if not told["fires"]:
            return {"waiting": told}
    else:
        told = {"fires": True, "why": "answers to --prompts, by --reward"}
    had = taken | {vote.digest for vote in new}
    known = [vote for vote in loop.said.votes if vote.digest in had]
    sides, figures = [], {}
    for name in ("train", "held_out"):  # each by itself, so that a key has no more than its share of either
        side = [vote for vote in known if loop.is_held_out(vote.record.prompt) == (name == "held_out")]
        sifted = sift(side, **how, length_bias=options.length_bias)
        sides.append(sifted.records)
        figures[name] = sifted.figures
    for key in set(options.leave_out_key) - {vote.key for vote in known}:
        logger.warning("--leave_out_key %s: no vote has this key", key)
    if options.feedback and not all(sides):
        part = "train on" if not sides[0] else "be judged by"
        raise DataError(f"of {len(loop.said.votes)} votes none is left to {part}: collect more, or change --held_out")
    model = model or loop.open(folder.current, date)
    folder.keep_proposal(model.fingerprints[0])
    where = folder.round(number)
    for name, records in zip(("train.jsonl", "held_out.jsonl"), sides, strict=True):
        write_rows(where / name, map(_row, records))
    begun = {
        "round": number,
        "incumbent": folder.current,
        "date": date if reads_date(model.tokenizer) else None,
        "why": told["why"],
        "trigger": told,
        "pairs": {name: figures[name] | {"pairs": len(side)} for name, side in zip(figures, sides, strict=True)},
        "pool": bool(loop.pool),
        "votes": sorted(vote.digest for vote in new),
        "depends_on": options.depends_on(),
    }
    write_json(where / "begun.json", begun)
    return begun


def _expand(loop: Loop, number: int, begun: dict[str, Any]) -> None:
    """Pairs of drawn answers, if a reward can rank them."""
    folder, options = loop.folder.round(number), loop.options
    if loop.reward is None or (folder / "pairs.jsonl").exists():
        return
    model = loop.open(begun["incumbent"], begun["date"])
    lost = [prompt for prompt in loop.said.lost if not loop.is_held_out(prompt)]
    if options.feedback:
        votes = read_records(str(folder / "train.jsonl"), need="rejected")
        lost = [votes[place].prompt for place, one in odds_of(model, votes).items() if one.odds < 0] + lost
    pool = [record for record in loop.pool if not loop.is_held_out(record.prompt)]
    count = EXPANDED if options.expand is None else options.expand
    if not (picked := pick_alike(pool, lost, count, loop.seed + number)):
        write_rows(folder / "pairs.jsonl", [])
        return
    logger.info("round %d: answering %d prompts, %d votes were lost", number, len(picked), len(lost))
    seed = loop.seed + 1_000_003 * number
    expand(model, picked, folder, loop.reward, n=options.num_generations, max_tokens=options.max_tokens, seed=seed)


def _train(loop: Loop, number: int, begun: dict[str, Any]) -> None:
    """Train from the incumbent on all votes that are not held out, and on the pairs of all rounds."""
    folder = loop.folder.round(number)
    rows = [_row(record) for record in _records(folder / "train.jsonl")]
    for earlier in range(1, number + 1):
        rows += [_row(record) for record in _records(loop.folder.round(earlier) / "pairs.jsonl")]
    if not rows:
        raise DataError(f"round {number} has nothing to train on: no vote, and no pair of answers that the reward tells apart")
    write_rows(folder / "data.jsonl", rows)
    incumbent = loop.folder.aligner(begun["incumbent"])
    paths = str(folder / "data.jsonl"), str(folder / "aligner")
    call.run(loop.options.training_run(loop.proposal, incumbent, *paths, loop.seed + number, begun["date"]))


def _judge(loop: Loop, number: int, begun: dict[str, Any]) -> dict[str, Any]:
    """Compare the newcomer with the incumbent, and with what the loop began with."""
    options, date = loop.options, begun["date"]
    level = level_of(number, options.false_promotions)
    numbers = list(dict.fromkeys([number, begun["incumbent"], 0]))
    found: dict[str, Any] = {}
    if options.feedback:
        held_out = read_records(str(loop.folder.round(number) / "held_out.jsonl"), need="rejected", weights=True)
        odds, votes, groups = _odds(loop, numbers, held_out, date)
        found["votes"] = compare_odds(odds[number], odds[begun["incumbent"]], votes, groups, level)
        found["votes_since_start"] = compare_odds(odds[number], odds[0], votes, groups, 0.95)
    if loop.reward is not None and loop.pool:
        by_text = {normal(show_prompt(record.prompt)): record for record in loop.pool if loop.is_held_out(record.prompt)}
        groups = sorted(by_text, key=lambda text: json_digest([text]))[:JUDGED]
        if groups:
            asked = [by_text[text] for text in groups]
            params = [SamplingParams(max_tokens=options.max_tokens, seed=loop.seed + i) for i in range(len(asked))]
            answers = {one: answers_of(loop.open(one, date), asked, loop.reward, params) for one in numbers}
            found["answers"] = compare_answers(answers[number], answers[begun["incumbent"]], groups, level)
            found["answers_since_start"] = compare_answers(answers[number], answers[0], groups, 0.95)
    if not found:
        raise DataError("no prompt of --prompts is held out to judge by: give more, or raise --held_out")
    promoted, why = verdict_of(found["votes" if "votes" in found else "answers"], level, options.max_nll_loss)
    if promoted and "votes" in found and "answers" in found and found["answers"]["interval"][1] < 0.5:
        share = found["answers"]["won"]
        promoted, why = False, f"kept: people's votes are won, but by the reward only {share:.3f} of the answers"
    return {"promoted": promoted, "why": why, **found}


def _odds(
    loop: Loop, numbers: Sequence[int], held_out: Sequence[Record], date: str | None
) -> tuple[dict[int, list[Odds]], list[Record], list[str]]:
    """Odds of several rounds' models of the same votes, which each of them can say; and which prompt each is of."""
    odds = {number: odds_of(loop.open(number, date), held_out) for number in numbers}
    kept = [place for place in range(len(held_out)) if all(place in one for one in odds.values())]
    if not kept:
        raise DataError("no held-out vote is left that all models can say: nothing to judge by")
    votes = [held_out[place] for place in kept]
    some = {number: [one[place] for place in kept] for number, one in odds.items()}
    return some, votes, [normal(show_prompt(vote.prompt)) for vote in votes]


def _losses(model: AlignedModel, records: Sequence[Record]) -> list[float]:
    """Nats a token of wanted answers."""
    return [one.nll / one.tokens for one in odds_of(model, records).values()]


def _records(path: Path) -> list[Record]:
    return read_records(str(path), need="rejected", weights=True) if path.exists() and path.stat().st_size else []


def _row(record: Record) -> dict[str, Any]:
    """A pair as a row of a data set."""
    row = {**chat_columns(record.prompt), "chosen": record.chosen, "rejected": record.rejected, "weight": record.weight}
    return row | ({"unfinished": sorted(record.unfinished)} if record.unfinished else {})


def _count(path: Path) -> int:
    return len(_records(path))


def open_loop(options: EvolveOptions, folder: LoopFolder, reward: Reward | None) -> Loop:
    """Read what there is to learn from.

    Raises:
        DataError: a file cannot be read.
    """
    said = read_said(options.feedback) if options.feedback else Said([], [], 0)
    others = reward is not None and reward.reads_columns
    pool = [] if options.prompts is None else read_records(options.prompts, need="prompt", answers=False, others=others)
    return Loop(options, folder, said, pool, reward)
