"""A tiny proposal with aligners, and vLLM engines over them that live in this process. `make test-vllm` runs these tests."""

import os

os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override what `make_llm` says
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from pathlib import Path

import pytest

from engines import Models, make_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def root(models: Models) -> Path:
    return models.root
