"""lm-evaluation-harness says the same of a model in process, behind our server and, for a bare proposal, by its own `hf`."""

import inspect
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.models.api_models import TemplateAPI
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing

from looking import Opening
from serving import folder_service, running
from spellings import KINDS, SPECIAL
from tiny import CHAT_TEMPLATE, EOS, ScriptedLM, save_tiny, tiny_model, tiny_tokenizer
from tiny_task import write_rows
from trimtab import AlignedModel, SamplingParams
from trimtab.errors import InvalidOption, InvalidRequest
from trimtab.evaluate import harness
from trimtab.evaluate.harness import LOADING, OWN, TrimtabLM
from trimtab.models.table import TableLM

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_network")]

LETTERS = "abcdefghijklmnopqrstuvwxyz "
CONTEXT = 64
"""Tokens that the tiny models hold; the longest of these texts have more."""
ROWS = [
    {"text": "the cat sat on the mat", "question": "where is the cat", "choices": ["mat", "dog", "z"], "gold": 0},
    {"text": "a dog ran after it " * 9, "question": "who ran " * 12, "choices": ["a", "b", "c"], "gold": 1},
    {"text": "x", "question": "y ", "choices": ["yes", "no", "no way"], "gold": 2},
    {"text": "to be or not to be " * 4, "question": "", "choices": ["to be", "not to be", "q"], "gold": 0},
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}, cache_dir: {folder}/cache}}
test_split: test
output_type: {kind}
{rest}
"""
TASKS = {
    "tiny_rolling": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]',
    ),
    "tiny_choice": (
        "multiple_choice",
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
    ),
    "tiny_greedy": (
        "generate_until",
        'doc_to_text: "{{question}}s"\ndoc_to_target: "{{text}}"\n'
        'generation_kwargs: {until: ["qu", "z"], max_gen_toks: 20, do_sample: false}\nmetric_list: [{metric: exact_match}]',
    ),
    "tiny_sampled": (
        "generate_until",
        'doc_to_text: "{{question}}s"\ndoc_to_target: "{{text}}"\n'
        "generation_kwargs: {until: [], max_gen_toks: 9, do_sample: true, temperature: 0.7, top_p: 0.9}\n"
        "metric_list: [{metric: exact_match}]",
    ),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for another machine than this one fails."""
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def here(host: Any) -> bool:
        return host in (None, "127.0.0.1", "localhost", "::1")

    def checked_resolve(host: Any, *args: Any, **kwargs: Any) -> Any:
        assert here(host), f"asked for {host}"
        return resolve(host, *args, **kwargs)

    def checked_connect(self: socket.socket, address: Any) -> Any:
        assert self.family == socket.AF_UNIX or here(address[0]), f"connected to {address}"
        return connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", checked_resolve)
    monkeypatch.setattr(socket.socket, "connect", checked_connect)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A proposal, two aligners, and tasks over `ROWS`."""
    folder = tmp_path_factory.mktemp("harness")
    for i, name in enumerate(("proposal", "aligner", "other")):
        tokenizer = tiny_tokenizer(LETTERS, chat_template=CHAT_TEMPLATE)
        save_tiny(folder / name, tiny_model("llama", len(LETTERS) + 1, seed=i, spread=0.4), tokenizer)
    write_rows(folder / "rows.jsonl", ROWS)
    for name, (kind, rest) in TASKS.items():
        page = TASK.format(name=name, kind=kind, folder=folder, rest="{rest}").replace("{rest}", rest)
        (folder / f"{name}.yaml").write_text(page, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def with_bos(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same proposal with a tokenizer that puts a BOS first."""
    tokenizer = tiny_tokenizer(LETTERS, bos_token="<eos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", EOS)])
    model = tiny_model("llama", len(LETTERS) + 1, seed=0, spread=0.4)
    there = save_tiny(tmp_path_factory.mktemp("bos") / "proposal", model, tokenizer)
    assert AlignedModel.from_pretrained(there).tokenizer("ab")["input_ids"] == [EOS, 1, 2]
    return there


