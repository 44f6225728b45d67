"""The path of a real model: a GGUF file is converted, a head of it is trained, decoded, served."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel

from real_study import study_module
from tiny import bpe_tokenizer, save_tiny, tiny_model
from trimtab import AlignedModel, SamplingParams, TextHandover
from trimtab.cli import main
from trimtab.core.rules import Confidence
from trimtab.decode.scoring import completion_rows
from trimtab.files import read_json
from trimtab.handover.draft import Draft
from trimtab.models.loading import load_model

chats, docstrings = study_module("chats"), study_module("docstrings")
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, seed=0)
CAPITAL = chats.question("What is the capital of France?")


def records(data: Path, count: int) -> list[dict[str, Any]]:
    """Held-out ones."""
    return chats.read_part(data, "test")[:count]


def test_the_file_is_converted_and_the_model_knows_the_capital(gguf: str):
    model = AlignedModel.from_pretrained(gguf)
    (folder,) = (Path(os.environ["XDG_CACHE_HOME"]) / "trimtab" / "gguf").iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {p.name for p in folder.iterdir()}
    (answer,) = model.generate([CAPITAL], GREEDY)
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_held_out_docstrings_become_likelier(model: AlignedModel, data: Path):
    chosen = records(data, 24)
    scores = model.score([record["prompt"] for record in chosen], [record["completion"][0] for record in chosen])
    tokens = sum(len(score.tokens) for score in scores)
    aligned, proposal = (-sum(sum(getattr(s, name)) for s in scores) / tokens for name in ("aligned", "proposal"))
    assert aligned < proposal - 0.3


def test_at_weight_0_it_is_the_proposal(model: AlignedModel, gguf: str, data: Path):
    prompts = [record["prompt"] for record in records(data, 2)]
    alone = AlignedModel.from_pretrained(gguf)
    still = replace(GREEDY, weight=0.0)
    assert [one.tokens for one in model.generate(prompts, still)] == [one.tokens for one in alone.generate(prompts, GREEDY)]
    answers = [record["completion"][0] for record in records(data, 2)]
    for score in model.score(prompts, answers, still):
        assert score.aligned == pytest.approx(score.proposal, abs=1e-4)


def test_at_weight_1_it_is_what_peft_makes_of_the_whole_proposal(model: AlignedModel, gguf: str, head: str, data: Path):
    """Whole rows, in a batch of answers of several lengths; a score is the row's entry."""
    whole = PeftModel.from_pretrained(load_model(gguf, dtype=torch.float32), head)
    prompts = [model.encoder.prompt(record["prompt"], "prompt") for record in records(data, 3)]
    scores = model.score(prompts, [r["completion"][0]["content"] for r in records(data, 3)], SamplingParams(weight=1.0))
    pairs = [(prompt, score.tokens) for prompt, score in zip(prompts, scores, strict=True)]
    ((rows, _, counts),) = completion_rows([model.proposal, *model.aligners], pairs)
    for (prompt, tokens), score, proposal, head_row, count in zip(pairs, scores, *rows, counts, strict=True):
        with torch.no_grad():
            logits = whole(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        wanted = torch.log_softmax(logits[:, : model.proposal.vocab_size], -1)
        torch.testing.assert_close(head_row[:count], wanted, atol=2e-3, rtol=0)
        assert (proposal[:count] - wanted).abs().max() > 0.5
        assert score.aligned == pytest.approx([float(row[token]) for row, token in zip(wanted, tokens, strict=True)], abs=2e-3)


def test_drafts_from_the_text_change_nothing(gguf: str, head: str):
    """Every token that speculation leaves is the best one of the aligned row, and some of them were drafted."""
    drafted = AlignedModel.from_pretrained(gguf, head, weight=0.5, draft="ngram", num_speculative_tokens=4)
    text = "alpha, beta, gamma, delta, " * 4
    prompt = drafted.encoder.prompt(chats.question(f"Repeat this: {text}"), "prompt")
    (answer,) = drafted.generate([prompt], SamplingParams(max_tokens=48, temperature=0.0, seed=0))
    assert drafted.pace.tally.accepted > 0
    ((rows, tokens, _),) = completion_rows([drafted.proposal, *drafted.aligners], [(prompt, list(answer.tokens))])
    target = (rows[0][0] + rows[1][0]) / 2
    short = target.max(-1).values - target.gather(1, tokens[0, :, None])[:, 0]
    assert float(short.max()) < 1e-3


def test_generate_and_score_take_the_file(gguf: str, head: str, data: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    lines = (data / "test.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    models = ["--proposal", gguf, "--aligner", head]
    words = ["--input", str(tmp_path / "few.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max_tokens", "8"]
    assert main(["generate", *models, *words, "--temperature", "0"]) == 0
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    capsys.readouterr()
    assert main(["score", *models, "--dataset", str(tmp_path / "few.jsonl"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["nll"]["aligned"] < report["nll"]["proposal"]


def test_the_server_answers_a_chat_with_the_head(model: AlignedModel, gguf: str, head: str, data: Path):
    prompt = records(data, 1)[0]["prompt"]
    words = ["serve", "--proposal", gguf, "--aligner", f"docstrings={head}", "--port", "0"]
    process = subprocess.Popen([sys.executable, "-m", "trimtab", *words], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as log:
        try:
            url = next(json.loads(line)["message"].removeprefix("listening on ") for line in log if "listening on" in line)
            next(line for line in log if '"ready' in line)
            body = {"model": "docstrings", "messages": prompt, "temperature": 0, "max_tokens": 24}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        finally:
            process.kill()
            process.wait()
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "docstrings"
    (said,) = model.generate([prompt], GREEDY)
    assert answer.json()["choices"][0]["message"]["content"] == said.text


def test_the_data_are_docstrings_of_this_pythons_library(tmp_path: Path):
    docstrings.TASK.prepare(tmp_path, None)
    assert read_json(tmp_path / "about.json")["records"] == {"train": 600, "dev": 60, "test": 100, "transfer": 100}
    parts = {name: chats.read_part(tmp_path, name) for name in ("train", "dev", "test")}
    asked, wanted = (
        [{json.dumps(record[field]) for record in part} for part in parts.values()] for field in ("prompt", "completion")
    )
    assert not asked[0] & (asked[1] | asked[2])
    assert sum(map(len, wanted)) == len(set.union(*wanted))


# ---- a leader with another tokenizer

TEXTS = [
    (Path(json.__file__).parent / "decoder.py").read_text(encoding="utf-8")[:900],
    "Numbers 12345 67,890.5 and 3e-10 -- x==y!=z  \t tabs\n\n\n  * a list\n  * of 1) things. It's what we'll don't I'd!",
    "\N{SLIGHTLY SMILING FACE}\N{UPSIDE-DOWN FACE} a \N{WOMAN}\u200d\N{GIRL} 日本語のテキスト。 混ぜて English と数字123"
    " を。\n\n次の行",
]


def test_what_is_settled_of_a_text_stays_as_it_grows(model: AlignedModel):
    prompt = model.encoder.prompt(CAPITAL)
    for text in TEXTS:
        whole = model.encoder.split(prompt, text)[1]
        for end in range(1, len(text)):
            draft = Draft(model.encoder, model.eos_token_ids, prompt, SamplingParams(max_tokens=1000), 0, Confidence())
            draft.text = text[:end]
            draft.settle()
            assert draft.tokens == whole[: len(draft.tokens)], text[:end]


def test_another_tokenizer_begins_and_the_model_goes_on(gguf: str, tmp_path: Path):
    """What it goes on with is its own greedy text behind what was begun."""
    tokenizer = bpe_tokenizer(TEXTS, 200, chat_template="{% for m in messages %}{{ m.content }}\n{% endfor %}")
    leader = AlignedModel.from_pretrained(save_tiny(tmp_path / "leader", tiny_model("llama", len(tokenizer)), tokenizer))
    proposal = AlignedModel.from_pretrained(gguf)
    both = TextHandover(leader, proposal, "confidence(window=3, threshold=0)")
    (one,) = both.generate([CAPITAL], GREEDY)
    assert one.handover_at == 3
    begun = [*proposal.encoder.prompt(CAPITAL), *one.tokens[:3]]
    (rest,) = proposal.generate([begun], replace(GREEDY, max_tokens=GREEDY.max_tokens - 3))
    assert one.tokens[3:] == rest.tokens
