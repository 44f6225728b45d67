"""Drafters with a reduced vocabulary: a few of a proposal's layers, and an output matrix of frequent tokens alone.

A drafter is worth what it costs, and most of what a small one costs is its output matrix. So it says only the few thousand
tokens that its training text is made of; the others have probability 0 in its rows, which the coupled draw takes as it takes
any other row (`trimtab.core.speculation`). (FR-Spec, arXiv 2502.14856.) The embedding is the proposal's own, shared.

On disk it is a folder with `trimtab_draft.json`, which names the one proposal that it fits; `config.json`, transformers' of a
model of so many layers; `model.safetensors`, the weights by transformers' names but for the embedding, `lm_head.weight`
`[N, H]` for N tokens, and `draft_token_ids` `[N]` int64, ascending: which tokens those are; and the tokenizer.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.core.logprobs import row_from_logits
from trimtab.errors import CheckpointError, ManifestError, UnsupportedModel
from trimtab.files import atomic_folder, read_json, write_json
from trimtab.models.base import LanguageModel
from trimtab.models.fingerprint import Files
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.layers import cut_config
from trimtab.models.loading import attention_for, check_finite, readable
from trimtab.reasons import reason_of

__all__ = ["REDUCED_NAME", "ReducedLM", "is_reduced", "load_reduced", "reduce_model", "save_reduced"]

REDUCED_NAME = "trimtab_draft.json"
FORMAT_VERSION = 1
TOKENS = "draft_token_ids"
WEIGHTS = "model.safetensors"
EMBEDDING = "model.embed_tokens.weight"
_FILES = (
    REDUCED_NAME,
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "chat_template.*",
    "special_tokens_map.json",
)


class ReducedLM(HuggingFaceLM):
    """A model that says some tokens only, as a `LanguageModel` of the whole vocabulary.

    Args:
        model: a transformers model whose output matrix has N rows.
        token_ids: `[N]` which tokens those are.
        vocab_size: V; the model reads all of them.
        how: as for `HuggingFaceLM`.
    """

    def __init__(self, model: Any, token_ids: Tensor, vocab_size: int, **how: Any) -> None:
        super().__init__(model, **how)
        shared = model.get_input_embeddings().weight
        self.num_bytes -= shared.numel() * shared.element_size()
        self.token_ids = token_ids.to(self.device)
        self.vocab_size = vocab_size

    def _rows(self, logits: Tensor) -> Tensor:
        """Log-probabilities `[B, K, V]`, −inf for what it does not say."""
        said = row_from_logits(logits, len(self.token_ids))
        rows = said.new_full((*said.shape[:-1], self.vocab_size), -torch.inf)
        return rows.index_copy_(-1, self.token_ids, said)


def reduce_model(model: Any, layers: Sequence[int], token_ids: Tensor) -> Any:
    """Copies of some of a model's layers, of its last norm and of some rows of its output matrix, around its own embedding.

    Args:
        model: a stock model with a lean pass (`trimtab.models.stock`), in float32; it stays as it is.
        layers: which ones, from 0.
        token_ids: `[N]` whose rows.
    """
    small = _shell(model, cut_config(model.config, layers), len(token_ids))
    body = model.model
    weights = {f"model.layers.{i}.{k}": w for i, at in enumerate(layers) for k, w in body.layers[at].state_dict().items()}
    weights |= {"model.norm.weight": body.norm.weight, "lm_head.weight": model.get_output_embeddings().weight[token_ids]}
    _fill(small, {name: weight.detach().clone() for name, weight in weights.items()})
    return small


def save_reduced(
    model: Any, token_ids: Tensor, proposal: str, tokenizer: Any, folder: Path, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a drafter's folder.

    Args:
        model: of `reduce_model`.
        token_ids: `[N]`.
        proposal: `HuggingFaceLM.digest` of the one that it fits.
        tokenizer: the proposal's.
        folder: where.
        weights: the model's, by name, where it does not hold them whole itself.
    """
    held = {name: weight for name, weight in (weights or model.state_dict()).items() if name != EMBEDDING}
    with atomic_folder(folder, superseded=_FILES) as new:
        tensors = {name: weight.detach().contiguous().cpu() for name, weight in held.items()}
        save_file({**tensors, TOKENS: token_ids.cpu().long()}, new / WEIGHTS, {"format": "pt"})
        model.config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / REDUCED_NAME, {"proposal": proposal, "format_version": FORMAT_VERSION})


