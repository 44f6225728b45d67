"""Training options: contradictions are refused before any work, and a poor match of objective and rule is said."""

import logging

import pytest

from brought import look_again
from looking import Tiring
from tiny_task import asked
from trimtab.core.rules import RULES, register
from trimtab.errors import InvalidOption
from trimtab.train.checks import warn_of_rule
from trimtab.train.plan import Facts, Temperatures, resolve

NAMES = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": ""}, "--proposal is required"),
        (
            {"objective": "dpo"},
            "there is no objective 'dpo'; choose one of grpo, likelihood, preference, ram, sft, soft_q, subtb, tb",
        ),
        ({"rule": "par"}, "there is no rule 'par'"),
        ({"rule": "nucleus"}, "likelihood trains product, geometric or mixture, for 'nucleus' use sft"),
        ({"start": "zero"}, "start must be one of auto, tempered, pretrained, uniform"),
        ({"start": "uniform", "use_peft": True}, "choose one of them"),
        ({"weight": float("nan")}, "weight must be"),
        ({"alpha": -1.0, "objective": "ram"}, "alpha must be at least 0, not -1.0"),
        ({"alpha": 0.1}, "alpha is for --objective ram, and 'likelihood' has none: leave it out"),
        ({"beta": 0.0}, "beta must be above 0, not 0.0"),
        (
            {"beta": 0.1, "objective": "sft", "rule": "geometric"},
            "beta is for --objective grpo, likelihood, preference, tb, soft_q or subtb, and 'sft'",
        ),
        ({"beta": 0.1, "contrast": 0.0}, "beta: there is no contrast: leave it out"),
        ({"beta": 0.1, "rule": "geometric"}, "beta: there is no contrast: leave it out"),
        ({"contrast_on": "edits", "contrast": 0.0}, "contrast_on: there is no contrast: leave it out"),
        ({"contrast_on": "edits", "rule": "geometric"}, "contrast_on: there is no contrast: leave it out"),
        (
            {"contrast_on": "edits", "objective": "ram"},
            "contrast_on is for --objective likelihood or preference, and 'ram' has none: leave it out",
        ),
        ({"contrast_on": "tokens"}, "contrast_on must be one of answers, edits, not 'tokens'"),
        ({"edit_margin": 1}, "edit_margin: it widens edits: give --contrast_on edits, too, or leave it out"),
        ({"edit_margin": 1, "objective": "preference"}, "edit_margin: it widens edits"),
        ({"edit_margin": -1, "contrast_on": "edits"}, "edit_margin must be at least 0, not -1"),
        ({"contrast": -1.0}, "contrast must be at least 0, not -1.0"),
        (
            {"sft_weight": 1.0, "objective": "sft", "rule": "geometric"},
            "sft_weight is for --objective likelihood, and 'sft' has none",
        ),
        ({"contrast": 1.0, "objective": "preference"}, "contrast is for --objective likelihood, and 'preference' has none"),
        ({"proposal_temperature": 0.0}, "proposal_temperature must be at least 0.001, not 0.0"),
        ({"proposal_top_p": 1.5}, "proposal_top_p must be above 0 and at most 1, not 1.5"),
        ({"dev_fraction": 0.95}, "dev_fraction must be above 0 and at most 0.9, not 0.95"),
        ({"max_length": 1}, "max_length must be at least 2, not 1"),
        ({"cache_tail_samples": -1}, "cache_tail_samples must be at least 0, not -1"),
        (
            {"cache_tail_samples": 8, "rule": "geometric"},
            "cache_tail_samples must be 0 here: draws can stand for the tail in product",
        ),
        ({"cache_tail_samples": 8, "cache_top_k": 0}, "cache_tail_samples must be 0 here: --cache_top_k 0 keeps every entry"),
        (
            {"cache_tail_samples": 8, "proposal_endpoint": ("http://a",)},
            "cache_tail_samples must be 0 here: an endpoint does not say",
        ),
        ({"cache_top_k": -1}, "cache_top_k must be at least 0, not -1"),
        ({"lora_r": 0}, "lora_r must be at least 1, not 0"),
        ({"max_examples": 1}, "max_examples must be at least 2, not 1"),
        ({"columns": ("prompt",)}, "columns must be FIELD=COLUMN"),
        (
            {"columns": ("post=prompt",)},
            "with a field of prompt, completion, chosen, rejected, messages, tools, chat_template",
        ),
        ({"columns": ("prompt=a", "prompt=b")}, "columns names 'prompt' twice"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(InvalidOption, match=message):
        resolve(asked(**(NAMES | settings)))


def test_a_rule_that_looks_back_is_refused(monkeypatch):
    look_again(RULES, monkeypatch)
    register(Tiring)
    with pytest.raises(InvalidOption, match="rule: 'tiring' looks at the text before a row, and aligners are trained on rows"):
        resolve(asked(**NAMES, objective="sft", rule="tiring"))


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"objective": "sft", "rule": "geometric"}, False),
        ({"objective": "sft"}, True),
        ({"objective": "ram", "rule": "nucleus"}, False),
        ({"objective": "preference", "rule": "geometric"}, True),
        ({"objective": "likelihood", "rule": "mixture"}, False),
        ({"objective": "sft", "rule": "mixture"}, False),
        ({"objective": "sft", "rule": "kl_gate(tau=1)"}, False),
        ({"objective": "ram", "rule": "nudge"}, False),
        ({"objective": "sft", "rule": "gate(rule=gate(rule=mixture), by=max_p)"}, False),
        ({"objective": "sft", "rule": "gate(by=max_p)"}, True),
    ],
)
def test_a_rule_that_does_not_decode_what_is_trained_is_warned_of(settings, warned, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_rule(resolve(asked(**(NAMES | settings))))
    assert [("does not train what rule" in record.message) for record in caplog.records] == [True] * warned


def test_the_tail_is_drawn_from_where_draws_can_stand_for_it():
    def layout(**settings):
        return resolve(asked(**(NAMES | settings))).row_layout(1000)

    assert layout() == (64, 64)
    assert layout(cache_tail_samples=0) == layout(rule="geometric") == layout(proposal_endpoint=("http://a",)) == (64, 0)
    assert layout(objective="sft", rule="kl_gate(tau=1)", cache_top_k=9) == (9, 0)
    assert layout(cache_top_k=9, cache_tail_samples=7, objective="preference") == (9, 7)
    assert layout(cache_top_k=0) == layout(cache_top_k=2000) == (1000, 0)


def test_a_residual_is_contrasted_on_pairs(caplog):
    caplog.set_level(logging.WARNING, "trimtab")
    cases = [
        ({}, True, 1.0, 1.0),
        ({}, False, 0.0, 1.0),
        ({"contrast": 0.5, "beta": 0.2}, True, 0.5, 0.2),
        ({"contrast": 0.0}, True, 0.0, 1.0),
        ({"start": "uniform"}, True, 1.0, 1.0),
        ({"start": "pretrained"}, True, 1.0, 1.0),
        ({"rule": "geometric"}, True, 0.0, 1.0),
        ({"objective": "preference"}, True, 0.0, 0.1),
    ]
    for settings, pairs, contrast, beta in cases:
        facts = Facts(records=8, lacking=0 if pairs else 8)
        for known in (facts, facts._replace(fitted=Temperatures(1.5, 3.0))):
            objective = resolve(asked(**(NAMES | settings)), known).objective
            assert (getattr(objective, "contrast", 0.0), objective.beta) == (contrast, beta)
            assert objective.answers == (("chosen", "rejected") if contrast or "objective" in settings else ("chosen",))
        asked(**(NAMES | settings)).asked_objective.announce(resolve(asked(**(NAMES | settings)), facts).setting)
    assert not caplog.records
    some = asked(**NAMES)
    plan = resolve(some, Facts(records=8, lacking=1))
    assert plan.objective.contrast == 0
    some.asked_objective.announce(plan.setting)
    assert [record.getMessage()[:38] for record in caplog.records] == ["1 of 8 records have no rejected answer"]


@pytest.mark.parametrize("option", [{"beta": 0.3}, {"contrast_on": "edits"}])
def test_an_option_of_a_contrast_that_there_is_not_is_refused_as_soon_as_the_data_are_known(option):
    some = asked(**NAMES, **option)
    (name,) = option
    assert resolve(some).objective.contrast is None
    assert getattr(resolve(some, Facts(records=8)).objective, name) == option[name]
    with pytest.raises(InvalidOption, match=f"{name}: records without a rejected answer have no contrast: leave it out"):
        resolve(some, Facts(records=8, lacking=1))


def test_a_plan_is_always_made_from_what_was_asked():
    """Whatever is known makes no difference to what it does not decide, and resolving again changes nothing."""
    some = asked(**NAMES, objective="preference", beta=0.2, max_length=99)
    early, late = resolve(some), resolve(some, Facts(records=8, fitted=Temperatures(2.0, 1.0)))
    assert early.asked == late.asked == some.__class__(**{**vars(some), "rule": "product"})
    assert (early.weight, early.rule, early.objective) == (late.weight, late.rule, late.objective)
    assert resolve(early.asked) == early


def test_a_tempered_start_is_regularised_and_stays_so_at_the_temperatures_that_were_fitted():
    fitted = Temperatures(1.5, 3.0)
    cases = [
        ({}, 0.3),
        ({"sft_weight": 0.2}, 0.2),
        ({"sft_weight": 0.0}, 0.0),
        ({"start": "uniform"}, 0.0),
        ({"rule": "geometric"}, 0.0),
        ({"objective": "sft", "rule": "geometric"}, 0.0),
    ]
    for settings, expected in cases:
        for facts in (Facts(records=8), Facts(records=8, fitted=fitted)):
            objective = resolve(asked(**(NAMES | settings)), facts).objective
            assert getattr(objective, "sft_weight", 0.0) == expected
