"""Heads: the rows of the upper layers, run again with an adapter, are those of PEFT's own model of the whole proposal."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from models import test_contract as contract
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, SamplingParams
from trimtab.decode.assemble import Loader
from trimtab.decode.engine import Engine
from trimtab.errors import InvalidOption, InvalidRequest, ManifestError, UnsupportedModel
from trimtab.models.adapters import Adapted
from trimtab.models.aligner import Manifest, describe
from trimtab.models.base import State
from trimtab.models.blocks import LEAN, projections_of
from trimtab.models.fingerprint import digest_model
from trimtab.models.head import Head, HeadPool
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.loading import load_model
from trimtab.models.lora_folder import PROJECTIONS
from trimtab.models.vocabulary import fingerprint_vocabulary

# The contract suite, run over a head with its proposal: its tests take the fixture `case`, which this module defines anew.
test_stepwise_is_chunked = contract.test_stepwise_is_chunked
test_ragged_batch_is_each_alone = contract.test_ragged_batch_is_each_alone
test_rollback_is_recompute = contract.test_rollback_is_recompute
test_select_copies_repeats_and_drops = contract.test_select_copies_repeats_and_drops
test_rows_are_normalised = contract.test_rows_are_normalised_and_depend_on_the_prefix

V = 28
LAYERS = 4
IDS = contract.tokens(9, seed=1) % V


class Both(State):
    """A proposal's state and a head's."""

    def __init__(self, proposal: State, head: State) -> None:
        super().__init__(proposal.lengths, proposal.capacity)
        self.proposal, self.head = proposal, head
        self.lengths = proposal.lengths


class Whole:
    """A head with its proposal, as a model of tokens."""

    def __init__(self, proposal: HuggingFaceLM, head: Adapted) -> None:
        self.proposal, self.head = proposal, head
        self.vocab_size, self.max_length, self.device = proposal.vocab_size, proposal.max_length, proposal.device

    def new_state(self, slots: int, capacity: int) -> Both:
        return Both(self.proposal.new_state(slots, capacity), self.head.new_state(slots, capacity))

    def extend(self, state: Both, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        tap = self.head.pool.tap
        _, tapped = self.proposal.extend_tapped(state.proposal, tokens, counts, [tap], last_only=True)
        return self.head.extend(state.head, tapped[tap], counts)

    def prefill(self, state: Both, tokens: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        tap = self.head.pool.tap
        _, tapped = self.proposal.extend_tapped(state.proposal, tokens, counts, [tap], last_only=True)
        return self.head.prefill(state.head, tapped[tap], counts)

    def rollback(self, state: Both, counts: Sequence[int]) -> None:
        self.proposal.rollback(state.proposal, counts)
        self.head.rollback(state.head, counts)

    def select(self, state: Both, rows: Sequence[int]) -> Both:
        return Both(self.proposal.select(state.proposal, rows), self.head.select(state.head, rows))


def save_base(folder: Path, kind: str = "llama", seed: int = 7, **settings: Any) -> Path:
    model = tiny_model(kind, V, seed=seed, spread=0.2, num_hidden_layers=LAYERS, **settings)
    return save_tiny(folder, model, tiny_tokenizer())


def save_head(folder: Path, base: Path, tap: int, seed: int = 0, weight: float = 1.0) -> Path:
    """A head of which all weights are random."""
    names = projections_of(load_model(base).config)
    settings = {"r": 3, "target_modules": names, "layers_to_transform": list(range(tap, LAYERS))}
    save_lora(folder, base, seed, **settings)
    tiny_tokenizer().save_pretrained(folder)
    manifest = Manifest(
        vocabulary=fingerprint_vocabulary(tiny_tokenizer()),
        rule="geometric",
        weight=weight,
        head={"tap": tap, "layers": LAYERS, "proposal": digest_model(load_model(base))},
    )
    (folder / "trimtab.json").write_text(json.dumps(manifest.to_dict()), encoding="utf-8")
    return folder


def peft_rows(base: Path, folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    """The reference: the whole proposal inside PEFT's model, by stock modules and without a cache."""
    with torch.no_grad():
        return torch.log_softmax(PeftModel.from_pretrained(load_model(base), str(folder)).eval()(ids).logits, -1)


