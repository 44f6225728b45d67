"""Blends of LoRA adapters: a slot's rows are those of the base with Σ λ·s·B·A merged in, whatever its neighbours use."""

import functools
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch.testing import assert_close

from models import test_contract as contract
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import InvalidRequest
from trimtab.models import adapter_mixing
from trimtab.models.adapter_mixing import Gathered, Stacked
from trimtab.models.adapter_values import Blend
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.blends import blended
from trimtab.models.head import HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model

V = 32
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "target_modules": "all-linear"},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION},
    "mlp": {"r": 2, "target_modules": MLP},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION + MLP},
    "patterns": {"r": 2, "target_modules": ATTENTION + MLP, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    "layers": {"r": 2, "target_modules": [*ATTENTION, "down_proj"], "layers_to_transform": [1]},
}
"""Adapters that differ in rank, scale, and in what they adapt."""

# The contract suite, run over a blend.
test_stepwise_is_chunked = contract.test_stepwise_is_chunked
test_ragged_batch_is_each_alone = contract.test_ragged_batch_is_each_alone
test_rollback_is_recompute = contract.test_rollback_is_recompute
test_select_copies_repeats_and_drops = contract.test_select_copies_repeats_and_drops
test_rows_are_normalised = contract.test_rows_are_normalised_and_depend_on_the_prefix

Weights = dict[str, float]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blends")
    return save_tiny(folder / "base", tiny_model("llama", V, seed=7, spread=0.2), tiny_tokenizer())


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {kind: save_lora(base.parent / kind, base, seed=i, **KINDS[kind]) for i, kind in enumerate(KINDS)}


def make_pool(base: Path, folders: dict[str, Path], dtype: str = "float32") -> tuple[AdapterPool, dict[str, Adapted]]:
    pool = AdapterPool(load_model(base, dtype=dtype))
    return pool, {kind: pool.read(folder, kind) for kind, folder in folders.items()}


@pytest.fixture
def adapted(base: Path, folders: dict[str, Path]) -> dict[str, Adapted]:
    return make_pool(base, folders)[1]


