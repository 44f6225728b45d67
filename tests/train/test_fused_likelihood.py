"""The fast likelihood is the plain one: losses and gradients, for every rule, weight, temperature and kind of row."""

import pytest
import torch
from torch.testing import assert_close

from trimtab.core.logprobs import Warp, row_from_logits, warp
from trimtab.core.objectives import distillation, likelihood, sft
from trimtab.core.rules import Geometric, Mixture, Nucleus, Product
from trimtab.errors import InvalidOption
from trimtab.train.fused_likelihood import fused_distillation, fused_likelihood, fused_sft
from trimtab.train.rows import compress
from trimtab.train.taught_rows import compress_both

V, WIDTH, M = 11, 13, 9
POSITIONS = torch.tensor([0, 2, 3, 7])


def inputs(top_k: int, *, impossible: bool = False, samples: int = 0):
    """Rows of four tokens, one of them among the best and one not; logits of nine places, five of them padding."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, V, generator=generator, dtype=torch.float64) * 2
    if impossible:
        rows[:, [1, 4]] = -torch.inf
    rows = rows.log_softmax(-1)
    tokens = torch.stack([rows[0].argmax(), torch.tensor(5), torch.tensor(0), torch.tensor(10)])
    points = (torch.arange(samples, dtype=torch.float64) + torch.rand(4, 1, generator=generator)) / max(samples, 1)
    return compress(rows, tokens, top_k, points), torch.randn(M, WIDTH, generator=generator, dtype=torch.float64) * 3


def plain(rule, cached, logits, weight, temperature):
    rows = warp(row_from_logits(logits[POSITIONS], V), Warp(temperature))
    return likelihood(rule, cached.rebuild(V), rows, weight, cached.token.long())


@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize("top_k", [1, 3, V])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("rule", "weight"),
    [(Product(), 1.0), (Product(), 0.3), (Product(), -1.0), (Product(), 0.0), (Geometric(), 0.5), (Geometric(), 1.5)],
)
def test_losses_and_gradients_are_those_of_the_plain_likelihood(rule, weight, temperature, top_k, impossible):
    check(*inputs(top_k, impossible=impossible), rule, weight, temperature)


@pytest.mark.parametrize(("top_k", "samples"), [(1, 0), (3, 0), (V, 0), (3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_of_a_mixture_one_number_of_the_proposal_a_token_is_read(weight, temperature, top_k, samples):
    """Whatever is kept of the rest of its row, drawn or not: against rows of which everything is."""
    cached, logits = inputs(top_k, samples=samples)
    whole, _ = inputs(V)
    results = []
    for rows, compute in ((cached, fused_likelihood), (whole, None)):
        leaf = logits.clone().requires_grad_()
        how = weight, temperature
        losses = compute(Mixture(), rows, leaf, POSITIONS, *how, V) if compute else plain(Mixture(), rows, leaf, *how)
        (losses * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)).sum().backward()
        results.append((losses.detach(), torch.zeros_like(logits) if leaf.grad is None else leaf.grad))
    assert_close(*results, atol=1e-10, rtol=1e-10)


def test_a_mixture_with_a_proposal_that_has_zeros_is_bounded_from_above():
    """The aligner's mass where p̃ is 0 is wasted: 1 − w·q(outside) is what the decoded row is divided by."""
    cached, logits = inputs(V, impossible=True)
    weight = 0.4
    losses = fused_likelihood(Mixture(), cached, logits, POSITIONS, weight, 1.0, V)
    outside = row_from_logits(logits[POSITIONS], V)[:, [1, 4]].exp().sum(-1)
    assert_close(losses + (1 - weight * outside).log(), plain(Mixture(), cached, logits, weight, 1.0))
    gone = cached._replace(token=torch.full_like(cached.token, 4), token_logp=torch.full_like(cached.token_logp, -torch.inf))
    assert fused_likelihood(Mixture(), gone, logits, POSITIONS, weight, 1.0, V).isposinf().all()


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize(
    ("rule", "weight"), [(Product(), 1.0), (Product(), 0.0), (Product(), -0.7), (Geometric(), -0.5), (Geometric(), 0.5)]
)
def test_so_they_are_where_the_aligner_s_logits_are_masked(rule, weight, samples):
    """By −inf or by the least float; a wanted token (5, 0) only where it keeps mass: under an expert it would be impossible."""
    cached, logits = inputs(3, samples=samples if isinstance(rule, Product) else 0)
    logits[:, [1, 6] if weight > 0 else [0, 1, 6]] = -torch.inf
    logits[:, 2 if weight > 0 else 5] = torch.finfo(torch.float32).min
    check(cached, logits, rule, weight, 0.9)


@pytest.mark.parametrize(("top_k", "samples"), [(1, 1), (1, 30), (3, 2), (3, 7), (V - 1, 2)])
@pytest.mark.parametrize(("weight", "temperature"), [(1.0, 1.0), (0.3, 0.7), (-1.0, 1.0), (0.0, 1.0)])
@pytest.mark.parametrize("impossible", [False, True])
def test_so_they_are_where_the_tail_was_drawn(top_k, samples, weight, temperature, impossible):
    """With draws that are alike, with tokens that are among the best, and with a tail of no mass."""
    check(*inputs(top_k, impossible=impossible, samples=samples), Product(), weight, temperature)


