"""Training from rewards: the law that is reached, the rounds, and what is kept of a run that is killed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tiny_task import V, asked, make_task, task_rows, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.data.records import Record
from trimtab.errors import DataError, InvalidOption, ModelError
from trimtab.models.aligner import describe
from trimtab.train.arguments import CHECKPOINTING
from trimtab.train.online.betas import Betas
from trimtab.train.online.figures import figures_of
from trimtab.train.online.policy import Policies
from trimtab.train.online.prefixes import Ends
from trimtab.train.online.rounds import Rounds, Schedule
from trimtab.train.online.samples import Prompt, Sample
from trimtab.train.online.trainer import OnlineTrainer
from trimtab.train.plan import Facts, resolve
from trimtab.train.run import run_training as train
from trimtab.train.trainer import AlignerTrainer

REWARDS = """
def vowels(prompts, completions, **columns):
    return [float(sum(letter in "aeiou" for letter in text)) for text in completions]


def flat(completions, **columns):
    return [3.0] * len(completions)


def wanted(completions, letter, **columns):
    return [float(text.count(one)) for text, one in zip(completions, letter)]


def unsure(completions, **columns):
    return [None if text < "m" else float("e" in text) for text in completions]


def silent(completions, **columns):
    return [None] * len(completions)


def raised(completions, **columns):
    return [1e9 + one for one in vowels(None, completions)]


def huge(completions, **columns):
    return [1e200 * one for one in vowels(None, completions)]


def worse(completions, **columns):
    return [-one for one in vowels(None, completions)]


def short(completions, **columns):
    return [2.0 * (text == "") for text in completions]


def broken(completions, **columns):
    raise KeyError("no such thing")
"""
TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "eval_steps": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, prompts and rewards."""
    folder = make_task(tmp_path_factory.mktemp("online"))
    rows = [{"prompt": row["prompt"], "letter": "xyz"[i % 3]} for i, row in enumerate(task_rows(12))]
    write_rows(folder / "prompts.jsonl", rows)
    write_rows(folder / "one.jsonl", [{"prompt": "de"}])
    write_rows(folder / "train_prompts.jsonl", [{"prompt": row["prompt"]} for row in rows])
    write_rows(folder / "scores.jsonl", [{"prompt": row["prompt"], "completion": "x", "score": 1.0} for row in rows])
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def options(folder, name, training=None, *, reward="vowels", **settings):
    said = {
        "proposal": str(folder / "proposal"),
        "aligner": "",
        "objective": "tb",
        "dataset": str(folder / "prompts.jsonl"),
        "output_dir": str(folder / name),
        "reward": (f"{folder / 'rewards.py'}:{reward}",),
        "max_tokens": 4,
        "num_generations": 4,
        "dev_prompts": 2,
        "dev_fraction": 0.25,
        "train_draft": False,
    }
    if settings.get("objective", "tb") != "grpo" and "max_kl" not in settings:
        said |= {"beta": 0.5}
    return asked(**(said | settings), training=TRAINING | (training or {}))


def weights(folder):
    found = [path for path in (folder / "adapter_model.safetensors", folder / "model.safetensors") if path.exists()]
    return load_file(found[0])


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def rounds_of(folder):
    return sorted(path.name for path in (folder / "rounds").glob("round-*"))


def laws_of(model):
    """Of all answers of two tokens to one prompt the vowels, and log-probabilities without the aligner and with it."""
    ends = model.eos_token_ids
    answers = [[v] if v in ends else [v, w] for v in range(V) for w in range(1 if v in ends else V)]
    scores = model.score(["de"] * len(answers), answers)
    bare, law = (torch.tensor([sum(getattr(s, side)) for s in scores]).double() for side in ("proposal", "aligned"))
    texts = [model.tokenizer.decode([v for v in answer if v not in ends], skip_special_tokens=True) for answer in answers]
    rewards = torch.tensor([float(sum(letter in "aeiou" for letter in text)) for text in texts])
    return rewards, bare, law


# ---- what is reached


