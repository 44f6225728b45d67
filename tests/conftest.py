"""Settings of every test run."""

from collections.abc import Iterator, Sequence
from typing import Any

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, for tests of pages."""
    from browsing import open_browser

    with open_browser() as browser:
        yield browser
