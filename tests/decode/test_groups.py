"""One engine, many aligners: requests of any models share the proposal's passes, and nobody notices."""

import gc
import math
import random
import weakref

import pytest
import torch

from statistics_of import fits
from tiny import EOS, save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import parse_rule
from trimtab.decode.engine import Engine
from trimtab.decode.sequence import Sequence
from trimtab.models.adapters import AdapterPool
from trimtab.models.loading import load_model
from trimtab.models.table import TableLM, enumerate_sequences

V = 7
PROPOSAL, *TABLES = [TableLM.random(V, order=2, seed=seed) for seed in range(5)]
LINEUPS = [[], TABLES[:1], TABLES[1:2], TABLES[:2], TABLES[2:3]]


def bare(**settings) -> AlignedModel:
    return AlignedModel(PROPOSAL, eos_token_ids=[EOS], **settings)


def engine_of(model: AlignedModel, **settings) -> Engine:
    return Engine(model.proposal, model.pace, **settings)


def finish(engine: Engine, *groups: list[Sequence]) -> list[list[list[int]]]:
    while engine:
        engine.step()
        assert engine.failed == []
    return [[s.tokens for s in group] for group in groups]


@pytest.mark.parametrize("length", [0, 3, None])
@pytest.mark.parametrize("draft", [None, "ngram", TABLES[3]], ids=["aligner", "ngram", "model"])
def test_requests_of_any_aligners_get_what_they_get_alone(draft, length):
    base = bare(draft=draft, num_speculative_tokens=length)
    draw = random.Random(3)
    asked = []
    for i in range(40):
        rule = draw.choice(["product", "geometric", "nucleus", "kl_gate(tau=0.5)"])
        params = SamplingParams(
            seed=i, max_tokens=1 + i % 13, n=1 + i % 2, rule=rule, logprobs=i % 3 == 0, ignore_eos=i % 2 == 0
        )
        asked.append((base.with_aligners(LINEUPS[i % len(LINEUPS)]), [1 + i % 6] * (1 + i % 5), params))
    engine, groups = engine_of(base, max_num_seqs=7, max_num_batched_tokens=5), []
    for model, prompt, params in asked:
        groups.append(model.prepare(prompt, params, len(groups)))
        engine.submit(groups[-1])
        for _ in range(draw.randrange(3)):
            engine.step()
    together = finish(engine, *groups)
    for (model, prompt, params), tokens in zip(asked, together, strict=True):
        assert tokens == [c.tokens for c in model.with_draft_length(2).generate([prompt], params)]


def test_bare_and_aligned_requests_share_every_pass_of_the_proposal():
    passes = []

    class Counting(TableLM):
        def extend(self, state, tokens, counts):
            passes.append(len(counts))
            return super().extend(state, tokens, counts)

    base = AlignedModel(Counting(PROPOSAL.table), eos_token_ids=[EOS], num_speculative_tokens=0)
    engine = engine_of(base)
    params = SamplingParams(max_tokens=6, ignore_eos=True, seed=0)
    groups = [base.with_aligners(lineup).prepare([1, 2], params, i) for i, lineup in enumerate(LINEUPS)]
    engine.submit([s for group in groups for s in group])
    finish(engine, *groups)
    assert passes[len(LINEUPS) :] == [len(LINEUPS)] * 5, "after a pass for each prompt, which gives the first token"


def test_each_aligner_keeps_its_law_in_a_mixed_batch():
    base = bare(num_speculative_tokens=2, max_num_seqs=800)
    engine = engine_of(base, max_num_seqs=800)
    params = SamplingParams(max_tokens=2, n=3000, seed=1)
    groups = [base.with_aligners(lineup).prepare([3], params, i) for i, lineup in enumerate(LINEUPS)]
    engine.submit([s for group in groups for s in group])
    samples = finish(engine, *groups)
    for lineup, drawn in zip(LINEUPS, samples, strict=True):
        law = enumerate_sequences(
            lambda prefix, lineup=lineup: parse_rule("product")(
                PROPOSAL.row(prefix), [q.row(prefix) for q in lineup], [1.0] * len(lineup)
            ),
            [3],
            2,
            [EOS],
        )
        assert fits(map(tuple, drawn), law) > 1e-3


