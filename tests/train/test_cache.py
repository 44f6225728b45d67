"""The proposal's cached rows: exact or normalised, resumed after a kill, never used for another run."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_task
from tiny import tiny_model
from trimtab.core.logprobs import Warp, gather, kl_divergence, warp
from trimtab.data.examples import Example
from trimtab.decode import scoring
from trimtab.errors import CacheMismatch
from trimtab.models.fingerprint import fingerprint_model
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train import cache as cache_module
from trimtab.train import rows as rows_module
from trimtab.train.cache import ProposalCache
from trimtab.train.rows import CachedRows, Layout, ModelRows, compress, tail_points

V = 32
make_examples = partial(tiny_task.make_examples, vocab_size=V)
FIELDS = ["ids", "logp", "token", "token_logp", "tail", "samples"]


class Killed(BaseException):
    """What a kill looks like from inside."""


class Counting(HuggingFaceLM):
    """A proposal that counts its calls, and dies at one of them if told to."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(tiny_model("llama", V, seed=seed))
        self.calls, self.dies_at = 0, math.inf

    def extend(self, state: Any, tokens: Tensor, counts: Sequence[int]) -> Tensor:
        self.calls += 1
        if self.calls == self.dies_at:
            raise Killed
        return super().extend(state, tokens, counts)


def exact_rows(model: Any, example: Example, temperature: float = 1.0) -> Tensor:
    """Rows `[T, V]` from the stock model, without slots, batches or caches."""
    ids = torch.tensor([example.prompt + example.chosen])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def build(folder: Path, proposal: HuggingFaceLM, examples: list[Example], **changes: Any) -> ProposalCache:
    settings: dict[str, Any] = {
        "fingerprint": "sha256:p",
        "vocabulary": "sha256:v",
        "top_k": 4,
        "samples": 0,
        "ends": (),
    } | changes
    source = ModelRows(proposal, settings.pop("fingerprint"), settings.pop("ends"))
    settings["layout"] = Layout.of(settings.pop("top_k"), settings.pop("samples"), V)
    return ProposalCache.build(folder, source, examples=examples, **settings)


def tensors(cache: ProposalCache) -> list[Tensor]:
    """Copies, for the cache maps its files into memory."""
    return [column.clone() for i in range(len(cache)) for column in cache[i]]


@pytest.fixture
def small_shards(monkeypatch):
    """Three examples in a file, two in a forward pass."""
    monkeypatch.setattr(cache_module, "SHARD", 3)
    monkeypatch.setattr(rows_module, "BATCH", 2)


# ---- what is in it


@pytest.mark.parametrize("top_k", [0, V, V + 5])
def test_rows_are_exact_where_every_entry_is_kept(top_k, tmp_path, small_shards):
    proposal, examples = Counting(), make_examples(8)
    cache = build(tmp_path / "cache", proposal, examples, top_k=top_k)
    assert len(cache) == 8
    for i, example in enumerate(examples):
        assert cache[i].token.tolist() == example.chosen.tolist()
        torch.testing.assert_close(cache[i].rebuild(V), exact_rows(proposal.model, example), rtol=0, atol=1e-5)
    assert cache.facts["kl_per_token"] == pytest.approx(0, abs=1e-6)
    assert cache.facts["kl_worst_token"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("top_k", [1, 4, V - 1])
def test_rows_are_normalised_and_keep_the_best_and_the_token(top_k, tmp_path, small_shards):
    """Entries among the k best and the token's own are the exact ones; all others share the tail's mass evenly."""
    proposal, examples = Counting(), make_examples(8)
    cache = build(tmp_path / "cache", proposal, examples, top_k=top_k)
    for i, example in enumerate(examples):
        exact, rows = exact_rows(proposal.model, example), cache[i].rebuild(V)
        torch.testing.assert_close(rows.logsumexp(-1), torch.zeros(len(rows)), rtol=0, atol=1e-5)
        tokens = torch.tensor(example.chosen)
        torch.testing.assert_close(gather(rows, tokens), gather(exact, tokens), rtol=0, atol=1e-5)
        for row, true, token in zip(rows, exact, example.chosen, strict=True):
            best = set(true.topk(top_k).indices.tolist()) | {token}
            rest = [v for v in range(V) if v not in best]
            torch.testing.assert_close(row[list(best)], true[list(best)], rtol=0, atol=1e-5)
            if rest:
                even = true[rest].logsumexp(-1) - math.log(len(rest))
                torch.testing.assert_close(row[rest], even.expand(len(rest)), rtol=0, atol=1e-5)


def test_an_impossible_tail_stays_impossible():
    """Where the k best hold all the mass, the others keep none, and no NaN appears."""
    logp = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0]]).log()
    rows = rows_module.compress(logp, torch.tensor([1, 2]), 2).rebuild(4)
    torch.testing.assert_close(rows, logp)


