"""A hand-over has its law, at every draft length and beside anybody, and lets its aligners go without changing a token.

The law is written here from the definition (weak-to-strong decoding, arXiv 2506.07434), in plain Python on probabilities.
"""

import dataclasses
import functools
import json
import math
from typing import Any

import pytest
import torch

from drafting import alone_and_together, corpus_of
from law_of import expected_row, probabilities, tempered
from serving import running
from statistics_of import fits
from tiny import EOS, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.noise import uniforms
from trimtab.core.rules import Confidence, Geometric, Nucleus, Product, Proposal, parse_rule
from trimtab.core.rules.context import first_context, follow
from trimtab.core.speculation import DRAWS
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate.harness import TrimtabLM
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM, enumerate_sequences
from trimtab.serve.registry import Registry
from trimtab.serve.service import Opened, Service, Settings

V = 5
PROPOSAL, ALIGNER, DRAFT = (TableLM.random(V, order=2, seed=seed) for seed in (0, 1, 3))
OVER = "confidence(window=2, threshold=0.22)"
RULES = [
    OVER,
    "confidence(window=1, threshold=0.3, before=product)",
    "confidence(window=2, threshold=0.22, before=geometric, after=gate(by=max_p, tau=0.5))",
]
DRAFTS: list[Any] = ["aligner", "ngram", "none", DRAFT, corpus_of([[1, 2, 3, 4, 2, 3]], "handover.table")]
IDS = ["aligner", "ngram", "none", "model", "corpus"]


def model(length: int | None = None, draft: Any = "aligner", **settings: Any) -> AlignedModel:
    return AlignedModel(PROPOSAL, [ALIGNER], eos_token_ids=[EOS], num_speculative_tokens=length, draft=draft, **settings)


# ---- when it hands over


@pytest.mark.parametrize(
    ("listed", "window", "threshold", "expected"),
    [
        ([0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.1], 6, 0.8, 6),
        ([0.8] * 9, 6, 0.8, 6),
        ([0.79] * 9, 6, 0.8, None),
        ([0.1, 0.95, 0.95, 0.95, 0.7, 0.2, 0.99], 3, 0.8, 4),
        ([0.9, 0.2, 0.9, 0.8, 0.81], 2, 0.8, 4),
        ([0.1] * 9, 4, 0.0, 4),
        ([0.0, 0.5, 0.5], 1, 0.0, 1),
        ([0.0, 0.9, 0.9], 2, 0.5, 3),
        ([1.0] * 20, 6, 1.0, 6),
        ([1.0] * 20, 6, 1.01, None),
        ([0.9] * 5, 6, 0.5, None),
    ],
)
def test_it_hands_over_behind_the_token_with_which_the_mean_gets_there(listed, window, threshold, expected):
    """The geometric mean of the last w of them, of the answer's alone; that token is the last one before."""
    rule = Confidence(window, threshold)
    context, found = first_context(rule, [[1, 2, 3]], torch.device("cpu")), None
    for i, p in enumerate(listed):
        context = follow(rule, context, torch.tensor([1]), torch.tensor([p], dtype=torch.float64).log())
        if bool(context.state[0, 0]) and found is None:
            found = i + 1
    assert found == expected
    assert rule.hands_over_at([math.log(p) if p else -math.inf for p in listed]) == expected


