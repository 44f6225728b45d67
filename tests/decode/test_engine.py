"""The engine: who runs when, and that it changes nothing about what anybody gets."""

import dataclasses
import math
import random
from collections.abc import Sequence

import pytest
import torch

from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams, TokenEvent
from trimtab.core.noise import uniforms
from trimtab.decode.engine import Engine
from trimtab.decode.sequence import Sequence as Growing
from trimtab.errors import DeadRow, InvalidOption, InvalidRequest
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM

V = 7
MODEL = AlignedModel(
    TableLM.random(V, order=2, seed=0), [TableLM.random(V, order=2, seed=1)], eos_token_ids=[EOS], num_speculative_tokens=3
)


def sequences(prompt: list[int], model: AlignedModel = MODEL, **settings: object) -> list[Growing]:
    params = SamplingParams(**({"ignore_eos": True, "seed": 0} | settings))  # type: ignore[arg-type]
    return model.prepare(prompt, params)


def engine(model: AlignedModel = MODEL, **settings: int) -> Engine:
    return Engine(model.proposal, model.pace, **settings)


def finish(running: Engine) -> list[TokenEvent]:
    events = []
    while running:
        events += running.step()
    return events


def texts(done: Sequence[Growing]) -> list[list[int]]:
    return [s.tokens for s in done]


def alone(prompt: list[int], **settings: object) -> list[list[int]]:
    group = sequences(prompt, **settings)
    one = engine()
    one.submit(group)
    finish(one)
    return texts(group)


@pytest.mark.parametrize(("limits", "moves"), [((5, 5, 5, 5), 0), ((5, 9, 9, 5), 1), ((5, 5, 9, 9), 2), ((9, 9, 5, 5), 0)])
def test_only_who_stays_moves_into_a_slot_that_is_given_up(limits, moves):
    """Of each model; what ends in the same step is not copied first."""
    models = [TableLM.random(V, order=2, seed=seed) for seed in (0, 1)]
    moved = [0, 0]
    for i, model in enumerate(models):
        copy = model.copy

        def counted(source, slots, target, to, i=i, copy=copy):
            moved[i] += source is target
            copy(source, slots, target, to)

        model.copy = counted
    pair = AlignedModel(models[0], models[1:], eos_token_ids=[EOS], num_speculative_tokens=0, prefix_cache_tokens=0)
    params = [SamplingParams(max_tokens=limit, seed=0, ignore_eos=True) for limit in limits]
    assert [len(one.tokens) for one in pair.generate([[1, 2]] * 4, params)] == list(limits)
    assert moved == [moves, moves]


def test_requests_that_join_and_leave_at_any_step_get_what_they_get_alone():
    draw = random.Random(5)
    wanted = [([1 + i % 6] * (1 + i % 9), {"seed": i, "max_tokens": 1 + draw.randrange(20), "n": 1 + i % 3}) for i in range(30)]
    groups = [sequences(prompt, **settings) for prompt, settings in wanted]
    running = engine(max_num_seqs=5, max_num_batched_tokens=6)
    waiting = list(groups)
    while waiting or running:
        for _ in range(draw.randrange(4)):
            if waiting:
                running.submit(waiting.pop(0))
        running.step()
        assert running.running <= 5
    for (prompt, settings), group in zip(wanted, groups, strict=True):
        assert texts(group) == alone(prompt, **settings)


def test_cancelled_requests_free_their_slots_and_disturb_nobody():
    draw = random.Random(6)
    groups = [sequences([1 + i % 6] * (1 + i % 5), seed=i, max_tokens=25, n=2) for i in range(12)]
    running = engine(max_num_seqs=6, max_num_batched_tokens=3)
    for group in groups:
        running.submit(group)
    gone: list[Growing] = []
    while running:
        running.step()
        if len(gone) < 8:
            victim = draw.choice([s for group in groups for s in group if s not in gone and not s.finish_reason])
            before = len(running)
            running.cancel([victim])
            assert len(running) == before - 1
            gone.append(victim)
    for i, group in enumerate(groups):
        expected = alone([1 + i % 6] * (1 + i % 5), seed=i, max_tokens=25, n=2)
        for sequence, tokens in zip(group, expected, strict=True):
            if sequence in gone:
                assert sequence.tokens == tokens[: len(sequence.tokens)]
                assert sequence.finish_reason is None
            else:
                assert sequence.tokens == tokens
    running.cancel(gone)  # nobody is there: nothing happens
    assert len(running) == 0


