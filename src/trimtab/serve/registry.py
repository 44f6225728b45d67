"""The aligners of a server: which there are, which are in memory, and how a request's models come about.

An aligner is known by name until it is unloaded. Its weights may leave memory before that, when others need the room (the
longest unused first, pinned ones never), and come back with the next request that names it. A request holds on to the
version that it started with, so replacing, unloading or evicting an aligner never touches what is running. What running
requests so hold comes on top of the budget, until they end.

An aligner whose path is a link, as a loop's `current` is (`trimtab.loop`), is loaded anew when the link leads elsewhere.
"""

import logging
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.assemble import Loaded, Loader
from trimtab.decode.draft import who_drafts
from trimtab.decode.settings import with_weight
from trimtab.errors import InvalidRequest, TrimtabError
from trimtab.files import expand_home
from trimtab.models.adapter_folder import Base, base_of, is_adapter
from trimtab.models.aligner import is_head
from trimtab.models.gguf import is_gguf
from trimtab.models.reduced import is_reduced
from trimtab.models.vocabulary import fingerprint_vocabulary

__all__ = ["Entry", "NoSuchAligner", "NoSuchFolder", "OutOfMemory", "Registry"]

logger = logging.getLogger(__name__)

MAX_COMBINATIONS = 1000
"""Combinations of aligners whose models are remembered; making one anew costs microseconds."""


class NoSuchAligner(TrimtabError):
    """A name that no aligner has."""


class NoSuchFolder(TrimtabError):
    """A client's path that is not, or is not inside, what the server lets clients load from: it does not learn which."""


class OutOfMemory(TrimtabError):
    """An aligner that the memory budget has no room for, whatever else would go."""


@dataclass
class Entry:
    """One aligner.

    Attributes:
        name: what requests call it.
        path: where it was loaded from.
        target: where the path led to then, if it is a link.
        weight: its λ where neither request nor manifest says one, or None.
        pinned: never evicted.
        loaded: its weights, or None while it is evicted.
        created: when it became known, in seconds since 1970.
        used: when a request last named it, in seconds of the monotonic clock.
    """

    name: str
    path: str
    weight: float | None = None
    pinned: bool = False
    loaded: Loaded | None = None
    target: Path | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    used: float = field(default_factory=time.monotonic)


