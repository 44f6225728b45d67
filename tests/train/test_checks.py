"""What a run warns of: when each warning comes, with which figures, and when it does not."""

import json
import logging

import pytest
import torch

from tiny_task import asked, make_task, task_options
from trimtab.core.logprobs import kl_divergence
from trimtab.core.rules import Product
from trimtab.train.checks import Written, check_texts, warn_of_start, warn_of_weight
from trimtab.train.plan import resolve
from trimtab.train.run import run_training as train
from trimtab.train.tune import Look, Tuned, tune_weight

NAMES = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o"}


@pytest.fixture
def said(caplog):
    """The warnings so far; asking forgets them."""

    def take():
        messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return messages

    with caplog.at_level(logging.WARNING, "trimtab"):
        yield take


def test_a_start_is_warned_of_where_it_is_at_a_limit_or_harms(said):
    warn_of_start(0.4, (0.25, 4.0), 3.0, 3.1)
    assert said() == []
    warn_of_start(0.25, (0.25, 4.0), 3.0, 3.1)
    warn_of_start(4.0, (0.25, 4.0), 3.0, 3.1)
    highest, lowest = said()
    assert "fitted to 4, the highest allowed: its own probabilities say little" in highest
    assert "fitted to 0.25, the lowest allowed: its own probabilities are too flat" in lowest
    warn_of_start(0.25, (0.25, 4.0), 6.04, 4.16)
    (harm,) = said()
    assert "harms the proposal, even at its best temperature, 4, the highest allowed: 6.040 nats" in harm
    assert "alone has 4.160; --start uniform" in harm


@pytest.mark.parametrize(
    ("weight", "nll", "kl", "bound", "settings", "message"),
    [
        (1.0, 3.0, 0.6, False, {}, None),
        (0.75, 3.0, 0.6, False, {}, None),
        (0.0, 3.5, 0.0, False, {}, "the tuned weight is 0: the development data are explained best without"),
        (2.0, 3.0, 0.6, False, {}, "the tuned weight, 2, is the largest"),
        (0.5, 3.0, 0.6, False, {}, "the tuned weight, 0.5, is far below the trained one, 1"),
        (0.5, 3.0, 0.6, False, {"objective": "sft", "rule": "geometric"}, None),
        (0.25, 3.0, 0.6, True, {"max_kl": 0.6}, None),
        (0.0, 3.5, 0.0, True, {"max_kl": 1e-6}, None),
        (1.0, 3.0, 1.2, False, {}, "1.200 nats a token from the proposal for a gain of 0.500, which is 2.4 for one"),
        (1.0, 3.6, 1.2, False, {}, "1.200 nats a token from the proposal for a gain of -0.100"),
        (1.0, 3.0, 1.2, False, {"objective": "preference"}, None),
    ],
)
def test_a_tuned_weight_is_warned_of_by_where_it_lies_and_what_it_costs(said, weight, nll, kl, bound, settings, message):
    warn_of_weight(resolve(asked(**NAMES, **settings)), Tuned(weight, [(0.0, 3.5), (weight, nll)], kl, bound))
    messages = said()
    assert len(messages) == (message is not None)
    assert all(message in one for one in messages)


def test_a_nat_of_divergence_buys_a_nat_of_likelihood_where_the_weight_is_the_best():
    """By enumeration: E_wanted log q = E_aligned log q at the best λ, so KL(wanted‖p̃) − KL(wanted‖aligned) = KL(aligned‖p̃).

    The wanted law is no member of the family p̃·q^λ. Tokens are repeated as often as it wants them.
    """
    logp = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
    logq = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).log()
    counts = torch.tensor([25, 31, 17, 27])
    tokens = torch.repeat_interleave(torch.arange(4), counts)
    rows = [row.expand(100, 4) for row in (logp, logq)]

    def look(weight):
        aligned = Product().target(rows[0], [rows[1]], torch.tensor([weight], dtype=torch.float64))
        return -aligned[torch.arange(100), tokens], kl_divergence(aligned, rows[0])

    tuned = tune_weight(Product(), lambda: [Look(look, torch.ones(100))])
    gain = float(-logp[tokens].mean()) - dict(tuned.tried)[tuned.weight]
    assert 0.5 < tuned.weight < 1.5
    assert tuned.kl == pytest.approx(gain, rel=0.06)  # the weight is the best of a grid of 1/16


