"""The sequence-level law by enumeration: exactly, over every outcome of all noise, and by many runs; and slow runs."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch

from law_of import EOS, expected_row, powers, probabilities, tempered
from statistics_of import fits
from tiny import tiny_model
from trimtab import AlignedModel, SamplingParams
from trimtab.core.noise import uniforms
from trimtab.decode import particles as runs
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM, enumerate_sequences

Masses = dict[tuple[int, ...], float]


def token_weights(rule: str, p: list[float], qs: list[list[float]], weights: list[float]) -> list[float]:
    """w_t(v) of the rules, in plain Python: what `expected_row` normalises."""
    q = [math.prod(column) for column in zip(*(powers(row, w) for row, w in zip(qs, weights, strict=True)), strict=True)]
    base = {"product": 1.0, "geometric": 1 - sum(weights), "nucleus": 0.0}[rule]
    return [a**base * b if a else 0.0 for a, b in zip(p, q, strict=True)]


def target(proposal, aligners, rule, weights, prompt, length, *, temperature=1.0, top_p=1.0, ends=(EOS,)) -> Masses:
    """γ(y) = Π_t w_t(y_t) of every completion; those that reach the most tokens are prefixes."""

    def row(prefix):
        p = tempered(probabilities(proposal, prefix), temperature, top_p)
        found = token_weights(rule, p, [probabilities(q, prefix) for q in aligners], weights)
        return torch.tensor(found, dtype=torch.float64).log()

    return {y: math.exp(logw) for y, logw in enumerate_sequences(row, prompt, length, ends).items()}


def law(masses: Masses) -> dict[tuple[int, ...], float]:
    return {y: math.log(mass / math.fsum(masses.values())) for y, mass in masses.items() if mass}


# ---- exactly


def table(*rows: list[float]) -> TableLM:
    """Rows after 1 and after 2; others do not occur."""
    return TableLM(torch.tensor([[0.25] * 4, *rows, *[[0.25] * 4] * 2], dtype=torch.float64).log())


COINS = table([0.0, 0.5, 0.5, 0.0], [0.5, 0.5, 0.0, 0.0])
"""Every row is even over two tokens, so that a draw has two outcomes: 1 leads to 1 or 2, and 2 to the end or to 1."""
SKEW = table([1 / 3, 1 / 3, 1 / 3, 0.0], [1 / 27, 1 / 27, 1 / 27, 8 / 9])
"""Z is 1/3 after a 1 and 1/27 after a 2: weights of two particles differ by 3, 9 or 27."""
STRETCHES = [0.0, *sorted({2 * w / (1 + w) % 1 for w in (1 / 27, 1 / 9, 1 / 3, 3, 9, 27)}), 1.0]
"""Between which systematic resampling of two such particles does not depend on its uniform: the fractions of 2·W_1."""
LENGTH = 3


def every_outcome(seeds, indices, starts, length, draws):
    """Noise of runs that together meet each outcome once: the middles of the cells that number `index` stands for."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(STRETCHES)]
    noise = torch.full((len(indices), length, draws), 0.5, dtype=torch.float64)
    if draws == 3:
        for row, index in enumerate(indices):
            for position in range(LENGTH):
                for draw in (1, 2):
                    index, coin = divmod(index, 2)
                    noise[row, position, draw] = 0.25 + coin / 2
                if position:  # before, all weights are the same
                    index, stretch = divmod(index, len(middles))
                    noise[row, position, 0] = middles[stretch]
    return noise


def probability(index: int) -> float:
    """That of the cells of such a run."""
    found, lengths = 1.0, [b - a for a, b in itertools.pairwise(STRETCHES)]
    for position in range(LENGTH):
        index, found = index // 4, found / 4
        if position:
            index, stretch = divmod(index, len(lengths))
            found *= lengths[stretch]
    return found


def expectation(ess: float) -> Masses:
    """E[Ẑ · Σ_i W_i 1{y_i = y}] of every y, summed over every outcome of a run of two particles."""
    outcomes = 4**LENGTH * (len(STRETCHES) - 1) ** (LENGTH - 1)
    model = AlignedModel(COINS, [SKEW], eos_token_ids=[EOS], max_num_seqs=2 * outcomes)
    params = SamplingParams(n=outcomes, max_tokens=LENGTH, seed=0)
    mean: Masses = Counter()
    for done in model.generate([[1]], params, sequence_level=f"particles=2,ess={ess}"):
        assert done.particles is not None
        scale = probability(done.index) * math.exp(done.particles.log_z)
        for one, weight in zip(done.particles.completions, done.particles.weights, strict=True):
            mean[tuple(one.tokens)] += scale * weight
    return mean


