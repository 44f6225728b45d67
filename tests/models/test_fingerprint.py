"""Fingerprints of models: every byte of the weights counts, and so does what else decides the numbers; files are read once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tiny import save_lora, save_tiny, tiny_model, tiny_tokenizer
from trimtab import AlignedModel
from trimtab.errors import ModelError
from trimtab.judges.rewards.classifier import RewardModel
from trimtab.models import digests, loading
from trimtab.models.aligner import describe
from trimtab.models.digests import Seen, digest_file
from trimtab.models.fingerprint import fingerprint_model, fingerprint_of
from trimtab.models.huggingface import HuggingFaceLM
from trimtab.models.table import TableLM
from trimtab.train.draft import check_draft_start
from trimtab.train.inputs import open_proposal
from trimtab.train.options import TrainOptions
from trimtab.train.plan import resolve
from trimtab.train.start import load_start

V = 28
WEIGHTS = "model.safetensors"
LARGE = torch.nn.Linear(300, 500)
"""Far more elements than any sample would look at."""


# ---- models in memory


def nudge(place: int) -> Callable[[torch.nn.Module], None]:
    def change(module: Any) -> None:
        with torch.no_grad():
            module.weight.view(-1)[place] += 1e-4

    return change


@pytest.mark.parametrize("place", [0, 1, 149, 7_351, 149_998, 149_999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_element_of_a_large_weight_counts(place, dtype):
    module = torch.nn.Linear(300, 500).to(dtype)
    torch.nn.init.constant_(module.weight, 1e-5)
    before = fingerprint_model(module)
    nudge(place)(module)
    assert fingerprint_model(module) != before


def test_pieces_change_nothing(monkeypatch):
    expected = fingerprint_model(LARGE)
    monkeypatch.setattr("trimtab.models.fingerprint.PIECE", 777)
    assert fingerprint_model(LARGE) == expected


def test_signed_zeros_and_payloads_of_nan_are_told_apart():
    """They are equal, or not even that, and other bytes."""
    module = torch.nn.Linear(2, 2)
    found = set()
    for bits in (0, -(2**31), 0x7FC00000, 0x7FC00001):
        module.weight.data.view(torch.int32)[0, 0] = bits
        found.add(fingerprint_model(module))
    assert len(found) == 4


@pytest.mark.parametrize(
    "strided",
    [
        torch.arange(10.0)[::2],
        torch.zeros(1).expand(5),
        torch.arange(12.0).view(3, 4)[:, :1],
        torch.arange(12.0).view(3, 4).T,
        torch.arange(6.0).view(1, 6)[:, ::3],
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.arange(4.0).to(torch.complex64).conj().imag,
        torch.arange(4.0).to(torch.complex64).conj(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.stride()}",
)
def test_weights_are_told_by_their_values_however_they_lie(strided):
    found = []
    for tensor in (strided, strided.clone(memory_format=torch.contiguous_format)):
        module = torch.nn.Module()
        module.register_buffer("weight", tensor)
        module.register_buffer("tied", strided.resolve_neg())
        found.append(fingerprint_model(module))
    assert found[0] == found[1]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight": lambda model: nudge(5)(model.model.layers[1].mlp.up_proj),
    "a tied weight": lambda model: nudge(5)(model.lm_head),
    "a buffer that is not saved": lambda model: model.model.rotary_emb.inv_freq.mul_(1.01),
    "rope_theta": lambda model: model.config.rope_parameters.update(rope_theta=12345.0),
    "epsilon": lambda model: setattr(model.config, "rms_norm_eps", 1e-3),
    "dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_decides_the_numbers_of_a_model_counts(change):
    model, same = tiny_model("llama", V), tiny_model("llama", V)
    assert fingerprint_model(model) == fingerprint_model(same)
    change(model)
    assert fingerprint_model(model) != fingerprint_model(same)


def test_where_a_model_came_from_does_not_count():
    model = tiny_model("llama", V)
    before = fingerprint_model(model)
    model.config._name_or_path, model.config.use_cache = "/elsewhere", False
    assert fingerprint_model(model) == before


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_model("llama", V), LoraConfig(target_modules=["q_proj"], init_lora_weights=False, **settings))


def test_how_much_an_adapter_counts_for_and_whether_it_is_on_count():
    """Scaling is no weight: it stands in the configuration and in the layers."""
    plain, scaled, off, on = adapted(), adapted(lora_alpha=32), adapted(), adapted()
    off.base_model.disable_adapter_layers()
    for module in on.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(0.5)
    found = [HuggingFaceLM(model).fingerprint for model in (plain, scaled, off, on)]
    assert len(set(found)) == 4
    assert found[0] == HuggingFaceLM(adapted()).fingerprint


def test_a_lent_model_is_looked_at_when_it_is_asked_for():
    model = tiny_model("llama", V)
    lm = HuggingFaceLM(model)
    before = lm.fingerprint
    nudge(5)(model.model.layers[0].mlp.up_proj)
    assert lm.fingerprint == fingerprint_model(model) != before


def test_a_model_that_is_owned_is_told_by_what_it_was():
    lm = HuggingFaceLM(tiny_model("llama", V), owned=True)
    assert lm.fingerprint == fingerprint_model(tiny_model("llama", V))


def test_offloaded_weights_are_refused_by_name():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="bias is offloaded"):
        fingerprint_model(model)


def test_tables_are_told_by_their_entries_and_what_says_nothing_by_itself():
    table = torch.zeros(4, 3)
    other = table.clone()
    other[2, 1] = 1.0
    assert fingerprint_of(TableLM(table)) == fingerprint_of(TableLM(table.clone())) != fingerprint_of(TableLM(other))

    class Silent:
        def __repr__(self) -> str:
            return "Silent()"

    one, two = Silent(), Silent()
    assert fingerprint_of(one) == fingerprint_of(one) != fingerprint_of(two)


# ---- models from files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", tiny_model("llama", V), tiny_tokenizer())


def of_folder(folder: Path, **settings: Any) -> str:
    return fingerprint_of(AlignedModel.from_pretrained(folder, **settings).proposal)


def edit(folder: Path, place: int = -1, name: str = WEIGHTS) -> None:
    """Change one byte of the weights in place; size and name stay."""
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 1
    (folder / name).write_bytes(data)


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_folder_is_told_by_every_byte_its_configuration_and_the_dtype(folder, tmp_path):
    found = [of_folder(folder)]
    assert of_folder(Path(shutil.copytree(folder, tmp_path / "copy"))) == found[0], "wherever it lies"
    found.append(of_folder(folder, dtype="bfloat16"))
    for place in (-1, -10_001, -30_002):
        edit(folder, place)
        found.append(of_folder(folder))
    set_config(folder, rms_norm_eps=1e-3)
    found.append(of_folder(folder))
    assert len(set(found)) == len(found)


def test_a_model_in_several_files_is_told_by_each(folder, tmp_path):
    tiny_model("llama", V).save_pretrained(tmp_path / "parts", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path / "parts")
    found = {of_folder(tmp_path / "parts")}
    files = sorted(item.name for item in (tmp_path / "parts").glob("*.safetensors"))
    for name in files:
        edit(tmp_path / "parts", name=name)
        found.add(of_folder(tmp_path / "parts"))
    assert len(found) == len(files) + 1


def test_an_adapter_is_told_by_its_own_weights_its_base_and_its_scaling(folder, tmp_path):
    """In a pool, and as a model of its own."""
    for settings in ({}, {"use_dora": True}):
        adapter = save_lora(tmp_path / f"adapter{len(settings)}", folder, target_modules=["q_proj"], **settings)
        tiny_tokenizer().save_pretrained(adapter)

        def told(adapter: Path = adapter) -> str:
            return AlignedModel.from_pretrained(tiny_model("llama", V), adapter, tokenizer=tiny_tokenizer()).fingerprints[1]

        found = [told()]
        tensors = load_file(adapter / "adapter_model.safetensors")
        next(iter(tensors.values())).view(-1)[-1] += 1e-4
        save_file(tensors, adapter / "adapter_model.safetensors")
        found.append(told())
        edit(folder)
        found.append(told())
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 3}))
        found.append(told())
        assert len(set(found)) == 4


def test_a_reward_model_is_told_by_every_byte(tmp_path):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=V, num_labels=1, pad_token_id=0, **sizes))
    folder = save_tiny(tmp_path, model, tiny_tokenizer())
    before = RewardModel.from_pretrained(folder).fingerprint
    assert RewardModel.from_pretrained(folder).fingerprint == before
    edit(folder)
    assert RewardModel.from_pretrained(folder).fingerprint != before
    assert RewardModel(model, tiny_tokenizer()).fingerprint == fingerprint_model(model)


@pytest.mark.parametrize("parts", [False, True])
def test_only_the_files_that_are_read_count_and_each_in_its_place(parts, folder, tmp_path):
    """Beside them lie the same weights in another format, or other ones: exchange the names, and other weights load."""
    if parts:
        (folder / WEIGHTS).unlink()
        tiny_model("llama", V).save_pretrained(folder, max_shard_size="10KB")
    name = min(item.name for item in folder.glob("*.safetensors"))
    first = of_folder(folder)
    other = folder / "consolidated.safetensors"
    tensors = {key: value + 1 for key, value in load_file(folder / name).items()}
    save_file(tensors, other, metadata={"format": "pt"})
    assert of_folder(folder) == first, "of another file"
    (folder / name).rename(tmp_path / "aside")
    other.rename(folder / name)
    (tmp_path / "aside").rename(other)
    assert of_folder(folder) != first


def test_the_file_that_a_configuration_names_is_the_one_that_counts(folder):
    (folder / WEIGHTS).rename(folder / "other.safetensors")
    set_config(folder, transformers_weights="other.safetensors")
    shutil.copy(folder / "other.safetensors", folder / WEIGHTS)
    first = of_folder(folder)
    edit(folder)
    assert of_folder(folder) == first
    edit(folder, name="other.safetensors")
    assert of_folder(folder) != first


def test_other_files_beside_an_adapter_do_not_count(folder, tmp_path):
    adapter = save_lora(tmp_path / "adapter", folder, target_modules=["q_proj"], use_dora=True)
    tiny_tokenizer().save_pretrained(adapter)
    found = []
    for _ in range(2):
        found.append(AlignedModel.from_pretrained(folder, adapter).fingerprints[1])
        shutil.copy(folder / WEIGHTS, adapter / "other.safetensors")
    assert found[0] == found[1]


def exchange_while_loading(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Once the weights are read, another file takes their place."""
    real = loading.check_finite

    def check(model: Any, source: Any) -> None:
        real(model, source)
        shutil.copy(file, file.parent / "new")
        edit(file.parent, name="new")
        (file.parent / "new").replace(file)

    for place in ("models.loading", "models.adapter_folder", "judges.rewards.classifier"):
        monkeypatch.setattr(f"trimtab.{place}.check_finite", check)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "proposal": AlignedModel.from_pretrained,
    "aligner": lambda folder: AlignedModel.from_pretrained(tiny_model("llama", V), folder, tokenizer=tiny_tokenizer()),
    "proposal of a training": lambda folder: open_proposal(
        resolve(TrainOptions(proposal=str(folder), aligner="a", dataset="d", output_dir="o")), tiny_tokenizer()
    ),
    "start of a training": lambda folder: load_start(
        resolve(TrainOptions(proposal="p", aligner=str(folder), dataset="d", output_dir="o")), describe(folder)
    ),
    "drafter of a training": lambda folder: check_draft_start(folder, V, 8),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_files_that_changed_while_a_model_was_loaded_are_not_taken_for_it(load, folder, monkeypatch):
    exchange_while_loading(monkeypatch, folder / WEIGHTS)
    with pytest.raises(ModelError, match=f"the weights in '{folder}' have changed while they were loaded"):
        load(folder)


