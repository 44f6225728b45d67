"""Aligners come and go: loaded, replaced, evicted, brought back, unloaded, under load, and from nowhere but the root folder."""

import gc
import json
import os
import shutil
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving import folder_service, running
from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel, Aligner, SamplingParams
from trimtab.cli.serve import _cache_bytes
from trimtab.decode.assemble import Loader
from trimtab.errors import InvalidOption, InvalidRequest, VocabularyMismatch
from trimtab.models.adapters import Adapted
from trimtab.models.aligner import Manifest
from trimtab.models.fingerprint import digest_model
from trimtab.models.loading import load_model
from trimtab.models.lora_folder import PROJECTIONS
from trimtab.models.table import TableLM
from trimtab.models.vocabulary import fingerprint_vocabulary
from trimtab.serve.registry import NoSuchAligner, NoSuchFolder, OutOfMemory, Registry

V = 28


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """`proposal`, aligners `a0` … `a3`, LoRA adapters `l0` … `l5` of `base`, an `odd` vocabulary, and `secret` beside them."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer = tiny_tokenizer()
    save_tiny(folder / "proposal", tiny_model("llama", V, seed=0, spread=0.3), tokenizer)
    for i in range(4):
        save_tiny(folder / "aligners" / f"a{i}", tiny_model("llama", V, seed=1 + i, spread=0.3, num_hidden_layers=1), tokenizer)
    base = save_tiny(folder / "aligners" / "base", tiny_model("qwen3", V, seed=9, spread=0.3), tokenizer)
    for i in range(6):
        save_lora(folder / "aligners" / f"l{i}", base, seed=i, r=2 + i % 3, target_modules="all-linear")
        tokenizer.save_pretrained(folder / "aligners" / f"l{i}")
    save_tiny(folder / "aligners" / "odd", tiny_model("llama", V), tiny_tokenizer("zyxwvutsrqponmlkjihgfedcba "))
    save_tiny(folder / "secret", tiny_model("llama", V, seed=1, spread=0.3, num_hidden_layers=9), tokenizer)
    os.symlink(folder / "secret", folder / "aligners" / "way-out")
    return folder


def drafting_of(caplog) -> dict[str, str]:
    """Who drafts, by aligner, as the log says."""
    facts = [record.facts for record in caplog.records if hasattr(record, "facts")]
    return {one["aligner"]: one["who_drafts"] for one in facts}


def test_who_drafts_is_said_for_each_aligner_that_is_loaded(root, tmp_path, caplog):
    """Residuals are told from language models, and a residual's own drafter is named; `draft="aligner"` holds for all."""
    aligner = Aligner.from_pretrained(root / "aligners" / "a0")
    aligner.manifest = Manifest(vocabulary=fingerprint_vocabulary(aligner.tokenizer), objective="likelihood")
    aligner.save_pretrained(tmp_path / "alone")
    aligner.draft = root / "aligners" / "a1"
    aligner.save_pretrained(tmp_path / "with")
    paths = {"plain": root / "aligners" / "a0", "alone": tmp_path / "alone", "with": tmp_path / "with"}
    caplog.set_level("INFO", "trimtab")
    said = {}
    for draft in (None, "aligner", "ngram", "none"):
        caplog.clear()
        base = AlignedModel.from_pretrained(root / "proposal", draft=draft)
        registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"))
        for name, path in paths.items():
            registry.load(name, str(path))
        said[draft] = drafting_of(caplog)
        drafters = {name: registry.resident([name]).models.drafter.name for name in paths}
        assert drafters == {
            None: {"plain": "aligner", "alone": "ngram", "with": "ngram"},
        }.get(draft, dict.fromkeys(paths, draft))
    assert said[None]["plain"] == "the aligner itself"
    assert said[None]["alone"].startswith("the text itself, by its n-grams: the aligner is a residual")
    assert "--draft FOLDER/draft" in said[None]["alone"]
    assert f"--draft {tmp_path / 'with' / 'draft'} " in said[None]["with"]
    assert said["aligner"] == dict.fromkeys(paths, "the aligner itself")
    assert said["ngram"] == dict.fromkeys(paths, "the text itself, by its n-grams")
    assert said["none"] == dict.fromkeys(paths, "nobody: --draft none")


