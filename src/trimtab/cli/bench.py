"""`trimtab bench`: how fast aligned decoding is, beside what else one could do with the same models."""

import logging
from dataclasses import dataclass
from typing import Any

from trimtab.decode.options import ModelOptions, SamplingOptions, load_aligned_model, make_sampling_params
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.options import option, same

__all__ = ["Options", "render", "run"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options(ModelOptions):
    """Flags of `trimtab bench`."""

    batch: tuple[int, ...] = option((1,), "sequences decoded together; repeat the flag for several [default: 1]", low=1)
    context: tuple[int, ...] = option((32,), "tokens of each prompt; repeat the flag for several [default: 32]", low=1)
    max_tokens: int = same(SamplingOptions, "max_tokens", default=64, help="tokens generated for each prompt")
    temperature: float = same(SamplingOptions, "temperature")
    repeats: int = option(5, "timed runs of each contestant, after one to warm up", low=1)
    seed: int = same(SamplingOptions, "seed", default=0, help="of the prompts and of the draws")

    def idle(self) -> dict[str, str]:
        """The contestants run the aligner as it is."""
        return {"blend": "is for several aligners"} if self.blend == "weights" else {}


def run(options: Options) -> dict[str, Any]:
    """Load everything twice, once for the baselines, and let the contestants take turns."""
    if len(options.aligner) != 1:
        raise InvalidOption("bench wants exactly one --aligner")
    from transformers.utils import logging as transformers_logging

    from trimtab.evaluate.speed import Stock, describe_machine, load_stock, measure_speed, random_prompts

    transformers_logging.set_verbosity_error()  # `generate` with an assistant warns of what it does itself
    params = make_sampling_params(options)
    model = load_aligned_model(options)
    try:
        for context in options.context:
            model.prepare([0] * (context + options.max_tokens - 1), params)
    except InvalidRequest as error:
        raise InvalidOption(str(error)) from error
    sources = (options.proposal, options.dtype), (options.aligner[0], options.aligner_dtype or options.dtype)
    stock = Stock(*(load_stock(source, dtype, options.device) for source, dtype in sources))
    runs = []
    for batch in options.batch:
        for context in options.context:
            prompts = random_prompts(model.proposal.vocab_size, batch, context, options.seed)
            runs.append(measure_speed(model, stock, prompts, params, options.repeats))
            logger.info("measured batch %d, context %d", batch, context)
    settings = {"rule": str(model.shaping(params).rule), "temperature": options.temperature, "max_tokens": options.max_tokens}
    kept = {"dtype": stock.proposal.dtype, "aligner_dtype": stock.aligner.dtype}
    settings |= {name: str(dtype).removeprefix("torch.") for name, dtype in kept.items()} | {
        "quantize": options.quantize,
        "backend": options.backend,
    }
    return {**describe_machine(stock.proposal.device), **settings, **runs[0], "runs": runs}


def render(report: dict[str, Any]) -> str:
    """A table for each batch and context."""
    ours = [f"in {report['quantize']}" * bool(report["quantize"]), f"by {report['backend']}" * bool(report["backend"])]
    kept = f"{report['dtype']} and {report['aligner_dtype']}" + "".join(f", ours {how}" for how in ours if how)
    lines = [f"{report['hardware']}, {kept}, rule {report['rule']}, {report['max_tokens']} tokens a prompt"]
    for run in report["runs"]:
        lines += ["", f"batch {run['batch']}, context {run['context']}{'tokens/s':>18}{'× generate':>14}{'× our engine':>14}"]
        for name, speed in run["tokens_per_second"].items():
            ratio, own = run["ratio_to_proposal_hf"][name], run["ratio_to_proposal_engine"][name]
            lines.append(f"  {name:24}{speed:12.1f}{ratio:14.2f}{own:14.2f}")
        acceptance = "none" if run["acceptance"] is None else f"{run['acceptance']:.2f}"
        floor = "" if run["floor_ratio"] is None else f", {run['floor_ratio']:.1f} × the bandwidth floor"
        lines.append(
            f"  acceptance {acceptance}, draft length {run['draft_length']:.1f}, "
            f"{run['tokens_per_proposal_call']:.2f} tokens per proposal call{floor}; "
            f"first token {run['first_token_ms']:.0f} ms, then {run['next_token_ms']:.1f} ms"
        )
    return "\n".join(lines)
