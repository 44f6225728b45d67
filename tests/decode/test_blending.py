"""`blend="weights"`: LoRA aligners of one base are one aligner for a request, whatever else is in the batch."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from law_of import EOS, expected_law
from statistics_of import fits
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.decode import blending
from trimtab.decode.engine import Engine
from trimtab.decode.settings import settle
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.aligner import Manifest
from trimtab.models.head import HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.models.table import TableLM

V = 5
SETTINGS = [
    {"r": 2, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    {"r": 1, "lora_alpha": 2, "target_modules": ["up_proj"]},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("blending") / "base", tiny_model("llama", V, seed=3, spread=0.3), tiny_tokenizer("abcd")
    )


@pytest.fixture(scope="module")
def folders(base: Path) -> list[Path]:
    return [save_lora(base.parent / f"lora-{i}", base, seed=i, **settings) for i, settings in enumerate(SETTINGS)]


@pytest.fixture
def adapters(base: Path, folders: list[Path]) -> list[Any]:
    pool = AdapterPool(load_model(base), owned=True)
    return [pool.read(folder, folder.name) for folder in folders]


PROPOSAL = TableLM.random(V, order=2, seed=0)


def aligned(adapters: list[Any], **settings: Any) -> AlignedModel:
    return AlignedModel(PROPOSAL, adapters, eos_token_ids=[EOS], **settings)


def merged(base: Path, folders: list[Path], weights: list[float]) -> HuggingFaceLM:
    """The definition: Σ λ·s·B·A added to the base's weights."""
    total = dict(load_model(base).named_parameters())
    start = {name: one.detach().clone() for name, one in total.items()}
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            whole = PeftModel.from_pretrained(load_model(base), str(folder)).merge_and_unload()
            for name, one in whole.named_parameters():
                total[name] += weight * (one - start[name])
        model = load_model(base)
        for name, one in model.named_parameters():
            one.copy_(total[name])
    return HuggingFaceLM(model)


@pytest.mark.parametrize(("rule", "length"), [("product", 2), ("geometric", 0), ("nucleus", 2)])
def test_the_law_is_the_rules_with_the_blended_aligner(rule, length, base, folders, adapters):
    weights, strength = [0.7, -0.3, 1.2], 0.6
    model = aligned(adapters, num_speculative_tokens=length, max_num_seqs=1000)
    params = SamplingParams(
        n=2000, seed=7, max_tokens=2, rule=rule, blend="weights", weight=weights, rule_weight=strength, aligner_temperature=0.8
    )
    drawn = [tuple(c.tokens) for c in model.generate([[3]], params)]
    law = expected_law(PROPOSAL, [merged(base, folders, weights)], rule, [strength], [3], 2, warps=(1.0, 1.0, 0.8))
    assert fits(drawn, law) > 1e-3
    other = expected_law(PROPOSAL, [merged(base, folders, [0.7, 0.3, 1.2])], rule, [strength], [3], 2, warps=(1.0, 1.0, 0.8))
    assert fits(drawn, other) < 1e-3, "the test tells blends apart"


def test_scores_are_those_of_the_blended_aligner_and_there_is_one(base, folders, adapters):
    weights = [0.7, -0.3, 1.2]
    params = SamplingParams(blend="weights", weight=weights, rule="geometric", rule_weight=0.4)
    one = aligned(adapters).score([[3, 1]], [[2, 4, 0]], params)[0]
    other = aligned([merged(base, folders, weights)]).score(
        [[3, 1]], [[2, 4, 0]], SamplingParams(rule="geometric", weight=0.4)
    )[0]
    assert one.aligner == pytest.approx(other.aligner, abs=1e-5)
    assert one.aligned == pytest.approx(other.aligned, abs=1e-5)
    shown = aligned(adapters).generate([[3]], dataclasses.replace(params, logprobs=True, max_tokens=3, seed=0))[0].logprobs
    assert all(isinstance(value, float) for value in shown.aligner)


BLENDS = [[0.7, -0.3, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6], [0.0, 0.0, 0.0], [-1.0, 0.5, 2.0], [0.7, -0.3, 1e-3]]


@pytest.mark.parametrize("draft", [None, "none", "ngram"])
def test_requests_of_any_blends_get_what_they_get_alone(draft, adapters):
    model, draw = aligned(adapters, draft=draft), random.Random(1)
    engine, asked = Engine(PROPOSAL, model.pace, max_num_seqs=7, max_num_batched_tokens=9), []
    for i in range(36):
        how = {"seed": i, "max_tokens": 1 + i % 9, "ignore_eos": True, "n": 1 + i % 2}
        weights = BLENDS[i % len(BLENDS)]
        blend = {} if i % 5 == 0 else {"blend": "weights", "rule": draw.choice(["product", "geometric"])}
        params = SamplingParams(weight=weights, **how, **blend)
        prompt = [1 + i % 4] * (1 + i % 6)
        asked.append((prompt, params, model.prepare(prompt, params, i)))
        engine.submit(asked[-1][2])
        for _ in range(draw.randrange(3)):
            engine.step()
    while engine:
        engine.step()
        assert engine.failed == []
    for prompt, params, group in asked:
        assert [s.tokens for s in group] == [c.tokens for c in model.with_draft_length(0).generate([prompt], params)]


