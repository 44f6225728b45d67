"""What the options of a proposal's samples stand for: data, a reward, and who draws, checked before anything is drawn."""

from functools import partial
from typing import Any

from trimtab.data.at_hand import count_records
from trimtab.data.options import check_chats
from trimtab.data.records import Record, read_records
from trimtab.data.template import pick_date, refuse_idle_date
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.options import (
    ModelOptions,
    check_prompts,
    load_aligned_model,
    make_sampling_params,
    places_that_fit,
    refuse_beside_loaded,
)
from trimtab.decode.request import SamplingParams
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits, without_password
from trimtab.errors import InvalidOption
from trimtab.files import refuse_overwriting
from trimtab.jsonlines import kept_header
from trimtab.judges.asked import AskedRecords
from trimtab.judges.rewards.base import Reward, check_loaded
from trimtab.judges.rewards.function import FunctionReward
from trimtab.judges.rewards.kinds import make_reward
from trimtab.models.estimates import aligner_weights, model_weights
from trimtab.models.shapes import is_here
from trimtab.propose.local import propose
from trimtab.propose.options import ProposeOptions
from trimtab.propose.ranking import Ranking
from trimtab.propose.remote import propose_remotely
from trimtab.propose.writing import Written

__all__ = ["rehearse", "sample"]

TOGETHER = 32
"""Completions drawn at once by default."""


def sample(options: ProposeOptions, model: AlignedModel | None) -> dict[str, Any]:
    """Sample and write."""
    limits, params, pairs = _checked(options, model)
    reward = _reward(options)
    records = _records(options, pairs, reward)
    check_chats(options, [record.prompt for record in records])
    date = _date(options, model)
    ranking = None if reward is None else Ranking(_loaded(reward, records, date), pairs)
    if options.endpoint:
        if ranking is not None:
            refuse_idle_date(options.date, *_readers(ranking))
        with Endpoints(options.endpoint, limits) as endpoints:
            written = propose_remotely(endpoints, options.proposal or None, records, options.out, params, ranking)
    else:
        written = _here(options, records, params, ranking, date, model)
    return {"out": options.out, **written._asdict(), "pairs": pairs, "seed": params.seed}


def rehearse(options: ProposeOptions, model: AlignedModel | None) -> dict[str, Any]:
    """What would be asked, of whom, and for how much."""
    _, _, pairs = _checked(options, model)
    reward = None if options.reward is None else _reward(options)
    data = count_records(options.dataset, options, options.max_examples, options.expected_examples, answers=not pairs)
    if reward is not None and data["at_hand"]:
        reward.check(AskedRecords(_records(options, pairs, reward)))
    records = data["examples"]
    report: dict[str, Any] = {"dry_run": True, "out": options.out, "data": data, "endpoints": list(options.endpoint)}
    report |= {"rows": None if records is None else records * (pairs or options.n)}
    report |= {"pairs": pairs, "reward_model": None}
    if classifier := options.reward_model:
        report["reward_model"] = {"name": classifier, "at_hand": is_here(classifier)}
    if reward is not None:
        report["reward"] = options.reward if isinstance(options.reward, str) else reward.name
    report["most_tokens"] = None if records is None else records * options.n * options.max_tokens
    if not options.endpoint and model is None:
        dtype = options.dtype or "auto"
        report["proposal"] = model_weights(options.proposal, options.expected_proposal, dtype)
        report["aligners"] = [aligner_weights(a, None, dtype) if is_here(a) else {"name": a} for a in options.aligner]
    return report


def _checked(options: ProposeOptions, model: AlignedModel | None) -> tuple[Limits, SamplingParams, int]:
    """What the options alone tell: limits, sampling, pairs of each prompt."""
    if model is not None:
        refuse_beside_loaded(options, model)
        if options.endpoint:
            raise InvalidOption("--endpoint names who samples, and so does model: leave one of them out")
    elif not options.proposal and not options.endpoint:
        raise InvalidOption("--proposal is required")
    limits = options.limits_of("endpoint", options.endpoint)
    params = make_sampling_params(options, seed=options.seed)
    refuse_overwriting(options.out, options.dataset)
    return limits, params, _pairs(options)


