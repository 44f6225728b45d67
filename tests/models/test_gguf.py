"""GGUF files: written here as llama.cpp's converter writes them, and read back as the models that they were."""

import json

import gguf
import pytest
import torch
from peft import PeftModel

from gguf_files import write
from kinds import EOS, TEMPLATE, byte_level
from tiny import save_tiny, tiny_model
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.core.logprobs import row_from_logits
from trimtab.errors import CheckpointError, ModelError, UnsupportedModel
from trimtab.models.gguf import unpack_gguf
from trimtab.models.loading import load_model, load_tokenizer
from trimtab.train.options import TrainOptions
from trimtab.train.run import run_training as train

KINDS = ("llama", "qwen2", "qwen3")
GEMMA = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""llama.cpp's names, and transformers'."""
TEXTS = ["The capital of France is Paris.", "  def read(path):\n\n\treturn 1234 ", "naïve café in 北京 🙂", "don't I'LL"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def make(kind, tokenizer, **settings):
    return tiny_model(kind, len(tokenizer), seed=1, eos_token_id=EOS, bos_token_id=1, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_file_is_the_model_that_it_was(kind, tied, tokenizer, tmp_path):
    model = make(kind, tokenizer, tie_word_embeddings=tied)
    path = write(tmp_path / "model.gguf", kind, model, tokenizer)
    read = load_model(path)
    assert read.config.model_type == kind
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-6)
    found = load_tokenizer(path)
    for text in TEXTS:
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert found.decode(found(text)["input_ids"], skip_special_tokens=True) == text
    assert found.chat_template == TEMPLATE
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


def gemma(kind, tokenizer, **settings):
    """Seven layers, so that each kind of them is there; with norms that are not zero, and caps that tell."""
    if kind != "gemma":
        every = {"gemma2": 2, "gemma3": 6}[kind]
        types = ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(7)]
        settings |= {"layer_types": types, "final_logit_softcapping": 3.0}
    if kind == "gemma2":
        settings["attn_logit_softcapping"] = 2.0
    model = make(GEMMA[kind], tokenizer, num_hidden_layers=7, tie_word_embeddings=True, **settings)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight"):
                weight.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.mark.parametrize("kind", GEMMA)
def test_so_is_a_gemma(kind, tokenizer, tmp_path):
    model = gemma(kind, tokenizer)
    read = load_model(write(tmp_path / "model.gguf", kind, model, tokenizer))
    assert read.config.model_type == GEMMA[kind]
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-5)
    assert read.config.to_dict().get("layer_types") == model.config.to_dict().get("layer_types")


def test_a_gemma_in_16_bits_is_computed_in_32(tokenizer, tmp_path):
    """What is added up along its layers exceeds the largest float of 16 bits."""
    half = gguf.GGMLQuantizationType.F16
    path = write(tmp_path / "model.gguf", "gemma3", gemma("gemma3", tokenizer), tokenizer, quantized=half)
    assert load_model(path).dtype == torch.float32


@pytest.mark.parametrize(("kind", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemmas_scale_queries_in_their_own_way(kind, layers, tokenizer, tmp_path):
    sizes = {"num_hidden_layers": layers, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 8}
    small = make(GEMMA[kind], tokenizer, num_key_value_heads=1, **sizes)
    read = load_model(write(tmp_path / "model.gguf", kind, small, tokenizer))
    assert read.config.query_pre_attn_scalar == 4


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_quantised_weights_are_what_the_file_says(kind, tokenizer, tmp_path):
    """Q8_0 has blocks of 32 numbers with a scale each: at most 1/254 of a block's largest number is lost."""
    model = make("llama", tokenizer, hidden_size=64, intermediate_size=64, head_dim=16)
    path = write(tmp_path / "model.gguf", "llama", model, tokenizer, quantized=gguf.GGMLQuantizationType[kind])
    read = load_model(path).state_dict()
    for name, weight in model.state_dict().items():
        error = (read[name].float() - weight).abs().max()
        assert error <= weight.abs().max() / (250 if kind == "Q8_0" else 2000)
        assert read[name].dtype == (torch.float16 if kind == "F16" else torch.float32)


