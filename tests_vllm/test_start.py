"""What is refused when vLLM starts, and with which words; and the plugin beside requests that want none of it."""

import importlib
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

from engines import CONTEXT, DEFAULTS, Job, Models, V, make_llm, run
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import InvalidOption, ModelError, VocabularyMismatch
from trimtab.vllm import internals


@pytest.mark.parametrize("name", ["command", "internals", "processor"])
def test_the_exports_exist(name):
    module = importlib.import_module(f"trimtab.vllm.{name}")
    assert not [export for export in module.__all__ if not hasattr(module, export)]


def refused(models: Models, kind: type[Exception], words: str, **settings: Any) -> None:
    with pytest.raises(kind, match=words):
        make_llm(models, **settings)


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        ({"aligners": {}}, "aligners must map names"),
        ({"alligners": {"a": "b"}}, "no key 'alligners'"),
        ({"aligners": {"a": "b"}, "weight": "1"}, "trimtab.weight must be a number"),
        ({"aligners": {"a": "b"}, "rule": "prodcut"}, "there is no rule 'prodcut'"),
        ("here", "must hold an object"),
    ],
)
def test_wrong_settings_are_named(models, ours, words):
    refused(models, InvalidOption, words, config={"trimtab": ours})


def test_what_cannot_be_aligned_is_refused(models, tmp_path):
    refused(models, ModelError, "does not exist", aligners={"gone": "/no/such/folder"})
    stranger = save_tiny(tmp_path / "stranger", tiny_model("llama", 27), tiny_tokenizer())
    refused(models, VocabularyMismatch, "does not share the proposal's vocabulary", aligners={"stranger": str(stranger)})
    short = save_tiny(tmp_path / "short", tiny_model("llama", V, max_position_embeddings=64), tiny_tokenizer("abcdef"))
    refused(models, InvalidOption, "--max-model-len 64", aligners={"short": str(short)})
    guess = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    refused(models, InvalidOption, "speculative decoding", speculative_config=guess)


def test_memory_that_does_not_suffice_is_refused_with_what_would(models):
    one = {"aligners": {"first": models.aligners["first"]}}
    settings = {"additional_config": {"trimtab": {**one, "memory_gib": 0.002}}}
    said = start_elsewhere(models, **settings, max_num_seqs=32)
    found = re.search(r"MiB are left: --max-num-seqs (\d+) fits", said)
    assert found, said
    fits = int(found[1])
    assert 0 < fits < 32
    assert f"--max-num-seqs {fits} fits" in start_elsewhere(models, **settings, max_num_seqs=fits + 1)
    assert "started" in start_elsewhere(models, **settings, max_num_seqs=fits)


def start_elsewhere(models: Models, **settings: Any) -> str:
    """What an engine in another process says when it starts: one that fails in its worker leaves vLLM's globals behind."""
    given = {**DEFAULTS, **settings}
    command = [sys.executable, "-c", f"from vllm import LLM; LLM({models.proposal!r}, **{given!r}); print('started')"]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    return done.stdout + done.stderr


def test_an_untried_version_is_refused_only_where_aligners_are_wanted(models, monkeypatch):
    monkeypatch.setattr(internals, "version", lambda: "0.99.1")
    refused(models, InvalidOption, "vLLM 0.99.1 has not been tried; install one of 0.32")
    assert run_one(make_llm(models, config={})) is not None


def test_a_plugin_that_was_not_loaded_is_noticed(models, monkeypatch):
    monkeypatch.setattr(internals, "_installed", False)
    refused(models, InvalidOption, "add 'trimtab' to VLLM_PLUGINS")


def run_one(llm: LLM, **settings: Any) -> list[int]:
    job = Job([1, 2], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, **settings))
    run(llm, [job])
    return job.tokens


def test_without_aligners_nothing_changes_and_asking_for_one_is_an_error(models):
    llm = make_llm(models, config={})
    assert len(run_one(llm)) == 5
    with pytest.raises(VLLMValidationError, match="this server has no aligners"):
        run_one(llm, extra_args={"aligner": "first"})
    assert len(run_one(llm, extra_args={"theirs": 1})) == 5


@pytest.mark.parametrize(
    ("asked", "field", "words"),
    [
        ({"aligner": "nobody"}, "aligner", "there are first, second"),
        ({"aligner": 3}, "aligner", "a name or a list of names"),
        ({"aligner": ["first", "second", "red"]}, "aligner", "at most 2"),
        ({"aligner": "first", "weight": [1, 2]}, "weight", "2 numbers, but there are 1 aligners"),
        ({"aligner": "first", "rule": "candidates(n=4)"}, "rule", "no row in closed form"),
        ({"aligner": "first", "proposal_top_p": 0}, "proposal_top_p", "above 0"),
        ({"aligner": "first", "aligner_temperature": True}, "aligner_temperature", "a number"),
        ({"aligner": "first", "wieght": 1}, None, "wieght: an aligned request has no such field"),
        ({"weight": 1}, "weight", "needs an aligner"),
    ],
)
def test_a_requests_mistakes_are_named(llm, asked, field, words):
    with pytest.raises(VLLMValidationError, match=words) as caught:
        run_one(llm, extra_args=asked)
    assert caught.value.parameter == field


@pytest.fixture(scope="module")
def llm(models: Models) -> LLM:
    return make_llm(models)


def test_memory_is_reported_in_vllms_log(models):
    config = {"trimtab": {"aligners": {"first": models.aligners["first"]}}}
    said = start_elsewhere(models, additional_config=config, max_num_seqs=4)
    assert len(re.findall(r"trimtab: aligners first take 0\.\d MiB of weights and 0\.5 MiB of cache", said)) == 1
    assert f"(4 requests of {CONTEXT} tokens) on cpu" in said


def test_padding_is_never_drawn(tmp_path, models):
    """A proposal with more columns than its tokenizer has tokens: an aligned row gives the rest nothing."""
    wide = tiny_model("llama", V + 9, seed=5, hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32)
    with torch.no_grad():
        wide.get_output_embeddings().weight[V:] *= 50
    padded = Models(tmp_path, str(save_tiny(tmp_path / "wide", wide, tiny_tokenizer("abcdef"))), models.aligners)
    llm = make_llm(padded, max_model_len=64)
    jobs = [Job([1], SamplingParams(max_tokens=20, ignore_eos=True, extra_args={"aligner": "first"})) for _ in range(8)]
    bare = [Job([1], SamplingParams(max_tokens=20, ignore_eos=True)) for _ in range(8)]
    run(llm, [*jobs, *bare])
    assert max(token for job in jobs for token in job.tokens) < V
    assert max(token for job in bare for token in job.tokens) >= V, "the padding was meant to be tempting"