def test_all_weights_in_one_pass(adapters, monkeypatch):
    """The passes of Q for a blend of three are those of one adapter; by its rows, the rule asks three times as many."""
    passes: list[int] = []
    extend, prefill = AdapterPool.extend, AdapterPool.prefill
    monkeypatch.setattr(AdapterPool, "extend", lambda self, *a: passes.append(1) or extend(self, *a))
    monkeypatch.setattr(AdapterPool, "prefill", lambda self, *a: passes.append(1) or prefill(self, *a))

    def count(model: AlignedModel, **how: Any) -> int:
        passes.clear()
        model.generate([[3, 1, 2]] * 4, SamplingParams(max_tokens=6, ignore_eos=True, seed=0, **how))
        return len(passes)

    settings = {"num_speculative_tokens": 0, "prefix_cache_tokens": 0}
    alone = count(aligned(adapters[:1], **settings))
    assert alone >= 6
    assert count(aligned(adapters, **settings), blend="weights", weight=[0.3, 0.4, 0.5]) == alone
    assert count(aligned(adapters, **settings), weight=[0.3, 0.4, 0.5]) == 3 * alone


def test_a_hundred_blends_are_one_group_of_the_batch(adapters, monkeypatch):
    model = aligned(adapters, num_speculative_tokens=0)
    engine = Engine(PROPOSAL, model.pace, max_num_seqs=100)
    for i in range(100):
        weights = [i / 100, 1 - i / 50, 0.1]
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=i, blend="weights", weight=weights)
        engine.submit(model.prepare([1 + i % 4], params, i))
    while engine.running < 100:
        engine.step()
    assert engine._batch.groups == 1


def test_one_adapter_at_weight_1_gives_the_tokens_of_it_alone(adapters):
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=4)
    for i, adapter in enumerate(adapters):
        weights = [float(j == i) for j in range(3)]
        asked = dataclasses.replace(params, blend="weights", weight=weights)
        assert aligned(adapters).generate([[2]], asked)[0].tokens == aligned([adapter]).generate([[2]], params)[0].tokens
    nothing = dataclasses.replace(params, blend="weights", weight=[0.0] * 3)
    assert aligned(adapters).generate([[2]], nothing)[0].tokens == aligned([adapters[0].pool]).generate([[2]], params)[0].tokens


def test_the_same_blend_shares_what_was_read_and_few_are_remembered(adapters, monkeypatch):
    monkeypatch.setattr(blending, "MOST", 2)
    model = aligned(adapters)
    models = [model.models_of(model.shaping(SamplingParams(blend="weights", weight=weights))) for weights in BLENDS[:3]]
    again = [model.models_of(model.shaping(SamplingParams(blend="weights", weight=weights))) for weights in BLENDS[:3]]
    assert models[2] == again[2]
    assert len(model._blends._made) == 2
    assert again[2].adapters[1] is not models[0].adapters[1]
    assert again[0].adapters == models[0].adapters, "equal, though made anew"


# ---- what counts, and what is refused


def manifest(**settings: Any) -> Manifest:
    return Manifest(vocabulary="sha256:0", **settings)


def test_the_manifests_must_agree_on_what_nobody_says(adapters):
    weights = {"blend": "weights", "weight": [0.5, 0.5]}
    same = aligned(adapters[:2], manifests=[manifest(rule="geometric", weight=0.3, aligner_temperature=0.7)] * 2)
    shaping = same.shaping(SamplingParams(**weights))
    assert (str(shaping.rule), shaping.weights, shaping.blend) == ("geometric", (0.3,), (0.5, 0.5))
    assert [warp.temperature for warp in shaping.aligners] == [0.7]
    for change, message in (
        ({"rule": "product"}, "disagree on rule: geometric and product; say which with rule="),
        ({"weight": 0.4}, r"disagree on weight: 0\.3 and 0\.4; say which with rule_weight="),
        ({"aligner_temperature": 1.0}, r"disagree on aligner_temperature: 0\.7 and 1\.0; say which with aligner_temperature="),
    ):
        told = {"rule": "geometric", "weight": 0.3, "aligner_temperature": 0.7}
        both = [manifest(**told), manifest(**told | change)]
        with pytest.raises(InvalidOption, match=message):
            settle(SamplingParams(**weights), SamplingParams(), both)
        said = {"rule": "geometric", "rule_weight": 0.3, "aligner_temperature": 0.7}
        assert settle(SamplingParams(**weights, **said), SamplingParams(), both).weights == (0.3,)


