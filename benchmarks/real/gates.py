"""When is the aligner worth its call? Per token, the rule or p̃ alone: quality against the share of aligner calls.

    make demo-real && python benchmarks/real/gates.py --demo demo-real-out --out gates

The head that `make demo-real` trained is decoded behind gates: by entropy and max p of p̃'s row, by a gate that is learnt on
the row and the place in the answer, by the KL from p̃ to the aligner (which asks the aligner, so it saves nothing), by an oracle
that knows the wanted token, and by the null oracle, which has as many choices between two equally strong heads. Thresholds are
chosen on development prompts and reported on test prompts. What is finished is kept in `--out`; it prints Markdown.
"""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from chats import read_part
from demo import Parts, Scale, train_head
from fetch import FILE
from gate_curves import Signal, curve, half, mean, oracles, places, signals
from gate_learned import LearnedGate, fit
from gate_report import render
from gate_rows import Columns, read_columns
from gate_texts import compare, measure_cost, text_of

from trimtab.core.rules import Gate, Rule
from trimtab.decode.aligned import AlignedModel
from trimtab.errors import InvalidOption, TrimtabError
from trimtab.files import only_writer, read_json, write_json
from trimtab.hardware import describe_hardware, keep_freed_memory
from trimtab.models.loading import quiet_loading

__all__ = ["Setting", "run_study"]

OTHER_SEED = 1
"""Of the training of the other head; the demo's has the trainer's own."""
TEXT_SHARES = (0.5, 0.75)
BY = {"entropy": ("entropy", False), "max_p": ("max_p", False), "kl past tau": ("kl", True), "kl up to tau": ("kl", False)}
"""How the gates that the engine has are written: `by`, and whether `invert` is on."""

logger = logging.getLogger("gates")


class Setting(NamedTuple):
    """What is studied.

    Attributes:
        proposal: the frozen model.
        aligner: the aligner's folder.
        data: a folder with `train.jsonl`, `dev.jsonl` and `test.jsonl`.
        other: the folder of an equally strong aligner; None to train a head as the demo does, with another seed.
        scale: how the demo's head was trained, and how many prompts are answered, at what length.
    """

    proposal: Path
    aligner: Path
    data: Path
    other: Path | None = None
    scale: Scale = Scale()

    def about(self) -> dict[str, Any]:
        """What a folder of results belongs to."""
        paths = {name: str(getattr(self, name)) for name in ("proposal", "aligner", "data", "other")}
        return paths | {"scale": self.scale._asdict()}


