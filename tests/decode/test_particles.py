"""Runs of particles as requests: where texts end, what is read once, what cannot go on, what is refused, what is warned of."""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel

from decode.test_dead_rows import ALIGNER, EOS, KINDS, PROPOSAL, Apart, ApartToo
from models.test_head import save_base, save_head
from statistics_of import fits
from tiny import save_lora, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.core.rules import Product
from trimtab.decode.request import Particles
from trimtab.decode.sequence_level import SequenceLevel, parse_sequence_level
from trimtab.decode.text import TextStream
from trimtab.errors import InvalidRequest
from trimtab.models.loading import load_model
from trimtab.models.table import TableLM, enumerate_sequences

HOW = "particles=5,ess=0.8"


class Counting(TableLM):
    """Notes how many tokens it reads of each slot in a pass."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(table)
        self.read: list[list[int]] = []

    def extend(self, state, tokens, counts):
        self.read.append(list(counts))
        return super().extend(state, tokens, counts)


def tables(vocab_size: int = 7, scale: float = 1.2) -> list[TableLM]:
    return [TableLM.random(vocab_size, order=1, seed=seed, scale=scale) for seed in (21, 22)]


def at_sequence_level(model: AlignedModel, prompts: Any, params: Any, how: str = HOW) -> list[Any]:
    return model.generate(prompts, params, sequence_level=how)


def all_texts(model: AlignedModel, prompts: Any, params: SamplingParams) -> list[Any]:
    """The tokens that were drawn, and those of all particles, of each completion."""
    done = at_sequence_level(model, prompts, params)
    return [(d.tokens, [one.tokens for one in d.particles.completions]) for d in done]


# ---- where texts end


def ends(y: tuple[int, ...]) -> bool:
    return y[-1] in (0, 3) or y[-2:] == (1, 2) or len(y) == 5


def completions(row: Any, y: tuple[int, ...] = (), logw: float = 0.0) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every completion that `ends`, with its log weight."""
    if y and ends(y):
        yield y, logw
        return
    for token, step in enumerate(row(y).tolist()):
        yield from completions(row, (*y, token), logw + step)


def test_texts_end_at_stops_stop_ids_ends_of_sequence_and_the_limit():
    """The target is over completions that end so; every particle's text is that of its tokens, cut before the stop."""
    proposal, aligner = tables(4, scale=1.0)
    tokenizer = tiny_tokenizer("abc")
    model = AlignedModel(proposal, [aligner], tokenizer, eos_token_ids=[0], max_num_seqs=4096)
    params = SamplingParams(n=150, max_tokens=5, seed=3, stop=["ab"], stop_token_ids=[3])
    done = at_sequence_level(model, ["ca"], params, "particles=40")
    seen = set()
    for one in (one for d in done for one in d.particles.completions):
        whole = tokenizer.decode([token for token in one.tokens if token not in (0, 3)])
        assert one.text == whole.removesuffix("ab")
        assert one.finish_reason == ("stop" if one.tokens[-1] in (0, 3) or whole.endswith("ab") else "length")
        seen.add((one.finish_reason, one.tokens[-1] in (0, 3)))
    assert seen == {("stop", True), ("stop", False), ("length", False)}
    logw = dict(completions(lambda y: proposal.row([3, 1, *y]) + aligner.row([3, 1, *y])))
    log_z = float(torch.tensor(list(logw.values())).double().logsumexp(-1))
    assert fits([tuple(d.tokens) for d in done], {y: w - log_z for y, w in logw.items()}) > 1e-3


def test_a_forked_stream_goes_its_own_way():
    tokenizer = tiny_tokenizer("abc")
    stream = TextStream(tokenizer, ["bc"])
    assert stream.push(1) == "a"
    assert stream.push(2) == ""
    other = stream.fork()
    assert (stream.push(1), other.push(3)) == ("ba", "")
    assert (stream.stopped, other.stopped) == (False, True)
    assert (stream.text, other.text) == ("aba", "a")


