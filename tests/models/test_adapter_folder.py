"""What lies under an adapter: the revision that it was trained on, wherever that is asked for, and paths from its folder."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner
from trimtab.decode.assemble import Loader
from trimtab.errors import CheckpointError, ModelError
from trimtab.models.adapter_folder import Base, base_of
from trimtab.models.adapters import Adapted
from trimtab.models.estimates import aligner_weights
from trimtab.models.loading import load_model
from trimtab.train.options import TrainOptions
from trimtab.train.plan import resolve
from trimtab.train.start import prepare_model
from trimtab.train.trainer import AlignerTrainer

V = 28
LETTERS = "zyxwvutsrqponmlkjihgfedcba "
"""Of the newer base's tokenizer."""


def configure(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def bases(tmp_path, monkeypatch) -> dict[str, Path]:
    """`org/base` in the hub's cache: its newest state, and the older one of revision `v1`, with another tokenizer and depth."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository, found = tmp_path / "hub" / "models--org--base", {}
    (repository / "refs").mkdir(parents=True)
    for name, commit, seed, letters in (("main", "a" * 40, 1, LETTERS), ("v1", "b" * 40, 2, LETTERS[-2::-1] + " ")):
        model = tiny_model("llama", V, seed=seed, num_hidden_layers=2 if name == "v1" else 3)
        found[name] = save_tiny(repository / "snapshots" / commit, model, tiny_tokenizer(letters))
        (repository / "refs" / name).write_text(commit)
    return found


def adapters(bases: dict[str, Path], folder: Path, **settings) -> dict[str, Path]:
    """The same adapter, said to be of `v1` and of the newest state of `org/base`."""
    found = {"v1": save_lora(folder / "of-v1", bases["v1"], r=2, **settings)}
    found["main"] = Path(shutil.copytree(found["v1"], folder / "of-main"))
    configure(found["v1"], base_model_name_or_path="org/base", revision="v1")
    configure(found["main"], base_model_name_or_path="org/base", revision=None)
    return found


def layers(model) -> int:
    return model.config.num_hidden_layers


def test_base_tokenizer_and_sizes_are_those_of_the_revision(bases, tmp_path):
    found = adapters(bases, tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 1])
    for name, depth, first in (("v1", 2, "a"), ("main", 3, "z")):
        aligner = Aligner.from_pretrained(found[name])
        assert layers(aligner.model) == depth
        assert aligner.tokenizer.convert_ids_to_tokens(1) == first
        parameters = sum(p.numel() for p in aligner.model.parameters())
        assert aligner_weights(str(found[name]), None, "auto")["parameters"] == parameters
        expected = tiny_model("llama", V, seed=2 if name == "v1" else 1, num_hidden_layers=depth).lm_head.weight
        assert torch.equal(aligner.model.get_base_model().lm_head.weight, expected)


def test_two_revisions_are_two_pools_and_one_is_one(bases, tmp_path):
    found = adapters(bases, tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 1])
    found["again"] = Path(shutil.copytree(found["v1"], tmp_path / "again"))
    for folder in found.values():
        tiny_tokenizer().save_pretrained(folder)
    loader = Loader(tiny_tokenizer(), dtype="auto", device="cpu")
    loaded = {name: loader.load(folder).model for name, folder in found.items()}
    assert all(isinstance(model, Adapted) for model in loaded.values())
    assert [layers(loaded[name].pool.model) for name in ("v1", "main")] == [2, 3]
    assert loaded["again"].pool is loaded["v1"].pool
    assert loaded["v1"].pool.files.commit == "b" * 40, "for the record of an evaluation"
    assert len({model.fingerprint for model in loaded.values()}) == 2


def test_what_is_no_plain_lora_gets_its_revision_too(bases, tmp_path):
    found = adapters(bases, tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 1], use_dora=True)
    for name, depth in (("v1", 2), ("main", 3)):
        tiny_tokenizer().save_pretrained(found[name])
        model = AlignedModel.from_pretrained(tiny_model("llama", V), found[name], tokenizer=tiny_tokenizer())
        assert layers(model.aligners[0].model) == depth


@pytest.fixture
def unasked(monkeypatch) -> None:
    """A hub that must not be asked, though nothing in the environment forbids it."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("peft.utils.other.file_exists", lambda *_, **__: pytest.fail("PEFT asked the hub"))


@pytest.mark.usefixtures("unasked")
def test_what_is_saved_again_keeps_the_revision(bases, tmp_path):
    Aligner.from_pretrained(adapters(bases, tmp_path, target_modules=["q_proj"])["v1"]).save_pretrained(tmp_path / "again")
    assert base_of(tmp_path / "again") == Base("org/base", "v1")
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.usefixtures("unasked")
def test_embeddings_are_saved_where_they_were_resized(bases, tmp_path):
    aligner = Aligner.from_pretrained(adapters(bases, tmp_path, target_modules=["q_proj"])["v1"])
    for size, saved in ((V, False), (V + 4, True)):
        aligner.model.get_base_model().resize_token_embeddings(size)
        aligner.save_pretrained(tmp_path / str(size))
        keys = load_file(tmp_path / str(size) / "adapter_model.safetensors")
        assert ("base_model.model.model.embed_tokens.weight" in keys) == saved


@pytest.mark.usefixtures("unasked")
def test_checkpoints_of_a_training_ask_nobody_either(bases, tmp_path):
    aligner = Aligner.from_pretrained(adapters(bases, tmp_path, target_modules=["q_proj"])["v1"])
    trainer = AlignerTrainer.__new__(AlignerTrainer)
    Trainer.__init__(trainer, aligner.model, TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none"))
    trainer.save_model(str(tmp_path / "checkpoint"))
    assert base_of(tmp_path / "checkpoint") == Base("org/base", "v1")


def test_an_adapter_that_is_trained_here_belongs_to_this_state_of_its_base(bases, tmp_path):
    options = TrainOptions(proposal="p", aligner="org/base", dataset="d", output_dir=str(tmp_path / "out"), use_peft=True)
    model = prepare_model(load_model("org/base"), resolve(options), seed=0)
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("org/base", "a" * 40)
    options = dataclasses.replace(options, aligner=str(save_tiny(tmp_path / "own", tiny_model("llama", V), tiny_tokenizer())))
    assert prepare_model(load_model(options.aligner), resolve(options), seed=0).peft_config["default"].revision is None


def test_a_path_leads_from_the_process_or_else_from_the_adapters_folder(tmp_path, monkeypatch):
    base = save_tiny(tmp_path / "a" / "base", tiny_model("llama", V, seed=1), tiny_tokenizer())
    folder = save_lora(tmp_path / "a" / "adapter", base, target_modules=["q_proj"])
    configure(folder, base_model_name_or_path="../base", revision="v1")
    (tmp_path / "b" / "c").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "b" / "c")
    assert base_of(folder) == Base(str(base)), "a folder has no revisions"
    Aligner.from_pretrained(folder).save_pretrained(tmp_path / "elsewhere" / "deep" / "again")
    assert base_of(tmp_path / "elsewhere" / "deep" / "again") == Base(str(base))
    other = save_tiny(tmp_path / "b" / "base", tiny_model("llama", V, seed=2), tiny_tokenizer())
    assert base_of(folder) == Base(str(other)), "as PEFT reads it"


@pytest.mark.parametrize(
    ("values", "message"), [({"revision": 3}, "revision must be"), ({"base_model_name_or_path": ["x"]}, "no base")]
)
def test_a_configuration_that_names_no_base_is_refused(values, message, tmp_path):
    base = save_tiny(tmp_path / "base", tiny_model("llama", V), tiny_tokenizer())
    folder = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    configure(folder, **values)
    with pytest.raises(CheckpointError, match=message):
        Aligner.from_pretrained(folder)


def test_a_base_in_a_home_that_nobody_has_is_named(tmp_path):
    base = save_tiny(tmp_path / "base", tiny_model("llama", V), tiny_tokenizer())
    folder = save_lora(tmp_path / "adapter", base, target_modules=["q_proj"])
    configure(folder, base_model_name_or_path="~nosuchuser/x")
    with pytest.raises(ModelError, match="'~nosuchuser/x' does not exist"):
        Aligner.from_pretrained(folder)
