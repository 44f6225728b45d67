"""Prefixes that are not read twice: what is taken over, from whom, and that it changes nothing about what anybody gets."""

import gc
import random
import weakref

import pytest
import torch

from models.test_head import save_base, save_head
from tiny import EOS, save_lora, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.decode.prefixes import WORTHWHILE, Prefixes
from trimtab.decode.sequence import Sequence
from trimtab.errors import InvalidOption
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM

V = 7
PROPOSAL, *TABLES = [TableLM.random(V, order=2, seed=seed) for seed in range(4)]
SYSTEM = [i % 6 for i in range(30)]
"""What many prompts begin with."""


class Counting(TableLM):
    """A table that counts the tokens it reads."""

    read = 0

    def extend(self, state, tokens, counts):
        self.read += sum(counts)
        return super().extend(state, tokens, counts)


def tables(**settings) -> AlignedModel:
    proposal = Counting(PROPOSAL.table)
    return AlignedModel(proposal, TABLES[:1], eos_token_ids=[EOS], **{"num_speculative_tokens": 2} | settings)


def told(model: AlignedModel, prompt: list[int], **settings) -> Sequence:
    """A request that is over."""
    (sequence,) = model.prepare(prompt, SamplingParams(**{"seed": 0, "max_tokens": 6, "ignore_eos": True} | settings))
    list(Engine(model.proposal, model.pace, prefixes=model.prefixes).run([sequence]))
    return sequence


def test_a_prompt_that_begins_like_an_earlier_one_is_read_from_where_it_differs():
    model = tables(num_speculative_tokens=0)
    told(model, [*SYSTEM, 1, 2], max_tokens=1)
    before = model.proposal.read
    again = told(model, [*SYSTEM, 2, 2, 2], max_tokens=1)
    assert (again.cached_tokens, model.proposal.read - before) == (30, 3)


def test_the_second_turn_of_a_chat_takes_over_the_first_one_and_its_answer():
    model = tables(num_speculative_tokens=0)
    first = told(model, SYSTEM, max_tokens=8)
    second = told(model, [*SYSTEM, *first.tokens, 3, 3])
    assert second.cached_tokens == 30 + 7  # the newest token of an answer is not read


def test_the_last_token_of_a_prompt_is_always_read():
    model = tables()
    first = told(model, SYSTEM)
    again = told(model, SYSTEM)
    assert (first.cached_tokens, again.cached_tokens) == (0, 29)
    assert again.tokens == first.tokens


@pytest.mark.parametrize("length", [0, 3])
def test_answers_are_the_same_to_the_bit_on_tables(length):
    """Requests of several lineups over one store, in an engine that they join at any step, against fresh ones alone."""
    base = AlignedModel(PROPOSAL, eos_token_ids=[EOS], num_speculative_tokens=length)
    draw = random.Random(7)
    shared, engine, asked = Prefixes(300), None, []
    engine = Engine(base.proposal, base.pace, max_num_seqs=4, max_num_batched_tokens=9, prefixes=shared)
    for i in range(60):
        model = base.with_aligners(TABLES[: i % 3])
        prompt = [*SYSTEM[: draw.choice([10, 20, 30])], *[1 + i % 6] * (1 + i % 5), *draw.choice([[], SYSTEM])]
        params = SamplingParams(seed=i, max_tokens=1 + i % 9, n=1 + i % 2, logprobs=i % 4 == 0)
        group = model.prepare(prompt, params)
        engine.submit(group)
        asked.append((model, prompt, params, group))
        for _ in range(draw.randrange(4)):
            engine.step()
    while engine:
        engine.step()
    assert sum(group[0].cached_tokens > 0 for *_, group in asked) > 20
    assert shared.num_tokens <= 300
    for model, prompt, params, group in asked:
        fresh = model.with_prefix_cache(0).generate([prompt], params)
        assert [s.tokens for s in group] == [one.tokens for one in fresh]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_real_passes_give_the_rows_of_prompts_that_were_read_whole(kind):
    proposal, aligner = (HuggingFaceLM(tiny_model(kind, seed=seed), owned=True) for seed in (0, 1))
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], num_speculative_tokens=2)
    params = SamplingParams(seed=3, max_tokens=8, logprobs=True, ignore_eos=True)
    prompts = [[*SYSTEM[:24], *tail] for tail in ([1], [2, 3], [4, 5, 1], SYSTEM)]
    kept = [model.generate([prompt], params)[0] for prompt in prompts]
    whole = model.with_prefix_cache(0).generate(prompts, params)
    assert model.prefixes.num_tokens > 0
    for one, other in zip(kept, whole, strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(one.logprobs.aligned), torch.tensor(other.logprobs.aligned), atol=3e-5, rtol=0)


