"""Train a head: the proposal's upper layers, or all, as a model of their own, with a LoRA adapter, on cached hidden states.

What is trained is a transformers model of the same class with fewer layers, which shares them with the proposal; PEFT adapts
it. Saved, the adapter's layers have the proposal's numbers, so that PEFT loads it into the whole proposal. A later round reads
them again (`Earlier`).
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab.data.encoding import Encoder
from trimtab.data.examples import Example, answers
from trimtab.decode.aligned import AlignedModel
from trimtab.errors import InvalidOption
from trimtab.models.aligner import Description
from trimtab.models.blocks import FAMILIES, projections_of
from trimtab.models.fingerprint import Files
from trimtab.models.head import Head, HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.layers import cut_config
from trimtab.models.lean import no_lean_pass
from trimtab.models.weight_files import WEIGHTS_NAME, expand
from trimtab.train.hidden import HiddenCache
from trimtab.train.own_samples import draw_samples, read_samples
from trimtab.train.plan import Plan
from trimtab.train.ranks import Ranks
from trimtab.train.rows import Proposal
from trimtab.train.start import make_lora, pinned, read_lora

__all__ = [
    "Earlier",
    "HeadPlan",
    "HeadStart",
    "TrainedHead",
    "adapted_upper",
    "hidden_answers",
    "pick_tap",
    "plan_head",
    "upper_model",
]

KEPT = "kept_samples.jsonl"
"""Where they are, in the output folder."""

KEPT_TOKENS = 64
"""Of an answer that is kept, at most."""

PREFIX = "base_model.model.model.layers."


def pick_tap(layers: int, head_layers: int | None) -> int:
    """The first layer that a head runs again.

    Args:
        layers: how many the proposal has.
        head_layers: how many the head is to run; None for all.

    Raises:
        InvalidOption: the proposal does not have so many.
    """
    wanted = layers if head_layers is None else head_layers
    if not 1 <= wanted <= layers:
        raise InvalidOption(f"head_layers must be from 1 to {layers}, which is all that the proposal has, not {wanted}")
    return layers - wanted


def upper_model(model: Any, tap: int) -> Any:
    """A model of the layers from `tap` on, which it shares, that takes `inputs_embeds`: the hidden states before them."""
    config = cut_config(model.config, range(tap, model.config.num_hidden_layers))
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
        return get_peft_model(upper_model(model, tap), config)


class HeadPlan(NamedTuple):
    """What a head is made of, beside its proposal's configuration."""

    tap: int
    layers: int
    """How many it runs."""
    lora: Any
    """The configuration of its adapter."""
    dtype: torch.dtype
    """The proposal's."""


class Earlier(NamedTuple):
    """The adapter of a head that is trained on."""

    weights: dict[str, Tensor]
    """By their names in `upper_model`."""
    files: Files

    @classmethod
    def read(cls, folder: Path, head: Head, proposal: HuggingFaceLM) -> Self:
        """From the folder of a head that belongs to the proposal.

        Raises:
            ModelError: it cannot be read, or does not fit.
        """
        HeadPool(proposal, head.tap).store.read(folder, str(folder))  # as it is decoded, so that all that is wrong is said
        found, files = Files.of(partial(load_file, folder / WEIGHTS_NAME), (folder, None))
        return cls({_move(name, -head.tap): weight for name, weight in found.items()}, files)


def plan_head(plan: Plan, config: Any, found: Description | None) -> tuple[int, Any]:
    """The tap of a head, and the configuration of its adapter in `upper_model`: of a fresh one, or as a folder has them.

    Args:
        plan: of the run.
        config: the proposal's.
        found: the head that is trained on; None for a fresh one.

    Raises:
        InvalidOption: fewer layers than are asked for, a module that no head adapts, or an adapter that cannot be trained on.
        UnsupportedModel: the proposal's layers cannot be run one by one.
    """
    if found is not None:
        head = found.manifest and found.manifest.parsed_head
        assert head  # as `settle` has it
        lora = read_lora(found.folder)
        if lora.rank_pattern or lora.alpha_pattern:  # they may name layers, by the numbers of the whole proposal
            raise InvalidOption(f"aligner: '{found.folder}' sets a rank or a scale by patterns, and is not trained on")
        if (some := lora.layers_to_transform) is not None:
            lora.layers_to_transform = [layer - head.tap for layer in ([some] if isinstance(some, int) else some)]
        lora.revision = pinned(plan.asked.proposal)
        return head.tap, lora
    if config.model_type not in FAMILIES:
        raise no_lean_pass(config.model_type)
    known = projections_of(config)
    if odd := set(plan.asked.lora_target_modules) - set(known):
        raise InvalidOption(f"lora_target_modules: a head of this proposal adapts {', '.join(known)}, not '{min(odd)}'")
    return pick_tap(config.num_hidden_layers, plan.asked.head_layers), make_lora(plan, plan.asked.proposal, known)


def hidden_answers(
    tap: int, training: Sequence[Example], development: Sequence[Example], *, pairs: bool
) -> list[tuple[str, str]]:
    """Which answers of which part hidden states are needed on; none for a head of all layers, which reads tokens.

    Unwanted ones are among them where every example has one: of development, for looks measure them whatever the loss;
    of training only if `pairs` are learnt from.
    """
    if not tap:
        return []
    parts = (("train", training, pairs), ("dev", development, True))
    unwanted = [(part, "rejected") for part, examples, wants in parts if wants and all(e.rejected for e in examples)]
    return [("train", "chosen"), ("dev", "chosen"), *unwanted]