def head_of(base: Path, folder: Path) -> Whole:
    proposal = HuggingFaceLM(load_model(base), owned=True)
    loader = Loader(tiny_tokenizer(), dtype="auto", device=None)
    loader.proposal = proposal
    return Whole(proposal, loader.load(folder).model)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Heads of several taps."""
    folder = tmp_path_factory.mktemp("heads")
    return [save_head(folder / str(i), base, tap, seed=i) for i, tap in enumerate((2, 2, 0, 3))]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Whole, float]:
    """What the contract suite runs over."""
    folder = tmp_path_factory.mktemp("contract")
    model = tiny_model("llama", 32, spread=0.5 if request.param == "float32" else 0.1, num_hidden_layers=LAYERS)
    base = save_tiny(folder / "base", model, tiny_tokenizer())
    lora = save_lora(folder / "lora", base, r=4, target_modules=PROJECTIONS, layers_to_transform=[2, 3])
    proposal = HuggingFaceLM(load_model(base, dtype=request.param))
    pool = HeadPool(proposal, 2)
    return Whole(proposal, Adapted(pool, pool.store.read(lora, "head"))), 5e-5 if request.param == "float32" else 6e-2


@pytest.mark.parametrize("kind", LEAN)
@pytest.mark.parametrize("tap", [0, 2, 3])
def test_rows_are_those_of_peft(kind, tap, tmp_path):
    base = save_base(tmp_path / "base", kind)
    folder = save_head(tmp_path / "head", base, tap)
    whole = head_of(base, folder)
    found = whole.extend(whole.new_state(1, 9), IDS, [9])
    assert_close(found, peft_rows(base, folder), atol=1e-5, rtol=0)
    assert (found - whole.proposal.extend(whole.proposal.new_state(1, 9), IDS, [9])).abs().max() > 0.01


def test_a_slot_without_a_head_is_the_proposal(base):
    proposal = HuggingFaceLM(load_model(base))
    pool = HeadPool(proposal, 1)
    rows, tapped = proposal.extend_tapped(proposal.new_state(1, 9), IDS, [9], [1])
    found = pool.extend(pool.new_state(1, 9), tapped[1], [9])
    assert_close(found, rows, atol=1e-6, rtol=0)
    assert not found.requires_grad  # a graph of it would hold the rows


def test_the_aligned_model_at_weight_one_is_petfs_and_at_zero_the_proposal(base, folders):
    prompt, answer = "the quick", "brown fox"
    ids = torch.tensor([tiny_tokenizer()(prompt + answer)["input_ids"]])
    for folder in folders:
        model = AlignedModel.from_pretrained(base, folder)
        score = model.score(prompt, answer, SamplingParams(weight=1.0))[0]
        rows = peft_rows(base, folder, ids)[0, len(prompt) - 1 :]
        wanted = rows.gather(1, torch.tensor(score.tokens)[:, None]).squeeze(1)
        assert_close(torch.tensor(score.aligned), wanted, atol=1e-4, rtol=0)
        bare = model.score(prompt, answer, SamplingParams(weight=0.0))[0]
        assert_close(torch.tensor(bare.aligned), torch.tensor(score.proposal), atol=1e-5, rtol=0)


@pytest.mark.parametrize("draft", ["none", "ngram"])
def test_requests_of_any_heads_get_what_they_get_alone(draft, base, folders):
    """Heads of one tap and of others, and bare requests, share each pass of the proposal."""
    other = AlignedModel.from_pretrained(base, list(folders), draft=draft)
    alone = [AlignedModel.from_pretrained(base, folder, draft=draft) for folder in folders]
    bare = AlignedModel.from_pretrained(base, draft=draft)
    lineups = [other.with_aligners([head], [describe(f).manifest]) for head, f in zip(other.aligners, folders, strict=True)]
    engine = Engine(other.proposal, other.pace, max_num_seqs=8, max_num_batched_tokens=5)
    groups = []
    for i in range(10):
        params = SamplingParams(seed=i, max_tokens=6 + i, ignore_eos=True)
        who = lineups[i % 5] if i % 5 < 4 else other.with_aligners([])
        groups.append(who.prepare("the quick brown fox"[: 3 + i], params, i))
        engine.submit(groups[-1])
        engine.step()
    while engine:
        engine.step()
    for i, (sequence,) in enumerate(groups):
        params = SamplingParams(seed=i, max_tokens=6 + i, ignore_eos=True)
        reference = alone[i % 5] if i % 5 < 4 else bare
        assert sequence.tokens == reference.generate("the quick brown fox"[: 3 + i], params)[0].tokens


def whole_passes(model: AlignedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where passes of all of the proposal's layers will be noted."""
    noted: list[int] = []
    forward = model.proposal._forward

    def note(state: State, tokens: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
        noted.append(tokens.shape[1])
        return forward(state, tokens, *args, **settings)

    monkeypatch.setattr(model.proposal, "_forward", note)
    return noted


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "asked",
    [{}, {"weight": [0.5, 0.5]}, {"weight": [0.0, 1.0]}, {"rule": "nucleus"}, {"rule": "mixture", "weight": [0.25, 0.75]}],
)
def test_layers_whose_rows_nobody_reads_are_not_run(asked, temperature, base, folders, monkeypatch):
    """At weight 1 the aligned model is the head's: the proposal's own upper layers say nothing. Log-probabilities ask them."""
    model = AlignedModel.from_pretrained(base, [folders[0], folders[2]], draft="ngram", max_num_seqs=2)
    params = SamplingParams(**{"weight": [1.0, 0.0], "temperature": temperature, "seed": 3, "max_tokens": 12, **asked})
    prompts = ["the quick brown", "a fox", "the"]
    noted = whole_passes(model, monkeypatch)
    found = model.generate(prompts, params)
    assert not noted
    asked_for = model.generate(prompts, dataclasses.replace(params, logprobs=True))
    assert noted
    assert [one.tokens for one in found] == [one.tokens for one in asked_for]
    scores = model.score(prompts, [one.tokens for one in asked_for], params)
    for score, one in zip(scores, asked_for, strict=True):
        assert_close(torch.tensor(one.logprobs.proposal), torch.tensor(score.proposal), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "asked", [{"weight": 0.9}, {"weight": 0.0}, {"proposal_top_p": 0.9}, {"rule": "kl_gate"}, {"rule": "nudge"}]
)
def test_rows_that_somebody_reads_are_there(asked, base, folders, monkeypatch):
    model = AlignedModel.from_pretrained(base, folders[0])
    noted = whole_passes(model, monkeypatch)
    params = SamplingParams(**{"weight": 1.0, "seed": 3, "max_tokens": 8, **asked})
    found = model.generate("the quick", params)[0]
    assert noted
    assert found.tokens == model.generate("the quick", dataclasses.replace(params, logprobs=True))[0].tokens


