"""Which settings a request is decoded with: its own, else the model's, else what its aligners' manifests say, else neutral."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from trimtab.core.logprobs import Warp
from trimtab.core.rules import Rule, parse_rule
from trimtab.decode.request import SamplingParams
from trimtab.decode.shaping import Shaping
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.knobs import KNOBS
from trimtab.models.aligner import Manifest

__all__ = ["settle", "with_weight"]


def settle(
    params: SamplingParams, defaults: SamplingParams, manifests: Sequence[Manifest | None], eos_token_ids: Sequence[int] = ()
) -> Shaping:
    """How a request's aligned row comes about.

    A manifest's weight belongs to the manifest's rule: under another rule, that rule's default weight counts.

    Args:
        params: what the request says.
        defaults: what the model says.
        manifests: what each of the request's aligners says; None for one that has no manifest.
        eos_token_ids: ids that end a completion.

    Raises:
        InvalidRequest: there are more weights than aligners, or fewer, or the rule has no law for them.
        InvalidOption: the manifests disagree about something that the request must then say.
    """
    count = len(manifests)
    rule = _rule(params, defaults, manifests)
    weight = params.weight if params.weight is not None else defaults.weight
    if weight is None:
        fallback = rule.default_weights(count)
        weights = tuple(
            m.weight if m is not None and m.weight is not None and parse_rule(m.rule) == rule else default
            for m, default in zip(manifests, fallback, strict=True)
        )
    else:
        numbers: Any = weight if isinstance(weight, Sequence) else [weight]
        weights = tuple(float(number) for number in numbers)
    if len(weights) != count and (count or params.weight is not None):
        raise InvalidRequest(f"weight has {len(weights)} numbers, but there are {count} aligners: give one for each")
    try:
        rule.check_weights(weights[:count])
    except InvalidOption as error:
        raise InvalidRequest(str(error)) from None
    temperatures = [_shared("aligner_temperature", params, defaults, [manifest]) for manifest in manifests]
    proposal = Warp(
        _shared("proposal_temperature", params, defaults, manifests),
        max(_shared("proposal_top_k", params, defaults, manifests), 0),
        _shared("proposal_top_p", params, defaults, manifests),
    )
    return Shaping(rule.bind(eos_token_ids), weights[:count], proposal, tuple(map(Warp, temperatures)))


def with_weight(manifest: Manifest | None, weight: float | None, rule: Rule | str | None, vocabulary: str) -> Manifest | None:
    """An aligner's manifest with the weight that an operator gives it.

    Args:
        manifest: its own, if it has one.
        weight: λ, or None to leave the manifest as it is.
        rule: the operator's default rule, to which the weight belongs; default: the manifest's.
        vocabulary: the tokenizer's fingerprint.

    Raises:
        InvalidOption: the rule has no law for the weight.
    """
    if weight is None:
        return manifest
    manifest = manifest or Manifest(vocabulary=vocabulary)
    said = manifest.rule if rule is None else str(rule)
    parse_rule(said).check_weights([weight])
    return dataclasses.replace(manifest, weight=weight, rule=said)


def _rule(params: SamplingParams, defaults: SamplingParams, manifests: Sequence[Manifest | None]) -> Rule:
    """The rule of a request: what it says itself, be it a rule or a hand-over, before what the model says."""
    said = params.asked_rule or defaults.asked_rule
    return said if said is not None else parse_rule(_shared("rule", params, defaults, manifests) or "product")


def _shared(name: str, params: SamplingParams, defaults: SamplingParams, manifests: Sequence[Manifest | None]) -> Any:
    """A setting that these aligners share; where nobody says anything, the neutral one, or None if there is none."""
    for source in (params, defaults):
        if getattr(source, name) is not None:
            return getattr(source, name)
    wanted = {getattr(m, name, None) for m in manifests if m is not None} - {None}
    if len(wanted) > 1:
        values = " and ".join(sorted(map(str, wanted)))
        raise InvalidOption(f"the aligners' manifests disagree on {name}: {values}; say which with {name}=")
    return next(iter(wanted), KNOBS[name].said.get("neutral"))