def test_waiting_requests_are_admitted_in_their_order():
    running = engine(max_num_seqs=2)
    groups = [sequences([1], seed=i, max_tokens=3 + i) for i in range(6)]
    for group in groups:
        running.submit(group)
    first: list[int] = []
    while running:
        running.step()
        first += [i for i, (s,) in enumerate(groups) if s.tokens and i not in first]
        assert running.waiting <= 4
    assert first == list(range(6))


def test_a_long_prompt_does_not_hold_up_the_others():
    """While 200 tokens are read eight at a time, a short request arrives, is read, and decodes to its end."""
    running = engine(max_num_batched_tokens=8)
    (early,), (long,), (late,) = (sequences(p, max_tokens=m) for p, m in (([1, 2], 60), ([3] * 200, 4), ([4, 5, 6], 10)))
    running.submit([early])
    running.step()
    running.submit([long])
    running.step()
    running.submit([late])
    while not late.finish_reason:
        before = len(early.tokens)
        running.step()
        assert len(early.tokens) > before, "who decodes goes on at every step"
    assert long.tokens == []
    finish(running)
    assert [long.tokens] == alone([3] * 200, max_tokens=4)


def test_completions_of_a_request_read_their_prompt_once():
    """The proposal sees the prompt's tokens once, however many completions wait for a slot."""
    read = []

    class Counting(TableLM):
        def prefill(self, state, tokens, counts):
            read.append(sum(counts))
            return super().prefill(state, tokens, counts)

    counting = AlignedModel(Counting(MODEL.proposal.table), MODEL.aligners, num_speculative_tokens=2)
    group = sequences([1, 2, 3, 4, 5], counting, n=7, max_tokens=9)
    running = engine(counting, max_num_seqs=3)
    running.submit(group)
    finish(running)
    assert sum(read) == 5
    assert texts(group) == alone([1, 2, 3, 4, 5], n=7, max_tokens=9)


def test_the_cache_stays_within_its_budget_and_a_long_request_means_fewer_at_a_time():
    running = engine(max_num_seqs=8, max_cache_tokens=40)
    groups = [sequences([1], seed=i, max_tokens=9) for i in range(6)] + [sequences([2] * 20, max_tokens=20)]
    for group in groups:
        running.submit(group)
    widest = 0
    while running:
        running.step()
        slots, capacity = running._batch.size
        assert slots * capacity <= 40
        widest = max(widest, running.running)
    assert widest == 4
    assert texts([s for (s,) in groups]) == [alone([1], seed=i, max_tokens=9)[0] for i in range(6)] + alone(
        [2] * 20, max_tokens=20
    )


def test_what_can_never_be_admitted_is_refused_and_nothing_is_queued():
    running = engine(max_cache_tokens=10)
    with pytest.raises(InvalidRequest, match="need 12 tokens, but the cache holds 10"):
        running.submit([*sequences([1], max_tokens=3), *sequences([1, 2], max_tokens=10)])
    assert not running
    with pytest.raises(InvalidOption, match="max_num_batched_tokens must be at least 1"):
        engine(max_num_batched_tokens=0)


