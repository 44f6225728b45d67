"""A hand-over between two tokenizers has the law that is written here from its definition, here and behind an endpoint."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from scripted import Reply, scripted
from serving import folder_service, running, table_service
from statistics_of import chi_square
from tiny import EOS, ScriptedLM, bpe_tokenizer, save_tiny, tiny_model, tiny_tokenizer
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


OVER = "confidence(window=2, threshold=0.12)"
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
    both = TextHandover(leader(), proposal(), OVER)
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


def told(completions: Sequence[Any]) -> list[Any]:
    return [(one.text, one.handover_at, one.finish_reason) for one in completions]


@pytest.mark.parametrize("stop", [(), "bab", ("a ", "b a")])
def test_an_endpoint_goes_on_as_a_model_here_would(stop):
    params = SamplingParams(max_tokens=9, n=40, seed=3, stop=stop)
    here = TextHandover(leader(), proposal(), OVER).generate(["ab a", "b"], params)
    with running(table_service([FOLLOWING], tokenizer=LARGE)) as server, Endpoints([server.url]) as endpoints:
        found = TextHandover(leader(), RemoteProposal(endpoints, LARGE), OVER).generate(["ab a", "b"], params)
    assert told(found) == told(here)
    assert {one.handover_at is None for one in here} == {True, False}
    assert any(one.handover_at == len(one.tokens) for one in found), "where the proposal ends at once"


def test_a_hand_over_inside_a_character_is_none_of_the_readers_business():
    """Here and there the proposal ends the character that its last token is a part of."""
    tokenizer = bpe_tokenizer(["\N{GRINNING FACE}a"], 0)
    ids = ids_of(tokenizer, "\N{GRINNING FACE}a")
    assert len(ids) == 5
    lead, follow = (AlignedModel(ScriptedLM(ids, len(tokenizer)), (), tokenizer, [EOS]) for _ in range(2))
    asked = ("x", SamplingParams(max_tokens=9, seed=0))
    (here,) = TextHandover(lead, follow, "confidence(window=2, threshold=0)").generate(*asked)
    service = table_service([ScriptedLM(ids, len(tokenizer))], tokenizer=tokenizer)
    with running(service) as server, Endpoints([server.url]) as endpoints:
        remote = RemoteProposal(endpoints, tokenizer)
        (there,) = TextHandover(lead, remote, "confidence(window=2, threshold=0)").generate(*asked)
    assert told([here]) == told([there]) == [("\N{GRINNING FACE}a", 2, "stop")]
    assert (here.tokens, there.tokens) == ([*ids, EOS], ids)


def test_an_endpoint_says_how_much_its_context_holds(tmp_path):
    model = tiny_model("llama", 7, max_position_embeddings=12)
    folder = save_tiny(tmp_path / "p", model, LARGE)
    with running(folder_service(folder, {})) as server, Endpoints([server.url]) as endpoints:
        both = TextHandover(leader(), RemoteProposal(endpoints, LARGE), "confidence(window=2, threshold=0)")
        here = TextHandover(leader(), AlignedModel.from_pretrained(folder), "confidence(window=2, threshold=0)")
        params = SamplingParams(max_tokens=40, seed=2, n=3)
        assert told(both.generate("ab ab a", params)) == told(here.generate("ab ab a", params))
        with pytest.raises(InvalidRequest, match=r"prompts\[1\] has 13 tokens, but the server's context holds 12"):
            both.generate(["a", "b" * 13], params)


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


@pytest.mark.parametrize("stop", [" a", "b b", "ab", ("a b", "ba")])
def test_a_stop_text_cuts_what_is_written_without_it_where_it_begins(stop):
    """In the leader's part, the proposal's, or across; and where the leader says it behind the hand-over, it is nothing."""
    both = TextHandover(leader(), proposal(), OVER)
    whole = both.generate(["ab a", "b"], SamplingParams(max_tokens=9, n=60, seed=5))
    cut = both.generate(["ab a", "b"], SamplingParams(max_tokens=9, n=60, seed=5, stop=stop))
    stops = [stop] if isinstance(stop, str) else stop
    places = [min((one.text.find(text) for text in stops if text in one.text), default=None) for one in whole]
    assert [one.text for one in cut] == [one.text[:at] for one, at in zip(whole, places, strict=True)]
    assert [one.finish_reason for one in cut] == [
        "stop" if at is not None else one.finish_reason for one, at in zip(whole, places, strict=True)
    ]
    assert sum(at is not None for at in places) > 5


def test_without_a_hand_over_the_text_is_the_leaders_own():
    """However the proposal's tokenizer would spell it."""
    tokenizer = merging_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    letters = tiny_tokenizer("aB ")
    lead = leader(ScriptedLM(ids_of(letters, "aB Ba"), 4), letters)
    never = TextHandover(lead, proposal(FOLLOWING, tokenizer), "confidence(threshold=1.1)")
    (one,) = never.generate("a", SamplingParams(max_tokens=20, seed=0))
    assert (one.text, one.tokens, one.finish_reason) == ("aB Ba", ids_of(tokenizer, "ab ba"), "stop")
    (one,) = never.generate("a", SamplingParams(max_tokens=20, seed=0, stop=" B"))
    assert (one.text, one.finish_reason) == ("aB", "stop")


class BrokenBehind(TableLM):
    """A table whose rows are NaN behind a token."""

    def __init__(self, table: TableLM, token: int) -> None:
        super().__init__(table.table)
        self.token = token

    def row(self, prefix: Sequence[int]) -> torch.Tensor:
        row = super().row(prefix)
        return torch.full_like(row, torch.nan) if prefix[-1] == self.token else row


def test_a_broken_row_ends_its_own_answer_alone():
    """Of the proposal where it matters, in what it reads or writes; of the leader where nothing else is there to say."""
    params = SamplingParams(max_tokens=9, n=40, seed=3)
    sound = TextHandover(leader(), proposal(), OVER).generate(["ab a", "b"], params)
    broken = TextHandover(leader(), proposal(BrokenBehind(FOLLOWING, 6)), OVER).generate(["ab a", "b"], params)
    failed = [one.finish_reason == "error" for one in broken]
    assert 0 < sum(failed) < len(failed)
    for one, other, lost in zip(broken, sound, failed, strict=True):
        if lost:
            assert "NaN" in one.error
            assert one.tokens == other.tokens[: len(one.tokens)]
        else:
            assert one == other
    led = TextHandover(leader(BrokenBehind(LEADING, 2)), proposal(), OVER).generate(["ab a", "b"], params)
    assert {one.error.partition(" gives")[0] for one in led if one.error} == {"the leader: the proposal"}
    assert any(one.handover_at for one in led)


def test_each_completion_and_each_request_goes_its_own_way():
    both = TextHandover(leader(), proposal(), OVER)
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


@pytest.mark.parametrize(
    "logprobs",
    [None, [None] * 9, [-1.0] * 30, [-1.0, 0.5] * 4, [-1.0, True] * 4, [-1.0]],
    ids=["none", "null", "many", "positive", "truth", "few"],
)
def test_a_server_that_echoes_no_log_probabilities_is_told_at_once(logprobs):
    told = None if logprobs is None else {"token_logprobs": logprobs}
    answer = Reply({"choices": [{"index": 0, "text": "ab", "logprobs": told, "finish_reason": "length"}]})
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
