"""Which transformers models our engine decodes: decoders of attention by positions, and of layers that keep a state."""

import math
from typing import Any

from trimtab.errors import UnsupportedModel
from trimtab.models.masks import MIXED, STATEFUL, TOKENWISE, WHOLE, WINDOWED, is_recurrent, sights_of
from trimtab.models.trial import WAY_OUT

__all__ = ["SUPPORTED", "check_supported"]

UNLIKE = {
    "is_causal": (True, "it sees what comes later"),
    "use_bidirectional_attention": (False, "it sees what comes later"),
    "alibi": (False, "its positions are biases, which are not passed on"),
    "attn_temperature_tuning": (False, "it scales queries by the longest sequence of a batch"),
}
"""Settings that take a family off attention by positions, with the value that does not, and why."""

STEP_LIMITS = (0.0, math.inf)
"""Those that are none."""

SUPPORTED = tuple(sorted((*WHOLE, *WINDOWED, *MIXED, *STATEFUL, *TOKENWISE)))
"""`model_type` of the architectures that pass the contract suite; tests/models/test_contract.py runs each of them."""


def check_supported(config: Any) -> None:
    """Refuse a configuration that ragged slots would decode wrongly.

    Raises:
        UnsupportedModel: it is no decoder with attention of positions alone, or a setting takes it off that.
    """
    name = config.model_type
    keeps_states = is_recurrent(config)
    context = getattr(config, "max_position_embeddings", None)
    if getattr(config, "is_encoder_decoder", False) or (context is None and not keeps_states):
        if getattr(config, "text_config", None) is not None:
            raise UnsupportedModel(f"a '{name}' model holds a text model and others; only text models run: name one; {WAY_OUT}")
        raise UnsupportedModel(
            f"a '{name}' model is no decoder of attention layers with a context of max_position_embeddings; {WAY_OUT}"
        )
    if getattr(config, "is_heterogeneous", False):
        raise UnsupportedModel("per_layer_config: layers that are not all alike are not supported")
    sights_of(config)
    rope = getattr(config, "rope_parameters", None) or {}
    each = [one for one in (rope, *rope.values()) if isinstance(one, dict)]  # there may be one for each kind of layer
    kinds = {str(one.get("rope_type")) for one in each}
    if wrong := sorted(kinds & {"dynamic", "longrope"}):
        raise UnsupportedModel(f"rope type '{wrong[0]}' makes positions depend on the rest of the batch; it is not supported")
    for field, (plain, why) in UNLIKE.items():
        if (said := getattr(config, field, None)) not in (plain, None):
            raise UnsupportedModel(f"{field} is {said} in this '{name}' model, which is not supported: {why}")
    if tuple(getattr(config, "time_step_limit", None) or STEP_LIMITS) != STEP_LIMITS:
        raise UnsupportedModel(
            f"time_step_limit is {config.time_step_limit} in this '{name}' model, which is not supported: transformers heeds it"
            " in texts that are read at once, and not token by token"
        )
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModel(f"this '{name}' model has cross-attention; only decoders are supported")
