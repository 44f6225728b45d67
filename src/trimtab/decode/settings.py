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

    A manifest's weight belongs to the manifest's rule: under another rule, that rule's default weight counts. Where the
    aligners' weights are blended, there is one aligner, and what their manifests say of it must be the same.

    Args:
        params: what the request says.
        defaults: what the model says.
        manifests: what each of the request's aligners says; None for one that has no manifest.
        eos_token_ids: ids that end a completion.

    Raises:
        InvalidRequest: there are more weights than aligners, or fewer, or the rule has no law for them; or a blend has none, or
            nothing to blend.
        InvalidOption: the manifests disagree about something that the request must then say.
    """
    count = len(manifests)
    rule = _rule(params, defaults, manifests)
    said = params.weight if params.weight is not None else defaults.weight
    numbers: Any = said if isinstance(said, Sequence) else [said]
    blend, weights = _blend(params, defaults, count), _weights(rule, manifests)
    if said is not None:
        weights = tuple(float(number) for number in numbers)
        if len(weights) != count and (count or params.weight is not None):
            raise InvalidRequest(f"weight has {len(weights)} numbers, but there are {count} aligners: give one for each")
    elif blend and count > 1:
        raise InvalidRequest("blend: weight is missing: give one number for each aligner")
    temperatures = [
        _shared("aligner_temperature", params, defaults, group)
        for group in ([manifests] if blend else [[manifest] for manifest in manifests])
    ]
    proposal = Warp(
        _shared("proposal_temperature", params, defaults, manifests),
        max(_shared("proposal_top_k", params, defaults, manifests), 0),
        _shared("proposal_top_p", params, defaults, manifests),
    )
    mixed, shares = weights[:count], None
    if blend:
        strength = params.rule_weight if params.rule_weight is not None else defaults.rule_weight
        mixed = (float(_same_weight(_weights(rule, manifests)) if strength is None else strength),)
        shares = weights if said is not None else (1.0,)
    try:
        rule.check_weights(mixed)
    except InvalidOption as error:
        raise InvalidRequest(str(error)) from None
    return Shaping(rule.bind(eos_token_ids), mixed, proposal, tuple(map(Warp, temperatures)), blend=shares)


def _blend(params: SamplingParams, defaults: SamplingParams, count: int) -> bool:
    """Whether so many aligners' weights are blended; a bare proposal's request may have nothing to say of it."""
    blends = _shared("blend", params, defaults, ()) == "weights"
    if not count and params.blend == "weights":
        raise InvalidRequest("blend: there is no aligner whose weights could be blended: name one, or leave blend out")
    if params.rule_weight is not None and not (blends and count):
        raise InvalidRequest("rule_weight is the strength of aligners that blend='weights' makes one: use weight without it")
    return blends and count > 0


def _weights(rule: Rule, manifests: Sequence[Manifest | None]) -> tuple[float, ...]:
    """λ of each aligner where nobody says one: its manifest's, which belongs to the manifest's rule, or the rule's own."""
    return tuple(
        m.weight if m is not None and m.weight is not None and parse_rule(m.rule) == rule else default
        for m, default in zip(manifests, rule.default_weights(len(manifests)), strict=True)
    )


def _same_weight(weights: Sequence[float]) -> float:
    """The strength of aligners that are blended, if they agree on it."""
    if len(set(weights)) > 1:
        values = " and ".join(map(str, sorted(set(weights))))
        raise InvalidOption(f"the aligners' manifests disagree on weight: {values}; say which with rule_weight=")
    return weights[0]


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
