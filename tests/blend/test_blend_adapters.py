"""`trimtab blend` of LoRA adapters: an adapter whose rows are those of Σ λ·s·B·A merged into the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import trimtab
from models import test_contract as contract
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import CheckpointError, InvalidOption, UnsupportedModel
from trimtab.files import write_json
from trimtab.models.adapters import AdapterPool
from trimtab.models.aligner import Aligner, Manifest, describe
from trimtab.models.blends import blended
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.models.vocabulary import fingerprint_vocabulary

V = 28
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "all": {"r": 4, "target_modules": "all-linear"},
    "attention": {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ATTENTION + MLP},
    "patterns": {"r": 2, "target_modules": ATTENTION + MLP, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 7}},
    "layers": {"r": 2, "target_modules": [*ATTENTION, "down_proj"], "layers_to_transform": [1]},
}
IDS = contract.tokens(9, seed=1) % V


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    return save_tiny(folder / "base", tiny_model("llama", V, seed=7, spread=0.2), tiny_tokenizer())


@pytest.fixture(scope="module")
def folders(base: Path) -> dict[str, Path]:
    found = {kind: save_lora(base.parent / kind, base, seed=i, **KINDS[kind]) for i, kind in enumerate(KINDS)}
    found["by hand"] = made_by_hand(base.parent / "by-hand", base)
    return found


def made_by_hand(folder: Path, base: Path) -> Path:
    """An adapter of rank 1 of one module, written without PEFT, in bfloat16."""
    folder.mkdir()
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    down, up = torch.linspace(-1, 1, 32)[None], torch.linspace(-0.5, 0.5, 48)[:, None]
    save_file({key.format("A"): down.bfloat16(), key.format("B"): up.bfloat16()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 1, "lora_alpha": 3}
    write_json(folder / "adapter_config.json", settings | {"target_modules": ["model.layers.0.mlp.up_proj"]})
    return folder


def blend(folders: dict[str, Path], out: Path, weights: dict[str, float], **settings: Any) -> dict[str, Any]:
    vectors = [f"{name.replace(' ', '-')}={folders[name]}:{weight}" for name, weight in weights.items()]
    return trimtab.blend(vector=vectors, out=str(out), **settings)


def rows(model: Any) -> torch.Tensor:
    return model.extend(model.new_state(1, IDS.shape[1]), IDS, [IDS.shape[1]])


def added(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    adapter = PeftModel.from_pretrained(load_model(base, dtype="float64"), str(folder)).base_model.model
    layers = [(name, module) for name, module in adapter.named_modules() if isinstance(module, LoraLayer)]
    return {f"{name}.weight": module.get_delta_weight("default").detach() for name, module in layers}


def merged(base: Path, folders: dict[str, Path], weights: dict[str, float]) -> Any:
    """The definition: all of it added to the base's weights, in float64."""
    model, moved = load_model(base, dtype="float64"), {name: added(base, folders[name]) for name in weights}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += sum(weight * moved[part].get(name, 0.0) for part, weight in weights.items())
    return model


WEIGHTS = {"all": 0.7, "attention": -0.3, "rslora": 1.5, "patterns": 0.25, "layers": -1.0, "by hand": 2.0}


def test_concatenated_is_merged(base, folders, tmp_path):
    """Adapters of other ranks, scales and modules; of rslora, of patterns, made by hand: to 1e-6, in every way to run them.

    The file holds λ·s·B in float32, and so what is left is its rounding.
    """
    report = blend(folders, tmp_path / "out", WEIGHTS)
    assert report["kind"] == "lora"
    assert report["rank"] == 4 + 3 + 4 + 5 + 2, "of a query projection; the largest"
    expected = rows(HuggingFaceLM(merged(base, folders, WEIGHTS)))
    pool = AdapterPool(load_model(base, dtype="float64"))
    assert_close(rows(pool.read(tmp_path / "out", "out")), expected, atol=1e-6, rtol=1e-6)
    assert (rows(pool) - expected).abs().max() > 0.1, "the blend must matter"
    peft = PeftModel.from_pretrained(load_model(base, dtype="float64"), str(tmp_path / "out")).eval()
    with torch.no_grad():
        assert_close(torch.log_softmax(peft(IDS).logits, -1), expected, atol=1e-5, rtol=0)
    for name, one in added(base, tmp_path / "out").items():
        parts = [weight * added(base, folders[part]).get(name, 0.0) for part, weight in WEIGHTS.items()]
        assert_close(one, torch.as_tensor(sum(parts)), atol=1e-6, rtol=0)


