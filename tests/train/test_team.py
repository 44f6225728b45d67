"""A team of aligners as a reward, and the one aligner that `trimtab distil` makes of it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import trimtab
from eval_task import called
from tiny import save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, make_task, task_rows, write_rows
from trimtab import AlignedModel, Aligner
from trimtab.errors import InvalidOption, ModelError, VocabularyMismatch
from trimtab.judges.asked import AskedRecords
from trimtab.judges.rewards.base import Ids
from trimtab.judges.rewards.combined import CombinedReward
from trimtab.judges.rewards.function import FunctionReward
from trimtab.judges.rewards.team import LEAST, TeamReward
from trimtab.models.aligner import Manifest
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.train.online.trainer import OnlineTrainer

NOTHING = AskedRecords([])
PROMPTS = ["de", "fgh", "de"]
QUICK = ("--per_device_train_batch_size", 8, "--learning_rate", 1e-2, "--report_to", "none", "--disable_tqdm", "--use_cpu")
SHORT = (*QUICK, "--max_steps", 4, "--eval_steps", 2, "--save_steps", 2, "--num_generations", 4, "--max_tokens", 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A proposal, a team of two, and prompts; and an aligner of another vocabulary."""
    folder = make_task(tmp_path_factory.mktemp("team"))
    for name, seed in (("one", 5), ("two", 6)):
        save_tiny(folder / name, tiny_model("llama", V, seed=seed, spread=0.25, num_hidden_layers=1), tiny_tokenizer())
    save_tiny(folder / "foreign", tiny_model("llama", 9, seed=7), tiny_tokenizer("abcdefgh"))
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in task_rows(12)])
    write_rows(folder / "single.jsonl", [{"prompt": "de"}])
    return folder


def team_of(folder, **how):
    return TeamReward(str(folder / "proposal"), [str(folder / "one"), str(folder / "two")], device="cpu", **how)


def loaded(reward):
    reward.load(NOTHING, "2026-11-30")
    return reward


def ids_of(model, answers):
    return Ids([model.encoder.prompt(prompt) for prompt in PROMPTS], answers)


# ---- the reward


@pytest.mark.parametrize("how", [{}, {"rule": "geometric", "weight": [0.7, -0.2]}, {"rule": "mixture", "weight": [0.3, 0.5]}])
def test_an_answer_is_worth_what_the_team_gives_it_more_than_the_proposal(folder, how):
    """Log P_team(y) − log P_M(y), each the sum over the ids that are there: with an end of sequence and without one."""
    reward = loaded(team_of(folder, **how))
    model = AlignedModel.from_pretrained(folder / "proposal", [folder / "one", folder / "two"], device="cpu", **how)
    end = model.eos_token_ids[0]
    answers = [[5, 6, end], [5, 6], [7, end]]
    ids = ids_of(model, answers)
    found = reward.score_drawn(PROMPTS, ["", "", ""], [{}] * 3, ids)
    scores = model.score(ids.prompts, answers)
    assert found == pytest.approx([sum(s.aligned) - sum(s.proposal) for s in scores], abs=1e-5)
    ending = scores[0].aligned[2] - scores[0].proposal[2]
    (cut,) = reward.score_tokens(["de"], Ids(ids.prompts[:1], [[5, 6]]))
    assert found[0] - cut == pytest.approx(ending, abs=1e-5)
    assert abs(ending) > 1e-3


def test_a_text_counts_as_a_whole_answer(folder):
    reward = loaded(team_of(folder))
    ids = [reward.encoder.pair(prompt, "xy") for prompt in PROMPTS]
    expected = reward.score_tokens(PROMPTS, Ids(*zip(*ids, strict=True)))
    assert reward.score(PROMPTS, ["xy"] * 3, [{}] * 3) == pytest.approx(expected)
    assert ids[0][1][-1] == reward.team.eos_token_ids[0]


def test_what_the_team_never_says_has_a_finite_price(folder):
    """Under nucleus the team says only what the proposal's nucleus has: here, its best token."""
    tokenizer = tiny_tokenizer()
    manifest = Manifest(vocabulary=fingerprint_vocabulary(tokenizer), rule="nucleus", proposal_top_p=1e-3)
    Aligner(tiny_model("llama", V, seed=5, num_hidden_layers=1), tokenizer, manifest, "narrow").save_pretrained(
        folder / "narrow"
    )
    reward = loaded(TeamReward(str(folder / "proposal"), [str(folder / "narrow")], device="cpu"))
    prompt = reward.encoder.prompt("de")
    found = reward.score_tokens(["de"] * V, Ids([prompt] * V, [[token] for token in range(V)]))
    assert sorted(found)[:-1] == [LEAST] * (V - 1)
    assert max(found) > 0


