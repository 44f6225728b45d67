"""What `trimtab score` says of a share of each aligner: the ratio is a slope of the likelihood, cut proposals included."""

import json
import math

import pytest
import torch

from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import make_task
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.cli.score import render
from trimtab.core.shares import GAP
from trimtab.evaluate.likelihood import held_out
from trimtab.models.table import TableLM

V, EOS = 6, 0
PROPOSAL = TableLM.random(V, order=2, seed=0)
ALIGNERS = [TableLM.random(V, order=1, seed=seed) for seed in (1, 2)]
PROMPTS = [[1 + i % 5] for i in range(30)]
ANSWERS = [
    c.tokens
    for c in AlignedModel(PROPOSAL, ALIGNERS, eos_token_ids=[EOS], rule="mixture", weight=[0.3, 0.1]).generate(
        PROMPTS, [SamplingParams(max_tokens=12, seed=i) for i in range(30)]
    )
]
SOURCES = [f"row {i}" for i in range(30)]


def report_of(proposal=PROPOSAL, aligners=2, answers=ANSWERS, **settings):
    model = AlignedModel(proposal, ALIGNERS[:aligners], eos_token_ids=[EOS], **settings)
    return model, held_out(model, PROMPTS, answers, SOURCES)


@pytest.mark.parametrize(
    "warps", [{}, {"proposal_temperature": 0.7, "aligner_temperature": 1.4}, {"proposal_top_k": 4}], ids=str
)
@pytest.mark.parametrize("rule", ["mixture", "product"])
def test_the_ratio_less_one_is_the_slope_at_no_share(rule, warps):
    """By a difference quotient of the likelihood that `mixture` decodes with, whatever rule is asked for."""
    model, report = report_of(rule=rule, **warps)
    if warps.get("proposal_top_k"):
        assert report["outside_support"] > 0
    for which in range(2):
        share = 1e-6
        means = []
        for weight in (0.0, share):
            weights = [weight if i == which else 0.0 for i in range(2)]
            scores = model.score(PROMPTS, ANSWERS, SamplingParams(rule="mixture", weight=weights, **warps))
            said = [value for score in scores for value in score.aligned if value > -math.inf]
            means.append(math.fsum(said) / len(said))
        assert report["likelihood_ratio"][which] - 1 == pytest.approx((means[1] - means[0]) / share, abs=1e-4)


def test_the_interval_is_over_sequences():
    """Ten times the records tell it √10 times as well; one record does not tell it at all."""
    _, report = report_of(aligners=1)
    low, high = report["likelihood_ratio_interval"]
    assert low < report["likelihood_ratio"] < high
    model = AlignedModel(PROPOSAL, ALIGNERS[:1], eos_token_ids=[EOS])
    many = held_out(model, PROMPTS * 10, ANSWERS * 10, SOURCES * 10)["likelihood_ratio_interval"]
    assert (many[1] - many[0]) == pytest.approx((high - low) / math.sqrt(10), rel=0.2)
    alone = held_out(model, PROMPTS[:1], ANSWERS[:1], SOURCES[:1])
    assert alone["likelihood_ratio_interval"] is None
    tokens = [
        math.exp(q - p) for score in model.score(PROMPTS, ANSWERS) for p, q in zip(score.proposal, score.aligner, strict=True)
    ]
    assert report["likelihood_ratio"] == pytest.approx(math.fsum(tokens) / len(tokens))


def test_the_best_shares_are_those_that_score_best():
    model, report = report_of(rule="mixture")
    best = report["best_shares"]
    assert best["gap"] <= GAP

    def nll(weights):
        return held_out(model, PROMPTS, ANSWERS, SOURCES, SamplingParams(rule="mixture", weight=weights))["nll"]["aligned"]

    assert best["nll"] == pytest.approx(nll(best["weight"]))
    for near in ([0.03, 0.0], [0.0, 0.03], [-0.03, 0.0], [0.0, -0.03], [0.03, -0.03]):
        beside = [max(0.0, w + d) for w, d in zip(best["weight"], near, strict=True)]
        assert nll(beside) >= best["nll"] - 1e-12
    assert "best_shares" not in report_of(rule="product")[1]