LOOP = "open the file and open the file and open the file and open the file and"
PLAIN = "Return the names of all files that are still open."


@pytest.mark.parametrize(
    ("proposal", "aligned", "wanted", "message"),
    [
        ([PLAIN] * 4, [PLAIN] * 4, [PLAIN] * 4, None),
        ([PLAIN] * 4, [LOOP] * 4, [PLAIN] * 4, "69% of the 4-grams in an answer are repeated (proposal 0%, wanted 0%)"),
        ([LOOP] * 4, [LOOP] * 4, [PLAIN] * 4, None),
        ([PLAIN] * 4, [LOOP] * 4, [LOOP] * 4, None),
        ([PLAIN] * 4, [PLAIN, "", " ", "!"], [PLAIN] * 4, "50% are empty where wanted ones are not (proposal 0%)"),
        ([PLAIN] * 4, ["", "", "", ""], [""] * 4, None),
    ],
)
def test_text_that_loops_or_is_empty_is_broken(said, proposal, aligned, wanted, message):
    sides = [Written(texts, [True] * 4) for texts in (proposal, aligned, wanted)]
    check_texts(*sides)
    messages = said()
    assert len(messages) == (message is not None)
    assert all(message in one for one in messages)


def test_text_that_does_not_end_where_wanted_answers_do_is_broken(said):
    texts = [PLAIN] * 4
    figures = check_texts(
        Written(texts, [True, True, True, False]),
        Written(texts, [False, False, True, True]),
        Written(texts, [True, True, True, False]),
    )
    assert (figures["unended_proposal"], figures["unended_aligned"]) == (0, pytest.approx(2 / 3))
    assert "67% do not end where wanted ones do (proposal 0%)" in said()[0]
    check_texts(Written(texts, [False] * 4), Written(texts, [False] * 4), Written(texts, [False] * 4))
    assert said() == []


def test_a_teacher_that_is_broken_itself_is_named_and_stands_beside_the_aligned_model(said):
    """What loops or goes on behind the teacher's prompt is learnt: that is no fault of the training, and no secret either."""
    good, bad = Written([PLAIN] * 4, [True] * 4), Written([LOOP] * 4, [False] * 4)
    figures = check_texts(good, bad, good, bad)
    assert (figures["repetition_teacher"], figures["unended_teacher"]) == (pytest.approx(0.69, abs=0.01), 1)
    aligned, teacher = said()
    assert "aligned model's greedy answers" in aligned
    assert "100% do not end where wanted ones do (proposal 0%, teacher 100%)" in aligned
    assert "repeated" not in aligned, "the teacher repeats as much"
    assert "behind teacher_prompt look broken: 69% of the 4-grams in an answer are repeated (proposal 0%, wanted 0%)" in teacher
    assert "100% do not end where wanted ones do (proposal 0%); what it says there is what is learnt" in teacher


def test_an_aligned_model_that_is_worse_than_its_teacher_is_broken(said):
    good, bad = Written([PLAIN] * 4, [True] * 4), Written([LOOP] * 4, [False] * 4)
    check_texts(good, bad, good, good)
    (message,) = said()
    assert (
        "repeated (proposal 0%, teacher 0%, wanted 0%); 100% do not end where wanted ones do (proposal 0%, teacher 0%)"
        in message
    )


def test_a_run_warns_of_the_weight_that_it_tuned(tmp_path, said):
    """Trained far past the best on few examples: the development answers want less of it."""
    task = make_task(tmp_path)
    settings = {"max_steps": 60, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "load_best_model_at_end": False}
    train(task_options(task, "long", settings, max_examples=12, start="uniform"))
    report = json.loads((task / "long" / "training.json").read_text())
    assert report["weight"] <= 0.5
    assert any(
        f"the tuned weight, {report['weight']:g}, is" in message or "the tuned weight is 0" in message for message in said()
    )
