"""The contract of `LanguageModel`, run over every implementation and every supported architecture.

Chunked = stepwise, cached = uncached, batched = alone, rollback and select = recompute.
"""

import pytest
import torch
from torch.testing import assert_close

from tiny import SHAPES, tiny_model
from trimtab.errors import InvalidRequest
from trimtab.models.base import LanguageModel
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.masks import STATEFUL
from trimtab.models.reduced import ReducedLM, reduce_model
from trimtab.models.supported import SUPPORTED
from trimtab.models.table import TableLM

V = 32
PATHS = ["llama-eager", "qwen3-stock", "llama-packed", "qwen2-packed", "llama-int8", "gemma3_text-int8", "llama-reduced"]
PATHS += ["qwen3-reduced"]
"""Other ways through the same models: eager attention, without the lean pass, weights packed and in 8 bits, few tokens said."""
CASES = ["table", *(f"{kind}-float32" for kind in SUPPORTED), *(f"{kind}-bfloat16" for kind in SUPPORTED), *PATHS]


def make(case: str) -> tuple[LanguageModel, float]:
    """A model and the largest difference in log-probability that its arithmetic may make."""
    if case == "table":
        return TableLM.random(V, order=2, seed=1), 0.0
    kind, mode = case.split("-")
    if mode == "stock":
        return HuggingFaceLM(tiny_model(kind, V), lean=False), 5e-5
    if mode == "packed":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trimtab.models.prepack.PACKED_FROM", 0)
            return HuggingFaceLM(tiny_model(kind, V), owned=True), 5e-5
    if mode == "int8":
        sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
        return HuggingFaceLM(tiny_model(kind, V, spread=0.1, **sizes), owned=True, quantize="int8"), 6e-2
    if mode == "reduced":
        said = torch.arange(0, V, 3)
        return ReducedLM(reduce_model(tiny_model(kind, V), [0, 1], said), said, V), 5e-5
    if mode == "eager":
        return HuggingFaceLM(tiny_model(kind, V, attn_implementation="eager")), 5e-5
    # bfloat16 keeps 8 bits: weights of ±0.1 keep the logits near 1, where a rounding step is near 0.01
    model = tiny_model(kind, V, spread=0.5 if mode == "float32" else 0.1).to(getattr(torch, mode))
    exact = 2e-4 if kind in STATEFUL else 5e-5  # states are computed in other ways from one token and from many
    return HuggingFaceLM(model), exact if mode == "float32" else 6e-2


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[LanguageModel, float]:
    return make(request.param)


