"""Models that hold a text model among others, one for images say: the text model alone, out of the same files.

Gemma 3 from 4B on and Mistral Small are stored so. Prompts here are texts, and on those the text model is all that computes.
"""

import copy
import re
from typing import Any

from trimtab.errors import UnsupportedModel

__all__ = ["KEY_MAPPING", "text_config", "text_name"]

KEY_MAPPING = {
    r"^language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""From what the files call its tensors, in either of two ways, to what the text model does."""


def text_config(config: Any) -> Any:
    """The configuration of the text model in a composite one; any other as it is.

    Raises:
        UnsupportedModel: transformers has no class for the text model alone, or its weights are codes.
    """
    from transformers import AutoModelForCausalLM

    inner = getattr(config, "text_config", None)
    if inner is None or getattr(config, "max_position_embeddings", None) is not None:
        return config
    names = f"a '{config.model_type}' model holds a text model, '{inner.model_type}'"
    if AutoModelForCausalLM._model_mapping.get(type(inner), None) is None:
        raise UnsupportedModel(f"{names}, for which transformers has no class of its own")
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(f"{names}, and others; a quantised one is not taken apart: name the original model")
    text = copy.deepcopy(inner)
    text.dtype = text.dtype or config.dtype
    text.architectures = None
    text.tie_word_embeddings = config.tie_word_embeddings  # as transformers has it in the whole
    return text


def text_name(name: str) -> str:
    """What the text model calls a tensor of the files."""
    for pattern, wanted in KEY_MAPPING.items():
        name = re.sub(pattern, wanted, name)
    return name
