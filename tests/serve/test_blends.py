"""`aligner: {"med": 0.7, "law": 0.3}` with `blend: "weights"` over HTTP, in mixed traffic."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving import Server, folder_service, running
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.decode.assemble import Loader
from trimtab.serve.registry import Registry

V = 28
RANKS = {"med": 2, "law": 4, "wit": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proposal, LoRA aligners of `base`, one of another base, and a whole model."""
    folder, tokenizer = tmp_path_factory.mktemp("blends"), tiny_tokenizer()
    save_tiny(folder / "proposal", tiny_model("llama", V, seed=0, spread=0.3), tokenizer)
    for i, name in enumerate(("base", "other")):
        save_tiny(folder / name, tiny_model("qwen3", V, seed=9 + i, spread=0.3), tokenizer)
    for i, (name, rank) in enumerate(RANKS.items()):
        save_lora(folder / name, folder / "base", seed=i, r=rank, target_modules="all-linear")
        tokenizer.save_pretrained(folder / name)
    save_lora(folder / "foreign", folder / "other", target_modules=["q_proj"])
    save_tiny(folder / "whole", tiny_model("llama", V, seed=1, spread=0.3, num_hidden_layers=1), tokenizer)
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Any:
    names = [*RANKS, "foreign", "whole"]
    with running(folder_service(root / "proposal", {name: root / name for name in names})) as found:
        yield found


def ask(server: Server, aligner: Any, seed: int, **how: Any) -> str:
    body = {"model": "base", "prompt": "the quick", "max_tokens": 10, "ignore_eos": True, "seed": seed, "aligner": aligner}
    return server.complete(**body, **how)["choices"][0]["text"]


def test_blends_in_mixed_traffic_are_what_they_are_in_python(server, root):
    model = AlignedModel.from_pretrained(root / "proposal", [root / name for name in RANKS])
    draws = [{"med": 0.7, "law": 0.3, "wit": 0.1}, {"med": 0.0, "law": 1.0, "wit": 0.0}, {"med": -0.5, "law": 1.5, "wit": 0.2}]

    def both(i: int) -> tuple[str, str]:
        weights = draws[i % 3]
        how = {"blend": "weights", "rule": ("product", "geometric")[i % 2], "rule_weight": 0.8} if i % 4 else {}
        params = SamplingParams(max_tokens=10, ignore_eos=True, seed=i, weight=list(weights.values()), **how)
        return ask(server, weights, i, **how), model.generate(["the quick"], params)[0].text

    with ThreadPoolExecutor(8) as pool:
        for over_http, in_python in pool.map(both, range(16)):
            assert over_http == in_python


def test_an_object_is_a_list_with_its_weights(server):
    for how in ({}, {"blend": "weights"}, {"blend": "logits"}):
        as_object = ask(server, {"med": 0.7, "law": 0.3}, 1, **how)
        assert as_object == ask(server, ["med", "law"], 1, weight=[0.7, 0.3], **how)
    assert ask(server, {"med": 1.0}, 2, blend="weights") == ask(server, "med", 2)
    assert ask(server, "med", 3, blend="weights", weight=0.5) == ask(server, {"med": 0.5}, 3, blend="weights")


def test_echo_scores_the_blended_aligner(server, root):
    body = {"model": "base", "prompt": "the quick", "max_tokens": 0, "echo": True, "logprobs": 1}
    how = {"rule": "geometric", "blend": "weights"}
    found = server.complete(**body, aligner={"med": 0.7, "law": -0.3}, **how)["choices"][0]["logprobs"]["token_logprobs"]
    model = AlignedModel.from_pretrained(root / "proposal", [root / "med", root / "law"])
    ids = model.tokenizer("the quick")["input_ids"]
    score = model.score([ids[:1]], [ids[1:]], SamplingParams(weight=[0.7, -0.3], **how))[0]
    assert found[1:] == pytest.approx(score.aligned, abs=1e-4)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"aligner": ["med", "law"], "blend": "weights"}, "blend: weight is missing: give one number for each aligner"),
        ({"aligner": ["med", "law"], "blend": "weights", "weight": [1.0]}, "weight has 1 numbers, but there are 2 aligners"),
        ({"aligner": {"med": 0.5, "law": 0.5}, "weight": [1.0, 1.0]}, "weight: aligner says the weights already"),
        (
            {"aligner": {"med": 0.5, "foreign": 0.5}, "blend": "weights"},
            "blend: aligners[0] and aligners[1] are adapters of",
        ),
        ({"aligner": {"med": 0.5, "whole": 0.5}, "blend": "weights"}, "blend: aligners[1] is no LoRA adapter on a base"),
        ({"blend": "weights"}, "blend: there is no aligner whose weights could be blended"),
        ({"aligner": {"med": 0.5}, "rule_weight": 0.5}, "rule_weight is the strength of aligners that blend='weights'"),
        ({"aligner": {"med": 0.5}, "blend": "sum"}, "blend must be 'logits' or 'weights', not 'sum'"),
        ({"aligner": {"med": "much"}, "blend": "weights"}, "aligner"),
        ({"aligner": {}, "blend": "weights"}, "aligner must be the name of an aligner, a list of names, or an object"),
        ({"aligner": {"med": 2e6}, "blend": "weights"}, "aligner"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_the_field(body, message, server):
    answer = server.post("/v1/completions", model="base", prompt="x", max_tokens=2, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert error["param"] in body


def test_an_aligner_of_an_object_that_is_not_there_is_a_404(server):
    body = {"model": "base", "prompt": "x", "aligner": {"med": 0.5, "nobody": 0.5}, "blend": "weights"}
    answer = server.post("/v1/completions", **body)
    assert answer.status_code == 404
    assert "nobody" in answer.json()["error"]["message"]


def test_an_unloaded_aligner_is_gone_with_the_blends_that_it_was_in(root):
    base = AlignedModel.from_pretrained(root / "proposal")
    registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
    for name in ("med", "law"):
        registry.load(name, str(root / name))
    model = registry.resident(["med", "law"])
    model.generate(
        ["the quick brown fox jumps over it"], SamplingParams(max_tokens=3, seed=0, blend="weights", weight=[0.5, 0.5])
    )
    adapter = weakref.ref(model.aligners[0].adapter)
    del model
    gc.collect()
    assert adapter() is not None
    registry.unload("med")
    gc.collect()
    assert adapter() is None, "neither prefixes nor blends that are remembered keep it"
