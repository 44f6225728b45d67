"""`trimtab serve --engine vllm`: our flags as vLLM's, and what cannot be done refused before anything starts."""

import json
import logging
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.cli import main
from trimtab.cli.options import read_options
from trimtab.cli.serve import Options
from trimtab.decode.request import SamplingParams
from trimtab.errors import InvalidOption, InvalidRequest, ModelError
from trimtab.vllm import launch as module
from trimtab.vllm.launch import REFUSED, command_line, launch
from trimtab.vllm.settings import Settings, read_settings

NAMED = [("docs", "path/docs", None), ("terse", "path/terse", -0.5)]


def make_options(**given: Any) -> Options:
    return Options(**{"proposal": "org/base", "engine": "vllm", **given})


def flags(words: list[str]) -> dict[str, list[str]]:
    """The values after each flag."""
    found: dict[str, list[str]] = {(name := ""): []}
    for word in words:
        if word.startswith("--"):
            found[name := word] = []
        else:
            found[name].append(word)
    return found


DEFAULTS = {
    "": ["serve", "org/base"],
    "--served-model-name": ["base"],
    "--shutdown-timeout": ["30"],
    "--host": ["127.0.0.1"],
    "--port": ["8000"],
    "--dtype": ["auto"],
    "--max-num-seqs": ["32"],
    "--middleware": ["trimtab.vllm.middleware.AllowedPages"],
    "--allowed-origins": ["[]"],
}


def test_the_bare_proposal_is_plain_vllm():
    assert flags(command_line(make_options(), [], ["base"])) == DEFAULTS


def test_flags_become_vllms():
    options = make_options(
        host="0.0.0.0",
        port=0,
        dtype="bfloat16",
        max_num_seqs=7,
        ssl_keyfile="key.pem",
        ssl_certfile="cert.pem",
        shutdown_timeout=2.5,
        log_prompts=True,
        allowed_origins=("http://localhost:3000",),
        vllm_args="--tensor-parallel-size 2 --hf-overrides '{\"a b\": 1}'",
    )
    assert flags(command_line(options, [], ["base", "org/base"])) == {
        "": ["serve", "org/base"],
        "--served-model-name": ["base", "org/base"],
        "--shutdown-timeout": ["2"],
        "--host": ["0.0.0.0"],
        "--port": ["0"],
        "--dtype": ["bfloat16"],
        "--max-num-seqs": ["7"],
        "--ssl-keyfile": ["key.pem"],
        "--ssl-certfile": ["cert.pem"],
        "--enable-log-requests": [],
        "--tensor-parallel-size": ["2"],
        "--hf-overrides": ['{"a b": 1}'],
        "--middleware": ["trimtab.vllm.middleware.AllowedPages"],
        "--allowed-origins": ['["http://localhost:3000"]'],
    }


def test_aligners_become_settings_that_the_plugin_reads():
    options = make_options(
        rule="geometric",
        proposal_temperature=0.7,
        proposal_top_k=5,
        proposal_top_p=0.9,
        aligner_temperature=1.5,
        dtype="float16",
        max_aligner_memory=1.5,
    )
    words = command_line(options, NAMED, ["base"])
    found = flags(words)
    assert words[words.index("--middleware") + 1] == "trimtab.vllm.middleware.AlignerNames"
    assert found["--middleware"] == ["trimtab.vllm.middleware.AllowedPages"], "the last stands before the others"
    assert read_settings(json.loads(found["--additional-config"][0])) == Settings(
        aligners={"docs": "path/docs", "terse": "path/terse"},
        weights={"terse": -0.5},
        defaults=SamplingParams(
            rule="geometric", proposal_temperature=0.7, proposal_top_k=5, proposal_top_p=0.9, aligner_temperature=1.5
        ),
        dtype="float16",
        memory=3 * 2**29,
    )
    least = flags(command_line(make_options(), NAMED[:1], ["base"]))
    assert read_settings(json.loads(least["--additional-config"][0])) == Settings({"docs": "path/docs"})


@pytest.mark.parametrize("middleware", [module.NAMES, module.PAGES])
def test_the_name_of_a_middleware_is_one_that_can_be_imported(middleware):
    folder, _, name = middleware.rpartition(".")
    assert hasattr(__import__(folder, fromlist=[name]), name)


