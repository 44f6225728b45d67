"""`trimtab propose` as a user calls it: samples of aligned models, and pairs of them that a reward model made."""

import json

import pytest

from eval_task import called, make_eval_task
from scripted import Reply, scripted
from trimtab import AlignedModel, SamplingParams
from trimtab.judges.rewards.classifier import RewardModel


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = make_eval_task(tmp_path_factory.mktemp("task"))
    chat = {"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "xyz"}]}
    (folder / "chat.jsonl").write_text(json.dumps(chat) + "\n", encoding="utf-8")
    return folder


def words_of(task, *more):
    return "propose", "--dataset", task / "prompts.jsonl", "--max_tokens", 5, "--seed", 3, *more


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_pairs_of_an_aligned_models_samples_are_what_the_reward_model_says(task, capsys, tmp_path):
    words = words_of(task, "--proposal", task / "proposal", "--aligner", task / "start", "--out", tmp_path / "pairs.jsonl")
    status, out, _ = called(capsys, *words, "--reward_model", task / "reward", "--n", 5, "--pairs", 2, "--json")
    assert (status, json.loads(out)["rows"], json.loads(out)["pairs"]) == (0, 24, 2)
    prompts = [row["prompt"] for row in rows(task / "prompts.jsonl")]
    model = AlignedModel.from_pretrained(task / "proposal", task / "start")
    reward = RewardModel.from_pretrained(task / "reward")
    for i, prompt in enumerate(prompts):
        drawn = [one.text for one in model.generate([prompt], SamplingParams(n=5, max_tokens=5, seed=3 + i))]
        worth = dict(zip(drawn, reward.score([prompt] * 5, drawn), strict=True))
        ordered = sorted(worth[text] for text in drawn)
        made = rows(tmp_path / "pairs.jsonl")[2 * i : 2 * i + 2]
        assert [pair["prompt"] for pair in made] == [prompt, prompt]
        assert [worth[pair["chosen"]] for pair in made] == pytest.approx(ordered[::-1][:2])
        assert [worth[pair["rejected"]] for pair in made] == pytest.approx(ordered[:2])
    assert "24 pairs in" in called(capsys, *words, "--reward_model", task / "reward", "--n", 5, "--pairs", 2)[1]


def test_samples_of_endpoints_become_pairs_too(task, capsys, tmp_path):
    def answered(asked, number):
        return Reply({"choices": [{"index": i, "text": "xyzab"[i] * 3} for i in range(asked.body["n"])]})

    with scripted(answered, models=[{"id": "m", "owned_by": "someone"}]) as server:
        words = words_of(task, "--endpoint", server.url, "--out", tmp_path / "out.jsonl", "--n", 4, "--reward_model")
        assert called(capsys, *words, task / "reward", "--device", "cpu")[0] == 0
    reward = RewardModel.from_pretrained(task / "reward")
    found, prompts = rows(tmp_path / "out.jsonl"), rows(task / "prompts.jsonl")
    assert [row["prompt"] for row in found] == [row["prompt"] for row in prompts]
    for row in found:
        texts = ["xxx", "yyy", "zzz", "aaa"]
        worth = dict(zip(texts, reward.score([row["prompt"]] * 4, texts), strict=True))
        assert (row["chosen"], row["rejected"]) == (max(worth, key=worth.get), min(worth, key=worth.get))


def test_a_dry_run_of_pairs_says_so(task, capsys, tmp_path):
    words = words_of(task, "--proposal", task / "proposal", "--aligner", "A", "--out", tmp_path / "out.jsonl", "--dry_run")
    words += "--reward_model", "RM", "--n", 8, "--pairs", 3
    told = json.loads(called(capsys, *words, "--json")[1])
    assert (told["rows"], told["pairs"], told["aligners"]) == (36, 3, [{"name": "A"}])
    assert told["reward_model"] == {"name": "RM", "at_hand": False}
    shown = called(capsys, *words)[1]
    for line in ("would write 36 pairs, at most 480 tokens", "aligner   A, which is not", "ranked by RM, which is not at hand"):
        assert line in shown


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--proposal", "{}/proposal", "--pairs", 1), 2, "--pairs needs --reward_model"),
        (("--proposal", "{}/proposal", "--reward_model", "{}/reward"), 2, "--pairs must be from 1 to half of --n, which is 1"),
        (("--proposal", "{}/proposal", "--reward_model", "{}/reward", "--n", 5, "--pairs", 3), 2, "which is 5, not 3"),
        (("--proposal", "{}/proposal", "--reward_model", "{}/none", "--n", 2), 1, "none"),
        (
            ("--proposal", "{}/proposal", "--reward_model", "{}/reward", "--n", 2, "--temperature", 0),
            2,
            "--temperature must be",
        ),
        (("--proposal", "m", "--endpoint", "http://127.0.0.1:9/v1", "--device", "cpu"), 2, "--device is for a model that runs"),
        (
            ("--proposal", "{}/proposal", "--reward_model", "{}/reward", "--n", 2, "--dataset", "{}/chat.jsonl"),
            1,
            "chat.jsonl:1: --reward_model {}/reward cannot take it",
        ),
        (("--proposal", "m", "--endpoint", "http://127.0.0.1:9/v1", "--aligner", "{}/start"), 2, "aligner"),
        (("--proposal", "{}/proposal", "--aligner", "{}/nowhere"), 1, "does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(task, capsys, tmp_path, words, status, message):
    said = [str(word).replace("{}", str(task)) for word in words]
    found = called(capsys, *words_of(task, "--out", tmp_path / "out.jsonl", *said))
    assert (found[0], len(found[2])) == (status, 1)
    assert message.replace("{}", str(task)) in found[2][0]
    assert list(tmp_path.iterdir()) == []