@pytest.mark.parametrize("samples", [0, 5])
def test_the_stated_errors_are_those_of_the_rows(samples, tmp_path, small_shards):
    """KL(exact‖evenly spread) = Σ_v p(v)(log p(v) − log p̂(v)), and log Σ_v p̃(v) p(v) − log Σ_v p(v)², over all tokens."""
    proposal, examples = Counting(), make_examples(10)
    cache = build(tmp_path / "cache", proposal, examples, top_k=3, samples=samples)
    exact = [exact_rows(proposal.model, example) for example in examples]
    errors = torch.cat([kl_divergence(rows, cache[i].evenly().rebuild(V)) for i, rows in enumerate(exact)]).double()
    log_z = torch.cat([
        (cache[i].rebuild(V).exp() * rows.exp()).sum(-1).log() - rows.exp().square().sum(-1).log()
        for i, rows in enumerate(exact)
    ]).double()  # fmt: skip
    assert cache.facts["log_z_error"] == pytest.approx(float(log_z.mean()), abs=1e-5)
    assert cache.facts["log_z_error_rms"] == pytest.approx(float(log_z.square().mean().sqrt()), abs=1e-5)
    assert cache.facts["log_z_error_rms"] > 0.005
    assert errors.mean() > 0.05, "three of 32 entries must lose something, or this test says nothing"
    assert cache.facts["kl_per_token"] == pytest.approx(float(errors.mean()), abs=1e-5)
    assert cache.facts["kl_worst_token"] == pytest.approx(float(errors.max()), abs=1e-4)
    assert cache.facts["tokens"] == sum(len(example.chosen) for example in examples)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.safetensors"))
    assert cache.facts["bytes_per_token"] == pytest.approx(on_disk / cache.facts["tokens"])


