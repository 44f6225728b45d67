"""Does an aligner earn its place? Likelihood and preference of every objective under the rules that fit it, with controls.

    pip install trl
    python benchmarks/quality/study.py --dataset alpaca_eval_answers.jsonl.gz --out study --seeds 0 1 2
    python benchmarks/quality/report.py study

`--dataset demo` takes signatures and docstrings of the standard library instead.

Proposals and the aligners' start are pretrained on answers to prompts that nothing else sees; aligners are trained by
`trimtab train`'s own code, and every choice is made on development prompts. What is finished is kept in `--out`, so the same
command goes on after a kill.
"""

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aligners import FEW, MAIN, METHODS, SECOND, best_aligner, distil_draft
from bias import Bias, fit_bias
from ceilings import ceilings
from cell import REGIMES, Cell, make_models
from judge import Judge, accuracy
from rounds import reward_model
from systems import System, acceptance, from_folder, nll, sample
from wins import ANSWERS, CUT, OF, Contest, best_of, kl_per_token, match

from trimtab.data.examples import Example
from trimtab.errors import TrimtabError
from trimtab.files import read_json, write_json

IMITATION = "likelihood, product, without contrast"

STRENGTHS = {"product": (0.1, 0.2, 0.35, 0.5, 0.75, 1.0), "geometric": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0)}
"""What a tuned system is tried at."""

TEMPERATURES = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)

LEAST = 1 / 3
"""The smaller of the two divergences at which systems are compared, as a share of the larger, which is the main one's own."""

CONTENDERS = (MAIN, SECOND, IMITATION, "sft, product", "sft, geometric", "proxy-tuning")
"""Who is also compared at the smaller one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="a file of scored answers, or demo")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--few", action="store_true", help="the main systems only, in a third of the time")
    said = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("__main__").setLevel(logging.INFO)
    cells = [Cell(said.out, regime, seed) for seed in said.seeds for regime in said.regimes]
    for cell in cells:
        make_models(cell, said.dataset)
        make_models(cell.other, said.dataset)
        run(cell, few=said.few)


def run(cell: Cell, *, few: bool) -> None:
    """Train, choose and measure; each result is a file in the cell's folder."""
    chosen = {name: best_aligner(cell, name) for name in (FEW if few else METHODS)}
    aligners = {name: folder for name, (folder, _) in chosen.items()}
    foreign = best_aligner(cell.other, MAIN)[0]
    training, development = cell.split()
    tuned, bias = {}, None
    if not few:
        bias = fit_bias(cell.proposal, training, development, cell.folder / "bias.safetensors")
        tuned = ceilings(cell.folder / "ceilings", cell.proposal, cell.data / "align.jsonl", cell.seed)
    families = make_families(cell, aligners, foreign, bias, tuned)
    held_out = cell.held_out()
    done("nll", cell, few, lambda: measure_nll(families, development, held_out))
    done("wins", cell, few, lambda: measure_wins(cell, families, development, held_out, few=few))
    done("costs", cell, few, lambda: measure_costs(cell, chosen, tuned, held_out, few=few))


def done(name: str, cell: Cell, few: bool, measure: Callable[[], dict[str, Any]]) -> None:
    """Measure what was not measured yet: a few systems do not stand for all."""
    path = cell.folder / f"{name}.json"
    if not path.exists() or (read_json(path)["few"] and not few):
        write_json(path, measure() | {"prompts": cell.names(cell.held_out(), once=True), "few": few})
    logging.getLogger(__name__).info("%s", path)


def make_families(
    cell: Cell, aligners: dict[str, Path], foreign: Path, bias: Bias | None, tuned: dict[str, Path]
) -> dict[str, tuple[System, float]]:
    """Every way to steer, at strength 1, and the most strength that makes sense."""
    p = cell.proposal

    def mixed(model: Path) -> tuple[System, float]:
        return System(p, (model,), "geometric", (1.0,)), 1.0

    families = {name: (from_folder(p, folder), 3.0) for name, folder in aligners.items() if name.startswith(MAIN)}
    families[f"{MAIN}, of the other proposal"] = from_folder(p, foreign), 3.0
    families["sft, geometric"] = mixed(aligners["sft"])
    families["start, geometric"] = mixed(cell.start)
    families["proxy-tuning"] = System(p, (aligners["sft"], cell.start), "product", (1.0, -1.0)), 4.0
    for name in ("sft", "ram, alpha 1e-4", "ram, alpha 1e-2", "preference"):
        if name in aligners:
            families[f"{name}, product"] = System(p, (aligners[name],), "product", (1.0,)), 3.0
    if "likelihood, geometric" in aligners:
        families["likelihood, geometric"] = mixed(aligners["likelihood, geometric"])
    if bias is not None:
        families |= {
            "another temperature": (System(p, proposal_temperature=0.5), 4.0),
            "bias vector": (System(p, (bias.aligner(),), "product", (1.0,), bias.proposal_temperature), 3.0),
            "contrastive decoding": (System(p, (cell.start,), "product", (-1.0,)), 2.0),
        }
    return families | {name: mixed(model) for name, model in tuned.items()}


