"""All aligners together: each row is its rule's, from rows that were computed alone; and memory is refused honestly."""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.testing import assert_close

from law_of import possible
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.core.logprobs import row_from_logits, warp
from trimtab.decode.assemble import Loader
from trimtab.errors import InvalidOption, InvalidRequest, ModelError, UnsupportedModel
from trimtab.models.aligner import Manifest
from trimtab.models.base import LanguageModel
from trimtab.models.blends import blended
from trimtab.models.fingerprint import digest_model
from trimtab.models.loading import load_model
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.vllm.aligners import Aligned, Aligners, Limits
from trimtab.vllm.cache import Request
from trimtab.vllm.settings import Arguments, Catalog, Settings

LETTERS = "abcdef"
V = 1 + len(LETTERS)
CONTEXT = 20
COLUMNS = V + 4
CPU = torch.device("cpu")


class Models(NamedTuple):
    paths: dict[str, str]
    catalog: Catalog
    alone: dict[str, LanguageModel]
    """Each by itself, for reference."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Two models of their own, one with padding columns and one in float64, and two adapters over a third."""
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_tokenizer(LETTERS)

    def save(name: str, kind: str, seed: int, dtype: torch.dtype = torch.float32, columns: int = V) -> Path:
        return save_tiny(root / name, tiny_model(kind, columns, seed=seed, spread=0.2).to(dtype), tokenizer)

    base = save("base", "llama", 3)
    paths = {"first": save("first", "llama", 1, columns=V + 2), "double": save("double", "gpt2", 2, torch.float64)}
    for seed, (name, rank) in enumerate({"red": 2, "blue": 4}.items()):
        paths[name] = save_lora(root / name, base, seed=seed, r=rank, target_modules=["q_proj", "v_proj", "down_proj"])
        tokenizer.save_pretrained(paths[name])
    named = {name: str(path) for name, path in paths.items()}
    loader = Loader(tokenizer, dtype="auto", device=CPU)
    alone = {name: loader.load(path).model for name, path in named.items()}
    return Models(named, Catalog(Settings(named), tokenizer, [0]), alone)


def make_aligners(models: Models, *names: str, requests: int = 4, length: int = CONTEXT, **settings: Any) -> Aligners:
    paths = {name: models.paths[name] for name in names or models.paths}
    return Aligners(Settings(paths, **settings), tiny_tokenizer(LETTERS), Limits(requests, length, 8), CPU)


def read(models: Models, **asked: Any) -> Arguments:
    arguments = models.catalog.read(asked)
    assert arguments is not None
    return arguments


