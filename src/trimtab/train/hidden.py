"""The proposal's hidden states on the training data, computed once and kept on disk: what a head reads instead of tokens.

They are the input of the head's first layer, for prompts and answers, in the proposal's own precision. So no pass of the
proposal is needed while a head is trained. The shards are as those of `trimtab.train.cache`.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.data.examples import Example, fingerprint_examples
from trimtab.decode.prefill import CHUNK, pad
from trimtab.decode.scoring import by_length
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train.cache import FORMAT_VERSION, SHARD, Shards, file_bytes, missing_shards, sharded
from trimtab.train.ranks import ALONE, Ranks
from trimtab.train.rows import BATCH, Proposal

__all__ = ["HiddenCache", "hidden_bytes", "hidden_states"]

logger = logging.getLogger(__name__)

CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""What safetensors calls dtypes."""


class HiddenCache:
    """Hidden states of a list of examples, on disk; made by `build`."""

    def __init__(self, folder: Path) -> None:
        self._shards = Shards(folder)

    def __getitem__(self, index: int) -> Tensor:
        """Those of one example `[T, H]`, of its prompt and its answer."""
        return self._shards.read(index, ("hidden",))[0]

    @classmethod
    def build(
        cls,
        folder: Path,
        proposal: Proposal,
        examples: Sequence[Example],
        *,
        tap: int,
        ranks: Ranks = ALONE,
    ) -> "HiddenCache":
        """Open the cache in `folder`, computing what is missing of it.

        Args:
            folder: where it is or goes.
            proposal: a model that runs here.
            examples: prompts and wanted answers.
            tap: the layer whose inputs they are.
            ranks: the processes that build it together, each a share of what is missing.

        Raises:
            CacheMismatch: the folder holds a cache for something else; the message says what differs.
        """
        model, source = proposal.model, proposal.rows
        assert model is not None
        key = {
            "format_version": FORMAT_VERSION,
            "proposal": source.fingerprint,
            "data": fingerprint_examples(examples),
            "tap": tap,
        }
        parts = sharded(examples)
        missing, who = ranks.first_does(lambda: missing_shards(folder, key, range(len(parts)), source))
        own = Shards(folder)
        for done, number in enumerate(missing[ranks.index :: ranks.count], 1):
            found = hidden_states(model, parts[number], tap)
            own.write(number, {"hidden": torch.cat(found)}, [len(each) for each in found], who)
            logger.info("kept hidden states, shard %d of %d", min(done * ranks.count, len(missing)), len(missing))
        ranks.wait()
        return cls(folder)


def hidden_bytes(tokens: Sequence[int], width: int, dtype: torch.dtype) -> list[int]:
    """The sizes of the shards that a cache of hidden states will have, in bytes, if their author needs no name.

    Args:
        tokens: the number of tokens in each example's prompt and answer.
        width: H.
        dtype: the proposal's.
    """
    parts = [tokens[start : start + SHARD] for start in range(0, len(tokens), SHARD)]
    return [file_bytes({"offsets": ("I64", [len(part) + 1]), "hidden": (CODES[dtype], [sum(part), width])}) for part in parts]


@torch.inference_mode()
def hidden_states(model: HuggingFaceLM, examples: Sequence[Example], tap: int) -> list[Tensor]:
    """For each example the input `[T, H]` of layer `tap` on its prompt and wanted answer, on the CPU; no layer above is run.

    A prompt that several examples have is read once.
    """
    places = _places(tuple(example.prompt) for example in examples)
    if len(places) == len(examples):  # then whole texts are one reading
        places = _places((*example.prompt, *example.chosen) for example in examples)
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    texts = list(places)
    for batch in by_length([len(text) for text in texts], BATCH):
        some = [texts[i] for i in batch]
        wholes = {i: [*examples[i].prompt, *examples[i].chosen] for text in some for i in places[text]}
        state = model.new_state(len(some), max(map(len, wholes.values())))
        before = _read(model, state, some, tap)
        flat = [(slot, i) for slot, text in enumerate(some) for i in places[text]]
        for start in range(0, len(flat), BATCH):
            part = flat[start : start + BATCH]
            rest = [wholes[i][len(some[slot]) :] for slot, i in part]
            behind = [before[slot][:0] for slot, _ in part]
            if any(rest):
                behind = _read(model, model.select(state, [slot for slot, _ in part]), rest, tap)
            for (slot, i), states in zip(part, behind, strict=True):
                found[i] = torch.cat([before[slot], states])
    return found


def _places(texts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Where each distinct text stands."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, text in enumerate(texts):
        places[text].append(i)
    return places


def _read(model: HuggingFaceLM, state: Any, texts: Sequence[Sequence[int]], tap: int) -> list[Tensor]:
    """Append a text to each slot; the inputs of the layer on each."""
    parts = []
    for begin in range(0, max(map(len, texts)), CHUNK):
        chunks = [text[begin : begin + CHUNK] for text in texts]
        tokens, counts = pad(chunks, model.device), [len(chunk) for chunk in chunks]
        parts.append(model.extend_below(state, tokens, counts, [tap])[tap].cpu())
    whole = torch.cat(parts, 1)
    return [states[: len(text)].clone() for text, states in zip(texts, whole, strict=True)]