@pytest.mark.parametrize(  # a pool tells its adapters by their weights in memory
    ("settings", "of_base"),
    [({}, True), ({"use_dora": True}, True), ({"use_dora": True}, False)],
    ids=["base of a pool", "base", "adapter"],
)
def test_so_are_an_adapters_and_its_bases(settings, of_base, folder, tmp_path, monkeypatch):
    adapter = save_lora(tmp_path / "adapter", folder, target_modules=["q_proj"], **settings)
    tiny_tokenizer().save_pretrained(adapter)
    exchange_while_loading(monkeypatch, folder / WEIGHTS if of_base else adapter / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="have changed while they were loaded"):
        LOADERS["aligner"](adapter)


def test_so_are_a_reward_models(folder, monkeypatch):
    from transformers import LlamaForSequenceClassification

    config = tiny_model("llama", V).config
    config.num_labels, config.pad_token_id = 1, 0
    save_tiny(folder, LlamaForSequenceClassification(config), tiny_tokenizer())
    exchange_while_loading(monkeypatch, folder / WEIGHTS)
    with pytest.raises(ModelError, match="have changed while they were loaded"):
        RewardModel.from_pretrained(folder)


def test_files_that_changed_under_a_loaded_model_are_not_taken_for_it(folder):
    model = AlignedModel.from_pretrained(folder)
    edit(folder)
    with pytest.raises(ModelError, match=rf"{WEIGHTS} has changed since it was loaded"):
        _ = model.fingerprints


