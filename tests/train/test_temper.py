"""The tempered start: exponents against a grid, what is given stays, and a run that starts where the fit says."""

import json
import logging
import math

import pytest
import torch

from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, answer_rows, asked, make_task, task_options
from trimtab import AlignedModel, SamplingParams
from trimtab.core.objectives import likelihood
from trimtab.core.rules import Product
from trimtab.data.examples import Example, answers
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train import temper
from trimtab.train.batches import Item, collate
from trimtab.train.footprint import Ledger
from trimtab.train.inputs import read_parts
from trimtab.train.plan import Temperatures, resolve
from trimtab.train.rows import Layout, ModelRows
from trimtab.train.run import run_training as train
from trimtab.train.temper import LEAST, MOST, fit_exponents

NAMES = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o"}


def sample(a: float, s: float, count: int = 6000):
    """Rows of two models over seven tokens, and tokens drawn at the exponents a and s."""
    generator = torch.Generator().manual_seed(3)
    logp = (2 * torch.randn(count, 7, generator=generator)).log_softmax(-1)
    logq = (2 * torch.randn(count, 7, generator=generator)).log_softmax(-1)
    tokens = torch.multinomial((a * logp + s * logq).softmax(-1), 1, generator=generator)[:, 0]
    return logp, logq, tokens


def nll(logp, logq, tokens, a, s):
    return float(likelihood(Product(), (a * logp).log_softmax(-1), (s * logq).log_softmax(-1), 1.0, tokens).mean())


@pytest.mark.parametrize(("a", "s"), [(0.7, 0.4), (1.3, 0.9), (0.4, 2.0)])
def test_the_exponents_are_found_and_no_neighbour_is_better(a, s):
    rows = sample(a, s)
    found = fit_exponents(*rows, width=math.inf)
    assert found == (pytest.approx(a, abs=0.06), pytest.approx(s, abs=0.06))
    best = nll(*rows, *found)
    for da, ds in ((0.02, 0), (-0.02, 0), (0, 0.02), (0, -0.02)):
        assert nll(*rows, found[0] + da, found[1] + ds) > best


def test_a_given_exponent_stays_and_the_other_is_best_beside_it():
    rows = sample(0.7, 0.5)
    a, s = fit_exponents(*rows, 1.0)
    assert a == 1.0
    assert nll(*rows, 1.0, s) < min(nll(*rows, 1.0, s + 0.03), nll(*rows, 1.0, s - 0.03))


@pytest.mark.parametrize(("truth", "bound"), [(-0.5, LEAST), (0.0, LEAST), (9.0, MOST)])
def test_the_aligners_exponent_stays_within_bounds_and_the_proposals_is_best_there(truth, bound):
    rows = sample(0.8, truth)
    a, s = fit_exponents(*rows, width=math.inf)
    assert s == bound
    assert nll(*rows, a, s) < min(nll(*rows, a + 0.03, s), nll(*rows, a - 0.03, s))


@pytest.mark.parametrize("width", [0.05, 0.2, 1.0])
def test_the_prior_is_half_a_nat_a_token_at_its_width(width):
    """By brute force on a grid: the minimum of −log likelihood + ((a − 1) / width)² / 2, nearer to 1 than the likelihood's."""
    rows = sample(0.5, 0.4, count=800)

    def penalised(a, s):
        return nll(*rows, a, s) + ((a - 1) / width) ** 2 / 2

    grid = [(a / 100, s / 100) for a in range(40, 104, 2) for s in range(26, 70, 2)]
    best = min(grid, key=lambda point: penalised(*point))
    found = fit_exponents(*rows, width=width)
    assert found == (pytest.approx(best[0], abs=0.02), pytest.approx(best[1], abs=0.02))
    assert penalised(*found) <= penalised(*best) + 1e-9
    assert fit_exponents(*rows, width=math.inf)[0] < found[0] < 1


def test_a_weak_aligner_does_not_flatten_the_proposal():
    """A noisy twin of a proposal that knows the answers: the likelihood alone would halve the proposal to make room for it."""
    generator = torch.Generator().manual_seed(5)
    logp, noise = (2 * torch.randn(3000, 7, generator=generator) for _ in range(2))
    logp, logq = logp.log_softmax(-1), (2 * logp + noise).log_softmax(-1)
    tokens = torch.multinomial(logp.exp(), 1, generator=generator)[:, 0]
    free, kept = fit_exponents(logp, logq, tokens, width=math.inf), fit_exponents(logp, logq, tokens)
    assert free[1] == kept[1] == LEAST
    assert free[0] < 0.7 < 0.95 < kept[0] < 1


