"""The proposal's log-probabilities on the training data, computed once and kept on disk.

For each token of a completion we keep the row's k most probable entries, the token's own, and the log of the mass of all
others: the *tail*. A row is rebuilt by spreading the tail evenly, so rebuilt rows are normalised, any rule takes them as it
takes exact ones, and what is lost is only how the tail was spread. (Without the tail bucket, training is ruined: RAM.md.) The
loss is measured while the cache is built: KL(exact‖rebuilt) in nats per token.

Shards are written one by one and whole, so a killed build goes on where it stopped. `cache.json` holds what the rows depend
on; a cache made for anything else is refused.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.core.logprobs import Warp, gather, warp
from trimtab.decode.scoring import completion_rows
from trimtab.errors import CacheMismatch, DataError
from trimtab.files import atomic_write, read_json, write_json
from trimtab.models.base import LanguageModel
from trimtab.train.examples import Example, fingerprint_examples

__all__ = ["CachedRows", "ProposalCache"]

logger = logging.getLogger(__name__)

SHARD = 256
"""Examples in a file."""

BATCH = 16
"""Examples in a forward pass."""


class CachedRows(NamedTuple):
    """Compressed rows of T tokens."""

    ids: Tensor
    """`[T, k]` int32, the most probable tokens."""
    logp: Tensor
    """`[T, k]` their log-probabilities."""
    token: Tensor
    """`[T]` int32, the completion's tokens."""
    token_logp: Tensor
    """`[T]` their log-probabilities."""
    tail: Tensor
    """`[T]` log of the mass of all other tokens."""

    def rebuild(self, vocab_size: int) -> Tensor:
        """Normalised rows `[T, V]`, the tail spread evenly."""
        ids, token = self.ids.long(), self.token.long().unsqueeze(-1)
        kept = ids.shape[-1] + (~(ids == token).any(-1, keepdim=True)).to(self.tail.dtype)
        spread = self.tail.unsqueeze(-1) - (vocab_size - kept).clamp(min=1).log()
        rows = spread.expand(*ids.shape[:-1], vocab_size).scatter(-1, ids, self.logp)
        return rows.scatter(-1, token, self.token_logp.unsqueeze(-1))


