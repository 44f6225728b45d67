"""The real model, converted afresh, and a head of it that was trained on some docstrings. `make test-real` runs these tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from real_study import study_module
from trimtab import AlignedModel
from trimtab.train.options import TrainOptions
from trimtab.train.run import run_training as train

GGUF = Path(__file__).parents[1] / "real-model" / study_module("fetch").FILE


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The file. It is converted into a cache of this run alone, which processes that are started here share."""
    assert GGUF.exists(), f"there is no {GGUF}: run `make real-model`"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield str(GGUF)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's data, 48 records of each part at the most."""
    folder = tmp_path_factory.mktemp("data")
    study_module("docstrings").TASK.prepare(folder, None, 48)
    return folder


@pytest.fixture(scope="session")
def head(gguf: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a head of eight layers, after twelve steps."""
    steps = {"max_steps": 12, "per_device_train_batch_size": 8, "eval_strategy": "no", "save_strategy": "no"}
    options = TrainOptions(
        proposal=gguf,
        dataset=str(data / "train.jsonl"),
        output_dir=str(tmp_path_factory.mktemp("trained") / "head"),
        head_layers=8,
        keep_samples=4,
        dev_samples=0,
        training=steps | {"load_best_model_at_end": False, "report_to": "none", "disable_tqdm": True},
    )
    train(options)
    return options.output_dir


@pytest.fixture(scope="session")
def model(gguf: str, head: str) -> AlignedModel:
    """Both, as they are decoded."""
    return AlignedModel.from_pretrained(gguf, head)