@pytest.mark.parametrize(
    ("objective", "kind", "said"),
    [
        ("tb", "head", {}),
        ("tb", "residual", {}),
        ("subtb", "head", {}),
        ("soft_q", "residual", {}),
        ("soft_q", "residual", {"prefix_rewards": True}),
    ],
)
def test_what_is_decoded_becomes_the_target(folder, objective, kind, said):
    """By enumeration of all answers of two tokens to one prompt; the rewards are of whole answers."""
    name, beta = f"target-{objective}-{kind}-{len(said)}", 0.5
    more = {
        "head": {"lora_r": 32},
        "residual": {"aligner": str(folder / "start"), "rule": "product"},
    }[kind]
    how = {"max_steps": 100, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "learning_rate": 5e-3}
    how |= {"eval_steps": 50, "save_steps": 50, "logging_steps": 50, "load_best_model_at_end": False}
    how |= {"lr_scheduler_type": "cosine"}
    data = {"dataset": str(folder / "one.jsonl"), "eval_dataset": str(folder / "one.jsonl"), "num_generations": 32}
    report = train(options(folder, name, how, objective=objective, beta=beta, max_tokens=2, **data, **more, **said))
    model = AlignedModel.from_pretrained(folder / "proposal", folder / name)
    rewards, bare, law = laws_of(model)
    target = (bare + rewards / beta).softmax(0)
    assert_close(law.exp().sum(), torch.tensor(1.0).double(), atol=1e-5, rtol=0)
    assert (bare.exp() - target).abs().sum() / 2 > 0.4
    assert (law.exp() - target).abs().sum() / 2 < 0.15
    divergence = (law.exp() * (law - bare)).sum().item()
    assert report["metrics"]["eval_kl"] == pytest.approx(divergence, abs=0.3)
    assert report["metrics"]["eval_reward"] == pytest.approx((law.exp() * rewards).sum().item(), abs=0.4)


