"""Shapes of well-known models: their parameters as published, and where a configuration is looked for."""

import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.errors import ModelError
from trimtab.models.shapes import SHAPES, find_config, make_config
from trimtab.models.supported import check_supported

PUBLISHED = {
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
}
"""What the hub's pages of these models count."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters(name):
    config = make_config(name)
    check_supported(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert SHAPES[name].tokens <= config.vocab_size


def test_a_folder_is_read_and_a_known_id_is_not_asked_for(tmp_path):
    save_tiny(tmp_path / "model", tiny_model("qwen2", 28), tiny_tokenizer())
    found = find_config(str(tmp_path / "model"), expected="Qwen/Qwen2.5-3B")
    assert (found.config.hidden_size, found.origin) == (32, "folder")
    started = time.monotonic()
    found = find_config("Qwen/Qwen2.5-3B")
    assert (found.config.hidden_size, found.origin) == (2048, "shapes.py")
    assert time.monotonic() - started < 2


def test_a_folder_of_a_later_command_takes_the_expected_shape():
    found = find_config("runs/none/warm-up", expected="Qwen/Qwen2.5-3B")
    assert (found.source, found.origin) == ("Qwen/Qwen2.5-3B", "shapes.py")
    with pytest.raises(ModelError, match="does not exist; if an earlier command"):
        find_config("runs/none/warm-up")
