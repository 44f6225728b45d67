"""A completion that cannot go on ends there and says why; nobody else notices, at any draft length."""

import math
from functools import partial
from typing import Any

import pytest
import torch

from tiny import tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.logprobs import log_normalize
from trimtab.errors import DeadRow
from trimtab.evaluate.distribution import trace
from trimtab.models.table import TableLM

V, EOS, SICK = 7, 0, 6
PROPOSAL, ALIGNER, DRAFT = (TableLM.random(V, order=1, seed=seed) for seed in (1, 2, 3))
PROMPTS = [[1], [2, 3], [4, 2], [5]]


class Broken(TableLM):
    """Whose row after a 6 is of one number, where it is the other's elsewhere."""

    def __init__(self, sound: TableLM, number: float, tokens: Any = slice(None)) -> None:
        super().__init__(sound.table)
        self._number, self._tokens = number, tokens

    def row(self, prefix):
        row = super().row(prefix).clone()
        if len(prefix) and prefix[-1] == SICK:
            row[self._tokens] = self._number
        return row


ONLY_ONE, ONLY_TWO = (
    log_normalize(torch.where(torch.arange(V) == best, 0.0, -math.inf)).double().expand(V + 1, V) for best in (1, 2)
)


class Apart(TableLM):
    """Says nothing but 1 after a 6."""

    def row(self, prefix):
        return ONLY_ONE[0] if len(prefix) and prefix[-1] == SICK else super().row(prefix)


class ApartToo(TableLM):
    """Says nothing but 2 after a 6."""

    def row(self, prefix):
        return ONLY_TWO[0] if len(prefix) and prefix[-1] == SICK else super().row(prefix)


KINDS = {
    "NaN from the proposal": (Broken(PROPOSAL, math.nan), ALIGNER, {}, "the proposal gives NaN probabilities"),
    "one NaN from the proposal": (Broken(PROPOSAL, math.nan, 3), ALIGNER, {}, "the proposal gives NaN probabilities"),
    "an infinite one": (Broken(PROPOSAL, math.inf, 3), ALIGNER, {}, "the proposal gives no distribution"),
    "nothing from the proposal": (Broken(PROPOSAL, -math.inf), ALIGNER, {}, "the proposal gives no distribution"),
    "NaN from the aligner": (PROPOSAL, Broken(ALIGNER, math.nan), {}, "aligner 0 gives NaN probabilities"),
    "nothing from the aligner": (PROPOSAL, Broken(ALIGNER, -math.inf), {}, "aligner 0 gives no distribution"),
    "NaN from an anti-expert": (PROPOSAL, Broken(ALIGNER, math.nan), {"weight": -1.0}, "aligner 0 gives NaN"),
    "nothing in common": (Apart(PROPOSAL.table), ApartToo(ALIGNER.table), {}, "rule 'product' leaves no possible token"),
    "of a gate": (PROPOSAL, Broken(ALIGNER, math.nan), {"rule": "kl_gate"}, "aligner 0 gives NaN probabilities"),
    "of the geometric rule": (Broken(PROPOSAL, math.nan), ALIGNER, {"rule": "geometric"}, "the proposal gives NaN"),
    "of a share of 0": (Broken(PROPOSAL, math.nan), ALIGNER, {"rule": "geometric", "weight": 1.0}, "the proposal gives NaN"),
    "of the nucleus rule": (Broken(PROPOSAL, math.nan), ALIGNER, {"rule": "nucleus"}, "the proposal gives NaN"),
    "of candidates": (PROPOSAL, Broken(ALIGNER, math.nan), {"rule": "candidates(n=3)"}, "aligner 0 gives NaN"),
    "of no candidates": (Broken(PROPOSAL, -math.inf), ALIGNER, {"rule": "candidates(n=3)"}, "the proposal gives no"),
    "greedily": (Broken(PROPOSAL, math.nan), ALIGNER, {"temperature": 0.0}, "the proposal gives NaN probabilities"),
    "under cuts": (
        Broken(PROPOSAL, math.nan),
        ALIGNER,
        {"top_k": 3, "min_p": 0.2, "top_p": 0.7, "proposal_top_p": 0.9, "logit_bias": {3: -1e6}},
        "the proposal gives NaN probabilities",
    ),
}