def test_float32_models_do_not_notice_their_neighbours():
    pair = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(2)]
    model = AlignedModel.from_pretrained(*pair, tokenizer=tiny_tokenizer())
    wanted = [("abc", 12), ("the lazy dog jumps", 20), ("z", 5), ("quick", 16), ("brown fox", 9)]
    params = [SamplingParams(seed=i, max_tokens=m, ignore_eos=True, n=2) for i, (_, m) in enumerate(wanted)]
    expected = [[c.tokens for c in model.generate(text, p)] for (text, _), p in zip(wanted, params, strict=True)]
    running = Engine(model.proposal, model.pace, max_num_seqs=3, max_num_batched_tokens=4)
    groups = [model.prepare(text, p, i) for i, ((text, _), p) in enumerate(zip(wanted, params, strict=True))]
    for group in groups:
        running.submit(group)
        running.step()
    finish(running)
    assert [texts(group) for group in groups] == expected


def test_a_stream_that_is_closed_stops_the_work():
    calls = []

    class Counting(TableLM):
        def extend(self, state, tokens, counts):
            calls.append(1)
            return super().extend(state, tokens, counts)

    stream = AlignedModel(Counting(MODEL.proposal.table)).stream([[1]], SamplingParams(max_tokens=50, seed=0))
    next(stream)
    done = len(calls)
    stream.close()
    assert len(calls) == done == 1


def test_sampling_parameters_of_a_finished_request_do_not_linger():
    """A penalty, a bias and a gate leave with their request."""
    odd = {"repetition_penalty": 4.0, "logit_bias": {2: 3.0}, "rule": "kl_gate(tau=0.2)", "logprobs": True}
    (plain,), (other,) = sequences([1], max_tokens=30), sequences([1], max_tokens=4, **odd)
    running = engine()
    running.submit([other, plain])
    finish(running)
    assert [plain.tokens] == alone([1], max_tokens=30)
    assert dataclasses.is_dataclass(other.params)


class Sick(TableLM):
    """NaN after a prefix that ends in 6, 6."""

    def row(self, prefix):
        return super().row(prefix) * (math.nan if list(prefix[-2:]) == [6, 6] else 1.0)


def test_what_goes_wrong_with_one_request_ends_that_one():
    """Its neighbours, before and after it in the batch, get every token that they get without it."""
    sick = AlignedModel(Sick(MODEL.proposal.table), MODEL.aligners, eos_token_ids=[EOS], num_speculative_tokens=3)
    forced = {"logit_bias": {6: 100.0}, "max_tokens": 20}
    groups = [sequences([1, 2], sick, seed=i, max_tokens=9 + i, logit_bias={6: -100.0}) for i in range(4)]
    groups.insert(2, sequences([3], sick, **forced))
    running = engine(sick)
    for group in groups:
        running.submit(group)
    events = []
    while running:
        events += running.step()
        assert running.failed == []
    (ended,) = (event for event in events if event.finish_reason == "error")
    assert (ended.token, ended.completion.tokens, groups[2][0].tokens) == (None, [6, 6], [6, 6])
    assert ended.completion.error.startswith("the proposal gives NaN probabilities after 2 tokens")
    for i, ((sequence,), seed) in enumerate((g, s) for g, s in zip(groups[:2] + groups[3:], range(4), strict=True)):
        expected = alone([1, 2], seed=seed, max_tokens=9 + seed, logit_bias={6: -100.0})
        assert [sequence.tokens] == expected, i
    assert sum(event.token == 6 for event in events) == 2


def test_when_the_machine_fails_those_at_work_are_told_and_the_rest_go_on():
    class Failing(TableLM):
        broken = 0

        def extend(self, state, tokens, counts):
            Failing.broken -= 1
            if Failing.broken == 0:
                raise RuntimeError("out of memory")
            return super().extend(state, tokens, counts)

    model = AlignedModel(Failing(MODEL.proposal.table), eos_token_ids=[EOS])
    groups = [sequences([1 + i], model, seed=i, max_tokens=10) for i in range(5)]
    running = engine(model, max_num_seqs=2)
    for group in groups:
        running.submit(group)
    Failing.broken = 3
    with pytest.raises(RuntimeError, match="out of memory"):
        finish(running)
    assert running.failed == [groups[0][0], groups[1][0]]
    assert len(running) == 3
    finish(running)
    expected = AlignedModel(MODEL.proposal, eos_token_ids=[EOS])
    for i in (2, 3, 4):
        again = expected.generate([[1 + i]], SamplingParams(seed=i, max_tokens=10, ignore_eos=True))
        assert groups[i][0].tokens == again[0].tokens


