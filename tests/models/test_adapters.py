"""LoRA adapters over a shared base: each slot's rows are those of PEFT's own model, whatever its neighbours use."""

import gc
import json
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from models import test_contract as contract
from tiny import Trap, save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import CheckpointError, ModelError, UnsupportedModel
from trimtab.models.adapter_folder import Base
from trimtab.models.adapters import Adapted, AdapterPool
from trimtab.models.blocks import LEAN, projections_of
from trimtab.models.loading import load_model
from trimtab.models.lora_folder import poolable

# The contract suite, run over an adapter: its tests take the fixture `case`, which this module defines anew.
test_stepwise_is_chunked = contract.test_stepwise_is_chunked
test_ragged_batch_is_each_alone = contract.test_ragged_batch_is_each_alone
test_rollback_is_recompute = contract.test_rollback_is_recompute
test_select_copies_repeats_and_drops = contract.test_select_copies_repeats_and_drops
test_a_step_that_does_not_fit_is_refused = contract.test_a_step_that_does_not_fit_is_refused_and_changes_nothing
test_a_full_slot_waits_while_its_neighbour_goes_on = contract.test_a_full_slot_waits_while_its_neighbour_goes_on
test_rows_are_normalised = contract.test_rows_are_normalised_and_depend_on_the_prefix

V = 32
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
IDS = contract.tokens(9, seed=1)
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "target_modules": "all-linear"},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION},
    "mlp": {"r": 2, "target_modules": MLP},
    "two": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    "regex": {"target_modules": r".*\.1\..*(k_proj|up_proj)"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION + MLP},
    "patterns": {
        "r": 2,
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 1},
        "alpha_pattern": {"v_proj": 7, "layers.0.mlp.gate_proj": 1},
    },
    "layers": {"r": 2, "target_modules": [*ATTENTION, "down_proj"], "layers_to_transform": [1]},
}


def fitting(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings for a family whose linear layers have other names, or that has fewer of them."""
    names = projections_of(tiny_model(kind, V).config)
    if set(ATTENTION + MLP) <= set(names):
        return settings
    patterns = {"rank_pattern": {names[0]: 5, f"layers.1.self_attn.{names[-3]}": 1}, "alpha_pattern": {names[1]: 7}}
    return settings | {"target_modules": names} | (patterns if "rank_pattern" in settings else {})


def make_base(folder: Path, kind: str, **settings: Any) -> Path:
    return save_tiny(folder / f"base-{kind}", tiny_model(kind, V, seed=7, spread=0.2, **settings), tiny_tokenizer())


def peft_rows(base: Path, folder: Path | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The reference: the stock modules of transformers and PEFT, without a cache."""
    model = load_model(base)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.float(), -1)


