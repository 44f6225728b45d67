"""Packed weights: the plain product, decided without a clock, and a weight that cannot be packed stays as it is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.models import prepack
from trimtab.models.huggingface import HuggingFaceLM, describe_kernels
from trimtab.models.prepack import Linear, packed_dtypes
from trimtab.models.table import TableLM

V = 28
IDS = torch.tensor([[5, 9, 1, 27, 2, 2, 17]])


def rows(model: HuggingFaceLM) -> torch.Tensor:
    return model.extend(model.new_state(1, 9), IDS, [IDS.shape[1]])


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, packed, bias)


@pytest.fixture
def able(monkeypatch) -> pytest.MonkeyPatch:
    """A machine that packs every weight, whatever this one can."""
    monkeypatch.setattr(prepack, "PACKED_FROM", 0)
    monkeypatch.setattr(prepack, "pack_weight", torch.clone)
    monkeypatch.setattr(prepack, "multiply_packed", multiply)
    return monkeypatch


def no_such_instructions(*_: Any) -> torch.Tensor:
    raise RuntimeError("bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq")


def no_such_operator(*_: Any) -> torch.Tensor:
    raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")


ERRORS = [
    *(RuntimeError("x"), AttributeError("x"), ValueError("x"), TypeError("x"), OSError("x"), MemoryError("x")),
    *(NotImplementedError("x"), IndexError("x"), torch.OutOfMemoryError("x")),
]


def off(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply(x, packed, bias) * 1.05


def wide_only(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return multiply(x, packed, bias) if len(x) < 64 else no_such_instructions()


UNABLE = {
    "lacks instructions": ("pack_weight", no_such_instructions),
    "lacks the operator": ("pack_weight", no_such_operator),
    "cannot multiply": ("multiply_packed", no_such_instructions),
    "cannot multiply many rows": ("multiply_packed", wide_only),
    "is wrong": ("multiply_packed", off),
    "forgets the bias": ("multiply_packed", lambda x, packed, bias: multiply(x, packed, None)),
    "is not a number": ("multiply_packed", lambda x, packed, bias: multiply(x, packed, bias) * torch.nan),
    "is of another dtype": ("multiply_packed", lambda x, packed, bias: multiply(x, packed, bias).double()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 5, 48), (7, 48), (1, 40, 48)])
def test_a_product_is_the_linear_one_whatever_this_machine_packs(dtype, bias, shape, monkeypatch):
    monkeypatch.setattr(prepack, "PACKED_FROM", 0)
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(48, 72, bias=bias, dtype=dtype)
    for parameter in module.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    x = torch.randn(shape, generator=generator).to(dtype)
    expected = module(x).detach()
    linear = Linear.of(module)
    assert torch.equal(linear(x), expected)
    packed = prepack.prepack([linear], shared=torch.empty(0))
    assert packed == (linear.weight is None) == (module.weight.numel() == 0)
    assert_close(linear(x), expected, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", UNABLE.values(), ids=UNABLE)
def test_a_weight_that_cannot_be_packed_stays_as_it_is(dtype, fault, able):
    able.setattr(prepack, *fault)
    model = tiny_model("qwen2", V, spread=0.1).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.5)
    expected = rows(HuggingFaceLM(model))
    ours = HuggingFaceLM(model, owned=True)
    biased = len(model.model.layers)
    packed = 0 if fault[1] is not UNABLE["forgets the bias"][1] else 4 * 2 + 1 - biased
    assert ours.kernels == f"lean pass, {packed} of 9 weights packed"
    assert_close(rows(ours), expected, atol=0 if not packed else 1e-5, rtol=0)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_of_a_later_weight_costs_nothing_but_speed_and_is_said(error, able, caplog):
    """The first weight of a shape is tried and packed; the second one finds no memory, say."""
    calls = []

    def pack(weight: torch.Tensor) -> torch.Tensor:
        calls.append(len(calls))
        if len(calls) == 3:
            raise error
        return weight.clone()

    able.setattr(prepack, "pack_weight", pack)
    linears = [Linear.of(nn.Linear(8, 8)) for _ in range(3)]
    plain = linears[1].weight
    assert prepack.prepack(linears, shared=torch.empty(0)) == 2
    assert linears[0].weight is None
    assert linears[1].weight is plain
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("a weight of shape [8, 8] is not packed, though this machine packs such ones: ")


@pytest.mark.parametrize("operator", ["pack_weight", "multiply_packed"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_packer_raises_leaves_weights_plain(error, operator, able):
    def fail(*_: Any) -> torch.Tensor:
        raise error

    able.setattr(prepack, operator, fail)
    assert prepack.prepack([Linear.of(nn.Linear(8, 8))], shared=torch.empty(0)) == 0
    assert packed_dtypes() == []


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 17, 64])
def test_a_product_that_fails_at_some_number_of_rows_is_not_used(count, able):
    def multiply_others(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return no_such_instructions() if len(x) == count else multiply(x, packed, bias)

    able.setattr(prepack, "multiply_packed", multiply_others)
    assert prepack.prepack([Linear.of(nn.Linear(8, 8))], shared=torch.empty(0)) == 0


def test_the_decision_does_not_go_by_the_values_of_a_weight(able):
    """A product that is right for a loaded weight of zeros, and wrong for others of its shape, is not used; and the reverse."""
    able.setattr(prepack, "multiply_packed", off)
    zeros = nn.Linear(8, 8)
    zeros.weight.data.zero_()
    zeros.bias.data.zero_()
    assert prepack.prepack([Linear.of(zeros)], shared=torch.empty(0)) == 0
    able.setattr(prepack, "multiply_packed", multiply)
    zeros.weight.data.fill_(torch.nan)
    assert prepack.prepack([Linear.of(zeros)], shared=torch.empty(0)) == 1


def test_large_weights_of_two_dtypes_are_packed_and_others_are_not(able):
    able.setattr(prepack, "PACKED_FROM", 8 * 8)
    assert prepack.prepack([Linear.of(nn.Linear(8, 7)), Linear.of(nn.Linear(8, 8))], shared=torch.empty(0)) == 1
    for dtype, packed in [(torch.float64, 0), (torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 1)]:
        assert prepack.prepack([Linear.of(nn.Linear(8, 8, dtype=dtype))], shared=torch.empty(0)) == packed


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_loaded_here_is_packed_and_decodes_the_same(tied, tmp_path, able):
    from transformers import AutoModelForCausalLM

    folders = [
        save_tiny(
            tmp_path / str(seed), tiny_model("llama", V, seed=seed, spread=0.3, tie_word_embeddings=tied), tiny_tokenizer()
        )
        for seed in range(2)
    ]
    packed = AlignedModel.from_pretrained(*folders)
    assert all(linear.weight is None for linear in packed.proposal._lean.linears)
    assert packed.proposal.model.model.layers[0].mlp.down_proj.weight.numel() == 0
    assert packed.proposal.model.get_input_embeddings().weight.numel() == 28 * 32
    lent = AlignedModel.from_pretrained(
        *(AutoModelForCausalLM.from_pretrained(folder) for folder in folders), tokenizer=packed.tokenizer
    )
    params = SamplingParams(max_tokens=20, seed=0, n=3)
    assert [c.tokens for c in packed.generate("abc", params)] == [c.tokens for c in lent.generate("abc", params)]
    assert packed.fingerprints == AlignedModel.from_pretrained(*folders).fingerprints
    assert len(set(packed.fingerprints)) == 2
    assert [describe_kernels(model.proposal) for model in (packed, lent)] == [
        "lean pass, 9 of 9 weights packed",
        "lean pass, 0 of 9 weights packed",
    ]


def test_results_say_what_computes():
    assert describe_kernels(HuggingFaceLM(tiny_model("gpt2", V))) == "stock modules"
    assert describe_kernels(TableLM.random(V, order=1, seed=0)) is None


# ---- the same decision in every process


def clockless(*_: Any) -> float:
    raise AssertionError("a decision that changes bits must not read a clock")


def test_no_clock_is_read(monkeypatch):
    monkeypatch.setattr(prepack, "PACKED_FROM", 0)
    for clock in ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "time", "time_ns"):
        monkeypatch.setattr(time, clock, clockless)
    models = [HuggingFaceLM(tiny_model("llama", V, seed=seed), owned=True) for seed in range(2)]
    monkeypatch.undo()
    assert models[0].kernels == models[1].kernels


PROGRAM = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.prepack import packed_dtypes
torch.set_num_threads(1)
config = LlamaConfig(vocab_size=1100, hidden_size=1024, intermediate_size=1024, num_hidden_layers=1, num_attention_heads=8)
found = {"can": packed_dtypes()}
for dtype in ("float32", "bfloat16"):
    torch.manual_seed(0)
    model = HuggingFaceLM(LlamaForCausalLM(config).to(getattr(torch, dtype)), owned=True)
    row = model.extend(model.new_state(1, 4), torch.tensor([[3, 4, 5, 6]]), [4])
    found[dtype] = [model.kernels, row.double().sum().item()]
print(json.dumps(found))
"""


