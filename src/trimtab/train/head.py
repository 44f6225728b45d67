"""Train a head: the proposal's upper layers as a model of their own, with a LoRA adapter, on cached hidden states.

What is trained is a transformers model of the same class with fewer layers, which shares them with the proposal; PEFT adapts it.
Saved, the adapter's layers have the proposal's numbers, so that PEFT loads it into the whole proposal.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import InvalidOption
from trimtab.models.head import Head, digest_proposal
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.weight_files import WEIGHTS_NAME, commit_of, folder_of
from trimtab.reasons import reason_of

__all__ = ["TrainedHead", "adapted_upper", "pick_tap", "upper_model"]

PREFIX = "base_model.model.model.layers."


def pick_tap(layers: int, head_layers: int | None) -> int:
    """The first layer that a head runs again.

    Args:
        layers: how many the proposal has.
        head_layers: how many the head is to run; None for half of them.

    Raises:
        InvalidOption: the proposal does not have so many.
    """
    wanted = (layers + 1) // 2 if head_layers is None else head_layers
    if not 1 <= wanted <= layers:
        raise InvalidOption(f"head_layers must be from 1 to {layers}, which is all that the proposal has, not {wanted}")
    return layers - wanted


def upper_model(model: Any, tap: int) -> Any:
    """A model of the layers from `tap` on, which it shares, that takes `inputs_embeds`: the hidden states before them."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers -= tap
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[tap:]
    with torch.device("meta"):
        upper = type(model)(config)
    upper.model.layers = torch.nn.ModuleList(model.model.layers[tap:])
    upper.model.norm, upper.model.rotary_emb = model.model.norm, model.model.rotary_emb
    upper.set_input_embeddings(model.get_input_embeddings())
    upper.set_output_embeddings(model.get_output_embeddings())
    return upper.requires_grad_(False).eval()


def adapted_upper(model: Any, tap: int, config: Any, seed: int) -> Any:
    """`upper_model` inside a PEFT model with fresh adapters of a configuration; the proposal's layers are then adapted, too."""
    from peft import get_peft_model

    with torch.random.fork_rng():  # adapters are initialised from the global generator: lend it a seed, put it back
        torch.default_generator.manual_seed(seed)
        try:
            return get_peft_model(upper_model(model, tap), config)
        except ValueError as error:
            raise InvalidOption(f"lora_target_modules: {reason_of(error)}") from error


class TrainedHead:
    """What an aligner's folder is written from.

    Args:
        model: the PEFT model around `upper_model`.
        proposal: the proposal's name.
        head: what the manifest says.
    """

    def __init__(self, model: Any, proposal: str, head: Head) -> None:
        self._model, self._proposal, self._head = model, proposal, head
        self.peft_config = model.peft_config

    def get_input_embeddings(self) -> Any:
        """The proposal's."""
        return self._model.get_input_embeddings()

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None, **_: Any) -> None:
        """Write the adapter as one of the whole proposal."""
        from peft import get_peft_model_state_dict

        trained = get_peft_model_state_dict(self._model, state_dict=None if state_dict is None else dict(state_dict))
        tap, layers = self._head.tap, self._head.layers
        renamed = {_lift(name, tap): weight.detach().contiguous().cpu() for name, weight in trained.items()}
        save_file(renamed, folder / WEIGHTS_NAME, {"format": "pt"})
        config = copy.copy(self.peft_config["default"])
        config.inference_mode = True
        config.layers_to_transform = list(range(tap, layers)) if tap else None
        config.base_model_name_or_path = str(Path(self._proposal).resolve()) if Path(self._proposal).exists() else self._proposal
        config.revision = commit_of(folder_of(self._proposal, None))
        config.save_pretrained(folder)


def describe_head(proposal: HuggingFaceLM, tap: int) -> Head:
    """What the manifest of a head of this proposal says."""
    return Head(tap, proposal.lean.depth, digest_proposal(proposal.model))


def _lift(name: str, tap: int) -> str:
    """A weight's name in the whole proposal."""
    if not name.startswith(PREFIX):
        raise InvalidOption(f"lora_target_modules: a head adapts its layers only, not {name}")
    number, rest = name.removeprefix(PREFIX).split(".", 1)
    return f"{PREFIX}{int(number) + tap}.{rest}"