def registry_of(folder: Path, /, **settings) -> Registry:
    base = AlignedModel.from_pretrained(folder / "proposal")
    return Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"), **settings)


def size_of(root: Path) -> int:
    """Bytes of one full aligner."""
    return registry_of(root).load("a", str(root / "aligners" / "a0")).loaded.num_bytes


def texts(model: AlignedModel) -> list[str]:
    return [c.text for c in model.generate(["abc", "the"], SamplingParams(max_tokens=12, seed=3, ignore_eos=True))]


def test_adapters_over_one_base_share_it_and_cost_only_themselves(root):
    registry = registry_of(root)
    entries = [registry.load(f"l{i}", str(root / "aligners" / f"l{i}")) for i in range(6)]
    assert all(isinstance(entry.loaded.model, Adapted) for entry in entries)
    assert len({id(entry.loaded.model.pool) for entry in entries}) == 1
    one, base = entries[0].loaded.num_bytes, entries[0].loaded.model.pool.num_bytes
    assert registry.num_bytes == base + sum(entry.loaded.num_bytes for entry in entries)
    assert one < base / 3
    for i in range(6):
        alone = AlignedModel.from_pretrained(root / "proposal", root / "aligners" / f"l{i}")
        assert texts(registry.resident([f"l{i}"])) == texts(alone)


def test_the_longest_unused_is_evicted_and_comes_back_when_it_is_asked_for(root):
    size = size_of(root)
    registry = registry_of(root, max_bytes=2 * size)
    for name in ("a0", "a1"):
        registry.load(name, str(root / "aligners" / name))
    expected = texts(registry.resident(["a1"]))
    registry.resident(["a0"])
    registry.load("a2", str(root / "aligners" / "a2"))
    assert [entry.name for entry in registry.entries if entry.loaded] == ["a0", "a2"]
    assert registry.resident(["a1"]) is None, "it is known, and away"
    assert registry.num_bytes == 2 * size
    assert texts(registry.fetch(["a1"])) == expected
    assert [entry.name for entry in registry.entries if entry.loaded] == ["a1", "a2"]
    assert texts(registry.fetch(["a0", "a1"])), "several at once, if they fit"


def test_pinned_aligners_stay_and_what_has_no_room_is_refused(root):
    size = size_of(root)
    registry = registry_of(root, max_bytes=2 * size)
    registry.load("a0", str(root / "aligners" / "a0"), pinned=True)
    registry.load("a1", str(root / "aligners" / "a1"), pinned=True)
    with pytest.raises(OutOfMemory, match="'a2' needs"):
        registry.load("a2", str(root / "aligners" / "a2"))
    assert [entry.name for entry in registry.entries] == ["a0", "a1"], "what was refused is not half there"
    assert registry.num_bytes == 2 * size
    registry.unload("a1")
    gc.collect()
    registry.load("a2", str(root / "aligners" / "a2"))
    with pytest.raises(OutOfMemory):
        registry_of(root, max_bytes=size - 1).load("a0", str(root / "aligners" / "a0"))


def test_memory_that_running_requests_hold_is_counted_until_they_end(root):
    registry = registry_of(root)
    registry.load("a0", str(root / "aligners" / "a0"))
    size = registry.num_bytes
    running_request = registry.resident(["a0"])
    gone = weakref.ref(running_request.aligners[0])
    registry.unload("a0")
    assert registry.num_bytes == size
    assert texts(running_request)
    del running_request
    gc.collect()
    assert gone() is None
    assert registry.num_bytes == 0


