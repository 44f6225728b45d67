"""Rows from vLLM's `prompt_logprobs` are those of the model itself, and a run trains on them without the proposal's weights."""

import json
import math
from pathlib import Path

import pytest
import torch

from scripted import Reply, scoring, scripted
from tiny import tiny_model
from tiny_task import V, make_examples, make_task, task_options
from trimtab.endpoints.settings import Limits
from trimtab.errors import CacheMismatch, EndpointError, InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.train import cache as cache_module
from trimtab.train.cache import ProposalCache
from trimtab.train.endpoint_rows import EndpointRows, _best
from trimtab.train.options import TrainOptions
from trimtab.train.plan import resolve
from trimtab.train.rows import Layout, ModelRows, compress
from trimtab.train.run import run_training as train

QUICK = Limits(concurrency=3, request_timeout=20, max_retries=2, backoff=0.02)
MODELS = [{"id": "other"}, {"id": "served", "root": "org/P"}]


def build(folder: Path, source, examples, top_k, temperature=1.0):
    return ProposalCache.build(
        folder, source, "sha256:v", examples, layout=Layout.of(top_k, 0, source.vocab_size), temperature=temperature
    )


def remote(url, vocab_size=V):
    return EndpointRows([url], QUICK, "org/P", vocab_size)


@pytest.mark.parametrize(("top_k", "spread"), [(1, 0.15), (4, 0.15), (4, 0.3), (V - 1, 0.15), (V, 0.3), (0, 0.3)])
def test_the_cache_is_the_one_that_the_model_gives(top_k, spread, tmp_path, monkeypatch):
    """Every entry within 1e-5, in float32; the tail's mass within 1e-6, which in a sum of rounded numbers is all there is."""
    monkeypatch.setattr(cache_module, "SHARD", 5)
    model, examples = tiny_model("llama", V, spread=spread), make_examples(12)
    here = build(tmp_path / "here", ModelRows(HuggingFaceLM(model), "sha256:p"), examples, top_k)
    with scripted(scoring(model), models=MODELS) as server:
        there = build(tmp_path / "there", remote(server.url), examples, top_k)
        assert len(server.asked) == 12
        assert server.most_in_flight <= 3
        assert {(body["model"], body["prompt_logprobs"]) for body in server.posts()} == {
            ("served", top_k if 0 < top_k < V else -1)
        }
    for i in range(12):
        ours, theirs = there[i], here[i]
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.token, theirs.token)
        torch.testing.assert_close(ours.logp, theirs.logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.token_logp, theirs.token_logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.tail.exp(), theirs.tail.exp(), rtol=0, atol=1e-6)
        large = theirs.tail.exp() > 0.05
        torch.testing.assert_close(ours.tail[large], theirs.tail[large], rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.rebuild(V).exp(), theirs.rebuild(V).exp(), rtol=0, atol=1e-6)
        assert ours.logp.dtype == theirs.logp.dtype
    if top_k in (0, V):
        assert there.facts["kl_per_token"] == there.facts["kl_worst_token"] == 0
    else:
        assert there.facts["kl_per_token"] is there.facts["kl_worst_token"] is None
    assert there.facts["tokens"] == here.facts["tokens"]


def test_a_temperature_is_applied_to_whole_rows(tmp_path):
    model, examples = tiny_model("llama", V, spread=0.3), make_examples(4)
    here = build(tmp_path / "here", ModelRows(HuggingFaceLM(model), "sha256:p"), examples, 0, temperature=0.6)
    with scripted(scoring(model), models=MODELS) as server:
        there = build(tmp_path / "there", remote(server.url), examples, 0, temperature=0.6)
        with pytest.raises(InvalidOption, match=r"proposal_temperature 1, unless every entry is kept \(cache_top_k 0\)"):
            build(tmp_path / "top", remote(server.url), examples, 4, temperature=0.6)
        assert len(server.asked) == 4
    for i in range(4):
        torch.testing.assert_close(there[i].rebuild(V), here[i].rebuild(V), rtol=0, atol=3e-5)


def test_nothing_can_be_drawn_from_a_tail_that_is_not_known(tmp_path):
    with scripted(scoring(tiny_model("llama", V)), models=MODELS) as server:
        with pytest.raises(InvalidOption, match="does not say what is in the tail"):
            ProposalCache.build(tmp_path / "cache", remote(server.url), "sha256:v", make_examples(2), layout=Layout(4, 3))
        assert not server.asked


