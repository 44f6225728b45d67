"""What vLLM draws with the plugin, against enumeration, and against our own engine."""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from brought import bring, look_again
from engines import CONTEXT, Job, Models, V, allow_scheduling_ahead, make_llm, run
from law_of import EOS, expected_law
from looking import LOOKING
from statistics_of import fits
from trimtab import AlignedModel
from trimtab import SamplingParams as Ours
from trimtab.core.rules import RULES as KNOWN

SEED = 1000

RULES = ["product", "geometric", "nucleus", "kl_gate(tau=1.0)", "mixture", "nudge(tau=0.6)"]


@pytest.fixture(scope="module", params=[False, True], ids=["scheduled in turn", "scheduled ahead"])
def llm(models: Models, request: pytest.FixtureRequest) -> Iterator[LLM]:
    """A cache that 32 requests overfill many times, and prompts that take several steps to read."""
    settings = {"num_gpu_blocks_override": 12, "block_size": 32, "max_num_batched_tokens": 48}
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            allow_scheduling_ahead(patch)
        llm = make_llm(models, enable_chunked_prefill=True, async_scheduling=request.param, **settings)
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is request.param
        yield llm


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that were preempted, as they are."""
    seen: list[str] = []
    theirs = Scheduler._preempt_request

    def preempt(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.request_id)
        return theirs(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    return seen


def embedded(models: Models, names: list[str], **settings: Any) -> AlignedModel:
    return AlignedModel.from_pretrained(models.proposal, [models.aligners[name] for name in names], dtype="float32", **settings)


ASKED: list[dict[str, Any]] = [
    {},
    {"aligner": "first"},
    {"aligner": "first", "weight": 0.4},
    {"aligner": "second", "rule": "geometric"},
    {"aligner": "second", "rule": "nucleus", "proposal_top_p": 0.9},
    {"aligner": "first", "rule": "kl_gate(tau=0.3)", "aligner_temperature": 1.5},
    {"aligner": ["first", "second"], "weight": [0.7, -0.3], "proposal_temperature": 0.8},
    {"aligner": "red"},
    {"aligner": "blue", "weight": 2.0},
    {"aligner": ["blue", "red"], "rule": "geometric"},
    {"aligner": ["second", "red"], "rule": "nucleus", "proposal_top_k": 4},
    {"aligner": ["first", "second"], "rule": "mixture", "weight": [0.3, 0.4]},
    {"aligner": "second", "rule": "gate(rule=mixture, by=entropy, tau=1.5)", "weight": 0.6},
    {"aligner": ["red", "blue"], "weight": [0.7, -0.5], "blend": "weights", "rule_weight": 1.5},
    {"aligner": ["blue", "red"], "weight": [0.4, 1.2], "blend": "weights", "rule": "geometric"},
]


def test_greedy_text_is_the_embedded_engines_under_preemption(llm, models, preemptions):
    chosen = random.Random(0)
    jobs, expected = [], []
    for i in range(64):
        asked = ASKED[i % len(ASKED)]
        prompt = [chosen.randrange(1, V) for _ in range(chosen.choice([1, 3, 20, 60]))]
        length = chosen.choice([5, 40, 60])
        params = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, extra_args=asked or None)
        leaves = chosen.randrange(5, 60) if i % 9 == 8 else None
        jobs.append(Job(prompt, params, arrives=chosen.randrange(0, 60), leaves=leaves))
    run(llm, jobs)
    assert len(preemptions) > 10, "the cache was meant to be too small"
    for asked in ASKED:
        names = [asked.get("aligner", [])] if isinstance(asked.get("aligner", []), str) else asked.get("aligner", [])
        rest = {name: value for name, value in asked.items() if name != "aligner"}
        of_these = [job for job in jobs if (job.params.extra_args or {}) == asked and job.leaves is None]
        settings = [Ours(max_tokens=job.params.max_tokens, temperature=0, ignore_eos=True, **rest) for job in of_these]
        outs = embedded(models, names).generate([job.prompt for job in of_these], settings)
        expected += [(asked, job.prompt, out.tokens, job.tokens) for job, out in zip(of_these, outs, strict=True)]
    assert len(expected) > 50
    for asked, prompt, ours, theirs in expected:
        assert theirs == ours, (asked, prompt)


OF_OTHERS: list[dict[str, Any]] = [
    {"aligner": "first", "rule": "handover(tau=-1.7)"},
    {"aligner": "second", "rule": "tiring(token=3)", "weight": 1.5},
    {"aligner": ["first", "red"], "rule": "opening(tokens=7)", "weight": [1.0, 0.5]},
    {"aligner": "first", "rule": "product"},
]


def test_rules_of_another_package_remember_the_text_under_preemption(llm, models, preemptions, tmp_path, monkeypatch):
    """What was drawn before is read again as if it were a prompt, and is none to a rule that looks back."""
    points = {"trimtab.rules": {rule.name: f"brought_rules:{rule.__name__}" for rule in LOOKING}}
    bring(tmp_path, monkeypatch, "brought_rules", "from looking import *", points)
    look_again(KNOWN, monkeypatch)
    chosen = random.Random(2)
    jobs = []
    for i in range(48):
        prompt = [chosen.randrange(1, V) for _ in range(chosen.choice([1, 3, 20, 60]))]
        params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True, extra_args=OF_OTHERS[i % len(OF_OTHERS)])
        jobs.append(Job(prompt, params, arrives=chosen.randrange(0, 40)))
    run(llm, jobs)
    assert len(preemptions) > 10, "the cache was meant to be too small"
    for kind, asked in enumerate(OF_OTHERS):
        shaping = {name: value for name, value in asked.items() if name != "aligner"}
        names = [asked["aligner"]] if isinstance(asked["aligner"], str) else asked["aligner"]
        of_these = jobs[kind :: len(OF_OTHERS)]
        greedy = Ours(max_tokens=60, temperature=0, ignore_eos=True, **shaping)
        whole = embedded(models, names)
        ours = [out.tokens for out in whole.generate([job.prompt for job in of_these], greedy)]
        assert [job.tokens for job in of_these] == ours, asked
        if shaping["rule"] != "product":
            plain = dataclasses.replace(greedy, rule="product")
            assert [out.tokens for out in whole.generate([job.prompt for job in of_these], plain)] != ours, (
                "the rule does nothing"
            )


KNOBS: list[dict[str, Any]] = [
    {"logit_bias": {1: 2.0, 2: -3.0}},
    {"repetition_penalty": 1.3},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.4, "top_k": 3},
    {"min_p": 0.2},
]


@pytest.mark.parametrize("rule", RULES)
def test_mixed_requests_follow_their_laws(llm, models, rule, preemptions):
    """Aligned and bare, with one aligner and with two, short and preempted, in one batch."""
    length, each, chosen = 3, 1500, random.Random(1)
    kinds: list[tuple[list[str], list[float], dict[str, Any]]] = [
        ([], [], {}),
        (["first"], [0.8], {"proposal_temperature": 0.7, "proposal_top_p": 0.9, "aligner_temperature": 1.4}),
        (["second", "red"], [0.5, 0.3], {}),
    ]
    jobs = []
    for i, (names, weights, warps) in itertools.product(range(each), kinds):
        extra = {"aligner": names, "weight": weights, "rule": rule, **warps} if names else None
        params = SamplingParams(max_tokens=length, temperature=1.2, seed=SEED + len(jobs), extra_args=extra)
        jobs.append(Job([1, 2], params, i // 10))
    filler = SamplingParams(max_tokens=60, ignore_eos=True, extra_args={"aligner": "blue"})
    jobs += [Job([chosen.randrange(1, V) for _ in range(50)], filler, 3 * i) for i in range(30)]
    run(llm, jobs)
    assert preemptions
    for kind, (names, weights, warps) in enumerate(kinds):
        whole = embedded(models, names)
        three = tuple(warps.get(name, 1.0) for name in ("proposal_temperature", "proposal_top_p", "aligner_temperature"))
        how = rule if names else "product"
        law = expected_law(whole.proposal, whole.aligners, how, weights, [1, 2], length, warps=three, temperature=1.2)
        samples = [tuple(job.tokens) for job in jobs[kind : 3 * each : 3]]
        assert fits(samples, law) > 1e-4, names
        if names:
            other = expected_law(whole.proposal, [], "product", [], [1, 2], length, temperature=1.2)
            assert fits(samples, other) < 1e-6, "the test cannot tell laws apart"


def test_sampling_parameters_act_on_the_aligned_row(llm, models):
    """Their order is vLLM's, so each by itself; with `nucleus`, what acts on the proposal instead gives another law."""
    asked: dict[str, Any] = {"aligner": "first", "rule": "nucleus", "proposal_top_p": 0.8}
    for knobs in KNOBS:
        extra = {"extra_args": asked}
        jobs = [
            Job([4, 1], SamplingParams(max_tokens=2, seed=SEED + i, **{"temperature": 1.0, **knobs, **extra}))
            for i in range(1500)
        ]
        run(llm, jobs)
        model = embedded(models, ["first"], rule="nucleus", proposal_top_p=0.8, max_num_seqs=500)
        law = {
            pair: probability
            for pair, probability in _law_with_knobs(model, [4, 1], **knobs).items()
            if probability > -math.inf
        }
        assert fits([tuple(job.tokens) for job in jobs], law) > 1e-4, knobs


