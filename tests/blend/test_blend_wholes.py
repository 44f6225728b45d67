"""`trimtab blend` of whole models: every tensor is θ_0 + Σ λ (θ_d − θ_0), and the folder is one that everything loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trimtab
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.errors import CheckpointError, InvalidOption, ManifestError, UnsupportedModel, VocabularyMismatch
from trimtab.files import write_json
from trimtab.models.aligner import Manifest, describe
from trimtab.models.loading import load_model
from trimtab.models.vocabulary import fingerprint_vocabulary

V = 28
Tensors = dict[str, torch.Tensor]


def save(folder: Path, seed: int, *, manifest: dict[str, Any] | None = None, dtype: str = "float32", **settings: Any) -> Path:
    model = tiny_model("llama", V, seed=seed, spread=0.3, **settings).to(getattr(torch, dtype))
    if manifest is None:
        return save_tiny(folder, model, tiny_tokenizer())
    made = Manifest(vocabulary=fingerprint_vocabulary(tiny_tokenizer()), **manifest)
    Aligner(model, tiny_tokenizer(), made).save_pretrained(folder)
    return folder


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    return {name: save(tmp_path / name, seed) for seed, name in enumerate(("a0", "med", "law", "wit"))}


def blend(parts: dict[str, Path], out: Path, weights: dict[str, float], **settings: Any) -> dict[str, Any]:
    vectors = [f"{name}={parts[name]}:{weight}" for name, weight in weights.items()]
    return trimtab.blend(base=str(parts["a0"]), vector=vectors, out=str(out), **settings)


def tensors(folder: Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def summed(parts: dict[str, Path], weights: dict[str, float]) -> Tensors:
    """The definition, in float64."""
    base = {name: one.double() for name, one in tensors(parts["a0"]).items()}
    moved = {name: tensors(parts[name]) for name in weights}
    return {
        name: start + sum(weight * (moved[part][name].double() - start) for part, weight in weights.items())
        for name, start in base.items()
    }


def equal(one: Tensors, other: Tensors) -> bool:
    """To the bit, the sign of 0 included."""
    raw = ({name: tensor.contiguous().view(torch.uint8) for name, tensor in tensors.items()} for tensors in (one, other))
    first, second = raw
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_every_tensor_is_the_sum(parts, tmp_path):
    weights = {"med": 0.7, "law": -0.3, "wit": 0.25}
    report = blend(parts, tmp_path / "out", weights)
    expected = summed(parts, weights)
    got = tensors(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, one in got.items():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), expected[name], atol=1e-7, rtol=1e-7)
        assert (one - tensors(parts["a0"])[name]).abs().max() > 0.01 or one.ndim == 1
    assert report["kind"] == "weights"
    assert report["parameters"] == sum(one.numel() for one in got.values())
    loaded = Aligner.from_pretrained(tmp_path / "out")
    assert equal({n: p.detach() for n, p in loaded.model.named_parameters()}, got)


def test_weights_of_0_and_one_of_1_are_the_parts_bits(parts, tmp_path):
    """So are tiny numbers beside large ones, whose difference is not exact, and zeros below 0."""
    file = parts["law"] / "model.safetensors"
    odd = load_file(file)
    first = min(odd)
    odd[first].view(-1)[:4] = torch.tensor([1e-38, -0.0, 1e-30, -1e-42])
    save_file(odd, file, metadata={"format": "pt"})
    blend(parts, tmp_path / "zero", {"med": 0.0, "law": 0.0})
    blend(parts, tmp_path / "one", {"med": 0.0, "law": 1.0})
    assert equal(tensors(tmp_path / "zero"), tensors(parts["a0"]))
    assert equal(tensors(tmp_path / "one"), tensors(parts["law"]))


def test_the_order_does_not_matter(parts, tmp_path):
    weights = {"med": 0.7, "law": -0.3, "wit": 1e-7}
    blend(parts, tmp_path / "one", weights)
    blend(parts, tmp_path / "other", dict(reversed(weights.items())))
    for name in ("model.safetensors", "trimtab.json", "README.md", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


def test_the_folder_says_what_it_was_made_of(parts, tmp_path):
    report = blend(parts, tmp_path / "out", {"law": -0.3, "med": 0.7}, rule="geometric", weight=0.5)
    manifest = describe(tmp_path / "out").manifest
    assert (manifest.rule, manifest.weight) == ("geometric", 0.5)
    assert manifest.blended == report["parts"]
    assert list(manifest.blended["vectors"]) == ["law", "med"]
    assert manifest.blended["vectors"]["law"]["weight"] == -0.3
    assert manifest.blended["base"]["id"] == str(parts["a0"])
    digests = {one["digest"] for one in (manifest.blended["base"], *manifest.blended["vectors"].values())}
    assert len(digests) == 3
    assert all(digest.startswith("sha256:") for digest in digests)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It is a blend" in card
    assert f"| law | {parts['law']} | -0.3 |" in card
    Aligner.from_pretrained(parts["a0"]).save_pretrained(tmp_path / "plain")
    assert "It is a blend" not in (tmp_path / "plain" / "README.md").read_text()


def test_a_blend_decodes_as_the_models_that_it_is(parts, tmp_path):
    """The text is that of a model whose parameters were set to the sum by hand."""
    weights = {"med": 0.7, "law": -0.3}
    blend(parts, tmp_path / "out", weights, rule="geometric", weight=0.5)
    by_hand = load_model(parts["a0"])
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.copy_(summed(parts, weights)[name])
    params = SamplingParams(max_tokens=12, seed=3, rule="geometric", weight=0.5)
    mine = AlignedModel.from_pretrained(parts["wit"], tmp_path / "out").generate(["hello"], params)
    its = AlignedModel.from_pretrained(parts["wit"], by_hand, tokenizer=parts["a0"]).generate(["hello"], params)
    assert mine[0].tokens == its[0].tokens


@pytest.mark.parametrize("held", ["nobody", "base", "part", "both"])
def test_tied_weights_stay_tied_whoever_stores_them_twice(held, tmp_path):
    parts = {name: save(tmp_path / name, seed, tie_word_embeddings=True) for seed, name in enumerate(("a0", "med"))}
    for name, part in (("a0", "base"), ("med", "part")):
        if held in (part, "both"):
            file = parts[name] / "model.safetensors"
            found = load_file(file)
            save_file(found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()}, file, metadata={"format": "pt"})
    blend(parts, tmp_path / "out", {"med": 0.5})
    model = load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = (tensors(parts["a0"])["model.embed_tokens.weight"] + tensors(parts["med"])["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(model.lm_head.weight.detach(), expected)
    assert tensors(tmp_path / "out").keys() == tensors(parts["a0"]).keys()


def test_the_bases_dtype_counts_and_the_sum_is_in_float64(tmp_path):
    parts = {
        "a0": save(tmp_path / "a0", 0, dtype="bfloat16"),
        "med": save(tmp_path / "med", 1),
        "law": save(tmp_path / "law", 2),
    }
    weights = {"med": 1000.0, "law": -1000.0}
    blend(parts, tmp_path / "out", weights)
    expected = summed(parts, weights)
    for name, one in tensors(tmp_path / "out").items():
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, expected[name].to(torch.bfloat16), atol=0, rtol=1e-2)


def test_several_files_stay_several(tmp_path):
    """Streamed: at no time is more than a tensor of each part read."""
    parts = {}
    for seed, name in enumerate(("a0", "med")):
        model = tiny_model("llama", V, seed=seed, spread=0.3)
        model.save_pretrained(tmp_path / name, max_shard_size="12KB" if name == "a0" else "1GB")
        tiny_tokenizer().save_pretrained(tmp_path / name)
        parts[name] = tmp_path / name
    names = sorted(file.name for file in parts["a0"].glob("*.safetensors*"))
    assert len(names) > 3
    blend(parts, tmp_path / "out", {"med": 0.5})
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors*")) == names
    expected = summed(parts, {"med": 0.5})
    for name, parameter in load_model(tmp_path / "out").named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], atol=1e-7, rtol=1e-7)


# ---- what the manifest says


RULES = {"rule": "geometric", "weight": 0.4, "proposal_temperature": 0.8, "objective": "sft"}


def test_what_the_parts_agree_on_is_taken(tmp_path):
    parts = {name: save(tmp_path / name, seed, manifest=RULES) for seed, name in enumerate(("med", "law"))}
    parts["a0"] = save(tmp_path / "a0", 5)
    report = blend(parts, tmp_path / "out", {"med": 0.5, "law": 0.5})
    manifest = describe(tmp_path / "out").manifest
    assert {name: getattr(manifest, name) for name in RULES} == RULES
    assert report["weight"] == 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "product"}, "rule: the parts disagree: 'product' in law, 'geometric' in med; say which with rule"),
        ({"weight": 0.5}, "weight: the parts disagree: 0.5 in law, 0.4 in med; say which with weight"),
        ({"weight": None}, "weight: the parts disagree"),
        ({"proposal_temperature": 1.0}, "proposal_temperature: the parts disagree"),
        ({"aligner_temperature": 0.5}, "aligner_temperature: the parts disagree"),
    ],
)
def test_what_they_disagree_on_must_be_said(change, message, tmp_path):
    parts = {"med": save(tmp_path / "med", 1, manifest=RULES), "law": save(tmp_path / "law", 2, manifest=RULES | change)}
    parts["a0"] = save(tmp_path / "a0", 5)
    weights = {"med": 0.5, "law": 0.5}
    with pytest.raises(InvalidOption, match=message):
        blend(parts, tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()
    said = {name: RULES.get(name, 1.0) for name in change}
    blend(parts, tmp_path / "out", weights, **said)
    assert all(getattr(describe(tmp_path / "out").manifest, name) == value for name, value in said.items())


def test_a_weight_belongs_to_its_rule(tmp_path):
    parts = {"med": save(tmp_path / "med", 1, manifest=RULES), "a0": save(tmp_path / "a0", 5)}
    blend(parts, tmp_path / "out", {"med": 0.5}, rule="product")
    assert describe(tmp_path / "out").manifest.weight in (None, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda blend: blend.pop("base"),
        lambda blend: blend["base"].pop("digest"),
        lambda blend: blend["vectors"]["med"].update(weight="much"),
        lambda blend: blend["vectors"]["med"].update(weight=True),
        lambda blend: blend["base"].update(id=3),
        lambda blend: blend["base"].update(more=3),
        lambda blend: blend.update(vectors=[]),
    ],
)
def test_a_manifest_that_is_broken_is_refused(change, parts, tmp_path):
    blend(parts, tmp_path / "out", {"med": 0.5})
    file = tmp_path / "out" / "trimtab.json"
    values = json.loads(file.read_text())
    change(values["blended"])
    write_json(file, values)
    with pytest.raises(ManifestError, match="blended"):
        describe(tmp_path / "out")


# ---- what is refused


def test_other_architectures_shapes_and_files_are_refused(parts, tmp_path):
    def refused(part: Path, kind: type[Exception], message: str, base: Path | None = None) -> None:
        with pytest.raises(kind, match=message):
            blend({"a0": base or parts["a0"], "odd": part}, tmp_path / "out", {"odd": 0.5})
        assert not (tmp_path / "out").exists()

    refused(save(tmp_path / "deep", 1, num_hidden_layers=3), UnsupportedModel, "odd: config.json has num_hidden_layers 3")
    refused(save(tmp_path / "eps", 1, rms_norm_eps=1e-3), UnsupportedModel, "odd: config.json has rms_norm_eps 0.001")
    refused(
        save(tmp_path / "tied", 1, tie_word_embeddings=True), UnsupportedModel, "odd: config.json has tie_word_embeddings True"
    )
    save_tiny(tmp_path / "words", tiny_model("llama", V), tiny_tokenizer("zyxwvutsrqponmlkjihgfedcba "))
    refused(tmp_path / "words", VocabularyMismatch, "does not share the proposal's vocabulary")
    file, found = parts["med"] / "model.safetensors", tensors(parts["med"])
    name = "model.layers.0.mlp.up_proj.weight"
    changes: list[tuple[Tensors, str]] = [
        ({k: v for k, v in found.items() if k != name}, f"odd: .* lacks 1 tensors, such as {name}"),
        (found | {"model.layers.9.x": torch.ones(2)}, r"odd: .* has beside the base's 1 tensors, such as model\.layers\.9\.x"),
        (found | {name: found[name].T.contiguous()}, rf"odd: {name} has shape \[32, 48\], and the base's \[48, 32\]"),
        (found | {name: found[name].to(torch.int32)}, rf"odd: {name} is stored as I32, and the base's as F32"),
        (found | {name: found[name] * torch.nan}, f"{name} of the blend is not finite in F32"),
    ]
    for held, message in changes:
        save_file(held, file, metadata={"format": "pt"})
        refused(parts["med"], CheckpointError, message)
    file.write_bytes(file.read_bytes()[:-50])
    refused(parts["med"], CheckpointError, "cannot read the model")
    refused(parts["law"], CheckpointError, "cannot read the model", base=parts["med"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vector": ["med:0.5"]}, "vector must be NAME=FOLDER:WEIGHT, such as med=med_aligner:0.7"),
        ({"vector": ["med=a"]}, "vector must be NAME=FOLDER:WEIGHT"),
        ({"vector": ["med=a:much"]}, "vector must be NAME=FOLDER:WEIGHT"),
        ({"vector": ["med=a:nan"]}, "vector must be NAME=FOLDER:WEIGHT"),
        ({"vector": ["med=a:2e6"]}, "vector must be NAME=FOLDER:WEIGHT"),
        ({"vector": ["a b=a:1"]}, "vector must be NAME=FOLDER:WEIGHT"),
        ({"vector": ["med=a:1", "med=b:1"]}, "vector: two are called 'med'"),
        ({"vector": []}, "vector is required"),
        ({"vector": ["med=a:1"], "out": ""}, "out is required"),
        ({"vector": ["med=a:1"], "rule": "sum"}, "'sum'"),
        ({"vector": ["med=a:1"], "proposal_top_p": 2.0}, "proposal_top_p must be a number above 0 and at most 1"),
        ({"vector": ["med=a:1"], "weights": 1.0}, "there is no option 'weights': did you mean weight"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_read(settings, message, tmp_path):
    with pytest.raises(InvalidOption, match=message):
        trimtab.blend(**{"base": "a0", "out": str(tmp_path / "out"), **settings})


def test_models_need_a_base_and_an_out_of_its_own(parts, tmp_path):
    vector = f"med={parts['med']}:0.5"
    with pytest.raises(InvalidOption, match=r"^base is required: the model that all of these began as"):
        trimtab.blend(vector=vector, out=str(tmp_path / "out"))
    for out in (parts["med"], parts["a0"], parts["med"] / "in"):
        with pytest.raises(InvalidOption, match="is, or is in, a part of the blend"):
            trimtab.blend(base=str(parts["a0"]), vector=vector, out=str(out))


def test_what_an_earlier_aligner_left_goes_and_a_failure_leaves_it(parts, tmp_path):
    old = Aligner.from_pretrained(parts["wit"])
    old.draft = parts["law"]
    old.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = tensors(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not finite"):
        blend(parts | {"odd": _infinite(tmp_path)}, tmp_path / "out", {"odd": 0.5})
    assert equal(tensors(tmp_path / "out"), before)
    blend(parts, tmp_path / "out", {"med": 0.5})
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert describe(tmp_path / "out").draft is None


def _infinite(tmp_path: Path) -> Path:
    folder = save(tmp_path / "odd", 9)
    found = tensors(folder)
    found[max(found)].view(-1)[0] = torch.inf
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
