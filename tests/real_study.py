"""The modules of the study of a real model, which is no package: they import each other by their bare names."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks" / "real"


def study_module(name: str) -> ModuleType:
    """One of them."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
