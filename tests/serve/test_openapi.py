"""Whatever the OpenAPI document allows, and whatever it does not: the server answers as it says, and never with 5xx."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving import Server, folder_service, running
from tiny import CHAT_TEMPLATE, save_tiny, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

V = 28


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("openapi"), tiny_tokenizer(chat_template=CHAT_TEMPLATE)
    for i, name in enumerate(("proposal", "q")):
        save_tiny(folder / name, tiny_model("llama", V, seed=i, spread=0.3), tokenizer)
    limits = {"max_tokens": 20, "engine": {"max_num_seqs": 8}}
    with running(
        folder_service(folder / "proposal", {"q": folder / "q"}, allow_loading=True, registry_root=folder, **limits)
    ) as it:
        yield it


def test_schemathesis_finds_nothing(server: Server, tmp_path: Path):
    """Some two thousand requests, valid and not, against every check that it has."""
    program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())"
    flags = ["--max-examples", "100", "--seed", "1", "--no-color"]
    done = subprocess.run(
        [sys.executable, "-c", program, "run", f"{server.url}/openapi.json", *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Tested: 8" in done.stdout
    assert server.idle()


def test_the_document_describes_the_bodies(server: Server):
    document = server.client.get("/openapi.json").json()
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_aligner", "/v1/unload_aligner"):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        name = body["$ref"].rpartition("/")[2]
        assert document["components"]["schemas"][name]["additionalProperties"] is False