@pytest.mark.parametrize("text", RULES)
def test_it_is_written_as_it_is_read(text):
    assert str(parse_rule(text)) == text
    assert parse_rule("confidence") == Confidence(6, 0.8, Nucleus(), Proposal())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"threshold": -0.1}, r"threshold must be at least 0, not -0\.1"),
        ({"threshold": math.nan}, "threshold must be at least 0, not nan"),
        ({"before": parse_rule("candidates")}, "before='candidates' has no row in closed form"),
        ({"after": Confidence()}, "after='confidence' hands over itself"),
        ({"after": "product"}, r"after must be a rule, such as Product\(\), not 'product'"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(InvalidOption, match=f"^confidence: {message}"):
        Confidence(**settings)


# ---- its law


def row_of(rule: Confidence, prompt: list[int], prefix: list[int], temperature: float = 1.0) -> list[float]:
    """Probabilities after `prefix`, by the definition."""
    p, q = (probabilities(one, prefix) for one in (PROPOSAL, ALIGNER))
    known = [probabilities(PROPOSAL, prefix[:i])[prefix[i]] for i in range(len(prompt), len(prefix))]
    w = rule.window
    over = any(math.prod(known[i - w : i]) ** (1 / w) >= rule.threshold for i in range(w, len(known) + 1))
    turn = rule.after if over else rule.before
    said = str(turn).replace("gate(", "gate(rule=product, ")
    row = p if isinstance(turn, Proposal) else expected_row(said, p, [q], [rule.default_weights(1)[0]])
    return tempered(row, temperature)


@functools.cache
def law(text: str, length: int = 4) -> dict[tuple[int, ...], float]:
    rule = parse_rule(text)
    return enumerate_sequences(
        lambda prefix: torch.tensor(row_of(rule, [3, 2], list(prefix)), dtype=torch.float64).log(), [3, 2], length, [EOS]
    )


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
@pytest.mark.parametrize("text", RULES)
def test_samples_have_the_law_and_the_same_tokens_at_every_draft_length(text, draft):
    params = SamplingParams(n=1500, seed=5, max_tokens=4, handover=text)
    drawn = model(0, draft, max_num_seqs=1500).generate([[3, 2]], params)
    assert fits([tuple(c.tokens) for c in drawn], law(text)) > 1e-3
    others = [law(other) for other in RULES if other != text]
    plain = enumerate_sequences(lambda prefix: ALIGNER.row(list(prefix)), [3, 2], 4, [EOS])
    for other in (*others, plain):
        assert fits([tuple(c.tokens) for c in drawn], other) < 1e-3, "the test cannot tell laws apart"
    for length in (1, 3, None):
        again = model(length, draft).generate([[3, 2]], dataclasses.replace(params, n=100))
        assert [(c.tokens, c.handover_at) for c in again] == [(c.tokens, c.handover_at) for c in drawn[:100]], length


@pytest.mark.parametrize("text", RULES)
def test_scores_are_the_law(text):
    answers = [list(answer) for answer in law(text)]
    for answer, score in zip(answers, model(rule=text).score([[3, 2]] * len(answers), answers), strict=True):
        assert math.fsum(score.aligned) == pytest.approx(law(text)[tuple(answer)], abs=1e-9)


def handed_over(tokens: list[int], prompt: list[int], rule: Confidence) -> int | None:
    """Where an answer was handed over, from its probabilities under the proposal; None if no token was written after."""
    known = [probabilities(PROPOSAL, [*prompt, *tokens[:i]])[token] for i, token in enumerate(tokens)]
    w = rule.window
    ends = range(w, len(known) + 1)
    first = next((i for i in ends if math.prod(known[i - w : i]) ** (1 / w) >= rule.threshold), None)
    return None if first is None or first == len(tokens) else first


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
@pytest.mark.parametrize("length", [0, 3, None])
def test_completions_say_where(draft, length):
    params = SamplingParams(n=30, seed=2, max_tokens=25, handover=OVER)
    found = model(length, draft).generate([[3, 2]], params)
    assert [c.handover_at for c in found] == [handed_over(c.tokens, [3, 2], parse_rule(OVER)) for c in found]
    assert {c.handover_at is None for c in found} == {True, False}
    assert all(c.fallbacks == (0 if c.handover_at is None else len(c.tokens) - c.handover_at) for c in found)
    plain = model(length, draft).generate([[3, 2]], SamplingParams(max_tokens=5, seed=0))[0]
    assert (plain.handover_at, plain.fallbacks) == (None, None)


# ---- what it costs


class Counting(TableLM):
    """A table that notes how many tokens each pass reads."""

    def extend(self, state, tokens, counts):
        self.passes = [*getattr(self, "passes", []), sum(counts)]
        return super().extend(state, tokens, counts)


@pytest.mark.parametrize("length", [0, 1, 3, 6])
def test_drafts_before_it_are_the_text_and_the_aligner_rests_after_it(length):
    """One pass of the proposal for k + 1 tokens, then one for each token: the aligner is read no more, nor are drafts made."""
    proposal, aligner = Counting(PROPOSAL.table), Counting(ALIGNER.table)
    both = AlignedModel(proposal, [aligner], draft="aligner", num_speculative_tokens=length)
    over = SamplingParams(max_tokens=70, seed=3, ignore_eos=True, handover="confidence(window=20, threshold=0.0)")
    (done,) = both.generate([[1]], over)
    assert done.handover_at == 20
    passes = len(proposal.passes)
    # The first token is the prompt's pass; the step that meets the switch may bring tokens from behind it.
    assert passes <= 1 + math.ceil(20 / (length + 1)) + 50
    read = len(aligner.passes)
    proposal.passes, aligner.passes = [], []
    both.generate([[1]], dataclasses.replace(over, max_tokens=20 + length + 2))
    assert len(aligner.passes) == read, "however much is written after it"


def test_after_it_tokens_are_those_of_the_proposal_alone():
    """A seed's tokens after the switch are drawn as without aligners: by the inverse of p̃ at the position's third number."""
    (done,) = model(3).generate([[3, 2]], SamplingParams(max_tokens=40, seed=9, ignore_eos=True, handover=OVER))
    at = done.handover_at
    assert at is not None
    for i in range(at, 40):
        row = torch.tensor(probabilities(PROPOSAL, [3, 2, *done.tokens[:i]]), dtype=torch.float64)
        u = float(uniforms([9], [0], [i], 1, DRAWS)[0, 0, 2])
        assert done.tokens[i] == int(torch.searchsorted(row.cumsum(0), u * row.sum(), right=True))


MIXED: list[tuple[list[int], dict[str, Any]]] = [
    ([1], {"handover": OVER, "max_tokens": 22}),
    ([2, 3, 4, 1], {"handover": OVER, "max_tokens": 19, "n": 3, "ignore_eos": True}),
    ([1, 1], {"rule": "product", "max_tokens": 15, "logprobs": True}),
    ([4], {"handover": RULES[2], "max_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.3}),
    ([4, 4], {"handover": OVER, "max_tokens": 24, "ignore_eos": True, "temperature": 0, "n": 2}),
    ([3], {"handover": OVER, "max_tokens": 21, "ignore_eos": True, "proposal_top_p": 0.8, "logprobs": True}),
    ([3, 1], {"handover": OVER, "max_tokens": 21, "ignore_eos": True, "top_p": 0.9, "temperature": 0.8}),
    ([2], {"rule": "kl_gate(tau=0.3)", "max_tokens": 8}),
]
ASKED = [(prompt, SamplingParams(seed=i, **asked)) for i, (prompt, asked) in enumerate(MIXED)]


@pytest.mark.parametrize("draft", DRAFTS, ids=IDS)
def test_a_mixed_batch_is_each_request_alone_bit_for_bit(draft):
    """Those that leave their aligners stand beside those that have not, and beside bare ones."""
    alone_and_together(lambda length, **settings: model(length, draft, **settings), ASKED)


def test_to_ask_for_log_probabilities_changes_no_token():
    """Then the aligner stays, to say what it thinks of each; the tokens are the same."""
    params = SamplingParams(n=6, seed=4, max_tokens=30, ignore_eos=True, handover=OVER)
    plain, told = (model(2).generate([[1]], dataclasses.replace(params, logprobs=wanted)) for wanted in (False, True))
    assert [(c.tokens, c.handover_at) for c in plain] == [(c.tokens, c.handover_at) for c in told]
    for c in told:
        assert c.logprobs.aligned[c.handover_at :] == c.logprobs.proposal[c.handover_at :]


def test_who_is_cancelled_after_it_leaves_nothing_behind():
    both = model(2)
    engine = Engine(both.proposal, both.pace)
    params = SamplingParams(max_tokens=60, seed=1, ignore_eos=True, handover="confidence(window=2, threshold=0.0)")
    going, staying = both.prepare([1], params, 0), both.prepare([2], params, 1)
    engine.submit([*going, *staying])
    for _ in range(6):
        engine.step()
    assert going[0].handover_at == 2
    assert going[0].models.aligners == ()
    engine.cancel(going)
    while engine:
        engine.step()
    alone = both.generate([[2]], params)[0]
    assert staying[0].tokens == alone.tokens


@pytest.mark.parametrize("draft", ["aligner", "ngram", "model"])
def test_float32_models_give_the_same_tokens_at_every_draft_length_with_prefixes(draft):
    loaded = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(3)]
    texts = ["the quick brown", "of", "zz top"]
    params = [
        SamplingParams(seed=i, ignore_eos=True, max_tokens=26, handover="confidence(window=3, threshold=0.05)")
        for i in range(3)
    ]
    found = []
    for length in (0, 1, 4, 7, None):
        aligned = AlignedModel.from_pretrained(
            *loaded[:2],
            tokenizer=tiny_tokenizer(),
            draft=loaded[2] if draft == "model" else draft,
            num_speculative_tokens=length,
        )
        found += [[(c.tokens, c.handover_at) for c in aligned.generate(texts, params)] for _ in range(2)]
    assert all(other == found[0] for other in found[1:])
    assert any(at for _, at in found[0])


def test_a_prompt_that_was_handed_over_is_taken_over_by_the_next(monkeypatch):
    """What aligner and proposal had read of it is kept when they part."""
    monkeypatch.setattr(HuggingFaceLM, "immutable", True)
    pair = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(2)]
    both = AlignedModel.from_pretrained(*pair, tokenizer=tiny_tokenizer())
    prompt = "a long text that is taken over from what was read before"
    params = SamplingParams(seed=1, max_tokens=26, ignore_eos=True, handover="confidence(window=3, threshold=0.0)")
    engine = Engine(both.proposal, both.pace, prefixes=both.prefixes)
    found = []
    for _ in range(2):
        (sequence,) = both.prepare(prompt, params)
        list(engine.run([sequence]))
        found.append((sequence.tokens, sequence.handover_at, sequence.has_aligners))
        cached = sequence.cached_tokens
    assert found[0] == found[1]
    assert found[0][1:] == (3, False)
    assert cached >= len(sequence.prompt) - 1


# ---- wherever a request may say so


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"handover": "product"}, "handover: rule 'product' hands nothing over; give one that does: handover='confidence"),
        ({"handover": OVER, "rule": "geometric"}, "rule has no effect beside handover: leave it out, or name it there: "),
        ({"handover": "confidence(window=x)"}, "handover: rule: 'confidence' wants window as int, not 'x'"),
        ({"handover": 3}, "handover must be the name of a rule, or a rule, not 3"),
    ],
)
def test_what_is_no_hand_over_is_named(asked, message):
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**asked)
    assert str(error.value).startswith(message)