def test_the_fingerprint_covers_models_rule_and_weights(folder):
    plain = loaded(team_of(folder))
    assert loaded(team_of(folder)).fingerprint == plain.fingerprint
    others = [team_of(folder, weight=[1.0, 0.5]), team_of(folder, rule="geometric")]
    others += [TeamReward(str(folder / "proposal"), [str(folder / "one")]), TeamReward(str(folder / "start"), plain.aligners)]
    assert len({plain.fingerprint, *(loaded(other).fingerprint for other in others)}) == 5
    described = plain.describe()
    assert json.loads(json.dumps(described)) == described
    assert (described["weight"], described["rule"]) == ([1.0, 1.0], "product")
    assert json.loads(json.dumps(plain.identity())) == plain.identity()


def test_it_can_be_one_of_several_rewards(folder):
    """A team reads ids, and a function beside it texts."""
    team = loaded(team_of(folder))
    both = CombinedReward(
        [team, FunctionReward(lambda completions: [float(len(c)) for c in completions], fingerprint="f")], [2.0, 3.0]
    )
    both.load(NOTHING, "2026-11-30")
    ids = ids_of(team.team, [[5], [6, 7], [8]])
    alone = team.score_tokens(PROMPTS, ids)
    found = both.score_drawn(PROMPTS, ["x", "xy", ""], [{}] * 3, ids)
    assert found == pytest.approx([2 * one + 3 * length for one, length in zip(alone, (1, 2, 0), strict=True)])
    with pytest.raises(VocabularyMismatch, match="the team reads token ids, and its tokenizer is not the proposal's"):
        both.check_tokenizer(tiny_tokenizer("abcdefgh"))
    both.check_tokenizer(tiny_tokenizer())


def test_an_answer_beyond_the_context_is_named(folder):
    reward = loaded(team_of(folder))
    with pytest.raises(ModelError, match=r"the team cannot score an answer: .* but the context holds 64"):
        reward.score_tokens(["de"], Ids([[5] * 40], [[6] * 40]))
    with pytest.raises(RuntimeError, match="not loaded yet"):
        team_of(folder).score_tokens([], Ids([], []))


# ---- the command


def words_of(folder, out, *more, data="prompts.jsonl"):
    team = "--aligner", folder / "one", "--aligner", folder / "two"
    return "distil", "--proposal", folder / "proposal", *team, "--dataset", folder / data, "--output_dir", out, *more


@pytest.mark.parametrize("student", [pytest.param("head", marks=pytest.mark.slow), "residual"])
def test_the_student_decodes_as_the_team_does(folder, capsys, tmp_path, student):
    """By enumeration of all answers of two tokens to one prompt, whether they end there or are cut.

    What is left of the distance between proposal and team falls with more samples; so few leave a third of it.
    """
    more = {"head": ("--lora_r", 32), "residual": ("--student", folder / "start")}[student]
    how = {"max_tokens": 2, "num_generations": 32, "per_device_train_batch_size": 32, "max_steps": 250, "beta_start": 1}
    how |= {"eval_steps": 125, "save_steps": 125, "logging_steps": 125, "load_best_model_at_end": False, "dev_prompts": 1}
    how |= {"lr_scheduler_type": "cosine", "learning_rate": 3e-3, "eval_dataset": folder / "single.jsonl"}
    flags = [word for name, value in how.items() for word in (f"--{name}", value)] + ["--weight", 0.7, "--weight", 0.4]
    words = words_of(folder, tmp_path / "out", *QUICK[4:], *flags, *more, "--json", data="single.jsonl")
    status, out, _ = called(capsys, *words)
    assert status == 0
    report = json.loads(out)
    team = AlignedModel.from_pretrained(folder / "proposal", [folder / "one", folder / "two"], weight=[0.7, 0.4])
    ends = team.eos_token_ids
    answers = [[v] if v in ends else [v, w] for v in range(V) for w in range(1 if v in ends else V)]

    def law(model, side="aligned"):
        scores = model.score(["de"] * len(answers), answers)
        return torch.tensor([sum(getattr(score, side)) for score in scores]).double()

    wanted, bare = law(team), law(team, "proposal")
    found = law(AlignedModel.from_pretrained(folder / "proposal", tmp_path / "out"))
    assert_close(wanted.exp().sum(), torch.tensor(1.0).double(), atol=1e-5, rtol=0)
    apart, left = ((one.exp() - wanted.exp()).abs().sum() / 2 for one in (bare, found))
    assert apart > 0.4
    assert left < 0.4 * apart
    far, near = ((one.exp() * (one - wanted)).sum().item() for one in (bare, found))
    assert near < 0.25 * far
    assert report["kl_to_team"] == pytest.approx({"proposal": far, "student": near}, abs=0.4)


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


class Killed(BaseException):
    """As a signal would."""


