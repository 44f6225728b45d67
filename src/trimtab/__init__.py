"""Steer a frozen large language model with a small, detachable aligner.

    from trimtab import AlignedModel, SamplingParams

    model = AlignedModel.from_pretrained("big-model", "small-aligner")
    print(model.generate(["Hello"], SamplingParams(max_tokens=64, seed=0))[0].text)

The method is the Residual Alignment Model, P ∝ P_M·Q (arXiv 2505.19700). Importing this package is cheap: torch and
transformers are imported with the first name that needs them.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "AlignedModel",
    "Aligner",
    "BlendOptions",
    "Completion",
    "EvalOptions",
    "EvolveOptions",
    "FitWeightsOptions",
    "Particles",
    "ProposeOptions",
    "SamplingParams",
    "Score",
    "SequenceLevel",
    "TextHandover",
    "TokenEvent",
    "TokenLogprobs",
    "TrainOptions",
    "TrimtabError",
    "blend",
    "evaluate",
    "evolve",
    "fit_weights",
    "propose",
    "train",
]

_HOMES = {
    "AlignedModel": "trimtab.decode.aligned",
    "Aligner": "trimtab.models.aligner",
    "BlendOptions": "trimtab.blend.options",
    "Completion": "trimtab.decode.request",
    "EvalOptions": "trimtab.evaluate.options",
    "EvolveOptions": "trimtab.loop.options",
    "FitWeightsOptions": "trimtab.users.options",
    "Particles": "trimtab.decode.request",
    "ProposeOptions": "trimtab.propose.options",
    "SamplingParams": "trimtab.decode.request",
    "Score": "trimtab.decode.scoring",
    "SequenceLevel": "trimtab.decode.sequence_level",
    "TextHandover": "trimtab.handover.writing",
    "TokenEvent": "trimtab.decode.request",
    "TokenLogprobs": "trimtab.decode.request",
    "TrainOptions": "trimtab.train.options",
    "TrimtabError": "trimtab.errors",
    "blend": "trimtab.blend",
    "evaluate": "trimtab.evaluate",
    "evolve": "trimtab.loop.call",
    "fit_weights": "trimtab.users.call",
    "propose": "trimtab.propose",
    "train": "trimtab.train",
}
"""Where a public name is; a package of the name is itself what is called, see `trimtab.callable`."""

if TYPE_CHECKING:
    from trimtab.blend.call import blend
    from trimtab.blend.options import BlendOptions
    from trimtab.decode.aligned import AlignedModel
    from trimtab.decode.request import Completion, Particles, SamplingParams, TokenEvent, TokenLogprobs
    from trimtab.decode.scoring import Score
    from trimtab.decode.sequence_level import SequenceLevel
    from trimtab.errors import TrimtabError
    from trimtab.evaluate.call import evaluate
    from trimtab.evaluate.options import EvalOptions
    from trimtab.handover.writing import TextHandover
    from trimtab.loop.call import evolve
    from trimtab.loop.options import EvolveOptions
    from trimtab.models.aligner import Aligner
    from trimtab.propose.call import propose
    from trimtab.propose.options import ProposeOptions
    from trimtab.train.call import train
    from trimtab.train.options import TrainOptions
    from trimtab.users.call import fit_weights
    from trimtab.users.options import FitWeightsOptions


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        home = importlib.import_module(_HOMES[name])
        return home if _HOMES[name] == f"{__name__}.{name}" else getattr(home, name)
    raise AttributeError(f"module 'trimtab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
