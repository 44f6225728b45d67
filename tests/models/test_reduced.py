"""A drafter that says few tokens: its rows are the whole model's, restricted; its folder fits one proposal, and says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.errors import CheckpointError, ManifestError, TrimtabError, UnsupportedModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.layers import pick_layers
from trimtab.models.loading import load_model
from trimtab.models.reduced import ReducedLM, is_reduced, load_reduced, reduce_model, save_reduced
from trimtab.models.table import TableLM

V = 28
SAID = torch.tensor([0, 2, 3, 5, 8, 13, 21, 27])


@pytest.fixture
def folder(tmp_path):
    """A `proposal` of three layers, and its drafter in `draft`."""
    save_tiny(tmp_path / "proposal", tiny_model("llama", V, num_hidden_layers=3), tiny_tokenizer())
    model = load_model(tmp_path / "proposal")
    small = reduce_model(model, [0, 2], SAID)
    save_reduced(small, SAID, HuggingFaceLM(model).digest, tiny_tokenizer(), tmp_path / "draft")
    return tmp_path


def rows(model, ids):
    return model.extend(model.new_state(1, ids.shape[1]), ids, [ids.shape[1]])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_its_rows_are_the_whole_models_restricted_and_renormalised(kind, tied):
    model = tiny_model(kind, V, num_hidden_layers=3, tie_word_embeddings=tied)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    whole = rows(HuggingFaceLM(pick_layers(model, [0, 2])), ids)
    found = rows(ReducedLM(reduce_model(model, [0, 2], SAID), SAID, V), ids)
    assert_close(found[..., SAID], whole[..., SAID].log_softmax(-1), atol=1e-5, rtol=0)
    others = torch.ones(V, dtype=torch.bool).index_fill(0, SAID, False)
    assert bool((found[..., others] == -torch.inf).all())


def test_a_folder_brings_back_the_same_rows_without_an_embedding(folder):
    stored = load_file(folder / "draft" / "model.safetensors")
    assert stored["draft_token_ids"].tolist() == SAID.tolist()
    assert stored["lm_head.weight"].shape == (len(SAID), 32)
    assert not [name for name in stored if "embed" in name]
    model = load_model(folder / "proposal")
    proposal = HuggingFaceLM(model)
    draft = load_reduced(folder / "draft", proposal, "draft")
    assert draft.model.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert draft.num_bytes == 4 * sum(weight.numel() for weight in stored.values() if weight.is_floating_point())
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    assert_close(rows(draft, ids), rows(ReducedLM(reduce_model(model, [0, 2], SAID), SAID, V), ids), atol=1e-5, rtol=0)
    assert draft.fingerprint == load_reduced(folder / "draft", proposal, "another name").fingerprint
    assert rows(proposal, ids).isfinite().all()


def test_it_follows_the_proposals_dtype(folder):
    model = load_model(folder / "proposal", dtype="bfloat16")
    draft = load_reduced(folder / "draft", HuggingFaceLM(model), "draft")
    assert draft.model.lm_head.weight.dtype == torch.bfloat16


def test_it_drafts_for_its_proposal_and_changes_no_text(folder):
    params = SamplingParams(seed=1, max_tokens=16, temperature=0)
    model = AlignedModel.from_pretrained(folder / "proposal", draft=str(folder / "draft"), num_speculative_tokens=3)
    alone = AlignedModel.from_pretrained(folder / "proposal")
    assert model.generate(["abc", "de"], params) == alone.generate(["abc", "de"], params)
    assert model.pace.tally.drafted


def test_it_fits_no_other_proposal(folder):
    other = save_tiny(folder / "other", tiny_model("llama", V, seed=7, num_hidden_layers=3), tiny_tokenizer())
    with pytest.raises(UnsupportedModel, match="drafter of another proposal"):
        AlignedModel.from_pretrained(other, draft=folder / "draft")
    with pytest.raises(UnsupportedModel, match="drafter of another proposal"):
        load_reduced(folder / "draft", TableLM.random(V, order=1, seed=0), "draft")


def test_it_is_nothing_but_a_drafter(folder):
    assert is_reduced(folder / "draft")
    with pytest.raises(UnsupportedModel, match="a head's drafter, which can draft and nothing else"):
        AlignedModel.from_pretrained(folder / "proposal", folder / "draft")
    with pytest.raises(CheckpointError, match="does not fill the model"):
        AlignedModel.from_pretrained(folder / "draft")


def broken(folder, **tensors):
    """Its weights with some changed, and those without a value left out."""
    stored = load_file(folder / "draft" / "model.safetensors") | tensors
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, folder / "draft" / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"draft_token_ids": torch.tensor([0, 2, 3, 5, 8, 13, 21, 28])}, "ids from 0 to 27, ascending"),
        ({"draft_token_ids": torch.tensor([0, 2, 3, 5, 8, 13, 27, 21])}, "ids from 0 to 27, ascending"),
        ({"draft_token_ids": SAID[:7]}, "does not fill the drafter"),
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"more": torch.ones(1)}, "more is not one of its weights"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "NaN or infinite"),
        ({"draft_token_ids": None}, "draft_token_ids"),
    ],
)
def test_broken_weights_are_refused_by_name(folder, tensors, said):
    broken(folder, **tensors)
    with pytest.raises(TrimtabError, match=said):
        AlignedModel.from_pretrained(folder / "proposal", draft=folder / "draft")


@pytest.mark.parametrize("values", [[], {"proposal": "sha256:0"}, {"proposal": "sha256:0", "format_version": 2}])
def test_a_description_that_cannot_be_is_refused(folder, values):
    (folder / "draft" / "trimtab_draft.json").write_text(json.dumps(values))
    with pytest.raises(ManifestError, match=r"draft/trimtab_draft\.json"):
        AlignedModel.from_pretrained(folder / "proposal", draft=folder / "draft")


def test_missing_weights_are_refused(folder):
    (folder / "draft" / "model.safetensors").unlink()
    with pytest.raises(TrimtabError, match="draft"):
        AlignedModel.from_pretrained(folder / "proposal", draft=folder / "draft")
    shutil.rmtree(folder / "draft")
    with pytest.raises(TrimtabError, match="does not exist"):
        AlignedModel.from_pretrained(folder / "proposal", draft=folder / "draft")