def test_the_command_resumes_and_leaves_alone_what_is_finished(folder, capsys, tmp_path, monkeypatch):
    words = words_of(folder, tmp_path / "out", *SHORT)
    whole = words_of(folder, tmp_path / "whole", *SHORT)
    status, out, _ = called(capsys, *whole)
    assert status == 0
    assert out.startswith(f"student of 2 aligners in {tmp_path / 'whole'}, weight 1\n")
    assert "KL(·‖team)" in out
    step, steps = OnlineTrainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(step(self, *args, **kwargs))
        if len(steps) == 3:
            raise Killed
        return steps[-1]

    with monkeypatch.context() as patch:
        patch.setattr(OnlineTrainer, "training_step", dying)
        with pytest.raises(Killed):
            called(capsys, *words)
    assert called(capsys, *words)[0] == 0
    for name, weight in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "out")[name], weight)
    stamp = (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns
    assert called(capsys, *words)[0] == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    status, _, errors = called(capsys, *words, "--weight", 1, "--weight", 0.5)
    assert (status, "holds a run with reward=" in errors[0]) == (2, True)


def test_the_manifest_and_the_run_say_what_it_is(folder, capsys, tmp_path):
    assert called(capsys, *words_of(folder, tmp_path / "out", *SHORT, "--student", folder / "one", "--use_peft"))[0] == 0
    manifest = json.loads((tmp_path / "out" / "trimtab.json").read_text(encoding="utf-8"))
    assert (manifest["objective"], manifest["rule"]) == ("tb", "product")
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (run["beta"], run["reward"]) == (1.0, loaded(team_of(folder)).fingerprint)


def test_a_student_may_be_one_of_another_team(folder, capsys, tmp_path):
    """A head among models; the rule is its manifest's, and the weights are kept apart from each other's."""
    assert called(capsys, *words_of(folder, tmp_path / "first", *SHORT))[0] == 0
    words = words_of(folder, tmp_path / "second", *SHORT, "--aligner", tmp_path / "first", "--json")
    status, out, _ = called(capsys, *words)
    assert status == 0
    report = json.loads(out)
    assert report["team"] == [str(folder / "one"), str(folder / "two"), str(tmp_path / "first")]
    team = TeamReward(str(folder / "proposal"), report["team"], device="cpu")
    assert loaded(team).describe()["rule"] == "geometric"
    assert json.loads((tmp_path / "second" / "run.json").read_text(encoding="utf-8"))["reward"] == team.fingerprint


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--weight", 1), 2, "weight: there are 2 aligners, but 1 weights: give one for each"),
        (("--rule", "candidates"), 2, "rule: 'candidates' can sample, but not score"),
        (("--rule", "mixture", "--weight", 0.7, "--weight", 0.7), 2, "the aligners' shares sum to 1.4"),
        (("--rule", "produce"), 2, "product"),
        (("--aligner", "{}/foreign"), 1, "the aligner '{}/foreign' does not share the proposal's vocabulary"),
        (("--aligner", "{}/nowhere"), 1, "{}/nowhere"),
        (("--student", "{}/foreign"), 1, "the aligner '{}/foreign' does not share the proposal's vocabulary"),
        (("--output_dir", "{}/one"), 2, "output_dir holds an aligner of the team, {}/one: choose another one"),
        (("--output_dir", "{}"), 2, "output_dir holds an aligner of the team, {}/one: choose another one"),
        (("--beta", 2), 2, "--beta"),
        (("--objective", "grpo"), 2, "--objective"),
        (("--lora_r", 4, "--student", "{}/start"), 2, "--lora_r is for the adapters of --use_peft"),
        (("--use_peft",), 2, "--use_peft has no effect on a head"),
        (("--dev_fraction", 2), 2, "--dev_fraction must be"),
        (("--replay_share", 2), 2, "replay_share must be from 0 to 1"),
        (("--num_generations", 3), 2, "per_device_train_batch_size must be a multiple of num_generations, 3"),
    ],
)
def test_what_cannot_be_is_refused(folder, capsys, tmp_path, words, status, message):
    given = [word.replace("{}", str(folder)) if isinstance(word, str) else word for word in words]
    got, _, errors = called(capsys, *words_of(folder, tmp_path / "out", *SHORT, *given))
    assert got == status
    assert message.replace("{}", str(folder)) in errors[0]
    assert not (tmp_path / "out" / "rounds").exists()


def test_a_team_is_required(folder, capsys, tmp_path):
    words = ("--proposal", folder / "proposal", "--dataset", folder / "prompts.jsonl", "--output_dir", tmp_path / "out")
    status, _, errors = called(capsys, "distil", *words)
    assert (status, "--aligner is required" in errors[0]) == (2, True)
    with pytest.raises(InvalidOption, match="a team needs at least one"):
        TeamReward("proposal", [])


def test_from_python_the_team_is_a_reward_like_others(folder, tmp_path, monkeypatch):
    """It holds models once it is loaded, and a run copies none of them."""
    monkeypatch.setattr(TeamReward, "__deepcopy__", lambda self, memo: pytest.fail("it was copied"), raising=False)
    team = team_of(folder)
    said = {name.removeprefix("--"): value for name, value in zip(SHORT[:4:2], SHORT[1:4:2], strict=True)}
    how = {"max_steps": 2, "num_generations": 4, "max_tokens": 3, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    data = {"proposal": str(folder / "proposal"), "dataset": str(folder / "prompts.jsonl"), "output_dir": str(tmp_path / "out")}
    report = trimtab.train(**data, objective="tb", beta=1.0, reward=team, **said, **how)
    assert report["proposal"]["reward"] < 0
    assert team.fingerprint == json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["reward"]