def test_as_few_as_will_do_are_evicted_and_none_for_what_can_never_fit(root):
    size = size_of(root)
    registry = registry_of(root, max_bytes=3 * size)
    for name in ("a0", "a1", "a2"):
        registry.load(name, str(root / "aligners" / name))
    in_use = [registry.resident([name]) for name in ("a0", "a1", "a2")]
    with pytest.raises(OutOfMemory):
        registry.load("big", str(root / "secret"))
    assert all(entry.loaded for entry in registry.entries), "what can never fit pushes nobody out"
    registry.load("a3", str(root / "aligners" / "a3"))
    assert [entry.name for entry in registry.entries if entry.loaded] == ["a1", "a2", "a3"], "one goes, though all are in use"
    assert all(texts(model) for model in in_use)


def test_errors_name_what_is_wrong_and_change_nothing(root):
    registry = registry_of(root)
    registry.load("a", str(root / "aligners" / "a0"))
    expected = texts(registry.resident(["a"]))
    with pytest.raises(VocabularyMismatch, match="does not share the proposal's vocabulary"):
        registry.load("a", str(root / "aligners" / "odd"))
    assert texts(registry.resident(["a"])) == expected
    for call in (registry.unload, lambda name: registry.resident([name])):
        with pytest.raises(NoSuchAligner, match="there is no aligner 'b'"):
            call("b")


@pytest.mark.parametrize(
    "path", ["../secret", "a0/../../secret", "way-out", "/etc", "nothing", "", ".", "a0\0", "~", "a" * 5000, "a0/config.json"]
)
def test_no_path_leaves_the_root(root, path):
    registry = registry_of(root, root=root / "aligners")
    if path in ("", "."):  # the root itself is inside, and no aligner
        with pytest.raises(Exception, match=r"is missing|holds no"):
            registry.load("x", path, inside=True)
    else:
        with pytest.raises(NoSuchFolder, match="no such folder under"):
            registry.load("x", path, inside=True)
    assert registry.entries == []
    registry.load("x", "a0", inside=True)
    registry.load("y", str(root / "aligners" / "a1"), inside=True)
    with pytest.raises(NoSuchFolder, match="start it with --aligner_root"):
        registry_of(root).load("x", "a0", inside=True)


def test_an_adapters_base_is_inside_too_or_what_the_operator_named(root, tmp_path):
    tokenizer = tiny_tokenizer()
    inside = tmp_path / "inside"
    outside = save_tiny(tmp_path / "outside", tiny_model("qwen3", V, seed=9, spread=0.3), tokenizer)
    save_lora(inside / "lora", outside, target_modules="all-linear")
    tokenizer.save_pretrained(inside / "lora")
    registry = registry_of(root, root=inside)
    with pytest.raises(InvalidRequest, match="base model must lie under"):
        registry.load("x", "lora", inside=True)
    config = json.loads((inside / "lora" / "adapter_config.json").read_text())
    (inside / "hub").mkdir()
    (inside / "hub" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "somebody/model"}))
    with pytest.raises(InvalidRequest, match="base model must lie under"):
        registry.load("x", "hub", inside=True)
    registry.load("named", str(outside))
    assert registry.load("x", "lora", inside=True).loaded