def test_an_aligner_that_nobody_uses_any_more_is_let_go():
    base = bare()
    engine = engine_of(base)
    passing = TableLM(TABLES[0].table)
    gone = weakref.ref(passing)
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=0)
    staying, leaving = base.prepare([1], params, 0), base.with_aligners([passing]).prepare([2], params, 1)
    engine.submit([*staying, *leaving])
    del passing
    engine.step()
    assert gone() is not None, "who is at work keeps its models"
    engine.cancel(leaving)
    del leaving
    gc.collect()
    assert gone() is None
    assert finish(engine, staying) == [[c.tokens for c in base.generate([[1]], params)]]


def test_a_sick_aligner_ends_its_own_requests_alone():
    sick = TableLM(TABLES[0].table * math.nan)
    base = bare()
    engine = engine_of(base)
    params = SamplingParams(max_tokens=9, ignore_eos=True, seed=0)
    groups = [base.with_aligners(lineup).prepare([1], params, i) for i, lineup in enumerate(([sick], TABLES[:1], []))]
    engine.submit([s for group in groups for s in group])
    finish(engine)
    assert [group[0].finish_reason for group in groups] == ["error", "length", "length"]
    assert "aligner 0 gives NaN" in str(groups[0][0].error)
    for lineup, group in zip((TABLES[:1], []), groups[1:], strict=True):
        assert group[0].tokens == base.with_aligners(lineup).generate([[1]], params)[0].tokens


def test_first_tokens_do_not_wait_for_drafts():
    for length in (None, 3):
        model = bare(num_speculative_tokens=length).with_aligners(TABLES[:1])
        engine = engine_of(model)
        group = model.prepare([1], SamplingParams(max_tokens=9, ignore_eos=True, seed=0))
        engine.submit(group)
        engine.step()
        assert (group[0].tally.tokens, group[0].tally.drafted) == (1, 0)


def test_log_z_is_the_mass_that_the_rule_divides_by():
    base = bare(num_speculative_tokens=3)
    for rule, weights in (("product", [0.7]), ("geometric", [0.3]), ("nucleus", [1.0])):
        model = base.with_aligners(TABLES[:1])
        engine = Engine(model.proposal, model.pace, log_z_every=1)
        (sequence,) = model.prepare([1, 2], SamplingParams(max_tokens=12, ignore_eos=True, seed=4, rule=rule, weight=weights))
        engine.submit([sequence])
        before = []
        while engine:
            before.append([1, 2, *sequence.tokens])
            engine.step()
        expected = []
        for prefix in before:
            p, q = PROPOSAL.row(prefix), TABLES[0].row(prefix)
            share = {"product": (1.0, 0.7), "geometric": (0.7, 0.3), "nucleus": (0.0, 1.0)}[rule]
            expected.append(float((share[0] * p + share[1] * q).logsumexp(-1)))
        assert sequence.log_z == pytest.approx(expected, abs=1e-9)
    (gated,) = base.with_aligners(TABLES[:1]).prepare([1], SamplingParams(max_tokens=3, seed=0, rule="kl_gate"))
    engine = Engine(base.proposal, base.pace, log_z_every=1)
    engine.submit([gated])
    finish(engine, [gated])
    assert gated.log_z == [], "the gate has none"


