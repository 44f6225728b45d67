"""The systems that are compared, and their answers to every prompt.

    proposal              the frozen model alone
    aligned               it and its aligners
    references            the data's own answers
    URL or URL#MODEL      a model behind an OpenAI-compatible endpoint
    FILE                  outputs in AlpacaEval's JSON, or written by `trimtab generate --out`
    rewritten:SYSTEM      what a rewriter makes of another one's answers

What a model writes is kept in a `Journal`, by everything that it depends on, so an interrupted run goes on, and a run that asks
for the same again computes nothing.
"""

import dataclasses
import logging
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.data.prompts import is_chat, show_prompt
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.pace import Tally
from trimtab.decode.request import SamplingParams, TokenEvent
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.completions import RemoteModel, Sample
from trimtab.endpoints.settings import Limits, base_url, is_url, without_password
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.evaluate.alpaca import read_outputs
from trimtab.evaluate.options import REWRITTEN
from trimtab.evaluate.speed import throughput
from trimtab.files import expand_home
from trimtab.journal import Journal, key_of
from trimtab.rewriting.options import Rewriting, rewriting_params

__all__ = [
    "Answers",
    "Prompts",
    "System",
    "answer_from_file",
    "answer_here",
    "answer_remotely",
    "check_answerable",
    "parse_system",
    "rewrite_answers",
]

logger = logging.getLogger(__name__)

WRITE_EVERY = 5.0
"""Seconds of decoding between two writes, each with a line of progress."""

SAY_EVERY = 5.0
"""Seconds between two lines about an endpoint's progress."""


