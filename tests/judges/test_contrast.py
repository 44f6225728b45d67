"""The contrast reward: how much likelier each token is on the good side than on the bad one."""

import json
import math

import pytest

from eval_task import called
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, task_rows, write_rows
from trimtab import AlignedModel
from trimtab.errors import DataError, InvalidOption, VocabularyMismatch
from trimtab.judges.asked import AskedRecords
from trimtab.judges.rewards.base import Ids
from trimtab.judges.rewards.contrast import squash
from trimtab.judges.rewards.kinds import make_reward

PROMPTS, ANSWERS = ["de", "fgh"], [[5, 6, 7], [8]]
OPTIONS = {"dtype": "float32", "device": "cpu"}
NOTHING = AskedRecords([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, one of them with a chat template, a foreign one, and prompts."""
    folder = tmp_path_factory.mktemp("contrast")
    save_tiny(folder / "one", tiny_model("llama", V, seed=1, spread=0.3), tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    save_tiny(folder / "two", tiny_model("llama", V, seed=2, spread=0.3), tiny_tokenizer())
    save_tiny(folder / "foreign", tiny_model("llama", 9, seed=3), tiny_tokenizer("abcdefgh"))
    (folder / "kind.txt").write_text("abc", encoding="utf-8")
    (folder / "rude.txt").write_text("zy", encoding="utf-8")
    (folder / "kind.json").write_text('[{"role": "system", "content": "abc"}]', encoding="utf-8")
    write_rows(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in task_rows(8)])
    return folder


def made(folder, text):
    reward = make_reward(f"contrast:{text}".replace("{}", str(folder)), OPTIONS)
    reward.load(NOTHING, "2026-11-30")
    return reward


def ids_of(folder, answers=ANSWERS):
    encoder = AlignedModel.from_pretrained(folder / "one", device="cpu").encoder
    return Ids([encoder.prompt(prompt) for prompt in PROMPTS], answers)


def read(model, prompts, answers=ANSWERS):
    return [s.proposal for s in AlignedModel.from_pretrained(model, device="cpu", dtype="float32").score(prompts, answers)]


def by_hand(good, bad, scale, threshold):
    """Σ of tanh(Δ/scale) where that is at least the threshold in size."""
    squashed = [[math.tanh((g - b) / scale) for g, b in zip(*rows, strict=True)] for rows in zip(good, bad, strict=True)]
    return [sum(value for value in values if abs(value) >= threshold) for values in squashed]


def test_two_prompts_of_one_model(folder):
    good, bad = (read(folder / "one", [before + prompt for prompt in PROMPTS]) for before in ("abc", "zy"))
    ids = ids_of(folder)
    for more, scale, threshold in (("", 1, 0.1), (",scale=10,threshold=0.3", 10, 0.3), (",threshold=0", 1, 0)):
        reward = made(folder, f"good={{}}/kind.txt,bad={{}}/rude.txt,model={{}}/one{more}")
        expected = by_hand(good, bad, scale, threshold)
        assert reward.score_drawn(PROMPTS, ["", ""], [{}, {}], ids) == pytest.approx(expected, abs=1e-5)
    assert by_hand(good, bad, 10, 0) != pytest.approx(by_hand(good, bad, 10, 0.3))


def test_two_models_and_a_prompt_on_one_side(folder):
    one, two = read(folder / "one", PROMPTS), read(folder / "two", PROMPTS)
    ids = ids_of(folder)
    reward = made(folder, "good_model={}/one,bad_model={}/two")
    assert reward.score_tokens(PROMPTS, ids) == pytest.approx(by_hand(one, two, 1, 0.1), abs=1e-5)
    behind = read(folder / "two", [f"zy{prompt}" for prompt in PROMPTS])
    reward = made(folder, "good_model={}/one,bad_model={}/two,bad={}/rude.txt")
    assert reward.score_tokens(PROMPTS, ids) == pytest.approx(by_hand(one, behind, 1, 0.1), abs=1e-5)


def test_a_chat_gets_the_prompt_as_its_system_message(folder):
    chat = [{"role": "user", "content": "de"}]
    model = AlignedModel.from_pretrained(folder / "one", device="cpu")
    prompts = [model.encoder.prompt(one) for one in ([{"role": "system", "content": "abc"}, *chat], chat)]
    good, bad = (read(folder / "one", [ids], [[5, 6]]) for ids in prompts)
    for name in ("kind.json", "kind.txt"):
        reward = made(folder, f"good={{}}/{name},model={{}}/one")
        found = reward.score_tokens([chat], Ids([prompts[1]], [[5, 6]]))
        assert found == pytest.approx(by_hand(good, bad, 1, 0.1), abs=1e-5)


def test_a_token_below_the_threshold_counts_for_nothing():
    assert squash(-1.0, -1.05, 1.0, 0.1) == 0.0
    assert squash(-1.0, -1.05, 0.1, 0.1) == pytest.approx(math.tanh(0.5))
    assert squash(-2.0, -1.0, 1.0, 0.1) == pytest.approx(-math.tanh(1.0))
    assert squash(-math.inf, -1.0, 1.0, 0.1) == -1.0
    assert squash(-1.0, -math.inf, 1.0, 0.1) == 1.0
    assert squash(-math.inf, -math.inf, 1.0, 0.1) == 0.0


def test_what_tells_it_from_others_is_stable(folder):
    texts = ["good={}/kind.txt,model={}/one", "bad={}/kind.txt,model={}/one", "good={}/rude.txt,model={}/one"]
    texts += [f"{texts[0]},scale=2", f"{texts[0]},threshold=0.2", "good_model={}/one,bad_model={}/two"]
    rewards = [made(folder, text) for text in texts]
    assert len({reward.fingerprint for reward in rewards}) == len(texts)
    again = made(folder, f"threshold=0.1,scale=1,{texts[0]}")
    assert (again.fingerprint, again.label()) == (rewards[0].fingerprint, rewards[0].label())
    for described in (again.identity(), again.describe()):
        assert json.loads(json.dumps(described)) == described
    assert again.describe()["good"] == {"model": f"{folder}/one", "prompt": f"{folder}/kind.txt"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good={}/kind.txt", "name the model of both sides, model=PATH, or good_model=PATH and bad_model=PATH"),
        ("good_model={}/one", "name the model of both sides"),
        ("model={}/one,good_model={}/two", "'model' is for both sides, and good_model is there, too"),
        ("model={}/one", "good and bad are the same, and every answer would be worth 0"),
        ("good_model={}/one,bad_model={}/one", "good and bad are the same"),
        ("model={}/one,good={}/kind.txt,bad={}/kind.txt", "good and bad are the same"),
        ("modle={}/one", "and not 'modle': did you mean model"),
        ("model={}/one,good", "'good' needs a value: good=…"),
        ("model={}/one,good=", "'good' needs a value"),
        ("model={}/one,model={}/two", "'model' stands there twice"),
        ("model={}/one,good={}/nowhere.txt", "contrast: good: .*nowhere.txt"),
        ("model={}/one,good={}/kind.txt,scale=0", "scale must be above 0 and finite, not 0.0"),
        ("model={}/one,good={}/kind.txt,scale=much", "scale must be a number, not 'much'"),
        ("model={}/one,good={}/kind.txt,threshold=2", "threshold must be from 0 to 1, not 2.0"),
        ("model={}/one,good={}/kind.txt,threshold=nan", "threshold must be from 0 to 1, not nan"),
    ],
)
def test_what_is_no_contrast_is_refused_before_anything_is_loaded(folder, monkeypatch, text, message):
    monkeypatch.setattr(AlignedModel, "from_pretrained", None)
    with pytest.raises(InvalidOption, match=message):
        made(folder, text)


def test_models_and_prompts_that_do_not_go_together_are_refused(folder):
    with pytest.raises(VocabularyMismatch, match=r"one and .*foreign do not share a vocabulary"):
        made(folder, "good_model={}/one,bad_model={}/foreign")
    with pytest.raises(VocabularyMismatch, match="its tokenizer is not the proposal's"):
        made(folder, "model={}/one,good={}/kind.txt").check_tokenizer(tiny_tokenizer("abcdefgh"))
    reward = make_reward(f"contrast:model={folder}/one,good={folder}/kind.json", OPTIONS)
    with pytest.raises(DataError, match=r"data:0: 'prompt' is a text, but contrast: good .*kind.json holds messages"):
        reward.load(AskedOne("de"), "2026-11-30")
    reward = make_reward(f"contrast:model={folder}/two,good={folder}/kind.txt", OPTIONS)
    with pytest.raises(DataError, match=r"data:0: .* cannot take it: .*chat template"):
        reward.load(AskedOne([{"role": "user", "content": "de"}]), "2026-11-30")


class AskedOne:
    """One prompt that will be asked."""

    def __init__(self, prompt):
        self.prompts, self.references, self.columns, self.sources = [prompt], [None], [{}], ["data:0"]


def test_it_ranks_samples_and_trains(folder, capsys, tmp_path):
    text = f"contrast:good={folder}/kind.txt,bad={folder}/rude.txt,model={folder}/one"
    words = ["--proposal", folder / "one", "--dataset", folder / "prompts.jsonl", "--reward", text, "--max_tokens", 4]
    status, _, errors = called(capsys, "propose", *words, "--n", 4, "--out", tmp_path / "pairs.jsonl")
    assert (status, errors) == (0, [])
    assert len((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == 8
    how = ["--objective", "tb", "--beta", 0.2, "--max_steps", 100, "--eval_steps", 50, "--save_steps", 50, "--use_cpu"]
    how += ["--learning_rate", 5e-3, "--dev_fraction", 0.25, "--report_to", "none", "--disable_tqdm", "--json"]
    words[words.index(text)] = f"contrast:good_model={folder}/two,bad_model={folder}/one"
    status, out, _ = called(capsys, "train", *words, *how, "--output_dir", tmp_path / "out")
    report = json.loads(out)
    assert status == 0
    assert report["metrics"]["eval_reward"] > report["proposal"]["reward"] + 0.3