def test_the_models_own_blend_is_a_requests_default(adapters):
    model = aligned(adapters[:2], blend="weights", weight=[0.5, 0.25], rule_weight=0.5)
    assert (model.shaping(SamplingParams()).blend, model.shaping(SamplingParams()).weights) == ((0.5, 0.25), (0.5,))
    assert model.shaping(SamplingParams(weight=[1.0, 2.0])).blend == (1.0, 2.0)
    logits = model.shaping(SamplingParams(blend="logits"))
    assert (logits.blend, logits.weights) == (None, (0.5, 0.25))
    alone = model.with_aligners(adapters[:1])
    alone.defaults = SamplingParams(blend="weights")
    assert alone.shaping(SamplingParams()).blend == (1.0,), "of one aligner, as it is"
    bare = model.with_aligners([])
    assert bare.shaping(SamplingParams()).blend is None


def test_what_cannot_be_is_refused_before_anything_is_computed(base, folders, adapters):
    model, other = aligned(adapters[:2]), AdapterPool(load_model(base)).read(folders[2], "other")

    def refused(asked: AlignedModel, message: str, **how: Any) -> None:
        with pytest.raises(InvalidRequest, match=message):
            asked.generate([[2]], SamplingParams(max_tokens=2, **how))

    refused(model, "^blend: weight is missing: give one number for each aligner", blend="weights")
    refused(model, "^weight has 1 numbers, but there are 2 aligners", blend="weights", weight=0.5)
    refused(model, "^weight has 3 numbers, but there are 2 aligners", blend="weights", weight=[0.5] * 3)
    refused(model, "^rule_weight is the strength of aligners that blend='weights' makes one", rule_weight=0.5)
    refused(aligned([]), "^blend: there is no aligner whose weights could be blended", blend="weights")
    refused(aligned([adapters[0], other]), "^blend: .*different bases", blend="weights", weight=[0.5, 0.5])
    refused(aligned([adapters[0], PROPOSAL]), r"^blend: aligners\[1\] is no LoRA adapter", blend="weights", weight=[0.5, 0.5])
    with pytest.raises(InvalidRequest, match=r"^blend must be logits or weights, not 'sum'"):
        SamplingParams(blend="sum")
    with pytest.raises(InvalidRequest, match=r"^blend: weight is missing"):
        aligned(adapters, blend="weights")


def test_what_was_read_for_a_blend_is_read_once_and_for_no_other(adapters, monkeypatch):
    read: list[int] = []
    prefill = AdapterPool.prefill
    monkeypatch.setattr(
        AdapterPool, "prefill", lambda self, state, ids, counts: read.append(sum(counts)) or prefill(self, state, ids, counts)
    )
    model, prompt = aligned(adapters), [1 + i % 4 for i in range(40)]

    def ask(weights: list[float]) -> list[int]:
        read.clear()
        params = SamplingParams(max_tokens=4, ignore_eos=True, seed=0, blend="weights", weight=weights)
        return model.generate([prompt], params)[0].tokens

    tokens: dict[str, list[int]] = {}
    for weights, expected in (([0.5, 0.5, 0.0], 39), ([0.5, 0.5, 0.0], 0), ([0.5, 0.25, 0.0], 39), ([0.5, 0.5, 0.0], 0)):
        drawn = ask(weights)
        assert abs(sum(read) - expected) <= 1, (weights, read)
        assert tokens.setdefault(str(weights), drawn) == drawn


def test_heads_of_one_tap_blend_as_adapters_of_the_same_model_do(base, folders):
    """Which read the proposal's hidden states in the place of tokens, and are the same models."""
    proposal = HuggingFaceLM(load_model(base), owned=True)
    heads, pool = HeadPool(proposal, 0), AdapterPool(load_model(base), owned=True)
    params = [SamplingParams(max_tokens=8, ignore_eos=True, seed=i, blend="weights", weight=[0.7, -0.2 * i]) for i in range(4)]
    texts = []
    for aligners in (
        [Adapted(heads, heads.store.read(folder, folder.name)) for folder in folders[:2]],
        [pool.read(folder, folder.name) for folder in folders[:2]],
    ):
        model = AlignedModel(proposal, aligners, eos_token_ids=[EOS], draft="none")
        texts.append([completion.tokens for completion in model.generate([[1, 2, 3]] * 4, params)])
    assert texts[0] == texts[1]
    assert len({tuple(tokens) for tokens in texts[0]}) > 1
