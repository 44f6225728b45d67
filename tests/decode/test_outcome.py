"""What a step decided comes to the host as it was, in one transfer, whatever was asked for."""

import itertools
import math

import pytest
import torch

from trimtab.decode.outcome import Best, Decided, Outcome, fetch


def decided(b: int, p: int, seed: int, *, log_z: bool, marked: bool, logprobs: bool, best: bool) -> Decided:
    """Some of everything that is asked for, with ids that float32 could not hold."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def ids(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    tokens = ids(2**30, b, p) + 2**24 + 1
    tokens[0, 0] = -1
    return Decided(
        ids(p, b),
        ids(p + 1, b),
        tokens,
        torch.where(torch.arange(b) == 0, math.nan, numbers(b)) if log_z else None,
        ids(2, b, p).bool() if marked else None,
        numbers(b, p, 3) if logprobs else None,
        (Best(numbers(b, p, 2).float(), ids(2**30, b, p, 2)), Best(numbers(b, p, 2), ids(2**30, b, p, 2))) if best else None,
    )


def expected(one: Decided, slot: int) -> Outcome:
    """By looking each number up."""
    drawn = []
    for j in range(int(one.accepted[slot]) + 1):
        tops = [[(int(b.tokens[slot, j, i]), float(b.logp[slot, j, i])) for i in range(2)] for b in one.best or ()]
        logprobs = () if one.logprobs is None else [float(value) for value in one.logprobs[slot, j]]
        drawn.append((int(one.tokens[slot, j]), logprobs, one.marked is not None and bool(one.marked[slot, j]), tops))
    log_z = math.nan if one.log_z is None else float(one.log_z[slot])
    return Outcome(int(one.accepted[slot]), int(one.kept[slot]), drawn, log_z)


@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=4)), ids=str)
def test_what_is_fetched_is_what_was_decided(asked, monkeypatch):
    """For groups that differ in size, in width and in what they want."""
    names = ("log_z", "marked", "logprobs", "best")
    wanted = dict(zip(names, asked, strict=True))
    turned = dict(zip(names, reversed(asked), strict=True))
    groups = [decided(1, 1, 0, **wanted), decided(3, 5, 1, **turned), decided(2, 4, 2, **wanted)]
    transfers = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: transfers.append(self.numel()) or tolist(self))
    found = fetch(groups)
    monkeypatch.undo()
    assert len(transfers) == 1
    assert [len(outcomes) for outcomes in found] == [1, 3, 2]
    for one, outcomes in zip(groups, found, strict=True):
        for slot, outcome in enumerate(outcomes):
            right = expected(one, slot)
            assert outcome[:2] == right[:2]
            assert [tuple(drawn) for drawn in outcome.drawn] == right.drawn
            assert all(type(drawn.token) is int and type(drawn.marked) is bool for drawn in outcome.drawn)
            assert outcome.log_z == right.log_z or (math.isnan(outcome.log_z) and math.isnan(right.log_z))
