"""One training run from rewards, from options to a finished aligner: rounds of sampling, scoring and an update.

It goes on after a kill at any point: rounds are in files (`trimtab.train.online.rounds`), and weights in the trainer's
checkpoints. What it begins and ends with is as in `trimtab.train.run`.
"""

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from trimtab.data.encoding import Encoder
from trimtab.data.template import pick_date
from trimtab.errors import DataError, InvalidOption
from trimtab.files import finite, json_digest, read_json, write_json
from trimtab.judges.asked import AskedRecords
from trimtab.judges.rewards.base import Reward, check_loaded
from trimtab.judges.rewards.file import FileReward
from trimtab.models.aligner import Aligner
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import check_same_vocabulary, vocabulary_size
from trimtab.train.folder import is_finished, last_checkpoint, open_run
from trimtab.train.head import HeadStart
from trimtab.train.inputs import open_proposal, open_tokenizer, run_date
from trimtab.train.online.betas import Betas
from trimtab.train.online.data import encode_prompts, read_prompts
from trimtab.train.online.drafting import distil_draft
from trimtab.train.online.figures import figures_of
from trimtab.train.online.filed import Filed, filed_samples, read_filed, with_answers
from trimtab.train.online.policy import Policies, split_proposal
from trimtab.train.online.prefixes import Ends
from trimtab.train.online.rounds import Rounds, Schedule, replayed
from trimtab.train.online.samples import Prompt
from trimtab.train.online.served import ServedPolicies
from trimtab.train.online.trainer import OnlineTrainer
from trimtab.train.options import TrainOptions
from trimtab.train.plan import Facts, Plan, resolve
from trimtab.train.progress import CompactProgress
from trimtab.train.ranks import Ranks
from trimtab.train.record import describe_run, make_manifest, save_trained
from trimtab.train.start import load_start, prepare_model
from trimtab.train.trainer import fit

__all__ = ["run_online"]

logger = logging.getLogger(__name__)

MAX_TOKENS, GENERATIONS, DEVELOPMENT, TOGETHER = 256, 8, 32, 32
"""Defaults."""

HALVINGS = 4
"""Of the weight, where a budget is looked for."""


def run_online(asked: TrainOptions, facts: Facts, output: Path, arguments: TrainingArguments, ranks: Ranks) -> dict[str, Any]:
    """Train by rewards; the folder is this process's own.

    Args:
        asked: the options.
        facts: of the aligner's folder.
        output: the folder.
        arguments: of the trainer.
        ranks: must be one process.

    Returns:
        What `training.json` holds: `objective`, `weight`, `proposal` and `metrics`, figures of the proposal and of the aligner
        on the development prompts; `rounds`, `beta` at the end, `learning_rate`, `history`, `seconds`.
    """
    started, plan = time.monotonic(), resolve(asked, facts)
    if ranks.count > 1:
        raise InvalidOption(f"objective: '{plan.objective.name}' samples in one process: start it without a launcher")
    filed = None if asked.rewards is None else read_filed(asked.rewards)
    if not plan.asked.reward:
        return _train(asked, facts, output, arguments, ranks, None, filed, started)
    with plan.asked.sum_of_rewards({"dtype": "auto", "device": plan.asked.device}) as reward:
        if kept := next((part for part in (reward, *getattr(reward, "parts", ())) if isinstance(part, FileReward)), None):
            raise InvalidOption(
                f"{kept.called}: a file has the scores of given answers, and rounds draw others: name what scores them, or"
                f" learn from the given ones, --rewards {kept.path}"
            )
        return _train(asked, facts, output, arguments, ranks, reward, filed, started)