def test_who_needs_the_whole_proposal_may_come_and_go(base, folders, monkeypatch):
    """A request that left layers out goes on beside one that needs them, whatever those layers say of its own text."""
    model = AlignedModel.from_pretrained(base, folders[0], draft="ngram")
    noted = whole_passes(model, monkeypatch)
    engine = Engine(model.proposal, model.pace, max_num_seqs=4)
    light = model.prepare("the quick", SamplingParams(seed=1, max_tokens=40, ignore_eos=True), 0)
    engine.submit(light)
    for _ in range(4):
        engine.step()
    assert not noted
    poisoned = engine._batch._state.layers[-1]
    poisoned.keys, poisoned.values = torch.full([4, 2, 64, 8], torch.nan), torch.full([4, 2, 64, 8], torch.nan)
    poisoned.is_initialized = True
    heavy = model.prepare("a fox", SamplingParams(seed=2, max_tokens=5, ignore_eos=True, weight=0.3), 1)
    engine.submit(heavy)
    while engine:
        engine.step()
    assert noted
    for sequence, (prompt, weight) in zip(light + heavy, (("the quick", 1.0), ("a fox", 0.3)), strict=True):
        wanted = SamplingParams(
            seed=sequence.seed, max_tokens=len(sequence.tokens), ignore_eos=True, weight=weight, logprobs=True
        )
        assert sequence.tokens == model.generate(prompt, wanted)[0].tokens