def in_a_process(**environment: str) -> dict[str, Any]:
    paths = os.pathsep.join(filter(None, [str(Path(prepack.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    variables = {**os.environ, "PYTHONPATH": paths, **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=variables, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return in_a_process()


def test_every_process_decides_alike_and_gets_the_same_bits(here):
    assert in_a_process() == here
    assert here["can"] == packed_dtypes()
    for dtype in ("float32", "bfloat16"):
        assert here[dtype][0] == f"lean pass, {5 if dtype in here['can'] else 0} of 5 weights packed"


def test_a_machine_with_avx2_alone_decodes_in_bfloat16(here):
    """oneDNN can be told to take a machine for a lesser one: it packs no bfloat16 there, and nothing else is asked of it."""
    lesser = in_a_process(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    assert set(lesser["can"]) <= set(here["can"])
    assert lesser["bfloat16"][1] == pytest.approx(here["bfloat16"][1], rel=1e-2)
    assert lesser["float32"][1] == pytest.approx(here["float32"][1], rel=1e-5)


def test_env_says_what_is_packed(capsys, able):
    able.setattr(prepack, "PACKED_FROM", 2**20)
    assert main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packing"] == {"dtypes": ["float32", "bfloat16"], "from_numbers": 2**20}
    assert main(["env"]) == 0
    assert "float32 and bfloat16 weights of 1,048,576 numbers and more" in capsys.readouterr().out
    able.setattr(prepack, "pack_weight", no_such_instructions)
    assert main(["env"]) == 0
    assert "none: the CPU cannot" in capsys.readouterr().out