def test_log_z_of_an_anti_expert_counts_what_it_cannot_say():
    """q = (.5, .5, 0, …) and λ = −1: every token has the factor 1/.5 = 2, so Z is 2, and the row is the proposal's."""
    halves = torch.tensor([0.5, 0.5, *[0.0] * (V - 2)]).double().log()
    model = bare(num_speculative_tokens=0).with_aligners([TableLM(halves.expand(V + 1, V))])
    engine = Engine(model.proposal, model.pace, log_z_every=1)
    (sequence,) = model.prepare([1, 2], SamplingParams(max_tokens=6, ignore_eos=True, seed=4, weight=-1.0))
    engine.submit([sequence])
    finish(engine, [sequence])
    assert sequence.log_z == pytest.approx([math.log(2)] * 6)


@pytest.mark.parametrize("length", [0, 4])
def test_the_best_tokens_of_each_position_are_those_of_its_rows(length):
    model = bare(num_speculative_tokens=length).with_aligners(TABLES[:1])
    params = [SamplingParams(max_tokens=9, seed=i, logprobs=True, top_logprobs=i, ignore_eos=True) for i in (3, 0, 2)]
    prompts = [[1], [2], [3]]
    for prompt, out, p in zip(prompts, model.generate(prompts, params), params, strict=True):
        if not p.top_logprobs:
            assert out.logprobs.top_aligned is out.logprobs.top_proposal is None
            continue
        for i in range(len(out.tokens)):
            prefix = prompt + out.tokens[:i]
            rows = PROPOSAL.row(prefix), parse_rule("product")(PROPOSAL.row(prefix), [TABLES[0].row(prefix)], [1.0])
            for row, best in zip(rows, (out.logprobs.top_proposal[i], out.logprobs.top_aligned[i]), strict=True):
                values, ids = row.topk(p.top_logprobs)
                assert [token for token, _ in best] == ids.tolist()
                assert [value for _, value in best] == pytest.approx(values.tolist(), abs=1e-12)


def test_transformers_models_of_many_lineups_give_the_tokens_that_each_gives_alone():
    loaded = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(4)]
    models = [
        AlignedModel.from_pretrained(loaded[0], aligners, tokenizer=tiny_tokenizer())
        for aligners in ([], loaded[1:2], loaded[2:3], loaded[1:3])
    ]
    base = models[0]
    lineups = [base.with_aligners(model.aligners) for model in models]
    engine, groups = engine_of(base, max_num_seqs=6, max_num_batched_tokens=7), []
    for i in range(12):
        params = SamplingParams(seed=i, max_tokens=5 + i, ignore_eos=True)
        groups.append(lineups[i % 4].prepare("the quick brown fox"[: 3 + i], params, i))
        engine.submit(groups[-1])
        engine.step()
    for i, tokens in enumerate(finish(engine, *groups)):
        params = SamplingParams(seed=i, max_tokens=5 + i, ignore_eos=True)
        assert tokens == [lineups[i % 4].generate("the quick brown fox"[: 3 + i], params)[0].tokens]


def test_a_group_does_not_hold_the_adapter_of_a_request_that_is_gone(tmp_path):
    base_folder = save_tiny(tmp_path / "base", tiny_model("llama", 28, seed=3), tiny_tokenizer())
    folders = [save_lora(tmp_path / f"lora-{i}", base_folder, seed=i, target_modules="all-linear") for i in range(2)]
    pool = AdapterPool(load_model(base_folder))
    base = AlignedModel.from_pretrained(tiny_model("llama", 28, seed=0, spread=0.3), tokenizer=tiny_tokenizer())
    engine = engine_of(base)
    first, second = (pool.read(folder, str(i)) for i, folder in enumerate(folders))
    gone = weakref.ref(first.adapter)
    for i, (adapted, most) in enumerate(((first, 3), (second, 30))):
        params = SamplingParams(max_tokens=most, ignore_eos=True, seed=0)
        engine.submit(base.with_aligners([adapted]).prepare("abc", params, i))
    del first, adapted
    for _ in range(15):
        engine.step()
    gc.collect()
    assert len(engine) == 1
    assert gone() is None