def measure_nll(
    families: dict[str, tuple[System, float]], development: list[Example], held_out: list[Example]
) -> dict[str, Any]:
    """Negative log-likelihood of held-out answers, summed by prompt: of each family at its best strength, and at 1."""
    proposal = System(families[MAIN][0].proposal)
    systems = {"proposal": proposal}
    hotter = [proposal._replace(proposal_temperature=t) for t in TEMPERATURES]
    systems["proposal, best temperature"] = min(hotter, key=lambda system: float(nll(system, development).sum()))
    for name, (system, _) in families.items():
        if system.rule == "product" and system.aligners:  # at 1, geometric is the aligner alone
            systems[f"{name}, strength 1"] = system
        if not name.startswith(MAIN) and system.aligners:  # those were trained for strength 1
            tried = [system.at(strength) for strength in STRENGTHS[system.rule]]
            systems[f"{name}, tuned"] = min(tried, key=lambda one: float(nll(one, development).sum()))
    tokens = torch.tensor([len(example.chosen) for example in held_out])
    report: dict[str, Any] = {"tokens": by_prompt(tokens, held_out), "systems": {}}
    for name, system in systems.items():
        settings = {"weights": system.weights, "proposal_temperature": system.proposal_temperature}
        report["systems"][name] = {"nll": by_prompt(nll(system, held_out), held_out), **settings}
    return report


def measure_wins(
    cell: Cell, families: dict[str, tuple[System, float]], development: list[Example], held_out: list[Example], *, few: bool
) -> dict[str, Any]:
    """Win rates over the proposal at matched divergences, by prompt; and of what has no strength."""
    prompts, trial = (unique([example.prompt for example in part]) for part in (held_out, development))
    judge = Judge.load(cell.common / "judge")
    proposal = System(cell.proposal)
    contest = Contest(proposal, prompts, judge)
    own = kl_per_token(sample(families[MAIN][0], trial, n=2, max_tokens=CUT, seed=7))
    nucleus = System(cell.proposal, families["sft, geometric"][0].aligners, "nucleus", (1.0,), proposal_top_p=0.95)
    fixed = {"null: the proposal, another seed": contest.null(), "sft, nucleus .95": contest.hold(nucleus)}
    if not few:
        fixed[f"best of {OF}"] = contest.report(best_of(proposal, prompts, reward_model(cell)), ANSWERS)
    report: dict[str, Any] = {
        "judge": accuracy(judge, held_out).tolist(),
        "judged_prompts": cell.names(held_out),
        "targets": {"own": own, "third": LEAST * own},
        "fixed": fixed,
        "matched": {},
    }
    for label, target in report["targets"].items():
        report["matched"][label] = {}
        for name, (system, most) in families.items():
            if label == "own" or (name in CONTENDERS and not few):
                strength = match(system, most, target, trial)
                report["matched"][label][name] = {"strength": strength, **contest.hold(system.at(strength))}
    return report


def measure_costs(
    cell: Cell, chosen: dict[str, Any], tuned: dict[str, Path], held_out: list[Example], *, few: bool
) -> dict[str, Any]:
    """Seconds of training at one rate and bytes of weights; and whose drafts are accepted."""
    costs = {
        name: {"seconds": report["seconds"], "bytes": (folder / "model.safetensors").stat().st_size}
        for name, (folder, report) in chosen.items()
    }
    for name, folder in tuned.items():
        report = read_json(folder / "tuning.json")
        costs[name] = {"seconds": report["seconds"], "bytes": (folder / "model.safetensors").stat().st_size}
    prompts, drafts = unique([example.prompt for example in held_out]), {}
    for name in (MAIN,) if few else (MAIN, f"{MAIN}, alone"):
        folder = chosen[name][0]
        system = from_folder(cell.proposal, folder)
        tokens = sample(system, prompts, n=1, max_tokens=CUT, seed=14).tokens
        drafters = {
            "the aligner itself": folder,
            "its start": cell.start,
            "its SFT sibling": chosen["sft"][0],
            "its distilled drafter": distil_draft(folder, cell, name),
        }
        drafts[name] = {who: acceptance(system, drafter, prompts, tokens) for who, drafter in drafters.items()}
    return {"costs": costs, "acceptance": drafts, "proposal_bytes": (cell.proposal / "model.safetensors").stat().st_size}


def unique(prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt once, in order."""
    return [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]


def by_prompt(values: torch.Tensor, examples: list[Example]) -> list[float]:
    """Sums over the examples of each prompt, in the order of `unique`."""
    places = {tuple(prompt): i for i, prompt in enumerate(unique([example.prompt for example in examples]))}
    owner = torch.tensor([places[tuple(example.prompt)] for example in examples])
    return torch.zeros(len(places), dtype=torch.float64).index_add(0, owner, values.double()).tolist()


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except TrimtabError as error:
        raise SystemExit(f"error: {error}") from error