def _train(
    asked: TrainOptions,
    facts: Facts,
    output: Path,
    arguments: TrainingArguments,
    ranks: Ranks,
    reward: Reward | None,
    filed: Filed | None,
    started: float,
) -> dict[str, Any]:
    plan = resolve(asked, facts)
    tokenizer = open_tokenizer(plan, asked.proposal)
    found = facts.aligner
    if found is not None:
        check_same_vocabulary(tokenizer, found.tokenizer, plan.asked.aligner)
    asked = dataclasses.replace(asked, date=run_date(plan, tokenizer))
    plan = resolve(asked, facts)
    records, kept = read_prompts(plan, columns=reward is not None and reward.reads_columns)
    looked_at = plan.asked.dev_prompts or DEVELOPMENT
    if reward is not None:
        kept = kept[:looked_at]
    everything = AskedRecords([*records, *kept])
    generations = _generations(plan, arguments)
    if reward is not None:
        reward.check(everything)
        reward.load(everything, asked.date or pick_date(None, None))
        check_loaded(reward)
        reward.check_tokenizer(tokenizer)
    start = None if found is None or plan.trains_head else load_start(plan, found)
    proposal = open_proposal(plan, tokenizer)
    context = min(context_of(start.model.config) if start else proposal.context, proposal.context)
    encoder = Encoder(tokenizer, vocabulary_size(tokenizer), proposal.eos_token_ids, asked.date)
    max_tokens = plan.asked.max_tokens or MAX_TOKENS
    room = min(plan.asked.max_length, context) - max_tokens
    if room < 1:
        raise InvalidOption(f"max_tokens: {max_tokens} leave no room for a prompt within max_length or the context: lower it")
    training = encode_prompts("training", records, encoder, room)
    development = encode_prompts("development", kept, encoder, room)
    given: dict[str, Any] = {}
    if filed is not None and reward is None:
        training, given["filed"] = with_answers("training", training, filed, encoder, max_tokens)
        some = with_answers("development", development, filed, encoder, max_tokens, looked_at)
        development, given["filed_development"] = some
    elif filed is not None:
        given["filed"] = filed_samples(filed, training, encoder, max_tokens)
        if not any(given["filed"].values()):
            raise DataError(f"{filed.path}: no training prompt has an answer there")
    split = split_proposal(proposal, plan.asked.device)
    head = None if start else HeadStart.of(plan, split.trained_on, found)
    kind = None if head is None else head.head
    schedule = _schedule(plan, arguments, len(training), generations, max_tokens)
    run = describe_run(plan, arguments, _digest([*training, *development]))
    run |= {"reward": reward.label()} if reward is not None else {}
    run |= {"rewards": filed.fingerprint} if filed is not None else {}
    run |= {"proposal_weights": proposal.rows.fingerprint}
    if began := start or (head and head.earlier):
        run["aligner_weights"] = began.files.fingerprint
    open_run(output, run, plan.asked.overwrite_output_dir)
    sampling = plan, split.sampled, tokenizer, kind, plan.asked.max_num_seqs or TOGETHER, asked.date
    urls = () if is_finished(output) else plan.asked.sampling_endpoint
    policies = ServedPolicies(urls, plan.asked.limits, output, *sampling) if urls else Policies(*sampling)
    ends = Ends.of(encoder, training[0]) if plan.objective.prefixes else None
    with closing(policies):
        rounds = Rounds(output, training, development, schedule, reward, tokenizer=tokenizer, ends=ends, **given)
        if is_finished(output):
            logger.info("%s is already trained with these settings", output)
            report = dict(read_json(output / "training.json"))
        else:
            model = prepare_model(start.model, plan, arguments.seed) if start else head and head.prepare(arguments.seed)
            parts = {"rounds": rounds, "policies": policies, "prompts": training, "development": development}
            parts["end"] = ends.token if ends else None
            report = _train_aligner(
                plan, output, arguments, ranks, tokenizer, head, split.frozen, model, reward, parts, started
            )
            del model
        if plan.trains_draft and "draft" not in report:
            how: dict[str, Any] = {"rounds": rounds, "report": report, "prompts": (training, development), "source": split.rows}
            report["draft"] = distil_draft(plan, output, tokenizer, ranks, start=start and start.draft, head=kind, **how)
            write_json(output / "training.json", report)
    return report