def test_a_dead_row_is_not_blamed_on_a_proposal_that_nobody_asked(base, folders):
    model = AlignedModel.from_pretrained(base, folders[0])
    with torch.no_grad():
        model.proposal.model.model.norm.weight.fill_(torch.nan)  # of both, but only the head was run
    found = model.generate("the quick", SamplingParams(max_tokens=4))[0]
    assert found.finish_reason == "error"
    assert "aligner 0 gives NaN" in found.error


def test_several_heads_multiply_their_ratios(base, folders):
    """∝ p^(1 − w₁ − w₂) · q₁^w₁ · q₂^w₂ = p · (q₁/p)^w₁ · (q₂/p)^w₂."""
    weights = [0.7, 0.4]
    model = AlignedModel.from_pretrained(base, folders[1:3], weight=weights)
    score = model.score("the quick", "brown", SamplingParams(top_logprobs=0))[0]
    ids = torch.tensor([tiny_tokenizer()("the quickbrown")["input_ids"]])
    with torch.no_grad():
        p = torch.log_softmax(load_model(base)(ids).logits[0, 8:], -1)
    ratios = [peft_rows(base, folder, ids)[0, 8:] - p for folder in folders[1:3]]
    target = torch.log_softmax(p + weights[0] * ratios[0] + weights[1] * ratios[1], -1)
    wanted = target.gather(1, torch.tensor(score.tokens)[:, None]).squeeze(1)
    assert_close(torch.tensor(score.aligned), wanted, atol=1e-4, rtol=0)


def test_several_completions_of_one_prompt(base, folders):
    model = AlignedModel.from_pretrained(base, folders[0])
    found = model.generate("the quick", SamplingParams(n=3, seed=5, max_tokens=12))
    assert [one.tokens for one in found] == [
        one.tokens for one in model.with_draft_length(0).generate("the quick", SamplingParams(n=3, seed=5, max_tokens=12))
    ]
    assert len({tuple(one.tokens) for one in found}) == 3


def test_a_head_cannot_draft(base, folders):
    with pytest.raises(InvalidOption, match="draft: the first aligner is a head"):
        AlignedModel.from_pretrained(base, folders[0], draft="aligner")
    with pytest.raises(InvalidOption, match="draft: a head reads what the proposal has read, and cannot draft"):
        AlignedModel.from_pretrained(base, folders[0], draft=folders[1])
    assert AlignedModel.from_pretrained(base, folders[0]).drafter == "none"


def test_a_head_belongs_to_one_proposal(base, folders, tmp_path):
    other = save_base(tmp_path / "other", seed=8)
    with pytest.raises(UnsupportedModel, match="is a head of another proposal"):
        AlignedModel.from_pretrained(other, folders[0])
    assert AlignedModel.from_pretrained(base, folders[0], dtype="bfloat16").score("the", "fox")[0].aligned  # in every dtype


def test_a_fine_tuned_proposal_is_another_one(base, folders, tmp_path):
    """LoRA that is merged changes no norm and no embedding."""
    merged = PeftModel.from_pretrained(load_model(base), str(folders[0])).merge_and_unload()
    with pytest.raises(UnsupportedModel, match="is a head of another proposal"):
        AlignedModel.from_pretrained(save_tiny(tmp_path, merged, tiny_tokenizer()), folders[0])