def test_many_candidates_do_not_weigh_on_their_neighbours(monkeypatch):
    """The noise of a request with thousands of candidates is drawn for it alone, one position at a time."""
    asked = []

    def counting(seeds, indices, starts, length, draws, device="cpu"):
        asked.append(len(seeds) * length * draws)
        return uniforms(seeds, indices, starts, length, draws, device)

    monkeypatch.setattr("trimtab.decode.speculative.uniforms", counting)
    running = engine()
    running.submit([*sequences([1], max_tokens=5, n=8), *sequences([2], max_tokens=3, rule="candidates(n=5000)")])
    finish(running)
    assert max(asked) == 5001


def test_cancelling_works_on_models_with_buffers():
    """What is made in `step` is changed in `cancel`, which is called outside of it: the last slot moves into the hole."""
    pair = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(2)]
    model = AlignedModel.from_pretrained(*pair, tokenizer=tiny_tokenizer())
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=4, n=3)
    expected = [c.tokens for c in model.generate("abc", params)]
    running, group = Engine(model.proposal, model.pace), model.prepare("abc", params)
    running.submit(group)
    running.step()
    running.cancel(group[:1])
    finish(running)
    assert texts(group)[1:] == expected[1:]


@pytest.mark.parametrize("where", ["new_state", "copy"])
def test_nobody_is_lost_when_the_machine_fails_between_two_places(where, monkeypatch):
    group = sequences([1, 2, 3], n=2, max_tokens=5)
    running = engine()
    running.submit(group)

    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TableLM, where, failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        running.step()
    assert running.failed == group
    assert len(running) == 0


