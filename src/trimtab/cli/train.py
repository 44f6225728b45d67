"""`trimtab train`: an aligner for a frozen proposal."""

from dataclasses import dataclass
from typing import Any

from trimtab.data.options import idle_for_files
from trimtab.files import expand_home
from trimtab.hardware import in_bytes
from trimtab.models.aligner import manifest_of
from trimtab.models.estimates import DryRunOptions, describe_model, in_time
from trimtab.options import option
from trimtab.train.options import TrainOptions
from trimtab.train.rounds import of_head

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(DryRunOptions, TrainOptions):
    """Flags of `trimtab train`."""

    expected_aligner: str | None = option(None, "for --dry_run: the same for --aligner", metavar="A", kept=True)
    assume_tflops: float | None = option(
        None, "for --dry_run: 10¹² operations a second of the device [default: measured on this one]", kept=True, above=0
    )

    def idle(self) -> dict[str, str]:
        """What the objective, a teacher, fresh adapters, or files leave unread."""
        idle = idle_for_files(self.dataset, self.eval_dataset)
        if self.objective != "ram":
            idle["alpha"] = "is for --objective ram"
        manifest = manifest_of(expand_home(self.aligner)) if self.aligner else None
        known = of_head(self, manifest) if manifest is not None and manifest.head is not None else self
        contrast = known.default_contrast if self.contrast is None else self.contrast
        if self.objective != "preference" and not contrast:
            idle["beta"] = "is for --objective preference, and for the --contrast of likelihood"
        if self.teacher_prompt is None:
            idle["teacher_max_tokens"] = "needs --teacher_prompt"
        if not known.use_peft:
            names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
            idle |= dict.fromkeys(names, "is for the adapters of --use_peft")
        if known.trains_head:
            idle["use_peft"] = "has no effect on a head, which is an adapter anyway"
            if self.teacher_prompt is None:
                idle["cache_top_k"] = "has no effect on a head, whose own layers have the proposal's rows"
        if not self.aligner:
            idle["expected_aligner"] = "is for --aligner"
        if self.eval_dataset is not None:
            idle["dev_fraction"] = "has no effect with --eval_dataset"
        return idle


def run(options: Options) -> dict[str, Any]:
    """Train, tune the weight, save; or say what that will take."""
    from trimtab.models.loading import quiet_loading
    from trimtab.train.dry_run import Expected, estimate
    from trimtab.train.run import train

    quiet_loading()
    if options.dry_run:
        known = (options.expected_proposal, options.expected_aligner, options.expected_examples, options.assume_tflops)
        return estimate(options, Expected(*known))
    report = train(options)
    report.pop("history")
    report.get("draft", {}).pop("history", None)
    return {"output_dir": options.output_dir, **report}


def render(report: dict[str, Any]) -> str:
    """What came out of it, on the development prompts."""
    if "dry_run" in report:
        return _render_estimate(report)
    metrics = report["metrics"]
    lines = [f"aligner in {report['output_dir']}, weight {report['weight']:g}", ""]
    if "draft" in report:
        drafted = report["draft"]["metrics"]
        metrics = metrics | {name: drafted[name] for name in drafted if name != "eval_loss"}
    lines += [f"{name.removeprefix('eval_'):22}{metrics[name]:10.4f}" for name in metrics if isinstance(metrics[name], float)]
    return "\n".join(lines)