def test_sft_from_logits_is_the_plain_one():
    """Losses and gradients, of places that predict a token and of those that predict none."""
    cached, logits = inputs(3)
    found = []
    for compute in (
        lambda x: fused_sft(x, POSITIONS, cached.token, V),
        lambda x: sft(row_from_logits(x[POSITIONS], V), cached.token.long()),
    ):
        x = logits.clone().requires_grad_()
        losses = compute(x)
        (losses * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)).sum().backward()
        found.append((losses.detach(), x.grad))
    assert_close(found[0], found[1])


def check(cached, logits, rule, weight, temperature):
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    results = []
    for compute in (
        lambda x: fused_likelihood(rule, cached, x, POSITIONS, weight, temperature, V),
        lambda x: plain(rule, cached, x, weight, temperature),
    ):
        leaf = logits.clone().requires_grad_()
        losses = compute(leaf)
        (losses * scale).sum().backward()
        results.append((losses.detach(), leaf.grad))
    assert_close(results[0], results[1], atol=1e-10, rtol=1e-10)
    assert results[0][0].isfinite().all()
    if weight:
        assert results[0][1].abs().max() > 0.01


def test_low_precision_logits_are_taken_as_they_are_and_computed_in_float32():
    cached, logits = inputs(3)
    low = logits.bfloat16().requires_grad_()
    losses = fused_likelihood(Product(), cached, low, POSITIONS, 1.0, 1.0, V)
    assert_close(losses, plain(Product(), cached, low.detach().float(), 1.0, 1.0).float(), atol=1e-5, rtol=1e-5)
    losses.sum().backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16
    assert not low.grad[[1, 4, 5, 6, 8]].any(), "places that predict nothing"
    assert not low.grad[:, V:].any(), "padding of the vocabulary"


def test_the_caller_s_logits_are_left_alone():
    cached, logits = inputs(3)
    before = logits.clone()
    fused_likelihood(Product(), cached, logits, POSITIONS, 0.5, 0.7, V)
    assert torch.equal(logits, before)


def test_other_rules_are_refused():
    cached, logits = inputs(3)
    with pytest.raises(InvalidOption, match="no product of powers, as product and geometric are"):
        fused_likelihood(Nucleus(), cached, logits, POSITIONS, 1.0, 1.0, V)
    drawn, _ = inputs(3, samples=2)
    with pytest.raises(InvalidOption, match="draws from its tail are biased"):
        fused_likelihood(Geometric(), drawn, logits, POSITIONS, 0.5, 1.0, V)


# ---- a teacher's rows


def both_rows(top_k: int = V):
    """A teacher's and a bare proposal's rows of four tokens, and what is kept of them."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(2, 4, V, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    return *rows, compress_both(*rows, torch.tensor([2, 5, 0, 10]), top_k, torch.zeros(4, 0, dtype=torch.float64))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("rule", "weight"),
    [(Product(), 1.0), (Product(), 0.3), (Product(), -1.0), (Product(), 0.0), (Geometric(), 0.5), (Geometric(), 1.0)],
)
def test_with_every_entry_the_distillation_is_the_plain_one(rule, weight, temperature):
    """Losses and gradients of KL(teacher‖rule's target), from rows `[N, V]` that the rule makes."""
    bare, teacher, taught = both_rows()
    _, logits = inputs(3)
    if weight < 0:
        logits[:, [1, 6]] = -torch.inf  # an anti-expert rules nothing out
    found = []
    for compute in (
        lambda x: fused_distillation(rule, taught, x, POSITIONS, weight, temperature, V),
        lambda x: distillation(
            teacher, rule.target(bare, [warp(row_from_logits(x[POSITIONS], V), Warp(temperature))], x.new_tensor([weight]))
        ),
    ):
        leaf = logits.clone().requires_grad_()
        losses = compute(leaf)
        (losses * torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)).sum().backward()
        found.append((losses.detach(), leaf.grad))
    assert_close(found[0], found[1], atol=1e-10, rtol=1e-10)
    assert (found[0][0] > 0.1).all()
    if weight:
        assert found[0][1].abs().max() > 0.01
    assert not found[0][1][:, V:].any(), "padding of the vocabulary"


def test_the_distillation_of_low_precision_logits_is_computed_in_float32():
    _, _, taught = both_rows(3)
    _, logits = inputs(3)
    low = logits.bfloat16().requires_grad_()
    taught = type(taught)(taught.ids, *(column.float() for column in taught[1:]))
    losses = fused_distillation(Product(), taught, low, POSITIONS, 1.0, 1.0, V)
    expected = fused_distillation(Product(), taught, low.detach().float(), POSITIONS, 1.0, 1.0, V)
    assert losses.dtype == torch.float32
    assert_close(losses, expected, atol=1e-5, rtol=1e-5)


def test_a_teacher_under_other_rules_is_refused():
    _, _, taught = both_rows()
    with pytest.raises(InvalidOption, match="no product of powers, as product and geometric are"):
        fused_distillation(Nucleus(), taught, inputs(3)[1], POSITIONS, 1.0, 1.0, V)