def test_a_request_is_heard_before_the_model_and_the_model_before_the_manifest():
    over, other = parse_rule(OVER), Confidence(3)
    of_model = model(handover=OVER)
    assert of_model.shaping(SamplingParams()).rule == over
    assert of_model.shaping(SamplingParams(rule="product")).rule == Product()
    assert of_model.shaping(SamplingParams(handover=other)).rule == other
    assert model(rule=Geometric()).shaping(SamplingParams(handover=OVER)).rule == over


def test_over_http_and_in_a_harness(tmp_path):
    """The same text as in Python, and where it was handed over: whole, streamed, and in the metrics."""
    pair = [tiny_model("llama", 28, seed=seed, spread=0.3) for seed in range(2)]
    tokenizer = tiny_tokenizer()
    for name, one in zip(("proposal", "q"), pair, strict=True):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    over = "confidence(window=3, threshold=0.04)"
    both = AlignedModel.from_pretrained(tmp_path / "proposal", tmp_path / "q", handover=over)
    (expected,) = both.generate("abc", SamplingParams(max_tokens=24, seed=5, ignore_eos=True))
    assert expected.handover_at is not None

    def load() -> Opened:
        base = AlignedModel.from_pretrained(tmp_path / "proposal")
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
        registry.load("q", str(tmp_path / "q"), pinned=True)
        return Opened(registry, Engine(base.proposal, base.pace, prefixes=base.prefixes))

    asked: dict[str, Any] = {"model": "q", "prompt": "abc", "max_tokens": 24, "seed": 5, "ignore_eos": True, "handover": over}
    with running(Service(Settings("base", stream_interval=0.0), load)) as server:
        choice = server.complete(**asked)["choices"][0]
        assert (choice["text"], choice["handover_at"]) == (expected.text, expected.handover_at)
        lines = server.post("/v1/completions", **asked, stream=True).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if "choices" in line]
        assert "".join(event["text"] for event in events) == expected.text
        assert [event.get("handover_at") for event in events][-1] == expected.handover_at
        assert not any("handover_at" in event for event in events[:-1])
        assert "handover_at" not in server.complete(**{**asked, "handover": None})["choices"][0]
        assert server.metric("trimtab:handovers_total", model_name="q") == 2
        assert server.metric("trimtab:handover_tokens_total", model_name="q") == 2 * expected.handover_at
        refused = server.post("/v1/completions", **{**asked, "handover": "product"})
        assert refused.status_code == 400
        assert "hands nothing over" in refused.json()["error"]["message"]
    lm = TrimtabLM(proposal=str(tmp_path / "proposal"), aligner=str(tmp_path / "q"), handover=over)
    assert lm.model.shaping(lm.model.defaults).rule == parse_rule(over)