@pytest.fixture(scope="module")
def aligned(folder: Path) -> AlignedModel:
    return AlignedModel.from_pretrained(folder / "proposal", folder / "aligner")


def evaluate(folder: Path, model: Any, tasks: list[str] | None = None, **settings: Any) -> dict[str, Any]:
    """The harness's results of a model, without its thousands of resamplings."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    said = {"task_manager": manager, "bootstrap_iters": 0, **settings}
    return dict(simple_evaluate(model=model, tasks=tasks or list(TASKS), **said))


def responses(results: Mapping[str, Any], task: str) -> list[Any]:
    """What the model said, in the order of the documents."""
    return [sample["filtered_resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]


def assert_same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """The same texts and greediness, the same log-likelihoods up to rounding, and so the same metrics."""
    assert set(mine["results"]) == set(theirs["results"])
    for task, metrics in mine["results"].items():
        for left, right in zip(responses(mine, task), responses(theirs, task), strict=True):
            for a, b in zip(left, right, strict=True):
                if isinstance(a, str):
                    assert a == b
                elif isinstance(a, float):
                    assert a == pytest.approx(float(b), abs=1e-3)
                else:
                    assert (float(a[0]), a[1]) == (pytest.approx(float(b[0]), abs=1e-3), b[1])
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert numbers
        assert numbers == pytest.approx({name: theirs["results"][task][name] for name in numbers}, rel=1e-4)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    """Requests as the harness makes them."""
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def pairs(*arguments: tuple[str, str]) -> list[Instance]:
    return instances("loglikelihood", *arguments)


# ---- one model, three ways


@pytest.mark.parametrize(("name", "bos"), [("base", False), ("docs", False), ("base", True)])
def test_the_class_and_the_server_agree(folder, with_bos, name, bos):
    """In texts that are too long, too: `local-completions` leaves room for a token that it does not want."""
    proposal = with_bos if bos else folder / "proposal"
    aligners, mine = {}, {"proposal": str(proposal)}
    if name == "docs":
        aligners, mine = {"docs": folder / "aligner"}, mine | {"aligner": str(folder / "aligner")}
    scored, written = ["tiny_rolling", "tiny_choice"], ["tiny_greedy", "tiny_sampled"]
    with running(folder_service(proposal, aligners)) as server:
        theirs = {"model": name, "base_url": f"{server.url}/v1/completions", "tokenizer": str(proposal), "add_bos_token": bos}
        remote = evaluate(folder, "local-completions", model_args=theirs | {"max_length": CONTEXT})
    assert_same(evaluate(folder, "trimtab", scored, model_args=mine | {"max_length": CONTEXT - 2}), without(remote, written))
    assert_same(evaluate(folder, "trimtab", written, model_args=mine | {"max_length": CONTEXT - 1}), without(remote, scored))


def without(results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    return {**results, "results": {task: found for task, found in results["results"].items() if task not in tasks}}


@pytest.mark.parametrize("add_bos_token", [None, False])
@pytest.mark.parametrize("tokenizer", ["without BOS", "with BOS"])
def test_a_bare_proposal_is_what_the_harness_itself_makes_of_it(folder, with_bos, tokenizer, add_bos_token):
    """Contexts that are too long or empty included."""
    proposal = str(with_bos if tokenizer == "with BOS" else folder / "proposal")
    said = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    tasks = ["tiny_rolling", "tiny_choice", "tiny_greedy"]
    theirs = HFLM(pretrained=proposal, device="cpu", **said)
    mine = TrimtabLM(proposal, **said)
    assert mine.max_length == theirs.max_length == CONTEXT
    for text in ("a b", "<eos>a", " a", ""):
        assert mine.tok_encode(text) == theirs.tok_encode(text)
        assert mine.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    assert_same(evaluate(folder, mine, tasks), evaluate(folder, theirs, tasks))


def test_chats_are_rendered_as_the_harness_does(folder, aligned):
    theirs, mine = HFLM(pretrained=str(folder / "proposal"), device="cpu"), TrimtabLM(aligned)
    chat = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}]
    for history, answer in ((chat[:1], True), (chat, False)):
        assert mine.apply_chat_template(history, answer) == theirs.apply_chat_template(history, answer)
    assert mine.apply_chat_template(chat[:1]) == "u who<eos>a "
    assert (mine.tokenizer_name, mine.chat_template(True)) == (theirs.tokenizer_name, CHAT_TEMPLATE)
    bare = TrimtabLM(str(folder / "proposal"))
    tasks = ["tiny_choice", "tiny_greedy"]
    assert_same(*(evaluate(folder, model, tasks, apply_chat_template=True) for model in (bare, theirs)))


def test_the_command_line_knows_the_model(folder, tmp_path):
    models = f"proposal={folder / 'proposal'},aligner={folder / 'aligner'}+{folder / 'other'},weight=0.5+0.25"
    done = command(
        "run",
        "--model",
        "trimtab",
        "--model_args",
        models,
        "--tasks",
        *TASKS,
        "--include_path",
        folder,
        "--output_path",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (written,) = tmp_path.rglob("results_*.json")
    saved = json.loads(written.read_text(encoding="utf-8"))
    both = [folder / "aligner", folder / "other"]
    loaded = TrimtabLM(AlignedModel.from_pretrained(folder / "proposal", both, weight=[0.5, 0.25]))
    results = evaluate(folder, loaded)["results"]
    for task, metrics in results.items():
        assert {name: saved["results"][task][name] for name in metrics if "stderr" not in name} == pytest.approx(
            {name: value for name, value in metrics.items() if "stderr" not in name}
        )
    info = {"rule": "product", "weight": [0.5, 0.25], "max_length": CONTEXT, "max_num_seqs": 32, "date": None}
    assert saved["config"]["trimtab"] == info


def command(*words: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    line = [sys.executable, "-m", "trimtab.evaluate.harness", *map(str, words)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


# ---- log-likelihoods


@pytest.mark.parametrize("rule", ["product", "geometric", "kl_gate(tau=0.5)", "gate(rule=mixture, by=entropy)"])
def test_log_likelihoods_are_the_aligned_models_scores(aligned, rule):
    """Among them some that share all tokens but the last, and one that divides the same text elsewhere."""
    model = AlignedModel(aligned.proposal, aligned.aligners, aligned.tokenizer, [EOS], rule=rule, max_num_seqs=3)
    requests = [
        ("a cat ", "sat"),
        ("a cat", " sat"),
        ("a cat", " sax"),
        ("a cat", " say"),
        ("a cat s", "at"),
        ("", "mat"),
        ("to be", " or not to be"),
    ]
    answers = TrimtabLM(model).loglikelihood(pairs(*requests), disable_tqdm=True)
    for (context, continuation), (logp, _) in zip(requests, answers, strict=True):
        tokens = model.tokenizer(context + continuation)["input_ids"]
        prompt = max(len(context.rstrip()), 1)
        (score,) = model.score(
            [([EOS] if not context else []) + tokens[: prompt - (not context)]], [tokens[prompt - (not context) :]]
        )
        assert logp == pytest.approx(sum(score.aligned), abs=1e-4)


def test_greedy_is_what_greedy_decoding_writes(aligned):
    model = TrimtabLM(aligned)
    contexts = ["a cat", "to be", "x"]
    texts = [
        aligned.tokenizer.decode(c.tokens) for c in aligned.generate(contexts, SamplingParams(max_tokens=6, temperature=0))
    ]
    assert all("<eos>" not in text for text in texts), "other contexts, please"
    same = list(zip(contexts, texts, strict=True))
    first = [(context, ("b" if text[0] == "a" else "a") + text[1:]) for context, text in same]
    last = [(context, text[:-1] + ("b" if text[-1] == "a" else "a")) for context, text in same]
    answers = model.loglikelihood(pairs(*same, *first, *last), disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True] * 3 + [False] * 6


def test_of_two_best_tokens_greedy_takes_the_one_with_the_lower_id():
    row = torch.tensor([0.0, 1, 2, 2, 0, 0, 0], dtype=torch.float64)
    model = TrimtabLM(AlignedModel(TableLM(row), tokenizer=tiny_tokenizer("abcdef"), eos_token_ids=[EOS]))
    answers = model.loglikelihood(pairs(("a", "b"), ("a", "c"), ("a", "bbc"), ("a", "bb")), disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False, False, True]
    assert answers[0][0] == answers[1][0]
    (text,) = model.generate_until(instances("generate_until", ("a", {"until": [], "max_gen_toks": 4})), disable_tqdm=True)
    assert text == "bbbb"


def test_long_continuations_are_scored_piece_by_piece(aligned, monkeypatch):
    """Rows of bounded size: here, one token of each continuation at a time."""
    requests = pairs(("a cat", " sat"), ("a cat", " say"), ("x", "yes and no"), ("", "mat"))
    whole = TrimtabLM(aligned).loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr("trimtab.decode.scoring.ROW_BUDGET", 1)
    pieces = TrimtabLM(aligned).loglikelihood(requests, disable_tqdm=True)
    for (logp, greedy), expected in zip(pieces, whole, strict=True):
        assert (pytest.approx(logp, abs=1e-4), greedy) == expected


def test_an_impossible_token_has_no_likelihood():
    row = torch.tensor([0.0, 1, -torch.inf, 2], dtype=torch.float64)
    model = TrimtabLM(AlignedModel(TableLM(row), tokenizer=tiny_tokenizer("abc"), eos_token_ids=[EOS]))
    assert model.loglikelihood(pairs(("a", "cbc"), ("a", "cb")), disable_tqdm=True) == [(-torch.inf, False)] * 2


def test_what_is_too_long_loses_its_left_end(aligned):
    """The model reads `max_length` tokens and predicts one more; a continuation is never cut."""
    model = TrimtabLM(aligned, max_length=20)
    context, answer = "the cat sat on the mat and the dog", "ran away"
    (long, short) = model.loglikelihood(pairs((context, answer), (context[-21 + len(answer) :], answer)), disable_tqdm=True)
    assert long == short
    tokens = aligned.tokenizer(context + answer)["input_ids"][-21:]
    (score,) = aligned.score([tokens[: -len(answer)]], [tokens[-len(answer) :]])
    assert long[0] == pytest.approx(sum(score.aligned), abs=1e-4)
    with pytest.raises(InvalidRequest, match="has 21 tokens to score: 1 to 20 can be"):
        model.loglikelihood(pairs(("a", "b" * 21)), disable_tqdm=True)
    settings = {"until": [], "max_gen_toks": 5}
    (text,) = model.generate_until(instances("generate_until", (context, settings)), disable_tqdm=True)
    (completion,) = aligned.generate(
        [aligned.tokenizer(context)["input_ids"][-15:]], SamplingParams(max_tokens=5, temperature=0)
    )
    assert text == completion.text


def test_rolling_windows_predict_every_token_once(aligned):
    model = TrimtabLM(aligned, max_length=8)
    text = "the cat sat on the mat"
    (total,) = model.loglikelihood_rolling(instances("loglikelihood_rolling", (text,)), disable_tqdm=True)
    tokens = [EOS, *aligned.tokenizer(text)["input_ids"]]
    windows = [(tokens[:1], tokens[1:9]), (tokens[8:9], tokens[9:17]), (tokens[14:17], tokens[17:])]
    scores = aligned.score([context for context, _ in windows], [window for _, window in windows])
    assert total == pytest.approx(sum(sum(score.aligned) for score in scores), abs=1e-4)
    assert model.loglikelihood_rolling(instances("loglikelihood_rolling", ("",)), disable_tqdm=True) == [0.0]


# ---- texts


def test_every_repeat_is_another_sample_and_the_same_again_with_the_same_seed(aligned):
    settings = {"until": ["q"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = instances("generate_until", *[("a cat", settings)] * 5, ("to be", settings))
    texts = TrimtabLM(aligned).generate_until(requests, disable_tqdm=True)
    assert len(set(texts[:5])) > 1
    assert texts == TrimtabLM(aligned).generate_until(requests, disable_tqdm=True)
    assert texts != TrimtabLM(aligned, seed=7).generate_until(requests, disable_tqdm=True)
    params = SamplingParams(max_tokens=12, stop="q", seed=1234)
    assert [texts[0], texts[5]] == [completion.text for completion in aligned.generate(["a cat", "to be"], params)]


def test_an_empty_context_is_the_prefix_token(aligned):
    settings = {"until": [""], "max_new_tokens": 4, "num_beams": 1}
    (text,) = TrimtabLM(aligned).generate_until(instances("generate_until", ("", settings)), disable_tqdm=True)
    (completion,) = aligned.generate([[EOS]], SamplingParams(max_tokens=4, temperature=0))
    assert text == completion.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4, "max_gen_toks": 9}, "there is no 'num_beams' here"),
        ({"max_gen_toks": CONTEXT}, "leaves no room for a prompt: the context holds 64"),
        ({"do_sample": True, "temperature": -1, "max_gen_toks": 9}, "temperature must be"),
    ],
)
def test_generation_settings_that_cannot_be_had_are_errors(aligned, settings, message):
    with pytest.raises(InvalidRequest, match=message):
        TrimtabLM(aligned).generate_until(instances("generate_until", ("a", settings)), disable_tqdm=True)


def test_until_may_be_a_special_token_and_an_ignored_end_is_none():
    """The harness adds the end of sequence to `until`; whoever ignores it gets all that was asked for."""
    tokenizer = KINDS["llama"]()
    words = [tokenizer.convert_tokens_to_ids(piece) for piece in ("▁cat", "</s>", "▁sat", SPECIAL, "▁on")]
    script = ScriptedLM([0, *words], len(tokenizer))  # its first token stands for the prompt's second, after a BOS
    model = TrimtabLM(AlignedModel(script, tokenizer=tokenizer, eos_token_ids=[tokenizer.eos_token_id]), add_bos_token=False)
    assert model.tok_encode("the,") == tokenizer.convert_tokens_to_ids(["▁the", ","])
    for until, ignored, text in (([], False, " cat"), ([], True, " cat sat on"), ([SPECIAL], True, " cat sat")):
        settings = {"until": until, "ignore_eos": ignored, "max_gen_toks": len(words)}
        assert model.generate_until(instances("generate_until", ("the,", settings)), disable_tqdm=True) == [text]


def test_a_rule_without_a_row_writes_and_does_not_score(folder, aligned):
    model = TrimtabLM(str(folder / "proposal"), aligner=str(folder / "aligner"), rule="candidates(n=4)")
    settings = {"until": [], "max_gen_toks": 4, "do_sample": True, "temperature": 1.0}
    (text,) = model.generate_until(instances("generate_until", ("a cat", settings)), disable_tqdm=True)
    (completion,) = aligned.generate("a cat", SamplingParams(max_tokens=4, seed=1234, rule="candidates(n=4)"))
    assert text == completion.text
    with pytest.raises(InvalidOption, match="it cannot score"):
        model.loglikelihood(pairs(("a", "b")), disable_tqdm=True)


def test_answers_come_from_the_harnesss_cache_the_second_time(folder, aligned, tmp_path, monkeypatch):
    model, tasks = TrimtabLM(aligned), ["tiny_rolling", "tiny_choice", "tiny_greedy"]
    first = evaluate(folder, model, tasks, use_cache=str(tmp_path / "answers"))
    for name in ("_score", "_prompts"):
        monkeypatch.setattr(model, name, None)
    assert_same(evaluate(folder, model, tasks, use_cache=str(tmp_path / "answers")), first)


# ---- arguments


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("proposal={P},aligne={A}", "there is no option 'aligne'; choose from add_bos_token, aligner,"),
        ("aligner={A}", "proposal must be a folder"),
        ("proposal={P},aligner={A},weight=1+x", r"weight must be numbers joined by '\+'"),
        ("proposal={P},aligner={A},weight=1+1", "weight has 2 numbers, but there are 1 aligners"),
        ("proposal={P},aligner={A},rule=best", "there is no rule 'best'"),
        ("proposal={P},max_length=65", "max_length must be an integer at least 1 and at most 64, not 65"),
        ("proposal={P},max_gen_toks=no", "max_gen_toks must be an integer at least 1, not 'no'"),
        ("proposal={P},prefix_token_id=28", "prefix_token_id must be an integer at least 0 and at most 27"),
        ("proposal={P},add_bos_token=1", "add_bos_token must be true or false"),
        ("proposal={P},max_num_seqs=0", "max_num_seqs must be an integer of at least 1"),
        ("proposal={P},batch_size=many", "batch_size must be a number or auto"),
        ("proposal={P},num_speculative_tokens=99", "num_speculative_tokens must be from 0 to 16"),
    ],
)
def test_bad_arguments_are_named(folder, args, message):
    line = args.format(P=folder / "proposal", A=folder / "aligner")
    with pytest.raises((InvalidOption, InvalidRequest), match=message):
        TrimtabLM.create_from_arg_string(line, {"batch_size": 1, "device": None})


def test_a_loaded_model_takes_no_arguments_of_loading(aligned):
    with pytest.raises(InvalidOption, match="dtype belongs to loading a model"):
        TrimtabLM(aligned, dtype="float32")
    with pytest.raises(InvalidOption, match="give the model a tokenizer"):
        TrimtabLM(AlignedModel(TableLM.random(5, seed=0)))


def test_a_rule_with_several_settings_fits_in_a_line_that_commas_divide(folder):
    line = f"proposal={folder / 'proposal'},aligner={folder / 'aligner'},rule=gate(rule=mixture;by=entropy;tau=1.5),weight=0.3"
    shaping = TrimtabLM.create_from_arg_string(line, {"batch_size": 1, "device": None})._shaping
    assert (str(shaping.rule), shaping.weights) == ("gate(rule=mixture, by=entropy, tau=1.5)", (0.3,))
    line = f"proposal={folder / 'proposal'},aligner={folder / 'aligner'},handover=confidence(window=2;threshold=0.9)"
    shaping = TrimtabLM.create_from_arg_string(line, {"batch_size": 1, "device": None})._shaping
    assert str(shaping.rule) == "confidence(window=2, threshold=0.9)"


def test_model_args_win_over_the_flags_of_the_harness(folder):
    """Its command line says batch size 1 and `cuda:0` even if nobody gave them."""
    line = f"proposal={folder / 'proposal'},dtype=float64,max_num_seqs=5"
    assert TrimtabLM.create_from_arg_string(line, {"batch_size": 1, "device": "cpu"}).model.max_num_seqs == 5
    sizes = {1: 32, "auto": 32, 4: 4, "4": 4}
    for said, size in sizes.items():
        flags = {"batch_size": said, "device": "cpu"}
        assert TrimtabLM.create_from_arg_string(f"proposal={folder / 'proposal'}", flags).model.max_num_seqs == size


@pytest.mark.parametrize(("error", "status"), [(InvalidOption("no"), 2), (InvalidRequest("no"), 1)])
def test_a_mistake_on_the_command_line_is_one_line(monkeypatch, capsys, error, status):
    def fail() -> None:
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", fail)
    assert harness.main() == status
    assert capsys.readouterr().err == "trimtab: error: no\n"


def test_the_harness_is_needed_by_this_module_alone():
    """Without lm-eval, everything else can be imported, and this says what to install."""
    program = (
        "import sys, trimtab, trimtab.evaluate, trimtab.evaluate.likelihood\n"
        "assert not any(name.startswith('lm_eval') for name in sys.modules)\n"
        "sys.modules['lm_eval'] = None\n"
        "import trimtab.evaluate.harness"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stderr.strip().endswith("lm-evaluation-harness is not installed: pip install 'trimtab[eval]'")


# ---- docs/harnesses.md


PAGE = (Path(__file__).parents[2] / "docs" / "harnesses.md").read_text(encoding="utf-8")


def test_the_page_lists_every_argument():
    table = PAGE.partition("| `--model_args` | means |")[2].partition("\n\n")[0]
    listed = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed == {"proposal"} | LOADING | OWN - {"batch_size"}


def test_the_commands_of_the_page_parse(monkeypatch):
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    found = []
    for line in lines:
        _, run, rest = line.partition(" run ")
        if run:
            monkeypatch.setattr(sys, "argv", ["lm_eval", "run", *shlex.split(rest)])
            asked = HarnessCLI().parse_args()
            known = {"trimtab": {"proposal"} | LOADING | OWN, "local-completions": REMOTE}[asked.model]
            assert set(asked.model_args) <= known
            found.append(asked.model)
    assert sorted(set(found)) == ["local-completions", "trimtab"]
    (task,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert yaml.safe_load(task)["output_type"] == "multiple_choice"
    for program in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        compile(program, "docs/harnesses.md", "exec")


REMOTE = {*inspect.signature(TemplateAPI.__init__).parameters}
"""The arguments of `local-completions`."""


def test_an_end_of_sequence_in_a_continuation_is_a_token_like_others(folder):
    """It is scored where it stands, as the harness's own model does it: also alone, and with more behind it."""
    theirs, mine = HFLM(pretrained=str(folder / "proposal"), device="cpu"), TrimtabLM(str(folder / "proposal"))
    pairs = [("a b", " c<eos>"), ("a b", "<eos>"), ("a b", " c<eos> d")]
    for context, continuation in pairs:
        assert mine._encode_pair(context, continuation) == tuple(theirs._encode_pair(context, continuation))