def test_the_temperature_is_applied_before_compression(tmp_path):
    proposal, examples = Counting(), make_examples(4)
    cache = build(tmp_path / "cache", proposal, examples, top_k=0, temperature=0.5)
    for i, example in enumerate(examples):
        expected = exact_rows(proposal.model, example, temperature=0.5)
        torch.testing.assert_close(cache[i].rebuild(V), expected, rtol=0, atol=3e-5)
        torch.testing.assert_close(expected, warp(exact_rows(proposal.model, example), Warp(0.5)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("samples", [0, 6])
def test_rows_do_not_depend_on_shards_and_batches(samples, tmp_path, monkeypatch):
    examples = make_examples(9)
    whole = tensors(build(tmp_path / "whole", Counting(), examples, samples=samples))
    monkeypatch.setattr(cache_module, "SHARD", 2)
    monkeypatch.setattr(rows_module, "BATCH", 1)
    monkeypatch.setattr(scoring, "ROW_BUDGET", 2 * V)  # and an answer comes in pieces of two tokens
    cut = build(tmp_path / "cut", Counting(), examples, samples=samples)
    assert len(list((tmp_path / "cut").glob("shard-*"))) == 5
    for ours, theirs in zip(tensors(cut), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-5)
    assert [cut[i].token.tolist() for i in (8, 0, 5)] == [examples[i].chosen.tolist() for i in (8, 0, 5)]


def test_fields_are_what_the_files_hold():
    assert list(CachedRows._fields) == FIELDS


# ---- draws from the tail


def grid(uniforms: int, samples: int) -> Tensor:
    """Points of S systematic draws for uniforms 0, 1/n, …: `[n, S]`."""
    start = torch.arange(uniforms, dtype=torch.float64).unsqueeze(-1) / uniforms
    return (torch.arange(samples, dtype=torch.float64) + start) / samples


@pytest.mark.parametrize("samples", [1, 3, 8, 50])
@pytest.mark.parametrize("token", [0, 7])
def test_drawn_rows_are_right_on_average(samples, token):
    """E p̃(v) = p(v) for each v, so Σ_v p̃(v) q(v)^λ is unbiased for any q and λ.

    Integrated over u: a token of mass p in a tail of mass t owns p/t of [0, 1), which S points (i+u)/S meet S·p/t times on
    average, and each stands for t/S. On a grid of n uniforms a token's count is off by at most one in each of its S pieces.
    """
    logp = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64).mul(2).log_softmax(-1)
    rows = compress(logp.expand(4000, 10), torch.full((4000,), token), 2, grid(4000, samples)).rebuild(10)
    torch.testing.assert_close(rows.logsumexp(-1), torch.zeros(4000, dtype=torch.float64))
    torch.testing.assert_close(rows.exp().mean(0), logp.exp(), rtol=0, atol=2 / 4000)
    even = compress(logp.unsqueeze(0), torch.tensor([token]), 2).rebuild(10)[0]
    assert (even.exp() - logp.exp()).abs().max() > 0.03
    logq = 1.5 * logp
    z = (rows + logq).exp().sum(-1).mean()
    assert float(z) == pytest.approx(float((logp + logq).exp().sum()), rel=1e-3)


def test_what_is_drawn_was_not_kept_and_has_mass():
    """Also at the very end of the distribution, which (i+u)/S may be rounded to."""
    logp = torch.randn(500, 12, generator=torch.Generator().manual_seed(0)).masked_fill(torch.arange(12) % 4 == 3, -torch.inf)
    logp, tokens = logp.log_softmax(-1), torch.arange(500) % 12
    points = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64).expand(500, 5)
    rows = compress(logp, tokens, 3, points)
    assert not (rows.samples == tokens.unsqueeze(-1)).any()
    assert not (rows.samples.unsqueeze(-1) == rows.ids.unsqueeze(-2)).any()
    assert gather(logp.unsqueeze(1).expand(500, 5, 12), rows.samples.long()).isfinite().all()


def test_where_the_tail_has_no_mass_draws_say_nothing():
    logp = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.75, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]).log()
    rows = compress(logp, torch.tensor([1, 2, 0]), 2, grid(3, 4))
    torch.testing.assert_close(rows.rebuild(4), logp)
    whole = compress(logp, torch.tensor([1, 2, 0]), 3, grid(3, 4))
    torch.testing.assert_close(whole.rebuild(4), logp)


def test_ends_of_sequence_are_always_kept(tmp_path):
    proposal, examples = Counting(), make_examples(6)
    ends = (3, 17)
    cache = build(tmp_path / "cache", proposal, examples, top_k=4, samples=5, ends=ends)
    for i, example in enumerate(examples):
        exact, rows = exact_rows(proposal.model, example), cache[i]
        for end in ends:
            assert (rows.ids == end).any(-1).all()
            assert not (rows.samples == end).any()
        torch.testing.assert_close(rows.rebuild(V)[:, list(ends)], exact[:, list(ends)], rtol=0, atol=1e-5)
        others = exact.index_fill(-1, torch.tensor(ends), -torch.inf).topk(2).indices
        assert (rows.ids[:, 2:].sort(-1).values == others.sort(-1).values).all()


def test_draws_are_a_function_of_the_examples_tokens():
    """The same numbers on every machine and in every process; others for another prompt, answer or position."""
    example = Example([5, 6], [7, 8, 9], [])
    points = tail_points(example, 4)
    assert points.shape == (3, 4)
    assert points[:, 0].tolist() == pytest.approx([0.19068597085648473, 0.0072014277075732325, 0.06997373519379066], abs=1e-15)
    torch.testing.assert_close(points.diff(dim=-1), torch.full((3, 3), 0.25, dtype=torch.float64))
    assert torch.equal(tail_points(example._replace(rejected=[1]), 4), points)
    others = [Example([5], [6, 7, 8, 9], []), Example([5, 6], [7, 8, 1], []), Example([4, 6], [7, 8, 9], [])]
    assert len({float(u) for e in (example, *others) for u in tail_points(e, 1)[:, 0]}) == 13
    assert tail_points(example, 0).shape == (3, 0)