@pytest.fixture(params=["stacked", "gathered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways to compute a mixed batch."""
    if request.param == "gathered":
        monkeypatch.setattr(adapter_mixing, "FEW", 0)
    return request.param


@pytest.fixture
def case(base: Path, folders: dict[str, Path]) -> tuple[Any, float]:
    """What the contract suite runs over."""
    _, adapted = make_pool(base, folders)
    return blended([adapted["all"], adapted["rslora"]], [0.7, -0.4]), 5e-5


def blend(adapted: dict[str, Adapted], weights: Weights) -> Any:
    return blended([adapted[kind] for kind in weights], list(weights.values()))


@functools.cache
def added(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight, s·B·A, as PEFT has it, in float64."""
    adapter = PeftModel.from_pretrained(load_model(base, dtype="float64"), str(folder)).base_model.model
    layers = [(name, module) for name, module in adapter.named_modules() if isinstance(module, LoraLayer)]
    return {f"{name}.weight": module.get_delta_weight("default").detach() for name, module in layers}


def merged_rows(base: Path, folders: dict[str, Path], weights: Weights, ids: torch.Tensor, dtype: str) -> torch.Tensor:
    """The definition: Σ λ·s·B·A added to the base's weights in float64; the stock modules' rows.

    Their norms compute in float32 at best, so that in float64 the lean pass is asked.
    """
    model = load_model(base, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parts = [weight * added(base, folders[kind]).get(name, 0) for kind, weight in weights.items()]
            parameter.copy_(parameter.double() + sum(parts))
        if dtype == "float64":
            return rows(HuggingFaceLM(model), ids)
        return torch.log_softmax(model(ids).logits.double(), -1)


def rows(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.extend(model.new_state(1, ids.shape[1]), ids, [ids.shape[1]])


MIX: list[Weights] = [
    {"all": 0.7, "mlp": -0.3},
    {},
    {"attention": 0.5, "rslora": 1.5, "patterns": 0.25},
    {"all": 1.0},
    {"layers": -2.0},
    {"all": -0.3, "mlp": 0.7},
    {"rslora": 1.5, "attention": 0.5, "patterns": 0.25},
]
"""What each slot of a batch uses: blends of different ranks, an adapter as it is, and nothing."""


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_batch_that_mixes_blends_is_each_merged_into_the_base(dtype, way, base, folders):
    """Concatenated = merged: in float64 to 1e-9, the two are one sum. In float32 what differs is rounding."""
    pool, adapted = make_pool(base, folders, dtype)
    ids = contract.tokens(8, seed=2, rows=len(MIX))
    state = pool.new_state(len(MIX), 16)
    alone = [blend(adapted, weights) if weights else pool for weights in MIX]
    state.adapters = [getattr(model, "adapter", None) for model in alone]
    got = torch.cat([pool.extend(state, ids[:, a:b], [b - a] * len(MIX)) for a, b in ((0, 5), (5, 6), (6, 8))], 1)
    assert isinstance(state.gathered, Stacked if way == "stacked" else Gathered)
    atol = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0.15}[dtype]
    for slot, (weights, model) in enumerate(zip(MIX, alone, strict=True)):
        mine = ids[slot : slot + 1]
        assert_close(got[slot].double(), rows(model, mine)[0].double(), atol=atol, rtol=0)
        if dtype != "bfloat16":
            expected = merged_rows(base, folders, weights, mine, dtype)
            assert_close(got[slot].double(), expected[0], atol=atol, rtol=0)
            plain = merged_rows(base, folders, {}, mine, dtype)
            assert not weights or (expected - plain).abs().max() > 0.01, "the blend must matter"


def test_one_weight_of_1_is_the_adapter_and_weights_of_0_the_base(base, folders):
    pool, adapted = make_pool(base, folders)
    assert blended([adapted["all"], adapted["mlp"]], [1.0, 0.0]).adapter is adapted["all"].adapter
    assert blended([adapted["all"], adapted["mlp"]], [0.0, 0.0]) is pool
    halves = blended([adapted["all"]] * 2, [0.25, 0.75])
    assert halves.adapter is adapted["all"].adapter, "one that is named twice has the sum of its weights"


def test_the_order_does_not_matter(adapted):
    weights = {"all": 0.7, "mlp": -0.3, "rslora": 0.1}
    one, other = blend(adapted, weights), blend(adapted, dict(reversed(weights.items())))
    assert one.adapter == other.adapter
    assert hash(one.adapter) == hash(other.adapter)
    assert one.fingerprint == other.fingerprint
    ids = contract.tokens(6, seed=3)
    assert torch.equal(rows(one, ids), rows(other, ids))


def test_blends_are_told_apart(adapted):
    same = {"all": 0.7, "mlp": -0.3}
    others = [{"all": 0.7, "mlp": 0.3}, {"all": -0.3, "mlp": 0.7}, {"all": 0.7}, {"all": 0.7, "attention": -0.3}]
    one = blend(adapted, same)
    assert len({blend(adapted, weights).fingerprint for weights in [same, *others]}) == 5
    assert all(blend(adapted, weights).adapter != one.adapter for weights in others)
    assert one.adapter != adapted["all"].adapter
    assert one.adapter != None  # noqa: E711 - slots without an adapter are compared so


def test_blends_that_change_from_step_to_step(way, base, folders):
    """What was put side by side for an earlier step must never be used for another."""
    pool, adapted = make_pool(base, folders)
    state, history, used = pool.new_state(4, 64), [[] for _ in range(4)], [{}] * 4
    changes: list[dict[int, Weights]] = [
        {0: {"all": 0.5, "mlp": 0.5}, 1: {"mlp": 1.0}},
        {2: {"all": 0.1}, 3: {"all": 0.5, "mlp": 0.5}},
        {0: {"all": 0.5, "mlp": -0.5}},
        {1: {"patterns": 1.0, "rslora": 2.0}, 2: {}},
        {},
        {slot: {"all": 0.25, "layers": 3.0} for slot in range(4)},
        {3: {"all": 1.0}},
        {slot: {} for slot in range(4)},
    ]
    for step, change in enumerate(changes):
        for slot, weights in change.items():
            pool.rollback(state, [state.lengths[i] if i == slot else 0 for i in range(4)])
            model = blend(adapted, weights) if weights else pool
            used[slot], state.adapters[slot], history[slot] = weights, getattr(model, "adapter", None), []
        for slots in (2, 3, 4, 2):
            ids = contract.tokens(1 + step % 2, seed=10 * step + slots, rows=slots)
            got = pool.extend(state, ids, [ids.shape[1]] * slots)
            for slot in range(slots):
                history[slot] += ids[slot].tolist()
                model = blend(adapted, used[slot]) if used[slot] else pool
                expected = rows(model, torch.tensor([history[slot]]))[0, -ids.shape[1] :]
                assert_close(got[slot], expected, atol=1e-5, rtol=0)
    assert state.gathered is None, "a step without adapters gives the memory back"


def test_a_new_blend_of_the_same_adapters_copies_nothing(base, folders):
    pool, adapted = make_pool(base, folders)
    state = pool.new_state(3, 32)
    state.adapters = [blend(adapted, {"all": 0.1 * i, "mlp": 0.3, "rslora": 1.0}).adapter for i in range(1, 4)]
    pool.extend(state, contract.tokens(1, seed=1, rows=3), [1] * 3)
    stacked = state.gathered
    state.adapters[1] = blend(adapted, {"all": 0.9, "rslora": -1.0}).adapter
    pool.extend(state, contract.tokens(1, seed=2, rows=3), [1] * 3)
    assert state.gathered is stacked
    assert stacked.num_bytes == pool.store.mixing_bytes(3, state.adapters)
    once = sum(adapted[kind].adapter.num_bytes for kind in ("all", "rslora"))
    assert stacked.num_bytes >= once, "each adapter is there once"
    assert stacked.num_bytes <= once + 4 * adapted["mlp"].adapter.num_bytes, "padded to the products of the others"
    state.adapters[0] = state.adapters[2] = blend(adapted, {"all": 0.1, "rslora": 0.2}).adapter
    pool.extend(state, contract.tokens(1, seed=3, rows=3), [1] * 3)
    assert state.gathered.num_bytes == pool.store.mixing_bytes(3, state.adapters) < stacked.num_bytes, "what nobody uses goes"


def test_memory_is_reckoned_before_it_is_taken(way, base, folders):
    pool, adapted = make_pool(base, folders)
    for weights in (MIX, MIX[:1], [{"all": 0.5, "mlp": 0.5}, {}]):
        state = pool.new_state(len(weights), 4)
        state.adapters = [getattr(blend(adapted, w), "adapter", None) if w else None for w in weights]
        pool.extend(state, contract.tokens(1, seed=1, rows=len(weights)), [1] * len(weights))
        reckoned = pool.store.mixing_bytes(len(weights), state.adapters)
        assert state.gathered.num_bytes == reckoned or (way == "gathered" and state.gathered.num_bytes < reckoned)


def test_many_adapters_are_gathered_and_few_are_stacked(adapted, monkeypatch):
    blends = [blend(adapted, weights).adapter for weights in MIX if weights]
    assert len(adapter_mixing.distinct(blends)) == len(KINDS)
    for few in (len(KINDS) - 1, len(KINDS)):
        monkeypatch.setattr(adapter_mixing, "FEW", few)
        assert adapter_mixing.are_few(blends) == (few == len(KINDS))
    assert not adapter_mixing.are_few([adapted["all"].adapter, adapted["mlp"].adapter]), "there is no blend"


def test_what_overflows_in_float16_is_no_neighbours_business(base, folders):
    pool, adapted = make_pool(base, folders, "float16")
    ids = contract.tokens(3, seed=1, rows=2)
    expected = rows(blend(adapted, {"all": 0.5, "mlp": 0.5}), ids[:1])
    huge = adapted["attention"].adapter
    huge.flat.fill_(6e4)
    state = pool.new_state(2, 8)
    state.adapters = [blend(adapted, {"all": 0.5, "mlp": 0.5}).adapter, huge]
    got = pool.extend(state, ids, [3, 3])
    assert isinstance(state.gathered, Stacked)
    assert_close(got[:1], expected, atol=2e-2, rtol=0)
    assert not got[1].isfinite().all()


def test_a_blend_keeps_its_adapters_and_a_state_keeps_none(base, folders):
    pool, adapted = make_pool(base, folders)
    reference = weakref.ref(adapted["all"].adapter)
    state = pool.new_state(2, 8)
    state.adapters = [blend(adapted, {"all": 0.5, "mlp": 0.5}).adapter, None]
    pool.extend(state, contract.tokens(1, seed=1, rows=2), [1, 1])
    del adapted
    gc.collect()
    assert reference() is not None, "a slot in flight keeps it"
    state.adapters[0] = None
    gc.collect()
    assert reference() is None
    pool.extend(state, contract.tokens(1, seed=1, rows=2), [1, 1])


# ---- heads


def test_heads_of_one_tap_blend_and_of_two_do_not(base, folders):
    proposal = HuggingFaceLM(load_model(base))
    pool, other = HeadPool(proposal, 0), HeadPool(proposal, 1)
    heads = [Adapted(pool, pool.store.read(folders[kind], kind)) for kind in ("all", "mlp")]
    model, ids = blended(heads, [0.7, -0.3]), contract.tokens(6, seed=3)
    state = model.new_state(1, 8)
    got = model.extend(state, proposal.lean.embed(ids), [6])
    assert_close(got.double(), merged_rows(base, folders, {"all": 0.7, "mlp": -0.3}, ids, "float32"), atol=1e-5, rtol=0)
    late = Adapted(other, other.store.read(folders["layers"], "layers"))
    with pytest.raises(InvalidRequest, match=r"^blend: aligners\[0\] and aligners\[1\] are .* heads of different taps"):
        blended([heads[0], late], [0.5, 0.5])


# ---- what is refused


def test_what_is_no_adapter_of_one_base_is_refused(base, folders, adapted):
    _, others = make_pool(base, folders)
    with pytest.raises(InvalidRequest, match=r"^blend: aligners\[0\] and aligners\[1\] are adapters of different bases"):
        blended([adapted["all"], others["mlp"]], [0.5, 0.5])
    whole = HuggingFaceLM(load_model(base))
    for aligners, place in (([whole], 0), ([adapted["all"], whole], 1), ([adapted["all"].pool, adapted["all"]], 0)):
        with pytest.raises(InvalidRequest, match=rf"^blend: aligners\[{place}\] is no LoRA adapter on a base"):
            blended(aligners, [0.5] * len(aligners))
    with pytest.raises(InvalidRequest, match="is no LoRA adapter"):
        blended([blend(adapted, {"all": 0.5, "mlp": 0.5})], [1.0])


def test_an_infinite_sum_of_weights_cannot_come_of_finite_ones(adapted):
    assert Blend([(adapted["all"].adapter, 1e6)] * 3).parts == ((adapted["all"].adapter, 3e6),)
