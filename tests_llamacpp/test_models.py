"""GGUF models by llama.cpp: transformers' rows, the engine's promises, and the commands."""

import importlib.util
import json
import math
import random
import weakref
from pathlib import Path

import pytest
import torch

from files import SHAPE, make
from gguf_files import write
from kinds import EOS, byte_level
from tiny import tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.core.logprobs import row_from_logits
from trimtab.decode.assemble import Loader
from trimtab.errors import InvalidOption, ModelError, UnsupportedModel, VocabularyMismatch
from trimtab.models.llamacpp import LlamaCppLM
from trimtab.models.llamacpp_context import IDLE, MOST_TOKENS, library
from trimtab.models.loading import load_model
from trimtab.serve.registry import NoSuchFolder, Registry

KINDS = ("gemma", "gemma2", "gemma3", "llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rows_of(model, ids):
    with torch.no_grad():
        return row_from_logits(model(ids).logits, model.config.vocab_size)


def apart(found, expected):
    """The largest divergence of a row, in nats."""
    return float((expected.exp() * (expected - found)).sum(-1).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stored", "most"), [("F32", 1e-4), ("F16", 2e-4), ("Q8_0", 2e-2)])
def test_rows_are_those_of_transformers_on_the_same_weights(kind, stored, most, tmp_path):
    path, _, _ = make(tmp_path, kind, stored)
    model, ids = LlamaCppLM(path), torch.arange(3, 43)[None]
    found = model.extend(model.new_state(1, 40), ids, [40])
    assert apart(found, rows_of(load_model(path), ids)) < most


def test_calls_that_take_too_many_tokens_or_rows_for_one_are_cut(tmp_path):
    path, stock, tokenizer = make(tmp_path, "llama", "F32")
    model, length = LlamaCppLM(path), MOST_TOKENS + 70
    ids = torch.arange(length)[None] % len(tokenizer)
    found = model.extend(model.new_state(1, length), ids, [length])
    assert apart(found, rows_of(stock, ids)) < 1e-3
    last = model.prefill(model.new_state(2, length), ids.repeat(2, 1), [length, 3])
    assert apart(last[:, 0], found[0, [length - 1, 2]]) < 1e-3


def test_contexts_are_used_again_and_few_are_kept(tmp_path):
    model = LlamaCppLM(make(tmp_path, "llama", "F32")[0])
    ids = torch.ones(1, 1, dtype=torch.long)
    expected = model.extend(model.new_state(1, 10), ids, [1])
    (context,) = model.idle._contexts
    state = model.new_state(1, 12)
    assert torch.equal(model.extend(state, ids, [1]), expected)
    assert state.context is context
    states = [model.new_state(1, 10) for _ in range(IDLE + 3)]
    for one in states:
        model.extend(one, ids, [1])
    del states, one, state
    assert len(model.idle) == IDLE


def asked(**more):
    """Twelve requests that differ in all that a batch makes of them."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 200) for _ in range(1 + i * 3 % 17)] for i in range(12)]
    return prompts, [
        SamplingParams(max_tokens=1 + i * 5 % 24, temperature=(1.0, 0.0, 0.7)[i % 3], seed=i, ignore_eos=True, **more)
        for i in range(12)
    ]


def pair(tmp_path, stored, aligner, **how):
    path, _, _ = make(tmp_path, "llama", stored)
    other, stock, tokenizer = make(tmp_path, "llama", stored, seed=2)
    if aligner == "torch":
        other = tmp_path / "aligner"
        stock.save_pretrained(other)
        tokenizer.save_pretrained(other)
    return AlignedModel.from_pretrained(path, other, backend="llamacpp", **how)


@pytest.mark.parametrize("drafts", [1, 4, None])
def test_the_tokens_of_a_seed_are_the_same_at_every_draft_length(drafts, tmp_path):
    """Of quantised files, one sequence at a time, whatever was read before."""
    prompts, params = asked()
    plain = pair(tmp_path, "Q8_0", "gguf", max_num_seqs=1, num_speculative_tokens=0, prefix_cache_tokens=0)
    drafting = pair(tmp_path, "Q8_0", "gguf", max_num_seqs=1, num_speculative_tokens=drafts)
    expected = [one.tokens for one in plain.generate(prompts, params)]
    assert [one.tokens for one in drafting.generate(prompts, params)] == expected
    assert [one.tokens for one in drafting.generate(prompts, params)] == expected
    assert drafting.pace.tally.accepted > 0


@pytest.mark.parametrize("stored", ["F32", "Q8_0"])
@pytest.mark.parametrize("aligner", ["gguf", "torch"])
def test_requests_that_come_and_go_are_decided_by_the_rows_that_they_have_alone(stored, aligner, tmp_path):
    """The log-probabilities of what was drawn in a batch of four, with drafts, prefixes and further completions."""
    prompts, params = asked(n=2, logprobs=True)
    model = pair(tmp_path, stored, aligner, max_num_seqs=4)
    alone = pair(tmp_path, stored, aligner, max_num_seqs=1, prefix_cache_tokens=0)
    completions = model.generate(prompts, params)
    assert [len(one.tokens) for one in completions] == [asks.max_tokens for asks in params for _ in range(2)]
    scores = alone.score([prompt for prompt in prompts for _ in range(2)], [one.tokens for one in completions])
    for one, score in zip(completions, scores, strict=True):
        assert one.logprobs.aligned == pytest.approx(score.aligned, abs=2e-2 if stored == "F32" else 0.5)


def test_it_is_the_product_of_both(tmp_path):
    """The aligned rows against those of transformers' modules on the same weights."""
    (path, one, _), (other, two, _) = make(tmp_path, "llama", "F32"), make(tmp_path, "qwen2", "F32", seed=2)
    model = AlignedModel.from_pretrained(path, other, backend="llamacpp", weight=0.5)
    prompt, text = [3, 4, 5, 6], [9, 8, 7]
    ids = torch.tensor([prompt + text])
    rows = torch.log_softmax(rows_of(one, ids) + 0.5 * rows_of(two, ids), -1)[0, 3:-1]
    expected = rows.gather(-1, torch.tensor(text)[:, None])[:, 0].tolist()
    assert model.score([prompt], [text])[0].aligned == pytest.approx(expected, abs=2e-2)


def test_the_file_says_what_ends_an_answer_and_what_it_is(tmp_path):
    path, _, tokenizer = make(tmp_path, "llama", "Q8_0")
    model = AlignedModel.from_pretrained(path, backend="llamacpp")
    assert tokenizer.eos_token_id in model.eos_token_ids
    assert "llama.cpp" in model.proposal.kernels
    assert "Q8_0" in model.proposal.kernels
    found = model.proposal.fingerprint
    assert found == LlamaCppLM(path).fingerprint != LlamaCppLM(make(tmp_path, "llama", "F32")[0]).fingerprint
    path.write_bytes(path.read_bytes() + b"\0" * 32)
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        _ = model.proposal.fingerprint


def test_what_cannot_be_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(ModelError, match=r"is no GGUF file that llama\.cpp can read"):
        LlamaCppLM(tmp_path / "text.gguf")
    with pytest.raises(ModelError, match=r"'no\.gguf' does not exist"):
        LlamaCppLM("no.gguf")
    path, model, _ = make(tmp_path, "llama", "F32")
    model.save_pretrained(tmp_path / "other")
    tiny_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(VocabularyMismatch, match="does not share the proposal's vocabulary"):
        AlignedModel.from_pretrained(path, tmp_path / "other", backend="llamacpp")


def test_the_command_writes_what_python_does(tmp_path, capsys):
    path, _, _ = make(tmp_path, "llama", "Q8_0")
    words = ["generate", "--proposal", str(path), "--aligner", str(path), "--backend", "llamacpp", "--json"]
    assert main([*words, "--prompt", "the", "--max_tokens", "9", "--seed", "3", "--temperature", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = AlignedModel.from_pretrained(path, path, backend="llamacpp")
    expected = model.generate(["the"], SamplingParams(max_tokens=9, seed=3, temperature=1.0))[0]
    assert report["completions"][0]["completion"] == expected.text
    assert report["kernels"]["proposal"].startswith("llama.cpp (llama-cpp-python ")


def test_samples_come_from_it(tmp_path, capsys):
    path, _, _ = make(tmp_path, "llama", "Q8_0")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("the", "a")))
    words = ["propose", "--proposal", str(path), "--backend", "llamacpp", "--dataset", str(tmp_path / "data.jsonl")]
    assert main([*words, "--out", str(tmp_path / "out.jsonl"), "--max_tokens", "7", "--n", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sum("completion" in line for line in lines) == 4


def with_nan(folder, bad):
    """A file of a model with a token that is NaN."""
    tokenizer = byte_level()
    model = tiny_model("llama", len(tokenizer), seed=1, spread=0.3, eos_token_id=EOS, bos_token_id=1, **SHAPE)
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    return write(folder / "nan.gguf", "llama", model, tokenizer)


def test_a_nan_is_nobody_elses(tmp_path):
    """Neither that of a neighbour, in a pass of many tokens, nor that of whoever had the context before."""
    path, bad = with_nan(tmp_path, 77), 77
    draw = random.Random(0)
    good = [[draw.randrange(3, 70) for _ in range(70 + i)] for i in range(4)]
    spoilt, greedy = [*good[0], bad, 5, 6, 7], SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    model = AlignedModel.from_pretrained(path, backend="llamacpp", max_num_seqs=4, prefix_cache_tokens=0)
    expected = [one.tokens for one in model.generate(good, greedy)]
    for prompts in ([spoilt], [spoilt, *good[1:]], *([one] for one in good), [spoilt, spoilt], good):
        for prompt, one in zip(prompts, model.generate(prompts, greedy), strict=True):
            assert (one.error is None) == (prompt is not spoilt)
            assert one.error is not None or one.tokens == expected[good.index(prompt)]


def test_slots_beyond_one_call_and_beyond_what_llamacpp_has(tmp_path):
    path, _, _ = make(tmp_path, "llama", "F32")
    model = AlignedModel.from_pretrained(path, backend="llamacpp", max_num_seqs=70, prefix_cache_tokens=0)
    found = model.generate([[3 + i % 90] for i in range(70)], SamplingParams(max_tokens=3, temperature=0, ignore_eos=True))
    assert [len(one.tokens) for one in found] == [3] * 70
    with pytest.raises(InvalidOption, match="max_num_seqs must be at most 256 for this proposal, not 257"):
        AlignedModel.from_pretrained(path, backend="llamacpp", max_num_seqs=257).generate([[3]])
    with pytest.raises(InvalidOption, match=r"max_num_seqs must be at most 256 for what llama\.cpp runs"):
        model.proposal.new_state(257, 1)


def test_a_prefix_is_kept_as_bytes_and_keeps_no_model(tmp_path):
    path, _, _ = make(tmp_path, "llama", "Q8_0")
    model = LlamaCppLM(path)
    ids = torch.arange(3, 33)[None]
    state, kept = model.new_state(1, 30), model.new_state(1, 30)
    expected = model.extend(state, ids, [30])
    model.copy(state, [0], kept, [0])
    model.rollback(kept, [10])
    assert kept._context is None
    part = model.select(kept, [0])
    model.rollback(part, [5])
    other = model.new_state(2, 40)
    model.copy(part, [0], other, [1])
    rows = model.extend(other, torch.stack([ids[0, :15], ids[0, 15:]]), [15, 15])
    assert torch.equal(rows[:, -1], expected[0, [14, 29]])
    gone = weakref.ref(model)
    del model, state, part, other
    assert gone() is None
    assert kept.lengths == [20]


def test_the_tokens_of_a_seed_are_the_same_whatever_was_read_before(tmp_path):
    """Prompts of a hundred tokens, the second time by what was kept of the first."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, 200) for _ in range(90 + i)] for i in range(8)]
    params = [SamplingParams(max_tokens=12, temperature=1.0, seed=i, ignore_eos=True) for i in range(8)]
    model = pair(tmp_path, "Q8_0", "gguf", max_num_seqs=1)
    first, second = ([one.tokens for one in model.generate(prompts, params)] for _ in range(2))
    assert first == second
    assert model.prefixes.num_tokens > 0


def test_what_changes_on_disk_changes_nothing_that_is_loaded(tmp_path):
    path, _, _ = make(tmp_path, "llama", "F32")
    model, ids = LlamaCppLM(path), torch.arange(3, 13)[None]
    expected = model.extend(model.new_state(1, 10), ids, [10])
    path.write_bytes(path.read_bytes()[:2000])
    assert torch.equal(model.extend(model.new_state(1, 10), ids, [10]), expected)


def test_a_step_that_fails_on_the_way_is_undone(tmp_path, monkeypatch):
    model = LlamaCppLM(make(tmp_path, "llama", "Q8_0")[0])
    state, ids = model.new_state(1, MOST_TOKENS + 90), torch.arange(MOST_TOKENS + 90)[None] % 300
    expected = model.prefill(state, ids[:, :5], [5])
    decode, calls = type(state.context).decode, []

    def fail(self, steps, columns):
        calls.append(len(steps))
        if len(calls) == 2:
            raise ModelError("no")
        return decode(self, steps, columns)

    monkeypatch.setattr(type(state.context), "decode", fail)
    with pytest.raises(ModelError, match="no"):
        model.prefill(state, ids[:, 5:], [MOST_TOKENS + 85])
    monkeypatch.undo()
    model.rollback(state, [1])
    assert torch.equal(model.prefill(state, ids[:, 4:5], [1]), expected)


def test_vocabularies_that_do_not_fit_are_refused(tmp_path):
    path, _, tokenizer = make(tmp_path, "llama", "F32")
    with pytest.raises(UnsupportedModel, match="output columns, but its tokenizer"):
        LlamaCppLM(path, len(tokenizer) + 5)


def test_a_server_loads_a_file_that_a_client_names(tmp_path):
    path, _, _ = make(tmp_path, "llama", "Q8_0")
    base = AlignedModel.from_pretrained(path, backend="llamacpp")
    other, _, _ = make(tmp_path, "llama", "Q8_0", seed=2)
    registry = Registry(base, Loader(base.tokenizer, dtype="auto", device=None, backend="llamacpp"), root=tmp_path)
    entry = registry.load("mine", other.name, inside=True)
    assert isinstance(entry.loaded.model, LlamaCppLM)
    with pytest.raises(NoSuchFolder):
        registry.load("mine", "no.gguf", inside=True)


@pytest.mark.parametrize("kind", ["is_recurrent", "is_hybrid", "is_diffusion", "has_encoder"])
def test_models_whose_cache_forgets_nothing_are_refused(kind, tmp_path, monkeypatch):
    path, _, _ = make(tmp_path, "llama", "F32")
    monkeypatch.setattr(library(), f"llama_model_{kind}", lambda model: True)
    with pytest.raises(UnsupportedModel, match="only decoders whose cache can forget single tokens run"):
        LlamaCppLM(path)


def test_a_part_of_a_file_is_refused(tmp_path, monkeypatch):
    path, _, _ = make(tmp_path, "llama", "F32")

    def value(model, key, buffer, size):
        assert key == b"split.count"
        buffer.value = b"3"
        return 1

    monkeypatch.setattr(library(), "llama_model_meta_val_str", value)
    with pytest.raises(UnsupportedModel, match="is one of 3 files: make one of them"):
        LlamaCppLM(path)


def test_the_files_to_try_it_with_are_what_they_are_called(tmp_path):
    """benchmarks/make_gguf.py: other types, the first layers alone, and random weights. What is written is rounded."""
    script = Path(__file__).parents[1] / "benchmarks" / "make_gguf.py"
    spec = importlib.util.spec_from_file_location("make_gguf", script)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    path, stock, _ = make(tmp_path, "llama", "F32")
    ids = torch.arange(3, 23)[None]
    for name, number in made.TYPES.items():
        made.quantize(path, tmp_path / "same.gguf", number, None)
        model = LlamaCppLM(tmp_path / "same.gguf")
        assert name in model.kernels
        assert apart(model.extend(model.new_state(1, 20), ids, [20]), rows_of(stock, ids)) < 5e-2
    made.quantize(path, tmp_path / "one.gguf", made.TYPES["Q8_0"], 1)
    stock.model.layers = stock.model.layers[:1]
    model = LlamaCppLM(tmp_path / "one.gguf")
    assert apart(model.extend(model.new_state(1, 20), ids, [20]), rows_of(stock, ids)) < 5e-2
    made.write_random(path, tmp_path / "random.gguf", [128, 2, 4, 2, 192], 0)
    model = LlamaCppLM(tmp_path / "random.gguf")
    assert model.extend(model.new_state(1, 20), ids, [20]).isfinite().all()
    assert "Q8_0" in model.kernels