def test_columns_beyond_the_tokenizer_are_left_out(tmp_path):
    """A padded model: of whole rows the padding is cut, as it is here; among the best it is an error."""
    model, examples = tiny_model("llama", V + 4, spread=0.3), make_examples(6)
    here = build(tmp_path / "here", ModelRows(HuggingFaceLM(model, V), "sha256:p"), examples, 0)
    with scripted(scoring(model), models=MODELS) as server:
        there = build(tmp_path / "there", remote(server.url), examples, 0)
        with pytest.raises(EndpointError, match=r"finds token (28|29|30|31) likely, .* --cache_top_k 0"):
            build(tmp_path / "best", remote(server.url), examples, V - 1)
    for i in range(6):
        torch.testing.assert_close(there[i].rebuild(V), here[i].rebuild(V), rtol=0, atol=1e-5)


def test_the_tail_is_what_is_left_of_one():
    """Mass .5 and .25 are listed; .25 is left. Where all is listed, nothing is. −9999 is vLLM's −inf."""
    logs = [math.log(0.5), math.log(0.25)]
    found = _best(4, 2, torch.tensor([1, 3]), [{0: logs[0], 1: logs[1]}, {3: math.log(0.125), 0: logs[0], 1: logs[1]}])
    assert found.ids.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(found.tail.exp(), torch.tensor([0.25, 0.125]))
    torch.testing.assert_close(found.token_logp.exp(), torch.tensor([0.25, 0.125]))
    whole = _best(3, 2, torch.tensor([2]), [{2: math.log(0.25), 0: logs[0], 1: logs[1]}])
    assert whole.tail.tolist() == [-math.inf]
    sure = _best(4, 2, torch.tensor([2]), [{2: -9999.0, 0: 0.0, 1: -9999.0}])
    expected = compress(torch.tensor([[1.0, 0, 0, 0]]).log(), torch.tensor([2]), 1)
    assert sure.tail.tolist() == expected.tail.tolist() == [-math.inf]
    assert sure.logp.tolist() == [[0.0, -math.inf]]
    torch.testing.assert_close(sure.rebuild(4), torch.tensor([[1.0, 0, 0, 0]]).log())


def test_a_tail_too_small_to_see_is_neither_lost_nor_made_up():
    """Listed mass that rounds to 1 leaves at most float32's last digit, and no token more than the last of the best has."""
    seen = _best(1000, 2, torch.tensor([0]), [{0: 0.0, 1: math.log(1e-4)}]).tail
    assert -math.inf < seen.item() <= math.log(2**-23) + 1e-3
    bounded = _best(1000, 2, torch.tensor([0]), [{0: 0.0, 1: math.log(1e-12)}]).tail
    assert bounded.item() == pytest.approx(math.log(998e-12), abs=1e-3)


def test_among_equals_the_tokens_own_entry_is_not_one_of_the_best():
    same = math.log(0.25)
    found = _best(8, 2, torch.tensor([5]), [{5: same, 1: same, 2: same}])
    assert found.ids.tolist() == [[1, 2]]
    torch.testing.assert_close(found.rebuild(8).exp().sum(-1), torch.ones(1))


# ---- what a server may say instead


def test_more_entries_than_the_server_gives_is_its_own_error_and_ours(tmp_path):
    with scripted(scoring(tiny_model("llama", V), most=3), models=MODELS) as server:
        said = r"answered 400: Requested prompt logprobs of 4, .* max allowed: 3 \(--cache_top_k asks for 4; .*--max-logprobs"
        with pytest.raises(EndpointError, match=said):
            build(tmp_path / "cache", remote(server.url), make_examples(1), 4)
        assert len(server.asked) == 1


@pytest.mark.parametrize("message", ["This model's maximum context length is 8 tokens", "max_tokens must be at least 1, got 0"])
def test_a_prompt_that_is_too_long_for_the_server_names_our_option(message, tmp_path):
    refusal = Reply({"error": {"message": message}}, status=400)
    with (
        scripted(lambda asked, number: refusal, models=MODELS) as server,
        pytest.raises(EndpointError, match=rf"{message} \(--max_length must be below"),
    ):
        build(tmp_path / "cache", remote(server.url), make_examples(1), 4)


def test_a_server_without_prompt_logprobs_is_no_vllm(tmp_path):
    with (
        scripted(lambda asked, number: Reply({"choices": [{"text": "x"}]}), models=MODELS) as server,
        pytest.raises(EndpointError, match="answers without prompt_logprobs: it must be vLLM"),
    ):
        build(tmp_path / "cache", remote(server.url), make_examples(1), 4)
    assert len(server.asked) == 1