@dataclass(frozen=True)
class Prompts:
    """What every system is asked.

    Attributes:
        prompts: texts or chats.
        references: wanted answers as texts, or None for each prompt that has none.
        sources: where each came from, for errors.
        columns: what else the data have of each, for judges that read it; empty where none does.
    """

    prompts: list[Any]
    references: list[str | None]
    sources: list[str]
    columns: list[Mapping[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.prompts)

    def pick(self, chosen: Sequence[int]) -> "Prompts":
        """Some of them."""
        return Prompts(
            [self.prompts[i] for i in chosen],
            [self.references[i] for i in chosen],
            [self.sources[i] for i in chosen],
            [self.columns[i] for i in chosen if self.columns],
        )


@dataclass(frozen=True)
class System:
    """Who answers.

    Attributes:
        kind: `"proposal"`, `"aligned"`, `"references"`, `"endpoint"` or `"file"`.
        name: what reports and files call it.
        where: the URL or the file.
        model: the model's name at an endpoint; None takes the first that is listed.
        rewritten: whether a rewriter rewrites its answers.
    """

    kind: str
    name: str
    where: str = ""
    model: str | None = None
    rewritten: bool = False

    @property
    def here(self) -> bool:
        """Whether it runs in this process."""
        return self.kind in ("proposal", "aligned")

    @property
    def can_repeat(self) -> bool:
        """Whether it can answer again with another seed."""
        return self.here or self.kind == "endpoint"


@dataclass(frozen=True)
class Answers:
    """A system's answers.

    Attributes:
        texts: one for each prompt.
        tokens: their ids, from a model here.
        finish_reasons: why each ended, where that is known; `"error"` for one that could not go on, and is no answer.
        handovers: where each was handed over (`Completion.handover_at`), under a rule that does; None under others.
        speed: of the decoding, from a model here, see `Throughput`.
    """

    texts: list[str]
    tokens: list[list[int]] | None = None
    finish_reasons: list[str | None] | None = None
    handovers: list[int | None] | None = None
    speed: dict[str, float | None] = field(default_factory=dict)

    @property
    def died(self) -> frozenset[int]:
        """Which of them could not go on."""
        return frozenset(i for i, reason in enumerate(self.finish_reasons or ()) if reason == "error")


def parse_system(text: str) -> System:
    """The system that a user names, see above.

    Raises:
        InvalidOption: it is none of them.
    """
    if text.startswith(REWRITTEN):
        inner = parse_system(text.removeprefix(REWRITTEN))
        if inner.rewritten:
            raise InvalidOption(f"'{text}': answers are rewritten once; --rewrite_rounds says how many rounds that takes")
        return dataclasses.replace(inner, name=f"rewritten {inner.name}", rewritten=True)
    if text in ("proposal", "aligned", "references"):
        return System(text, text)
    if is_url(text):
        url, _, model = text.partition("#")
        base_url(url)
        return System("endpoint", model or without_password(url), url, model or None)
    if not expand_home(text).is_file():
        raise InvalidOption(
            f"'{text}' is no system: give proposal, aligned, references, URL#MODEL, a file of outputs, or rewritten:"
            " before one of them"
        )
    return System("file", Path(text).stem, text)


def check_answerable(model: AlignedModel, prompts: Prompts, params: SamplingParams) -> None:
    """Refuse a prompt that a model in this process cannot take.

    Raises:
        DataError: it cannot be decoded; the message says where it came from.
    """
    for prompt, source in zip(prompts.prompts, prompts.sources, strict=True):
        try:
            model.prepare(prompt, params)
        except InvalidRequest as error:
            raise DataError(f"{source}: {error}") from error


def answer_here(model: AlignedModel, prompts: Prompts, params: SamplingParams, journal: Journal, name: str) -> Answers:
    """Answers of a model in this process; prompt i has the seed `params.seed + i`.

    Args:
        model: the models, with or without aligners.
        prompts: what to answer.
        params: how, with a seed.
        journal: where answers are kept.
        name: for lines of progress.

    Raises:
        DataError: a prompt cannot be decoded; nothing has been computed then.
    """
    first = params.seed or 0
    shaping = model.shaping(params)
    known = {
        "weights": model.fingerprints,
        "shaping": repr(shaping),
        "draft": model.drafter,  # part of what a seed means
        "sampling": repr(dataclasses.replace(params, seed=None)),
    }
    each = [dataclasses.replace(params, seed=first + i) for i in range(len(prompts))]
    chats = model.encoder.chat_settings
    keys = [
        key_of({**known, **(chats if is_chat(p) else {}), "prompt": p, "seed": one.seed})
        for p, one in zip(prompts.prompts, each, strict=True)
    ]
    missing = [i for i, key in enumerate(keys) if journal.get(key) is None]
    check_answerable(model, prompts.pick(missing), params)
    speed_key = key_of({**known, "what": "speed", "answers": keys})
    if missing:
        work = model.stream([prompts.prompts[i] for i in missing], [each[i] for i in missing])
        _decode(model, work, [keys[i] for i in missing], journal, speed_key, f"{name}: answered %d of {len(missing)} prompts")
    found = [journal[key] for key in keys]
    return Answers(
        [row["output"] for row in found],
        [row["tokens"] for row in found],
        [row["finish_reason"] for row in found],
        [row.get("handover_at") for row in found] if shaping.rule.hands_over else None,
        _speed(journal.get(speed_key)),
    )


def answer_remotely(
    system: System, prompts: Prompts, params: SamplingParams, journal: Journal, limits: Limits
) -> tuple[Answers, str]:
    """Answers of a model behind an endpoint, and its name there.

    Raises:
        EndpointError: a request is refused, or the endpoint does not answer; what has come is kept.
    """
    with Endpoints([system.where], limits) as endpoints:
        remote = RemoteModel(endpoints, system.model)
        known = {"endpoint": without_password(base_url(system.where)), "model": remote.name, "sampling": repr(params)}
        keys = [key_of({**known, "prompt": p, "number": i}) for i, p in enumerate(prompts.prompts)]
        missing = [i for i, key in enumerate(keys) if journal.get(key) is None]
        done, say_again = len(prompts) - len(missing), 0.0
        for run in _runs(missing):
            seeded = dataclasses.replace(params, seed=(params.seed or 0) + run[0])  # prompt i has the seed `params.seed + i`
            waiting = iter(run)
            for samples in remote.complete([prompts.prompts[i] for i in run], seeded):
                journal.add_all({keys[next(waiting)]: _kept(sample) for (sample,) in samples})
                done += len(samples)
                if done == len(prompts) or time.monotonic() >= say_again:
                    say_again = time.monotonic() + SAY_EVERY
                    logger.info("%s: answered %d of %d prompts", system.name, done, len(prompts))
    found = [journal[key] for key in keys]
    return Answers([row["output"] for row in found], finish_reasons=[row.get("finish_reason") for row in found]), remote.name


def rewrite_answers(
    rewriting: Rewriting, answers: Answers, prompts: Prompts, params: SamplingParams, journal: Journal
) -> Answers:
    """What a rewriter makes of answers; those that died stay as they are. Prompt i has the seed `params.seed + i`."""
    rewriter, options = rewriting
    alive = [i for i in range(len(prompts)) if i not in answers.died]
    how = {i: rewriting_params(options, params, (params.seed or 0) + i) for i in alive}
    known = {"rewriter": rewriter.model.fingerprints, "template": str(rewriter.template), "rounds": rewriter.rounds}
    known |= rewriter.model.encoder.chat_settings if rewriter.template.chat else {}
    keys = {
        i: key_of({**known, "prompt": prompts.prompts[i], "answer": answers.texts[i], "sampling": repr(how[i])}) for i in alive
    }
    missing = [i for i in alive if journal.get(keys[i]) is None]
    for start in range(0, len(missing), rewriter.model.max_num_seqs):
        some = missing[start : start + rewriter.model.max_num_seqs]
        texts = [answers.texts[i] for i in some]
        done = rewriter.rewrite([prompts.prompts[i] for i in some], texts, [how[i] for i in some])
        rows = [{"output": one.text, "finish_reason": one.finish_reason, "rounds": one.rounds} for one in done]
        journal.add_all(dict(zip([keys[i] for i in some], rows, strict=True)))
        logger.info("rewritten: %d of %d answers", start + len(some), len(missing))
    texts, reasons = list(answers.texts), list(answers.finish_reasons or [None] * len(prompts))
    for i in alive:
        texts[i], reasons[i] = journal[keys[i]]["output"], journal[keys[i]]["finish_reason"]
    return Answers(texts, finish_reasons=reasons)


def _kept(sample: Sample) -> dict[str, Any]:
    """What the journal keeps of an endpoint's answer."""
    kept = {"output": sample.text}
    return kept if sample.error is None else kept | {"finish_reason": "error", "error": sample.error}


def answer_from_file(system: System, prompts: Prompts | None) -> tuple[Answers, Prompts, str]:
    """Answers in a file, matched to the prompts by what was asked, and the name of who wrote them.

    Args:
        system: names the file.
        prompts: what to look for; None takes all that the file has.

    Raises:
        DataError: an answer is missing, or the file cannot be read.
    """
    rows = read_outputs(system.where)
    generators = {str(row["generator"]) for row in rows if row.get("generator")}
    name = generators.pop() if len(generators) == 1 else system.name
    if prompts is None:
        sources = [f"{system.where} entry {i}" for i in range(1, len(rows) + 1)]
        prompts = Prompts([row["instruction"] for row in rows], [None] * len(rows), sources)
    waiting: dict[str, deque[tuple[str, str | None]]] = defaultdict(deque)
    for row in rows:
        waiting[show_prompt(row["instruction"])].append((row["output"], row.get("finish_reason")))
    answers = []
    for prompt, source in zip(prompts.prompts, prompts.sources, strict=True):
        found = waiting[show_prompt(prompt)]
        if not found:
            raise DataError(f"{system.where}: has no output for the prompt of {source}: {show_prompt(prompt)[:80]!r}")
        answers.append(found.popleft() if len(found) > 1 else found[0])  # a prompt asked twice may be answered twice, or once
    return Answers([text for text, _ in answers], finish_reasons=[reason for _, reason in answers]), prompts, name


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, where each follows the one before, together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _decode(
    model: AlignedModel, work: Iterator[TokenEvent], keys: Sequence[str], journal: Journal, speed_key: str, words: str
) -> None:
    """Do the work, and keep what comes of it every few seconds, and where it fails."""
    done: dict[str, dict[str, Any]] = {}
    started, answered = time.perf_counter(), 0
    model.pace.tally = Tally()

    def keep() -> None:
        nonlocal started, answered
        now = time.perf_counter()
        spent = {"made": sum(len(row["tokens"]) for row in done.values()), "seconds": now - started}
        spent |= dataclasses.asdict(model.pace.tally)
        before = journal.get(speed_key) or {}
        journal.add_all(done | {speed_key: {field: before.get(field, 0) + value for field, value in spent.items()}})
        started, answered = now, answered + len(done)
        done.clear()
        model.pace.tally = Tally()
        logger.info(words, answered)

    try:
        for event in work:
            if (c := event.completion) is not None:
                row: dict[str, Any] = {"output": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason}
                row |= {} if c.error is None else {"error": c.error}
                row |= {} if c.handover_at is None else {"handover_at": c.handover_at}
                done[keys[event.prompt_index]] = row
            if done and time.perf_counter() - started >= WRITE_EVERY:
                keep()
    finally:
        if done:
            keep()


def _speed(totals: dict[str, Any] | None) -> dict[str, float | None]:
    if totals is None:
        return {}
    counts = {name: value for name, value in totals.items() if name not in ("made", "seconds")}
    return throughput(totals["made"], Tally(**counts), totals["seconds"])._asdict()
