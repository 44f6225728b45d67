"""Loading models and tokenizers: what cannot be used is refused with a named error, and nothing but tensors is ever read."""

import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import DynamicCache, Gemma2ForCausalLM, LlamaForCausalLM

from tiny import Trap, save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.errors import CheckpointError, InvalidOption, ModelError, UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import _check_spread, attention_for, load_model, load_tokenizer
from trimtab.models.masks import MIXED, WINDOWED

V = 28
WEIGHTS = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "sound", tiny_model("llama", V), tiny_tokenizer())


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A sound folder of one's own to spoil."""
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No network, and an empty hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


LOADERS: list[Callable[[Any], Any]] = [load_model, load_tokenizer, Aligner.from_pretrained, AlignedModel.from_pretrained]


# ---- what loads


def test_a_sound_folder_loads_as_it_was_saved(sound):
    model = load_model(sound)
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), tiny_model("llama", V).named_parameters(), strict=True
    ):
        assert torch.equal(parameter, expected), name
    assert not model.training
    assert load_tokenizer(str(sound)).get_vocab() == tiny_tokenizer().get_vocab()


def test_a_model_in_several_files_loads(tmp_path):
    tiny_model("llama", V).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load_model(tmp_path).lm_head.weight, tiny_model("llama", V).lm_head.weight)


def test_further_tensors_and_files_do_no_harm(folder):
    rewrite(folder, lambda tensors: tensors | {"something.else": torch.zeros(2)})
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "notes.txt").write_text("hello")
    load_model(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", torch.bfloat16])
def test_dtype_is_the_checkpoints_own_or_what_is_asked_for(folder, dtype):
    assert load_model(folder).dtype == torch.float32
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in load_model(folder, dtype=dtype).parameters()} == {wanted}
    load_model(folder, dtype=dtype).save_pretrained(folder)
    assert load_model(folder).dtype == wanted
    assert load_model(folder, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["no_such_dtype", "nn", "int8", "bool", "", torch.int8, 5], ids=repr)
def test_an_unknown_dtype_is_refused(sound, dtype):
    with pytest.raises(InvalidOption, match=r"^dtype"):
        load_model(sound, dtype=dtype)


@pytest.mark.parametrize("device", ["no_such_device", "cuda:99", "cpu:x"])
def test_an_unknown_device_is_refused(sound, device):
    """There are no hundred GPUs in any machine that runs this."""
    with pytest.raises(InvalidOption, match=r"^device"):
        load_model(sound, device=device)


def test_a_model_that_does_not_fit_is_not_offloaded(sound, monkeypatch):
    """Nor does it fail with what a library says of tensors that are nowhere."""
    assert {parameter.device.type for parameter in load_model(sound, device="auto").parameters()} == {"cpu"}
    for module in ("transformers.integrations.accelerate", "accelerate.utils.modeling"):
        monkeypatch.setattr(f"{module}.get_max_memory", lambda *_: {"cpu": 20_000})
    said = r"^device: '.*' does not fit into the memory of cpu: \d of its \d parts would lie in that of disk"
    with pytest.raises(InvalidOption, match=said):
        load_model(sound, device="auto")


def test_parts_on_gpus_are_told_from_those_beside_them():
    model = SimpleNamespace(hf_device_map={"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": "cpu"})
    with pytest.raises(InvalidOption, match="into the memory of GPU 0, GPU 1: 1 of its 4 parts would lie in that of cpu"):
        _check_spread(model, "a")
    model.hf_device_map["lm_head"] = 1
    _check_spread(model, "a")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "cpu:0"])
def test_a_named_device_is_used(sound, device):
    assert load_model(sound, device=device).device.type == "cpu"


def test_a_home_folder_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    load_tokenizer("~/model")
    load_model("~/model")


