"""Train a head: the proposal's upper layers, or all, as a model of their own, with a LoRA adapter, on cached hidden states.

What is trained is a transformers model of the same class with fewer layers, which shares them with the proposal; PEFT adapts
it. Saved, the adapter's layers have the proposal's numbers, so that PEFT loads it into the whole proposal.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.decode.aligned import AlignedModel
from trimtab.decode.encoding import Encoder
from trimtab.errors import InvalidOption
from trimtab.models.head import Head
from trimtab.models.layers import cut_config
from trimtab.models.lora_folder import PROJECTIONS
from trimtab.models.weight_files import WEIGHTS_NAME, expand
from trimtab.train.examples import Example, answers
from trimtab.train.hidden import HiddenCache
from trimtab.train.options import TrainOptions
from trimtab.train.own_samples import draw_samples, read_samples
from trimtab.train.proposal import Proposal
from trimtab.train.ranks import Ranks
from trimtab.train.start import make_lora

__all__ = ["HeadStart", "TrainedHead", "adapted_upper", "pick_tap", "upper_model"]

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


class HeadStart:
    """A head before it is trained.

    Args:
        options: of the run.
        proposal: what it reads.
        head: what its manifest will say.
    """

    def __init__(self, options: TrainOptions, proposal: Proposal, head: Head) -> None:
        self._options, self._proposal, self.head = options, proposal, head

    @classmethod
    def of(cls, options: TrainOptions, proposal: Proposal) -> Self:
        """A head as the options ask for.

        Raises:
            InvalidOption: the proposal has fewer layers.
            UnsupportedModel: its layers cannot be run one by one.
        """
        assert proposal.model is not None  # as `settle_head` has it
        depth = proposal.model.lean.depth
        tap = pick_tap(depth, options.head_layers)
        if odd := set(options.lora_target_modules) - set(PROJECTIONS):
            raise InvalidOption(f"lora_target_modules: a head adapts {', '.join(PROJECTIONS)}, not '{min(odd)}'")
        return cls(options, proposal, Head(tap, depth, proposal.model.digest))

    @property
    def source(self) -> str:
        """The proposal's name."""
        return self._options.proposal

    def caches(
        self, training: Sequence[Example], development: Sequence[Example], ranks: Ranks, *, pairs: bool
    ) -> dict[str, dict[str, HiddenCache]]:
        """The hidden states on the answers of `train` and `dev`, by the kind of answer; none where a head reads tokens itself.

        Unwanted ones are among them where every example has one: of development, for looks measure them whatever the loss;
        of training only if `pairs` are learnt from.
        """
        folder = Path(self._options.proposal_cache or Path(self._options.output_dir) / "proposal_cache")
        found: dict[str, dict[str, HiddenCache]] = {"train": {}, "dev": {}}
        if not self.head.tap:
            return found
        for part, examples, wants in (("train", training, pairs), ("dev", development, True)):
            for which in ("chosen", "rejected") if wants and all(e.rejected for e in examples) else ("chosen",):
                some, tap = answers(examples, which), self.head.tap
                place = folder / f"{part}_{which}_hidden"
                found[part][which] = HiddenCache.build(place, self._proposal, some, tap=tap, ranks=ranks)
        return found

    def kept_samples(self, encoder: Encoder, max_length: int, seed: int, ranks: Ranks, *, pairs: bool) -> list[Example]:
        """What the proposal says itself, and is to go on saying; drawn once, and kept in the output folder.

        Among `pairs` each is a pair of two equal answers, in which there is nothing to contrast.
        """
        count = self._options.kept_samples
        if not count:
            return []
        assert self._proposal.model is not None
        model = AlignedModel(
            self._proposal.model, (), encoder.tokenizer, self._proposal.eos_token_ids, date=encoder.date, draft="none"
        )
        path = Path(self._options.output_dir) / KEPT
        header = {"proposal": self._proposal.rows.fingerprint, "seed": seed, "count": count, **encoder.chat_settings}
        limits = {"max_tokens": KEPT_TOKENS, "max_length": max_length}
        if not ranks.first_does(path.exists):
            ranks.first_does(lambda: draw_samples(model, None, path, header, count=count, seed=seed, **limits))
        samples = read_samples(path)
        return [Example(sample.prompt, sample.chosen, sample.chosen) for sample in samples] if pairs else samples

    def prepare(self, seed: int) -> Any:
        """What is trained, with fresh adapters. The proposal is of no other use after that."""
        assert self._proposal.model is not None
        model = self._proposal.model.model
        return adapted_upper(model, self.head.tap, make_lora(self._options, self._options.proposal, PROJECTIONS), seed)


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
        renamed = {_lift(name, tap): weight.detach().contiguous().cpu() for name, weight in trained.items()}
        save_file(renamed, folder / WEIGHTS_NAME, {"format": "pt"})
        config = copy.copy(self.peft_config["default"])
        config.inference_mode = True
        config.layers_to_transform = list(range(tap, layers)) if tap else None
        here = Path(expand(self._proposal))  # of a GGUF file, the folder that it was converted to: PEFT reads no other
        config.base_model_name_or_path = str(here.resolve()) if here.exists() else self._proposal
        config.save_pretrained(folder)


def _lift(name: str, tap: int) -> str:
    """A weight's name in the whole proposal."""
    number, rest = name.removeprefix(PREFIX).split(".", 1)
    return f"{PREFIX}{int(number) + tap}.{rest}"
