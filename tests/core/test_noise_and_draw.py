"""Random numbers are a pure function of seed, completion, position and draw; draws follow their rows."""

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from statistics_of import chi_square
from trimtab.core.draw import LEVELS, NO_TOKEN, draw_by_mass, draw_steadily, inverse_cdf
from trimtab.core.noise import fresh_seed, philox, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known-answer vectors of Random123, the authors' own library."""
    got = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in got) == words


def test_noise_does_not_depend_on_neighbours_blocks_or_number_of_draws():
    whole = uniforms([5, -1, 2**70], [0, 3, 1], [0, 0, 0], 100, 5)
    assert torch.equal(uniforms([-1], [3], [40], 10, 2), whole[1:2, 40:50, :2])
    assert torch.equal(uniforms([2**70, 5], [1, 0], [99, 7], 1, 5)[:, 0], torch.stack([whole[2, 99], whole[0, 7]]))


def test_seed_index_position_and_draw_all_matter():
    values = uniforms([1, 2, 1 + 2**32], [0, 0, 0], [0, 0, 0], 50, 4).flatten().tolist()
    values += uniforms([1], [1], [0], 50, 4).flatten().tolist()
    assert len(set(values)) == len(values)


def test_uniforms_are_uniform_and_uncorrelated():
    u = uniforms(list(range(500)), [0] * 500, [0] * 500, 100, 2)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.bincount((u[..., 0].flatten() * 50).long(), minlength=50).tolist()
    assert chi_square(dict(enumerate(counts)), dict.fromkeys(range(50), 1 / 50)) > 1e-3
    pairs = torch.corrcoef(torch.stack([u[:, :-1, 0].flatten(), u[:, 1:, 0].flatten(), u[:, 1:, 1].flatten()]))
    assert pairs.triu(1).abs().max() < 5 / math.sqrt(500 * 99)


def test_fresh_seeds_differ():
    assert len({fresh_seed() for _ in range(100)}) == 100


def test_inverse_cdf_follows_its_row_and_never_draws_the_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0], dtype=torch.float64)
    draws = inverse_cdf(probs.log(), uniforms([3], [0], [0], 20_000, 1)[0, :, 0])
    counts = torch.bincount(draws, minlength=6).tolist()
    assert chi_square(dict(enumerate(counts)), dict(enumerate(probs.tolist()))) > 1e-3


def test_inverse_cdf_at_its_edges():
    logp = torch.tensor([-math.inf, 0.0, -math.inf]).expand(3, 3)
    edges = torch.tensor([[0.0, 0.5, 1 - 2.0**-53]], dtype=torch.float64).expand(3, 3)
    assert inverse_cdf(logp, edges).tolist() == [[1, 1, 1]] * 3
    long = torch.full((200_000,), -math.log(200_000))
    assert inverse_cdf(long, torch.tensor([1 - 2.0**-53], dtype=torch.float64)).item() == 199_999


def test_rows_without_mass_give_no_token():
    rows = torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf], [math.nan, 0.0]])
    half = torch.full((3, 2), 0.5, dtype=torch.float64)
    assert inverse_cdf(rows, half).tolist() == [[0, 0], [NO_TOKEN, NO_TOKEN], [NO_TOKEN, NO_TOKEN]]


def test_a_large_vocabulary_is_summed_by_stretches_to_the_same_end():
    """The same tokens as one running sum over all of it gives, impossible ones and dead rows included."""
    vocab = 20_011
    logits = torch.randn(6, vocab, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1, :500], logits[1, 700:] = -math.inf, -math.inf  # all mass in the second and third stretch
    logits[2, :-1] = -math.inf
    logits[3] = -math.inf
    logits[4, 77] = math.nan
    mass = logits.softmax(-1).float()
    mass[3], mass[5] = 0.0, torch.nn.functional.one_hot(torch.tensor(256), vocab)
    uniform = torch.cat([uniforms([1], [0], [0], 2_000, 1)[0, :, 0], torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)])
    drawn = draw_by_mass(mass, uniform.expand(6, -1))
    cumulative = mass.double().cumsum(-1)
    for row in (0, 1):
        expected = torch.searchsorted(cumulative[row], uniform[:-1] * cumulative[row, -1], right=True)
        assert torch.equal(drawn[row, :-1], expected)
        assert bool((mass[row, drawn[row]] > 0).all())
    assert drawn[2].unique().tolist() == [vocab - 1]
    assert drawn[3].unique().tolist() == drawn[4].unique().tolist() == [NO_TOKEN]
    assert drawn[5].unique().tolist() == [256]


def test_a_steady_draw_follows_its_row_and_never_draws_the_impossible():
    """Half of the mass on three neighbours, the rest spread over a large vocabulary: each level splits it as it should."""
    vocab, some = 20_011, torch.arange(0, 20_011, 997)
    mass = torch.zeros(vocab, dtype=torch.float64)
    mass[some], mass[[4095, 4096, 4097]] = 0.5 / len(some), torch.tensor([0.25, 0.125, 0.125], dtype=torch.float64)
    noise = uniforms([3], [0], [0], 4_000, LEVELS)[0]
    drawn = torch.cat([draw_steadily(3 * mass.float().expand(len(part), -1), part) for part in noise.split(100)])
    law = {int(token): float(mass[token]) for token in mass.nonzero()[:, 0]}
    assert chi_square(dict(Counter(drawn.tolist())), law) > 1e-3
    edge = torch.tensor([[0.0] * LEVELS, [1 - 2.0**-53] * LEVELS], dtype=torch.float64)
    assert draw_steadily(mass.expand(2, -1), edge).tolist() == [int(some[0]), int(some[-1])]
    sick = torch.stack([torch.zeros(vocab), torch.full((vocab,), math.nan)])
    assert draw_steadily(sick, noise[:2]).tolist() == [NO_TOKEN] * 2


def test_a_steady_draw_of_a_small_vocabulary_is_the_inverse_cdf():
    mass, noise = torch.rand(50, 31, generator=torch.Generator().manual_seed(1)), uniforms([3], [0], [0], 50, LEVELS)[0]
    assert torch.equal(draw_steadily(mass, noise), draw_by_mass(mass, noise[:, :1])[:, 0])


def test_rounding_hardly_moves_a_steady_draw():
    """Rows whose entries are off by a ten-thousandth: the inverse CDF gives one token in thirty anew, this one hardly any."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 20_000, generator=draw, dtype=torch.float64) * 2
    other = logits + 1e-4 * torch.randn(1, 20_000, generator=draw, dtype=torch.float64)
    one, two, noise = logits.softmax(-1), other.softmax(-1), uniforms([3], [0], [0], 4_000, LEVELS)[0]

    def moved(of: Callable[[torch.Tensor], torch.Tensor]) -> float:
        return float((of(one) != of(two)).double().mean())

    steady = moved(lambda mass: torch.cat([draw_steadily(mass.expand(100, -1), part) for part in noise.split(100)]))
    plain = moved(lambda mass: draw_by_mass(mass, noise[:, 0][None])[0])
    assert plain > 0.02
    assert steady < plain / 30