def test_n_completions_are_runs_of_their_own_and_a_seed_gives_them_again():
    proposal, aligner = tables()
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0])
    first = all_texts(model, [[1], [2]], SamplingParams(n=3, max_tokens=6, seed=4))
    assert first == all_texts(model, [[1], [2]], SamplingParams(n=3, max_tokens=6, seed=4))
    assert first[:2] == all_texts(model, [[1]], SamplingParams(n=2, max_tokens=6, seed=4))
    assert len({str(texts) for texts in first}) == len(first)
    assert first != all_texts(model, [[1], [2]], SamplingParams(n=3, max_tokens=6, seed=5))
    done = at_sequence_level(model, [[1], [2]], SamplingParams(n=3, max_tokens=6, seed=4))
    assert [(d.index, d.seed, d.prompt_tokens) for d in done] == [(0, 4, 1), (1, 4, 1), (2, 4, 1)] * 2


def test_the_weighted_set_holds_the_completion_and_its_weights_sum_to_one():
    proposal, aligner = tables()
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0])
    (done,) = at_sequence_level(model, [[1]], SamplingParams(max_tokens=6, seed=4))
    found = done.particles
    assert len(found.completions) == len(found.weights) == 5
    assert sum(found.weights) == pytest.approx(1)
    assert done.tokens in [one.tokens for one in found.completions]
    assert all(one.particles is None for one in found.completions)
    assert found.effective_size == pytest.approx(1 / sum(weight**2 for weight in found.weights))
    assert 1 <= found.origins <= 5


# ---- what is read


def test_the_prompt_is_read_once_and_particles_that_have_ended_are_read_no_more():
    proposal, aligner = (Counting(table.table) for table in tables())
    prompt = [1, 2, 3, 4, 5]
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0], max_num_seqs=15)
    done = at_sequence_level(model, [prompt], SamplingParams(n=3, max_tokens=8, seed=1), "particles=5,ess=0")
    assert proposal.read[0] == aligner.read[0] == [5]
    lengths = [len(one.tokens) for d in done for one in d.particles.completions]
    steps = [sum(length > t for length in lengths) for t in range(1, max(lengths))]
    assert [len(counts) for counts in proposal.read[1:]] == [len(counts) for counts in aligner.read[1:]] == steps
    assert {count for counts in proposal.read[1:] for count in counts} == {1}


def test_prompts_that_begin_as_earlier_ones_are_not_read_again():
    proposal, aligner = (Counting(table.table) for table in tables())
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0])
    prompt = [1, 2, 3, 4] * 10
    first = all_texts(model, [prompt], SamplingParams(max_tokens=4, seed=1))
    proposal.read.clear()
    assert all_texts(model, [prompt], SamplingParams(max_tokens=4, seed=1)) == first
    assert proposal.read[0] == [1]
    proposal.read.clear()
    model.generate([prompt], SamplingParams(max_tokens=1, seed=1))
    assert proposal.read[0] == [1]  # nor by requests at the token level
    proposal.read.clear()
    bare = model.with_prefix_cache(0)
    assert all_texts(bare, [prompt], SamplingParams(max_tokens=4, seed=1)) == first
    assert proposal.read[0] == [40]


def test_adapters_that_share_a_base_give_what_merged_ones_give(tmp_path):
    base = save_base(tmp_path / "base")
    adapter = save_lora(tmp_path / "adapter", base, r=3, target_modules=["q_proj", "v_proj"])
    merged = PeftModel.from_pretrained(load_model(base), str(adapter)).merge_and_unload()
    pooled = AlignedModel.from_pretrained(base, adapter, tokenizer=tiny_tokenizer(), rule="product")
    whole = AlignedModel.from_pretrained(base, merged, tokenizer=tiny_tokenizer(), rule="product")
    assert pooled.models.adapters[1] is not None
    params = SamplingParams(n=2, max_tokens=12, seed=3)
    assert all_texts(pooled, [[1, 2], [3]], params) == all_texts(whole, [[1, 2], [3]], params)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_head_gives_what_the_whole_aligner_gives(tmp_path, weight):
    """At weight 1 nobody reads the proposal, and every log Z is 0; a prompt that reads it is in the batch, too."""
    base = save_base(tmp_path / "base")
    head = save_head(tmp_path / "head", base, 2)
    merged = PeftModel.from_pretrained(load_model(base), str(head)).merge_and_unload()
    on_layers = AlignedModel.from_pretrained(base, head, max_num_seqs=64)
    whole = AlignedModel.from_pretrained(base, merged, tokenizer=tiny_tokenizer(), rule="geometric", max_num_seqs=64)
    params = [SamplingParams(max_tokens=10, seed=3, weight=w) for w in (weight, 0.7)]
    found, expected = (at_sequence_level(model, [[1, 2], [3]], params) for model in (on_layers, whole))
    assert [d.tokens for d in found] == [d.tokens for d in expected]
    assert [d.particles.log_z for d in found] == pytest.approx([d.particles.log_z for d in expected], abs=1e-4)
    assert (abs(found[0].particles.log_z) < 1e-5) == (weight == 1)


