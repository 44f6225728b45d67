"""Training options: contradictions are refused before any work, and a poor match of objective and rule is said."""

import logging

import pytest

from brought import look_again
from looking import Tiring
from trimtab.core.rules import RULES, register
from trimtab.errors import InvalidOption
from trimtab.train.checks import warn_of_rule
from trimtab.train.options import Temperatures, TrainOptions

NAMES = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": ""}, "--proposal is required"),
        ({"objective": "dpo"}, "objective must be one of"),
        ({"rule": "par"}, "there is no rule 'par'"),
        ({"rule": "nucleus"}, "likelihood trains product or geometric, for 'nucleus' use sft"),
        ({"start": "zero"}, "start must be one of auto, tempered, pretrained, uniform"),
        ({"start": "uniform", "use_peft": True}, "choose one of them"),
        ({"weight": float("nan")}, "weight must be a finite number"),
        ({"alpha": -1.0}, "alpha must be from 0"),
        ({"beta": 0.0}, "beta must be from"),
        ({"contrast": -1.0}, "contrast must be from 0"),
        (
            {"sft_weight": 1.0, "objective": "sft", "rule": "geometric"},
            "sft_weight is a part of likelihood, and 'sft' has none",
        ),
        ({"contrast": 1.0, "objective": "preference"}, "contrast is a part of likelihood, and 'preference' has none"),
        ({"proposal_temperature": 0.0}, "proposal_temperature must be from"),
        ({"proposal_top_p": 1.5}, "proposal_top_p must be from"),
        ({"dev_fraction": 0.95}, "dev_fraction must be from"),
        ({"max_length": 1}, "max_length must be from 2"),
        ({"cache_tail_samples": -1}, "cache_tail_samples must be from 0"),
        (
            {"cache_tail_samples": 8, "rule": "geometric"},
            "cache_tail_samples must be 0 here: draws can stand for the tail in product",
        ),
        ({"cache_tail_samples": 8, "cache_top_k": 0}, "cache_tail_samples must be 0 here: --cache_top_k 0 keeps every entry"),
        (
            {"cache_tail_samples": 8, "proposal_endpoint": ("http://a",)},
            "cache_tail_samples must be 0 here: an endpoint does not say",
        ),
        ({"cache_top_k": -1}, "cache_top_k must be from 0"),
        ({"lora_r": 0}, "lora_r must be from 1"),
        ({"max_examples": 1}, "max_examples must be from 2"),
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
        TrainOptions(**(NAMES | settings))


def test_a_rule_that_looks_back_is_refused(monkeypatch):
    look_again(RULES, monkeypatch)
    register(Tiring)
    with pytest.raises(InvalidOption, match="rule: 'tiring' looks at the text before a row, and aligners are trained on rows"):
        TrainOptions(**NAMES, objective="sft", rule="tiring")


@pytest.mark.parametrize(
    ("settings", "warned"),
    [
        ({}, False),
        ({"objective": "sft", "rule": "geometric"}, False),
        ({"objective": "sft"}, True),
        ({"objective": "ram", "rule": "nucleus"}, False),
        ({"objective": "preference", "rule": "geometric"}, True),
    ],
)
def test_a_rule_that_does_not_decode_what_is_trained_is_warned_of(settings, warned, caplog):
    with caplog.at_level(logging.WARNING):
        warn_of_rule(TrainOptions(**(NAMES | settings)))
    assert [("does not train what rule" in record.message) for record in caplog.records] == [True] * warned


def test_the_tail_is_drawn_from_where_draws_can_stand_for_it():
    def layout(**settings):
        return TrainOptions(**(NAMES | settings)).row_layout(1000)

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
        ({"objective": "sft", "rule": "geometric"}, True, 0.0, 1.0),
        ({"objective": "preference"}, True, 0.0, 0.1),
    ]
    for settings, pairs, contrast, beta in cases:
        options = TrainOptions(**(NAMES | settings)).with_contrast_for(8, lacking=0 if pairs else 8)
        assert (options.contrast, options.inverse_temperature) == (contrast, beta)
        assert options.at(Temperatures(1.5, 3.0)).contrast == contrast
    assert not caplog.records
    assert TrainOptions(**NAMES).with_contrast_for(8, lacking=1).contrast == 0
    assert [record.getMessage()[:38] for record in caplog.records] == ["1 of 8 records have no rejected answer"]


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
        options = TrainOptions(**(NAMES | settings))
        assert options.regulariser == options.at(fitted).regulariser == expected