def _law_with_knobs(model: AlignedModel, prompt: list[int], **knobs: Any) -> dict[tuple[int, ...], float]:
    """Log-probabilities of completions of up to two tokens: the aligned row, with our own sampling knobs upon it."""
    from trimtab.decode.sampler import Sampler
    from trimtab.models.table import enumerate_sequences

    params = Ours(**knobs)

    def row(prefix: Any) -> torch.Tensor:
        tokens = [int(token) for token in prefix]
        aligned = torch.stack([torch.tensor(model.score([tokens], [[v]])[0].aligned) for v in range(V)]).reshape(1, 1, V)
        return Sampler([params], [tokens], V, torch.device("cpu")).rows(aligned)[0, 0].double()

    return enumerate_sequences(row, prompt, 2, [EOS])


def test_tokens_that_must_not_come_do_not(llm):
    """`min_tokens`, banned words and allowed tokens hold under rules that ignore the proposal's probabilities."""
    nucleus = {"aligner": "second", "rule": "nucleus", "proposal_top_p": 0.05}  # one token is left, or few
    jobs = [Job([1], SamplingParams(max_tokens=6, min_tokens=6, extra_args=nucleus)) for i in range(300)]
    jobs += [Job([1], SamplingParams(max_tokens=6, allowed_token_ids=[1, 2], extra_args=nucleus)) for i in range(300)]
    run(llm, jobs)
    assert all(len(job.tokens) == 6 and EOS not in job.tokens[:5] for job in jobs[:300])
    assert all(set(job.tokens) <= {1, 2} for job in jobs[300:])