# ---- read once


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Where digests are kept; every file is large enough, and has been left alone for long enough."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "WORTH_KEEPING", 0)
    monkeypatch.setattr(digests, "SETTLED", -(10**18))
    return tmp_path / "cache" / "trimtab" / "digests"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The files whose bytes were read."""
    found: list[str] = []
    real = digests.hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        found.append(Path(stream.name).name)
        return real(stream, name)

    monkeypatch.setattr(digests.hashlib, "file_digest", counted)
    return found


def test_a_file_is_read_once_and_again_when_it_changed(folder, kept, reads):
    first = of_folder(folder)
    assert of_folder(folder, dtype="float32") == first
    assert reads == [WEIGHTS]
    os.utime(folder / WEIGHTS)
    assert of_folder(folder) == first, "other times, and the same bytes"
    edit(folder)
    assert of_folder(folder) != first
    assert reads == [WEIGHTS] * 3


def test_an_edit_that_sets_the_time_back_is_seen(folder, kept):
    before, first = os.stat(folder / WEIGHTS), of_folder(folder)
    edit(folder)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = os.stat(folder / WEIGHTS)
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert of_folder(folder) != first


def test_what_was_written_a_moment_ago_is_not_remembered(folder, kept, reads, monkeypatch):
    """Another write within the same tick of the clock would leave the same times."""
    monkeypatch.setattr(digests, "SETTLED", 10**18)
    of_folder(folder)
    assert not kept.exists()
    of_folder(folder)
    assert reads == [WEIGHTS] * 2


@pytest.mark.parametrize("spoil", [b"", b"{", b"[]", b"null", b'{"sha256": 1}', b"\xff"])
def test_a_spoilt_memory_is_written_anew(spoil, folder, kept, reads):
    first = of_folder(folder)
    (entry,) = kept.iterdir()
    entry.write_bytes(spoil)
    assert of_folder(folder) == first
    assert of_folder(folder) == first
    assert reads == [WEIGHTS] * 2


def test_the_memory_of_another_file_is_not_believed(folder, kept, tmp_path):
    """As where a hash collides, or a folder of caches was copied."""
    one = Seen.at(folder / WEIGHTS)
    digest_file(one)
    (entry,) = kept.iterdir()
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    edit(other)
    expected = digests.hashlib.sha256((other / WEIGHTS).read_bytes()).hexdigest()
    shutil.copy(entry, digests._place(Seen.at(other / WEIGHTS)))
    assert digest_file(Seen.at(other / WEIGHTS)) == expected


def test_without_a_place_to_keep_it_a_file_is_read_each_time(folder, kept, reads):
    kept.parent.parent.mkdir()
    kept.parent.write_text("a file where the folder would be")
    assert of_folder(folder) == of_folder(folder)
    assert reads == [WEIGHTS] * 2


def test_a_user_without_a_home_reads_it_each_time_too(folder, kept, reads, monkeypatch):
    """As in a container that runs as a number."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 987_654_321)
    assert of_folder(folder) == of_folder(folder)
    assert reads == [WEIGHTS] * 2


def test_small_files_leave_nothing_behind(folder, kept, monkeypatch):
    monkeypatch.setattr(digests, "WORTH_KEEPING", 2**24)
    of_folder(folder)
    assert not kept.exists()