class Registry:
    """Aligners by name. Methods that load block; all may be called from any thread.

    Args:
        base: the bare proposal.
        loader: loads aligners for it.
        max_bytes: what aligners may take in memory together, the shared bases of adapters included; None for no limit.
        root: the folder that `load` with `inside=True` may read; None forbids it. Adapters from there may have their bases
            there, or among what else was loaded: nowhere else, and not on the hub.
    """

    def __init__(
        self,
        base: AlignedModel,
        loader: Loader,
        *,
        max_bytes: int | None = None,
        root: Path | None = None,
    ) -> None:
        self.base = base
        self._loader, self._max_bytes = loader, max_bytes
        loader.proposal = base.proposal
        self._root = None if root is None else root.resolve(strict=True)
        self._trusted: set[Base] = set()
        """What the operator has named, and the bases of that."""
        self._vocabulary = fingerprint_vocabulary(base.tokenizer)
        self._entries: dict[str, Entry] = {}
        self._models: dict[tuple[str, ...], tuple[list[Loaded], AlignedModel]] = {}
        self._held: list[tuple[weakref.ref[Any], int]] = []
        """Weights that were dropped here, while requests may still use them."""
        self._loading = threading.Lock()
        self._lock = threading.RLock()

    @property
    def entries(self) -> list[Entry]:
        """All aligners, in the order they came."""
        with self._lock:
            return list(self._entries.values())

    def context_of(self, entry: Entry) -> int | None:
        """The most tokens of a prompt with its answer beside an aligner; None if there is no limit, or it is not in memory."""
        if (loaded := entry.loaded) is None:
            return None
        return min((m for m in (self.base.max_length, loaded.model.max_length) if m is not None), default=None)

    @property
    def num_bytes(self) -> int:
        """What aligners take in memory: those here, those only running requests hold, and the bases of adapters."""
        with self._lock:
            here = sum(entry.loaded.num_bytes for entry in self._entries.values() if entry.loaded)
            return here + sum(size for ref, size in self._held if ref() is not None) + self._loader.shared_bytes

    @property
    def room(self) -> int:
        """Bytes of the limit that aligners do not take yet; 0 where there is no limit."""
        return 0 if self._max_bytes is None else max(0, self._max_bytes - self.num_bytes)

    def load(self, name: str, path: str, *, weight: float | None = None, pinned: bool = False, inside: bool = False) -> Entry:
        """Add an aligner, or replace the one of that name, once the new one is in memory.

        Args:
            name: what requests call it.
            path: its folder or hub id.
            weight: its default λ.
            pinned: keep it in memory.
            inside: `path` comes from a client: it must stay under the root folder, and is relative to it.

        Raises:
            NoSuchFolder: the path leaves the root folder, or leads nowhere.
            InvalidRequest: it is an adapter whose base is elsewhere.
            OutOfMemory: the budget has no room for it.
            ModelError: it cannot be loaded.
            InvalidOption: the server's options are not for it: a head cannot draft.
        """
        source = self._inside(path) if inside else path
        if not inside:
            self._trust(source)
        with self._loading:
            entry = Entry(name, source, weight, pinned, created=int(time.time()))
            brought = self._bring(entry)
            self.base.with_aligners([brought.model], draft=brought.drafter)  # raises where it cannot be decoded with
            with self._lock:
                self._drop(self._entries.pop(name, None))
                self._entries[name] = entry
                who = self._who_drafts(entry)
        logger.info("loaded aligner %s; who drafts: %s", name, who, extra={"facts": {"aligner": name, "who_drafts": who}})
        return entry

    def moved(self) -> list[Entry]:
        """Aligners whose path is a link that leads elsewhere than when they were loaded."""
        return [entry for entry in self.entries if entry.loaded is not None and entry.target != _target(entry.path)]

    def _who_drafts(self, entry: Entry) -> str:
        """In words, for the operator; a residual's own drafter is not loaded, but named. A head's is, see `_with_drafter`."""
        model = self.resident([entry.name])
        who = "" if model is None else who_drafts(model)
        own = None if entry.loaded is None else entry.loaded.draft
        return who if own is None else who.replace("FOLDER/draft", str(own))

    def unload(self, name: str) -> None:
        """Forget an aligner; requests that run with it go on.

        Raises:
            NoSuchAligner: there is none of that name.
        """
        with self._lock:
            entry = self._entries.pop(name, None)
            if entry is None:
                raise NoSuchAligner(f"there is no aligner '{name}'")
            self._drop(entry)
        logger.info("unloaded aligner %s", name)

    def resident(self, names: Sequence[str]) -> AlignedModel | None:
        """The model of these aligners together, or None if one has to be brought back into memory first: see `fetch`.

        Raises:
            NoSuchAligner: one of them is not known.
        """
        if not names:
            return self.base
        with self._lock:
            entries = []
            for name in names:
                if name not in self._entries:
                    raise NoSuchAligner(f"there is no aligner '{name}'")
                entries.append(self._entries[name])
                entries[-1].used = time.monotonic()
            loaded = [entry.loaded for entry in entries if entry.loaded]
            if len(loaded) < len(entries):
                return None
            key = tuple(names)
            if key not in self._models or any(a is not b for a, b in zip(self._models[key][0], loaded, strict=True)):
                rule, vocabulary = self.base.defaults.asked_rule, self._vocabulary
                manifests = [
                    with_weight(one.manifest, entry.weight, rule, vocabulary)
                    for entry, one in zip(entries, loaded, strict=True)
                ]
                if len(self._models) >= MAX_COMBINATIONS:
                    self._models.clear()
                models, drafter = [one.model for one in loaded], loaded[0].drafter
                self._models[key] = loaded, self.base.with_aligners(models, manifests, drafter)
            return self._models[key][1]

    def fetch(self, names: Sequence[str]) -> AlignedModel:
        """The model of these aligners, bringing back those that were evicted.

        Raises:
            NoSuchAligner: one of them is not known.
            OutOfMemory: they do not fit in memory together.
            ModelError: one cannot be loaded any more.
        """
        with self._loading:
            while (model := self.resident(names)) is None:
                for entry in [self._entries[name] for name in names if name in self._entries]:
                    if entry.loaded is None:
                        self._bring(entry, keep=names)
        return model

    def hide_root(self, message: str) -> str:
        """A message for clients, who are not to learn where on this machine the root folder is."""
        return message.replace(f"{self._root}/", "")

    def _inside(self, path: str) -> str:
        """A client's path as the folder it stands for, links resolved."""
        if self._root is None:
            raise NoSuchFolder("path: this server loads no aligners; start it with --aligner_root FOLDER")
        try:
            found = (self._root / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            found = None
        if found is None or not found.is_relative_to(self._root) or not (found.is_dir() or is_gguf(found)):
            raise NoSuchFolder("path: there is no such folder under the server's --aligner_root")
        if is_adapter(found) and not is_head(found):
            base = base_of(found)
            under_root = Path(base.source).is_dir() and Path(base.source).is_relative_to(self._root)
            if not under_root and base not in self._trusted:
                raise InvalidRequest("path: the adapter's base model must lie under the server's --aligner_root, too")
        return str(found)

    def _trust(self, path: str) -> None:
        """Adapters of clients may use what the operator uses."""
        folder = expand_home(path)
        if folder.is_dir():
            self._trusted.add(Base(str(folder.resolve())))
            if is_adapter(folder):
                self._trusted.add(base_of(folder))

    def _bring(self, entry: Entry, keep: Sequence[str] = ()) -> Loaded:
        """Load an entry's weights and make room for them. What does not fit is dropped again: it is never kept."""
        entry.target = _target(entry.path)
        loaded = self._with_drafter(self._loader.load(str(entry.target or entry.path)))
        with self._lock:
            if self._max_bytes is not None:
                self._make_room(entry, loaded.num_bytes, keep, self._max_bytes)
            entry.loaded = loaded
        return loaded

    def _with_drafter(self, loaded: Loaded) -> Loaded:
        """With a head's drafter, which costs little, unless the operator has said who drafts; nothing outside of its folder."""
        draft = loaded.draft
        if draft is None or draft.is_symlink() or not is_reduced(draft) or self.base.names_drafter:
            return loaded
        drafter = self._loader.load_draft(draft)
        return loaded._replace(drafter=drafter, num_bytes=loaded.num_bytes + getattr(drafter, "num_bytes", 0))

    def _make_room(self, newcomer: Entry, num_bytes: int, keep: Sequence[str], max_bytes: int) -> None:
        """Evict as few as will do, those unused longest first; none if all that may go would not be enough."""
        here = {e.name: e for e in self._entries.values() if e.loaded is not None}
        total = sum(e.loaded.num_bytes for e in here.values() if e.loaded) + self._loader.shared_bytes + num_bytes
        victims = []
        for entry in sorted(here.values(), key=lambda entry: (entry.name != newcomer.name, entry.used)):
            replaced = entry.name == newcomer.name  # which goes anyway
            if total > max_bytes and (replaced or not (entry.pinned or entry.name in keep)):
                assert entry.loaded is not None
                total -= entry.loaded.num_bytes
                victims.append(entry)
        if total > max_bytes:
            sizes = f"{num_bytes / 2**20:.1f} MiB, of {max_bytes / 2**20:.1f} allowed"
            raise OutOfMemory(f"aligner '{newcomer.name}' needs {sizes}, and too little of the rest may be evicted")
        for entry in victims:
            self._drop(entry)
            logger.info("evicted aligner %s", entry.name)

    def _drop(self, entry: Entry | None) -> None:
        """Let go of an entry's weights; requests may hold them a while longer."""
        if entry is None or entry.loaded is None:
            return
        loaded, entry.loaded = entry.loaded, None
        self._models = {names: pair for names, pair in self._models.items() if all(one is not loaded for one in pair[0])}
        model = getattr(loaded.model, "adapter", loaded.model)
        still = [(ref, size) for ref, size in self._held if ref() is not None]
        self._held = [*still, (weakref.ref(model), loaded.num_bytes)]


def _target(path: str) -> Path | None:
    """Where a path leads, if it is a link; None for a folder, or a hub id."""
    link = expand_home(path)
    return link.resolve() if link.is_symlink() else None