@pytest.mark.parametrize("ess", [0, 0.62, 0.9])
def test_runs_are_properly_weighted(ess, monkeypatch):
    """Ẑ Σ_i W_i δ(y_i) has the mean γ, and so Ẑ has the mean Z: to rounding, over every outcome of all draws and resamplings.

    At .62 two particles are drawn anew where one weighs 9 times as much as the other, at .9 where it weighs 3 times as much.
    """
    monkeypatch.setattr(runs, "uniforms", every_outcome)
    masses = target(COINS, [SKEW], "product", [1.0], [1], LENGTH)
    mean = expectation(ess)
    assert mean.keys() == masses.keys()
    assert all(mean[y] == pytest.approx(mass, rel=1e-12) for y, mass in masses.items())


def last_increment_dropped(weights, increments):
    last_increment_dropped.calls += 1
    return runs_reweigh(weights, increments if last_increment_dropped.calls % LENGTH else 0 * increments)


def most_weighty_first(weights, uniform, threshold):
    return runs_resample(weights, 0 * uniform, threshold)


def weights_kept(weights, uniform, threshold):
    found = runs_resample(weights, uniform, threshold)
    return found._replace(weights=weights)


runs_reweigh, runs_resample = runs.reweigh, runs.resample
MISTAKES = {
    "reweigh": last_increment_dropped,
    "resample": most_weighty_first,
    "resample again": weights_kept,
    "estimate_log_z": lambda weights: weights.logw.logsumexp(-1) - math.log(2),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_found(mistake, monkeypatch):
    last_increment_dropped.calls = 0
    monkeypatch.setattr(runs, mistake.split()[0], MISTAKES[mistake])
    with pytest.raises(AssertionError):
        test_runs_are_properly_weighted(0.9, monkeypatch)


# ---- by many runs

V = 4
REQUESTS: dict[str, dict[str, Any]] = {
    "product": {},
    "anti-expert": {"weight": -0.7},
    "geometric": {"rule": "geometric", "weight": 0.4},
    "nucleus": {"rule": "nucleus", "proposal_top_p": 0.8},
    "warped": {"weight": 0.5, "proposal_temperature": 0.6, "proposal_top_p": 0.9},
}


def sampled(model: AlignedModel, particles: str | None, **params: Any) -> list[Any]:
    return model.generate([[1]], SamplingParams(seed=11, **params), sequence_level=particles)


@pytest.mark.parametrize("case", REQUESTS)
def test_the_estimate_of_z_is_unbiased_and_sequences_follow_the_law(case):
    """Mean and standard error of Ẑ and of Ẑ·1{drawn = y} over runs of four; Pearson's test of what runs of many draw.

    The token-level law fails it.
    """
    asked = REQUESTS[case]
    proposal, aligner = (TableLM.random(V, order=2, seed=seed, scale=1.5, zeros=0.1) for seed in (30, 31))
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], max_num_seqs=4096)
    warps = {"temperature": asked.get("proposal_temperature", 1.0), "top_p": asked.get("proposal_top_p", 1.0)}
    masses = target(proposal, [aligner], asked.get("rule", "product"), [asked.get("weight", 1.0)], [1], 4, **warps)
    z = math.fsum(masses.values())
    few = sampled(model, "particles=4,ess=0.7", n=500, max_tokens=4, **asked)
    estimates = torch.tensor([done.particles.log_z for done in few], dtype=torch.float64).exp()
    assert abs(float(estimates.mean()) - z) < 4 * float(estimates.std()) / len(few) ** 0.5
    for y in (y for y, mass in masses.items() if mass > z / 50):
        drawn = estimates * torch.tensor([tuple(done.tokens) == y for done in few])
        assert abs(float(drawn.mean()) - masses[y]) < 4 * float(drawn.std()) / len(few) ** 0.5
    many = [tuple(done.tokens) for done in sampled(model, "particles=64", n=150, max_tokens=4, **asked)]
    assert fits(many, law(masses)) > 1e-3
    tokenwise = [tuple(done.tokens) for done in sampled(model, None, n=600, max_tokens=4, **asked)]
    assert fits(tokenwise, law(masses)) < 1e-4


def test_averages_over_the_weighted_set_are_those_of_the_law():
    """Σ W f estimates the mean of f: the length, the first token, how often a token comes."""
    proposal, aligner = (TableLM.random(V, order=2, seed=seed, scale=1.5) for seed in (30, 31))
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], max_num_seqs=4096)
    exact = law(target(proposal, [aligner], "product", [1.0], [1], 4))
    done = sampled(model, "particles=500", n=8, max_tokens=4)
    for f in (len, lambda y: y[0] == 2, lambda y: y.count(3)):
        truth = math.fsum(math.exp(logp) * f(y) for y, logp in exact.items())
        means = torch.tensor([
            math.fsum(w * f(tuple(one.tokens)) for one, w in zip(d.particles.completions, d.particles.weights, strict=True))
            for d in done
        ])  # fmt: skip
        assert abs(float(means.mean()) - truth) < 4 * float(means.std()) / len(done) ** 0.5 + 0.01