def row_alone(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    return model.extend(model.new_state(1, len(tokens)), torch.tensor([tokens]), [len(tokens)])[0, -1]


def expected(models: Models, logits: torch.Tensor, tokens: list[int], arguments: Arguments) -> torch.Tensor:
    """The aligned row of one request, and −inf for the padding."""
    shaping = arguments.shaping
    logp = warp(row_from_logits(logits.float(), V), shaping.proposal)
    aligners = [models.alone[name] for name in arguments.names]
    if shaping.blend is not None:
        aligners = [blended(aligners, shaping.blend)]
    logqs = [warp(row_alone(one, tokens).float(), how) for one, how in zip(aligners, shaping.aligners, strict=True)]
    return torch.cat([shaping.rule(logp, logqs, shaping.weights), torch.full((COLUMNS - V,), -torch.inf)])


ASKED: list[dict[str, Any] | None] = [
    None,
    {"aligner": "first"},
    {"aligner": "first", "weight": -0.5, "proposal_temperature": 0.7},
    {"aligner": "double", "rule": "geometric"},
    {"aligner": "double", "rule": "nucleus", "proposal_top_p": 0.8},
    {"aligner": "red", "aligner_temperature": 1.5},
    {"aligner": "blue", "rule": "kl_gate(tau=0.3)"},
    {"aligner": ["blue", "red"], "rule": "mixture", "weight": [0.2, 0.5]},
    {"aligner": "first", "rule": "gate(rule=mixture, by=max_p)", "weight": 0.3},
    {"aligner": ["red", "blue"], "weight": [1.0, -0.3]},
    {"aligner": ["blue", "first"], "rule": "geometric", "weight": [0.2, 0.3]},
    {"aligner": ["double", "red"], "rule": "nucleus", "proposal_top_k": 4},
    {"aligner": ["first", "double"], "weight": 2 * [0.5]},
    {"aligner": ["red", "blue"], "weight": [0.7, -0.3], "blend": "weights", "rule_weight": 0.5},
    {"aligner": ["blue", "red"], "weight": [0.2, 1.5], "blend": "weights", "rule": "geometric"},
    {"aligner": "red", "weight": -0.5, "blend": "weights"},
    {"aligner": ["red", "blue"], "weight": [0.0, 0.0], "blend": "weights"},
]


def make_logits(chosen: random.Random, rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(chosen.randrange(2**31))
    return (2 * torch.randn(rows, COLUMNS, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_of_every_batch_is_its_rules(models, seed, dtype):
    """Requests come, are read in parts, draw, leave, and take other rows of the batch; half of them have no aligner."""
    chosen, size = random.Random(seed), 5
    aligners = make_aligners(models, requests=size)
    batch: list[tuple[Request, Arguments | None, int] | None] = [None] * size
    met = set()
    with torch.inference_mode(bool(seed)):
        for _ in range(260):
            for row, entry in enumerate(batch):
                if entry is not None and (len(entry[0]) == CONTEXT or chosen.random() < 0.15):
                    entry[0].gone = True
                    batch[row] = None
                if batch[row] is None and chosen.random() < 0.7:
                    asked = chosen.choice(ASKED)
                    prompt = [chosen.randrange(V) for _ in range(chosen.choice([1, 5, 12, CONTEXT]))]
                    computed = chosen.randrange(len(prompt) + 1)
                    batch[row] = Request(prompt, []), None if asked is None else read(models, **asked), computed
            chosen.shuffle(batch)
            present = [entry for entry in batch if entry is not None]
            logits = make_logits(chosen, len(present), dtype)
            before = logits.clone()
            aligned = {row: Aligned(request, how) for row, (request, how, _) in enumerate(present) if how is not None}
            aligned = dict(chosen.sample(list(aligned.items()), len(aligned)))
            reading = {row: computed for row, (request, how, computed) in enumerate(present) if computed < len(request)}
            mixed = aligners.align(logits, aligned, {row: at for row, at in reading.items() if row in aligned})
            assert mixed.dtype == torch.float32
            batch = []
            for row, (request, how, computed) in enumerate(present):
                if how is None or row in reading:
                    assert torch.equal(mixed[row], before[row].float()), "bit for bit"
                else:
                    met.add((how.names, str(how.shaping.rule), how.shaping.blend))
                    assert_close(
                        possible(mixed[row]), expected(models, before[row], request.tokens(0, 99), how), atol=2e-5, rtol=0
                    )
                if row in reading:
                    computed += chosen.randint(1, len(request) - computed)
                elif len(request) < CONTEXT:
                    request.output.append(chosen.randrange(V))  # type: ignore[attr-defined]
                    computed = len(request)
                batch.append((request, how, computed))
            batch += [None] * (size - len(batch))
    assert len(met) == len(ASKED) - 2, "first comes twice under one rule"


def test_a_full_house_of_requests_that_combine_adapters_of_one_base(models):
    aligners = make_aligners(models, "red", "blue", requests=3)
    both = read(models, aligner=["red", "blue"])
    requests = [Request([i, 1, 2], []) for i in range(3)]
    logits = make_logits(random.Random(0), 3, torch.float32)
    for _ in range(2):  # the second time, all requests are new, and all seats parked
        before = logits.clone()
        mixed = aligners.align(logits, {row: Aligned(request, both) for row, request in enumerate(requests)}, {})
        for row, request in enumerate(requests):
            assert_close(possible(mixed[row]), expected(models, before[row], request.tokens(0, 9), both), atol=2e-5, rtol=0)
            request.gone = True
        requests = [Request([3, i], []) for i in range(3)]


def test_nothing_aligned_is_nothing_changed(models):
    aligners = make_aligners(models, "first")
    logits = make_logits(random.Random(0), 2, torch.bfloat16)
    assert torch.equal(aligners.align(logits, {}, {}), logits.float())
    request = Aligned(Request([1, 2, 3], []), read(models, aligner="first"))
    assert torch.equal(aligners.align(logits, {1: request}, {1: 2}), logits.float()), "it draws nothing yet"


def test_float32_logits_are_aligned_where_they_are(models):
    logits = make_logits(random.Random(0), 2, torch.float32)
    request = Aligned(Request([1, 2, 3], []), read(models, aligner="first"))
    assert make_aligners(models, "first").align(logits, {0: request}, {}) is logits


def test_weights_come_in_the_precision_that_is_asked_for(models):
    logits = make_logits(random.Random(0), 1, torch.float32)
    how, before = read(models, aligner="first"), logits.clone()
    wanted = expected(models, before[0], [1, 2, 3], how)
    (row,) = make_aligners(models, "first", dtype="bfloat16").align(logits, {0: Aligned(Request([1, 2, 3], []), how)}, {})
    assert_close(row, wanted, atol=0.3, rtol=0)
    assert (row - wanted)[:V].abs().max() > 1e-4


def test_a_head_is_refused_with_the_way_out(models, tmp_path):
    """vLLM gives its logits processors no hidden states."""
    tokenizer = tiny_tokenizer(LETTERS)
    base = save_tiny(tmp_path / "base", tiny_model("llama", V), tokenizer)
    folder = save_lora(tmp_path / "head", base, target_modules=["q_proj"], layers_to_transform=[1])
    tokenizer.save_pretrained(folder)
    head = {"tap": 1, "layers": 2, "proposal": digest_model(load_model(base))}
    manifest = Manifest(vocabulary=fingerprint_vocabulary(tokenizer), rule="geometric", head=head)
    (folder / "trimtab.json").write_text(json.dumps(manifest.to_dict()), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=r"is a head: it reads the hidden states .* Use it as a LoRA adapter"):
        make_aligners(Models({"head": str(folder)}, models.catalog, {}))


# ---- blends


def test_an_object_is_a_list_with_its_weights(models):
    as_object = read(models, aligner={"red": 0.7, "blue": -0.3}, blend="weights")
    assert as_object == read(models, aligner=["red", "blue"], weight=[0.7, -0.3], blend="weights")
    assert as_object.shaping.blend == (0.7, -0.3)
    assert as_object.shaping.weights == (1.0,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"aligner": ["red", "first"], "weight": [1, 1]}, "blend: aligner 'first' is no LoRA adapter on a base"),
        ({"aligner": ["red", "blue"]}, "blend: weight is missing: give one number for each aligner"),
        ({"aligner": {"red": 1.0}, "weight": 1.0}, "weight: aligner says the weights already"),
        ({}, "blend needs an aligner"),
    ],
)
def test_what_cannot_be_blended_is_refused_before_vllm_has_it(asked, message, models):
    with pytest.raises(InvalidRequest, match=message):
        models.catalog.read({"blend": "weights", **asked})


def test_adapters_of_two_bases_or_too_many_are_refused(models, tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer(LETTERS)
    other = save_tiny(tmp_path / "other", tiny_model("llama", V, seed=9), tokenizer)
    paths = models.paths | {"green": str(save_lora(tmp_path / "green", other, target_modules=["q_proj"]))}
    tokenizer.save_pretrained(paths["green"])
    catalog = Catalog(Settings(paths), tokenizer, [0])
    asked = {"aligner": ["red", "green"], "weight": [1, 1], "blend": "weights"}
    with pytest.raises(InvalidRequest, match="blend: aligners 'red' and 'green' are adapters of different bases"):
        catalog.read(asked)
    monkeypatch.setattr("trimtab.vllm.settings.FEW", 1)
    with pytest.raises(InvalidRequest, match=r"blend: more than 1 aligners adapt .*, which is the most for blends"):
        catalog.read(asked | {"aligner": ["red", "blue"]})


def test_a_blend_makes_nothing_in_flight(models):
    """What blends share is there from the start, and new weights change no more than a row of it."""
    aligners = make_aligners(models, "red", "blue")
    (cache,) = aligners._caches.values()
    stacked = cache._stacked
    for weight in (0.1, 0.9):
        arguments = [read(models, aligner={"red": weight * i, "blue": 0.5}, blend="weights") for i in (1, 2)]
        asked = {row: Aligned(Request([1, 2], []), one) for row, one in enumerate(arguments)}
        aligners.align(torch.zeros(2, COLUMNS), asked, {})
        assert cache._state.gathered is stacked


# ---- memory


def size(aligners: Aligners) -> int:
    """What is allocated for caches."""
    return sum(cache.num_bytes for cache in aligners._caches.values())


def weights(aligners: Aligners) -> int:
    bases = {id(base): base.num_bytes for base, _ in aligners._models.values()}
    return sum(bases.values()) + sum(adapter.num_bytes for _, adapter in aligners._models.values() if adapter)


def test_adapters_share_a_cache_with_a_slot_for_each_that_a_request_may_combine(models):
    token = models.alone["red"].pool.cache_bytes_per_token  # type: ignore[attr-defined]
    slot, both = (CONTEXT + 1) * token, [models.alone[name].adapter for name in ("red", "blue")]  # type: ignore[attr-defined]
    store = models.alone["red"].pool.store  # type: ignore[attr-defined]
    mixing, once = store.gathered_bytes(both), store.stacked_bytes(both)
    assert token == 2 * 2 * 2 * 8 * 4, "keys and values, layers, heads, dimensions, bytes"
    assert size(make_aligners(models, "red", "blue", requests=3)) == 2 * 3 * (slot + mixing) + once
    assert size(make_aligners(models, "red", "blue", requests=3, max_aligners=1)) == 3 * (slot + mixing) + once
    assert size(make_aligners(models, "red", requests=3)) == 3 * slot + store.stacked_bytes(both[:1])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "granite", "olmo2", "qwen2", "gemma"])