# ---- what cannot go on

ROWLESS = {"of a gate", "of candidates", "of no candidates", "greedily", "under cuts"}
"""Requests that there is no sequence-level law for."""


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - ROWLESS))
def test_a_run_without_a_next_row_ends_and_says_why_and_others_go_on(kind):
    proposal, aligner, settings, reason = KINDS[kind]
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], **settings)
    done = at_sequence_level(model, [[6], [1], [6]], SamplingParams(max_tokens=1, seed=2), "particles=3")
    for sick in (done[0], done[2]):
        assert (sick.finish_reason, sick.tokens, sick.particles) == ("error", [], None)
        assert reason in sick.error
    assert done[1].finish_reason == "length"
    later = [at_sequence_level(model, [[1]], SamplingParams(max_tokens=3, seed=seed), "particles=3")[0] for seed in range(9)]
    if kind != "nothing in common":  # there, particles only weigh nothing
        assert any(one.error and reason in one.error for one in later)
        assert {one.finish_reason for one in later} > {"error"}


def test_particles_at_places_without_a_token_weigh_nothing():
    """The law is that of the texts that avoid them: exact, although the token-level law runs into them."""
    proposal, aligner = Apart(PROPOSAL.table), ApartToo(ALIGNER.table)
    model = AlignedModel(proposal, [aligner], eos_token_ids=[EOS], max_num_seqs=4096)
    params = SamplingParams(n=150, max_tokens=3, seed=2)
    assert any(one.error for one in model.generate([[1]], params))
    done = at_sequence_level(model, [[1]], params, "particles=40")
    assert not any(one.error for one in done)
    weighed = [(one, weight) for d in done for one, weight in zip(d.particles.completions, d.particles.weights, strict=True)]
    assert {weight for one, weight in weighed if one.error} == {0.0}
    logw = enumerate_sequences(lambda prefix: proposal.row(prefix) + aligner.row(prefix), [1], 3, [EOS])
    log_z = float(torch.tensor(list(logw.values())).double().logsumexp(-1))
    assert fits([tuple(d.tokens) for d in done], {y: w - log_z for y, w in logw.items()}) > 1e-3


# ---- what is said and refused


@pytest.mark.parametrize("asked", ["particles=16", "particles=16,ess=0.5", " ess = .5 , particles = 16 ", SequenceLevel(16)])
def test_settings_are_read(asked):
    assert parse_sequence_level(asked) == SequenceLevel(16, 0.5)
    assert parse_sequence_level(str(parse_sequence_level(asked))) == SequenceLevel(16, 0.5)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("16", "sequence_level: '16' is none of particles=…, ess=…"),
        ("particles=16,size=3", "sequence_level: 'size=3' is none of particles=…, ess=…"),
        ("ess=0.5", "sequence_level: 'ess=0.5' lacks particles=…, how many texts grow side by side"),
        ("particles=4,particles=5", "sequence_level: 'particles=4,particles=5' gives particles twice"),
        ("particles=many", "sequence_level: particles must be a number, not 'many'"),
        ("particles=1", "sequence_level: particles must be an integer from 2 to 65536, not 1; a single one follows"),
        ("particles=2.5", "sequence_level: particles must be an integer from 2 to 65536, not 2.5"),
        ("particles=4,ess=1.5", "sequence_level: ess must be a number from 0 to 1, not 1.5"),
        (16, "sequence_level must be a text such as 'particles=16', or a SequenceLevel, not 16"),
    ],
)
def test_settings_that_cannot_be_are_refused(asked, message):
    with pytest.raises(InvalidRequest) as error:
        parse_sequence_level(asked)
    assert message in str(error.value)