def test_a_run_has_one_date(folder, monkeypatch):
    monkeypatch.setattr("trimtab.data.template.today", lambda: "2026-11-30")
    assert TrimtabLM(str(folder / "proposal"), date="2026-11-29").model.encoder.date == "2026-11-29"
    assert TrimtabLM(str(folder / "proposal")).model.encoder.date == "2026-11-30"
    assert TrimtabLM(str(folder / "proposal")).get_model_info()["trimtab"]["date"] is None, "this template writes none"


def test_a_rule_that_looks_back_scores_each_request_by_itself():
    """The same text with another beginning of the answer is another row, and no row is shared."""
    tables = [TableLM.random(1 + len(LETTERS), order=1, seed=seed) for seed in range(2)]
    model = AlignedModel(tables[0], tables[1:], tiny_tokenizer(LETTERS), [EOS], rule=Opening(tokens=1))
    pairs = [([1, 2, 3], [4, 5]), ([1, 2], [3, 4, 6]), ([1, 2, 3], [4, 7]), ([1], [2, 3, 4, 5])]
    found = TrimtabLM(model)._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    scores = model.score(*map(list, zip(*pairs, strict=True)))
    assert [logp for logp, _ in found] == pytest.approx([sum(score.aligned) for score in scores])
    assert scores[0].aligned[0] != scores[1].aligned[1]
