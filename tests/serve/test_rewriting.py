"""A server's rewriter: who asks gets the rewritten text and what it was before; whoever cannot have it is told."""

import pytest

from serving import folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.noise import seed_after
from trimtab.data.rewrite_template import RewriteTemplate
from trimtab.rewriting.options import RewriterOptions, Rewriting
from trimtab.rewriting.rewriter import Rewriter
from trimtab.serve.rewriting import RewriteDesk
from trimtab.serve.service import Opened

TEMPLATE = RewriteTemplate("{prompt}m{answer}n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewriting")
    for seed, name in enumerate(("proposal", "rewriter")):
        model = tiny_model("llama", 28, seed=seed, spread=0.5, max_position_embeddings=256)
        save_tiny(folder / name, model, tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    return folder


def open_rewriter(folder):
    return Rewriter(AlignedModel.from_pretrained(folder / "rewriter"), TEMPLATE, rounds=2)


@pytest.fixture(scope="module")
def server(folder):
    service = folder_service(folder / "proposal", {})
    load = service._load

    def with_rewriter():
        opened = load()
        return Opened(*opened[:2], RewriteDesk(Rewriting(open_rewriter(folder), RewriterOptions(rewriter="R"))))

    service._load = with_rewriter
    with running(service) as server:
        yield server


def test_texts_are_those_that_the_rewriter_makes_of_the_answers(server, folder):
    asked = {"model": "base", "prompt": ["abc", "de"], "max_tokens": 6, "seed": 3, "n": 2}
    plain = [choice["text"] for choice in server.complete(**asked)["choices"]]
    found = server.complete(**asked, rewrite=True)["choices"]
    rewriter = open_rewriter(folder)
    for i, (text, choice) in enumerate(zip(plain, found, strict=True)):
        seed = seed_after(3, i % 2)
        prompt = asked["prompt"][i // 2]
        [wanted] = rewriter.rewrite([prompt], [text], SamplingParams(max_tokens=6, temperature=0.0, seed=seed))
        assert choice["text"] == wanted.text
        assert choice["rewritten_from"] == list(wanted.before)
        assert choice["finish_reason"] == wanted.completion.finish_reason


def test_token_ids_are_told_in_words(server):
    """As the base's tokenizer writes them: the same rewriting as for the text."""
    ids = tiny_tokenizer()("abc", add_special_tokens=False)["input_ids"]
    asked = {"model": "base", "max_tokens": 6, "seed": 3, "rewrite": True}
    by_text, by_ids = (server.complete(**asked, prompt=prompt)["choices"] for prompt in ("abc", ids))
    assert by_text == by_ids


def test_chats_are_rewritten_too(server):
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "seed": 1}
    plain = server.post("/v1/chat/completions", **body).json()["choices"][0]
    found = server.post("/v1/chat/completions", **body, rewrite=True).json()["choices"][0]
    assert found["rewritten_from"][0] == plain["message"]["content"]
    assert "rewritten_from" not in plain


@pytest.mark.parametrize("other", [{"stream": True}, {"logprobs": 1}, {"echo": True}, {"return_token_ids": True}])
def test_what_is_of_tokens_contradicts_it(server, other):
    answer = server.post("/v1/completions", model="base", prompt="a", rewrite=True, **other)
    assert answer.status_code == 400
    assert f"and {next(iter(other))} is not: leave out one of the two" in answer.json()["error"]["message"]


def test_a_server_without_one_says_so(folder):
    with running(folder_service(folder / "proposal", {})) as server:
        answer = server.post("/v1/completions", model="base", prompt="a", rewrite=True)
        assert answer.status_code == 404
        assert "start it with --rewriter MODEL" in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] == "rewrite"
        assert server.complete(model="base", prompt="a", rewrite=False, max_tokens=1)["choices"]
