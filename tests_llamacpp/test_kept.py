"""llama.cpp keeps the contract of `LanguageModel`: the suite that every implementation passes."""

import pytest
import test_contract as contract

from files import make
from trimtab.models.llamacpp import LlamaCppLM

CASES = [(kind, stored) for kind in ("gemma2", "gemma3", "llama", "qwen2", "qwen3") for stored in ("F32", "F16", "Q8_0")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request, tmp_path):
    kind, stored = request.param
    path, _, _ = make(tmp_path, kind, stored, spread=0.1)
    return LlamaCppLM(path, contract.V), 2e-2 if stored == "F16" else 2e-3


globals().update({test.__name__: test for test in contract.ALL})