def run_study(out: Path, setting: Setting) -> dict[str, Any]:
    """Do it all, leaving `report.json` in `out`; the report.

    Raises:
        InvalidOption: `out` was begun with other settings.
        TrimtabError: a model cannot be read, or something else cannot be done.
    """
    with only_writer(out / "lock"):
        path = out / "settings.json"
        if not path.exists():
            write_json(path, setting.about())
        elif read_json(path) != setting.about():
            raise InvalidOption(f"out: '{out}' was begun with {read_json(path)}: remove it, or choose another")
        parts = Parts(out / "parts")
        other_folder = setting.other or out / "other-head"
        if setting.other is None:
            training = dict(setting.scale.training) | {"seed": OTHER_SEED}
            scale = setting.scale._replace(training=training)
            parts.do("train the other head", lambda: train_head(setting.proposal, setting.data, other_folder, scale))
        model = AlignedModel.from_pretrained(setting.proposal, setting.aligner, max_num_seqs=16)
        loaded = {"tokenizer": model.tokenizer, "eos_token_ids": model.eos_token_ids, "max_num_seqs": 16}
        other = AlignedModel.from_pretrained(model.proposal, other_folder, **loaded)
        read = {part: read_part(setting.data, part) for part in ("train", "dev", "test")}
        tables = {
            part: _table(parts.do(f"score {part}", lambda p=part: read_columns(model, other if p == "test" else None, read[p])))
            for part in read
        }
        learned = fit(tables["train"])
        ways = signals(learned)
        rules = _rules(model, ways, tables["dev"], learned)
        answered = list({record["group"]: record for record in read["test"]}.values())[: setting.scale.test]
        cost = parts.do("measure the cost", lambda: measure_cost(model, answered))
        texts = {
            name: parts.do(f"answer by {name}", lambda r=rule: text_of(model, r, answered, setting.scale.max_tokens))
            for name, rule in rules.items()
        }
        report = {
            "model": setting.proposal.name,
            "hardware": describe_hardware(),
            "rule": str(model.shaping(model.defaults).rule),
            "tokens": {part: len(table["prompt"]) for part, table in tables.items()},
            "nll": {name: mean(tables["test"], -tables["test"][name], torch.ones_like(tables["test"][name]))
                    for name in ("proposal", "rule", "other")},
            "curves": {way.name: curve(way, tables["dev"], tables["test"]) for way in ways},
            "half": {way.name: half(way, tables["dev"], tables["test"]) for way in ways},
            "asks": [way.name for way in ways if way.asks],
            "oracles": oracles(tables["test"]),
            "places": places(tables["test"]),
            "learned": learned.__dict__,
            "prompts": len(answered),
            "texts": {name: compare(found, texts["rule"]) for name, found in texts.items()},
            "cost": cost,
            "seconds": parts.seconds,
        }  # fmt: skip
        write_json(out / "report.json", report)
    return report


def _table(columns: Columns) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}


def _rules(model: AlignedModel, ways: list[Signal], dev: Mapping[str, torch.Tensor], learned: Any) -> dict[str, Rule | None]:
    """The bare proposal (None), the rule, and gates around it at the thresholds of `TEXT_SHARES`, by name."""
    rule = model.shaping(model.defaults).rule
    found: dict[str, Rule | None] = {"proposal": None, "rule": rule}
    for way in ways:
        for share in TEXT_SHARES:
            tau, name = way.threshold(dev, share), f"{way.name} at {share}"
            if way.name in BY:
                by, invert = BY[way.name]
                found[name] = Gate(rule, by=by, tau=tau, invert=invert)
            elif way.name == "learned":
                found[name] = LearnedGate(rule, learned, model.eos_token_ids, tau)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gates"), help="[default: %(default)s]")
    parser.add_argument(
        "--demo", type=Path, default=Path("demo-real-out"), help="what `make demo-real` left [default: %(default)s]"
    )
    parser.add_argument("--proposal", type=Path, default=Path("real-model") / FILE, help="[default: %(default)s]")
    parser.add_argument("--aligner", type=Path, help="another aligner than the demo's head; needs --other")
    parser.add_argument("--other", type=Path, help="an equally strong one [default: a head trained here with another seed]")
    said = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("demo", "gates", "trimtab"):
        logging.getLogger(name).setLevel(logging.INFO)
    keep_freed_memory()
    quiet_loading()
    made = said.demo / "docstrings"
    if said.aligner is not None and said.other is None:
        raise InvalidOption("aligner: with an aligner of your own, --other must name an equally strong one")
    if not said.proposal.exists():
        raise InvalidOption(f"proposal: there is no '{said.proposal}'; `make real-model` fetches it")
    aligner = said.aligner or made / "models" / "head-0"
    needed = {made / "data" / "test.jsonl": "demo", aligner: "aligner" if said.aligner else "demo"}
    for path, name in (needed | ({said.other: "other"} if said.other else {})).items():
        if not path.exists():
            raise InvalidOption(f"{name}: there is no '{path}'" + "; `make demo-real` makes it" * (name == "demo"))
    other = said.other and said.other.resolve()
    setting = Setting(said.proposal.resolve(), aligner.resolve(), (made / "data").resolve(), other)
    print(render(run_study(said.out, setting)))


if __name__ == "__main__":
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