def tokens(length: int, *, seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(1, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def alone(model: LanguageModel, sequence: torch.Tensor) -> torch.Tensor:
    """Rows after every token of one sequence `[1, T]`, in one fresh pass: the reference."""
    return model.extend(model.new_state(1, sequence.shape[1]), sequence, [sequence.shape[1]])


def test_every_listed_architecture_has_a_tiny_model():
    assert set(SUPPORTED) == set(SHAPES)


def test_rows_are_normalised_and_depend_on_the_prefix(case):
    model, _ = case
    rows = alone(model, tokens(7, seed=0))
    assert rows.shape == (1, 7, V)
    assert_close(rows.exp().sum(-1), torch.ones(1, 7, dtype=rows.dtype), atol=1e-5, rtol=0)
    assert (rows[0, 2] - rows[0, 5]).nan_to_num().abs().max() > 1e-3  # −inf in both is no difference


@pytest.mark.parametrize("kind", SUPPORTED)
def test_rows_are_those_of_the_stock_model(kind):
    """Our cache, mask and positions against `model(ids)` without any of them."""
    stock = tiny_model(kind, V)
    ids = tokens(9, seed=1)
    with torch.no_grad():
        expected = torch.log_softmax(stock(ids).logits.float(), -1)
    assert_close(alone(HuggingFaceLM(stock), ids), expected, atol=5e-5, rtol=0)


def test_stepwise_is_chunked(case):
    model, atol = case
    ids = tokens(8, seed=2)
    expected = alone(model, ids)
    state = model.new_state(1, 8)
    steps = [model.extend(state, ids[:, t : t + 1], [1]) for t in range(8)]
    assert_close(torch.cat(steps, 1), expected, atol=atol, rtol=0)
    state = model.new_state(1, 8)
    model.prefill(state, ids[:, :3], [3])
    assert_close(model.extend(state, ids[:, 3:], [5]), expected[:, 3:], atol=atol, rtol=0)


def test_prefill_gives_the_row_after_each_last_token(case):
    model, atol = case
    ids = tokens(9, seed=11, rows=4)
    state, same = model.new_state(4, 9), model.new_state(4, 9)
    for counts in ([3, 3, 3, 3], [1, 4, 0, 2]):
        start = [state.lengths[slot] for slot in range(4)]
        step = torch.zeros(4, max(counts), dtype=torch.long)
        for slot, count in enumerate(counts):
            step[slot, :count] = ids[slot, start[slot] : start[slot] + count]
        rows, last = model.extend(same, step, counts), model.prefill(state, step, counts)
        assert last.shape == (4, 1, V)
        assert state.lengths == same.lengths
        for slot, count in enumerate(counts):
            if count:
                assert_close(last[slot, 0], rows[slot, count - 1], atol=atol, rtol=0)


def test_ragged_batch_is_each_alone(case):
    model, atol = case
    ids = tokens(9, seed=3, rows=4)
    plan = [[4, 1, 0, 3], [1, 3, 5, 0], [2, 1, 1, 4]]  # tokens that each slot takes at each step
    state = model.new_state(4, 9)
    done = [0, 0, 0, 0]
    got: list[list[torch.Tensor]] = [[], [], [], []]
    for counts in plan:
        step = torch.zeros(4, max(counts), dtype=torch.long)
        for slot, count in enumerate(counts):
            step[slot, :count] = ids[slot, done[slot] : done[slot] + count]
        rows = model.extend(state, step, counts)
        for slot, count in enumerate(counts):
            got[slot].extend(rows[slot, :count])
            done[slot] += count
        assert state.lengths == done
    for slot in range(4):
        assert_close(torch.stack(got[slot]), alone(model, ids[slot : slot + 1, : done[slot]])[0], atol=atol, rtol=0)


def test_rollback_is_recompute(case):
    model, atol = case
    ids, other = tokens(8, seed=4, rows=2), tokens(4, seed=5, rows=2)
    state = model.new_state(2, 10)
    model.extend(state, ids, [8, 8])
    model.rollback(state, [3, 5])
    assert state.lengths == [5, 3]
    rows = model.extend(state, other, [4, 4])
    for slot, kept in enumerate([5, 3]):
        again = torch.cat([ids[slot, :kept], other[slot]])[None]
        assert_close(rows[slot], alone(model, again)[0, kept:], atol=atol, rtol=0)


def test_select_copies_repeats_and_drops(case):
    model, atol = case
    ids = tokens(5, seed=6, rows=3)
    state = model.new_state(3, 8)
    model.extend(state, ids, [5, 2, 4])
    copy = model.select(state, [2, 0, 2])
    assert copy.lengths == [4, 5, 4]
    new = tokens(2, seed=7, rows=3)
    rows = model.extend(copy, new, [2, 2, 2])
    for slot, (source, length) in enumerate([(2, 4), (0, 5), (2, 4)]):
        again = torch.cat([ids[source, :length], new[slot]])[None]
        assert_close(rows[slot], alone(model, again)[0, length:], atol=atol, rtol=0)
    assert state.lengths == [5, 2, 4]  # the original goes on as if nothing had happened
    rows = model.extend(state, new[:, :1], [1, 1, 1])
    assert_close(rows[1], alone(model, torch.cat([ids[1, :2], new[1, :1]])[None])[0, 2:], atol=atol, rtol=0)


def test_a_step_that_does_not_fit_is_refused_and_changes_nothing(case):
    model, _ = case
    state = model.new_state(2, 4)
    model.extend(state, tokens(3, seed=8, rows=2), [3, 1])
    with pytest.raises(InvalidRequest, match="slot 0 holds 3 of 4 tokens; 2 more do not fit"):
        model.extend(state, tokens(2, seed=9, rows=2), [2, 2])
    with pytest.raises(InvalidRequest, match=r"counts\[1\] is 3"):
        model.extend(state, tokens(2, seed=9, rows=2), [1, 3])
    with pytest.raises(InvalidRequest, match="cannot forget 2"):
        model.rollback(state, [0, 2])
    assert state.lengths == [3, 1]


def test_a_full_slot_waits_while_its_neighbour_goes_on(case):
    """The padding token of a full slot must not overwrite anything that is still seen."""
    model, atol = case
    ids = tokens(6, seed=10, rows=2)
    state = model.new_state(2, 6)
    model.extend(state, ids, [6, 3])
    rows = model.extend(state, ids[:, 3:], [0, 3])
    assert_close(rows[1], alone(model, ids[1:])[0, 3:], atol=atol, rtol=0)
    model.rollback(state, [1, 0])
    rows = model.extend(state, ids[:, 5:], [1, 0])
    assert_close(rows[0, 0], alone(model, ids[:1])[0, 5], atol=atol, rtol=0)


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_the_cache_takes_what_it_says(kind):
    model = HuggingFaceLM(tiny_model(kind))
    state = model.new_state(3, 9)
    model.prefill(state, torch.ones(3, 2, dtype=torch.long), [2, 2, 2])
    held = sum(part.numel() * part.element_size() for layer in state.layers for part in (layer.keys, layer.values))
    if model.is_recurrent:  # which keeps more; tests/models/test_recurrent.py looks at all of it
        assert held < state.num_bytes == model.state_bytes(3, 9)
    else:
        assert held == state.num_bytes == model.state_bytes(3, 9) == 3 * (9 + 1) * model.cache_bytes_per_token


ALL = (
    test_rows_are_normalised_and_depend_on_the_prefix,
    test_stepwise_is_chunked,
    test_prefill_gives_the_row_after_each_last_token,
    test_ragged_batch_is_each_alone,
    test_rollback_is_recompute,
    test_select_copies_repeats_and_drops,
    test_a_step_that_does_not_fit_is_refused_and_changes_nothing,
    test_a_full_slot_waits_while_its_neighbour_goes_on,
)
"""What every implementation keeps, with a fixture `case` of its own: tests_llamacpp/ and tests_quantized/ run it, too."""
