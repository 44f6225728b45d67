"""A link to an aligner, as a loop's `current`, is followed while the server runs; what cannot be loaded changes nothing."""

import os
import time

import pytest

from serving import folder_service, running
from tiny import save_tiny, tiny_model, tiny_tokenizer
from trimtab.serve import follow

ASKED = {"model": "evolving", "prompt": "abc", "max_tokens": 12, "seed": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("follow")
    for seed, name in enumerate(("proposal", "one", "two")):
        save_tiny(folder / name, tiny_model("llama", 28, seed=seed, spread=0.6), tiny_tokenizer())
    return folder


def lead(link, to):
    """Replace a link at once, as a loop does."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(to)
    os.replace(fresh, link)


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.05)
    return condition()


def test_a_server_follows_a_link_and_keeps_what_runs(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(follow, "SECONDS", 0.05)
    link = tmp_path / "current"
    link.symlink_to(folder / "one")
    paths = {"evolving": link, "one": folder / "one", "two": folder / "two"}
    with running(folder_service(folder / "proposal", paths)) as server:

        def text(name):
            return server.complete(**{**ASKED, "model": name})["choices"][0]["text"]

        fixed = {name: text(name) for name in ("one", "two")}
        assert fixed["one"] != fixed["two"]
        assert text("evolving") == fixed["one"]
        lead(link, folder / "two")
        assert wait_for(lambda: text("evolving") == fixed["two"])
        registry = server.service.registry
        assert {entry.name: entry.target for entry in registry.entries}["evolving"] == (folder / "two").resolve()
        assert {entry.target for entry in registry.entries if entry.name != "evolving"} == {None}
        with caplog.at_level("WARNING"):
            lead(link, tmp_path / "nowhere")
            assert wait_for(lambda: "evolving stays as it was" in caplog.text)
            time.sleep(0.3)
        assert caplog.text.count("evolving stays as it was") == 1
        assert text("evolving") == fixed["two"]
        lead(link, folder / "one")
        assert wait_for(lambda: text("evolving") == fixed["one"])


def test_whatever_a_library_raises_the_link_is_followed_on(folder, tmp_path, monkeypatch, caplog):
    """A failure that is no error of ours, such as one of a GPU, is said, and a target that failed once is tried again."""
    monkeypatch.setattr(follow, "SECONDS", 0.05)
    link = tmp_path / "current"
    link.symlink_to(folder / "one")
    with running(folder_service(folder / "proposal", {"evolving": link})) as server:
        registry = server.service.registry
        load = registry.load

        def failing(*args, **settings):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(registry, "load", failing)
        with caplog.at_level("WARNING"):
            lead(link, folder / "two")
            assert wait_for(lambda: "stays as it was" in caplog.text)
        assert "out of memory" in caplog.text
        lead(link, folder / "one")
        time.sleep(0.3)
        monkeypatch.setattr(registry, "load", load)
        lead(link, folder / "two")
        assert wait_for(lambda: registry.entries[0].target == (folder / "two").resolve())
