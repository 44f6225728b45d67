"""What is said of `backend` before llama.cpp is asked for; what it does there is in tests_llamacpp/."""

import re

import pytest

from gguf_files import write
from kinds import byte_level
from tiny import save_tiny, tiny_model
from trimtab import AlignedModel
from trimtab.cli import main
from trimtab.errors import InvalidOption, ModelError
from trimtab.models import llamacpp
from trimtab.models.gguf import is_gguf, load_gguf_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    tokenizer = byte_level()
    return write(
        tmp_path_factory.mktemp("file") / "model.gguf", "llama", tiny_model("llama", len(tokenizer), seed=1), tokenizer
    )


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "folder", tiny_model("llama", 29), byte_level())


def test_the_tokenizer_of_a_file_is_read_without_its_weights(path, tmp_path, monkeypatch):
    monkeypatch.setattr("trimtab.models.gguf._convert", None)
    assert load_gguf_tokenizer(path).get_vocab() == byte_level().get_vocab()
    with pytest.raises(ModelError, match=r"'no\.gguf' does not exist"):
        load_gguf_tokenizer("no.gguf")
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(ModelError, match="is no GGUF file that can be read"):
        load_gguf_tokenizer(tmp_path / "text.gguf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mlx"}, "backend must be llamacpp, not 'mlx'"),
        ({"backend": "llamacpp", "dtype": "float16"}, "dtype has no effect on what llama.cpp runs"),
        ({"backend": "llamacpp", "device": "cpu"}, "device has no effect"),
        ({"backend": "llamacpp", "quantize": "int8"}, "quantize has no effect"),
        ({"backend": "llamacpp", "cuda_graphs": True}, "cuda_graphs has no effect"),
        ({"backend": "llamacpp", "aligner_dtype": "float32"}, "aligner_dtype has no effect"),
        ({"revision": "main"}, "is a file, which has none"),
    ],
    ids=str,
)
def test_options_that_cannot_be_or_do_nothing_are_refused(path, options, message):
    with pytest.raises(InvalidOption, match=re.escape(message)):
        AlignedModel.from_pretrained(path, **options)


def test_a_name_in_capitals_is_a_files_too(path):
    assert is_gguf(str(path).upper())


def test_it_wants_a_file_to_run(folder):
    with pytest.raises(InvalidOption, match="backend: llamacpp runs GGUF files, and none is named"):
        AlignedModel.from_pretrained(folder, backend="llamacpp")


def test_the_package_that_is_missing_is_named(path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    llamacpp.library.cache_clear()
    with pytest.raises(InvalidOption, match=re.escape("pip install 'trimtab[llamacpp]'")):
        AlignedModel.from_pretrained(path, backend="llamacpp")
    assert main(["generate", "--proposal", str(path), "--backend", "llamacpp", "--prompt", "a"]) == 2
    assert "pip install 'trimtab[llamacpp]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["propose", "--dataset", "d", "--out", "o", "--endpoint", "http://x/v1"], "is for a model that runs here"),
        (["propose", "--dataset", "d", "--out", "o", "--proposal", "p.gguf", "--dry_run"], "is not for --dry_run"),
        (["propose", "--dataset", "{data}", "--out", "{out}", "--proposal", "{folder}"], "runs GGUF files, and none is named"),
    ],
    ids=["endpoint", "dry run", "no file"],
)
def test_propose_says_where_it_has_no_effect(words, message, folder, tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a"}\n')
    places = {"data": tmp_path / "data.jsonl", "out": tmp_path / "out.jsonl", "folder": folder}
    assert main([word.format(**places) for word in [*words, "--backend", "llamacpp"]]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