def test_what_was_reckoned_is_what_is_taken(kind, tmp_path):
    path = save_tiny(tmp_path / "q", tiny_model(kind, V).to(torch.bfloat16), tiny_tokenizer(LETTERS))
    aligners = make_aligners(Models({"q": str(path)}, None, {}), requests=100)  # type: ignore[arg-type]
    assert size(aligners) == 100 * (CONTEXT + 1) * next(iter(aligners._caches)).cache_bytes_per_token
    taken = f"{weights(aligners) / 2**20:.1f} MiB of weights and {size(aligners) / 2**20:.1f} MiB of cache"
    assert aligners.summary == f"aligners q take {taken} (100 requests of {CONTEXT} tokens) on cpu"


@pytest.mark.parametrize("limited", ["by the operator", "by what is free"])
@pytest.mark.parametrize("spare", [-1, 0])
def test_a_refusal_names_the_most_requests_that_fit(models, limited, spare, monkeypatch):
    """With room for exactly 7, 7 fit; with one byte less, 6 do."""
    seven = make_aligners(models, requests=7)
    room, fits = size(seven) + spare, 7 if spare == 0 else 6
    settings: dict[str, Any] = {}
    if limited == "by the operator":
        settings["memory"] = weights(seven) + room
    else:
        monkeypatch.setattr("trimtab.vllm.aligners.free_memory", lambda device: room)
    with pytest.raises(InvalidOption, match=rf"caches for 50 requests of {CONTEXT} tokens .*: --max-num-seqs {fits} fits$"):
        make_aligners(models, requests=50, **settings)
    with pytest.raises(InvalidOption, match=rf"--max-num-seqs {fits} fits$"):
        make_aligners(models, requests=fits + 1, **settings)
    assert size(make_aligners(models, requests=fits, **settings)) <= room


