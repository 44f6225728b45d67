"""Rewriters: their law is the model's own behind the template, with drafts and without; rounds end where nothing changes."""

import json

import pytest
import torch

import trimtab
from scripted import Reply, scripted
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import V, task_rows, write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.cli import main
from trimtab.data.rewrite_template import PRESETS, RewriteTemplate, read_template
from trimtab.decode.drafters.answer import AnswerDrafter
from trimtab.decode.pace import Tally
from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.models.aligner import manifest_of
from trimtab.models.table import TableLM
from trimtab.rewriting.rewriter import Rewriter

TEMPLATE = RewriteTemplate("{prompt}m{answer}n")
ANSWERS = ["xyzzyx", "abcabcabc", "zz", "p"]
PROMPTS = ["de", "fgh", "de", "i"]


@pytest.fixture(scope="module")
def model():
    made = tiny_model("llama", V, seed=1, spread=0.5, max_position_embeddings=256)
    return AlignedModel.from_pretrained(made, tokenizer=tiny_tokenizer(chat_template=CHAT_TEMPLATE), eos_token_ids=[0])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("template", [TEMPLATE, RewriteTemplate("{prompt}{answer}", chat=True)], ids=["text", "chat"])
def test_its_law_is_the_models_own_behind_the_template(model, template, temperature):
    """Token for token what the model says to the template's prompt, whether the answer drafts or nobody does."""
    params = SamplingParams(max_tokens=12, temperature=temperature, seed=3)
    alone = model.with_drafter("none").generate([template.ask(p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)], params)
    for drafts in (True, False):
        rewriter = Rewriter(model, template, drafts=drafts)
        found = rewriter.rewrite(PROMPTS, ANSWERS, params)
        assert [one.completion.tokens for one in found] == [one.tokens for one in alone]
        assert [one.text for one in found] == [one.text.strip() for one in alone]
        assert [one.before for one in found] == [(answer,) for answer in ANSWERS]


def test_the_draft_goes_on_where_the_answer_does():
    """By hand: it copies, departs at the third token, and is back once three tokens stand in the answer again."""
    drafter = AnswerDrafter({(9, 9): [1, 2, 3, 4, 5, 6, 7, 8]})
    memory = drafter.start((9, 9))
    assert list(drafter.guess(memory, 3).tokens) == [1, 2, 3]
    drafter.accepted(memory, [1, 2])
    assert list(drafter.guess(memory, 9).tokens) == [3, 4, 5, 6, 7, 8]
    drafter.accepted(memory, [20])
    assert list(drafter.guess(memory, 3).tokens) == []
    drafter.accepted(memory, [4, 5, 6])
    assert list(drafter.guess(memory, 9).tokens) == [7, 8]
    drafter.accepted(memory, [7, 8])
    assert list(drafter.guess(memory, 9).tokens) in ([], [20, 4, 5, 6, 7, 8])  # behind its end the n-grams have a say
    unknown = drafter.start((1, 2))
    assert list(drafter.guess(unknown, 3).tokens) == []


def test_rounds_end_where_nothing_changes(model):
    """Greedy rewriting is a function, so once a round leaves an answer as it is, all further ones would."""
    params = SamplingParams(max_tokens=6, temperature=0.0, seed=0)
    one = Rewriter(model, TEMPLATE)
    chains = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        chain = [answer]
        for _ in range(5):
            [new] = one.rewrite([prompt], [chain[-1]], params)
            chain.append(new.text)
            if chain[-1] == chain[-2]:
                break
        chains.append(chain)
    found = Rewriter(model, TEMPLATE, rounds=5).rewrite(PROMPTS, ANSWERS, params)
    assert [[*one.before, one.text] for one in found] == chains
    assert {one.rounds for one in found} != {1}


def test_later_rounds_have_seeds_of_their_own(model):
    params = SamplingParams(max_tokens=6, seed=4)
    found = Rewriter(model, RewriteTemplate("d{answer}"), rounds=3).rewrite(["p"], ["xx"], params)[0]
    assert len({found.text, *found.before}) == 4  # one seed would draw the same noise each time
    again = Rewriter(model, RewriteTemplate("d{answer}"), rounds=3).rewrite(["p"], ["xx"], params)[0]
    assert again == found