@pytest.fixture(scope="module")
def heads(root, tmp_path_factory) -> Path:
    """A folder with the heads `one` and `two` of `proposal`, which name a base that is not there."""
    folder, tokenizer = tmp_path_factory.mktemp("heads"), tiny_tokenizer()
    head = {"tap": 1, "layers": 2, "proposal": digest_model(load_model(root / "proposal"))}
    manifest = Manifest(vocabulary=fingerprint_vocabulary(tokenizer), rule="geometric", weight=1.0, head=head)
    for seed, name in enumerate(("one", "two")):
        save_lora(folder / name, root / "proposal", seed=seed, target_modules=PROJECTIONS, layers_to_transform=[1])
        tokenizer.save_pretrained(folder / name)
        (folder / name / "trimtab.json").write_text(json.dumps(manifest.to_dict()))
        config = json.loads((folder / name / "adapter_config.json").read_text())
        (folder / name / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/nowhere"}))
    return folder


def test_heads_cost_only_themselves_leave_with_their_pool_and_read_no_base(root, heads):
    registry = registry_of(root, root=heads)
    entries = [registry.load(name, name, inside=True) for name in ("one", "two")]
    pool = weakref.ref(entries[0].loaded.model.pool)
    assert entries[1].loaded.model.pool is pool()
    assert registry.num_bytes == sum(entry.loaded.model.adapter.flat.nbytes for entry in entries)
    said = {name: texts(registry.resident([name])) for name in ("one", "two")}
    assert said["one"] != said["two"]
    with_one = registry_of(root, root=heads, max_bytes=registry.num_bytes - 1)
    for name in ("one", "two"):
        with_one.load(name, name, inside=True)
    assert with_one.resident(["one"]) is None, "evicted"
    assert texts(with_one.fetch(["one"])) == said["one"]
    for name in ("one", "two"):
        registry.unload(name)
    del entries
    gc.collect()
    assert pool() is None
    assert registry.num_bytes == 0


def test_what_cannot_be_decoded_with_replaces_nothing(root, heads):
    base = AlignedModel.from_pretrained(root / "proposal", draft="aligner")
    registry = Registry(base, Loader(base.tokenizer, dtype="auto", device="cpu"), root=heads)
    registry.load("a", str(root / "aligners" / "a0"))
    before = texts(registry.resident(["a"]))
    with pytest.raises(InvalidOption, match="is a head, which reads what the proposal has read, and cannot draft"):
        registry.load("a", "one", inside=True)
    assert texts(registry.resident(["a"])) == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", {"hidden_size": 10_000_000}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"hidden_size": "x"}),
        ("tokenizer_config.json", []),
        ("trimtab.json", {"format_version": 1, "vocabulary": "sha256:x", "weight": 10**400}),
        ("trimtab.json", {"format_version": 1, "vocabulary": "sha256:x", "rule": f"kl_gate(tau=1{'0' * 150})"}),
    ],
)
def test_a_broken_folder_is_the_requests_error_and_changes_nothing(root, tmp_path, file, content):
    shutil.copytree(root / "aligners" / "a1", tmp_path / "broken")
    target = tmp_path / "broken" / file
    if isinstance(content, dict) and target.exists():
        content = json.loads(target.read_text()) | content
    target.write_text(json.dumps(content))
    settings = {"allow_loading": True, "registry_root": tmp_path}
    with running(folder_service(root / "proposal", {"a": root / "aligners" / "a0"}, **settings)) as server:
        body = {"model": "a", "prompt": "abc", "max_tokens": 5, "seed": 1}
        before = server.complete(**body)["choices"]
        answer = server.post("/v1/load_aligner", name="a", path="broken")
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"] == "path"
        assert server.complete(**body)["choices"] == before


@pytest.fixture
def server(root):
    settings = {"allow_loading": True, "registry_root": root / "aligners"}
    with running(folder_service(root / "proposal", {"a0": root / "aligners" / "a0"}, **settings)) as running_server:
        yield running_server


def test_aligners_are_loaded_and_unloaded_over_http(server, root):
    body = {"prompt": "abc", "max_tokens": 12, "seed": 3, "ignore_eos": True}
    assert server.post("/v1/completions", model="l1", **body).status_code == 404
    answer = server.post("/v1/load_aligner", name="l1", path="l1", pin=True)
    assert answer.json() == server.client.get("/v1/models/l1").json()
    alone = AlignedModel.from_pretrained(root / "proposal", root / "aligners" / "l1")
    expected = alone.generate("abc", SamplingParams(max_tokens=12, seed=3, ignore_eos=True))[0].text
    assert server.complete(model="l1", **body)["choices"][0]["text"] == expected
    assert server.metric("trimtab:aligners_known") == 2
    assert server.post("/v1/unload_aligner", name="l1").json()["deleted"] is True
    assert server.post("/v1/completions", model="l1", **body).status_code == 404
    assert server.post("/v1/unload_aligner", name="l1").status_code == 404
    for asked, says in (
        ({"name": "x", "path": "../secret"}, "no such folder under"),
        ({"name": "x", "path": "odd"}, "vocabulary"),
        ({"name": "../x", "path": "a1"}, "name must be"),
        ({"name": "base", "path": "a1"}, "the base's name"),
        ({"name": "x", "path": "a1", "force": True}, "unknown field 'force'"),
        ({"name": "x"}, "path is missing"),
    ):
        answer = server.post("/v1/load_aligner", **asked)
        assert answer.status_code == (404 if "folder" in says else 400)
        assert says in answer.json()["error"]["message"]
        assert str(root) not in answer.text, "clients do not learn where folders are"