def _train_aligner(
    plan: Plan,
    output: Path,
    arguments: TrainingArguments,
    ranks: Ranks,
    tokenizer: Any,
    head: HeadStart | None,
    frozen: Any,
    model: Any,
    reward: Reward | None,
    parts: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Train, tune and save an aligner; returns the report."""
    kind = None if head is None else head.head
    betas = Betas(
        getattr(plan.objective, "beta", None),
        getattr(plan.objective, "beta_start", 1.0),
        arguments.max_steps,
        plan.asked.max_kl,
    )
    before = figures_of(parts["rounds"].look("proposal", parts["policies"].bare), 0.0, 0.0)
    if "reward" in before:
        logger.info("the proposal's answers to the development prompts: reward %.4g", before["reward"])
    trainer = OnlineTrainer(
        plan,
        vocabulary_size(tokenizer),
        proposal=frozen,
        betas=betas,
        tap=kind.tap if kind else 0,
        before=before.get("reward", 0.0),
        model=model,
        args=arguments,
        eval_dataset=parts["development"],
        **parts,
    )
    CompactProgress.install(trainer, plan.objective.name)
    fit(trainer, last_checkpoint(output))
    if reward is not None and reward.failures.count:
        logger.warning("%d completions got no score since the run was started; %s", *dataclasses.astuple(reward.failures))
    weight, metrics = _tuned(plan, trainer)
    report: dict[str, Any] = {
        "objective": {"name": plan.objective.name, **dataclasses.asdict(plan.objective)},
        "weight": weight,
        "learning_rate": arguments.learning_rate,
        "rounds": arguments.max_steps,
        "best_round": trainer.best_step,
        "proposal": {name: before[name] for name in ("reward", "length", "ended", "distinct", "scored") if name in before},
        "metrics": metrics,
        "history": trainer.state.log_history,
        "unscored": parts["rounds"].unscored(arguments.max_steps),
        "profile": trainer.profile,
        "seconds": time.monotonic() - started,
    }
    manifest = make_manifest(plan, tokenizer, weight, kind)
    report = dict(finite(report))
    save_trained(trainer, Aligner(None, tokenizer, manifest, str(output)), report, output, ranks, head)
    return report


def _tuned(plan: Plan, trainer: OnlineTrainer) -> tuple[float, dict[str, float]]:
    """The weight, and the figures at it: the trained one, whose target this is, or under a budget the largest within it.

    KL(aligned‖proposal) grows with the weight, and is 0 at 0.
    """
    metrics, weight, budget = trainer.evaluate(), plan.weight, plan.asked.max_kl
    if budget is None or metrics["eval_kl"] <= budget:
        return weight, metrics
    within, beyond = 0.0, weight
    found = trainer.figures("weight-0", 0.0)
    for _ in range(HALVINGS):
        middle = (within + beyond) / 2
        seen = trainer.figures(f"weight-{middle:g}", middle)
        if seen["kl"] <= budget:
            within, found = middle, seen
        else:
            beyond = middle
    logger.info("KL(aligned‖proposal) is %.3g at weight %g, and %.3g at %g", metrics["eval_kl"], weight, found["kl"], within)
    return within, {f"eval_{name}": value for name, value in found.items()}


def _generations(plan: Plan, arguments: TrainingArguments) -> int:
    """Answers to a prompt in an update; micro-batches hold whole groups of them."""
    for name in ("train_sampling_strategy", "dataloader_drop_last", "per_device_eval_batch_size"):
        if name in plan.asked.training:
            raise InvalidOption(f"{name} has no effect on rounds of samples: leave it out")
    generations = plan.asked.num_generations or GENERATIONS
    if (batch := arguments.per_device_train_batch_size) % generations:
        raise InvalidOption(
            f"per_device_train_batch_size must be a multiple of num_generations, {generations}, for a prompt's answers are"
            f" learnt from together; it is {batch}"
        )
    share = getattr(plan.objective, "replay_share", 0.0)
    if plan.asked.rewards is not None and plan.asked.reward and not replayed(share, generations):
        raise InvalidOption(
            f"rewards: with --reward they are earlier answers, and of {generations} a share of {share:g} is none: raise"
            " replay_share or num_generations"
        )
    return generations


def _schedule(plan: Plan, arguments: TrainingArguments, prompts: int, generations: int, max_tokens: int) -> Schedule:
    """How rounds are drawn; `max_steps` becomes the number of rounds."""
    in_round = arguments.per_device_train_batch_size // generations * arguments.gradient_accumulation_steps
    if arguments.max_steps < 1:
        arguments.max_steps = max(1, -(-int(arguments.num_train_epochs * prompts) // in_round))
    arguments.ignore_data_skip = True  # rounds know which is next
    names = ("tempered_share", "lowest_temperature", "highest_temperature", "replay_share")
    own = {name: value for name in names if (value := getattr(plan.objective, name, None)) is not None}
    return Schedule(in_round, generations, max_tokens, arguments.seed, **own)


def _digest(prompts: Sequence[Prompt]) -> str:
    """What tells the prompts and what a reward may read of them from others."""
    return json_digest([list(prompt.ids), repr(sorted(prompt.record.columns.items()))] for prompt in prompts)
