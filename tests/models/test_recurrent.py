"""Layers that keep states: whatever slots do, their rows are those of their tokens; and decoding is what it is elsewhere."""

import contextlib
import gc
import random
import weakref
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from decode.test_prefixes import told
from tiny import tiny_model, tiny_tokenizer
from tiny_task import answer_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.data.examples import Example
from trimtab.errors import UnsupportedModel
from trimtab.models import recurrent
from trimtab.models.base import vacate
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.masks import STATEFUL, TOKENWISE
from trimtab.models.recurrent_slots import Recurrence
from trimtab.train.batches import Item, collate

V = 32
KINDS = ("falcon_h1", "lfm2", "mamba", "qwen3_next")
"""Attention beside states in a layer, convolutions, no attention at all, linear attention among attention."""


def expected(model: HuggingFaceLM, ids: list[int], count: int) -> torch.Tensor:
    """Rows `[count, V]` after the last tokens, by the stock module without a cache."""
    with torch.no_grad():
        return torch.log_softmax(model.model(torch.tensor([ids]), use_cache=False).logits[0, -count:].float(), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_those_of_the_tokens_whatever_slots_do(kind, seed, monkeypatch):
    """Steps of one token and of several, slots that take none, roll back, move, are copied and start anew."""
    monkeypatch.setattr(recurrent, "KEPT_EVERY", 4)
    monkeypatch.setattr(recurrent, "PIECE", 3)
    model, draw = HuggingFaceLM(tiny_model(kind, V)), random.Random(seed)
    state, texts = model.new_state(4, 40), [[] for _ in range(4)]
    for _ in range(60):
        match draw.choice(["one", "one", "one", "some", "some", "back", "far back", "move", "vacate", "select"]):
            case "one" | "some" as width:
                most = 1 if width == "one" else draw.randint(2, 5)
                slots = draw.randint(1, 4)
                counts = [min(draw.choice([0, 1, most]), 40 - len(text)) for text in texts[:slots]]
                ids = torch.randint(1, V, (slots, most), generator=torch.Generator().manual_seed(draw.randrange(2**30)))
                read = draw.choice([model.extend, model.prefill])
                rows = read(state, ids, counts)
                for slot, count in enumerate(counts):
                    texts[slot] += ids[slot, :count].tolist()
                    if count:
                        right = expected(model, texts[slot], count)
                        found = rows[slot, :count] if read == model.extend else rows[slot]
                        assert_close(found, right[-len(found) :], atol=5e-4, rtol=0)
            case "back" | "far back" as how:
                counts = [min(draw.randint(0, 3 if how == "back" else 30), len(text)) for text in texts]
                model.rollback(state, counts)
                texts = [text[: len(text) - count] for text, count in zip(texts, counts, strict=True)]
            case "move":
                one, other = draw.sample(range(4), 2)
                model.copy(state, [one], state, [other])
                texts[other] = list(texts[one])
            case "vacate":
                slot = draw.randrange(4)
                vacate(model, state, slot, 3)
                texts[slot] = list(texts[3])
                texts[3] = []
            case "select":
                chosen = [draw.randrange(4) for _ in range(4)]
                state, texts = model.select(state, chosen), [list(texts[i]) for i in chosen]
        assert state.lengths == [len(text) for text in texts]


def fail(*_: Any) -> Any:
    raise RuntimeError("no memory")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_fails_leaves_slots_as_they_were(kind, monkeypatch):
    model = HuggingFaceLM(tiny_model(kind, V))
    ids = torch.randint(1, V, (2, 8), generator=torch.Generator().manual_seed(0))
    state = model.new_state(2, 8)
    model.extend(state, ids[:, :4], [4, 4])
    head = model.model.get_output_embeddings()
    for counts in ([1, 1], [2, 0], [0, 1]):
        with monkeypatch.context() as patch:
            patch.setattr(head, "forward", fail)
            with pytest.raises(RuntimeError, match="no memory"):
                model.extend(state, ids[:, 4:6], counts)
        assert state.lengths == [4, 4]
    rows = model.extend(state, ids[:, 4:], [4, 4])
    for slot in range(2):
        assert_close(rows[slot], expected(model, ids[slot].tolist(), 4), atol=5e-4, rtol=0)


@pytest.mark.parametrize("kind", [*STATEFUL, *TOKENWISE])
def test_what_is_trained_is_what_is_decoded(kind):
    """Training pads prompts on the left, which states would read if they were not told."""
    model = tiny_model(kind, V)
    examples = [Example([3, 4, 5, 6, 7, 8, 9], [1, 2, 3], []), Example([5], [4, 4, 4, 5, 6], []), Example([9, 2], [7], [])]
    with torch.no_grad():
        rows = answer_rows(model, collate([Item(example, {}, 1.0, {}, False) for example in examples]), "chosen", V)
    texts = [[*example.prompt, *example.chosen[:-1]] for example in examples]
    lm, counts = HuggingFaceLM(model), [len(example.chosen) for example in examples]
    right = [expected(lm, text, count) for text, count in zip(texts, counts, strict=True)]
    assert_close(rows, torch.cat(right), atol=2e-4, rtol=0)


class Once:
    """A function that fails at one of its calls."""

    def __init__(self, function: Any, at: int) -> None:
        self.function, self.left = function, at

    def __get__(self, instance: Any, owner: Any) -> Any:
        return lambda *args, **how: self(instance, *args, **how)

    def __call__(self, *args: Any, **how: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("no memory")
        return self.function(*args, **how)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_memory_that_ends_while_states_are_moved_spoils_nothing(kind, at, monkeypatch):
    """Copies that are half made do not count, nor does a state that is half allocated."""
    monkeypatch.setattr(recurrent, "KEPT_EVERY", 4)
    model = HuggingFaceLM(tiny_model(kind, V))
    ids = torch.randint(1, V, (1, 30), generator=torch.Generator().manual_seed(0))

    def failing(name: str, call: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Recurrence, name, Once(getattr(Recurrence, name), at))
            with contextlib.suppress(MemoryError):
                call()

    model.new_state(1, 30)
    state = model.new_state(1, 30)
    failing("become", lambda: model.extend(state, ids[:, :6], [6]))
    if state.lengths == [0]:
        model.extend(state, ids[:, :6], [6])
    failing("hand_over", lambda: model.extend(state, ids[:, 6:8], [2]))
    model.rollback(state, [state.lengths[0] - 5])
    assert_close(model.extend(state, ids[:, 5:9], [4])[0], expected(model, ids[0, :9].tolist(), 4), atol=5e-4, rtol=0)
    other = model.new_state(2, 30)
    model.extend(other, ids[:, 10:16].repeat(2, 1), [6, 6])
    failing("hand_over", lambda: model.copy(state, [0], other, [1]))
    model.rollback(other, [0, other.lengths[1]])
    rows = model.extend(other, ids[:, :5].repeat(2, 1), [0, 5])
    assert_close(rows[1], expected(model, ids[0, :5].tolist(), 5), atol=5e-4, rtol=0)


def test_states_in_memory_are_what_is_said():
    model = HuggingFaceLM(tiny_model("falcon_h1", V))
    state = model.new_state(3, 30)
    model.extend(state, torch.ones(3, 20, dtype=torch.long), [20, 20, 20])
    assert model.state_bytes(3, 30) == state.num_bytes
    held = [part for layer in state.layers for part in (layer.keys, layer.values)]
    held += [part for one in [*state.recurrences, *state._kept] for part in one.states]
    assert state.num_bytes == sum(part.nbytes for part in held) + state.ids.nbytes
    model.model.to(torch.float64)
    state = model.new_state(3, 30)
    model.extend(state, torch.ones(3, 20, dtype=torch.long), [20, 20, 20])
    assert model.state_bytes(3, 30) == state.num_bytes


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_a_model_that_nobody_uses_is_gone(kind):
    """Without waiting for garbage to be collected: a server counts on the memory."""
    gc.collect()
    gc.disable()
    try:
        model = HuggingFaceLM(tiny_model(kind, V))
        state = model.new_state(2, 9)
        model.extend(state, torch.ones(2, 3, dtype=torch.long), [3, 2])
        gone = weakref.ref(model), weakref.ref(state)
        del model, state
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_a_hybrid_may_have_no_attention_at_all():
    """Its stock modules read it at once, and fail with a cache."""
    model = HuggingFaceLM(tiny_model("lfm2", V, layer_types=["conv"]))
    ids = torch.randint(1, V, (1, 9), generator=torch.Generator().manual_seed(0))
    state = model.new_state(1, 9)
    rows = torch.cat([model.extend(state, ids[:, :5], [5]), model.extend(state, ids[:, 5:], [4])], 1)
    assert_close(rows[0], expected(model, ids[0].tolist(), 9), atol=5e-5, rtol=0)


def test_heads_and_lean_passes_are_not_for_them():
    model = HuggingFaceLM(tiny_model("qwen3_5_text", V))
    assert model.kernels == "stock modules"
    with pytest.raises(UnsupportedModel, match="'qwen3_5_text'"):
        _ = model.lean


def aligned(kind: str, aligner: str, **settings: Any) -> AlignedModel:
    models = [tiny_model(kind, 28, seed=1, spread=0.2), tiny_model(aligner, 28, seed=2, spread=0.2)]
    owned = [HuggingFaceLM(model, owned=True) for model in models]  # of lent ones nothing is kept
    return AlignedModel.from_pretrained(*owned, tokenizer=tiny_tokenizer(), **settings)


@pytest.mark.parametrize(("kind", "aligner"), [("qwen3_5_text", "llama"), ("llama", "lfm2"), ("mamba", "falcon_h1")])
def test_a_seed_has_the_same_tokens_in_every_way_of_decoding(kind, aligner):
    """Token by token and with drafts, alone and in a batch, with several completions, and where prompts begin alike."""
    prompts = ["the sea is wide and the ship", "the sea is wide and deep", "a", "the sea is wide and the ship sails"]
    params = [SamplingParams(max_tokens=20, temperature=1.0, seed=i, n=2) for i in range(len(prompts))]
    slow = aligned(kind, aligner, num_speculative_tokens=0, max_num_seqs=1, prefix_cache_tokens=0)
    right = [one.tokens for prompt, one in zip(prompts, params, strict=True) for one in slow.generate([prompt], one)]
    assert len({tuple(tokens) for tokens in right}) == 8
    for settings in ({"num_speculative_tokens": 3}, {"num_speculative_tokens": 0, "max_num_seqs": 3}):
        fast = aligned(kind, aligner, **settings)
        for _ in range(2):  # the second time what was read is kept
            assert [one.tokens for one in fast.generate(prompts, params)] == right


def test_a_prefix_is_taken_over_as_far_as_states_can_go_back():
    """The next turn of a chat goes on from the last one; another text that begins alike is read, and not said to be known."""
    model = aligned("qwen3_5_text", "llama", num_speculative_tokens=0)
    first = [5 + i % 20 for i in range(40)]
    said = told(model, first, max_tokens=8)
    beginning = told(model, [*first[:30], 1, 2])
    turn = told(model, [*first, *said.tokens, 3, 4])
    assert (said.cached_tokens, beginning.cached_tokens, turn.cached_tokens) == (0, 0, 47)