def test_the_folder_is_what_a_request_blends(base, folders, tmp_path):
    weights = {name: weight for name, weight in WEIGHTS.items() if name != "by hand"}
    blend(folders, tmp_path / "out", weights)
    pool = AdapterPool(load_model(base))
    asked = blended([pool.read(folders[name], name) for name in weights], list(weights.values()))
    assert_close(rows(asked), rows(pool.read(tmp_path / "out", "out")), atol=1e-5, rtol=0)


def test_the_bases_own_name_is_no_other_blend(base, folders, tmp_path):
    weights = {"all": 0.7, "attention": 0.3}
    blend(folders, tmp_path / "one", weights)
    blend(folders, tmp_path / "other", dict(reversed(weights.items())), base=str(base))
    for name in ("adapter_model.safetensors", "adapter_config.json", "trimtab.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_an_adapter_can_be_what_they_began_as(base, folders, tmp_path):
    """θ_0 + Σ λ_d (θ_d − θ_0), where θ_0 is the base with an adapter, too."""
    blend(folders, tmp_path / "out", {"all": 0.7, "rslora": 0.5}, base=str(folders["attention"]))
    expected = rows(HuggingFaceLM(merged(base, folders, {"attention": 1 - 0.7 - 0.5, "all": 0.7, "rslora": 0.5})))
    pool = AdapterPool(load_model(base, dtype="float64"))
    assert_close(rows(pool.read(tmp_path / "out", "out")), expected, atol=1e-6, rtol=0)
    blend(folders, tmp_path / "zero", {"all": 0.0}, base=str(folders["attention"]))
    assert torch.equal(rows(pool.read(tmp_path / "zero", "zero")), rows(pool.read(folders["attention"], "attention")))


@pytest.mark.parametrize("kind", [*KINDS, "by hand"])
def test_one_weight_of_1_gives_the_parts_bits(kind, base, folders, tmp_path):
    other = "all" if kind != "all" else "layers"
    blend(folders, tmp_path / "out", {kind: 1.0, other: 0.0})
    for name in ("adapter_model.safetensors",):
        assert (tmp_path / "out" / name).read_bytes() == (folders[kind] / name).read_bytes()
    pool = AdapterPool(load_model(base))
    assert torch.equal(rows(pool.read(tmp_path / "out", "out")), rows(pool.read(folders[kind], kind)))


def test_the_widest_dtype_of_the_parts_is_the_blends(folders, tmp_path):
    blend(folders, tmp_path / "wide", {"by hand": 0.5, "all": 0.5})
    blend(folders, tmp_path / "narrow", {"by hand": 0.5})
    dtypes = [
        {one.dtype for one in load_file(tmp_path / name / "adapter_model.safetensors").values()} for name in ("wide", "narrow")
    ]
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_manifest_and_tokenizer_are_written(base, folders, tmp_path):
    blend(folders, tmp_path / "out", {"all": 0.7, "attention": -0.3}, rule="geometric", weight=0.5)
    manifest = describe(tmp_path / "out").manifest
    assert (manifest.rule, manifest.weight) == ("geometric", 0.5)
    assert manifest.blended["base"] == {"id": str(base.resolve()), "revision": None, "digest": None}
    assert {name: one["weight"] for name, one in manifest.blended["vectors"].items()} == {"all": 0.7, "attention": -0.3}
    assert Aligner.from_pretrained(tmp_path / "out").tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


# ---- heads


def as_head(folder: Path, source: Path, tap: int) -> Path:
    folder.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    head = {"tap": tap, "layers": 2, "proposal": "sha256:0"}
    write_json(folder / "trimtab.json", Manifest(fingerprint_vocabulary(tiny_tokenizer()), head=head).to_dict())
    return folder


def test_heads_of_one_tap_make_a_head_and_nothing_else_does(folders, tmp_path):
    heads = {"one": as_head(tmp_path / "one", folders["layers"], 1), "other": as_head(tmp_path / "other", folders["layers"], 1)}
    blend(heads, tmp_path / "out", {"one": 0.5, "other": 0.25})
    assert describe(tmp_path / "out").manifest.head == {"tap": 1, "layers": 2, "proposal": "sha256:0"}
    heads |= {"late": as_head(tmp_path / "late", folders["layers"], 0), "plain": folders["layers"]}
    for odd in ("late", "plain"):
        with pytest.raises(InvalidOption, match=r"head: the parts disagree.*heads of two taps or proposals"):
            blend(heads, tmp_path / "no", {"one": 0.5, odd: 0.5})


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "odd: .*use_dora is True; merge it into its base, and blend the whole models"),
        ({"modules_to_save": ["lm_head"]}, "odd: .*modules_to_save is"),
        ({"target_modules": ["q_proj", "lm_head"]}, "odd: .*lm_head"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT says that it saves embeddings too
def test_what_is_no_plain_lora_is_refused(settings, message, base, folders, tmp_path):
    odd = save_lora(tmp_path / "odd", base, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(UnsupportedModel, match=message):
        blend(folders | {"odd": odd}, tmp_path / "out", {"all": 0.5, "odd": 0.5})
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit_together_are_refused(base, folders, tmp_path):
    def refused(kind: type[Exception], message: str, parts: dict[str, Path], weights: dict[str, float], **how: Any) -> None:
        with pytest.raises(kind, match=message):
            blend(parts, tmp_path / "out", weights, **how)
        assert not (tmp_path / "out").exists()

    other = save_tiny(tmp_path / "base", tiny_model("llama", V, seed=8), tiny_tokenizer())
    foreign = save_lora(tmp_path / "foreign", other, target_modules=["q_proj"])
    half = {"all": 0.5, "odd": 0.5}
    refused(InvalidOption, "vector: .* adapts .*: they need one base", folders | {"odd": foreign}, half)
    refused(InvalidOption, "vector odd is an adapter, and others are", {"all": base, "odd": foreign}, half)
    refused(InvalidOption, "^base .* is not what the adapters adapt", folders, {"all": 0.5}, base=str(other))
    refused(InvalidOption, "all weights are 0, and the blend is the base itself", folders, {"all": 0.0, "layers": 0.0})
    broken = save_lora(tmp_path / "broken", base, target_modules=["q_proj"])
    file = broken / "adapter_model.safetensors"
    found, key = load_file(file), "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    changes = [
        ({name: one for name, one in found.items() if name != key}, f"lacks 1 keys, such as {key}"),
        (found | {key: found[key][:1].contiguous()}, r"odd: .*q_proj.lora_A.weight is F32 of shape \[1, 32\], and should"),
        (found | {key: found[key] * torch.nan}, "lora_A.weight of the blend is not finite"),
    ]
    for held, message in changes:
        save_file(held, file)
        refused(CheckpointError, message, folders | {"odd": broken}, half)
    file.unlink()
    refused(CheckpointError, "holds no adapter_model.safetensors", folders | {"odd": broken}, half)


def test_the_command_line_does_the_same(base, folders, tmp_path, capsys):
    from trimtab.cli import main

    vectors = [f"--vector={name}={folders[name]}:{weight}" for name, weight in (("all", 0.7), ("layers", -0.3))]
    assert main(["blend", *vectors, "--out", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["rank"] == 6
    assert main(["blend", *vectors, "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "a LoRA adapter, rank 6" in said
    assert f"layers          {folders['layers']} × -0.3" in said
    file = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert file == (tmp_path / "again" / "adapter_model.safetensors").read_bytes()
    assert main(["blend", "--vector", "x", "--out", str(tmp_path / "no")]) == 2
    assert "--vector must be NAME=FOLDER:WEIGHT" in capsys.readouterr().err
