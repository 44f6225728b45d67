"""Speculation is lossless: the exact law of one decision, enumerated over a grid of its noise, is the target row.

With probabilities in sixths, icdf_q changes only at sixths of u1, p/q is a fraction with a denominator up to 6, and so are
the shares of the normalised (p − q)⁺. A grid of 60 = lcm(1 … 6) midpoints therefore integrates u2 and u3 exactly, and one of 6
integrates u1.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from trimtab.core import speculation
from trimtab.core.draw import NO_TOKEN, inverse_cdf
from trimtab.core.logprobs import Warp, in_nucleus, warp
from trimtab.core.noise import uniforms
from trimtab.core.rules import Nucleus
from trimtab.core.speculation import draft_tokens, match, verify

V = 4
GRID = torch.tensor(
    list(itertools.product(*((torch.arange(n) + 0.5).div(n).tolist() for n in (6, 60, 60)))), dtype=torch.float64
)
"""Uniforms `[21600, 3]` that integrate a decision between rows in sixths exactly."""

sixths = st.lists(st.integers(0, V - 1), min_size=6, max_size=6).map(
    lambda tokens: torch.bincount(torch.tensor(tokens), minlength=V).double() / 6
)


def law(p: torch.Tensor, q: torch.Tensor | None, lookup: int = NO_TOKEN) -> torch.Tensor:
    """The exact law of one position, `[V]`; a certain draft instead of a drawn one without `q`."""
    count = len(GRID)
    logp = p.log().expand(count, 1, V)
    noise = GRID[:, None, :]
    logq = None if q is None else q.log().expand(count, 1, V)
    drafts = torch.full((count, 1), lookup) if logq is None else draft_tokens(logq, noise)
    verdict = verify(logp, drafts, logq, torch.zeros(count, dtype=torch.long), noise)
    assert int(verdict.accepted.max()) == 0
    return torch.bincount(verdict.tokens[:, 0], minlength=V).double() / count


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sixths, sixths)
def test_the_law_of_a_coupled_draw_is_the_target(p, q):
    assert_close(law(p, q), p, atol=1e-12, rtol=0)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(sixths, st.integers(NO_TOKEN, V - 1))
def test_the_law_of_a_certain_draft_is_the_target(p, lookup):
    assert_close(law(p, None, lookup), p, atol=1e-12, rtol=0)


def test_certain_drafts_change_no_token_and_stay_with_the_targets_probability():
    """t = icdf_p(u3) at every position; a draft stays if and only if it is t, and so with p(d)."""
    rows = (uniforms([7], [0], [0], 3, V)[0] * 3).log_softmax(-1).expand(len(GRID), 3, V)
    noise = torch.stack([GRID, GRID.roll(7, 0), GRID.roll(101, 0)], 1)
    none = torch.zeros(len(GRID), dtype=torch.long)
    expected = torch.cat([inverse_cdf(rows[:, j], noise[:, j, 2:]) for j in range(3)], 1)
    assert torch.equal(verify(rows[:, :1], None, None, none, noise[:, :1]).tokens, expected[:, :1])
    for lookup in range(V):
        for width in (2, 3):  # without and with a draft for the bonus position
            drafts = torch.full((len(GRID), width), lookup)
            verdict = verify(rows, drafts, None, none + 2, noise)
            run = (expected[:, :2] == lookup).long().cumprod(-1).sum(-1)
            assert torch.equal(verdict.accepted, run)
            assert torch.equal(verdict.tokens, expected)
        assert (run > 0).double().mean() == pytest.approx(float(rows[0, 0, lookup].exp()), abs=1 / 60)


def test_greedy_verdicts_need_no_rows():
    """`match` of the best tokens is `verify` of rows with all mass on them, missing drafts and dead rows included."""
    draw = torch.Generator().manual_seed(3)
    batch, width = 500, 3
    best = torch.randint(NO_TOKEN, 2, (batch, width), generator=draw)
    drafts = torch.randint(0, 2, (batch, width), generator=draw)
    limits = torch.randint(0, width, (batch,), generator=draw)

    def one_hot(tokens: torch.Tensor) -> torch.Tensor:
        rows = torch.full((batch, width, V), -math.inf)
        rows.scatter_(-1, tokens.clamp(min=0)[..., None], 0.0)
        return rows.masked_fill(tokens[..., None] == NO_TOKEN, -math.inf)

    noise = torch.rand(batch, width, 3, generator=draw, dtype=torch.float64)
    expected = verify(one_hot(best), drafts, one_hot(drafts), limits, noise)
    found = match(best, drafts, limits)
    assert_close(found.accepted, expected.accepted)
    assert_close(found.kept, expected.kept)
    for j in range(width):  # what stands behind the decided position means nothing
        counts = expected.accepted >= j
        assert_close(found.tokens[counts, j], expected.tokens[counts, j])


def test_a_wrong_residual_is_seen(monkeypatch):
    """Recovering from p instead of (p − q)⁺ draws min(p, q) + (1 − Σ min(p, q))·p: far from p, so the tests have power."""
    p, q = torch.tensor([3, 1, 1, 1]).double() / 6, torch.tensor([1, 3, 1, 1]).double() / 6
    monkeypatch.setattr(speculation, "_excess", lambda p, q: p)
    both = torch.minimum(p, q)
    assert_close(law(p, q), both + (1 - both.sum()) * p, atol=1e-12, rtol=0)
    assert (law(p, q) - p).abs().sum() / 2 > 0.1


def walk(table_p, table_q, noise, limit):
    """A sequence of three decisions, drafting `limit` tokens ahead of each step: tokens, by the position's own noise."""
    tokens: list[int] = []
    while len(tokens) < 3:
        k = min(limit, 2 - len(tokens))
        prefix, rows, drafted, qs = list(tokens), [], [], []
        for j in range(k + 1):
            last = prefix[-1] if prefix else V
            rows.append(table_p[last])
            qs.append(table_q[last])
            drafted.append(int(draft_tokens(table_q[last], noise[len(tokens) + j])))
            prefix.append(drafted[-1])
        verdict = verify(
            torch.stack(rows)[None],
            torch.tensor([drafted]),
            torch.stack(qs)[None],
            torch.tensor([k]),
            noise[None, len(tokens) : len(tokens) + k + 1],
        )
        tokens += verdict.tokens[0, : int(verdict.accepted) + 1].tolist()
    return tokens


