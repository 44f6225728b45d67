"""What a training run needs of its proposal: rows for the cache, and little else. Its weights are not needed for the rest."""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

from trimtab.models.fingerprint import Files
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_configs, load_model
from trimtab.models.masks import context_of
from trimtab.models.vocabulary import find_eos_token_ids, vocabulary_size
from trimtab.train.endpoint_rows import EndpointRows
from trimtab.train.options import TrainOptions
from trimtab.train.rows import ModelRows, RowSource

__all__ = ["Proposal", "open_proposal"]


class Proposal(NamedTuple):
    """A proposal as training sees it."""

    rows: RowSource
    context: int
    """The most tokens of a prompt and its answer."""
    eos_token_ids: tuple[int, ...]
    model: HuggingFaceLM | None
    """The model itself, if it runs here."""


def open_proposal(options: TrainOptions, tokenizer: Any) -> Proposal:
    """Load the model; or, where endpoints have it, no more than its configuration."""
    if not options.proposal_endpoint:
        load = partial(load_model, options.proposal, dtype=options.dtype, device=options.device)
        model, files = Files.of(load, (options.proposal, None))
        ends = find_eos_token_ids(model, tokenizer)
        here = HuggingFaceLM(model, vocabulary_size(tokenizer))
        return Proposal(ModelRows(here, files.fingerprint, ends), context_of(model.config), ends, here)
    config, generation = load_configs(options.proposal)
    described = SimpleNamespace(config=config, generation_config=generation)
    remote = EndpointRows(options.proposal_endpoint, options.limits, options.proposal, vocabulary_size(tokenizer))
    context = context_of(config.get_text_config()) - 1  # vLLM does not score without drawing a token
    return Proposal(remote, context, find_eos_token_ids(described, tokenizer), None)
