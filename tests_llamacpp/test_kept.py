"""llama.cpp keeps the contract of `LanguageModel`: the suite that every implementation passes."""

import pytest
import test_contract as contract

from files import make
from trimtab.models.llamacpp import LlamaCppLM

CASES = [(kind, stored) for kind in ("llama", "qwen2", "qwen3") for stored in ("F32", "F16", "Q8_0")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request, tmp_path):
    kind, stored = request.param
    path, _, _ = make(tmp_path, kind, stored, spread=0.1)
    return LlamaCppLM(path, contract.V), 2e-2 if stored == "F16" else 2e-3


for _name in (
    "test_rows_are_normalised_and_depend_on_the_prefix",
    "test_stepwise_is_chunked",
    "test_prefill_gives_the_row_after_each_last_token",
    "test_ragged_batch_is_each_alone",
    "test_rollback_is_recompute",
    "test_select_copies_repeats_and_drops",
    "test_a_step_that_does_not_fit_is_refused_and_changes_nothing",
    "test_a_full_slot_waits_while_its_neighbour_goes_on",
):
    globals()[_name] = getattr(contract, _name)
