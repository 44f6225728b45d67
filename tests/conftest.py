"""Settings of every test run."""

import torch


def pytest_configure() -> None:
    """One thread: these models are tiny, and on a busy machine threads that wait for each other are many times slower."""
    torch.set_num_threads(1)