def test_a_file_is_a_proposal_and_an_aligner_everywhere(tokenizer, tmp_path):
    models = [make("llama", tokenizer), make("qwen2", tokenizer, num_hidden_layers=1)]
    paths = [write(tmp_path / f"{i}.gguf", kind, m, tokenizer) for i, (kind, m) in enumerate(zip(KINDS, models, strict=False))]
    folders = [save_tiny(tmp_path / f"folder{i}", model, tokenizer) for i, model in enumerate(models)]
    params = SamplingParams(max_tokens=12, seed=0)
    from_files, from_folders = (AlignedModel.from_pretrained(*pair, eos_token_ids=[EOS]) for pair in (paths, folders))
    prompts = ["The capital", [{"role": "user", "content": "what is it?"}]]
    assert from_files.generate(prompts, params) == from_folders.generate(prompts, params)
    aligner = Aligner.from_pretrained(paths[1])
    aligner.save_pretrained(tmp_path / "saved")
    rows = [row_from_logits(m(torch.arange(5)[None]).logits, len(tokenizer)) for m in (aligner.model, models[1])]
    assert torch.allclose(*rows, atol=1e-5)


def test_the_head_of_a_file_is_an_adapter_that_peft_loads(tokenizer, tmp_path):
    """It names the folder that the file was converted to as its base."""
    path = write(tmp_path / "model.gguf", "llama", make("llama", tokenizer), tokenizer)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} is", "completion": " a number."}) + "\n" for i in range(8)))
    training = {"max_steps": 1, "learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings = {"head_layers": 1, "keep_samples": 0, "dev_samples": 0, "training": training}
    train(TrainOptions(proposal=str(path), dataset=str(data), output_dir=str(tmp_path / "head"), **settings))
    base = json.loads((tmp_path / "head" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(unpack_gguf(path))
    ids = tokenizer("The capital")["input_ids"]
    with torch.no_grad():
        logits = PeftModel.from_pretrained(load_model(base), str(tmp_path / "head"))(torch.tensor([ids])).logits
    wanted = torch.log_softmax(logits[0, -2], -1)[ids[-1]]
    model = AlignedModel.from_pretrained(path, tmp_path / "head", weight=1.0)
    assert model.score([ids[:-1]], [ids[-1:]])[0].aligned == pytest.approx([float(wanted)], abs=1e-4)


def test_it_is_converted_once_and_anew_when_it_changes(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", "llama", make("llama", tokenizer), tokenizer)
    folder = unpack_gguf(path)
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.models.gguf._convert", None)
        assert unpack_gguf(path) == folder
    write(path, "llama", tiny_model("llama", len(tokenizer), seed=2, eos_token_id=EOS, bos_token_id=1), tokenizer)
    assert unpack_gguf(path) != folder
    assert not list(folder.parent.glob(".*")), "nothing half-done is left"


def test_llama_31s_frequencies_are_found_again(tokenizer, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    model = make("llama", tokenizer, rope_parameters=rope, max_position_embeddings=64)
    plain = make("llama", tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = (plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).numpy()
    read = load_model(write(tmp_path / "a.gguf", "llama", model, tokenizer, more=[("rope_freqs.weight", factors)]))
    assert read.config.rope_parameters["factor"] == 32.0
    assert torch.allclose(read.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    with pytest.raises(UnsupportedModel, match="scales positions in a way that is not"):
        load_model(write(tmp_path / "b.gguf", "llama", model, tokenizer, more=[("rope_freqs.weight", factors * 2)]))


def test_what_cannot_be_read_is_refused_by_name(tokenizer, tmp_path):
    model = make("llama", tokenizer)

    def refused(error, match, name="model.gguf", kind="llama", **how):
        path = write(tmp_path / name, kind, model, tokenizer, **how)
        with pytest.raises(error, match=match):
            load_model(path)

    refused(UnsupportedModel, "'stablelm' model; of GGUF files, gemma, .* can be read", kind="stablelm")
    refused(UnsupportedModel, "cuts texts by the rule 'falcon', which is not known here", pre="falcon")
    refused(UnsupportedModel, "mixture of experts", expert_count=8)
    refused(CheckpointError, r"lacks the tensor 'blk\.1\.ffn_up\.weight'", without=("model.layers.1.mlp.up_proj.weight",))
    refused(
        UnsupportedModel, "has tensors that a 'llama' model does not, such as 'extra'", more=[("extra", torch.ones(3).numpy())]
    )
    (tmp_path / "no.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ModelError, match="is no GGUF file that can be read"):
        load_model(tmp_path / "no.gguf")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "none.gguf")