def test_answers_that_end_in_several_ways_have_the_target_too(folder):
    """What `subtb` puts an end behind has one of them; the answers that were drawn have their own."""
    shutil.copytree(folder / "proposal", folder / "several")
    settings = json.loads((folder / "several" / "generation_config.json").read_text())
    z = AlignedModel.from_pretrained(folder / "proposal").tokenizer.convert_tokens_to_ids("z")
    (folder / "several" / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": [0, z]}))
    how = {"max_steps": 150, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "learning_rate": 5e-3}
    how |= {"eval_steps": 150, "save_steps": 150, "load_best_model_at_end": False, "lr_scheduler_type": "cosine"}
    data = {"dataset": str(folder / "one.jsonl"), "eval_dataset": str(folder / "one.jsonl"), "num_generations": 32}
    said = {"proposal": str(folder / "several"), "objective": "subtb", "lora_r": 32, "max_tokens": 2}
    train(options(folder, "several-ends", how, **said, **data, reward="short"))
    model = AlignedModel.from_pretrained(folder / "several", folder / "several-ends")
    assert model.eos_token_ids == (0, z)
    _, bare, law = laws_of(model)
    rewards = torch.tensor([2.0 if v in (0, z) else 0.0 for v in range(V) for _ in range(1 if v in (0, z) else V)])
    target = (bare + rewards / 0.5).softmax(0)
    assert (bare.exp() - target).abs().sum() / 2 > 0.4
    assert (law.exp() - target).abs().sum() / 2 < 0.1


@pytest.mark.parametrize("objective", ["tb", "grpo"])
def test_a_constant_reward_leaves_the_proposal(folder, objective):
    report = train(options(folder, f"flat-{objective}", reward="flat", objective=objective))
    assert report["metrics"]["eval_kl"] == pytest.approx(0.0, abs=0.02)
    assert report["metrics"]["eval_reward"] == report["proposal"]["reward"] == 3.0


def test_what_a_sample_begins_with_is_scored_as_an_answer_that_ends_there(folder):
    how = options(folder, "prefixes", {"max_steps": 2}, objective="subtb", beta=0.5)
    report = train(how)
    tokenizer = AlignedModel.from_pretrained(folder / "proposal").tokenizer
    samples = [json.loads(line) for line in lines_of(folder / "prefixes" / "rounds" / "round-000001.jsonl")]
    assert {sample["finish_reason"] for sample in samples} == {"stop", "length"}
    for sample in samples:
        texts = [tokenizer.decode(sample["tokens"][:i], skip_special_tokens=True) for i in range(len(sample["tokens"]))]
        assert sample["prefix_scores"] == [sum(letter in "aeiou" for letter in text) for text in texts]
    assert report["metrics"]["eval_loss"] > 0
    path = folder / "prefixes" / "rounds" / "round-000001.jsonl"
    kept = [{name: value for name, value in sample.items() if name != "prefix_scores"} for sample in samples]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    rounds = Rounds(folder / "prefixes", [], [], Schedule(1, 1, 1, 0), None, tokenizer=tokenizer, ends=Ends(tokenizer, 0))
    with pytest.raises(DataError, match="without a score of what is before each token"):
        rounds._read_file(path, [s["place"] for s in samples[::4]], [4] * (len(samples) // 4))


def test_answers_in_a_file_lead_to_the_target_and_nothing_is_drawn_to_learn_from(folder):
    """Of samples of the proposal, with whole laws by enumeration."""
    model = AlignedModel.from_pretrained(folder / "proposal")
    drawn = model.generate(["de"], SamplingParams(n=2000, max_tokens=2, temperature=1.0, seed=3))
    rows = [
        {"prompt": "de", "completion": one.text, "score": float(sum(letter in "aeiou" for letter in one.text))}
        | {"tokens": list(one.tokens), "finish_reason": one.finish_reason}
        for one in drawn
    ]
    write_rows(folder / "answers.jsonl", rows)
    how = {"max_steps": 150, "per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "learning_rate": 5e-3}
    how |= {"eval_steps": 75, "save_steps": 75, "logging_steps": 50, "lr_scheduler_type": "cosine"}
    data = {"dataset": str(folder / "answers.jsonl"), "eval_dataset": str(folder / "answers.jsonl"), "num_generations": 64}
    said = {"max_tokens": 2, "beta": 0.5, "lora_r": 32, "rewards": str(folder / "answers.jsonl")}
    report = train(replace(options(folder, "filed", how, **data, **said), reward=()))
    assert "eval_reward" not in report["metrics"]
    assert report["metrics"]["eval_objective"] == -report["metrics"]["eval_loss"]
    assert report["profile"]["rewards"] < 0.5
    assert [lines_of(folder / "filed" / "rounds" / name) for name in rounds_of(folder / "filed")] == [[]] * 150
    aligned = AlignedModel.from_pretrained(folder / "proposal", folder / "filed")
    rewards, bare, law = laws_of(aligned)
    target = (bare + rewards / 0.5).softmax(0)
    assert (bare.exp() - target).abs().sum() / 2 > 0.4
    assert (law.exp() - target).abs().sum() / 2 < 0.15


def test_answers_in_a_file_are_earlier_ones_beside_what_is_drawn(folder):
    rows = [
        {"prompt": row["prompt"], "completion": "aeio", "score": 4.0}
        for row in map(json.loads, lines_of(folder / "prompts.jsonl"))
    ]
    write_rows(folder / "best.jsonl", rows)
    train(options(folder, "beside", {"max_steps": 1}, rewards=str(folder / "best.jsonl"), replay_share=0.25, max_tokens=6))
    drawn = [json.loads(line) for line in lines_of(folder / "beside" / "rounds" / "round-000000.jsonl")]
    assert len(drawn) == 4 * 3, "of four answers to each of four prompts one was there"
    write_rows(folder / "strange.jsonl", [{"prompt": "zzz", "completion": "aeio", "score": 4.0}])
    with pytest.raises(DataError, match=r"strange\.jsonl: no training prompt has an answer there"):
        train(options(folder, "beside-1", rewards=str(folder / "strange.jsonl")))


def test_a_drafter_learns_from_the_answers_in_a_file_where_none_are_drawn(folder):
    rows = [
        {"prompt": row["prompt"], "completion": text, "score": float(len(text))}
        for row in map(json.loads, lines_of(folder / "prompts.jsonl"))
        for text in ("ae", "x")
    ]
    write_rows(folder / "two.jsonl", rows)
    how = {"aligner": str(folder / "start"), "rule": "product", "rewards": str(folder / "two.jsonl"), "train_draft": None}
    report = train(replace(options(folder, "filed-draft", {"max_steps": 2}, **how), reward=()))
    assert report["draft"]
    assert (folder / "filed-draft" / "draft" / "config.json").exists()


def test_texts_in_a_file_are_encoded_and_what_does_not_fit_is_said(folder, caplog):
    prompts = [row["prompt"] for row in map(json.loads, lines_of(folder / "prompts.jsonl"))]
    rows = [{"prompt": p, "completion": text, "score": float(len(text))} for p in prompts for text in ("ae", "x", "toolong")]
    rows[0]["score"] = None
    write_rows(folder / "texts.jsonl", rows)
    how = {"rewards": str(folder / "texts.jsonl"), "max_tokens": 4}
    with caplog.at_level("WARNING"):
        report = train(replace(options(folder, "texts", {"max_steps": 2}, **how), reward=()))
    assert "answers have more than 4 tokens: left out" in caplog.text
    assert (
        "1 of 9 training prompts have no two answers: left out" in caplog.text
        or "development prompts have no two" in caplog.text
    )
    assert report["metrics"]["eval_loss"] > 0
    write_rows(folder / "texts.jsonl", [rows[1]])
    with pytest.raises(DataError, match="no training prompt has two answers with different scores"):
        train(replace(options(folder, "texts-1", {"max_steps": 2}, **how), reward=()))
    write_rows(folder / "texts.jsonl", [{**row, "score": 1.0} for row in rows])
    with pytest.raises(DataError, match="no training prompt has two answers with different scores"):
        train(replace(options(folder, "texts-1", {"max_steps": 2}, **how), reward=()))
    write_rows(folder / "texts.jsonl", [{**rows[1], "tokens": [1, 2, 3]}, rows[2]])
    with pytest.raises(DataError, match="'tokens' are not the ids of 'completion'"):
        train(replace(options(folder, "texts-2", {"max_steps": 2}, **how), reward=()))


def test_grpo_raises_the_reward(folder):
    report = train(options(folder, "grpo", {"max_steps": 20, "eval_steps": 10, "save_steps": 10}, objective="grpo", beta=0.01))
    assert report["metrics"]["eval_reward"] > report["proposal"]["reward"] + 0.5
    assert json.loads((folder / "grpo" / "trimtab.json").read_text())["objective"] == "grpo"


def test_a_budget_settles_beta_and_is_kept(folder):
    how = {"max_steps": 25, "eval_steps": 25, "save_steps": 25, "per_device_train_batch_size": 16, "learning_rate": 2e-3}
    data = {"dataset": str(folder / "one.jsonl"), "eval_dataset": str(folder / "one.jsonl")}
    found = [
        train(options(folder, f"kl-{budget}", how, max_kl=budget, num_generations=16, tempered_share=0.0, **data))["metrics"]
        for budget in (0.1, 0.6)
    ]
    for budget, metrics in zip((0.1, 0.6), found, strict=True):
        assert metrics["eval_kl"] <= budget
    assert found[0]["eval_beta"] > 1.5 * found[1]["eval_beta"]
    assert found[0]["eval_reward"] < found[1]["eval_reward"]


def test_what_has_no_score_is_not_learnt_from(folder):
    report = train(options(folder, "unsure", reward="unsure"))
    assert 0 < report["metrics"]["eval_scored"] < 1
    report = train(options(folder, "silent", reward="silent"))
    assert report["metrics"]["eval_scored"] == 0
    assert all(float(weight.abs().max()) == 0 for name, weight in weights(folder / "silent").items() if "lora_B" in name)


def test_a_later_round_goes_on_where_an_earlier_one_stopped(folder):
    """A head of the upper layer at a weight below 1, and an aligner that reads tokens."""
    for kind, aligner in (("head", ""), ("residual", str(folder / "start"))):
        rule = {"weight": 0.8} if kind == "head" else {"rule": "product"}
        layers = {"head_layers": 1} if kind == "head" else {}
        first = train(options(folder, f"first-{kind}", aligner=aligner, **layers, **rule))
        settings = {"aligner": str(folder / f"first-{kind}"), **rule}
        second = train(options(folder, f"second-{kind}", {"max_steps": 1, "learning_rate": 1e-12}, **settings))
        assert first["metrics"]["eval_reward"] > first["proposal"]["reward"]
        for name in ("eval_kl", "eval_reward"):
            assert second["metrics"][name] == pytest.approx(first["metrics"][name], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["head", "residual"])
def test_a_drafter_learns_what_the_aligner_says(folder, kind):
    """With the training, or later; a residual has one by default."""
    more = (
        {"aligner": "", "train_draft": True}
        if kind == "head"
        else {"aligner": str(folder / "start"), "rule": "product", "train_draft": None}
    )
    report = train(options(folder, f"draft-{kind}", **more))
    assert (folder / f"draft-{kind}" / "draft" / "config.json").exists()
    assert 0 < report["draft"]["metrics"]["eval_acceptance_on_answers"] <= 1
    model = AlignedModel.from_pretrained(folder / "proposal", folder / f"draft-{kind}")
    assert model.drafter != "none"
    if kind == "residual":
        later = {**more, "train_draft": False}
        assert "draft" not in train(options(folder, "drafted-later", **later))
        assert train(options(folder, "drafted-later", **later | {"train_draft": True}))["draft"]["metrics"]


# ---- rounds


def test_divergence_is_of_all_samples_and_the_reward_of_those_that_have_one(folder):
    report = train(options(folder, "partly", {"max_steps": 2, "load_best_model_at_end": False}, reward="unsure"))
    rows = [json.loads(line) for line in (folder / "partly" / "rounds" / "look-000002.jsonl").read_text().splitlines()]
    scores = [row["score"] for row in rows if row["score"] is not None]
    assert 0 < len(scores) < len(rows)
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "partly")
    prompts = [model.encoder.prompt(row["prompt"]) for row in rows]
    found = model.score(prompts, [row["tokens"] for row in rows])
    gains = [sum(score.aligned) - sum(score.proposal) for score in found]
    assert report["metrics"]["eval_kl"] == pytest.approx(sum(gains) / len(gains), abs=1e-4)
    assert report["metrics"]["eval_reward"] == pytest.approx(sum(scores) / len(scores))
    drawn = [
        json.loads(line) for name in rounds_of(folder / "partly") for line in lines_of(folder / "partly" / "rounds" / name)
    ]
    assert report["unscored"] == sum(row["score"] is None for row in drawn)


def test_a_large_constant_changes_nothing(folder):
    train(options(folder, "plain", reward="vowels"))
    train(options(folder, "raised", reward="raised"))
    for key, weight in weights(folder / "plain").items():
        assert_close(weights(folder / "raised")[key], weight, atol=1e-5, rtol=1e-4)


def test_rewards_that_nothing_can_be_learnt_from_are_refused(folder):
    with pytest.raises(ModelError, match=r"two answers to a prompt have rewards .* raise beta"):
        train(options(folder, "huge", reward="huge"))


def test_the_report_is_of_the_weights_that_are_saved(folder):
    """The best look may have no checkpoint, where there are fewer of these."""
    how = {"save_steps": 4, "load_best_model_at_end": True}
    report = train(options(folder, "fewer", how, reward="worse"))
    saved = json.loads((folder / "fewer" / "checkpoint-6" / "trainer_state.json").read_text())
    expected = saved["best_global_step"] if saved["best_model_checkpoint"] else 6
    assert report["best_round"] == expected
    model = AlignedModel.from_pretrained(folder / "proposal", folder / "fewer")
    name = f"look-{expected:06d}.jsonl"
    rows = [json.loads(line) for line in (folder / "fewer" / "rounds" / name).read_text().splitlines()]
    found = model.score([model.encoder.prompt(row["prompt"]) for row in rows], [row["tokens"] for row in rows])
    gain = sum(sum(score.aligned) - sum(score.proposal) for score in found) / len(rows)
    assert report["metrics"]["eval_kl"] == pytest.approx(gain, abs=1e-4)


@pytest.mark.parametrize("objective", ["tb", "soft_q", "grpo"])
def test_rewards_go_on_from_what_is_a_residual_already(folder, objective):
    """Others start at the proposal."""
    settings = {"aligner": str(folder / "start"), "rule": "product"}
    train(options(folder, "residual", {"max_steps": 2}, **settings))
    starts = {}
    for name in ("start", "residual"):
        made = options(folder, "next", aligner=str(folder / name), rule="product", objective=objective)
        starts[name] = resolve(made, Facts(describe(folder / name))).asked.start
    assert starts == {"start": "uniform", "residual": "pretrained"}


def test_rounds_are_data_with_their_scores(folder):
    train(options(folder, "rounds"))
    text = (folder / "rounds" / "rounds" / "round-000001.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 4 * 4
    for row in rows:
        assert row["score"] == sum(letter in "aeiou" for letter in row["completion"])
    assert len(rounds_of(folder / "rounds")) == 6
    profile = json.loads((folder / "rounds" / "training.json").read_text())["profile"]
    assert profile.keys() == {"sampling", "rewards", "passes", "other"}
    assert all(seconds >= 0 for seconds in profile.values())


def test_every_prompt_has_its_turn_and_temperatures_are_as_asked(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(Rounds, "_score", lambda self, prompts, given, policy: drawn.extend(given) or [])
    train_rounds(folder, "turns", rounds=60, tempered_share=0.5, lowest_temperature=0.6, highest_temperature=1.5)
    temperatures = [params.temperature for _, params in drawn]
    tempered = [t for t in temperatures if t != 1]
    assert len(tempered) / len(temperatures) == pytest.approx(0.5, abs=0.12)
    assert all(0.6 <= t <= 1.5 for t in tempered)
    assert max(tempered) - min(tempered) > 0.7
    places = [place for place, _ in drawn]
    for at in range(0, len(places) - 9, 9):
        assert sorted(places[at : at + 9]) == list(range(9))
    assert len({params.seed for _, params in drawn}) == len(drawn)


def train_rounds(folder, name, *, rounds, **settings):
    """Draw rounds of two prompts of nine."""
    prompts = [Prompt(Record(f"p{i}", None, None, f"data:{i}"), [5 + i]) for i in range(9)]
    schedule = Schedule(2, 4, 3, 0, **settings)
    made = Rounds(folder / name, prompts, prompts[:1], schedule, object(), tokenizer=None)
    for number in range(rounds):
        made.draw(number, None, gains=False)
    return made


def test_of_earlier_answers_that_are_as_good_none_is_left_out(folder, monkeypatch):
    """Or what was found late would never come again."""
    count = iter(range(10_000))

    def score(self, prompts, given, policy):
        numbered = [(group, place, next(count)) for group, (place, params) in enumerate(given) for _ in range(params.n)]
        return [
            Sample(group, place, [1 + number // V % V, number % V], "", "stop", 1.0, 1.0) for group, place, number in numbered
        ]

    monkeypatch.setattr(Rounds, "_score", score)
    made = train_rounds(folder, "ties", rounds=60, replay_share=0.5)
    first = {(s.place, *s.tokens): number for number in reversed(range(60)) for s in made.read(number)}
    replayed = [first[s.place, *s.tokens] for n in range(50, 60) for group in made.groups(n, []) for s in group]
    assert max(replayed) >= 40


def test_where_few_earlier_answers_are_good_those_alone_come_again(folder, monkeypatch):
    """A tenth, and not the half that they would be in with many that are bad."""
    count = iter(range(10_000))

    def score(self, prompts, given, policy):
        numbered = [(group, place, next(count)) for group, (place, params) in enumerate(given) for _ in range(params.n)]
        return [
            Sample(group, place, [1 + number // V % V, number % V], "", "stop", 1.0, float(number % 10 == 0))
            for group, place, number in numbered
        ]

    monkeypatch.setattr(Rounds, "_score", score)
    made = train_rounds(folder, "few", rounds=60, replay_share=0.25)
    good = {s.place for number in range(50) for s in made.read(number) if s.score}
    replayed = [s for n in range(50, 60) for group in made.groups(n, []) for s in group if s.place in good]
    assert replayed
    assert all(sample.score for sample in replayed)


def test_earlier_answers_stand_in_for_fresh_ones(folder, monkeypatch):
    """The better half of distinct ones, never those of later rounds."""
    scores = iter(range(10_000))

    def score(self, prompts, given, policy):
        return [
            Sample(group, place, [next_score % 7, place], "", "stop", 1.0, float(next_score % 7))
            for group, (place, params) in enumerate(given)
            for next_score in [next(scores) for _ in range(params.n)]
        ]

    monkeypatch.setattr(Rounds, "_score", score)
    made = train_rounds(folder, "replay", rounds=12, replay_share=0.5)
    first = made.groups(0, made.read(0))
    assert [len(group) for group in first] == [4, 4]
    late = made.groups(11, made.read(11))
    assert [len(group) for group in late] == [4, 4]
    assert [len(list(filter(lambda s, i=i: s.group == i, made.read(11)))) for i in (0, 1)] == [2, 2]
    for group in late:
        assert len({sample.place for sample in group}) == 1
        fresh, earlier = group[2:], group[:2]
        known = {s.score for n in range(11) for s in made.read(n) if s.place == group[0].place}
        assert all(sample.score in sorted(known)[len(known) // 2 - 1 :] for sample in earlier)
        assert len(fresh) == 2


def test_beta_falls_to_what_was_asked_for():
    betas = Betas(0.4, 1.25, 10, None)
    assert [betas.at(number, lambda _: []) for number in (0, 5, 9)] == pytest.approx([0.5, 0.4, 0.4])
    assert betas.at(2, lambda _: []) == pytest.approx(0.46)


def test_a_budget_is_approached_in_steps_that_samples_can_tell_of():
    """Eight answers tell of no more than about a nat beyond where they were drawn."""
    some = [Sample(0, 0, [1], "", "stop", 1.0, float(i == 0), gain=0.0) for i in range(8)]
    near, far = (Betas(None, 1.0, 10, budget).at(0, lambda _: some) for budget in (0.5, 50.0))
    assert near > far > 0.05
    assert Betas(None, 1.0, 10, 0.5).at(0, lambda _: [replace(one, score=1.0) for one in some]) == 1.0


@pytest.mark.parametrize(("valid", "budget"), [(5, 0.6), (1, 50.0), (7, 50.0)])
def test_beta_stays_where_samples_can_tell_of_it(valid, budget):
    """The best eight answers of which some tie cannot be a budget's nats away, whatever β is."""
    some = [Sample(0, 0, [1], "", "stop", 1.0, float(i < valid), gain=0.0) for i in range(8)]
    beta = Betas(None, 1.0, 10, budget).at(0, lambda _: some)
    assert 1 / 40 < beta < 1


def test_figures_are_of_the_samples():
    texts = ["a", "a", "b", "c"]
    samples = [Sample(i // 2, i // 2, [1] * (i + 1), t, "stop" if i else "length", 1.0, i or None) for i, t in enumerate(texts)]
    found = figures_of(samples, 0.5, 0.2, None)
    assert found == pytest.approx(
        {"reward": 2.0, "kl": 0.5, "kl_per_token": 0.2, "objective": 1.9, "beta": 0.2, "length": 2.5, "ended": 0.75,
         "distinct": 0.5, "scored": 0.75, "loss": 0.0}
    )  # fmt: skip
    assert figures_of(samples, 0.5, 0.2, 0.4)["objective"] == pytest.approx(1.6)
    assert figures_of(samples, 0.5, 0.2, 0.4, before=1.0)["objective"] == pytest.approx(1.8)
    assert figures_of(samples, 0.5, 0.2, 0.6, before=1.0)["objective"] == 2.0
    unscored = figures_of([replace(sample, score=None) for sample in samples], 0.5, 0.2, loss=3.0)
    assert "reward" not in unscored
    assert (unscored["objective"], unscored["scored"]) == (-3.0, 0.0)


# ---- a run that is killed


class Killed(BaseException):
    """As a signal would."""


def kill_at(monkeypatch, owner, name, count, *, after=False):
    """Let a function raise at its call number `count`, before or after its work."""
    original, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(name)
        if len(calls) == count and not after:
            raise Killed
        found = original(*args, **kwargs)
        if len(calls) == count:
            raise Killed
        return found

    monkeypatch.setattr(owner, name, dying)


STAGES = [
    (Rounds, "_score", 1, False),
    (Rounds, "_score", 4, False),
    (Rounds, "draw", 3, True),
    (Rounds, "look", 2, True),
    (AlignerTrainer, "compute_loss", 7, False),
    (OnlineTrainer, "training_step", 12, True),
    (Policies, "of", 8, False),
    (OnlineTrainer, "evaluate", 3, True),
    (OnlineTrainer, "evaluate", 4, False),
]


@pytest.fixture(scope="module")
def whole(folder):
    train(options(folder, "whole", replay_share=0.5))
    return folder / "whole"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: f"{stage[1]}-{stage[2]}-{'after' if stage[3] else 'before'}")
def test_a_killed_run_ends_as_one_that_was_not(folder, whole, monkeypatch, stage):
    name = f"killed-{stage[1]}-{stage[2]}-{stage[3]}"
    with monkeypatch.context() as patch:
        kill_at(patch, *stage[:3], after=stage[3])
        with pytest.raises(Killed):
            train(options(folder, name, replay_share=0.5))
    report = train(options(folder, name, replay_share=0.5))
    for key, weight in weights(whole).items():
        assert torch.equal(weights(folder / name)[key], weight)
    for path in (whole / "rounds").iterdir():
        assert (folder / name / "rounds" / path.name).read_bytes() == path.read_bytes()
    assert report["metrics"] == json.loads((whole / "training.json").read_text())["metrics"]


def test_samples_are_drawn_without_dropout_and_with_checkpointing(folder, monkeypatch):
    """A LoRA adapter of an aligner: what is sampled is what is decoded, and a killed run ends as one that was not."""
    how = {"aligner": str(folder / "start"), "rule": "product", "use_peft": True, "lora_dropout": 0.5}
    training = {CHECKPOINTING: True}
    train(options(folder, "dropped", training, **how))
    with monkeypatch.context() as patch:
        kill_at(patch, Rounds, "draw", 4, after=True)
        with pytest.raises(Killed):
            train(options(folder, "dropped-killed", training, **how))
    train(options(folder, "dropped-killed", training, **how))
    for key, weight in weights(folder / "dropped").items():
        assert torch.equal(weights(folder / "dropped-killed")[key], weight)


def test_what_was_scored_is_not_scored_again(folder, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, OnlineTrainer, "training_step", 5)
        with pytest.raises(Killed):
            train(options(folder, "once"))
    before = {name: (folder / "once" / "rounds" / name).stat().st_mtime_ns for name in rounds_of(folder / "once")}
    assert len(before) == 3
    train(options(folder, "once"))
    assert {name: (folder / "once" / "rounds" / name).stat().st_mtime_ns for name in before} == before
    assert len(rounds_of(folder / "once")) == 6


def test_a_finished_run_is_left_alone_and_another_one_refused(folder, whole):
    stamp = (whole / "adapter_model.safetensors").stat().st_mtime_ns
    train(options(folder, "whole", replay_share=0.5))
    assert (whole / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    others = {"beta": 0.6, "reward": "flat", "max_tokens": 3, "replay_share": 0.25}
    for option, value in others.items():
        named = "objective_options" if option == "replay_share" else option
        with pytest.raises(InvalidOption, match=f"holds a run with {named}="):
            train(options(folder, "whole", **({"replay_share": 0.5} | {option: value})))


def test_a_round_that_somebody_has_changed_is_named(folder, monkeypatch):
    with monkeypatch.context() as patch:
        kill_at(patch, OnlineTrainer, "training_step", 5)
        with pytest.raises(Killed):
            train(options(folder, "changed"))
    path = folder / "changed" / "rounds" / "round-000002.jsonl"
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    unscored = lines[0].replace('"score": ', '"score": NaN, "x": ')
    for changed in (whole[:-20], "".join(lines[:-1]), "", whole.replace('"place"', '"spot"'), unscored):
        path.write_text(changed)
        with pytest.raises(DataError, match=r"round-000002.jsonl is not as it was written .* delete it"):
            train(options(folder, "changed"))
    path.unlink()
    train(options(folder, "changed"))


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": ()}, "reward: objective 'tb' learns from one"),
        ({"beta": None}, "give one of them"),
        ({"max_kl": 1.0, "beta": 0.1}, "give only one of them"),
        ({"max_kl": 1.0, "beta_start": 1.0}, "beta_start: max_kl settles beta"),
        ({"objective": "grpo", "max_kl": 1.0}, "max_kl: objective 'grpo' has a price"),
        ({"num_generations": 3}, "per_device_train_batch_size must be a multiple of num_generations, 3"),
        ({"rule": "candidates"}, "tb trains product, geometric or mixture"),
        ({"teacher_prompt": "x.txt"}, "teacher_prompt: objective 'tb'"),
        ({"max_tokens": 4096}, "max_tokens: 4096 leave no room"),
        ({"dry_run": True}, "dry_run: what rounds"),
        ({"proposal_top_p": 0.5}, "proposal_top_p: rewards train on whole rows"),
        ({"training": {"dataloader_drop_last": True}}, "dataloader_drop_last has no effect on rounds"),
        ({"lowest_temperature": 2.0, "highest_temperature": 0.5}, "lowest_temperature is above highest_temperature, 0.5"),
        ({"objective": "soft_q"}, "soft_q: a head's frozen output layer"),
        ({"reward": ("nowhere.py:f",)}, "there is no file 'nowhere.py'"),
        ({"reward": ("file:SCORES",)}, "--reward file:.*scores.jsonl: a file has the scores of given answers"),
        ({"rewards": "nowhere.jsonl"}, "there is no file of scores 'nowhere.jsonl'"),
        ({"rewards": "SCORES", "objective": "grpo"}, "rewards: 'grpo' learns from its own samples alone"),
        ({"rewards": "SCORES", "objective": "subtb"}, "rewards: a file does not say what its answers' beginnings are worth"),
        (
            {"rewards": "SCORES", "replay_share": 0.0},
            "rewards: with --reward they are earlier answers, and of 4 a share of 0 is none",
        ),
        (
            {"rewards": "SCORES", "num_generations": 2},
            "and of 2 a share of 0.25 is none: raise replay_share or num_generations",
        ),
        ({"rewards": "SCORES", "reward": (), "max_kl": 1.0}, "max_kl: β is found by samples that are drawn"),
        ({"rewards": "SCORES", "reward": (), "tempered_share": 0.5}, "tempered_share: without --reward nothing is drawn"),
    ],
)
def test_what_cannot_be_is_refused(folder, settings, said):
    given = dict(settings)
    training = given.pop("training", None)
    if given.get("rewards") == "SCORES":
        given["rewards"] = str(folder / "scores.jsonl")
    if (reward := given.pop("reward", None)) is not None:
        reward = tuple(one.replace("SCORES", str(folder / "scores.jsonl")) for one in reward)
        made = replace(options(folder, "refused", training, **given), reward=reward)
    else:
        made = None
    with pytest.raises(InvalidOption, match=said):
        train(made or options(folder, "refused", training, **given))
    assert not (folder / "refused" / "rounds").exists()


def test_a_missing_column_is_named_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("trimtab.train.online.run.open_proposal", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InvalidOption, match="takes 'letter', and the data have no such column"):
        train(options(folder, "lacking", reward="wanted", dataset=str(folder / "train_prompts.jsonl")))


def test_a_reward_that_fails_names_the_prompt_and_the_run_goes_on_from_there(folder):
    with pytest.raises(ModelError, match="raised KeyError: 'no such thing'") as error:
        train(options(folder, "failing", reward="broken"))
    assert "prompts.jsonl:" in str(error.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--cache_top_k", "8"], "--cache_top_k is for wanted answers"),
        (["--objective", "sft", "--max_tokens", "8"], "--max_tokens is for rewards"),
    ],
)
def test_options_without_effect_are_refused_on_the_command_line(folder, capsys, flags, said):
    base = ["train", "--proposal", str(folder / "proposal"), "--dataset", str(folder / "prompts.jsonl"), "--output_dir", "x"]
    ours = [] if "--objective" in flags else ["--objective", "tb", "--beta", "1", "--reward", f"{folder / 'rewards.py'}:flat"]
    assert main([*base, *ours, *flags]) == 2
    assert said in capsys.readouterr().err
