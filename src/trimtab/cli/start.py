"""`trimtab start`: an aligner's start out of some of a proposal's own layers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.data.options import idle_for_files
from trimtab.files import check_writable
from trimtab.models.estimates import DryRunOptions, describe_model, describe_size, model_weights
from trimtab.train.sibling_options import StartOptions

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(DryRunOptions, StartOptions):
    """Flags of `trimtab start`."""

    def idle(self) -> dict[str, str]:
        """What is for a data set, for samples or for a proposal that runs here."""
        idle = idle_for_files(self.dataset)
        if self.dataset is None:
            idle |= dict.fromkeys(("columns", "max_examples", "expected_examples"), "needs --dataset")
        if self.answers == "given":
            idle |= dict.fromkeys(("samples", "max_tokens", "max_num_seqs"), "is for --answers samples")
        return idle


def run(options: Options) -> dict[str, Any]:
    """Pick, sample, distil, save; or say what that will take."""
    from trimtab.models.loading import quiet_loading
    from trimtab.train.sibling import make_start

    quiet_loading()
    check_writable(options.out, folder=True)
    if options.dry_run:
        return _rehearse(options)
    report = make_start(options)
    report.pop("history")
    return {"out": options.out, **report}


def _rehearse(options: Options) -> dict[str, Any]:
    """Which layers would be taken, how large the start would be, and what it would be distilled on."""
    import torch
    from transformers import AutoModelForCausalLM

    from trimtab.data.at_hand import count_records
    from trimtab.models.layers import cut_config, parse_layers
    from trimtab.models.loading import attention_for
    from trimtab.models.shapes import find_config
    from trimtab.train.arguments import training_arguments
    from trimtab.train.folder import refuse_foreign

    training_arguments(options.plan)
    refuse_foreign(Path(options.out), options.overwrite_output_dir, "out")
    config = find_config(options.proposal, options.expected_proposal).config
    layers = parse_layers(options.layers, config.num_hidden_layers)
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(cut_config(config, layers), attn_implementation=attention_for(config))
    data = None
    if options.dataset is not None:
        given = options.answers == "given"
        data = count_records(options.dataset, options, options.max_examples, options.expected_examples, answers=given)
    sampled = options.answers == "samples"
    return {
        "dry_run": True,
        "out": options.out,
        "proposal": model_weights(options.proposal, options.expected_proposal, options.dtype),
        "layers": list(layers),
        "of_layers": config.num_hidden_layers,
        "start": {"parameters": small.num_parameters(), "weights": 4 * small.num_parameters(), "dtype": "float32"},
        "data": data,
        "answers": options.samples if sampled else data and data["examples"],
        "most_tokens": options.samples * options.max_tokens if sampled else None,
    }


def render(report: dict[str, Any]) -> str:
    """How far the start is from the proposal, before and after it was distilled."""
    if "dry_run" in report:
        return _render_rehearsal(report)
    before, after = report["before"], report["metrics"]
    lines = [f"start in {report['out']}: {_layers(report)}, {report['parameters']:,} parameters", ""]
    lines.append(f"{'on development prompts':24}{'picked':>10}{'distilled':>12}")
    names = ("nll_proposal", "nll_start", "kl_proposal_start", "acceptance_on_answers")
    lines += [f"{name:24}{before[f'eval_{name}']:10.4f}{after[f'eval_{name}']:12.4f}" for name in names]
    return "\n".join(lines)


def _layers(report: dict[str, Any]) -> str:
    numbers = report["layers"]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of {report['of_layers']}"


def _render_rehearsal(report: dict[str, Any]) -> str:
    proposal, data = report["proposal"], report["data"]
    lines = [f"proposal  {describe_model(proposal)}", f"          {describe_size(proposal)}"]
    lines += [f"start     {_layers(report)}", f"          {describe_size(report['start'])}"]
    if data is not None:
        lines.append("data      " + ("at hand" if data["at_hand"] else f"not at hand: {data['why_not']}"))
    elif report["most_tokens"]:
        lines.append("data      none: the proposal says the prompts, too")
    answers = "a number that is not known" if report["answers"] is None else f"{report['answers']:,}"
    tokens = "" if report["most_tokens"] is None else f", drawn with at most {report['most_tokens']:,} tokens"
    lines.append(f"answers   {answers}{tokens}")
    return "\n".join(lines)
