"""What the cache of the proposal's rows costs and loses: bytes a token, and the error in the aligned model's NLL.

For each k, rows are rebuilt from k entries and the tail, spread evenly or (for `product`) on S draws from it, and combined with
the aligner's, both at the temperatures of its manifest. The wanted tokens' NLL is compared with that from exact rows: the error
of the mean, which is what a loss or a metric shows, and of one token.

    python benchmarks/cache_error.py --proposal P --aligner A --dataset held_out.jsonl --weight 1.0
"""

import argparse
import json

import torch

from trimtab.core.logprobs import gather, warp
from trimtab.core.rules import Product
from trimtab.data.examples import encode_records
from trimtab.data.records import read_records
from trimtab.decode.aligned import AlignedModel
from trimtab.decode.scoring import completion_rows
from trimtab.hardware import describe_hardware
from trimtab.train.cache import bytes_per_token
from trimtab.train.rows import Layout, compress, tail_points


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--aligner", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weight", type=float, help="the rule's [default: the aligner's own]")
    parser.add_argument("--top_k", type=int, nargs="+", default=[16, 32, 64, 120, 128])
    parser.add_argument("--samples", type=int, nargs="+", default=[0, 32, 64, 128])
    parser.add_argument("--examples", type=int, default=200)
    options = parser.parse_args()
    model = AlignedModel.from_pretrained(options.proposal, options.aligner)
    proposal, (aligner,) = model.proposal, model.aligners
    shaping = model.shaping(model.defaults)
    rule, weight = shaping.rule, torch.tensor([shaping.weights[0] if options.weight is None else options.weight])
    ends = model.eos_token_ids
    examples = encode_records(read_records(options.dataset), model.encoder, 512)[: options.examples]
    samples = options.samples if isinstance(rule, Product) else [0]
    errors: dict[Layout, list[torch.Tensor]] = {Layout(k, s): [] for k in options.top_k for s in samples}
    exact_nll = []
    for example in examples:
        for rows, tokens, _ in completion_rows([proposal, aligner], [(example.prompt, example.chosen)]):
            logp, logq = (warp(row, how) for row, how in zip(rows, (shaping.proposal, *shaping.aligners), strict=True))
            nll = -gather(rule.target(logp[0], [logq[0]], weight), tokens[0]).double()
            exact_nll.append(nll)
            for layout, found in errors.items():
                points = tail_points(example, layout.samples).to(logp.device)
                rebuilt = compress(logp[0], tokens[0], layout.top_k, points, ends).rebuild(proposal.vocab_size)
                found.append(-gather(rule.target(rebuilt, [logq[0]], weight), tokens[0]).double() - nll)
    print(
        json.dumps(
            {
                "hardware": describe_hardware(),
                "rule": str(rule),
                "weight": float(weight),
                "vocabulary": proposal.vocab_size,
                "tokens": sum(len(part) for part in exact_nll),
                "nll": round(float(torch.cat(exact_nll).mean()), 4),
                "kept": [
                    layout._asdict()
                    | {
                        "bytes_per_token": bytes_per_token(layout),
                        "nll_error": round(float(torch.cat(found).mean()), 6),
                        "mean_token_error": round(float(torch.cat(found).abs().mean()), 6),
                        "worst_token_error": round(float(torch.cat(found).abs().max()), 4),
                    }
                    for layout, found in errors.items()
                ],
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