def _pairs(options: ProposeOptions) -> int:
    """Pairs of each prompt; 0 where samples are written as they are."""
    if not options.ranked:
        return 0
    pairs = 1 if options.pairs is None else options.pairs
    if options.temperature == 0:
        flag = "--reward_model" if options.reward_model else "--reward"
        raise InvalidOption(f"{flag} needs samples that differ: --temperature must be above 0")
    if not 1 <= pairs <= options.n // 2:
        raise InvalidOption(f"--pairs must be from 1 to half of --n, which is {options.n}, not {pairs}")
    return pairs


def _reward(options: ProposeOptions) -> Reward | None:
    """What ranks samples, checked but not loaded; None if nothing does."""
    asked, classifier = options.reward, options.reward_model
    if asked is None and classifier is None:
        return None
    if isinstance(asked, Reward):
        return asked
    try:
        if asked is not None and not isinstance(asked, str):
            if not callable(asked) or isinstance(asked, type):
                raise InvalidOption(f"must be a text, a function, or a trimtab.judges.rewards.base.Reward, not {asked!r}")
            return FunctionReward(asked)
        text = f"model:{classifier}" if classifier is not None else str(asked)
        reward = make_reward(text, {"dtype": options.dtype or "auto", "device": options.device})
    except InvalidOption as error:
        raise InvalidOption(f"--reward: {error}") from error
    reward.called = f"--reward_model {classifier}" if classifier is not None else f"--reward {without_password(str(asked))}"
    return reward


def _records(options: ProposeOptions, pairs: int, reward: Reward | None) -> list[Record]:
    """The data; answers are written beside samples, and stand in no pair of samples."""
    others = reward is not None and reward.reads_columns
    return read_records(
        options.dataset,
        need="prompt",
        how=options,
        limit=options.max_examples,
        answers=not pairs,
        others=others,
        weights=True,
    )


def _loaded(reward: Reward, records: list[Record], date: str) -> Reward:
    """The reward, which can take the prompts."""
    asked = AskedRecords(records)
    reward.check(asked)
    reward.load(asked, date)
    check_loaded(reward)
    return reward


def _readers(ranking: Ranking | None) -> list[Any]:
    return [ranking.reward.tokenizer] if ranking is not None and ranking.reward.tokenizer is not None else []


def _date(options: ProposeOptions, model: AlignedModel | None) -> str:
    """What chat templates take for today: as a loaded model has it, or the run that is resumed."""
    kept = kept_header(options.out)
    who = kept.get("proposal")
    loaded = None if model is None else model.encoder.date
    return pick_date(options.date or loaded, kept.get("date") or (who.get("date") if isinstance(who, dict) else None))


def _here(
    options: ProposeOptions,
    records: list[Record],
    params: SamplingParams,
    ranking: Ranking | None,
    date: str,
    model: AlignedModel | None,
) -> Written:
    if model is None:
        asked = ModelOptions(
            options.proposal,
            options.aligner,
            dtype=options.dtype or "auto",
            device=options.device,
            backend=options.backend,
            max_num_seqs=TOGETHER if options.max_num_seqs is None else options.max_num_seqs,
        )
        model = load_aligned_model(asked, options, date)
    refuse_idle_date(options.date, model.tokenizer, *_readers(ranking))
    prompts, sources = [record.prompt for record in records], [record.source for record in records]
    records = [records[i] for i in places_that_fit(options, model, prompts, [None] * len(records), sources)]
    check_prompts(records, partial(model.prepare, params=params))
    return propose(model, records, options.out, params, max(1, model.max_num_seqs // params.n), ranking)