def model(proposal: TableLM, aligner: TableLM | None, length: int | None = None, **settings: Any) -> AlignedModel:
    aligners = [] if aligner is None else [aligner]
    return AlignedModel(proposal, aligners, eos_token_ids=[EOS], num_speculative_tokens=length, **settings)


@pytest.mark.parametrize("draft", ["aligner", "ngram", DRAFT], ids=["aligner", "ngram", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_ends_there_and_says_why_and_the_others_are_what_they_would_be(kind, draft):
    """Beside a twin of each request on models that are sound: where the twin goes on after a 6, the sick one ends with it."""
    proposal, aligner, settings, reason = KINDS[kind]
    params = SamplingParams(max_tokens=6, n=4, seed=11, ignore_eos=True, **settings)
    twins = [c.tokens for c in model(PROPOSAL, ALIGNER, draft=draft).generate(PROMPTS, params)]
    ends = [twin.index(SICK) + 1 if SICK in twin[:-1] else 6 for twin in twins]
    assert 0 < sum(end < 6 for end in ends) < 16
    for length in (0, 1, 3, None):
        got = model(proposal, aligner, length, draft=draft).generate(PROMPTS, params)
        assert [c.tokens for c in got] == [twin[:end] for twin, end in zip(twins, ends, strict=True)], length
        assert [c.finish_reason for c in got] == ["length" if end == 6 else "error" for end in ends]
        for completion in got:
            if completion.finish_reason == "error":
                assert completion.error.startswith(reason)
                assert f"after {len(completion.tokens)} tokens" in completion.error
            else:
                assert completion.error is None


@pytest.mark.parametrize("length", [0, 3])
def test_a_sick_draft_is_dropped_and_ends_nothing(length):
    """Its law is the target's; a model that only drafts is not to blame either where the target has no token."""
    sick = Broken(DRAFT, math.nan)
    params = SamplingParams(max_tokens=12, n=20, seed=1, ignore_eos=True)
    drafted = model(PROPOSAL, ALIGNER, length, draft=sick).generate([[1]], params)
    assert {c.finish_reason for c in drafted} == {"length"}
    assert any(SICK in c.tokens for c in drafted)
    (dead,) = model(Apart(PROPOSAL.table), ApartToo(ALIGNER.table), length, draft=sick).generate([[SICK]])
    assert dead.error.startswith("rule 'product' leaves no possible token after 0 tokens")


@pytest.mark.parametrize("length", [0, 3])
@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2}], ids=str)
def test_a_completion_may_die_on_its_first_token(length, logprobs):
    params = SamplingParams(max_tokens=2, n=2, seed=3, ignore_eos=True, **logprobs)
    healthy = model(PROPOSAL, ALIGNER, length).generate([[1]], params)
    got = model(Broken(PROPOSAL, math.nan), ALIGNER, length).generate([[2, SICK], [1]], params)
    for i, dead in enumerate(got[:2]):
        assert (dead.text, dead.tokens, dead.finish_reason, dead.index) == ("", [], "error", i)
        assert (dead.seed, dead.prompt_tokens, dead.fallbacks) == (3, 2, None)
        if logprobs:
            empty = [[] for _ in range(2 if len(logprobs) > 1 else 0)] or [None, None]
            found = dead.logprobs
            assert [found.proposal, found.aligner, found.aligned, found.top_proposal, found.top_aligned] == [[], [], [], *empty]
    assert SICK not in [c.tokens[0] for c in healthy]
    assert got[2:] == healthy


