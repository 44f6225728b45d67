"""One reading of a group's prompt: the logits of its answers are those of one row for each."""

import pytest
import torch
from torch.testing import assert_close

from tiny import tiny_model
from trimtab.data.examples import Example
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.train.batches import Item, answer_logits, collate
from trimtab.train.fused_likelihood import fused_sft
from trimtab.train.head import upper_model
from trimtab.train.hidden import hidden_states
from trimtab.train.online.packing import LONGEST, can_pack, pack

GROUPS = [
    [Example([3, 4, 5, 6, 7], answer, []) for answer in ([8, 9, 10], [11], [12, 13, 14, 15, 16, 17])],
    [Example([20, 21], answer, []) for answer in ([22, 23, 24, 25], [26, 27])],
    [Example([30], answer, []) for answer in ([1, 2], [3])],
]
FLAT = [example for group in GROUPS for example in group]


def rows(model, batch):
    logits, positions = answer_logits(model, batch, "chosen")
    return logits[positions].log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral", "gemma3_text", "phi3"])
def test_logits_and_gradients_are_those_of_one_row_for_each_answer(kind):
    """Windows of five tokens, where a family has them, end inside of answers."""
    windows = {"sliding_window": 5} if kind in ("mistral", "gemma3_text", "phi3") else {}
    model = tiny_model(kind, **windows).double()
    packed, plain = pack(model.config, GROUPS, [{}] * len(FLAT)), collate([Item(example) for example in FLAT])
    for name in ("chosen_tokens", "chosen_owner"):
        assert torch.equal(packed[name], plain[name])
    found = []
    for batch in (packed, plain):
        model.zero_grad()
        logits, positions = answer_logits(model, batch, "chosen")
        losses = fused_sft(logits, positions, batch["chosen_tokens"], logits.shape[-1])
        (losses * torch.arange(len(losses))).sum().backward()
        found.append((losses.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    (one, grads), (other, others) = found
    assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert len(grads) == len(others) > 0
    for mine, theirs in zip(grads, others, strict=True):
        assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_prompt_that_several_answers_have_is_read_once(monkeypatch):
    model, read = HuggingFaceLM(tiny_model("llama")), []
    alone = [hidden_states(model, [example], 1)[0] for example in FLAT]
    below = HuggingFaceLM.extend_below

    def counted(self, state, tokens, counts, layers):
        read.append(sum(counts))
        return below(self, state, tokens, counts, layers)

    monkeypatch.setattr(HuggingFaceLM, "extend_below", counted)
    order = [3, 0, 6, 1, 4, 2, 5]
    for place, states in zip(order, hidden_states(model, [FLAT[i] for i in order], 1), strict=True):
        assert_close(states, alone[place], atol=1e-4, rtol=1e-4)
    assert sum(read) == sum(len(group[0].prompt) + sum(len(example.chosen) for example in group) for group in GROUPS)


def test_a_head_reads_hidden_states_in_their_places():
    model = tiny_model("llama")
    states = hidden_states(HuggingFaceLM(model), FLAT, 1)
    hidden = [{"chosen": one} for one in states]
    upper = upper_model(model, 1)
    plain = collate([Item(example, hidden=one) for example, one in zip(FLAT, hidden, strict=True)])
    assert_close(rows(upper, pack(upper.config, GROUPS, hidden)), rows(upper, plain))
    assert_close(rows(model, pack(model.config, GROUPS, [{}] * len(FLAT))), rows(model, plain | {"chosen_hidden": None}))


def test_what_cannot_be_packed_is_known():
    llama, windowed, mamba = (tiny_model(kind).config for kind in ("llama", "gemma2", "mamba2"))
    assert can_pack([llama], GROUPS)
    assert can_pack([llama, tiny_model("qwen3").config], GROUPS)
    assert not can_pack([llama, windowed], GROUPS)
    assert not can_pack([mamba], GROUPS)
    assert not can_pack([llama], [[example] for example in FLAT])
    assert not can_pack([llama], [[Example([1], [2] * (LONGEST // 2), [])] * 2])
    eager = tiny_model("llama").config
    eager._attn_implementation = "eager"
    assert not can_pack([eager], GROUPS)