class ProposalCache:
    """Compressed rows of a list of examples, on disk; made by `build`."""

    def __init__(self, folder: Path, examples: int, vocab_size: int, facts: dict[str, Any]) -> None:
        self.folder, self.vocab_size, self.facts = folder, vocab_size, facts
        self._examples = examples
        self._open: dict[int, tuple[Any, list[int]]] = {}

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> CachedRows:
        """The rows of one example, read from disk."""
        number, place = divmod(index, SHARD)
        if number not in self._open:
            shard: Any = safe_open(self.folder / _shard_name(number), "pt")
            self._open[number] = shard, shard.get_tensor("offsets").tolist()
        shard, offsets = self._open[number]
        return CachedRows(*(shard.get_slice(name)[offsets[place] : offsets[place + 1]] for name in CachedRows._fields))

    @classmethod
    def build(
        cls,
        folder: Path,
        proposal: LanguageModel,
        fingerprint: str,
        vocabulary: str,
        examples: Sequence[Example],
        *,
        top_k: int,
        temperature: float = 1.0,
    ) -> "ProposalCache":
        """Open the cache in `folder`, computing what is missing of it.

        Args:
            folder: where it is or goes.
            proposal: P_M.
            fingerprint: of the proposal's weights, see `trimtab.models.fingerprint`.
            vocabulary: fingerprint of the tokenizer.
            examples: prompts and wanted answers.
            top_k: k; 0 keeps every entry, and the rows are exact.
            temperature: the proposal's temperature, applied before compression.

        Raises:
            CacheMismatch: the folder holds a cache for something else; the message says what differs.
        """
        size = proposal.vocab_size
        kept = min(top_k or size, size)
        key: dict[str, Any] = {
            "format_version": 1,
            "proposal": fingerprint,
            "vocabulary": vocabulary,
            "data": fingerprint_examples(examples),
            "top_k": kept,
            "temperature": temperature,
        }
        _check_key(folder, key)
        shards = range(-(-len(examples) // SHARD))
        missing = [number for number in shards if not _is_whole(folder / _shard_name(number))]
        if missing:
            logger.info("caching the proposal's log-probabilities: %d of %d shards in %s", len(missing), len(shards), folder)
        for done, number in enumerate(missing, 1):
            part = examples[number * SHARD : (number + 1) * SHARD]
            with atomic_write(folder / _shard_name(number), "wb") as stream:
                stream.write(save(_compress(proposal, part, kept, temperature)))
            logger.info("cached shard %d of %d", done, len(missing))
        return cls(folder, len(examples), size, _facts(folder, len(shards)))


def _compress(proposal: LanguageModel, examples: Sequence[Example], top_k: int, temperature: float) -> dict[str, Tensor]:
    """One shard's tensors; examples of like length go through the proposal together."""
    parts: list[list[CachedRows]] = [[] for _ in examples]
    losses = []
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt) + len(examples[i].chosen))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        pairs = [(examples[i].prompt, examples[i].chosen) for i in batch]
        for (rows,), tokens, counts in completion_rows([proposal], pairs):
            rows = warp(rows, Warp(temperature))
            compressed = _compress_rows(rows, tokens, top_k)
            for slot, count in enumerate(counts):
                parts[batch[slot]].append(CachedRows(*(column[slot, :count].cpu() for column in compressed)))
                rebuilt = CachedRows(*(column[slot, :count] for column in compressed)).rebuild(rows.shape[-1])
                exact = rows[slot, :count]
                losses.append((exact.exp() * torch.where(exact.isneginf(), 0.0, exact - rebuilt)).sum(-1).double().cpu())
    whole = [CachedRows(*(torch.cat(column) for column in zip(*part, strict=True))) for part in parts]
    tensors = {name: torch.cat([getattr(rows, name) for rows in whole]).contiguous() for name in CachedRows._fields}
    tensors["offsets"] = torch.tensor([0, *(len(rows.token) for rows in whole)]).cumsum(0)
    error = torch.cat(losses).clamp(min=0)
    tensors["error"] = torch.stack([error.sum(), error.max()])
    return tensors


def _compress_rows(rows: Tensor, tokens: Tensor, top_k: int) -> CachedRows:
    """Rows `[B, T, V]` and tokens `[B, T]`, compressed."""
    best = rows.topk(top_k, dim=-1)
    rest = rows.scatter(-1, best.indices, -torch.inf).scatter(-1, tokens.unsqueeze(-1), -torch.inf)
    return CachedRows(best.indices.int(), best.values, tokens.int(), gather(rows, tokens), rest.logsumexp(-1))


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    names = {
        "format_version": "another version of Trimtab",
        "proposal": "another proposal",
        "vocabulary": "another tokenizer",
        "data": "other data",
        "top_k": "another top_k",
        "temperature": "another proposal_temperature",
    }
    if not (folder / "cache.json").exists():
        write_json(folder / "cache.json", key)
        return
    try:
        found = dict(read_json(folder / "cache.json"))
    except (DataError, ValueError, TypeError) as error:
        raise CacheMismatch(f"{folder}/cache.json is no description of a cache ({error}): delete the folder") from None
    for name, meaning in names.items():
        if found.get(name) != key[name]:
            values = f" ({found.get(name)}, now {key[name]})" if name in ("top_k", "temperature") else ""
            raise CacheMismatch(f"the cache in {folder} was made for {meaning}{values}: delete the folder, or name another")


def _facts(folder: Path, shards: int) -> dict[str, Any]:
    """What the cache costs and loses, over all of its shards."""
    total, worst, tokens, size = 0.0, 0.0, 0, 0
    for number in range(shards):
        path = folder / _shard_name(number)
        size += path.stat().st_size
        with safe_open(path, "pt") as shard:
            one, most = shard.get_tensor("error").tolist()
            tokens += shard.get_tensor("offsets")[-1].item()
        total, worst = total + one, max(worst, most)
    return {"tokens": tokens, "bytes_per_token": size / tokens, "kl_per_token": total / tokens, "kl_worst_token": worst}


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as shard:
            return "error" in shard.keys()  # noqa: SIM118 - a safetensors file is not a mapping
    except (OSError, SafetensorError):
        return False


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