OTHERS: dict[str, Any] = {
    "draft": "ngram",
    "draft_temperature": 0.5,
    "num_speculative_tokens": 4,
    "aligner_root": "folder",
    "users": "folder",
    "feedback": "said.jsonl",
    "feedback_per_hour": 3,
    "max_users": 3,
    "max_user_pairs": 3,
    "user_days": 3.0,
    "rewriter": "R",
    "rewriter_template": "chat",
    "rewrite_rounds": 2,
    "rewriter_temperature": 0.5,
    "max_num_batched_tokens": 1024,
    "max_cache_tokens": 100,
    "max_waiting": 3,
    "max_prompt_tokens": 10,
    "max_tokens": 10,
    "max_body_bytes": 10,
    "request_timeout": 1.0,
    "stream_interval": 1.0,
    "playground": True,
    "votes": "votes.jsonl",
    "backend": "llamacpp",
    "cuda_graphs": True,
    "date": "2026-11-29",
    "device": "cpu",
    "quantize": "int8",
    "prefix_cache_tokens": 100,
}


def test_aligners_may_have_a_dtype_of_their_own():
    words = command_line(make_options(dtype="float16", aligner_dtype="float32", aligner=("docs=d",)), NAMED, ["base"])
    assert words[words.index("--dtype") + 1] == "float16"
    assert json.loads(words[words.index("--additional-config") + 1])["trimtab"]["dtype"] == "float32"


def test_every_option_is_mapped_or_refused():
    assert set(OTHERS) == set(REFUSED)
    mapped = {*module.SAME, *module.SHAPING, "proposal", "aligner", "engine", "vllm_args", "api_key", "served_model_name"}
    mapped |= {
        "max_aligner_memory",
        "shutdown_timeout",
        "log_prompts",
        "allowed_origins",
        "allowed_hosts",
        "chat_template_path",
        "aligner_dtype",
    }
    assert mapped | set(REFUSED) == {field.name for field in fields(Options)}
    assert not mapped & set(REFUSED)


@pytest.mark.parametrize(("name", "value"), OTHERS.items())
def test_what_vllm_cannot_do_is_refused_with_the_reason(name, value):
    with pytest.raises(InvalidOption) as caught:
        read_options(Options, {"proposal": "org/base", "engine": "vllm", "aligner": ["docs=d"], name: value})
    assert str(caught.value) == f"--{name} does not go with --engine vllm: {REFUSED[name]}"


def test_what_changes_nothing_is_not_refused():
    given = {"proposal": "org/base", "engine": "vllm", "num_speculative_tokens": 0, "draft": "none", "playground": False}
    assert command_line(read_options(Options, given), NAMED, ["base"]) == command_line(make_options(), NAMED, ["base"])


@pytest.mark.parametrize(("name", "value"), [("proposal_top_p", 0.9), ("rule", "product"), ("max_aligner_memory", 1.0)])
def test_what_is_for_aligners_is_refused_without_one(name, value):
    with pytest.raises(InvalidOption, match=f"^--{name} needs an --aligner$"):
        read_options(Options, {"proposal": "org/base", "engine": "vllm", name: value})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--api-key secret", "--vllm_args: --api-key does not go there: .* say --api_key"),
        ("--api_key=secret", "--vllm_args: --api-key does not go there"),
        ("--additional-config '{}'", "--vllm_args: --additional-config does not go there: it would replace the aligners"),
        ("--additional_config.trimtab.rule product", "--vllm_args: --additional-config does not go there"),
        ("--allowed-origins '[\"*\"]'", "--vllm_args: --allowed-origins does not go there: say --allowed_origins"),
        ("--chat-template 'x", "--vllm_args: No closing quotation: --chat-template 'x"),
    ],
)
def test_further_flags_that_undo_ours_or_cannot_be_read_are_refused(given, says):
    with pytest.raises(InvalidOption, match=says):
        command_line(make_options(vllm_args=given), NAMED, ["base"])


def test_without_aligners_the_configuration_is_the_users():
    given = "--additional-config '{\"theirs\": 1}'"
    assert command_line(make_options(vllm_args=given), [], ["base"])[-2:] == shlex.split(given)


# ---- the process


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    save_tiny(root / "proposal", tiny_model("llama", 7), tiny_tokenizer("abcdef"))
    for name, letters in (("docs", "abcdef"), ("odd", "abcdex")):
        tiny_tokenizer(letters).save_pretrained(root / name)
    return root