# ---- built in pieces


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, small_shards):
    """Ten examples are four shards of two calls each, the last of one; the fifth call dies inside the third shard."""
    examples = make_examples(10)
    expected = tensors(build(tmp_path / "untouched", Counting(), examples, samples=6))
    first = Counting()
    first.dies_at = 5
    with pytest.raises(Killed):
        build(tmp_path / "cache", first, examples, samples=6)
    made = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert made == ["cache.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    times = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in made}
    second = Counting()
    resumed = build(tmp_path / "cache", second, examples, samples=6)
    assert second.calls == 3
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in made} == times
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed), expected, strict=True))


def test_a_whole_cache_is_opened_without_the_proposal(tmp_path, small_shards):
    examples = make_examples(7)
    first = build(tmp_path / "cache", Counting(), examples)
    idle = Counting()
    again = build(tmp_path / "cache", idle, examples)
    assert idle.calls == 0
    assert again.facts == first.facts
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), tensors(first), strict=True))


@pytest.mark.parametrize("keep", [0, 7, 0.5, 0.99])
def test_a_torn_shard_is_built_again(keep, tmp_path, small_shards):
    """A disk may lose the end of a file, though we write it whole."""
    examples = make_examples(9)
    expected = tensors(build(tmp_path / "cache", Counting(), examples))
    shard = tmp_path / "cache" / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    proposal = Counting()
    again = build(tmp_path / "cache", proposal, examples)
    assert proposal.calls == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors(again), expected, strict=True))


# ---- and for nothing else


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fingerprint": "sha256:q"}, "another proposal"),
        ({"vocabulary": "sha256:w"}, "another tokenizer"),
        ({"examples": make_examples(4, seed=1)}, "other data"),
        ({"examples": make_examples(3)}, "other data"),
        ({"top_k": 5}, r"another top_k \(4, now 5\)"),
        ({"top_k": 0}, r"another top_k \(4, now 32\)"),
        ({"samples": 3}, r"another number of tail_samples \(0, now 3\)"),
        ({"temperature": 0.7}, r"another proposal_temperature \(1.0, now 0.7\)"),
    ],
)
def test_a_cache_for_something_else_is_refused(changes, named, tmp_path):
    build(tmp_path / "cache", Counting(), make_examples(4))
    before = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    proposal = Counting()
    with pytest.raises(CacheMismatch, match=f"was made for {named}: delete the folder, or name another"):
        build(tmp_path / "cache", proposal, **({"examples": make_examples(4)} | changes))
    assert proposal.calls == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


@pytest.mark.parametrize("content", ["{", "", "[1]", "3"])
def test_a_description_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "cache.json").write_text(content)
    with pytest.raises(CacheMismatch, match=r"cache\.json is no description of a cache \(.*\): delete the folder"):
        build(tmp_path, Counting(), make_examples(4))


def test_another_version_is_refused(tmp_path):
    build(tmp_path, Counting(), make_examples(4))
    path = tmp_path / "cache.json"
    path.write_text(path.read_text().replace('"format_version": 3', '"format_version": 2'))
    with pytest.raises(CacheMismatch, match="another version of Trimtab"):
        build(tmp_path, Counting(), make_examples(4))


def test_the_fingerprint_of_a_model_sees_weights_shapes_and_dtype():
    base = tiny_model("llama", V)
    nudged = tiny_model("llama", V)
    with torch.no_grad():
        nudged.model.norm.weight[3] += 1e-3
    others = [tiny_model("llama", V, seed=1), tiny_model("llama", V + 1), tiny_model("llama", V).bfloat16(), nudged]
    found = [fingerprint_model(model) for model in (base, *others)]
    assert len(set(found)) == 5
    assert found[0] == fingerprint_model(tiny_model("llama", V))
    assert found[0].startswith("sha256:")
