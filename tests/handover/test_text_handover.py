"""A hand-over between two tokenizers has the law that is written here from its definition, here and behind an endpoint."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from scripted import Reply, scripted
from serving import running, table_service
from statistics_of import chi_square
from tiny import EOS, ScriptedLM, bpe_tokenizer, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams, TextHandover
from trimtab.core.rules import Confidence
from trimtab.data.encoding import Encoder
from trimtab.endpoints.client import Endpoints
from trimtab.endpoints.settings import Limits
from trimtab.errors import EndpointError, InvalidOption, InvalidRequest
from trimtab.handover import draft as drafts
from trimtab.handover.draft import Draft
from trimtab.handover.sides import RemoteProposal
from trimtab.models.table import TableLM, enumerate_sequences

LETTERS = "ab "


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """The same letters in other tokens, as byte-level tokenizers have them: a space begins a word."""
    vocab = {piece: i for i, piece in enumerate(["<eos>", "a", "b", " ", "ab", " a", "ba"])}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), (" ", "a"), ("b", "a")]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


LEADING, FOLLOWING = TableLM.random(4, order=2, seed=4), TableLM.random(7, order=2, seed=0)
SMALL, LARGE = tiny_tokenizer(LETTERS), merging_tokenizer()


def leader(table: TableLM = LEADING, tokenizer: Any = SMALL) -> AlignedModel:
    return AlignedModel(table, tokenizer=tokenizer, eos_token_ids=[EOS])


def proposal(table: TableLM = FOLLOWING, tokenizer: Any = LARGE, **settings: Any) -> AlignedModel:
    return AlignedModel(table, tokenizer=tokenizer, eos_token_ids=[EOS], **settings)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def where(logps: Sequence[float], window: int, threshold: float) -> int | None:
    """The first number of tokens whose last `window` have a geometric mean of at least `threshold`."""
    for h in range(window, len(logps) + 1):
        if math.prod(math.exp(logp) for logp in logps[h - window : h]) ** (1 / window) >= threshold:
            return h
    return None


def text_law(prompt: str, max_tokens: int, window: int, threshold: float) -> dict[tuple[str, int | None], float]:
    """Every text with where it was handed over, and its probability, by the definition."""
    law: dict[tuple[str, int | None], float] = defaultdict(float)
    head = ids_of(LARGE, prompt)
    drafted = enumerate_sequences(LEADING.row, ids_of(SMALL, prompt), 2 * max_tokens, [EOS])
    for tokens, logp in drafted.items():
        text = SMALL.decode([token for token in tokens if token != EOS])
        draft = ids_of(LARGE, text)[:max_tokens]
        read = [float(FOLLOWING.row([*head, *draft[:i]])[token]) for i, token in enumerate(draft)]
        h = where(read, window, threshold)
        if h is None or h == max_tokens:
            law[LARGE.decode(draft), None] += math.exp(logp)
            continue
        rest = enumerate_sequences(FOLLOWING.row, [*head, *draft[:h]], max_tokens - h, [EOS])
        for more, after in rest.items():
            law[LARGE.decode([*draft[:h], *(token for token in more if token != EOS)]), h] += math.exp(logp + after)
    return law


# ---- its law


@pytest.mark.parametrize("first_look", [1, 16])
def test_texts_have_the_law_of_the_definition_however_often_the_proposal_looks(monkeypatch, first_look):
    monkeypatch.setattr(drafts, "FIRST_LOOK", first_look)
    law = text_law("a b", 3, 2, 0.12)
    assert sum(law.values()) == pytest.approx(1)
    handed = sum(p for (_, h), p in law.items() if h is not None)
    assert 0.2 < handed < 0.8, handed
    both = TextHandover(leader(), proposal(), "confidence(window=2, threshold=0.12)")
    counts: dict[Any, int] = defaultdict(int)
    for one in both.generate(["a b"] * 20, [SamplingParams(max_tokens=3, n=200, seed=seed) for seed in range(20)]):
        counts[one.text, one.handover_at] += 1
    assert chi_square(counts, law) > 1e-3


def test_with_one_tokenizer_it_is_the_rule_that_goes_token_by_token():
    """Greedy texts are equal: handed over after the same token, wherever that is."""
    tables = [TableLM.random(6, order=2, seed=seed) for seed in (5, 6)]
    tokenizer = tiny_tokenizer("abcd ")
    apart = TextHandover(leader(tables[1], tokenizer), proposal(tables[0], tokenizer))
    together = AlignedModel(tables[0], [tables[1]], tokenizer, [EOS])
    prompts, found = [f"{x}{y}" for x in "abcd " for y in "abcd "], set()
    for over in (
        "confidence(window=2, threshold=0.25)",
        "confidence(window=3, threshold=0.3)",
        "confidence(window=2, threshold=0)",
    ):
        params = SamplingParams(max_tokens=12, temperature=0, handover=over)
        for one, other in zip(apart.generate(prompts, params), together.generate(prompts, params), strict=True):
            assert (one.text, one.handover_at) == (other.text, other.handover_at)
            found.add(one.handover_at)
    assert len(found) > 3


def test_an_endpoint_goes_on_as_a_model_here_would():
    params = SamplingParams(max_tokens=9, n=5, seed=3, stop="bab")
    here = TextHandover(leader(), proposal(), "confidence(window=2, threshold=0.12)").generate(["ab a", "b"], params)
    with running(table_service([FOLLOWING], tokenizer=LARGE)) as server, Endpoints([server.url]) as endpoints:
        there = TextHandover(leader(), RemoteProposal(endpoints, LARGE), "confidence(window=2, threshold=0.12)")
        found = there.generate(["ab a", "b"], params)
    assert [(one.text, one.handover_at, one.finish_reason) for one in found] == [
        (one.text, one.handover_at, one.finish_reason) for one in here
    ]
    assert {one.handover_at is None for one in here} == {True, False}


# ---- what is settled of a draft

WORDS = [
    "the house, and its garden!",
    "  two  spaces\n\nand lines",
    "naïve café",
    "x=1;y=22",
    "don't you've it's",
    "日本語 テキスト",
]


@pytest.mark.parametrize("merges", [20, 120])
def test_what_is_settled_of_a_text_stays_as_the_text_grows(merges):
    tokenizer = bpe_tokenizer([*WORDS, " ".join(WORDS)], merges)
    encoder, prompt = Encoder(tokenizer, len(tokenizer), [EOS]), ids_of(tokenizer, "the")
    text = " ".join(WORDS)
    whole = encoder.split(prompt, text)[1]
    settled = 0
    for end in range(1, len(text)):
        draft = Draft(encoder, [EOS], prompt, SamplingParams(max_tokens=500), 0, Confidence())
        draft.text = text[:end]
        draft.settle()
        assert draft.tokens == whole[: len(draft.tokens)]
        assert len(draft.tokens) >= settled
        settled = len(draft.tokens)
    assert settled > 0.8 * len(whole)


# ---- ends


def test_a_draft_that_ends_without_a_hand_over_is_the_answer():
    lead = leader(ScriptedLM(ids_of(SMALL, "ab ab ab"), 4))
    never = TextHandover(lead, proposal(), "confidence(threshold=1.1)")
    (one,) = never.generate("a", SamplingParams(max_tokens=20, seed=0))
    assert (one.text, one.handover_at, one.finish_reason) == ("ab ab ab", None, "stop")
    assert one.tokens == ids_of(LARGE, "ab ab ab")
    (cut,) = never.generate("a", SamplingParams(max_tokens=4, seed=0))
    assert (cut.text, cut.handover_at, cut.finish_reason) == ("ab ab ", None, "length")


def test_the_leader_stops_soon_after_the_hand_over():
    """It writes at most twice as many tokens as are needed, not `max_tokens` of them."""
    passes = []

    class Counting(ScriptedLM):
        def row(self, prefix: Sequence[int]) -> Any:
            passes.append(len(prefix))
            return super().row(prefix)

    lead = leader(Counting(ids_of(SMALL, "ab " * 100), 4))
    (one,) = TextHandover(lead, proposal(), "confidence(window=2, threshold=0)").generate(
        ["a"], SamplingParams(max_tokens=200, seed=0)
    )
    assert one.handover_at == 2
    assert max(passes) <= 1 + drafts.FIRST_LOOK


def test_a_stop_text_may_begin_before_the_hand_over_and_end_behind_it():
    lead = leader(ScriptedLM(ids_of(SMALL, "ab ab ab"), 4))
    over = TextHandover(lead, proposal(FOLLOWING), "confidence(window=2, threshold=0)")
    for seed in range(6):
        (whole,) = over.generate(["a"], SamplingParams(max_tokens=9, seed=seed))
        begun = len(LARGE.decode(whole.tokens[:2]))
        stop = whole.text[begun - 1 : begun + 1]
        (one,) = over.generate(["a"], SamplingParams(max_tokens=9, seed=seed, stop=stop))
        assert one.text == whole.text[: whole.text.find(stop)]
        assert one.finish_reason == "stop"


def test_each_completion_and_each_request_goes_its_own_way():
    both = TextHandover(leader(), proposal(), "confidence(window=2, threshold=0.12)")
    params = [
        SamplingParams(max_tokens=8, n=3, seed=1),
        SamplingParams(max_tokens=5, seed=2, handover="confidence(window=1, threshold=0)"),
    ]
    found = both.generate(["ab", "b a"], params)
    alone = [one for prompt, p in zip(["ab", "b a"], params, strict=True) for one in both.generate(prompt, p)]
    assert found == alone
    assert [one.index for one in found] == [0, 1, 2, 0]
    assert len({one.text for one in found[:3]}) > 1
    assert found[3].handover_at == 1


# ---- what cannot be


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("a", {"logit_bias": {1: 1.0}}, "logit_bias speaks of one model's tokens"),
        ("a", {"stop_token_ids": (2,)}, "stop_token_ids speaks"),
        ("a", {"ignore_eos": True}, "ignore_eos speaks"),
        ("a", {"logprobs": True}, "logprobs speaks"),
        ([1, 2], {}, "must be a text or messages: token ids are of one of the two vocabularies"),
        ("", {}, r"prompts\[0\] is empty"),
        ("a", {"handover": "confidence(before=product)"}, "leave both out"),
    ],
)
def test_what_speaks_of_one_models_tokens_is_refused(prompt, settings, said):
    with pytest.raises((InvalidRequest, InvalidOption), match=said):
        TextHandover(leader(), proposal()).generate([prompt], SamplingParams(**settings))


def test_what_cannot_be_handed_over_is_refused():
    with pytest.raises(InvalidOption, match="hands nothing over between two models; give 'confidence"):
        TextHandover(leader(), proposal(), "product")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="the leader has no tokenizer"):
        TextHandover(AlignedModel(LEADING), proposal())


def test_a_server_that_echoes_no_log_probabilities_is_told_at_once():
    answer = Reply({"choices": [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "length"}]})
    with scripted(lambda asked, number: answer, models=[{"id": "m"}]) as server, Endpoints([server.url], Limits()) as endpoints:
        with pytest.raises(EndpointError, match="echoes no log-probabilities of prompts"):
            TextHandover(leader(), RemoteProposal(endpoints, LARGE)).generate(["ab"], SamplingParams(max_tokens=40, seed=0))
        with pytest.raises(InvalidRequest, match="proposal_temperature is of models that run here"):
            TextHandover(leader(), RemoteProposal(endpoints, LARGE)).generate(["ab"], SamplingParams(proposal_temperature=2.0))
    assert len(server.asked) == 1


def test_knobs_of_the_proposals_row_count_for_what_it_reads_and_writes():
    params = {"proposal_temperature": 0.001}
    both = TextHandover(leader(), proposal(), "confidence(window=1, threshold=0.9)")
    cold, warm = (both.generate("ab a", SamplingParams(max_tokens=6, seed=0, n=64, **warps)) for warps in (params, {}))
    assert not any(one.handover_at for one in warm)
    handed = [one for one in cold if one.handover_at]
    assert handed
    greedy = proposal()
    for one in handed:
        begun, rest = one.tokens[: one.handover_at], one.tokens[one.handover_at :]
        (best,) = greedy.generate([[*ids_of(LARGE, "ab a"), *begun]], SamplingParams(max_tokens=len(rest), temperature=0))
        assert best.tokens == rest
