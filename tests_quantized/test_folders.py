"""Folders that the libraries themselves quantised and saved: run as they are, by the contract of every model."""

import pytest
import test_contract as contract
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import compressed
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import row_from_logits
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
KINDS = {
    "torchao, int8 weights": (lambda: TorchAoConfig(Int8WeightOnlyConfig()), 5e-5),
    "torchao, int8 weights and rows": (lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()), 0.1),
    "bitsandbytes, 4 bits": (
        lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
        5e-5,
    ),
    "bitsandbytes, 8 bits": (lambda: BitsAndBytesConfig(load_in_8bit=True), 0.1),
    "compressed-tensors, int8 weights": ("W8A16", 5e-5),
    "compressed-tensors, int8 weights and rows": ("W8A8", 0.1),
    "compressed-tensors, 4 bits": ("W4A16", 5e-5),
    "compressed-tensors, FP8": ("FP8_DYNAMIC", 0.1),
}
"""How each is made, by transformers' configuration or by a preset's name, and by how much its rows may differ: where rows are
rounded as well, what they are read with matters."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    plain = save_tiny(root / "plain", tiny_model("llama", contract.V, spread=0.2, **SIZES), tiny_tokenizer())
    for name, (config, _) in KINDS.items():
        if isinstance(config, str):
            compressed.save(plain, root / name, config)
            tiny_tokenizer().save_pretrained(root / name)
            continue
        model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config(), device_map={"": "cpu"})
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    return root


@pytest.fixture(params=KINDS)
def case(request, folders):
    return HuggingFaceLM(load_model(folders / request.param), owned=True), KINDS[request.param][1]


globals().update({test.__name__: test for test in contract.ALL})


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_near_what_was_quantised_runs_as_its_stock_module_and_takes_no_int8(kind, folders):
    model, plain = HuggingFaceLM(load_model(folders / kind), owned=True), load_model(folders / "plain")
    assert model.kernels == "stock modules"
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        expected = row_from_logits(plain(ids).logits, contract.V)
    found = model.extend(model.new_state(1, 12), ids, [12])
    assert 1e-6 < float((expected.exp() * (expected - found)).sum(-1).mean()) < 0.3
    with pytest.raises(InvalidOption, match="this 'llama' model is run by its stock modules"):
        AlignedModel.from_pretrained(folders / kind, quantize="int8")


@pytest.mark.parametrize("kind", [kind for kind, (_, most) in KINDS.items() if most < 1e-3])
def test_drafts_change_no_token_where_weights_alone_are_rounded(kind, folders):
    model = AlignedModel.from_pretrained(folders / kind, folders / "plain", max_num_seqs=3)
    prompts, params = [[1, 2, 3], [4], [5, 6]], SamplingParams(max_tokens=20, seed=3, ignore_eos=True)
    expected = [one.tokens for one in model.with_draft_length(0).generate(prompts, params)]
    assert [one.tokens for one in model.with_draft_length(3).generate(prompts, params)] == expected


def test_models_that_were_lent_are_told_apart_by_what_their_weights_stand_for(folders):
    kind = next(iter(KINDS))
    one, same, other = (load_model(folders / kind) for _ in range(3))
    weight = other.model.layers[0].mlp.down_proj.weight
    weight.qdata[0, 0] += 1
    assert HuggingFaceLM(one).fingerprint == HuggingFaceLM(same).fingerprint != HuggingFaceLM(other).fingerprint