@pytest.mark.parametrize("flaw", ["short", "missing", "nan", "few", "null"])
def test_an_answer_that_lacks_something_is_asked_for_again(flaw, tmp_path):
    model, (example,) = tiny_model("llama", V), make_examples(1)
    sound = scoring(model)

    def respond(asked, number):
        reply = sound(asked, number)
        if number:
            return reply
        entries = reply.body["choices"][0]["prompt_logprobs"]
        last, token = entries[-1], str(example.chosen[-1])
        if flaw == "short":
            entries.pop()
        elif flaw == "missing":
            del last[token]
        elif flaw == "nan":
            last[token]["logprob"] = math.nan
        elif flaw == "few":
            entries[-1] = {token: last[token]}
        else:
            last[token]["logprob"] = None
        return reply

    with scripted(respond, models=MODELS) as server:
        there = build(tmp_path / "there", remote(server.url), [example], 4)
        assert len(server.asked) == 2
    here = build(tmp_path / "here", ModelRows(HuggingFaceLM(model), "sha256:p"), [example], 4)
    torch.testing.assert_close(there[0].logp, here[0].logp, rtol=0, atol=1e-5)


# ---- resuming


def test_a_cache_is_resumed_with_the_same_model_and_opened_without_any(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "SHARD", 3)
    model, examples = tiny_model("llama", V), make_examples(9)
    dying = lambda asked, number: Reply({"error": "gone"}, status=400) if number == 5 else scoring(model)(asked, 0)  # noqa: E731
    with scripted(dying, models=MODELS) as server, pytest.raises(EndpointError, match="gone"):
        build(tmp_path / "cache", remote(server.url), examples, 4)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["cache.json", "shard-00000.safetensors"]
    with (
        scripted(scoring(model), models=[{"id": "another"}]) as server,
        pytest.raises(CacheMismatch, match=r"begun for another proposal \(served, now another\)"),
    ):
        build(tmp_path / "cache", remote(server.url), examples, 4)
    with scripted(scoring(model), models=MODELS) as server:
        resumed = build(tmp_path / "cache", remote(server.url), examples, 4)
        assert len(server.asked) == 6
    again = build(tmp_path / "cache", remote("http://127.0.0.1:9"), examples, 4)
    assert again.facts == resumed.facts
    with pytest.raises(CacheMismatch, match="made for another proposal"):
        build(tmp_path / "cache", ModelRows(HuggingFaceLM(model), "sha256:p"), examples, 4)


# ---- the whole way


def test_a_run_trains_on_an_endpoints_rows_without_the_proposals_weights(tmp_path):
    """The run's figures are those of a run with the model here, within what float32 rows differ by."""
    folder = make_task(tmp_path)
    model = load_model(folder / "proposal", dtype=torch.float32)
    local = train(task_options(folder, "here"))
    (folder / "proposal" / "model.safetensors").unlink()
    with scripted(scoring(model), models=[{"id": str(folder / "proposal")}]) as server:
        said = {"proposal_endpoint": (server.url,), "concurrency": 4, "max_retries": 2}
        report = train(task_options(folder, "there", **said))
        assert (
            len(server.asked) == 2 * 48 + 12
        )  # both answers of every example for the cache, and the development part for the start
        short = train(task_options(folder, "short", {"max_steps": 2}, cache_top_k=5, **said))
        (folder / "short" / "trimtab.json").unlink()
    resumed = train(task_options(folder, "short", {"max_steps": 2}, cache_top_k=5, proposal_endpoint=("http://127.0.0.1:9",)))
    for name, value in local["metrics"].items():
        assert report["metrics"][name] == pytest.approx(value, abs=2e-3), name
    assert report["cache"]["kl_per_token"] == 0
    assert short["cache"]["kl_per_token"] is resumed["cache"]["kl_per_token"] is None
    assert json.loads((folder / "short" / "training.json").read_text())["cache"]["kl_worst_token"] is None
    assert json.loads((folder / "there" / "trimtab.json").read_text())["proposal"]["id"] == str(folder / "proposal")
    assert json.loads((folder / "there" / "run.json").read_text())["proposal_weights"] == f"endpoint:{folder / 'proposal'}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal_temperature": 0.5}, "another proposal_temperature needs every entry, --cache_top_k 0"),
        ({"device": "cpu"}, "--device is for a model that runs here, not for --proposal_endpoint"),
        ({"dtype": "float32"}, "--dtype is for a model that runs here"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"proposal_endpoint": ("vllm:8000",)}, "'vllm:8000' is no endpoint"),
        ({"proposal_endpoint": (), "max_retries": 3}, "--max_retries needs --proposal_endpoint"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(settings, message):
    said = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o", "proposal_endpoint": ("http://a",)}
    with pytest.raises(InvalidOption, match=message):
        resolve(TrainOptions(**said | settings))


def test_whole_rows_may_have_a_temperature():
    said = {"proposal": "p", "aligner": "a", "dataset": "d", "output_dir": "o", "proposal_endpoint": ("http://a",)}
    assert resolve(TrainOptions(**said, proposal_temperature=0.5, cache_top_k=0)).asked.limits == Limits()