def test_a_failure_while_the_finished_leave_is_told_to_all_who_lost_tokens(monkeypatch):
    """A slot cannot be moved: nobody keeps a text with a hole in it."""
    groups = [sequences([1 + i], seed=i, max_tokens=3 + i) for i in range(3)]
    running = engine()
    running.submit([s for group in groups for s in group])
    copy = TableLM.copy

    def failing(self, source, slots, target, to):
        if source is target:
            raise RuntimeError("out of memory")
        copy(self, source, slots, target, to)

    monkeypatch.setattr(TableLM, "copy", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        finish(running)
    assert sorted(s.seed for s in running.failed) == [0, 1, 2]
    assert len(running) == 0


def test_who_has_read_its_prompt_costs_the_others_nothing():
    """Thirty short prompts and a long one are admitted together: the long one is read in passes of its own."""
    passes = []

    class Counting(TableLM):
        def prefill(self, state, tokens, counts):
            passes.append(tokens.numel())
            return super().prefill(state, tokens, counts)

    model = AlignedModel(Counting(MODEL.proposal.table), eos_token_ids=[EOS])
    short = [s for i in range(30) for s in sequences([1, 2, 3], model, seed=i, max_tokens=2)]
    (long,) = sequences([4] * 400, model, max_tokens=2)
    running = Engine(model.proposal, model.pace, max_num_batched_tokens=64)
    running.submit([*short, long])
    finish(running)
    assert max(passes) <= 2 * 64
    assert sum(passes) <= 400 + 30 * 3 + 2 * 64
    assert long.tokens == model.generate([[4] * 400], SamplingParams(ignore_eos=True, seed=0, max_tokens=2))[0].tokens


@pytest.mark.parametrize("draft", ["none", "aligner", "ngram"])
def test_the_pass_that_reads_a_prompt_gives_the_first_token(draft):
    """A request alone has its first token before anything is decoded, and each later one takes a pass of the proposal."""
    passes = []

    class Counting(TableLM):
        def extend(self, state, tokens, counts):
            passes.append(sum(counts))
            return super().extend(state, tokens, counts)

        def prefill(self, state, tokens, counts):
            rows = super().prefill(state, tokens, counts)
            passes.pop()  # the extend that this one is
            return rows

    settings = {"eos_token_ids": [EOS], "draft": draft}
    model = AlignedModel(Counting(MODEL.proposal.table), MODEL.aligners, num_speculative_tokens=0, **settings)
    (one,) = sequences([1, 2, 3], model, max_tokens=5)
    running = engine(model)
    running.submit([one])
    (event,) = running.step()
    assert (event.token, event.index, passes) == (one.tokens[0], 0, [])
    finish(running)
    assert passes == [1] * 4
    speculative = AlignedModel(MODEL.proposal, MODEL.aligners, num_speculative_tokens=3, **settings)
    assert one.tokens == speculative.generate([1, 2, 3], one.params)[0].tokens


def test_a_failure_loses_nobody_who_ends_with_the_first_token(monkeypatch):
    """One prompt is answered by one token; the state of another cannot be taken over: the first has its answer."""
    other = MODEL.with_aligners([TableLM.random(V, order=2, seed=2)])
    (short,), (sick,) = sequences([1], max_tokens=1), sequences([6], other, max_tokens=2)

    def failing(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(TableLM, "copy", failing)
    running = engine()
    running.submit([short, sick])
    (event,) = running.step()
    assert event.completion is not None
    assert event.completion.tokens == short.tokens
    assert (running.failed, len(running)) == ([sick], 0)


def test_who_has_read_its_prompt_is_spared_when_another_pass_fails():
    class Failing(TableLM):
        def prefill(self, state, tokens, counts):
            raise RuntimeError("out of memory")

    sick = MODEL.with_aligners([Failing(MODEL.proposal.table)])
    (well,), (lost,) = sequences([1, 2], max_tokens=4), sequences([3], sick, max_tokens=4)
    running = engine()
    running.submit([well, lost])
    running.step()
    assert running.failed == [lost]
    finish(running)
    assert [well.tokens] == alone([1, 2], max_tokens=4)


@pytest.mark.parametrize(("longer_than", "max_tokens"), [(2, 1), (-1, 5)], ids=["decoding", "reading and decoding"])
def test_nobody_is_forgotten_where_a_step_fails(longer_than, max_tokens):
    """Nor who has its whole answer from a pass of that step, nor who had failed in it before."""

    class Failing(TableLM):
        def extend(self, state, tokens, counts):
            if broken and max(state.lengths) > longer_than:
                raise RuntimeError("out of memory")
            return super().extend(state, tokens, counts)

    broken: list[bool] = []
    model = AlignedModel(Failing(MODEL.proposal.table), eos_token_ids=[EOS])
    (old,), (new,) = sequences([1, 2, 3], model, max_tokens=5), sequences([1], model, max_tokens=max_tokens)
    running = engine(model)
    running.submit([old])
    running.step()
    running.submit([new])
    broken.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        running.step()
    assert set(running.failed) == {old, new}
    assert len(running) == 0


def test_a_prompt_whose_readers_are_gone_is_not_kept():
    running = engine(max_num_batched_tokens=4)
    group = sequences([1] * 50, max_tokens=3)
    running.submit(group)
    running.step()
    running.cancel(group)
    assert not running
    assert not running._reading


def test_the_budget_of_a_step_holds_across_all_that_read():
    """Slots that are given up must not look like tokens that were not read."""
    passes = []

    class Counting(TableLM):
        def prefill(self, state, tokens, counts):
            passes.append(sum(counts))
            return super().prefill(state, tokens, counts)

    model = AlignedModel(Counting(MODEL.proposal.table), eos_token_ids=[EOS])
    lineups = [model, *(model.with_aligners([TableLM.random(V, seed=seed)]) for seed in range(3))]
    running = Engine(model.proposal, model.pace, max_num_batched_tokens=40)
    groups = [sequences([1 + i % 6] * (5 + 37 * (i % 3)), lineups[i % 4], seed=i, max_tokens=2) for i in range(16)]
    running.submit([s for group in groups for s in group])
    while running:
        passes.clear()
        running.step()
        assert sum(passes) <= 40 + 16, "a token more for each prompt where the budget is less than there are prompts"
    assert all(group[0].finish_reason for group in groups)


def test_what_a_sick_request_leaves_in_its_slot_is_nobodys():
    """Zero weight times NaN is NaN: a masked column of a slot that somebody longer stretches must hold numbers."""
    sick = 31
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    for one in models:
        one.get_input_embeddings().weight.data[sick] = math.nan
    model = AlignedModel(HuggingFaceLM(models[0]), [HuggingFaceLM(models[1])], eos_token_ids=[EOS])

    def run(prompts: list[list[int]], tokens: list[int], slots: int) -> list[Growing]:
        running = Engine(model.proposal, model.pace, max_num_seqs=slots)
        asked = [sequences(p, model, max_tokens=n, logit_bias={sick: -100})[0] for p, n in zip(prompts, tokens, strict=True)]
        running.submit(asked)
        finish(running)
        return asked

    healthy = [3, 4]
    _, dead, after = run([[5] * 30, [6] * 20 + [sick] + [7] * 4, healthy], [30, 30, 20], slots=2)
    assert isinstance(dead.error, DeadRow)
    assert after.error is None
    assert after.tokens == run([healthy], [20], slots=1)[0].tokens


def test_what_failed_leaves_no_nan_where_a_newcomer_will_be():
    """Two that fail in one step, while a group has its sequences in another order than the batch: A1, then B1, A2 and A3.

    When B1 leaves, A3 takes its place in the batch, and none in the group.
    """
    bad = 9
    module = tiny_model("llama", 32, seed=1)
    with torch.no_grad():
        module.get_input_embeddings().weight[bad] = math.nan
    models = [TableLM.random(32, order=2, seed=0), HuggingFaceLM(module), TableLM.random(32, order=2, seed=3)]
    base = AlignedModel(models[0], [], eos_token_ids=[EOS], num_speculative_tokens=0, prefix_cache_tokens=0)
    ours, other = (base.with_aligners([model]) for model in models[1:])

    def ask(model: AlignedModel, prompt: list[int], **settings: object) -> Growing:
        return sequences(prompt, model, **settings)[0]

    def run(model: AlignedModel, prompt: list[int], **settings: object) -> Growing:
        one = ask(model, prompt, **settings)
        running = engine(base)
        running.submit([one])
        finish(running)
        return one

    failing = next(s for s in range(500) if 6 < len(run(ours, [4, 5], seed=s, max_tokens=30).tokens) < 14)
    fine = next(s for s in range(500) if run(ours, [6, 7], seed=s, max_tokens=12).error is None)
    long = next(s for s in range(2000) if run(ours, [3, 4, 5] * 6, seed=s, max_tokens=40).error is None)
    running = engine(base, max_num_seqs=8)
    first, short = ask(ours, [3, 4, 5] * 6, seed=long, max_tokens=40), ask(other, [4, 5], seed=1, max_tokens=5)
    running.submit([first, short])
    running.step()
    failed = [ask(ours, [4, 5], seed=failing, max_tokens=30) for _ in range(2)]
    running.submit(failed)
    while not all(one.finish_reason for one in failed):
        running.step()
    assert [one.finish_reason for one in failed] == ["error", "error"]
    newcomers = [ask(ours, [6, 7], seed=fine, max_tokens=12) for _ in range(2)]
    running.submit(newcomers)
    finish(running)
    expected = run(ours, [6, 7], seed=fine, max_tokens=12).tokens
    assert [(one.error, one.tokens) for one in newcomers] == [(None, expected)] * 2
    assert first.error is None