def is_reduced(folder: Path) -> bool:
    """Whether a folder holds such a drafter."""
    return (folder / REDUCED_NAME).is_file()


def load_reduced(folder: Path, proposal: LanguageModel | None, name: str) -> ReducedLM:
    """A drafter beside its proposal, in the proposal's dtype, on its device, in 8 bits if it is.

    Args:
        folder: of `save_reduced`.
        proposal: whose embedding it reads; None where none is known.
        name: what to call the drafter in messages.

    Raises:
        UnsupportedModel: it is another proposal's.
        CheckpointError: a file is missing or broken.
        ManifestError: `trimtab_draft.json` cannot be read.
    """
    source = f"{name}/{REDUCED_NAME}"
    values = read_json(folder / REDUCED_NAME)
    if not isinstance(values, dict) or set(values) != {"proposal", "format_version"}:
        raise ManifestError(f"{source}: must hold {{'proposal': …, 'format_version': …}}, not {values!r}")
    if values["format_version"] != FORMAT_VERSION:
        raise ManifestError(
            f"{source}: format_version is {values['format_version']!r}, but this Trimtab reads {FORMAT_VERSION}"
        )
    if not isinstance(proposal, HuggingFaceLM) or proposal.digest != values["proposal"]:
        raise UnsupportedModel(
            f"'{name}' is the drafter of another proposal: it has no embedding of its own, and fits only the model that it was"
            " trained beside"
        )
    token_ids = _read_tokens(folder, proposal.vocab_size, name)
    load = partial(_read_model, folder, proposal.model, len(token_ids), name)
    model, files = Files.of(load, (folder, None))
    return ReducedLM(model, token_ids, proposal.vocab_size, owned=True, files=files, quantize=proposal.quantized)


def _read_tokens(folder: Path, vocab_size: int, name: str) -> Tensor:
    with readable(folder, "drafter"), safe_open(folder / WEIGHTS, "pt") as file:
        token_ids: Tensor = file.get_tensor(TOKENS)
    ascending = token_ids.ndim == 1 and len(token_ids) > 0 and bool((token_ids.diff() > 0).all())
    if not ascending or not 0 <= int(token_ids[0]) <= int(token_ids[-1]) < vocab_size:
        raise CheckpointError(f"'{name}': {TOKENS} must be ids from 0 to {vocab_size - 1}, ascending")
    return token_ids


def _read_model(folder: Path, proposal: Any, count: int, name: str) -> Any:
    from transformers import AutoConfig

    with readable(folder, "drafter"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        weights = load_file(folder / WEIGHTS, device=str(proposal.device))
    model = _shell(proposal, config, count)
    try:
        _fill(model, {key: weight.to(proposal.dtype) for key, weight in weights.items() if key != TOKENS})
    except RuntimeError as error:
        raise CheckpointError(f"'{name}': {WEIGHTS} does not fill the drafter: {reason_of(error)}") from None
    check_finite(model, name)
    return model


def _shell(proposal: Any, config: Any, count: int) -> Any:
    """A model without weights, but for the embedding and the rotations, which are the proposal's."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings, config._attn_implementation = False, attention_for(config)
    with torch.device("meta"):
        small = type(proposal)(config)
        small.set_output_embeddings(torch.nn.Linear(config.hidden_size, count, bias=False))
    small.set_input_embeddings(proposal.get_input_embeddings())
    small.model.rotary_emb = proposal.model.rotary_emb
    return small.eval()


def _fill(small: Any, weights: dict[str, Tensor]) -> None:
    """Give a shell its weights.

    Raises:
        RuntimeError: one is missing, of another shape, or none of its own.
    """
    missing, unexpected = small.load_state_dict(weights, strict=False, assign=True)
    if odd := [*(name for name in missing if name != EMBEDDING), *unexpected]:
        raise RuntimeError(f"{odd[0]} is {'missing' if odd[0] in missing else 'not one of its weights'}")