def test_a_relative_folder_is_found(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for name in ("model", "./model", Path("model")):
        load_tokenizer(name)
        load_model(name)


# ---- folders


@pytest.mark.parametrize("load", LOADERS, ids=["model", "tokenizer", "aligner", "aligned"])
@pytest.mark.parametrize("name", ["nowhere", "a/b/c/nowhere"])
def test_a_missing_folder_is_named(load, name, tmp_path):
    with pytest.raises(ModelError, match=f"'{tmp_path / name}' does not exist"):
        load(str(tmp_path / name))


@pytest.mark.parametrize("load", LOADERS, ids=["model", "tokenizer", "aligner", "aligned"])
def test_so_is_one_in_a_home_that_nobody_has(load):
    with pytest.raises(ModelError, match="'~nosuchuser/x' does not exist"):
        load("~nosuchuser/x")


@pytest.mark.parametrize("load", LOADERS)
def test_a_file_is_no_folder(load, sound):
    with pytest.raises(ModelError, match=r"config\.json' is a file; give the folder"):
        load(sound / "config.json")


@pytest.mark.parametrize(("load", "needed"), [(load_model, "config.json"), (load_tokenizer, "tokenizer_config.json")])
def test_a_folder_without_its_configuration_is_refused(load, needed, folder):
    (folder / needed).unlink()
    with pytest.raises(ModelError, match=f"'{folder}' holds no .*: {needed} is missing"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS, ids=["model", "tokenizer", "aligner", "aligned"])
def test_an_empty_folder_is_refused(load, tmp_path):
    with pytest.raises(ModelError, match=str(tmp_path)):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "", "model_type: llama", "[]", "{}", '"llama"', '{"model_type": "no_such_type"}'])
def test_a_configuration_that_is_none_is_refused(content, folder):
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json is not JSON|cannot read the model in|'no_such_type'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": "x"}, "hidden_size.*expected int, got str"),
        ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
        ({"rms_norm_eps": "abc"}, "rms_norm_eps.*expected float, got str"),
        ({"max_position_embeddings": None}, "max_position_embeddings.*expected int, got NoneType"),
        ({"head_dim": 7}, "head_dim"),
        ({"dtype": "nope"}, "no attribute 'nope'"),
        ({"num_key_value_heads": 0}, "division"),
        ({"layer_types": ["a", "a"]}, "layer_types"),
        ({"rope_parameters": {"rope_type": "zz"}}, "KeyError: 'zz'"),
        ({"hidden_act": "zz"}, "KeyError: 'zz'"),
    ],
    ids=str,
)
def test_whatever_is_wrong_with_a_configuration_the_folder_and_the_reason_are_named(values, reason, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    for load in (load_model, Aligner.from_pretrained, AlignedModel.from_pretrained):
        with pytest.raises(ModelError, match=f"(?s){folder}.*{reason}"):
            load(folder)


@pytest.mark.parametrize(("load", "needed"), [(load_model, "config.json"), (load_tokenizer, "tokenizer_config.json")])
def test_a_configuration_of_other_bytes_is_refused(load, needed, folder):
    (folder / needed).write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ModelError, match=f"{needed} is not JSON"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_refused(content, folder):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"cannot read the tokenizer in '{folder}'"):
        load_tokenizer(folder)


# ---- weights


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_weights_are_refused(keep, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:keep])
    with pytest.raises(CheckpointError, match=f"cannot read the model in '{folder}'"):
        load_model(folder)


