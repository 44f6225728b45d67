"""How many tokens of a seed the last digits of a row change, by how a token is drawn from it.

    python benchmarks/steady_draw.py --proposal P

A text is read one token at a time and five at a time: the rows are the same but for rounding. For each way to draw, the share
of uniforms is worked out exactly for which the two rows give two tokens: of an inverse CDF, which is one level of all tokens,
and of trees of tokens with a uniform of its own at each level. The total variation between the rows is the least there can be.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab import AlignedModel
from trimtab.core.draw import BRANCHES, LEVELS
from trimtab.hardware import describe_hardware

WAYS = ((), (256,), (37, 37), (BRANCHES,) * (LEVELS - 1), (2,) * 16)
"""Ways to go at each level below the first, which has what is left."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proposal", required=True)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, action="append", help="may repeat [default: 1, 0.7 and 0.5]")
    options = parser.parse_args()
    model = AlignedModel.from_pretrained(options.proposal)
    ids = model.encoder.prompt(Path(json.__file__).read_text(encoding="utf-8"))[: 40 + options.tokens]
    one, five = (rows_of(model, ids, width) for width in (1, 5))
    print(describe_hardware(), f"; {len(one)} rows of {one.shape[-1]} tokens")
    for temperature in options.temperature or [1.0, 0.7, 0.5]:
        pair = [(rows.double() / temperature).softmax(-1) for rows in (one, five)]
        variation = float((pair[0] - pair[1]).abs().sum(-1).mean()) / 2
        print(f"temperature {temperature}: total variation {variation:.2g}")
        for ways in WAYS:
            print(f"  {' x '.join(map(str, ('all', *ways))):32} {float(changed(*pair, ways).mean()):.2g}")


def rows_of(model: AlignedModel, ids: list[int], width: int) -> Tensor:
    """The proposal's rows `[N, V]` behind each token from the 40th on, read so many at a time."""
    state = model.proposal.new_state(1, len(ids))
    model.proposal.extend(state, torch.tensor([ids[:40]]), [40])
    parts = [torch.tensor([ids[i : i + width]]) for i in range(40, len(ids), width)]
    return torch.cat([model.proposal.extend(state, part, [part.shape[1]])[0] for part in parts])


def changed(one: Tensor, other: Tensor, ways: tuple[int, ...]) -> Tensor:
    """The share of draws `[N]` that differ between two rows `[N, V]` where neighbours are drawn in groups of so many."""
    total = torch.zeros(len(one), dtype=torch.float64)
    for size in reversed(ways):
        groups = [F.pad(row, (0, -row.shape[-1] % size)).view(len(row), -1, size) for row in (one, other)]
        sums = [group.sum(-1) for group in groups]
        some = (sums[0] > 0) & (sums[1] > 0)
        shares = [
            torch.where(some[..., None], group / mass[..., None], 1 / size) for group, mass in zip(groups, sums, strict=True)
        ]
        total += (differing(*shares) * sums[0]).sum(-1)
        one, other = sums
    return total + differing(one, other)


def differing(p: Tensor, q: Tensor) -> Tensor:
    """For how large a part of [0, 1) the inverse CDFs of two rows `[..., n]` differ."""
    ends = p.cumsum(-1), q.cumsum(-1)
    same = torch.minimum(*ends) - torch.maximum(ends[0] - p, ends[1] - q)
    return 1 - same.clamp(min=0).sum(-1)


if __name__ == "__main__":
    main()