def test_a_stop_inside_an_accepted_run_leaves_what_was_said_and_no_more():
    """Drafts behind the stop were read, too; they are no part of the text that is kept."""
    model = AlignedModel(PROPOSAL, [PROPOSAL], eos_token_ids=[EOS], num_speculative_tokens=3, draft=PROPOSAL)
    free = told(model.with_prefix_cache(0), SYSTEM, max_tokens=12)
    for at in range(2, 9):
        stopping = model.with_prefix_cache(1000)
        first = told(stopping, SYSTEM, stop_token_ids=[free.tokens[at]], max_tokens=12)
        prompt = [*SYSTEM, *first.tokens, 5]
        again = told(stopping, prompt)
        assert again.cached_tokens >= len(prompt) - 3
        assert again.tokens == told(model.with_prefix_cache(0), prompt).tokens


def test_what_other_models_have_read_is_of_no_use():
    base = AlignedModel(PROPOSAL, eos_token_ids=[EOS])
    told(base.with_aligners(TABLES[:1]), SYSTEM)
    assert told(base.with_aligners(TABLES[1:2]), SYSTEM).cached_tokens == 0
    assert told(base.with_aligners(TABLES[:2]), SYSTEM).cached_tokens == 0
    assert told(base, SYSTEM).cached_tokens == 0
    assert told(base.with_aligners(TABLES[:1]), SYSTEM).cached_tokens == 29


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("prefixes") / "base")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_drafter_that_is_behind_decides_how_much_is_kept(temperature):
    draft = TableLM(PROPOSAL.table + TABLES[0].table)  # all of its drafts are accepted
    model = AlignedModel(PROPOSAL, TABLES[:1], eos_token_ids=[EOS], draft=draft, num_speculative_tokens=3)
    for i in range(6):
        settings = {"seed": i, "max_tokens": 9, "temperature": temperature}
        first = told(model, [i % 6, *SYSTEM], **settings)
        prompt = [i % 6, *SYSTEM, *first.tokens, 4, 2]
        again = told(model, prompt, **settings)
        assert again.cached_tokens >= len(prompt) - 5
        assert again.tokens == told(model.with_prefix_cache(0), prompt, **settings).tokens


def test_adapters_over_one_base_do_not_take_each_others_prefixes(base, tmp_path):
    for seed, name in enumerate(["red", "blue"]):
        save_lora(tmp_path / name, base, seed, r=3, target_modules=["q_proj", "v_proj"])
        tiny_tokenizer().save_pretrained(tmp_path / name)
    bare, loader = AlignedModel.from_pretrained(base), Loader(tiny_tokenizer(), dtype="auto", device=None)
    red, blue = (bare.with_aligners([loader.load(str(tmp_path / name)).model]) for name in ("red", "blue"))
    assert red.models.aligners == blue.models.aligners
    for model, cached in ((red, 0), (blue, 0), (red, 29), (blue, 29)):
        sequence = told(model, SYSTEM)
        assert sequence.cached_tokens == cached
        assert sequence.tokens == told(model.with_prefix_cache(0), SYSTEM).tokens
    gone = weakref.ref(red.aligners[0].adapter)
    del red, model, sequence, loader
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("tap", [0, 2])
def test_a_head_that_took_the_proposals_place_leaves_nothing_for_those_who_read_the_proposal(base, tmp_path, tap):
    model = AlignedModel.from_pretrained(base, save_head(tmp_path / "head", base, tap))
    told(model, SYSTEM)
    mixed = told(model, SYSTEM, weight=0.5)
    assert mixed.cached_tokens == 0
    assert mixed.tokens == told(model.with_prefix_cache(0), SYSTEM, weight=0.5).tokens
    told(model, [*SYSTEM, *SYSTEM])  # longer, but without the proposal's rows: it does not take the other's place
    for weight in (1.0, 0.5):  # what both have read serves either
        again = told(model, SYSTEM, weight=weight)
        assert again.cached_tokens == 29
        assert again.tokens == told(model.with_prefix_cache(0), SYSTEM, weight=weight).tokens


