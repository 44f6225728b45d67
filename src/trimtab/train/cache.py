"""The proposal's log-probabilities on the training data, computed once and kept on disk.

What is kept of a row is in `trimtab.train.rows`. What that loses is measured while the cache is built, where the exact rows are
at hand.

Shards are written one by one and whole, so a killed build goes on where it stopped. `cache.json` holds what the rows depend
on; a cache made for anything else is refused.
"""

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trimtab.data.examples import Example, fingerprint_examples
from trimtab.errors import CacheMismatch, DataError
from trimtab.files import atomic_write, read_json, write_json
from trimtab.train.ranks import ALONE, Ranks
from trimtab.train.rows import CachedRows, Compressed, Layout, RowSource, TaughtRows

__all__ = [
    "FORMAT_VERSION",
    "ProposalCache",
    "Shards",
    "bytes_per_token",
    "file_bytes",
    "missing_shards",
    "shard_bytes",
    "sharded",
]

logger = logging.getLogger(__name__)

FORMAT_VERSION = 3

SHARD = 256
"""Examples in a file."""

MOST_OPEN = 64
"""Files that are open at once."""


class Shards:
    """Files of what belongs to each token of a list of examples, a few hundred examples in each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, tuple[Any, list[int]]] = OrderedDict()

    def read(self, index: int, names: Sequence[str]) -> list[Tensor]:
        """Of one example, read from disk: what has these names, `[T, …]`."""
        number, place = divmod(index, SHARD)
        shard, offsets = self._shard(number)
        return [shard.get_slice(name)[offsets[place] : offsets[place + 1]] for name in names]

    def write(self, number: int, tensors: Mapping[str, Tensor], lengths: Sequence[int], who: str) -> None:
        """Write one file whole: the examples' tensors end to end, and where each begins."""
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        whole["offsets"] = torch.tensor([0, *lengths]).cumsum(0)
        with atomic_write(self._folder / _shard_name(number), "wb") as stream:
            stream.write(save(whole, {"who": who}))

    def _shard(self, number: int) -> tuple[Any, list[int]]:
        """An open file and where in it each example begins; the one that was idle longest is closed for it."""
        if number not in self._open:
            shard: Any = safe_open(self._folder / _shard_name(number), "pt")
            self._open[number] = shard, shard.get_tensor("offsets").tolist()
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]


class ProposalCache:
    """Compressed rows of a list of examples, on disk; made by `build`.

    Attributes:
        kind: what rows they are.
        losses: what `facts` call their error, see `Compressed`: its mean and largest; that of log Z, and its root mean square.
        of: what the latter are errors of.
    """

    kind: type[CachedRows] | type[TaughtRows] = CachedRows
    losses: tuple[str, str, str, str] = ("kl_per_token", "kl_worst_token", "log_z_error", "log_z_error_rms")
    of = "log Z for a copy of the proposal"

    def __init__(self, folder: Path, examples: int, vocab_size: int, facts: dict[str, Any]) -> None:
        self.folder, self.vocab_size, self.facts = folder, vocab_size, facts
        self._examples, self._shards = examples, Shards(folder)

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, index: int) -> Any:
        """The rows of one example, read from disk."""
        return self.kind(*self._shards.read(index, self.kind._fields))

    @staticmethod
    def columns(layout: Layout) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """What a token has of each field."""
        numbers: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "logp": (torch.float32, (layout.top_k,)),
            "tail": (torch.float32, ()),
            "token_logp": (torch.float32, ()),
        }
        return numbers | {
            "ids": (torch.int32, (layout.top_k,)),
            "samples": (torch.int32, (layout.samples,)),
            "token": (torch.int32, ()),
        }

    @classmethod
    def build(
        cls,
        folder: Path,
        source: RowSource,
        vocabulary: str,
        examples: Sequence[Example],
        *,
        layout: Layout,
        temperature: float = 1.0,
        ranks: Ranks = ALONE,
    ) -> Self:
        """Open the cache in `folder`, computing what is missing of it.

        Args:
            folder: where it is or goes.
            source: who has P_M's rows.
            vocabulary: fingerprint of the tokenizer.
            examples: prompts and wanted answers.
            layout: what to keep of a row; with every entry, the rows are exact.
            temperature: the proposal's temperature, applied before compression.
            ranks: the processes that build it together, each a share of what is missing.

        Raises:
            CacheMismatch: the folder holds a cache for something else; the message says what differs.
        """
        key: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "proposal": source.fingerprint,
            "vocabulary": vocabulary,
            "data": fingerprint_examples(examples),
            "top_k": layout.top_k,
            "tail_samples": layout.samples,
            "temperature": temperature,
        }
        parts = sharded(examples)
        missing, who = ranks.first_does(lambda: missing_shards(folder, key, range(len(parts)), source))
        own = Shards(folder)
        for done, number in enumerate(missing[ranks.index :: ranks.count], 1):
            found = source.compress(parts[number], layout, temperature)
            own.write(number, _tensors(found), [len(row.ids) for row in found.rows], who)
            logger.info("cached shard %d of %d", min(done * ranks.count, len(missing)), len(missing))
        ranks.wait()
        return cls(folder, len(examples), source.vocab_size, ranks.first_does(lambda: _facts(folder, len(parts), cls.losses)))


def sharded(examples: Sequence[Example]) -> list[Sequence[Example]]:
    """What goes into each file."""
    return [examples[start : start + SHARD] for start in range(0, len(examples), SHARD)]