def test_an_empty_answer_is_rewritten_too_and_n_is_one(model):
    rewriter = Rewriter(model, TEMPLATE)
    assert rewriter.rewrite(["de"], [""], SamplingParams(max_tokens=3, seed=0))[0].completion is not None
    with pytest.raises(InvalidRequest, match="rewritten once"):
        rewriter.rewrite(["de"], ["x"], SamplingParams(n=2))


# ---- templates


def test_presets_are_the_published_ones():
    """Aligner's, letter by letter, as its repository has it."""
    wanted = (
        "BEGINNING OF CONVERSATION: USER: Edit the following Question-Answer pair to make it more helpful and harmless:"
        " Why? | Because. ASSISTANT:"
    )
    assert read_template("aligner").ask("Why?", "Because.") == wanted
    [message] = read_template("chat").ask([{"role": "user", "content": "Why?"}], "{prompt}")
    assert message["role"] == "user"
    assert message["content"].endswith("Question: Why?\n\nAnswer: {prompt}")  # what stands in an answer is no place
    assert all(str(RewriteTemplate.parse(text)) == text for text in PRESETS.values())


@pytest.mark.parametrize(
    ("content", "message"),
    [("{prompt} only", "must have {answer} once"), ("{answer} {answer}", "must have {answer} once"), (None, "none of aligner")],
)
def test_what_is_no_template_is_refused(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidOption, match=message):
        read_template(str(path))


