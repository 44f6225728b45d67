"""Whatever the OpenAPI document allows, and whatever it does not: the server answers as it says, and never with 5xx."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving import Server, folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer
from trimtab.users.settings import UserSettings

pytestmark = pytest.mark.slow

V = 28


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("openapi"), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for i, name in enumerate(("proposal", "q")):
        save_tiny(folder / name, tiny_model("llama", V, seed=i, spread=0.3), tokenizer)
    limits = {"max_tokens": 20, "engine": {"max_num_seqs": 8}}
    with running(
        folder_service(
            folder / "proposal",
            {"q": folder / "q"},
            allow_loading=True,
            registry_root=folder,
            users=UserSettings(folder / "users", ("q",), max_users=20),
            feedback=folder / "said.jsonl",
            feedback_per_hour=10**6,
            **limits,
        )
    ) as it:
        yield it


@pytest.mark.parametrize(
    ("which", "tested"),
    [
        (["--exclude-path-regex", "preferences"], 11),
        (["--include-path-regex", "preferences", "--exclude-checks", "positive_data_acceptance"], 1),
    ],
    ids=["all", "preferences"],
)
def test_schemathesis_finds_nothing(server: Server, tmp_path: Path, which: list[str], tested: int):
    """Some two thousand requests, valid and not, against every check that it has.

    Which chats and answers a template can write, no schema says; requests to generate are for models that are not there.
    """
    program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    flags = ["--max-examples", "100", "--seed", "1", "--no-color", *which]
    done = subprocess.run(
        [sys.executable, "-c", program, "run", f"{server.url}/openapi.json", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"Tested: {tested}" in done.stdout
    assert server.idle()


def test_the_document_describes_the_bodies(server: Server):
    document = server.client.get("/openapi.json").json()
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/load_aligner",
        "/v1/unload_aligner",
        "/v1/users/{user}/preferences",
    ):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["additionalProperties"] is False