def missing_shards(folder: Path, key: dict[str, Any], shards: range, source: RowSource) -> tuple[list[int], str]:
    """The shards that are still to be made, and who makes them; refuses a cache for something else."""
    _check_key(folder, key)
    missing = [number for number in shards if not _is_whole(folder / _shard_name(number))]
    if not missing:
        return [], ""
    logger.info("caching what the proposal says: %d of %d shards in %s", len(missing), len(shards), folder)
    who = source.who()
    _check_authors(folder, who, [number for number in shards if number not in missing])
    return missing, who


def _tensors(compressed: Compressed) -> dict[str, Tensor]:
    """One shard."""
    rows = compressed.rows
    return {name: torch.cat([getattr(row, name) for row in rows]) for name in rows[0]._fields} | {"error": compressed.error}


def shard_bytes(tokens: Sequence[int], layout: Layout, kind: type[ProposalCache] = ProposalCache) -> list[int]:
    """The sizes of the shards that a cache of examples will have, in bytes, if their author needs no name.

    Args:
        tokens: the number of tokens in each example's wanted answer.
        layout: what is kept of a row.
        kind: of the cache.
    """
    sizes = []
    for start in range(0, len(tokens), SHARD):
        part = tokens[start : start + SHARD]
        shapes = {"offsets": ("I64", [len(part) + 1]), "error": ("F64", [4])}
        columns = kind.columns(layout).items()
        for dtype, letter in ((torch.float32, "F32"), (torch.int32, "I32")):  # in safetensors' order, each sorted by name
            shapes |= {name: (letter, [sum(part), *shape]) for name, (found, shape) in sorted(columns) if found == dtype}
        sizes.append(file_bytes(shapes))
    return sizes


def file_bytes(shapes: Mapping[str, tuple[str, Sequence[int]]]) -> int:
    """The size of a shard whose author needs no name, from what safetensors calls its dtypes, and shapes, in its order."""
    end, header = 0, {"__metadata__": {"who": ""}}
    for name, (code, sides) in shapes.items():
        size = math.prod(sides) * int("".join(filter(str.isdigit, code))) // 8
        header[name] = {"dtype": code, "shape": list(sides), "data_offsets": [end, end + size]}  # type: ignore[dict-item]
        end += size
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end  # the header's length, the header in whole words, the data


def bytes_per_token(layout: Layout, kind: type[ProposalCache] = ProposalCache) -> int:
    """What a token takes in a shard, header and offsets apart."""
    return 4 * sum(math.prod(shape) for _, shape in kind.columns(layout).values())


def _check_key(folder: Path, key: dict[str, Any]) -> None:
    names = {
        "format_version": "another version of Trimtab",
        "proposal": "another proposal",
        "vocabulary": "another tokenizer",
        "data": "other data",
        "top_k": "another top_k",
        "tail_samples": "another number of tail_samples",
        "temperature": "another proposal_temperature",
        "tap": "another number of head_layers",
    }
    if not (folder / "cache.json").exists():
        write_json(folder / "cache.json", key)
        return
    try:
        found = dict(read_json(folder / "cache.json"))
    except (DataError, ValueError, TypeError) as error:
        raise CacheMismatch(f"{folder}/cache.json is no description of a cache ({error}): delete the folder") from None
    for name, meaning in names.items():
        if found.get(name) != key.get(name):
            values = f" ({found.get(name)}, now {key[name]})" if name in ("top_k", "tail_samples", "temperature") else ""
            raise CacheMismatch(f"the cache in {folder} was made for {meaning}{values}: delete the folder, or name another")


def _check_authors(folder: Path, who: str, whole: Sequence[int]) -> None:
    """Refuse to add shards to those of another model of the same fingerprint."""
    for number in whole:
        with safe_open(folder / _shard_name(number), "pt") as shard:
            found = (shard.metadata() or {}).get("who", "")
        if found != who:
            raise CacheMismatch(
                f"the cache in {folder} was begun for another proposal ({found}, now {who}): delete it, or name another folder"
            )


def _facts(folder: Path, shards: int, losses: Sequence[str]) -> dict[str, Any]:
    """What the cache costs and loses, over all of its shards; the loss is None where it is not known.

    In nats: `kl_per_token` and `kl_worst_token` are KL(exact‖rebuilt), the tail spread evenly even where there are draws.
    `log_z_error` and `log_z_error_rms` are the mean error of log Z and its root mean square, with the draws if there are any,
    for an aligner that is a copy of the proposal. `TaughtRows` have others.
    """
    sums, worst, tokens, size = torch.zeros(3, dtype=torch.float64), 0.0, 0, 0
    for number in range(shards):
        path = folder / _shard_name(number)
        size += path.stat().st_size
        with safe_open(path, "pt") as shard:
            error = shard.get_tensor("error")
            tokens += shard.get_tensor("offsets")[-1].item()
        sums, worst = sums + error[[0, 2, 3]], max(worst, error[1].item())
    mean, error, squares = (sums / tokens).tolist()
    lost = dict(zip(losses, (mean, worst, error, math.sqrt(squares)), strict=True))
    return {"tokens": tokens, "bytes_per_token": size / tokens} | {k: None if math.isnan(mean) else v for k, v in lost.items()}


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as shard:
            return "offsets" in shard.keys()  # noqa: SIM118 - a safetensors file is not a mapping
    except (OSError, SafetensorError):
        return False


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"