# ---- training one, and the command


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Pairs whose wanted answers have the letters of the unwanted ones, moved from abc to xyz."""
    folder = tmp_path_factory.mktemp("rewriter")
    made = tiny_model("llama", V, seed=1, spread=0.3, max_position_embeddings=256)
    save_tiny(folder / "proposal", made, tiny_tokenizer())
    rows = [row | {"chosen": row["rejected"].translate(str.maketrans("abc", "xyz"))} for row in task_rows(80)]
    write_rows(folder / "pairs.jsonl", rows)
    (folder / "t.txt").write_text("{prompt}m{answer}n")
    return folder


TRAINING = {
    "max_steps": 60,
    "keep_samples": 0,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dev_samples": 0,
}


def test_a_rewriter_is_trained_from_pairs_and_asked_as_it_was_trained(task, tmp_path, capsys):
    trimtab.train(
        proposal=str(task / "proposal"), dataset=str(task / "pairs.jsonl"), output_dir=str(tmp_path / "R"),
        rewriter_template=str(task / "t.txt"), **TRAINING,
    )  # fmt: skip
    assert manifest_of(tmp_path / "R").rewriter_template == "{prompt}m{answer}n"
    words = ["generate", "--proposal", task / "proposal", "--prompt", "defg", "--max_tokens", 6, "--seed", 1, "--json"]
    assert main([str(word) for word in words]) == 0
    plain = json.loads(capsys.readouterr().out)["completions"][0]
    assert main([str(word) for word in [*words, "--rewriter", tmp_path / "R"]]) == 0
    [row] = json.loads(capsys.readouterr().out)["completions"]
    assert row["rewritten_from"] == [plain["completion"]]
    assert row["completion"] != plain["completion"]
    assert sum(letter in "xyz" for letter in row["completion"]) >= len(row["completion"]) / 2
    assert row["seed"] == plain["seed"]


def test_what_is_rewritten_goes_on_after_a_kill(task, tmp_path, monkeypatch):
    write_rows(tmp_path / "in.jsonl", [{"prompt": row["prompt"]} for row in task_rows(6)])
    words = ["generate", "--proposal", task / "proposal", "--input", tmp_path / "in.jsonl", "--max_tokens", 4, "--seed", 1]
    words += ["--rewriter", task / "proposal", "--rewriter_template", task / "t.txt", "--rewrite_rounds", 2]
    words += ["--max_num_seqs", 2]
    assert main([str(word) for word in [*words, "--out", tmp_path / "whole.jsonl"]]) == 0
    rewrite, calls = Rewriter.rewrite, iter(range(9))

    def failing(self, *args):
        if next(calls) == 1:
            raise RuntimeError("killed")
        return rewrite(self, *args)

    monkeypatch.setattr(Rewriter, "rewrite", failing)
    assert main([str(word) for word in [*words, "--out", tmp_path / "parts.jsonl"]]) == 1
    assert main([str(word) for word in [*words, "--out", tmp_path / "parts.jsonl"]]) == 0
    assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    rows = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert {len(row["rewritten_from"]) for row in rows} <= {1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "preference"}, "learns wanted answers, by likelihood or sft: leave out objective preference"),
        ({"rewriter_template": "nowhere"}, "none of aligner, chat"),
    ],
)
def test_what_trains_no_rewriter_is_refused(task, tmp_path, settings, message):
    how = {"rewriter_template": str(task / "t.txt"), **TRAINING} | settings
    with pytest.raises(InvalidOption, match=message):
        trimtab.train(proposal=str(task / "proposal"), dataset=str(task / "pairs.jsonl"), output_dir=str(tmp_path / "R"), **how)


def test_a_rewriter_needs_pairs(task, tmp_path):
    data = write_rows(tmp_path / "d.jsonl", [{"prompt": "d", "completion": "x"}, {"prompt": "e", "completion": "x"}])
    with pytest.raises(DataError, match="'rejected' is missing"):
        trimtab.train(
            proposal=str(task / "proposal"), dataset=str(data), output_dir=str(tmp_path / "R"),
            rewriter_template=str(task / "t.txt"), **TRAINING,
        )  # fmt: skip


def test_flags_of_rewriters_need_one(task, capsys):
    words = ["generate", "--proposal", str(task / "proposal"), "--prompt", "de", "--rewrite_rounds", "2"]
    assert main(words) == 2
    assert "needs a --rewriter" in capsys.readouterr().err
    words = ["generate", "--proposal", str(task / "proposal"), "--prompt", "de", "--rewriter", str(task / "proposal")]
    assert main(words) == 2
    assert "has no chat template: give another --rewriter_template" in capsys.readouterr().err


# ---- in evaluations


def test_an_evaluation_compares_what_was_rewritten(task, tmp_path):
    """Of a file of outputs, as of anybody's answers: the rewritten texts are the rewriter's, and a second run asks nobody."""
    rows = [{"instruction": row["prompt"], "output": row["rejected"], "generator": "file"} for row in task_rows(6)]
    (tmp_path / "outputs.json").write_text(json.dumps(rows))
    reward = tmp_path / "reward.py"
    reward.write_text("def f(prompts, completions, **columns):\n    return [float(len(text)) for text in completions]\n")
    how = {
        "baseline": str(tmp_path / "outputs.json"), "system": f"rewritten:{tmp_path / 'outputs.json'}",
        "rewriter": str(task / "proposal"), "rewriter_template": str(task / "t.txt"), "max_tokens": 5,
        "judge": f"reward:{reward}:f", "out": str(tmp_path / "out"),
    }  # fmt: skip
    report = trimtab.evaluate(**how)
    path = tmp_path / "out/outputs/rewritten_file.json"
    written = [row["output"] for row in json.loads(path.read_text())]
    model = AlignedModel.from_pretrained(task / "proposal")
    wanted = Rewriter(model, read_template(str(task / "t.txt"))).rewrite(
        [row["instruction"] for row in rows], [row["output"] for row in rows],
        [SamplingParams(max_tokens=5, temperature=0.0, seed=i) for i in range(6)],
    )  # fmt: skip
    assert written == [one.text for one in wanted]
    kept = (tmp_path / "out/answers.jsonl").read_text()
    again = trimtab.evaluate(**how)
    assert (tmp_path / "out/answers.jsonl").read_text() == kept
    assert again["judging"] == report["judging"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"system": "rewritten:proposal"}, "rewriter is required for a system rewritten:S"),
        ({"rewriter": "R"}, "rewrites the answers of a system or baseline rewritten:S"),
        ({"system": "rewritten:rewritten:proposal", "rewriter": "R"}, "answers are rewritten once"),
    ],
)
def test_an_evaluation_says_what_is_missing(task, tmp_path, settings, message):
    with pytest.raises(InvalidOption, match=message):
        trimtab.evaluate(
            **{"proposal": str(task / "proposal"), "dataset": str(task / "pairs.jsonl"), "baseline": "references",
               "system": "proposal", "out": str(tmp_path / "out")} | settings
        )  # fmt: skip


def test_the_drafts_of_an_identity_rewriter_are_accepted():
    """Each letter of the answer is followed by the next one, all but surely: twenty letters take few passes."""
    tokenizer = tiny_tokenizer()
    answer = "abcdefghijklmnopqrst"
    ids = tokenizer("x" + answer, add_special_tokens=False)["input_ids"]
    table = torch.full_like(TableLM.random(V, seed=0).table, -8.0)
    for last, following in zip(ids, [*ids[1:], 0], strict=True):
        table[last, following] = 0.0
    model = AlignedModel(TableLM(table.log_softmax(-1)), tokenizer=tokenizer, eos_token_ids=[0])
    for temperature in (0.0, 1.0):
        rewriter = Rewriter(model, RewriteTemplate("{answer}x"))
        rewriter.model.pace.tally = Tally()
        [found] = rewriter.rewrite(["p"], [answer], SamplingParams(max_tokens=30, temperature=temperature, seed=1))
        assert found.text == answer
        assert found.completion.finish_reason == "stop"
        tally = rewriter.model.pace.tally
        assert tally.acceptance >= 0.9
        assert tally.calls <= 21 / 2


def test_an_answer_that_is_too_long_stays_and_says_why(task, capsys):
    """The others are rewritten, and `generate` prints what there is."""
    model = AlignedModel.from_pretrained(task / "proposal")
    params = SamplingParams(max_tokens=3, temperature=0.0, seed=0)
    found = Rewriter(model, TEMPLATE).rewrite(["de", "fg"], ["ab", "abc" * 100], params)
    assert found[0].error is None
    assert found[0].completion is not None
    assert (found[1].text, found[1].completion) == ("abc" * 100, None)
    assert "the rewriter's prompt" in found[1].error
    assert found[1].finish_reason == "error"
    with pytest.raises(InvalidRequest, match="there are 2 prompts, 1 answers"):
        Rewriter(model, TEMPLATE).rewrite(["de", "fg"], ["ab"], params)


def test_token_ids_are_no_prompts(task):
    with pytest.raises(InvalidRequest, match="told prompts in words"):
        Rewriter(AlignedModel.from_pretrained(task / "proposal"), TEMPLATE).rewrite([[1, 2]], ["x"], SamplingParams())


def test_an_endpoint_without_log_probabilities_has_its_answers_rewritten(task, tmp_path):
    """A plain server of OpenAI's kind, which is asked for texts and for nothing else; a second run asks it nothing."""

    def respond(asked, number):
        texts = [f"no{prompt}" for prompt in asked.body["prompt"]] if isinstance(asked.body["prompt"], list) else ["no"]
        return Reply({"choices": [{"index": i, "text": text, "finish_reason": "stop"} for i, text in enumerate(texts)]})

    data = write_rows(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in task_rows(4)])
    (tmp_path / "r.py").write_text("def f(prompts, completions, **columns):\n    return [float(len(x)) for x in completions]\n")
    with scripted(respond, models=[{"id": "big"}]) as server:
        how = {
            "baseline": f"{server.url}#big", "system": f"rewritten:{server.url}#big", "dataset": str(data),
            "rewriter": str(task / "proposal"), "rewriter_template": str(task / "t.txt"), "max_tokens": 5,
            "judge": f"reward:{tmp_path / 'r.py'}:f", "null": False, "out": str(tmp_path / "out"),
        }  # fmt: skip
        trimtab.evaluate(**how)
        asked = len(server.posts())
        assert not any(one.get("logprobs") for one in server.posts())
        trimtab.evaluate(**how)
        assert len(server.posts()) == asked
    written = json.loads((tmp_path / "out/outputs/rewritten_big.json").read_text())
    before = json.loads((tmp_path / "out/outputs/big.json").read_text())
    assert [row["output"] for row in written] != [row["output"] for row in before]
    model = AlignedModel.from_pretrained(task / "proposal")
    prompts, answers = ([row[name] for row in before] for name in ("instruction", "output"))
    params = [SamplingParams(max_tokens=5, temperature=0.0, seed=i) for i in range(4)]
    wanted = Rewriter(model, read_template(str(task / "t.txt"))).rewrite(prompts, answers, params)
    assert [row["output"] for row in written] == [one.text for one in wanted]


def test_a_file_cannot_begin_like_a_message(tmp_path):
    (tmp_path / "t.txt").write_text("chat: {answer}")
    with pytest.raises(InvalidOption, match="must not begin with 'chat:'"):
        read_template(str(tmp_path / "t.txt"))
