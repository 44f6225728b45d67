"""Settings of every test run."""

from collections.abc import Sequence

import pytest
import torch

BROWSERS = {"browser", "page"}
"""Fixtures that need a real browser."""


def pytest_configure() -> None:
    """One thread: these models are tiny, and on a busy machine threads that wait for each other are many times slower."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """What drives a browser is slow: `make test` installs none."""
    for item in items:
        if BROWSERS & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
