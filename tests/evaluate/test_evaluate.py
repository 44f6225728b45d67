"""Intervals cover what they should, and charts are well-formed."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch

from trimtab.core.noise import uniforms
from trimtab.evaluate.charts import Line, line_chart
from trimtab.evaluate.intervals import ratio_interval


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Totals of u per unit of size with u uniform: the true ratio is ½. 300 runs at 95 %: within .90 and .99."""
    hits = 0
    for run in range(300):
        noise = uniforms([run], [0], [0], 60, 2)[0]
        sizes = 1 + (noise[:, 1] * 9).floor()
        low, high = ratio_interval(noise[:, 0] * sizes, sizes, seed=run, resamples=300)
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 300 <= 0.99


def test_a_constant_ratio_has_no_width():
    sizes = torch.arange(1.0, 20.0)
    assert ratio_interval(3 * sizes, sizes) == pytest.approx((3.0, 3.0))


@pytest.mark.parametrize("points", [[(0, 1), (5, 2), (9, float("inf"))], [(1, 1)], [(0, 3), (1, 3)], [(0, 1e-9), (1e6, 2e-9)]])
def test_charts_are_well_formed_svg(points):
    root = ElementTree.fromstring(line_chart([Line("a < b", points), Line("c", points, dashed=True)], "x & y", "z"))
    assert len(root.findall("polyline")) == 2
    assert '"nan' not in ElementTree.tostring(root, encoding="unicode")