def test_a_proposal_that_is_cut_has_no_concave_problem_to_solve():
    report = report_of(rule="mixture", proposal_top_k=4)[1]
    assert report["best_shares"] is None
    shown = render(report | {"failed": 0})
    assert "the best shares are solved for only where every token is possible" in shown
    assert f"{report['outside_support']} tokens, which the proposal cannot say at any share, have no part in it" in shown


def test_tokens_that_the_proposal_cannot_say_leave_a_ratio_of_the_others():
    """Of p = (½, ½, 0), q = (¼, ¼, ½) and the tokens 0, 1, 2: two ratios of ½, and ½ of q outside. Then of token 2 alone."""
    rows = [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]
    proposal, aligner = (TableLM(torch.tensor(row, dtype=torch.float64).log()) for row in rows)
    model = AlignedModel(proposal, [aligner])
    report = held_out(model, [[1]], [[0, 1, 2]], ["a"])
    assert report["outside_support"] == 1
    assert report["likelihood_ratio"] == pytest.approx(0.5 + 0.5)
    none = held_out(model, [[1], [1]], [[2], [2]], ["a", "b"])
    assert (none["likelihood_ratio"], none["likelihood_ratio_interval"], none["outside_support"]) == (None, None, 2)
    assert "none can be given" in render(none)


def test_without_an_aligner_there_is_no_ratio():
    model = AlignedModel(PROPOSAL, eos_token_ids=[EOS])
    report = held_out(model, PROMPTS, ANSWERS, SOURCES)
    assert not {"likelihood_ratio", "outside_support", "best_shares"} & set(report)


@pytest.mark.parametrize(
    ("ratio", "interval", "said"),
    [
        (
            1.25,
            [1.1, 1.4],
            "1.2500 [1.1000, 1.4000]: above 1, so a small share of it in 'mixture' improves the likelihood: {}+0.2500",
        ),
        (
            0.8,
            [0.7, 0.9],
            "0.8000 [0.7000, 0.9000]: below 1, so a small share of it in 'mixture' worsens the likelihood: {}-0.2000",
        ),
        (1.1, [0.9, 1.3], "1.1000 [0.9000, 1.3000]: these data do not tell it from 1"),
        (1.1, None, "1.1000: above 1"),
    ],
)
def test_what_is_said_of_a_ratio(ratio, interval, said):
    _, report = report_of(aligners=1)
    shown = render(report | {"likelihood_ratio": ratio, "likelihood_ratio_interval": interval})
    assert "mean likelihood ratio q/p of aligner: " + said.format("the slope at weight 0 is ") in shown


def test_the_command_prints_it_and_takes_the_shares_that_it_prints(tmp_path, capsys):
    make_task(tmp_path)
    base = ["score", "--proposal", str(tmp_path / "proposal"), "--dataset", str(tmp_path / "held_out.jsonl")]
    save_tiny(tmp_path / "other", tiny_model("llama", 28, seed=3, spread=0.2), tiny_tokenizer())
    pair = [*base, "--aligner", str(tmp_path / "start"), "--aligner", str(tmp_path / "other")]
    assert main([*pair, "--rule", "mixture"]) == 0
    shown = capsys.readouterr().out
    assert "mean likelihood ratio q/p of aligner 1: " in shown
    assert "mean likelihood ratio q/p of aligner 2: " in shown
    (best,) = [line for line in shown.splitlines() if line.startswith("best shares for these data: ")]
    weights = best.split(": ")[1].split(", with")[0].split()
    assert main([*pair, "--rule", "mixture", *weights, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll"]["aligned"] == pytest.approx(report["best_shares"]["nll"], abs=1e-4)
    assert len(report["likelihood_ratio"]) == len(report["likelihood_ratio_interval"]) == 2
    assert main([*pair, "--rule", "mixture", "--weight", "0.7", "--weight", "0.7"]) == 2
    assert "weight: under mixture the aligners' shares sum to 1.4" in capsys.readouterr().err