def test_models_that_were_lent_are_not_kept_for():
    """Their owner may train them between two requests."""
    lent = AlignedModel(HuggingFaceLM(tiny_model("llama")), eos_token_ids=[EOS])
    told(lent, SYSTEM)
    assert lent.prefixes.num_tokens == 0
    assert told(lent, SYSTEM).cached_tokens == 0


def test_the_least_recently_used_goes_first_and_a_longer_text_replaces_what_it_begins_with():
    model = tables(prefix_cache_tokens=70)
    texts = [[start, *SYSTEM] for start in range(3)]
    for text in texts[:2]:
        told(model, text, max_tokens=1)
    assert model.prefixes.num_tokens == 62
    told(model, texts[0], max_tokens=1)  # used again
    told(model, texts[2], max_tokens=1)
    assert [told(model.with_prefix_cache(0), text).cached_tokens for text in texts] == [0, 0, 0]
    assert [told(model, text, max_tokens=1).cached_tokens for text in (texts[0], texts[2])] == [30, 30]
    told(model, [*texts[2], *SYSTEM], max_tokens=1)
    assert model.prefixes.num_tokens == 61  # and so the first one had to go
    assert told(model, texts[0], max_tokens=1).cached_tokens == 0


def test_nothing_longer_than_the_cache_or_hardly_worth_it_is_kept():
    model = tables(prefix_cache_tokens=20)
    told(model, SYSTEM)
    told(model, SYSTEM[: WORTHWHILE - 1], max_tokens=1)
    assert model.prefixes.num_tokens == 0


def test_what_failed_is_not_kept():
    table = PROPOSAL.table.clone()
    table[5, 0] = float("nan")
    model = AlignedModel(TableLM(table), eos_token_ids=[EOS])
    sequence = told(model, [*SYSTEM[:23], 5, 0])
    assert sequence.finish_reason == "error"
    assert model.prefixes.num_tokens == 0


def test_models_and_adapters_are_not_kept_alive():
    model = AlignedModel(PROPOSAL, [TableLM.random(V, order=2, seed=9)], eos_token_ids=[EOS])
    store, gone = model.prefixes, weakref.ref(model.aligners[0])
    told(model, SYSTEM)
    assert store.num_tokens > 0
    del model
    gc.collect()
    assert gone() is None
    assert store.num_tokens == 0  # nobody can come for it any more


def test_kept_prefixes_make_room_for_requests_and_stay_within_the_limit():
    proposal = HuggingFaceLM(tiny_model("llama"), owned=True)
    model = AlignedModel(proposal, eos_token_ids=[EOS])
    one = proposal.state_bytes(1, 40)
    engine = Engine(proposal, model.pace, max_cache_bytes=4 * one, prefixes=model.prefixes)
    params = SamplingParams(seed=0, max_tokens=4, ignore_eos=True)
    for i in range(4):
        group = model.prepare([i, *SYSTEM], params)
        engine.submit(group)
        while engine:
            engine.step()
            assert model.prefixes.num_bytes <= 4 * one
        assert group[0].finish_reason == "length"
    assert model.prefixes.num_bytes > 0
    long = model.prepare([1, 2, 3] * 20, params)
    engine.submit(long)
    while engine:
        engine.step()
    assert long[0].finish_reason == "length"


def test_no_memory_for_a_prefix_costs_nobody_an_answer(caplog):
    class Full(TableLM):
        def new_state(self, slots, capacity):
            if slots == 1 and capacity == 35:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return super().new_state(slots, capacity)

    model = AlignedModel(Full(PROPOSAL.table), eos_token_ids=[EOS])
    assert told(model, SYSTEM).finish_reason == "length"
    assert model.prefixes.num_tokens == 0
    assert "a prefix could not be kept" in caplog.text


def test_no_memory_to_take_a_prefix_over_costs_nobody_an_answer(caplog):
    class Full(TableLM):
        def select(self, state, rows):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    model = AlignedModel(PROPOSAL, [Full(TABLES[0].table)], eos_token_ids=[EOS])
    told(model, SYSTEM)
    again = told(model, SYSTEM)
    assert (again.finish_reason, again.cached_tokens) == ("length", 0)
    assert again.tokens == told(model.with_prefix_cache(0), SYSTEM).tokens
    assert "a prefix could not be taken over" in caplog.text


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "many"])
def test_a_size_that_cannot_be_is_refused(wrong):
    with pytest.raises(InvalidOption, match="prefix_cache_tokens must be an integer of at least 0"):
        AlignedModel(PROPOSAL, prefix_cache_tokens=wrong)
