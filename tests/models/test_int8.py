"""Weights of 8 bits: how far they are from what they were, that products are theirs, and who may have them."""

import copy
import json

import pytest
import torch
from torch.testing import assert_close

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.int8 import FEW, Int8, can_be_int8

V = 32
SIZES = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}


def weights(rows: int = 48, columns: int = 128) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.01, 3, rows)[:, None]


def whole(kept: Int8) -> torch.Tensor:
    return kept.codes.float() * kept.scales.float()[:, None]


def test_every_number_is_within_half_a_scale_and_the_largest_is_kept():
    weight = weights()
    kept = Int8.of(weight)
    assert kept.codes.dtype == torch.int8
    assert int(kept.codes.abs().max()) <= 127
    scales = kept.scales.float()
    assert ((whole(kept) - weight).abs() <= 0.5001 * scales[:, None]).all()
    least = weight.abs().amax(1) / 127
    assert (scales >= least).all()
    assert (scales <= least * (1 + 2**-7)).all()
    assert kept.num_bytes == 48 * 128 + 2 * 48


def test_a_row_of_zeros_stays_one():
    kept = Int8.of(torch.zeros(16, 64))
    assert not whole(kept).any()
    assert not kept.multiply(torch.ones(3, 64), None).any()


@pytest.mark.parametrize("count", [1, 3, 8, FEW, FEW + 1, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_numbers_that_are_kept(count, dtype):
    kept, bias = Int8.of(weights()), torch.linspace(-1, 1, 48).to(dtype)
    x = torch.randn(count, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = x.bfloat16().double() @ whole(kept).double().T
    found = kept.multiply(x, None)
    assert found.dtype == dtype
    assert_close(found.double(), expected, atol=2e-2, rtol=2**-7)
    assert_close(kept.multiply(x, bias).double(), expected + bias.double(), atol=4e-2, rtol=2**-6)


def test_what_does_not_fit_is_said_to():
    assert can_be_int8(torch.zeros(16, 64))
    assert can_be_int8(torch.zeros(16, 64, dtype=torch.bfloat16))
    for other in (torch.zeros(16, 60), torch.zeros(15, 64), torch.zeros(16, 64).double(), torch.zeros(16, 64, device="meta")):
        assert not can_be_int8(other)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_those_of_the_stock_model_with_the_kept_numbers(tied):
    model = tiny_model("llama", V, spread=0.1, tie_word_embeddings=tied, **SIZES)
    stock, ids = copy.deepcopy(model), torch.tensor([[5, 9, 1, 30, 2, 2, 17]])
    before = HuggingFaceLM(copy.deepcopy(model), owned=True)
    ours = HuggingFaceLM(model, owned=True, quantize="int8")
    with torch.no_grad():
        for module in stock.modules():
            if isinstance(module, torch.nn.Linear) and not (tied and module is stock.lm_head):
                module.weight.copy_(whole(Int8.of(module.weight)))
        expected = torch.log_softmax(stock(ids).logits, -1)
    assert_close(ours.extend(ours.new_state(1, 7), ids, [7]), expected, atol=3e-2, rtol=0)
    assert ours.kernels == "lean pass, 0 of 9 weights packed, 9 in int8"
    assert ours.fingerprint != before.fingerprint
    linear = sum(m.weight.numel() for m in stock.modules() if isinstance(m, torch.nn.Linear))
    saved = 3 * linear if not tied else 3 * (linear - 32 * 64) - 32 * 64  # a tied embedding stays, beside its codes
    scales = 2 * sum(m.out_features for m in stock.modules() if isinstance(m, torch.nn.Linear))
    assert before.num_bytes - ours.num_bytes == saved - scales


def test_who_may_not(tmp_path):
    plain = tiny_model("llama", V, **SIZES)
    with pytest.raises(InvalidOption, match="models that are loaded here can be, and this one was lent"):
        HuggingFaceLM(plain, quantize="int8")
    with pytest.raises(InvalidOption, match="this 'gpt2' model is run by its stock modules"):
        HuggingFaceLM(tiny_model("gpt2", V), owned=True, quantize="int8")
    with pytest.raises(InvalidOption, match="none of the weights can be kept in 8 bits"):
        HuggingFaceLM(tiny_model("llama", V).double(), owned=True, quantize="int8")
    with pytest.raises(InvalidOption, match="quantize must be int8, not 'int4'"):
        HuggingFaceLM(plain, owned=True, quantize="int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("int8")
    for seed, name in enumerate(["proposal", "aligner"]):
        save_tiny(root / name, tiny_model("llama", 28 + 4, seed=seed, spread=0.1, **SIZES), tiny_tokenizer())
    save_lora(root / "lora", root / "aligner", r=4, target_modules=["q_proj", "down_proj"])
    tiny_tokenizer().save_pretrained(root / "lora")
    return root


@pytest.mark.parametrize("aligner", ["aligner", "lora"])
def test_proposal_aligner_and_adapters_are_kept_so_and_speculation_works(folders, aligner):
    model = AlignedModel.from_pretrained(folders / "proposal", folders / aligner, quantize="int8", rule="geometric", weight=0.9)
    assert all("in int8" in getattr(m, "pool", m).kernels for m in (model.proposal, *model.aligners))
    params = SamplingParams(max_tokens=40, seed=0, ignore_eos=True)
    assert len(model.generate("the fox", params)[0].tokens) == 40
    assert model.pace.tally.acceptance > 0.5
    scored, plain = (
        m.score("the fox", "jumps over", SamplingParams(weight=0.9))[0]
        for m in (model, AlignedModel.from_pretrained(folders / "proposal", folders / aligner, rule="geometric"))
    )
    assert_close(torch.tensor(scored.aligned), torch.tensor(plain.aligned), atol=0.1, rtol=0)
    assert scored.aligned != plain.aligned


def test_an_adapter_that_needs_a_model_of_its_own_is_refused_with_the_reason(folders, tmp_path):
    save_lora(tmp_path, folders / "aligner", r=4, target_modules=["q_proj"], use_dora=True)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InvalidOption, match="a 'llama' model with an adapter that cannot share its base"):
        AlignedModel.from_pretrained(folders / "proposal", tmp_path, quantize="int8")
    with pytest.raises(InvalidOption, match="quantize: none of the weights can be kept in 8 bits"):
        AlignedModel.from_pretrained(folders / "proposal", folders / "lora", quantize="int8", aligner_dtype="float16")


def test_where_nothing_is_loaded_there_is_nothing_to_keep_so():
    with pytest.raises(InvalidOption, match="quantize is for what is loaded here, and all of this was given as models"):
        AlignedModel.from_pretrained(tiny_model("llama", V, **SIZES), quantize="int8")


def test_commands_take_it(folders, capsys):
    words = ["--proposal", folders / "proposal", "--prompt", "abc", "--max_tokens", 4, "--seed", 0, "--quantize"]
    assert main(["generate", *map(str, words), "int8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    assert main(["generate", *map(str, words), "int4"]) == 2
    assert "int4" in capsys.readouterr().err