def test_other_plugins_see_drawn_tokens_where_nobody_is_aligned(llm):
    """Under asynchronous scheduling vLLM fills them in only if it is told to, and others may have told it."""
    worker: Any = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    batch = worker.model_runner.input_batch
    needed, batch.logitsprocs_need_output_token_ids = batch.logitsprocs_need_output_token_ids, True
    run(llm, [Job([1], SamplingParams(max_tokens=4, ignore_eos=True))])
    assert batch.logitsprocs_need_output_token_ids is True
    batch.logitsprocs_need_output_token_ids = needed
    run(llm, [Job([1], SamplingParams(max_tokens=4, ignore_eos=True, extra_args={"aligner": "first"}))])
    assert batch.logitsprocs_need_output_token_ids is needed


def test_log_probabilities_are_the_aligned_models(llm, models):
    asked = {"aligner": "first", "weight": 0.6}
    jobs = [Job([2, 5], SamplingParams(max_tokens=8, logprobs=V, temperature=0.3, seed=3, ignore_eos=True, extra_args=asked))]
    run(llm, jobs)
    score = embedded(models, ["first"], weight=0.6).score([[2, 5]], [jobs[0].tokens])[0]
    found = [step[token].logprob for step, token in zip(jobs[0].logprobs, jobs[0].tokens, strict=True)]
    assert found == pytest.approx(list(score.aligned), abs=1e-5)


def test_a_seed_gives_the_same_text_whatever_else_runs(llm):
    params = SamplingParams(max_tokens=30, seed=11, ignore_eos=True, extra_args={"aligner": "red"})
    alone = [Job([1, 4], params)]
    run(llm, alone)
    crowd = [Job([1, 4], params, 3)]
    for i in range(30):
        asked = {"aligner": "first"} if i % 2 else None
        crowd.append(Job([1 + i % 6] * (1 + 3 * i), SamplingParams(max_tokens=30, seed=i, extra_args=asked), i % 7))
    run(llm, crowd)
    assert crowd[0].tokens == alone[0].tokens
    assert len(alone[0].tokens) == 30 < CONTEXT


def test_a_seed_gives_the_same_text_however_the_prompt_is_read(llm):
    for asked in (None, {"aligner": "second"}):
        params = SamplingParams(max_tokens=12, seed=5, ignore_eos=True, extra_args=asked)
        whole, parts = Job([2, 3] * 20, params), Job([2, 3] * 20, params)
        run(llm, [whole])
        llm.llm_engine.reset_prefix_cache()
        run(llm, [*(Job([1, i, 5] * 12, SamplingParams(max_tokens=9)) for i in range(2)), parts])  # 48 tokens a step
        assert parts.tokens == whole.tokens
