"""Read a user's pairs, score them with a bank of aligners, fit the weights, and say how sure they are."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trimtab.core.user_weights import UserWeights, fit_user_weights
from trimtab.data.options import check_chats
from trimtab.data.records import read_records
from trimtab.data.template import refuse_idle_date
from trimtab.decode.options import load_aligned_model
from trimtab.decode.pairs import encode_pairs
from trimtab.errors import DataError
from trimtab.files import refuse_overwriting, write_json
from trimtab.users.features import check_rule, features_of
from trimtab.users.options import FitWeightsOptions

__all__ = ["described", "run"]

logger = logging.getLogger(__name__)

LEFT_OUT = 200
"""Most pairs of which each is left out once."""

FEW, MOSTLY = 5, 0.9
"""From so many pairs on it is said where lengths explain more than this share."""

Z = 1.959963984540054
"""Standard deviations on either side that hold .95 of a normal law."""


def run(options: FitWeightsOptions) -> dict[str, Any]:
    """What `trimtab.users.call.fit_weights` says of it holds."""
    if options.out is not None:
        refuse_overwriting(options.out, options.preferences)
    records = read_records(options.preferences, need="rejected", how=options, weights=True)
    check_chats(options, [record.prompt for record in records])
    model = load_aligned_model(options.models, options)
    refuse_idle_date(options.date, model.tokenizer)
    check_rule(model.shaping(model.defaults).rule)
    pairs, of = encode_pairs(records, model, leave_out_long=options.leave_out_long)
    if not pairs:
        raise DataError("no pair is left to fit weights on")
    features = features_of(model, pairs, [record.source for record in of])
    often = torch.tensor([record.weight for record in of], dtype=torch.float64)
    names = options.names
    prior = torch.tensor(options.weight or (0.0,) * len(names), dtype=torch.float64)
    how = {"beta": options.beta, "scale": options.prior_scale}
    fitted = fit_user_weights(features, prior, **how, counts=often)
    kept_out = []
    for i in range(len(pairs) if len(pairs) <= LEFT_OUT else 0):
        others = torch.arange(len(pairs)) != i
        without = fit_user_weights(features[others], prior, **how, counts=often[others])
        kept_out.append(float(without.mean @ features[i]))
    lengths = torch.tensor([len(pair.chosen) - len(pair.rejected) for pair in pairs], dtype=torch.float64)
    length = {name: _explained(column, lengths) for name, column in zip(names, features.T, strict=True)}
    for name, share in length.items():
        if len(pairs) >= FEW and share > MOSTLY:
            logger.warning(
                "what '%s' says of these answers is how long they are, to %.0f %%: so is its weight; see docs/users.md",
                name,
                100 * share,
            )
    report: dict[str, Any] = {
        **described(names, fitted),
        "pairs": len(pairs),
        "agree": {
            "before": _agrees(features @ prior, often),
            "fitted": _agrees(features @ fitted.mean, often),
            "left_out": _agrees(torch.tensor(kept_out, dtype=torch.float64), often) if kept_out else None,
        },
        "length": length,
        "prior": dict(zip(names, prior.tolist(), strict=True)),
        "prior_scale": options.prior_scale,
        "beta": options.beta,
        "rule": str(model.shaping(model.defaults).rule),
        "aligners": dict(zip(names, options.models.aligner, strict=True)),
        "left_out": len(records) - len(pairs),
    }
    if options.out is not None:
        write_json(options.out, report)
    return report


def described(names: Sequence[str], fitted: UserWeights) -> dict[str, Any]:
    """Weights, and where .95 of what they might be is, by name."""
    low, high = fitted.mean - Z * fitted.deviation, fitted.mean + Z * fitted.deviation
    spans = zip(low.tolist(), high.tolist(), strict=True)
    return {
        "weights": dict(zip(names, fitted.mean.tolist(), strict=True)),
        "interval": {name: list(span) for name, span in zip(names, spans, strict=True)},
    }


def _explained(values: Tensor, by: Tensor) -> float:
    """Which share of values' squares a multiple of others explains."""
    whole = float((values**2).sum() * (by**2).sum())
    return float((values * by).sum() ** 2) / whole if whole else 0.0


def _agrees(margins: Tensor, often: Tensor) -> float:
    """The share of pairs that are ranked as the user has it, each as often as it counts; a tie is half of one."""
    return float((((margins > 0).double() + (margins == 0).double() / 2) * often).sum() / often.sum())