def test_its_log_probabilities_are_those_of_its_tokens():
    params = SamplingParams(max_tokens=12, n=9, seed=11, ignore_eos=True, logprobs=True, top_logprobs=3)
    broken = model(Broken(PROPOSAL, math.nan), ALIGNER, 3)
    dead = next(c for c in broken.generate([[1]], params) if c.finish_reason == "error")
    (score,) = broken.score([[1]], [dead.tokens])
    assert dead.logprobs.aligned == pytest.approx(score.aligned)
    assert len(dead.logprobs.top_aligned) == len(dead.tokens)


def test_a_stream_ends_with_an_event_without_a_token():
    params = SamplingParams(max_tokens=5, seed=3, ignore_eos=True, logit_bias={SICK: 100.0})
    *events, last = model(Broken(PROPOSAL, math.nan), ALIGNER).stream([[1]], params)
    assert [(event.token, event.finish_reason) for event in events] == [(SICK, None)]
    assert (last.token, last.text, last.finish_reason, last.proposal, last.aligned) == (None, "", "error", None, None)
    assert (last.completion.tokens, last.completion.finish_reason) == ([SICK], "error")
    assert "NaN" in last.completion.error


def test_text_that_was_held_back_comes_with_the_end():
    """ "de" might have become the stop text "def", which it never will now."""
    params = SamplingParams(max_tokens=5, seed=3, stop=["def"])
    letters = tiny_tokenizer()
    d, e = letters.convert_tokens_to_ids(["d", "e"])
    table = torch.full((len(letters) + 1, len(letters)), -math.inf)
    table[:, d], table[d, d], table[d, e] = 0.0, -math.inf, 0.0
    sick = TableLM(table)
    sick.table[e] = math.nan
    *events, last = AlignedModel(sick, tokenizer=letters).stream("a", params)
    assert [event.text for event in events] == ["", ""]
    assert (last.text, last.completion.text, last.finish_reason) == ("de", "de", "error")


def test_an_aligner_of_weight_zero_is_not_there_however_sick_it_is():
    params = SamplingParams(max_tokens=12, n=4, seed=11, ignore_eos=True)
    for length in (0, 3):
        got = model(PROPOSAL, Broken(ALIGNER, math.nan), length, draft="none", weight=0.0).generate(PROMPTS, params)
        assert [c.tokens for c in got] == [c.tokens for c in model(PROPOSAL, None, length).generate(PROMPTS, params)]


def test_a_score_says_where_the_row_is_that_has_no_token():
    broken = model(Broken(PROPOSAL, math.nan), ALIGNER, max_num_seqs=2)
    sound = model(PROPOSAL, ALIGNER).score([[1]] * 3, [[2, 3]] * 3)
    assert [s.aligned for s in broken.score([[1]] * 3, [[2, 3]] * 3)] == [s.aligned for s in sound]
    with pytest.raises(DeadRow, match=r"the proposal gives NaN probabilities after 2 tokens of completions\[2\]"):
        broken.score([[1]] * 3, [[2, 3], [2, 3], [2, SICK, 3]])
    for scores in (broken.score, partial(trace, broken)):  # whatever goes first: batches are of like length
        with pytest.raises(DeadRow, match=r"after 2 tokens of completions\[1\]"):
            scores([[1]] * 4, [[2], [2, SICK, 3], [2, 3, 4, 5], [2, 3, 4, 5]])


def test_scores_are_in_the_order_of_the_texts_which_share_batches_by_their_length():
    prompts, answers = [[1], [2, 3, 4, 5], [4, 2], [5], [1, 2]], [[2], [3, 4], [1, 2, 3, 4, 5], [2, 2], [0]]
    batched = model(PROPOSAL, ALIGNER, max_num_seqs=2)
    alone = [batched.score([prompt], [answer])[0] for prompt, answer in zip(prompts, answers, strict=True)]
    assert batched.score(prompts, answers) == alone
    assert [one.tokens for one in alone] == answers
    assert trace(batched, prompts, answers) == [trace(batched, [p], [a])[0] for p, a in zip(prompts, answers, strict=True)]