def test_a_proposal_is_recognised_in_every_dtype_and_packed_or_lent(tmp_path):
    """Its embedding is large enough to be packed, and small enough in places for float16 to round it."""
    model = tiny_model("llama", 2**15, spread=0.02, tie_word_embeddings=False).to(torch.bfloat16)
    folder = save_tiny(tmp_path, model, tiny_tokenizer())
    assert (model.model.embed_tokens.weight.half().float() != model.model.embed_tokens.weight).any()
    wanted = digest_model(model)
    for dtype in ("bfloat16", "float16", "float32"):
        assert HuggingFaceLM(load_model(folder, dtype=dtype)).digest == wanted
        assert HuggingFaceLM(load_model(folder, dtype=dtype), owned=True).digest == wanted


def test_float16_is_named_where_it_may_be_why(base, folders):
    with pytest.raises(UnsupportedModel, match="are not recognised in float16: choose another --dtype"):
        AlignedModel.from_pretrained(base, folders[0], dtype="float16")


def test_a_head_that_is_loaded_reads_its_own_proposal_only(base, folders, tmp_path):
    head = AlignedModel.from_pretrained(base, folders[0]).aligners[0]
    other = AlignedModel.from_pretrained(save_base(tmp_path, seed=8))
    with pytest.raises(UnsupportedModel, match=r"aligners\[0\] is a head that reads another proposal's hidden states"):
        other.with_aligners([head])


def test_a_head_follows_a_lent_proposal_that_its_owner_changes(base, folders):
    """Other weights are read from then on; in another dtype, or with something added, it is of no use."""
    lent = load_model(base)
    model = AlignedModel.from_pretrained(lent, folders[0], tokenizer=tiny_tokenizer())
    first, projection = model.score("the", "fox")[0].aligned, lent.model.layers[3].mlp.down_proj
    projection.weight = torch.nn.Parameter(3 * projection.weight.detach())
    changed = model.score("the", "fox")[0].aligned
    with torch.no_grad():
        projection.weight /= 3
    assert changed != pytest.approx(first, abs=1e-2)
    assert model.score("the", "fox")[0].aligned == pytest.approx(first, abs=1e-5)
    lent.to(torch.bfloat16)
    with pytest.raises(UnsupportedModel, match="its dtype has changed"):
        model.score("the", "fox")


def test_a_head_needs_hidden_states(base, folders):
    with pytest.raises(UnsupportedModel, match="Use it as a LoRA adapter of the proposal"):
        Loader(tiny_tokenizer(), dtype="auto", device=None).load(folders[0])
    lean = HuggingFaceLM(load_model(base), lean=False)
    with pytest.raises(UnsupportedModel, match="run by its stock modules"):
        AlignedModel.from_pretrained(lean, folders[0], tokenizer=tiny_tokenizer())
    head = AlignedModel.from_pretrained(base, folders[0]).aligners[0]
    with pytest.raises(InvalidRequest, match="cannot be used without its proposal"):
        head.extend(head.new_state(1, 4), IDS[:, :4], [4])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"tap": 4, "layers": 4, "proposal": "sha256:0"}, "tap must be a layer from 0 to layers"),
        ({"tap": True, "layers": 4, "proposal": "sha256:0"}, "tap must be a layer from 0 to layers"),
        ({"tap": 1, "layers": 4, "proposal": "md5:0"}, "proposal must be a digest"),
        ({"tap": 1, "layers": 4}, "head must be"),
        (7, "head must be"),
    ],
)
def test_what_a_manifest_may_say(head, message):
    with pytest.raises(ManifestError, match=message):
        Manifest(vocabulary="sha256:0", head=head)
    assert Head.from_dict({"tap": 0, "layers": 1, "proposal": "sha256:0"}) == Head(0, 1, "sha256:0")