def test_weights_that_are_something_else_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"<!DOCTYPE html>" * 100)
    with pytest.raises(CheckpointError, match=f"cannot read the model in '{folder}'"):
        load_model(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(bad, dtype, folder):
    def spoil(tensors):
        tensors[TENSOR][3, 5] = bad
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    rewrite(folder, spoil)
    with pytest.raises(CheckpointError, match=f"contains NaN or infinite weights in {TENSOR}"):
        load_model(folder)


@pytest.mark.parametrize("gone", [TENSOR, "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named(gone, folder):
    """transformers would go on with random numbers in its place."""
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone})
    with pytest.raises(CheckpointError, match=f"does not fill the model: 1 missing_keys, such as {gone}"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    rewrite(folder, lambda tensors: tensors | {TENSOR: tensors[TENSOR][:3].clone()})
    with pytest.raises(
        CheckpointError, match=rf"{TENSOR}, which has shape \[3, 32\] in its files and \[\d+, 32\] in the model"
    ):
        load_model(folder)


def test_what_is_refused_is_said_once(folder, caplog, monkeypatch):
    """Transformers has a table of it, of a line for each tensor, and a logger that passes nothing on."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tensors = load_file(folder / WEIGHTS)
    for changed in ({TENSOR: torch.zeros(7, 5)}, {}):
        rest = {key: value for key, value in tensors.items() if key != TENSOR}
        save_file(rest | changed, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=TENSOR):
            load_model(folder)
    assert not caplog.records


def test_weights_of_another_model_are_refused(folder):
    tiny_model("gpt2", V).save_pretrained(folder.parent / "other")
    shutil.copy(folder.parent / "other" / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match="does not fill the model"):
        load_model(folder)


def test_a_missing_part_of_the_weights_is_named(tmp_path):
    tiny_model("llama", V).save_pretrained(tmp_path, max_shard_size="10KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=f"'{folder}' holds no safetensors weights$"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_not_opened(name, folder, tmp_path):
    marker = tmp_path / "unpickled"
    pickle.loads(pickle.dumps(Trap(marker)))
    assert marker.is_dir(), "the trap works"
    marker.rmdir()
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps({TENSOR: Trap(marker)}))
    for load in (load_model, AlignedModel.from_pretrained, Aligner.from_pretrained):
        with pytest.raises(CheckpointError, match=f"holds no safetensors weights; {name} is pickled, which is never loaded"):
            load(folder)
    assert not marker.exists()


def test_code_in_a_folder_is_not_run(folder, tmp_path, monkeypatch):
    """Neither for the model nor for the tokenizer, and nobody is asked: answering yes must not matter."""
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    marker = tmp_path / "run"
    (folder / "trap.py").write_text(
        f"import os\nos.mkdir({str(marker)!r})\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig):\n    model_type = 'trap'\n"
        "class M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit(folder / "config.json", model_type="trap", auto_map={"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"})
    edit(folder / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "trap.T"]})
    with pytest.raises(ModelError, match=str(folder)):
        load_model(folder)
    with pytest.raises(ModelError, match=str(folder)):
        load_tokenizer(folder)
    assert not marker.exists()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- architectures


LLAMA_ROPE = {"rope_theta": 10000.0, "factor": 2.0}
UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bloom"}, "'bloom' model is no decoder of attention layers with a context .*; a vLLM server may run it"),
    ({"model_type": "t5"}, "'t5' model is no decoder of attention layers"),
    ({"model_type": "mamba2", "time_step_limit": [0.0, 0.1]}, r"time_step_limit is \[0.0, 0.1\] in this 'mamba2' model"),
    (
        {"model_type": "starcoder2", "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
        "all layers have",
    ),
    ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be at least 1"),
    (
        {"model_type": "llama", "sliding_window": 8, "use_sliding_window": False},
        "sliding_window: in this 'llama' model, the layers see the whole text, which transformers' cache would forget",
    ),
    ({"model_type": "llama", "attention_chunk_size": 8}, "attention_chunk_size: in this 'llama' model"),
    (
        {"model_type": "qwen3", "layer_types": ["full_attention", "linear_attention"]},
        "layer_types: 'qwen3' models have no layers",
    ),
    ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", **LLAMA_ROPE}}, "rope type 'dynamic'"),
    (
        {"model_type": "llama", "per_layer_config": {"0": {"sliding_window": 8}, "1": {"sliding_window": None}}},
        "per_layer_config: layers that are not all alike",
    ),
    ({"model_type": "gpt2", "add_cross_attention": True}, "'gpt2' model has cross-attention"),
    ({"model_type": "llama", "is_causal": False}, "is_causal is False in this 'llama' model"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"model_type": "falcon", "alibi": True}, "alibi is True in this 'falcon' model"),
    ({"model_type": "llama4_text", "attn_temperature_tuning": True}, "attn_temperature_tuning is True"),
    ({"model_type": "llama4"}, "attn_temperature_tuning is True in this 'llama4_text' model"),
    (
        {
            "model_type": "gemma3_text",
            "rope_parameters": {
                "full_attention": {"rope_type": "dynamic", **LLAMA_ROPE},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        "rope type 'dynamic'",
    ),
]


@pytest.mark.parametrize(("values", "message"), UNSUPPORTED, ids=lambda x: str(x)[:45])
def test_an_unsupported_architecture_is_refused_before_its_weights_are_read(values, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, **values}))
    (tmp_path / WEIGHTS).write_bytes(b"never read")
    with pytest.raises(UnsupportedModel, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", {"sliding_window": 8}), ("llama", {"rope_parameters": {"rope_type": "dynamic", **LLAMA_ROPE}})],
)
def test_a_loaded_model_is_checked_too(kind, settings):
    with pytest.raises(UnsupportedModel):
        AlignedModel.from_pretrained(tiny_model(kind, V, **settings))
    with pytest.raises(UnsupportedModel):
        AlignedModel.from_pretrained(tiny_model("llama", V), tiny_model(kind, V, **settings))


def test_static_rope_scaling_and_an_idle_window_are_supported():
    """Positions scaled once and for all, and a window that the configuration names but does not use."""
    models = [
        tiny_model("llama", V, rope_parameters={"rope_type": "linear", **LLAMA_ROPE}),
        tiny_model("qwen2", V, use_sliding_window=False, sliding_window=8),
    ]
    for model in models:
        ids = torch.arange(1, 21)[None]
        with torch.no_grad():
            expected = torch.log_softmax(model(ids).logits, -1)
        ours = HuggingFaceLM(model)
        assert_close(ours.extend(ours.new_state(1, 20), ids, [20]), expected, atol=5e-5, rtol=0)


WINDOWS: dict[str, dict[str, Any]] = {
    "none": {"sliding_window": None},
    "short": {"sliding_window": 8},
    "of no tokens": {"sliding_window": 0},
    "not used": {"sliding_window": 8, "use_sliding_window": False},
    "used": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0},
    "used by later layers": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
    "used by no layer": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2},
    "full layers": {"sliding_window": 8, "layer_types": ["full_attention"] * 2},
    "full layers, used": {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
    "sliding layers": {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
    "one sliding layer": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "sliding layers without": {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
    "nearly as long": {"sliding_window": 17, "use_sliding_window": True, "max_window_layers": 0},
    "chunks": {"sliding_window": None, "attention_chunk_size": 8},
    "chunks that full layers do not have": {"attention_chunk_size": 8, "layer_types": ["full_attention"] * 2},
    "a chunk as long as the context": {"sliding_window": None, "attention_chunk_size": 20},
    "as long as the context": {"sliding_window": 20, "use_sliding_window": True, "max_window_layers": 0},
}


@pytest.mark.parametrize("kind", sorted({*WINDOWED, *MIXED, "gemma", "gpt2", "gpt_neox", "llama"} - {"cwm", "llama4_text"}))
@pytest.mark.parametrize("settings", WINDOWS.values(), ids=WINDOWS)
def test_a_window_is_what_the_stock_model_makes_of_it(kind, settings):
    """A text that fills the context, in one pass of the stock model and token by token through its own cache: where both agree,
    the rows are these, in one pass, in pieces and token by token; where they do not, or it cannot run, it is refused. (The
    configurations of two families take few of these settings.)"""
    context = {"n_positions" if kind == "gpt2" else "max_position_embeddings": 20}
    ids = torch.arange(1, 21)[None]
    with torch.no_grad():
        model = tiny_model(kind, V, **context, **settings)
        try:
            whole = model(ids, use_cache=False).logits.log_softmax(-1)
            cache = DynamicCache(config=model.config)
            steps = [model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(20)]
            agreed = bool((whole - torch.cat(steps, 1).log_softmax(-1)).abs().max() < 1e-4)
        except (AttributeError, RuntimeError, TypeError, ValueError):
            agreed = False
    if not agreed:
        with pytest.raises(UnsupportedModel, match=r"sliding_window|attention_chunk_size"):
            HuggingFaceLM(model)
        return
    for lean in (True, False):
        ours = HuggingFaceLM(model, lean=lean)
        for sizes in ([20], [1] * 20, [11, 2, 7]):
            state, starts = ours.new_state(1, 20), [sum(sizes[:i]) for i in range(len(sizes))]
            rows = [ours.extend(state, ids[:, i : i + size], [size]) for i, size in zip(starts, sizes, strict=True)]
            assert_close(torch.cat(rows, 1), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2", "flex_attention"])
def test_the_attention_is_ours_to_choose(attention, tmp_path):
    """Whatever the files say; a class that has no SDPA gets the eager one."""
    for kind, taken in (("llama", "sdpa"), ("gpt_oss", "eager")):
        folder = save_tiny(tmp_path / kind, tiny_model(kind, V), tiny_tokenizer())
        edit(folder / "config.json", attn_implementation=attention)
        assert load_model(folder).config._attn_implementation == taken


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_router_logits_that_a_configuration_asks_for_are_not_in_the_way(kind):
    ids, model = torch.arange(1, 10)[None], tiny_model(kind, V)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits.log_softmax(-1)
    model.config.output_router_logits = True
    ours = HuggingFaceLM(model)
    assert_close(ours.extend(ours.new_state(1, 9), ids, [9]), expected, atol=5e-5, rtol=0)


def test_an_attention_that_takes_no_mask_is_refused():
    model = tiny_model("llama", V)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModel, match="attention 'flex_attention' takes no ready mask"):
        HuggingFaceLM(model)


def test_a_model_with_fewer_columns_than_tokens_is_refused():
    with pytest.raises(UnsupportedModel, match="has 20 output columns, but its tokenizer 28 tokens"):
        AlignedModel.from_pretrained(tiny_model("llama", 20), tokenizer=tiny_tokenizer())


def test_an_adapter_beside_a_model_is_not_loaded_with_it(folder, sound):
    """Transformers would put it into the model, and as a base under an adapter it would act twice."""
    save_lora(folder, sound, r=2, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"holds an adapter beside its model .* move it into a folder of its own"):
        load_model(folder)


# ---- the hub


@pytest.mark.parametrize("load", LOADERS, ids=["model", "tokenizer", "aligner", "aligned"])
@pytest.mark.parametrize("name", ["no-such-model", "no-such-org/no-such-model"])
def test_an_unknown_hub_id_is_refused_at_once(load, name, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    with pytest.raises(ModelError, match=f"'{name}' is no folder here, and the hub gave no"):
        load(name)
    assert time.monotonic() - start < 5, "an error must not wait for a network"


def test_a_hub_id_loads_from_the_cache_by_revision(offline, sound, tmp_path):
    """Two revisions of one repository in the hub's own cache layout: refs name commits, snapshots hold their files."""
    repository = offline / "models--someone--model"
    other = save_tiny(tmp_path / "other", tiny_model("llama", V, seed=5), tiny_tokenizer())
    for revision, commit, source in [("main", "a" * 40, sound), ("v2", "b" * 40, other)]:
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    for revision, seed in [(None, 0), ("v2", 5)]:
        expected = tiny_model("llama", V, seed=seed).lm_head.weight
        assert torch.equal(load_model("someone/model", revision=revision).lm_head.weight, expected)
        assert torch.equal(Aligner.from_pretrained("someone/model", revision=revision).model.lm_head.weight, expected)
    model = AlignedModel.from_pretrained("someone/model", "someone/model")
    assert len(model.generate("ab", SamplingParams(max_tokens=3, ignore_eos=True, seed=0))[0].tokens) == 3
    with pytest.raises(ModelError, match="'someone/model' is no folder here, and the hub gave no model"):
        load_model("someone/model", revision="no-such-revision")


def test_a_qwen2_model_with_a_tokenizer_of_its_own_keeps_it(tmp_path):
    """AutoTokenizer would go by the model's type, and add tokens that this vocabulary does not have."""
    saved = tiny_tokenizer()
    save_tiny(tmp_path, tiny_model("qwen2", 28), saved)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == saved.get_vocab()
    assert loaded.decode([1, 2, 3]) == saved.decode([1, 2, 3])


@pytest.mark.parametrize(
    ("kind", "cap", "attention"),
    [
        ("gemma2", 50.0, "eager"),
        ("gemma2", None, "sdpa"),
        ("llama", 50.0, "sdpa"),
        ("llama", None, "sdpa"),
        ("gpt2", None, "sdpa"),
    ],
)
def test_scores_that_a_family_caps_are_not_left_to_sdpa(kind, cap, attention, monkeypatch):
    """SDPA leaves a cap out; classes of transformers before 5.21 say that they support it all the same."""
    config = tiny_model(kind).config
    config.attn_logit_softcapping = cap
    for found in (Gemma2ForCausalLM, LlamaForCausalLM):
        monkeypatch.setattr(found, "_supports_sdpa", True)
    assert attention_for(config) == attention
