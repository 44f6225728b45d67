"""Rows: the nucleus has one definition, −inf is an ordinary value, and a neutral warp changes no bit."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from trimtab.core.logprobs import (
    Warp,
    entropy,
    gather,
    in_nucleus,
    kl_divergence,
    log_normalize,
    nucleus_mask,
    row_from_logits,
    warp,
)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def nucleus_by_sorting(logp: torch.Tensor, top_p: float) -> list[bool]:
    """The definition, spelled out: the mass strictly above a token's probability is below top_p."""
    probs = logp.exp().tolist()
    return [p > 0 and (top_p >= 1 or math.fsum(q for q in probs if q > p) < top_p) for p in probs]


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=12).filter(any),
    st.sampled_from([0.05, 0.3, 0.5001, 0.7, 0.95, 0.9999, 1.0]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_nucleus_is_its_definition_with_ties_and_zeros(counts, top_p, dtype):
    logp = log_normalize(torch.tensor(counts, dtype=dtype).log())
    # A sum that equals top_p up to rounding may fall on either side; the definition is about all others.
    if any(abs(s - top_p) < 1e-6 for s in masses_above(logp)):
        return
    assert nucleus_mask(logp, top_p).tolist() == nucleus_by_sorting(logp, top_p)


def masses_above(logp: torch.Tensor) -> list[float]:
    probs = logp.exp().tolist()
    return [math.fsum(q for q in probs if q > p) for p in probs]


def test_membership_of_one_token_is_the_mask_everywhere():
    rows = log_normalize(torch.randn(7, 3, 501, generator=torch.Generator().manual_seed(0)) * 3)
    top_p = torch.tensor([0.1, 0.5, 0.9, 0.95, 0.99, 1.0, 0.001]).unsqueeze(-1)
    mask = nucleus_mask(rows, top_p)
    for token in range(501):
        tokens = torch.full((7, 3), token)
        assert torch.equal(in_nucleus(rows, tokens, top_p), mask[..., token])


def test_tied_tokens_are_in_or_out_together():
    logp = logs(0.4, 0.2, 0.2, 0.2)
    assert nucleus_mask(logp, 0.3).tolist() == [True, False, False, False]
    assert nucleus_mask(logp, 0.45).tolist() == [True, True, True, True]
    assert nucleus_mask(logs(0.25, 0.25, 0.25, 0.25), 0.01).tolist() == [True] * 4


def test_one_token_nucleus_is_one_hot():
    assert_close(warp(logs(0.6, 0.3, 0.1), Warp(top_p=0.5)), logs(1.0, 0.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nucleus_of_a_flat_and_of_a_sharp_row_of_real_size(dtype):
    flat = torch.full((50_000,), -math.log(50_000), dtype=dtype)
    assert nucleus_mask(flat, 0.5).all()
    sharp = log_normalize(torch.linspace(0, -200, 50_000, dtype=dtype))
    kept = nucleus_mask(sharp, 0.9)
    mass = sharp.exp()[kept]
    assert mass.sum() >= 0.9
    assert mass[:-1].sum() < 0.9


def test_warp_order_is_temperature_then_top_k_then_top_p():
    logp = logs(0.5, 0.3, 0.15, 0.05)
    by_hand = logs(0.5**2, 0.3**2, 0.15**2, 0.0)
    by_hand = log_normalize(by_hand)  # .735, .265·…: the nucleus of .75 keeps two
    assert_close(warp(logp, Warp(temperature=0.5, top_k=3, top_p=0.75)), log_normalize(by_hand + logs(1, 1, 0, 0)))


def test_top_k_keeps_ties_and_min_p_is_relative_to_the_best():
    logp = logs(0.4, 0.2, 0.2, 0.1, 0.1)
    assert warp(logp, Warp(top_k=2)).isfinite().tolist() == [True, True, True, False, False]
    assert warp(logp, Warp(min_p=0.5)).isfinite().tolist() == [True, True, True, False, False]
    assert warp(logp, Warp(min_p=0.51)).isfinite().tolist() == [True, False, False, False, False]


def test_rows_of_a_batch_are_warped_each_in_its_own_way():
    rows = log_normalize(torch.randn(4, 2, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    plain = [Warp(0.5, 3, 0.8, 0.1), Warp(), Warp(2.0, 0, 0.5, 0.0), Warp(1.0, 40, 1.0, 0.3)]
    columns = [torch.tensor([[w[i] or (1.0 if i in (0, 2) else 0)] for w in plain], dtype=torch.float64) for i in range(4)]
    together = warp(rows, Warp(columns[0], columns[1].long(), columns[2], columns[3], max_top_k=40))
    for row, how in enumerate(plain):
        assert_close(together[row], warp(rows[row], how), atol=0, rtol=0)
    assert torch.equal(together[1], rows[1])


def test_impossible_tokens_stay_impossible_through_every_step():
    logp = log_normalize(logs(0.5, 0.0, 0.3, 0.2))
    for how in (Warp(temperature=3.0), Warp(top_k=3), Warp(top_p=0.99), Warp(min_p=0.0001), Warp(top_p=1.0)):
        assert warp(logp, how)[1] == -math.inf


def test_divergence_and_entropy_treat_zeros_as_limits():
    p, q = logs(0.5, 0.5, 0.0), logs(0.25, 0.5, 0.25)
    assert_close(kl_divergence(p, q).item(), 0.5 * math.log(2))
    assert kl_divergence(q, p).item() == math.inf
    assert kl_divergence(p, p).item() == 0
    assert_close(entropy(p).item(), math.log(2))


def test_a_token_of_no_probability_has_no_part_in_a_divergence_however_far_the_other_is():
    """0·log(0/q) = 0, also where a mask stands for −inf and the other's power of it has overflowed."""
    p = log_normalize(torch.tensor([1.0, 2.0, torch.finfo(torch.float32).min]))
    q = log_normalize(torch.tensor([1.0, 1.0, -math.inf]))
    expected = kl_divergence(p[:2], q[:2])
    assert kl_divergence(p, q).item() == pytest.approx(expected.item())


def test_padding_columns_get_no_mass():
    logits = torch.tensor([[1.0, 2.0, 3.0, 1e9]])
    row = row_from_logits(logits.to(torch.bfloat16), 3)
    assert row.dtype == torch.float32
    assert_close(row.exp().sum().item(), 1.0)
    assert_close(gather(row, torch.tensor([1])), torch.log_softmax(logits[:, :3], -1)[:, 1])


def test_a_row_without_mass_normalises_to_nan_and_not_to_something():
    assert log_normalize(torch.full((3,), -math.inf)).isnan().all()
