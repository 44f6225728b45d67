"""`trimtab propose`: samples from the proposal for every prompt of a data set."""

from dataclasses import dataclass
from typing import Any

from trimtab.cli.common import (
    ModelOptions,
    SamplingOptions,
    check_prompts,
    load_aligned_model,
    make_sampling_params,
    refuse_overwriting,
)
from trimtab.cli.options import option

__all__ = ["Options", "render", "run"]


@dataclass(frozen=True)
class Options(SamplingOptions):
    """Flags of `trimtab propose`."""

    proposal: str = option("", "the model to sample from: a folder or a hub id", required=True, metavar="P")
    dataset: str = option("", "data with a 'prompt' or 'messages'", required=True, metavar="D")
    dataset_split: str = option("train", "split of a hub data set")
    out: str = option("", "the data set to write; an interrupted run goes on", required=True, metavar="FILE")
    dtype: str = option("auto", "auto, float32, bfloat16 or float16")
    device: str | None = option(None, "cpu, cuda, cuda:1, or auto to spread [default: the first GPU, or the CPU]")
    max_num_seqs: int = option(32, "most completions drawn at once")


def run(options: Options) -> dict[str, Any]:
    """Sample and write."""
    from trimtab.train.propose import propose
    from trimtab.train.records import read_records

    params = make_sampling_params(options, seed=options.seed or 0)
    refuse_overwriting(options.out, options.dataset)
    records = read_records(options.dataset, need="prompt", split=options.dataset_split)
    model = load_aligned_model(
        ModelOptions(options.proposal, dtype=options.dtype, device=options.device, max_num_seqs=options.max_num_seqs)
    )
    check_prompts(model, records, params)
    rows = propose(model, records, options.out, params, batch_size=max(1, options.max_num_seqs // params.n))
    return {"out": options.out, "rows": rows, "seed": params.seed}


def render(report: dict[str, Any]) -> str:
    """Where the samples are."""
    return f"{report['rows']} samples in {report['out']}"