def test_series_of_an_aligner_go_with_it(server):
    body = {"prompt": "abc", "max_tokens": 2}
    for turn in range(3):
        assert server.post("/v1/load_aligner", name=f"v{turn}", path="l1").status_code == 200
        server.complete(model=f"v{turn}", **body)
        server.complete(model="base", aligner=[f"v{turn}", "a0"], **body)
        assert f'model_name="v{turn}"' in server.client.get("/metrics").text
        server.post("/v1/unload_aligner", name=f"v{turn}")
        assert f'model_name="v{turn}"' not in server.client.get("/metrics").text
    assert server.metric("trimtab:generation_tokens_total", model_name="several") >= 3


def test_an_aligner_replaced_under_load_gives_each_request_one_version_whole(server, root):
    """Every answer is that of the old weights or of the new ones, and after the swap of the new ones alone."""
    body = {"model": "hot", "max_tokens": 30, "seed": 3, "ignore_eos": True}
    of = {}
    for name in ("a1", "l2"):
        model = AlignedModel.from_pretrained(root / "proposal", root / "aligners" / name)
        of[name] = model.generate("abc", SamplingParams(max_tokens=30, seed=3, ignore_eos=True))[0].text
    assert of["a1"] != of["l2"]
    server.post("/v1/load_aligner", name="hot", path="a1")
    stop, seen = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            seen.append(server.complete(prompt="abc", **body)["choices"][0]["text"])

    with ThreadPoolExecutor(6) as pool:
        askers = [pool.submit(ask) for _ in range(6)]
        for i in range(8):
            assert server.post("/v1/load_aligner", name="hot", path=["l2", "a1"][i % 2]).status_code == 200
            after = server.complete(prompt="abc", **body)["choices"][0]["text"]
            assert after == of[["l2", "a1"][i % 2]]
        stop.set()
        for asker in askers:
            asker.result()
    assert set(seen) == set(of.values())
    assert server.idle()


def test_a_batch_mixes_adapters_full_aligners_and_the_base(server, root):
    names = [f"l{i}" for i in range(6)] + ["a1", "a2"]
    for name in names:
        assert server.post("/v1/load_aligner", name=name, path=name).status_code == 200
    params = {"max_tokens": 25, "ignore_eos": True}
    expected = {}
    for name in (*names, "base"):
        model = AlignedModel.from_pretrained(root / "proposal", None if name == "base" else root / "aligners" / name)
        expected[name] = [model.generate("the fox", SamplingParams(seed=s, **params))[0].text for s in range(2)]
    with ThreadPoolExecutor(18) as pool:
        asked = {
            (name, s): pool.submit(server.complete, model=name, prompt="the fox", seed=s, **params)
            for s in range(2)
            for name in expected
        }
        found = {key: answer.result()["choices"][0]["text"] for key, answer in asked.items()}
    assert found == {(name, s): expected[name][s] for name in expected for s in range(2)}


@pytest.mark.parametrize(("allowed", "expected"), [(None, 500), (100, 450)])
def test_caches_get_half_of_what_aligners_leave(allowed, expected, monkeypatch):
    """What aligners may still take under their limit is not the caches'."""
    model = TableLM.random(7, seed=0)
    registry = Registry(
        AlignedModel(model, tokenizer=tiny_tokenizer("abcdef")), Loader(None, dtype="auto", device="cpu"), max_bytes=allowed
    )
    monkeypatch.setattr("trimtab.hardware.free_memory", lambda device: 1000)
    assert _cache_bytes(model.device, registry) == expected