def test_a_start_that_harms_the_proposal_is_warned_of(tmp_path, caplog):
    """An aligner of random weights far from uniform, even at its highest temperature: the figures are those of the start."""
    task = make_task(tmp_path)
    save_tiny(task / "bad", tiny_model("llama", V, seed=6, spread=2.0, num_hidden_layers=1), tiny_tokenizer())
    with caplog.at_level(logging.WARNING, "trimtab"):
        train(task_options(task, "harmed", {"max_steps": 1, "learning_rate": 1e-12}, aligner=str(task / "bad")))
        train(task_options(task, "unharmed", {"max_steps": 1}))
    said = [record for record in caplog.records if "harms the proposal" in record.message]
    assert len(said) == 1
    assert "--start uniform" in said[0].message
    temperature, _, started, alone = said[0].args
    assert temperature == 1 / LEAST
    report = json.loads((task / "harmed" / "training.json").read_text())
    assert started == pytest.approx(report["metrics"]["eval_nll_aligned"], abs=2e-3)
    assert started > alone


def test_impossible_tokens_stay_impossible():
    logp, logq, tokens = sample(0.7, 0.4)
    logp, logq = torch.cat([logp, torch.full((len(logp), 1), -math.inf)], 1), torch.cat([logq, torch.zeros(len(logq), 1)], 1)
    assert fit_exponents(logp, logq, tokens) == pytest.approx(fit_exponents(logp[:, :7], logq[:, :7], tokens), abs=1e-4)


def test_rows_are_read_and_computed_with_in_pieces(monkeypatch):
    """The same temperatures; and beside the rows that are kept no more than one example's logits and some pieces."""
    v, layout = 600, Layout(40)
    model, proposal = tiny_model("llama", v, seed=1), HuggingFaceLM(tiny_model("llama", v, seed=2))
    examples = [Example([3, i], [(7 * i + j) % v for j in range(4 + i % 9)], [5]) for i in range(1, 40)]
    rows, answered = ModelRows(proposal, "sha256:p"), answers(examples, "chosen")
    whole = [torch.cat([cached.rebuild(v) for cached in rows.compress(answered, layout, 1.0).rows])]
    whole += [torch.cat([answer_rows(model, collate([Item(e)]), "chosen", v).detach() for e in answered])]
    expected = fit_exponents(*whole, torch.cat([torch.tensor(e.chosen) for e in answered]))
    monkeypatch.setattr(temper, "PIECE", 8 * v)
    with Ledger() as ledger:
        found = temper.fit_temperatures(model, rows, examples, 16, None, layout)
    assert found == pytest.approx([1 / exponent for exponent in expected], abs=2e-3)
    kept = sum(row.nbytes for row in whole)
    assert ledger.peak < 1.6 * kept


def test_a_run_starts_tempered_by_default_and_says_so_in_its_manifest(tmp_path):
    report = train(task_options(make_task(tmp_path), "tempered"))
    fitted = json.loads((tmp_path / "tempered" / "start.json").read_text())
    manifest = json.loads((tmp_path / "tempered" / "trimtab.json").read_text())
    assert manifest["proposal_temperature"] == fitted["proposal"] != 1
    assert manifest["aligner_temperature"] == fitted["aligner"] != 1
    rates = {entry["step"]: entry["learning_rate"] for entry in report["history"] if "learning_rate" in entry}
    assert rates[4] / fitted["aligner"] == pytest.approx(1e-2 * 9 / 11)  # one step of warm-up, then a line down to 0
    first = next(entry for entry in report["history"] if "eval_nll_aligned" in entry)
    assert first["eval_nll_aligned"] < first["eval_nll_proposal"]


def test_what_an_aligner_knows_by_heart_is_not_trusted(tmp_path):
    """It has seen the training answers before, so the fit is on development's: no other temperature is better there."""
    task = make_task(tmp_path)
    train(task_options(task, "by-heart", {"max_steps": 16}, objective="sft", rule="geometric"))
    again = task_options(task, "again", {"max_steps": 1, "learning_rate": 1e-9}, aligner=str(task / "by-heart"))
    train(again)
    fitted = Temperatures(**json.loads((task / "again" / "start.json").read_text()))
    model = AlignedModel.from_pretrained(task / "proposal", task / "again", weight=1.0)
    records = read_parts(resolve(again), tiny_tokenizer())[1]
    texts = [record.prompt for record in records], [record.chosen for record in records]

    def loss(temperature: float) -> float:
        return -sum(sum(one.aligned) for one in model.score(*texts, SamplingParams(aligner_temperature=temperature)))

    assert loss(fitted.aligner) < min(loss(fitted.aligner * 1.1), loss(fitted.aligner / 1.1))


def test_who_starts_tempered():
    assert resolve(asked(**NAMES)).fits_temperatures
    assert resolve(asked(**NAMES, use_peft=True)).fits_temperatures
    for other in (
        {"rule": "geometric"},
        {"objective": "sft"},
        {"start": "uniform"},
        {"aligner_temperature": 2.0},
        {"weight": 0.0},
    ):
        assert not resolve(asked(**NAMES, **other)).fits_temperatures
    with pytest.raises(InvalidOption, match="leave out --aligner_temperature"):
        resolve(asked(**NAMES, start="tempered", aligner_temperature=2.0))
    with pytest.raises(InvalidOption, match="likelihood with product"):
        resolve(asked(**NAMES, start="tempered", objective="sft"))