def rows(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model.extend(model.new_state(1, ids.shape[1]), ids, [ids.shape[1]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    return {kind: save_lora(base.parent / kind, base, seed=i, **KINDS[kind]) for i, kind in enumerate(KINDS)}


@pytest.fixture
def pool(base: Path) -> AdapterPool:
    return AdapterPool(load_model(base))


@pytest.fixture(scope="module", params=["lent-float32", "lent-bfloat16", "packed-float32"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapted, float]:
    """What the contract suite runs over."""
    way, dtype = request.param.split("-")
    folder = tmp_path_factory.mktemp("contract")
    base = save_tiny(folder / "base", tiny_model("llama", V, spread=0.5 if dtype == "float32" else 0.1), tiny_tokenizer())
    lora = save_lora(folder / "lora", base, r=4, target_modules="all-linear")
    model = load_model(base, dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.models.prepack.PACKED_FROM", 0)
        pool = AdapterPool(model, owned=way == "packed")
    return pool.read(lora, "lora"), 5e-5 if dtype == "float32" else 6e-2


# ---- an adapter alone


@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("settings", ["all", "rslora", "patterns", "layers"])
def test_rows_are_those_of_peft(kind, settings, tmp_path):
    base = make_base(tmp_path, kind)
    folder = save_lora(tmp_path / "lora", base, **fitting(kind, KINDS[settings]))
    expected = peft_rows(base, folder)
    assert (expected - peft_rows(base, None)).abs().max() > 0.01, "the adapter must matter"
    pool = AdapterPool(load_model(base))
    assert_close(rows(pool.read(folder, "lora")), expected, atol=1e-5, rtol=0)
    assert_close(rows(pool), peft_rows(base, None), atol=1e-5, rtol=0)


def test_every_way_to_choose_modules_is_that_of_peft(base, folders, pool):
    for name, folder in folders.items():
        assert poolable(folder) == Base(str(base))
        assert_close(rows(pool.read(folder, name)), peft_rows(base, folder), atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("settings", [{"attention_bias": True, "mlp_bias": True}, {"num_key_value_heads": 4}])
def test_settings_of_the_base(settings, tmp_path):
    base = make_base(tmp_path, "llama", **settings)
    folder = save_lora(tmp_path / "lora", base, target_modules="all-linear")
    assert_close(rows(AdapterPool(load_model(base)).read(folder, "lora")), peft_rows(base, folder), atol=1e-5, rtol=0)


def test_an_adapter_costs_only_what_it_adapts(folders, pool):
    """Two layers, hidden 32, MLP 48, keys and values 16 wide. Rank 2 of the MLP: gate and up take a stacked A of 2·2·32 and a
    block-diagonal B of 2·2·96 numbers a layer, down 2·48 and 2·32."""
    adapter = pool.read(folders["mlp"], "mlp").adapter
    assert adapter.num_bytes == 4 * 2 * (2 * 2 * (32 + 96) + 2 * (48 + 32))
    assert adapter.flat.is_contiguous()
    assert adapter.flat.dtype == torch.float32
    assert all(delta is None for layer in adapter.deltas for delta in layer[:2])


def test_fingerprints_tell_adapters_apart(base, folders, pool):
    one, other = pool.read(folders["all"], "one"), pool.read(folders["mlp"], "other")
    assert len({pool.fingerprint, one.fingerprint, other.fingerprint}) == 3
    assert pool.read(folders["all"], "again").fingerprint == one.fingerprint
    assert one.adapter != pool.read(folders["all"], "again").adapter
    assert (one.vocab_size, one.max_length, one.device) == (pool.vocab_size, pool.max_length, pool.device)


# ---- adapters beside each other

MIX = ["all", None, "patterns", "mlp", "two", "layers", None, "all"]


def mixed_state(pool: AdapterPool, adapted: dict[str, Adapted], names: list[str | None], capacity: int = 16) -> Any:
    state = pool.new_state(len(names), capacity)
    state.adapters = [adapted[name].adapter if name else None for name in names]
    return state


@pytest.mark.parametrize("case", ["float32-packed", "float32-lent", "bfloat16-packed", "bfloat16-lent", "float64-lent"])
def test_a_mixed_batch_is_each_alone(case, base, folders, monkeypatch):
    monkeypatch.setattr("trimtab.models.prepack.PACKED_FROM", 0)
    dtype, way = case.split("-")
    pool = AdapterPool(load_model(base, dtype=dtype), owned=way == "packed")
    atol = 6e-2 if dtype == "bfloat16" else 1e-5
    adapted = {name: pool.read(folders[name], name) for name in set(MIX) - {None}}
    assert all(model.adapter.flat.dtype == getattr(torch, dtype) for model in adapted.values())
    ids = contract.tokens(8, seed=2, rows=len(MIX))
    state = mixed_state(pool, adapted, MIX)
    got = [pool.extend(state, ids[:, start : start + n], [n] * len(MIX)) for start, n in ((0, 5), (5, 1), (6, 2))]
    for slot, (name, row) in enumerate(zip(MIX, torch.cat(got, 1), strict=True)):
        expected = rows(adapted[name] if name else pool, ids[slot : slot + 1])[0]
        assert_close(row, expected, atol=atol, rtol=0)
        if dtype != "bfloat16":
            assert_close(row.float(), peft_rows(base, folders.get(name), ids[slot : slot + 1])[0], atol=1e-5, rtol=0)


def test_the_same_adapter_everywhere_is_the_mixed_path_without_a_copy(folders, pool):
    adapted = {"patterns": pool.read(folders["patterns"], "patterns")}
    ids = contract.tokens(6, seed=3, rows=3)
    same, mixed = mixed_state(pool, adapted, ["patterns"] * 3), mixed_state(pool, adapted, ["patterns", "patterns", None])
    one, other = pool.extend(same, ids, [6, 6, 6]), pool.extend(mixed, ids, [6, 6, 6])
    assert same.gathered is None
    assert mixed.gathered is not None
    assert_close(one[:2], other[:2], atol=1e-5, rtol=0)
    assert_close(other[2], rows(pool, ids[2:])[0], atol=1e-5, rtol=0)


def test_slots_keep_their_adapters_wherever_they_go(folders, pool):
    adapted = {name: pool.read(folders[name], name) for name in folders}
    names: list[str | None] = ["all", "mlp", None, "patterns"]
    ids, new = contract.tokens(6, seed=4, rows=4), contract.tokens(3, seed=5, rows=5)
    state = mixed_state(pool, adapted, names)
    pool.extend(state, ids, [6, 4, 5, 6])
    pool.rollback(state, [2, 0, 1, 0])
    picked = pool.select(state, [3, 1, 1, 0, 2])
    assert picked.adapters == [state.adapters[slot] for slot in (3, 1, 1, 0, 2)]
    other = adapted["two"].new_state(5, 16)
    assert other.adapters == [adapted["two"].adapter] * 5
    pool.extend(other, new[:, :1], [1] * 5)
    pool.copy(picked, [0, 3, 4], other, [4, 1, 0])  # places that another adapter's tokens have used
    pool.copy(other, [1], other, [2])
    held = state.lengths
    assert held == [4, 4, 4, 6]
    for moved, sources in ((picked, [3, 1, 1, 0, 2]), (other, [2, 0, 0, None, 3])):
        got = pool.extend(moved, new, [3] * 5)
        for slot, source in enumerate(sources):
            if source is None:  # never copied onto
                model, past = adapted["two"], new[slot, :1]
            else:
                model, past = adapted[name] if (name := names[source]) else pool, ids[source, : held[source]]
            expected = rows(model, torch.cat([past, new[slot]])[None])[0, len(past) :]
            assert_close(got[slot], expected, atol=1e-5, rtol=0)


def test_a_batch_that_shrinks_and_grows_and_changes_adapters(folders, pool):
    """One state over many steps: what was gathered for an earlier step must never be used for another."""
    adapted = {name: pool.read(folders[name], name) for name in folders}
    state = pool.new_state(4, 64)
    history: list[list[int]] = [[] for _ in range(4)]
    names: list[str | None] = [None] * 4
    changes: list[dict[int, str | None]] = [
        *({0: "two", 1: "regex"}, {1: "mlp"}, {2: "all", 3: "two"}, {1: "attention"}, {0: "patterns", 3: None}, {0: None}, {}),
        *({0: "all", 1: "all", 2: "all", 3: "all"}, {3: "rslora"}, {2: "layers"}, {0: None, 1: None, 2: None, 3: None}),
    ]
    for step, change in enumerate(changes):
        for slot, name in change.items():
            pool.rollback(state, [state.lengths[i] if i == slot else 0 for i in range(4)])
            names[slot], state.adapters[slot], history[slot] = name, adapted[name].adapter if name else None, []
        for slots in (2, 3, 4, 2, 1)[: 4 + step % 2]:  # a step of one slot needs nothing gathered
            ids = contract.tokens(1 + step % 2, seed=10 * step + slots, rows=slots)
            got = pool.extend(state, ids, [ids.shape[1]] * slots)
            for slot in range(slots):
                history[slot] += ids[slot].tolist()
                model = adapted[name] if (name := names[slot]) else pool
                expected = rows(model, torch.tensor([history[slot]]))[0, -ids.shape[1] :]
                assert_close(got[slot], expected, atol=1e-5, rtol=0)
    assert state.gathered is None, "a step without adapters gives the memory back"


def test_an_adapter_that_nobody_uses_is_gone(folders, pool):
    one, other = pool.read(folders["all"], "one"), pool.read(folders["mlp"], "other")
    adapter, flat = weakref.ref(one.adapter), weakref.ref(one.adapter.flat.untyped_storage())
    state = one.new_state(2, 16)
    state.adapters[1] = other.adapter
    ids = contract.tokens(2, seed=6, rows=2)
    expected = rows(one, ids[:1])
    pool.extend(one.new_state(1, 1), ids[:1, :1], [1])
    del one
    gc.collect()
    assert adapter() is not None, "a slot in flight keeps it"
    assert flat() is not None
    assert_close(pool.extend(state, ids, [2, 2])[0], expected[0], atol=1e-5, rtol=0)
    assert state.gathered is not None
    state.adapters[0] = None
    gc.collect()
    assert adapter() is None, "nor does the state keep it for having used it"
    assert flat() is None
    pool.extend(state, ids[:, :1], [1, 1])


# ---- what is refused


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return save_lora(tmp_path / "lora", base, r=2, target_modules=["q_proj", "down_proj"])


def configure(folder: Path, values: dict[str, Any]) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q), "lacks 1 keys, such as .*q_proj.lora_A"),
        (lambda t: t.update({Q.replace("layers.0", "layers.9"): t[Q].clone()}), r"no place for 1 keys, such as .*layers\.9"),
        (
            lambda t: t.update({Q: t[Q].T.contiguous()}),
            r"q_proj.lora_A.weight has shape \[32, 2\] in its file and \[2, 32\] in the model",
        ),
        (lambda t: t.update({Q: t[Q].flatten()}), r"q_proj.lora_A.weight has shape \[64\]"),
        (lambda t: t.update({Q: t[Q][:1].clone()}), r"q_proj.lora_A.weight has shape \[1, 32\]"),
        (lambda t: t[Q].fill_(torch.nan), "NaN or infinite weights in .*q_proj.lora_A"),
        (lambda t: t.clear(), "lacks 8 keys"),
    ],
    ids=["missing", "unexpected", "transposed", "flat", "rank", "nan", "empty"],
)
def test_a_file_that_does_not_fill_the_adapter_is_refused(change, message, lora, pool):
    tensors = load_file(lora / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        pool.read(lora, "lora")


def test_a_truncated_file_is_refused(lora, pool):
    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot read the aligner"):
        pool.read(lora, "lora")
    assert poolable(lora) is None


def test_a_pickled_adapter_is_refused_and_not_opened(lora, pool, tmp_path):
    (lora / "adapter_model.safetensors").unlink()
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(CheckpointError, match="pickled and not loaded"):
        pool.read(lora, "lora")
    assert poolable(lora) is None
    assert not (tmp_path / "sprung").exists()


def test_an_adapter_of_another_base_is_refused(lora, tmp_path):
    wide = AdapterPool(tiny_model("llama", V, hidden_size=48, num_attention_heads=6))
    with pytest.raises(CheckpointError, match="has shape"):
        wide.read(lora, "lora")
    with pytest.raises(CheckpointError, match="has no place for"):
        AdapterPool(tiny_model("llama", V, num_hidden_layers=1)).read(lora, "lora")


def test_a_folder_that_is_no_adapter_is_none(base, lora, pool, tmp_path):
    for folder in (base, tmp_path / "nowhere"):
        assert poolable(folder) is None
        with pytest.raises(ModelError, match=str(folder)):
            pool.read(folder, "lora")
    for text in ("{", "[]", '"LORA"'):
        (lora / "adapter_config.json").write_text(text)
        assert poolable(lora) is None
        with pytest.raises(ModelError, match=r"cannot read the aligner|must hold one JSON object"):
            pool.read(lora, "lora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"lora_bias": True, "bias": "lora_only"}, "lora_bias is True"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says that it saves embeddings too
def test_what_is_not_plain_lora_is_not_for_a_pool(settings, message, base, pool, tmp_path):
    folder = save_lora(tmp_path / "lora", base, **{"target_modules": ["q_proj"], **settings})
    assert poolable(folder) is None
    with pytest.raises(UnsupportedModel, match=message):
        pool.read(folder, "lora")


FURTHER = [{"peft_type": "IA3"}, {"init_lora_weights": "pissa"}, {"of_next_year": 1}, {"bias": "all"}, {"use_qalora": True}]


@pytest.mark.parametrize("values", FURTHER, ids=lambda values: next(iter(values)))
def test_a_configuration_with_anything_further_is_not_for_a_pool(values, lora, pool):
    configure(lora, values)
    assert poolable(lora) is None
    with pytest.raises(UnsupportedModel, match=next(iter(values))):
        pool.read(lora, "lora")


def test_a_target_without_weights_is_refused(lora, pool):
    """The file has the projections only, but the configuration says more; and no base, so the caller could not find it."""
    configure(lora, {"target_modules": ["q_proj", "down_proj", "lm_head"], "base_model_name_or_path": None})
    assert poolable(lora) is None
    with pytest.raises(UnsupportedModel, match="adapts lm_head"):
        pool.read(lora, "lora")


def test_a_base_without_the_lean_pass_is_refused(base, lora):
    with pytest.raises(UnsupportedModel, match="not this 'gpt2' model"):
        AdapterPool(tiny_model("gpt2", V))
    with pytest.raises(UnsupportedModel, match="not this 'llama' model"):
        AdapterPool(PeftModel.from_pretrained(load_model(base), str(lora)))


def test_a_lent_base_that_changes_is_refused(base, lora):
    for change in (lambda model: model.double(), lambda model: model.model.layers[0].register_forward_hook(print)):
        pool = AdapterPool(load_model(base))
        adapted = pool.read(lora, "lora")
        change(pool.model)
        with pytest.raises(UnsupportedModel, match="have changed"):
            adapted.new_state(1, 4)
