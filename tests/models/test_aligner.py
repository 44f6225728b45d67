"""`Aligner` on disk and in an `AlignedModel`: what is saved comes back bit for bit, and what does not fit is refused."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tiny import EOS, Trap, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.errors import CheckpointError, InvalidOption, ManifestError, ModelError, TrimtabError, VocabularyMismatch
from trimtab.models import aligner as aligner_module
from trimtab.models.aligner import MANIFEST_NAME, Manifest
from trimtab.models.loading import load_model
from trimtab.models.vocabulary import fingerprint_vocabulary

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21 calls it

V = 28
FULL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} | {
    "tokenizer_config.json",
    MANIFEST_NAME,
}
LORA_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"} | {
    MANIFEST_NAME
}
FINGERPRINT = fingerprint_vocabulary(tiny_tokenizer())
SAID = Manifest(
    vocabulary=FINGERPRINT,
    proposal={"id": "someone/large-model", "revision": "abc"},
    rule="kl_gate(tau=0.3)",
    weight=0.5,
    proposal_temperature=0.7,
    proposal_top_p=0.95,
    aligner_temperature=1.3,
    objective="likelihood",
)


def full(seed: int = 1, manifest: Manifest = SAID) -> Aligner:
    return Aligner(tiny_model("llama", V, seed=seed), tiny_tokenizer(), manifest)


def lora(base: Path, seed: int = 1, manifest: Manifest = SAID) -> Aligner:
    """A LoRA adapter whose both halves are random, so that it changes every row."""
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(load_model(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return Aligner(model.eval(), tiny_tokenizer(), manifest)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "base", tiny_model("llama", V, seed=9), tiny_tokenizer())


@pytest.fixture(params=["full", "lora"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def make(kind: str, base: Path, seed: int = 1, manifest: Manifest = SAID) -> Aligner:
    return full(seed, manifest) if kind == "full" else lora(base, seed, manifest)


def logits(aligner: Aligner) -> torch.Tensor:
    with torch.no_grad():
        return aligner.model(torch.arange(1, 21)[None]).logits


def names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def contents(folder: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in folder.iterdir()}


# ---- saving and loading


def test_what_is_saved_comes_back_bit_for_bit(kind, base, tmp_path):
    saved = make(kind, base)
    saved.save_pretrained(tmp_path / "aligner")
    loaded = Aligner.from_pretrained(tmp_path / "aligner")
    assert torch.equal(logits(loaded), logits(saved))
    assert not torch.equal(logits(loaded), logits(make(kind, base, seed=2)))
    assert loaded.manifest == SAID
    assert loaded.tokenizer.get_vocab() == saved.tokenizer.get_vocab()
    assert loaded.name == str(tmp_path / "aligner")
    loaded.save_pretrained(tmp_path / "again")
    again = Aligner.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(saved))
    assert (again.manifest, names(tmp_path / "again")) == (SAID, names(tmp_path / "aligner"))


def test_the_adapter_is_part_of_what_is_decoded(base, tmp_path):
    lora(base).save_pretrained(tmp_path / "aligner")
    steered = AlignedModel.from_pretrained(tiny_model("gpt2", V), tmp_path / "aligner", tokenizer=tiny_tokenizer())
    (score,) = steered.score("hello", "there")
    with torch.no_grad():
        rows = torch.log_softmax(lora(base).model(torch.tensor([[8, 5, 12, 12, 15, *score.tokens]])).logits[0, 4:-1], -1)
    assert score.aligner == pytest.approx(rows[torch.arange(6), score.tokens].tolist(), abs=1e-4)


def test_a_folder_holds_an_ordinary_repository_and_a_manifest(kind, base, tmp_path):
    make(kind, base).save_pretrained(tmp_path)
    assert names(tmp_path) == (FULL_FILES if kind == "full" else LORA_FILES)
    assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == {
        "format_version": 1,
        "vocabulary": FINGERPRINT,
        "proposal": {"id": "someone/large-model", "revision": "abc"},
        "rule": "kl_gate(tau=0.3)",
        "weight": 0.5,
        "proposal_temperature": 0.7,
        "proposal_top_p": 0.95,
        "aligner_temperature": 1.3,
        "objective": "likelihood",
    }


def front_matter(folder: Path) -> dict[str, Any]:
    start, header, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert start == ""
    return yaml.safe_load(header)


@pytest.mark.parametrize(
    ("proposal", "base_model"),
    [
        ({"id": "someone/large-model", "revision": None}, "someone/large-model"),
        ({"id": "/home/me/large", "revision": None}, None),
        (None, None),
    ],
)
def test_the_model_card_says_what_hub_and_reader_need(proposal, base_model, tmp_path):
    full(manifest=dataclasses.replace(SAID, proposal=proposal)).save_pretrained(tmp_path)
    header = front_matter(tmp_path)
    assert header["library_name"] == "trimtab"
    assert "residual-alignment-model" in header["tags"]
    assert header.get("base_model") == base_model
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    for said in ("`kl_gate(tau=0.3)`, 0.5", "0.7, 0.95", "1.3", "likelihood", "arxiv.org/abs/2505.19700"):
        assert said in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
    assert repr((proposal or {"id": "PROPOSAL"})["id"]) in code


def test_a_plain_transformers_folder_is_an_aligner(base):
    loaded = Aligner.from_pretrained(base)
    assert loaded.manifest is None
    model = AlignedModel.from_pretrained(tiny_model("llama", V), base, tokenizer=tiny_tokenizer())
    same = AlignedModel.from_pretrained(tiny_model("llama", V), load_model(base), tokenizer=tiny_tokenizer())
    params = SamplingParams(seed=0, n=3, max_tokens=10)
    assert model.generate("ab", params) == same.generate("ab", params)


def test_a_plain_adapter_folder_is_an_aligner_with_its_bases_tokenizer(base, tmp_path):
    adapter = lora(base)
    adapter.model.save_pretrained(tmp_path)
    loaded = Aligner.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(adapter))
    assert loaded.manifest is None
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


def test_dtype_is_the_saved_one_or_what_is_asked_for(tmp_path):
    aligner = full()
    aligner.model.to(torch.bfloat16)
    aligner.save_pretrained(tmp_path)
    assert Aligner.from_pretrained(tmp_path).model.dtype == torch.bfloat16
    assert Aligner.from_pretrained(tmp_path, dtype="float32").model.dtype == torch.float32
    model = AlignedModel.from_pretrained(tiny_model("llama", V), tmp_path, tokenizer=tiny_tokenizer(), dtype="float16")
    assert model.aligners[0].model.dtype == torch.float16
    assert model.proposal.model.dtype == torch.float32, "a loaded object is used as it is"


# ---- what is refused


@pytest.mark.parametrize("name", ["adapter_model.bin", "nothing"])
def test_an_adapter_without_safetensors_is_refused_and_not_unpickled(name, base, tmp_path):
    lora(base).save_pretrained(tmp_path / "aligner")
    (tmp_path / "aligner" / "adapter_model.safetensors").unlink()
    (tmp_path / "aligner" / name).write_bytes(pickle.dumps(Trap(tmp_path / "unpickled")))
    pickled = name == "adapter_model.bin"
    with pytest.raises(CheckpointError, match="holds no adapter_model.safetensors" + r" \(.*is pickled and not" * pickled):
        Aligner.from_pretrained(tmp_path / "aligner")
    assert not (tmp_path / "unpickled").exists()


def test_a_pickled_adapter_beside_a_sound_one_is_not_opened(base, tmp_path):
    lora(base).save_pretrained(tmp_path / "aligner")
    (tmp_path / "aligner" / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "unpickled")))
    assert torch.equal(logits(Aligner.from_pretrained(tmp_path / "aligner")), logits(lora(base)))
    assert not (tmp_path / "unpickled").exists()


def adapter_folder(base: Path, folder: Path) -> Path:
    lora(base).save_pretrained(folder)
    return folder


def test_an_adapter_with_a_tensor_missing_is_refused(base, tmp_path):
    weights = adapter_folder(base, tmp_path) / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    del tensors[max(tensors)]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fill the adapter"):
        Aligner.from_pretrained(tmp_path)


def test_an_adapter_that_is_not_finite_is_refused(base, tmp_path):
    weights = adapter_folder(base, tmp_path) / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    tensors[max(tensors)][0, 0] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"contains NaN or infinite weights in .*lora"):
        Aligner.from_pretrained(tmp_path)


def test_a_truncated_adapter_is_refused(base, tmp_path):
    weights = adapter_folder(base, tmp_path) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Aligner.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "names no base model"), ("/nowhere/base", "'/nowhere/base' does not exist")]
)
def test_an_adapter_without_its_base_is_refused(value, message, base, tmp_path):
    config = adapter_folder(base, tmp_path) / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": value}))
    with pytest.raises(ModelError, match=message):
        Aligner.from_pretrained(tmp_path)


def test_a_broken_adapter_configuration_is_refused(base, tmp_path):
    (adapter_folder(base, tmp_path) / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=str(tmp_path)):
        Aligner.from_pretrained(tmp_path)


# ---- the manifest


BAD_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"temperature": 0.5}, "unknown key 'temperature'; known are vocabulary, proposal, rule"),
    ({"Rule": "product"}, "unknown key 'Rule'"),
    ({"format_version": 2}, "format_version is 2, but this Trimtab reads 1"),
    ({"format_version": "1"}, "format_version is '1'"),
    ({"format_version": None}, "format_version is None"),
    ({"rule": "no_such_rule"}, "there is no rule 'no_such_rule'"),
    ({"rule": "kl_gate(tau=-1)"}, "tau must be at least 0"),
    ({"rule": None}, "trimtab.json"),
    ({"rule": ["product"]}, "trimtab.json"),
    ({"weight": "1.0"}, "weight must be a finite number, not '1.0'"),
    ({"weight": [1.0]}, "weight must be a finite number"),
    ({"weight": True}, "weight must be a finite number, not True"),
    ({"weight": float("nan")}, "weight must be a finite number, not nan"),
    ({"proposal_temperature": 0}, "proposal_temperature must be above 0, not 0"),
    ({"proposal_temperature": None}, "proposal_temperature must be a finite number"),
    ({"proposal_top_p": 0.0}, "proposal_top_p must be above 0"),
    ({"proposal_top_p": 1.1}, "proposal_top_p must be above 0 and at most 1, not 1.1"),
    ({"aligner_temperature": -1.0}, "aligner_temperature must be above 0"),
    ({"aligner_temperature": float("inf")}, "aligner_temperature must be a finite number"),
    ({"objective": "a b"}, "objective must be the name of one, not 'a b'"),
    ({"objective": ["sft"]}, "objective must be the name of one, not"),
    ({"vocabulary": "md5:1234"}, "vocabulary must be a fingerprint"),
    ({"vocabulary": 5}, "vocabulary must be a fingerprint"),
    ({"proposal": "someone/large-model"}, "proposal must be"),
    ({"proposal": {"id": 5}}, "proposal must be"),
    ({"proposal": {"name": "x"}}, "proposal must be"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aligner") / "saved"
    full().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("values", "message"), BAD_VALUES, ids=lambda x: str(x)[:40])
def test_a_bad_manifest_is_refused_by_file_and_key(values, message, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "aligner"))
    (folder / MANIFEST_NAME).write_text(json.dumps(SAID.to_dict() | values))
    with pytest.raises(ManifestError, match=message) as error:
        Aligner.from_pretrained(folder)
    assert str(error.value).startswith(f"{folder / MANIFEST_NAME}: ")


@pytest.mark.parametrize("key", ["vocabulary", "format_version"])
def test_a_manifest_without_a_needed_key_is_refused(key, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "aligner"))
    values = SAID.to_dict()
    del values[key]
    (folder / MANIFEST_NAME).write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=f"key '{key}' is missing"):
        Aligner.from_pretrained(folder)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not JSON"), ("[]", "one JSON object"), ("", "not JSON"), ("null", "one")]
)
def test_a_manifest_that_is_none_is_refused(content, message, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "aligner"))
    (folder / MANIFEST_NAME).write_text(content)
    with pytest.raises(ManifestError, match=message):
        Aligner.from_pretrained(folder)


def test_keys_with_a_default_may_be_left_out():
    written = {"format_version": 1, "vocabulary": FINGERPRINT}
    assert Manifest.from_dict(written, "here") == Manifest(vocabulary=FINGERPRINT)
    assert Manifest.from_dict(SAID.to_dict(), "here") == SAID


def test_a_manifest_of_another_vocabulary_is_refused(saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "aligner"))
    tiny_tokenizer("bacdefghijklmnopqrstuvwxyz ").save_pretrained(folder)
    with pytest.raises(VocabularyMismatch, match=rf"{MANIFEST_NAME}: the tokenizer beside it has another vocabulary"):
        Aligner.from_pretrained(folder)


def with_manifest(**values: Any) -> Aligner:
    return full(manifest=Manifest(vocabulary=FINGERPRINT, **values))


def pair(aligner: Any, **settings: Any) -> AlignedModel:
    """Token by token, so that equal settings give equal numbers to the last digit."""
    fixed = {"num_speculative_tokens": 0, "tokenizer": tiny_tokenizer()}
    return AlignedModel.from_pretrained(tiny_model("gpt2", V), aligner, **fixed, **settings)


PARAMS = SamplingParams(seed=0, n=8, max_tokens=10, logprobs=True)


@pytest.mark.parametrize(
    "values",
    [
        {"rule": "nucleus"},
        {"rule": "geometric", "weight": 0.2},
        {"weight": 0.3},
        {"proposal_temperature": 0.5},
        {"proposal_top_p": 0.6},
        {"aligner_temperature": 2.0},
        {"rule": "kl_gate(tau=0.4)", "proposal_top_p": 0.9, "aligner_temperature": 0.8},
    ],
    ids=str,
)
def test_the_manifest_gives_the_defaults_and_options_override_it(values):
    """Said by the manifest, by the model or by the request: the same numbers."""
    plain = pair(full(manifest=Manifest(vocabulary=FINGERPRINT)))
    by_manifest = pair(with_manifest(**values)).generate("ab", PARAMS)
    assert by_manifest == pair(full(manifest=Manifest(vocabulary=FINGERPRINT)), **values).generate("ab", PARAMS)
    assert by_manifest == plain.generate("ab", dataclasses.replace(PARAMS, **values))
    assert by_manifest != plain.generate("ab", PARAMS)
    neutral = {"rule": "product", "weight": 1.0, "proposal_temperature": 1.0, "proposal_top_p": 1.0, "aligner_temperature": 1.0}
    assert pair(with_manifest(**values), **neutral).generate("ab", PARAMS) == plain.generate("ab", PARAMS)


def test_the_weight_of_a_manifest_belongs_to_its_rule():
    """Under another rule its number means something else, so that rule's default counts: ½ for one aligner's `geometric`."""
    model = pair(with_manifest(rule="product", weight=0.1))
    asked = model.generate("ab", dataclasses.replace(PARAMS, rule="geometric"))
    assert asked == model.generate("ab", dataclasses.replace(PARAMS, rule="geometric", weight=0.5))
    assert asked != model.generate("ab", dataclasses.replace(PARAMS, rule="geometric", weight=0.1))


def test_each_of_several_aligners_brings_its_own_weight_and_temperature():
    first, second = with_manifest(weight=0.3, aligner_temperature=0.5), with_manifest(weight=-0.2, aligner_temperature=2.0)
    second.model = tiny_model("llama", V, seed=2)
    model = pair([first, second])
    (score,) = model.score("ab", "cde")
    rows = []
    for one in (tiny_model("gpt2", V), first.model, second.model):
        with torch.no_grad():
            rows.append(torch.log_softmax(one(torch.tensor([[1, 2, *score.tokens]])).logits[0, 1:-1], -1))
    warm = [torch.log_softmax(rows[1] / 0.5, -1), torch.log_softmax(rows[2] / 2.0, -1)]
    target = torch.log_softmax(rows[0] + 0.3 * warm[0] - 0.2 * warm[1], -1)
    assert score.aligned == pytest.approx(target[torch.arange(4), score.tokens].tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"rule": "nucleus"}, {"rule": "geometric"}),
        ({"proposal_temperature": 0.5}, {"proposal_temperature": 0.7}),
        ({"proposal_top_p": 0.9}, {"proposal_top_p": 0.8}),
    ],
)
def test_manifests_that_disagree_need_a_word(one, other):
    (name,) = one
    aligners = [with_manifest(**one), with_manifest(**other)]
    with pytest.raises(InvalidOption, match=f"manifests disagree on {name}: .*; say which with {name}="):
        pair(aligners)
    assert len(pair(aligners, **one).generate("ab", PARAMS)) == 8


# ---- saving is atomic


def test_a_failure_in_the_middle_of_a_save_leaves_the_earlier_aligner_whole(kind, base, tmp_path, monkeypatch):
    folder = tmp_path / "aligner"
    make(kind, base, seed=1).save_pretrained(folder)
    before = contents(folder)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(aligner_module, "write_json", fail)
    for other in ("full", "lora"):
        with pytest.raises(OSError, match="No space left"):
            make(other, base, seed=2).save_pretrained(folder)
        with pytest.raises(OSError, match="No space left"):
            make(other, base, seed=2).save_pretrained(tmp_path / "new")
    assert contents(folder) == before
    assert names(tmp_path) == {"aligner"}, "neither a half-written aligner nor the pieces of one"
    assert torch.equal(logits(Aligner.from_pretrained(folder)), logits(make(kind, base, seed=1)))


@pytest.mark.parametrize(("first", "second"), [("full", "lora"), ("lora", "full"), ("full", "full"), ("lora", "lora")])
def test_a_new_aligner_replaces_the_old_one_and_leaves_what_is_yours(first, second, base, tmp_path):
    make(first, base, seed=1).save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures").mkdir()
    make(second, base, seed=2, manifest=Manifest(vocabulary=FINGERPRINT)).save_pretrained(tmp_path)
    assert names(tmp_path) == (FULL_FILES if second == "full" else LORA_FILES) | {"notes.txt", "figures"}
    loaded = Aligner.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(make(second, base, seed=2)))
    assert loaded.manifest == Manifest(vocabulary=FINGERPRINT)


def test_the_files_of_a_model_in_several_parts_are_replaced_too(tmp_path):
    tiny_model("llama", V).save_pretrained(tmp_path, max_shard_size="10KB")
    full(seed=2).save_pretrained(tmp_path)
    assert names(tmp_path) == FULL_FILES
    assert torch.equal(logits(Aligner.from_pretrained(tmp_path)), logits(full(seed=2)))


def test_an_adapter_does_not_replace_its_own_base(tmp_path):
    """The weights under it would be gone for ever."""
    base = save_tiny(tmp_path / "base", tiny_model("llama", V, seed=9), tiny_tokenizer())
    with pytest.raises(TrimtabError, match="base"):
        lora(base).save_pretrained(base)
    load_model(base)


def test_tokenizer_of_an_earlier_kind_does_not_survive(saved, tmp_path):
    """Saved over a folder with a chat template of its own: the new tokenizer has none."""
    folder = Path(shutil.copytree(saved, tmp_path / "aligner"))
    templated = full()
    templated.tokenizer = tiny_tokenizer(chat_template="{{ messages[0].content }}")
    templated.save_pretrained(folder)
    assert Aligner.from_pretrained(folder).tokenizer.chat_template == "{{ messages[0].content }}"
    full().save_pretrained(folder)
    assert Aligner.from_pretrained(folder).tokenizer.chat_template is None


# ---- the hub


def test_push_to_hub_uploads_the_folder(kind, base, monkeypatch):
    calls: list[tuple[str, dict[str, Any]]] = []

    class Hub:
        def create_repo(self, repo_id: str, **asked: Any) -> None:
            calls.append(("create_repo", {"repo_id": repo_id, **asked}))

        def upload_folder(self, *, folder_path: str, **asked: Any) -> str:
            calls.append(("upload_folder", asked))
            assert names(Path(folder_path)) == (FULL_FILES if kind == "full" else LORA_FILES)
            assert torch.equal(logits(Aligner.from_pretrained(folder_path)), logits(make(kind, base)))
            self.folder = folder_path
            folders.append(Path(folder_path))
            return f"https://huggingface.co/{asked['repo_id']}"

    folders: list[Path] = []
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert make(kind, base).push_to_hub("me/aligner", private=True, revision="v2") == "https://huggingface.co/me/aligner"
    assert calls == [
        ("create_repo", {"repo_id": "me/aligner", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "me/aligner", "revision": "v2"}),
    ]
    assert not folders[0].exists(), "nothing stays behind"


# ---- vocabularies


def padded(kind: str, seed: int, columns: int) -> Any:
    """`tiny_model(kind, V, seed=seed)` with further rows in its embeddings, whose logits would win every time."""
    small, wide = tiny_model(kind, V, seed=seed), tiny_model(kind, columns, seed=seed, tie_word_embeddings=False)
    with torch.no_grad():
        ours = dict(wide.named_parameters())
        for name, parameter in small.named_parameters():
            ours[name][: len(parameter)] = parameter
        wide.get_output_embeddings().weight[:V] = small.get_output_embeddings().weight
        wide.get_output_embeddings().weight[V:] *= 20
    return wide


def test_padded_embeddings_of_different_size_are_one_vocabulary():
    """40 and 48 columns over 28 tokens: the padding is never generated, and the law is that of the models without it."""
    tokenizer = tiny_tokenizer()
    wide = AlignedModel.from_pretrained(padded("llama", 0, 40), padded("llama", 1, 48), tokenizer=tokenizer)
    plain = AlignedModel.from_pretrained(tiny_model("llama", V), tiny_model("llama", V, seed=1), tokenizer=tokenizer)
    assert wide.proposal.vocab_size == wide.aligners[0].vocab_size == V
    with torch.no_grad():
        best = padded("llama", 0, 40)(torch.arange(1, 21)[None]).logits.argmax(-1)
    assert int((best >= V).sum()) > 10, "without the mask the padding would come out"
    params = SamplingParams(seed=0, n=20, max_tokens=20, ignore_eos=True, logprobs=True)
    for rule in ("product", "geometric", "nucleus"):
        asked = dataclasses.replace(params, rule=rule)
        for one, other in zip(wide.generate("hello", asked), plain.generate("hello", asked), strict=True):
            assert one.tokens == other.tokens
            for column in ("proposal", "aligner", "aligned"):
                assert getattr(one.logprobs, column) == pytest.approx(getattr(other.logprobs, column), abs=5e-5)
    assert wide.generate([[V - 1]], params)
    with pytest.raises(ValueError, match="ids from 0 to 27, not 28"):
        wide.generate([[V]], params)


def test_padded_aligners_survive_their_folder(tmp_path):
    Aligner(padded("llama", 1, 48), tiny_tokenizer(), Manifest(vocabulary=FINGERPRINT)).save_pretrained(tmp_path)
    model = AlignedModel.from_pretrained(padded("llama", 0, 40), tmp_path, tokenizer=tiny_tokenizer())
    same = pair(full(manifest=Manifest(vocabulary=FINGERPRINT)))
    assert model.score("ab", "cd")[0].aligner == pytest.approx(same.score("ab", "cd")[0].aligner, abs=5e-5)


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("bacdefghijklmnopqrstuvwxyz ", r"token 'a' is id 2 in the aligner .* and 1 in the proposal"),
        (
            "abcdefghijklmnopqrstuvwxyz",
            r"token ' ' is id missing in the aligner \(27 tokens\) and 27 in the proposal \(28 tokens\)",
        ),
        ("abcdefghijklmnopqrstuvwxyz .", r"token '\.' is id 28 in the aligner \(29 tokens\) and missing in the proposal"),
    ],
    ids=["swapped", "fewer", "more"],
)
def test_a_vocabulary_mismatch_names_a_token(letters, message, tmp_path):
    tokenizer = tiny_tokenizer(letters)
    other = Aligner(tiny_model("llama", 29), tokenizer, Manifest(vocabulary=fingerprint_vocabulary(tokenizer)))
    other.save_pretrained(tmp_path / "other")
    for aligner in (other, tmp_path / "other", [full(), tmp_path / "other"]):
        with pytest.raises(VocabularyMismatch, match=message):
            pair(aligner)
    with pytest.raises(VocabularyMismatch, match=str(tmp_path / "other")):
        pair(tmp_path / "other")


def test_loaded_models_of_different_width_need_a_tokenizer():
    with pytest.raises(VocabularyMismatch, match="aligner 0 has 48 tokens, the proposal 40"):
        AlignedModel.from_pretrained(padded("llama", 0, 40), padded("llama", 1, 48))


def test_the_fingerprint_is_of_tokens_and_ids_alone(tmp_path):
    """Not of special-token roles, templates or files, which models of one family change."""
    assert fingerprint_vocabulary(tiny_tokenizer(chat_template="x", padding_side="left")) == FINGERPRINT
    tiny_tokenizer().save_pretrained(tmp_path)
    assert fingerprint_vocabulary(type(tiny_tokenizer()).from_pretrained(tmp_path)) == FINGERPRINT
    more = tiny_tokenizer()
    more.add_tokens(["<extra>"])
    assert fingerprint_vocabulary(more) != FINGERPRINT


# ---- ends of a sequence


def test_every_end_that_proposal_or_tokenizer_names_counts(tmp_path):
    model = tiny_model("llama", V)
    model.generation_config.eos_token_id = [5, EOS, 7]
    assert AlignedModel.from_pretrained(model, tokenizer=tiny_tokenizer()).eos_token_ids == (EOS, 5, 7)
    assert AlignedModel.from_pretrained(model).eos_token_ids == (5, EOS, 7)
    assert AlignedModel.from_pretrained(model, tokenizer=tiny_tokenizer(), eos_token_ids=[3]).eos_token_ids == (3,)
    assert AlignedModel.from_pretrained(model, tokenizer=tiny_tokenizer(), eos_token_ids=[]).eos_token_ids == ()
    save_tiny(tmp_path, model, tiny_tokenizer())
    assert AlignedModel.from_pretrained(tmp_path).eos_token_ids == (EOS, 5, 7)