def test_the_smaller_room_counts(models, monkeypatch):
    seven = make_aligners(models, requests=7)
    monkeypatch.setattr("trimtab.vllm.aligners.free_memory", lambda device: size(seven))
    with pytest.raises(InvalidOption, match="--max-num-seqs 7 fits"):
        make_aligners(models, requests=50, memory=10 * (weights(seven) + size(seven)))
    with pytest.raises(InvalidOption, match="--max-num-seqs 3 fits"):
        make_aligners(models, requests=50, memory=weights(seven) + size(seven) // 2)


def test_where_not_one_request_fits_shorter_ones_may(models):
    one = make_aligners(models, "first", requests=1)
    memory = weights(one) + size(one) // 2
    with pytest.raises(InvalidOption, match=r"not even one request fits; lower --max-model-len$"):
        make_aligners(models, "first", requests=50, memory=memory)
    assert weights(one) + size(make_aligners(models, "first", requests=1, length=CONTEXT // 2 - 1, memory=memory)) <= memory


def test_where_the_weights_alone_are_too_much_no_length_would_do(models):
    memory = weights(make_aligners(models, requests=1)) - 1
    with pytest.raises(InvalidOption, match=r"0.0 MiB are left: the weights alone take more than trimtab.memory_gib; raise it"):
        make_aligners(models, requests=1, memory=memory)


def test_unknown_free_memory_refuses_nothing(models, monkeypatch):
    monkeypatch.setattr("trimtab.vllm.aligners.free_memory", lambda device: None)
    assert size(make_aligners(models, requests=3)) > 0


def test_too_short_a_context_is_refused(models):
    with pytest.raises(
        InvalidOption, match=r"the context of aligner 'first' holds 64 tokens, vLLM's 65: start vLLM with --max-model-len 64"
    ):
        make_aligners(models, "first", length=65)
    assert size(make_aligners(models, "first", length=64)) > 0


def test_what_cannot_be_loaded_is_refused(tmp_path):
    with pytest.raises(ModelError, match="nowhere"):
        make_aligners(Models({"q": str(tmp_path / "nowhere")}, None, {}))  # type: ignore[arg-type]