class Server:
    """What `subprocess.Popen` is replaced by."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.commands: list[list[str]] = []
        self.environments: list[dict[str, str]] = []
        self.signals: list[int] = []

    def __call__(self, command: list[str], *, env: dict[str, str], **more: Any) -> "Server":
        self.commands.append(command)
        self.environments.append(env)
        return self

    def wait(self) -> int:
        signal.raise_signal(signal.SIGTERM)
        return self.status

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """As if vLLM were installed."""
    server = Server(0)
    monkeypatch.setattr(subprocess, "Popen", server)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace(origin="vllm/__init__.py"))
    return server


def test_the_server_gets_keys_and_signals_and_the_log_no_keys(root, server, caplog):
    options = make_options(proposal=str(root / "proposal"), api_key=("secret-1", "secret-2"))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with caplog.at_level(logging.INFO, "trimtab"):
        assert launch(options, [("docs", str(root / "docs"), None)], ["base"]) == 0
    (command,) = server.commands
    words = command_line(options, [("docs", str(root / "docs"), None)], ["base"])
    assert command == [sys.executable, "-m", "trimtab.vllm.command", *words, "--api-key", "secret-1", "secret-2"]
    assert caplog.messages == [f"vllm {shlex.join(words)}"]
    assert "secret" not in caplog.text
    assert server.signals == [signal.SIGTERM]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_its_status_is_handed_on(root, server):
    server.status = 3
    assert launch(make_options(proposal=str(root / "proposal")), [], ["base"]) == 3
    assert "--api-key" not in server.commands[0]


@pytest.mark.parametrize(
    ("path", "changes", "error", "says"),
    [
        ("odd", {}, ModelError, "does not share the proposal's vocabulary"),
        ("nowhere", {}, ModelError, "nowhere"),
        ("docs", {"rule": "candidates"}, InvalidOption, "'candidates' has no row"),
        ("docs", {"dtype": "float64"}, InvalidOption, "trimtab.dtype must be"),
    ],
)
def test_what_would_fail_later_fails_before_the_server_starts(path, changes, error, says, root, server):
    options = replace(make_options(proposal=str(root / "proposal")), **changes)
    with pytest.raises(error, match=says) as caught:
        launch(options, [("docs", str(root / path), None)], ["base"])
    assert not isinstance(caught.value, InvalidRequest)
    assert server.commands == []


# ---- the command, without vLLM


def one_line(err: str) -> str:
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("beside", ["nothing", "a folder called vllm"])
def test_the_command_says_that_vllm_is_missing(beside, capsys, monkeypatch, tmp_path):
    """A folder is found in a checkout of vLLM's sources, or beside these very tests. Nothing is loaded before that is said."""
    (tmp_path / beside.split()[-1]).mkdir()
    spec = PathFinder.find_spec("vllm", [str(tmp_path)])
    assert (spec is None) == (beside == "nothing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    nowhere = ["--proposal", "/nowhere", "--aligner", "q=/nowhere/else"]
    assert main(["serve", "--engine", "vllm", *nowhere]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.startswith("trimtab serve: error: --engine vllm needs vLLM: pip install 'trimtab[vllm]'")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--vllm_args=--enforce-eager"], "--vllm_args belongs to --engine vllm"),
        (["--engine", "vllm", "--device", "cpu"], "--device does not go with --engine vllm: vLLM chooses devices itself"),
        (["--engine", "vllm", "--vllm_args", "'"], "--vllm_args: No closing quotation"),
        (["--engine", "vllm", "--weight", "1"], "--weight needs an --aligner"),
        (["--engine", "vllm", "--port", "-1"], "--port must be from 0 to 65535"),
    ],
)
def test_wrong_usage_is_one_line(given, says, capsys):
    assert main(["serve", "--proposal", "/nowhere", *given]) == 2
    assert says in one_line(capsys.readouterr().err)


def test_how_the_server_ended_is_how_the_command_ends(root, server, capsys):
    words = ["serve", "--engine", "vllm", "--proposal", str(root / "proposal"), "--json", "--api_key", "secret"]
    words += ["--allowed_hosts", "a.example", "--allowed_hosts", "b.example"]
    assert main(words) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == {"model": "proposal", "engine": "vllm"}
    assert "secret" not in out.err
    assert "secret" not in shlex.join(server.commands[0]), "others would see it in the list of processes"
    assert server.environments[0]["VLLM_API_KEY"] == "secret"
    assert server.environments[0]["TRIMTAB_ALLOWED_HOSTS"] == "a.example b.example"
    server.status = 1
    assert main(words) == 1
    assert "vllm serve ended with status 1" in capsys.readouterr().err