class HeadStart:
    """A head before it is trained.

    Args:
        plan: of the run.
        proposal: what it reads.
        head: what its manifest will say.
        lora: the configuration of its adapter.
        earlier: what an earlier round has made of it; None for fresh adapters.
    """

    def __init__(self, plan: Plan, proposal: Proposal, head: Head, lora: Any, earlier: Earlier | None) -> None:
        self._plan, self._proposal, self.head, self._lora, self.earlier = plan, proposal, head, lora, earlier

    @classmethod
    def of(cls, plan: Plan, proposal: Proposal, found: Description | None) -> Self:
        """A head as the plan asks for, or the one in a folder.

        Raises:
            InvalidOption: see `plan_head`.
            UnsupportedModel: the proposal's layers cannot be run one by one, or the head is another proposal's.
        """
        model = proposal.model
        assert model is not None  # as `settle_head` has it
        known = found and found.manifest and found.manifest.parsed_head
        if known:
            known.check(model, plan.asked.aligner)
        depth = model.lean.depth
        tap, lora = plan_head(plan, model.model.config, found)
        head = known or Head(tap, depth, model.digest)
        return cls(plan, proposal, head, lora, Earlier.read(found.folder, head, model) if found else None)

    @property
    def plan(self) -> HeadPlan:
        """What it is made of."""
        assert self._proposal.model is not None
        return HeadPlan(self.head.tap, self.head.layers - self.head.tap, self._lora, self._proposal.model.model.dtype)

    @property
    def source(self) -> str:
        """The proposal's name."""
        return self._plan.asked.proposal

    def caches(
        self, training: Sequence[Example], development: Sequence[Example], ranks: Ranks, *, pairs: bool
    ) -> dict[str, dict[str, HiddenCache]]:
        """The hidden states on the `hidden_answers` of `train` and `dev`, by the kind of answer."""
        folder = Path(self._plan.asked.proposal_cache or Path(self._plan.asked.output_dir) / "proposal_cache")
        found: dict[str, dict[str, HiddenCache]] = {"train": {}, "dev": {}}
        for part, which in hidden_answers(self.head.tap, training, development, pairs=pairs):
            some, tap = answers(training if part == "train" else development, which), self.head.tap
            place = folder / f"{part}_{which}_hidden"
            found[part][which] = HiddenCache.build(place, self._proposal, some, tap=tap, ranks=ranks)
        return found

    def kept_samples(self, encoder: Encoder, max_length: int, seed: int, ranks: Ranks, *, pairs: bool) -> list[Example]:
        """What the proposal says itself, and is to go on saying; drawn once, and kept in the output folder.

        Among `pairs` each is a pair of two equal answers, in which there is nothing to contrast.
        """
        count = self._plan.kept_samples
        if not count:
            return []
        assert self._proposal.model is not None
        model = AlignedModel(
            self._proposal.model, (), encoder.tokenizer, self._proposal.eos_token_ids, date=encoder.date, draft="none"
        )
        path = Path(self._plan.asked.output_dir) / KEPT
        header = {"proposal": self._proposal.rows.fingerprint, "seed": seed, "count": count, **encoder.chat_settings}
        limits = {"max_tokens": KEPT_TOKENS, "max_length": max_length}
        if not ranks.first_does(path.exists):
            ranks.first_does(lambda: draw_samples(model, None, path, header, count=count, seed=seed, **limits))
        samples = read_samples(path)
        return [Example(sample.prompt, sample.chosen, sample.chosen) for sample in samples] if pairs else samples

    def prepare(self, seed: int) -> Any:
        """What is trained, with fresh adapters or an earlier round's. The proposal is of no other use after that."""
        from peft import set_peft_model_state_dict

        assert self._proposal.model is not None
        adapted = adapted_upper(self._proposal.model.model, self.head.tap, self._lora, seed)
        if self.earlier:
            set_peft_model_state_dict(adapted, self.earlier.weights)
        return adapted


class TrainedHead:
    """What an aligner's folder is written from.

    Args:
        model: the PEFT model around `upper_model`.
        proposal: the proposal's name.
        head: what the manifest says.
    """

    def __init__(self, model: Any, proposal: str, head: Head) -> None:
        self._model, self._proposal, self._head = model, proposal, head
        self.peft_config, self.config = model.peft_config, model.config

    def save_pretrained(self, folder: Path, state_dict: Mapping[str, Tensor] | None = None, **_: Any) -> None:
        """Write the adapter as one of the whole proposal."""
        from peft import get_peft_model_state_dict

        trained = get_peft_model_state_dict(self._model, state_dict=None if state_dict is None else dict(state_dict))
        tap, layers = self._head.tap, self._head.layers
        renamed = {_move(name, tap): weight.detach().contiguous().cpu() for name, weight in trained.items()}
        save_file(renamed, folder / WEIGHTS_NAME, {"format": "pt"})
        config = copy.copy(self.peft_config["default"])
        config.inference_mode = True
        some = config.layers_to_transform
        if tap or some is not None:
            config.layers_to_transform = [tap + layer for layer in (range(layers - tap) if some is None else some)]
        here = Path(expand(self._proposal))  # of a GGUF file, the folder that it was converted to: PEFT reads no other
        config.base_model_name_or_path = str(here.resolve()) if here.exists() else self._proposal
        config.save_pretrained(folder)


def _move(name: str, by: int) -> str:
    """A weight's name in a model whose layers are counted from another one on."""
    number, rest = name.removeprefix(PREFIX).split(".", 1)
    return f"{PREFIX}{int(number) + by}.{rest}"