def test_tokens_do_not_depend_on_how_far_anyone_drafts():
    noise = uniforms([11] * 40, range(40), [0] * 40, 3, 3)
    rows = (uniforms([5], [0], [0], 2 * (V + 1), V)[0] * 4).softmax(-1).log().view(2, V + 1, V)
    seen = set()
    for n in noise:
        stepwise = walk(*rows, n, 0)
        assert walk(*rows, n, 1) == walk(*rows, n, 2) == stepwise
        seen.add(tuple(stepwise))
    assert len(seen) > 15


def test_a_run_ends_at_the_first_draft_that_fails_and_at_the_limit():
    p = torch.tensor([[[0.5, 0.5, 0, 0]] * 3] * 3).log()
    q = torch.tensor([[[0.5, 0.5, 0, 0], [0, 0, 1.0, 0], [1.0, 0, 0, 0]]] * 3).log()
    q[1] = q[2] = p[0]
    noise = torch.full((3, 3, 3), 0.25, dtype=torch.float64)
    drafts = torch.tensor([[1, 2, 0], [0, 1, 0], [0, 1, 0]])
    verdict = verify(p, drafts, q, torch.tensor([2, 2, 1]), noise)
    assert verdict.accepted.tolist() == [1, 2, 1]  # 2 is impossible; all stay; all stay, but only one was drafted
    assert verdict.kept.tolist() == [1, 3, 2]
    assert verdict.tokens[0, :2].tolist() == [1, 0]  # recovered: icdf of (1/2, 1/2) at 1/4
    assert verdict.tokens[1].tolist() == [0, 1, 0]
    assert verdict.tokens[2, :2].tolist() == [0, 1]


def test_equal_rows_keep_every_draft():
    logp = (uniforms([1], [0], [0], 50, 9)[0] * 3).log_softmax(-1)[:, None]
    noise = uniforms([2], [0], [0], 50, 3)[0][:, None]
    drafts = draft_tokens(logp, noise)
    verdict = verify(logp, drafts, logp, torch.zeros(50, dtype=torch.long), noise)
    assert verdict.kept.tolist() == [1] * 50
    assert torch.equal(drafts, inverse_cdf(logp, noise[..., :1]).squeeze(-1))


@pytest.mark.parametrize("sick", [math.nan, -math.inf])
def test_a_row_without_mass_gives_no_token(sick):
    noise = torch.full((1, 1, 3), 0.5, dtype=torch.float64)
    q = torch.full((1, 1, V), 1 / V).log()
    verdict = verify(torch.full((1, 1, V), sick), draft_tokens(q, noise), q, torch.tensor([0]), noise)
    assert verdict.tokens.tolist() == [[NO_TOKEN]]


def test_a_sick_draft_row_does_not_hurt():
    noise = torch.full((1, 1, 3), 0.5, dtype=torch.float64)
    p = torch.tensor([[[0.0, 1.0, 0.0, 0.0]]]).log()
    q = torch.full((1, 1, V), math.nan)
    assert verify(p, draft_tokens(q, noise), q, torch.tensor([0]), noise).tokens.tolist() == [[1]]


def test_under_nucleus_a_draft_stays_if_and_only_if_it_is_in_the_nucleus():
    """There p = Q·1[S]/Q(S) ≥ Q on S, so what is drafted inside S stays whatever u2 says, and nothing else does."""
    rows = (uniforms([3], [0], [0], 2 * 400, V)[0] * 4).log_softmax(-1).view(2, 400, 1, V)
    proposal = warp(rows[0], Warp(top_p=0.6))
    target = Nucleus().target(proposal, [rows[1]], torch.ones(1, dtype=torch.float64))
    noise = uniforms([4], [0], [0], 400, 3)[0][:, None]
    drafts = draft_tokens(rows[1], noise)
    verdict = verify(target, drafts, rows[1], torch.zeros(400, dtype=torch.long), noise)
    inside = in_nucleus(rows[0], drafts, 0.6)[:, 0]
    assert torch.equal(verdict.kept == 1, inside)
    assert 50 < int(inside.sum()) < 350