class LooksBack(Product):
    """A product that would see the token before."""

    window = 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"rule": "kl_gate"}, "sequence_level: rule 'kl_gate' does not weigh each token by itself"),
        ({"rule": "candidates(n=4)"}, "sequence_level: rule 'candidates(n=4)' does not weigh each token by itself"),
        ({"rule": "nucleus(force_eos=true)"}, "use product, geometric, or nucleus without force_eos"),
        ({"rule": LooksBack()}, "looks at the text before a row"),
        (
            {"temperature": 0.7},
            "temperature acts on the row that tokens are drawn from, and sequence_level draws by the rule's",
        ),
        ({"top_p": 0.9}, "top_p acts on the row"),
        ({"min_p": 0.1}, "min_p acts on the row"),
        ({"repetition_penalty": 1.1}, "repetition_penalty acts on the row"),
        ({"logit_bias": {1: 2.0}}, "logit_bias acts on the row"),
        ({"logprobs": True}, "logprobs are not kept at the sequence level"),
    ],
)
def test_what_has_no_such_law_or_would_change_it_is_refused_before_any_work(params, message):
    proposal, aligner = (Counting(table.table) for table in tables())
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0])
    with pytest.raises(InvalidRequest) as error:
        at_sequence_level(model, [[1], [2]], [SamplingParams(), SamplingParams(**params)])
    assert message in str(error.value)
    assert proposal.read == []


def test_the_proposal_alone_is_refused():
    with pytest.raises(InvalidRequest, match="sequence_level needs an aligner"):
        at_sequence_level(AlignedModel(tables()[0]), [[1]], SamplingParams())


def test_a_proposal_with_few_slots_says_how_many():
    proposal, aligner = tables()
    proposal.max_slots = 4
    with pytest.raises(InvalidRequest, match="holds at most 4 texts at once: use particles=4"):
        at_sequence_level(AlignedModel(proposal, [aligner], max_num_seqs=4), [[1]], SamplingParams())


@pytest.mark.parametrize(("after_two", "collapsed"), [(0.5, False), (0.001, True)])
def test_weights_that_have_collapsed_are_warned_of_with_figures(after_two, collapsed, caplog):
    """Texts of 1 and 2, at even odds; each 2 but the last costs its text a factor."""
    even, rest = [0.0, 0.5, 0.5, 0.0], [0.25] * 4
    rows = [rest, even, even, rest, even], [rest, even, [0.0, after_two, after_two, 1 - 2 * after_two], rest, rest]
    proposal, aligner = (TableLM(torch.tensor(row, dtype=torch.float64).log()) for row in rows)
    model = AlignedModel(proposal, [aligner], eos_token_ids=[0])
    with caplog.at_level(logging.WARNING, logger="trimtab.decode.particles"):
        (done,) = at_sequence_level(model, [[1]], SamplingParams(max_tokens=6, seed=0), "particles=8,ess=0")
    assert done.particles.collapsed == (done.particles.effective_size < 2) == collapsed
    assert ("the weights have collapsed in 1 of 1 runs: 8 particles were once worth 1." in caplog.text) == collapsed


def test_a_collapse_that_resampling_hides_is_one():
    sound = Particles([], [0.5, 0.5], log_z=0.0, effective_size=8.0, effective_sizes=[8.0, 4.0], resampled=[], origins=5)
    assert not sound.collapsed
    assert dataclasses.replace(sound, effective_sizes=[8.0, 1.5]).collapsed
    assert dataclasses.replace(sound, origins=1).collapsed