def _render_estimate(report: dict[str, Any]) -> str:
    from trimtab.train.checkpointing import CHECKPOINTING

    data, memory, aligner, caching = (report[name] for name in ("data", "memory", "aligner", "caching"))
    lines = [f"proposal   {describe_model(report['proposal'])}"]
    if head := report["head"]:
        again = f", trained on from {aligner['name']}" if aligner["name"] else ""
        lines.append(f"aligner    a head, which runs {head['layers']} of the proposal's {head['of']} layers again{again}")
    else:
        lines.append(f"aligner    {describe_model(aligner)}")
    with_it = ", the proposal's among them" if head else ""
    lines.append(f"           {aligner['parameters']:,} parameters{with_it}, {aligner['trainable']:,} of them trained")
    checked = "tokenizers agree" if report["vocabulary"]["checked"] else "tokenizers are not at hand, and not compared"
    lines.append(f"vocabulary {report['vocabulary']['tokens']:,} tokens; {checked}")
    counts = "" if data["examples"] is None else f"{data['examples']:,} examples and {data['development']:,} for development"
    if data["tokens"] is not None:
        lines.append(f"data       {counts}, {data['tokens']:,} answer tokens, the longest example has {data['longest']}")
    else:
        lines.append(f"data       not at hand: {data['why_not']}" + (f"; {counts} are expected" if counts else ""))
        of = "pairs" if report["rejected"] else "answers"
        lines.append(
            f"           what follows is for batches of {of} of {data['longest']} tokens each, which is the most there can be"
        )
    if report["contrast"]:
        given = "" if report["rejected"] == "known" else ", if every record has a rejected answer"
        lines.append(f"contrast   {report['contrast']:g}{given}: a second pass, and the rejected answers' rows in the cache")
    if data["equal_pairs"]:
        lines.append(
            f"pairs      {data['equal_pairs']:,} have two equal answers, from which no objective learns what to prefer"
        )
    if head and head["kept_samples"]:
        lines.append(
            f"kept       {head['kept_samples']:,} samples that the proposal is yet to draw, here as long as they may be"
        )
    shared = f", shared by {report['processes']} processes; what follows is for one" if report["processes"] > 1 else ""
    steps = "not known" if report["steps"] is None else f"{report['steps']:,}"
    lines.append(f"steps      {steps}, of {report['batch']} examples{shared}")
    alone = "" if report["accelerator"] else " (this machine has no accelerator)"
    if report["draft_steps"] != 0:
        of_head = "steps on answers that are drawn for it"
        of_others = "as many steps again, each with a forward pass of the aligner and whole rows"
        lines.append(f"drafter    {of_head if head else of_others}: not in what follows")
    lines += ["", f"training on {report['device']}{alone}"]
    lines += [
        f"  {name.replace('_', ' '):28}{in_bytes(memory[name]):>12}" for name in ("weights", "gradients", "optimizer", "batch")
    ]
    lines.append(f"  {'activations and rows, at most':28}{in_bytes(memory['passing']):>11}")
    lines.append(f"  {'in all, at the peak':28}{in_bytes(memory['total']):>12}")
    lines.append(f"  of that as wide as the vocabulary: {in_bytes(memory['rows_at_peak'])}; the proposal's rebuilt rows: "
                 f"{in_bytes(memory['rebuilt_rows'])}")  # fmt: skip
    other = "without" if memory["activation_checkpointing"] else "with"
    lines.append(f"  in all {other} --{CHECKPOINTING}: {in_bytes(memory['total_if_checkpointing_were_otherwise'])}")
    lines.append(f"  a look at development prompts: {in_bytes(memory['evaluation'])}; free now: {in_bytes(memory['free'])}")
    cache = report["cache"]
    if caching is None:
        lines += [
            "",
            "nothing is cached: a head of all layers reads tokens" if head else "the proposal's rows come from endpoints",
        ]
    else:
        what = "hidden states" if "hidden_bytes_per_token" in cache else "rows"
        lines += ["", f"caching the proposal's {what} on {caching['device']} in {caching['dtype']}"]
        names = ("weights", "keys_and_values", "passing", "total")
        lines += [f"  {name.replace('_', ' '):28}{in_bytes(caching[name]):>12}" for name in names]
    taught = f" ({cache['teacher_bytes_per_token']} of a teacher's rows)" if "teacher_bytes_per_token" in cache else ""
    rows = f"{cache['bytes_per_token']} bytes a token{taught}, " if "bytes_per_token" in cache else ""
    states = f"hidden states of {cache['hidden_bytes_per_token']} bytes a token, " if "hidden_bytes_per_token" in cache else ""
    lines += ["", f"cache on disk: {rows}{states}{in_bytes(cache['bytes'])} in all"]
    for name, seconds in report["seconds"].items():
        flops, rate = report["flops"][name], report["rate"][name] / 1e12
        amount = "not known" if flops is None else f"{flops:.3g} operations"
        how = "assumed" if report["rate"]["assumed"] else "measured in a matrix product"
        lines.append(f"time for {name}: at least {in_time(seconds)} ({amount} at {rate:.3g} TFLOP/s, {how})")
    return "\n".join(lines)
