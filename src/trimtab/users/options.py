"""What `trimtab fit-weights` and `trimtab.fit_weights` can be told."""

from dataclasses import dataclass
from typing import Any

from trimtab.data.options import DataOptions, LengthOptions, TemplateOptions, idle_for_files
from trimtab.decode.options import PairOptions, RowOptions
from trimtab.errors import InvalidOption
from trimtab.knobs import MAX_FACTOR
from trimtab.names import parse_named
from trimtab.options import check_ranges, option, same

__all__ = ["FitWeightsOptions"]

RULES = ("product", "geometric")
"""Those under which weights multiply log-probabilities."""


@dataclass(frozen=True)
class FitWeightsOptions(DataOptions, LengthOptions, TemplateOptions):
    """Options of `trimtab fit-weights` and `trimtab.fit_weights`."""

    proposal: str = same(PairOptions, "proposal")
    aligner: tuple[str, ...] = option((), "an aligner, and what it is called; may repeat", required=True, metavar="NAME=PATH")
    preferences: str = option(
        "", "the user's pairs: data in a TRL layout with 'chosen' and 'rejected', such as the arena's votes", required=True,
        metavar="D",
    )  # fmt: skip
    weight: tuple[float, ...] = option(
        (),
        "weight of each --aligner, in order, where nothing is known of a user [default: 0 for each]",
        low=-MAX_FACTOR,
        high=MAX_FACTOR,
    )
    beta: float = option(
        0.1, "what a nat between two answers counts in log-odds of preferring one, as in DPO", low=1e-6, high=1e3
    )
    prior_scale: float = option(
        1.0, "standard deviation of users' weights around --weight; smaller ones move less", low=1e-6, high=1e3
    )
    rule: str | None = option(None, "how weights decode [default: what the manifests say, or product]", choices=RULES)
    out: str | None = option(None, "a JSON file for the report, too", metavar="FILE")
    dtype: str = same(RowOptions, "dtype")
    device: str | None = same(RowOptions, "device")
    quantize: str | None = same(RowOptions, "quantize")
    backend: str | None = same(RowOptions, "backend")
    max_num_seqs: int = same(RowOptions, "max_num_seqs")

    def __post_init__(self) -> None:
        """Refuse names that are there twice, and weights that are not one for each aligner."""
        check_ranges(self)
        names = self.names
        if again := next((name for i, name in enumerate(names) if name in names[:i]), None):
            raise InvalidOption(f"--aligner: two are called '{again}'; say NAME=PATH with another name")
        if len(self.weight) not in (0, len(names)):
            raise InvalidOption(f"{len(self.weight)} --weight for {len(names)} --aligner: give one for each, in order")

    @property
    def names(self) -> list[str]:
        """What the aligners are called."""
        return [parse_named(text)[0] for text in self.aligner]

    @property
    def models(self) -> RowOptions:
        """Which models, and how they are loaded."""
        names = ("proposal", "rule", "dtype", "device", "quantize", "backend", "max_num_seqs")
        told: dict[str, Any] = {name: getattr(self, name) for name in names}
        return RowOptions(**told, aligner=tuple(parse_named(text)[1] for text in self.aligner))

    def idle(self) -> dict[str, str]:
        """What says nothing of a file."""
        hub = ("dataset_split", "dataset_config", "dataset_data_dir")
        return {} if idle_for_files(self.preferences) == {} else dict.fromkeys(hub, "is for a data set of the hub")