# ---- against a sampler that keeps nothing and shares nothing


def slowly(pair, prompt, count, ess, length, seed, index, weight, ends) -> dict[str, Any]:
    """One run, a particle at a time, every row computed anew from the whole text; with the same uniforms."""
    texts, logw, log_z, resampled, sizes = [()] * count, [0.0] * count, 0.0, [], []
    for t in range(length):
        ended = [bool(text) and text[-1] in ends for text in texts]
        if all(ended):
            break
        noise = uniforms([seed], [index], [t], 1, 1 + count)[0, 0].tolist()
        rows: list[Any] = []
        for i, text in enumerate(texts):
            if ended[i]:
                rows.append(None)
                continue
            p, q = (probabilities(part, [*prompt, *text]) for part in pair)
            rows.append(expected_row("product", p, [q], [weight]))
            logw[i] += math.log(math.fsum(token_weights("product", p, [q], [weight])))
        w = [math.exp(value - max(logw)) for value in logw]
        sizes.append(math.fsum(w) ** 2 / math.fsum(x * x for x in w))
        if sizes[-1] < ess * count and max(w) > min(w):
            resampled.append(t)
            log_z += max(logw) + math.log(math.fsum(w) / count)
            drawn = [
                next(i for i in range(count) if math.fsum(w[: i + 1]) > (noise[0] + k) / count * math.fsum(w))
                for k in range(count)
            ]
            spare = [i for i in dict.fromkeys(drawn) for _ in range(drawn.count(i) - 1)]
            ancestors = [i if i in drawn else spare.pop(0) for i in range(count)]
            texts, rows, logw = [texts[i] for i in ancestors], [rows[i] for i in ancestors], [0.0] * count
        for i, row in enumerate(rows):
            if row is not None:
                running = list(itertools.accumulate(row))
                texts[i] += (next(v for v in range(len(row)) if running[v] > noise[1 + i] * running[-1]),)
    w = list(itertools.accumulate(math.exp(value - max(logw)) for value in logw))
    uniform = float(uniforms([seed], [index], [len(sizes)], 1, 1))
    drawn = texts[next(i for i in range(count) if w[i] > uniform * w[-1])]
    return {"texts": texts, "logw": logw, "log_z": log_z, "resampled": resampled, "sizes": sizes, "drawn": drawn}


SPREADS = {"llama": 0.4, "qwen3_next": 0.4, "gemma3_text": 0.1}
"""How far the rows of a random model are from even ones depends on its family."""


def pair_of(kind: str):
    if kind == "table":
        return [TableLM.random(6, order=2, seed=seed, scale=1.2) for seed in (7, 8)]
    return [HuggingFaceLM(tiny_model(kind, 12, seed=seed, spread=SPREADS[kind])) for seed in (7, 8)]


@pytest.mark.parametrize("kind", ["table", "llama", "qwen3_next", "gemma3_text"])
@pytest.mark.parametrize("case", ["live", "ended", "revived"])
def test_a_run_is_that_of_the_slow_sampler(kind, case):
    """Same texts, weights and resamplings; a run is the same in a batch of several prompts and completions.

    Particles take over the slots of others that live; they become copies of those that have ended, which outweigh them; and
    where an anti-expert makes each further token weigh more, those that have ended become copies of those that go on.
    """
    pair, weight, ends = pair_of(kind), -0.7 if case == "revived" else 1.0, () if case == "live" else (EOS,)
    model = AlignedModel(pair[0], pair[1:], eos_token_ids=ends, max_num_seqs=64, weight=weight)
    prompts, asked = [[1], [3, 2, 4, 1, 5]], SamplingParams(n=2, max_tokens=7, seed=5)
    together = model.generate(prompts, asked, sequence_level="particles=6,ess=0.9")
    resamplings = 0
    for i, done in enumerate(together):
        expected = slowly(pair, prompts[i // 2], 6, 0.9, 7, 5, i % 2, weight, ends)
        found = done.particles
        assert [tuple(one.tokens) for one in found.completions] == expected["texts"]
        assert found.weights == pytest.approx(torch.tensor(expected["logw"]).double().softmax(-1).tolist(), rel=1e-4)
        assert found.effective_sizes == pytest.approx(expected["sizes"], rel=1e-3)
        assert found.resampled == expected["resampled"]
        mean = math.fsum(map(math.exp, expected["logw"])) / len(expected["logw"])
        assert found.log_z == pytest.approx(expected["log_z"] + math.log(mean), abs=1e-3)
        assert tuple(done.tokens) == expected["drawn"]
        resamplings += len(found.resampled)
    assert resamplings >= 3
    alone = AlignedModel(pair[0], pair[1:], eos_token_ids=ends, max_num_seqs=1, weight=weight)
    again = alone.generate(prompts[1:], asked, sequence_level="particles=6,ess=0.9")
    assert [done.tokens for done in again] == [done.tokens for done in together[2:]]
