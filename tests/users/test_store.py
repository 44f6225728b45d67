"""What is kept of users: numbers, limits, ages, deletion, and what comes of a file that somebody has changed."""

import datetime
import json

import pytest
import torch

from trimtab.errors import DataError, InvalidOption, InvalidRequest
from trimtab.users.store import NoSuchUser, UserStore

NOON = datetime.datetime(2026, 11, 30, 12, tzinfo=datetime.UTC)


def open_store(folder, **limits):
    return UserStore(folder, **({"max_users": 3, "max_pairs": 4} | limits))


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


def test_pairs_are_kept_in_order_and_the_oldest_go(store, tmp_path):
    for i in range(6):
        found = store.add("ada", "bank", [float(i), -1.0])
    assert found.tolist() == [[float(i), -1.0] for i in range(2, 6)]
    assert torch.equal(store.features("ada", "bank", 2), found)
    store.close()
    again = open_store(tmp_path)
    assert torch.equal(again.features("ada", "bank", 2), found)
    again.close()


def test_no_text_is_kept(store, tmp_path):
    store.add("ada", "bank", [1.0, 2.0])
    [path] = tmp_path.glob("*.json")
    assert "ada" not in path.name
    kept = json.loads(path.read_text())
    assert set(kept) == {"user", "bank", "pairs"}
    assert set(kept["pairs"][0]) == {"nats", "time"}


def test_a_user_can_be_forgotten(store, tmp_path):
    store.add("ada", "bank", [1.0, 2.0])
    store.add("bob", "bank", [3.0, 4.0])
    store.delete("ada")
    with pytest.raises(NoSuchUser, match="nothing is known of a user 'ada'"):
        store.features("ada", "bank", 2)
    with pytest.raises(NoSuchUser):
        store.delete("ada")
    assert store.features("bob", "bank", 2).tolist() == [[3.0, 4.0]]
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_there_is_room_for_so_many_users(store):
    for name in ("ada", "bob", "cyd"):
        store.add(name, "bank", [1.0, 2.0])
    with pytest.raises(InvalidRequest, match="keeps 3 users, and there are as many: delete one"):
        store.add("dan", "bank", [1.0, 2.0])
    store.add("ada", "bank", [1.0, 2.0])
    store.delete("bob")
    store.add("dan", "bank", [1.0, 2.0])
    for name in ("", "x" * 257):
        with pytest.raises(InvalidRequest, match="user must have 1 to 256 characters"):
            store.add(name, "bank", [1.0, 2.0])


def test_pairs_grow_old(tmp_path):
    clock = [NOON]
    store = open_store(tmp_path, days=2, now=lambda: clock[0])
    store.add("ada", "bank", [1.0, 2.0])
    clock[0] += datetime.timedelta(days=1.5)
    store.add("ada", "bank", [3.0, 4.0])
    clock[0] += datetime.timedelta(days=1)
    assert store.features("ada", "bank", 2).tolist() == [[3.0, 4.0]]
    clock[0] += datetime.timedelta(days=1.1)
    with pytest.raises(NoSuchUser):
        store.features("ada", "bank", 2)
    assert store.add("ada", "bank", [5.0, 6.0]).tolist() == [[5.0, 6.0]]
    store.close()


def test_numbers_of_other_aligners_mean_nothing(store, caplog):
    store.add("ada", "bank", [1.0, 2.0])
    with pytest.raises(NoSuchUser), caplog.at_level("WARNING"):
        store.features("ada", "another bank", 2)
    assert "1 pairs of a user are of other aligners" in caplog.text
    assert store.knows("ada")
    assert store.add("ada", "another bank", [3.0, 4.0]).tolist() == [[3.0, 4.0]]
    store.delete("ada")
    assert not store.knows("ada")


def test_what_is_too_old_is_taken_from_the_disk(tmp_path):
    clock = [NOON]
    store = open_store(tmp_path, days=2, now=lambda: clock[0])
    for name in ("ada", "bob", "cyd"):
        store.add(name, "bank", [1.0, 2.0])
    clock[0] += datetime.timedelta(days=1)
    store.add("bob", "bank", [3.0, 4.0])
    clock[0] += datetime.timedelta(days=1.5)
    store.sweep()
    [path] = tmp_path.glob("*.json")
    assert [pair["nats"] for pair in json.loads(path.read_text())["pairs"]] == [[3.0, 4.0]]
    store.add("dan", "bank", [1.0, 2.0])
    clock[0] += datetime.timedelta(days=3)
    store.close()
    again = open_store(tmp_path, days=2, now=lambda: clock[0])
    assert list(tmp_path.glob("*.json")) == []
    again.close()


def test_what_a_kill_left_goes_when_the_folder_is_opened(store, tmp_path):
    store.close()
    (tmp_path / ".abc.json.x1.partial").write_text('{"user": "ada"')
    open_store(tmp_path).close()
    assert list(tmp_path.glob(".*.partial")) == []


def test_fewer_pairs_count_where_fewer_may(store, tmp_path):
    for i in range(4):
        store.add("ada", "bank", [float(i), 0.0])
    store.close()
    fewer = open_store(tmp_path, max_pairs=2)
    assert fewer.features("ada", "bank", 2).tolist() == [[2.0, 0.0], [3.0, 0.0]]
    fewer.close()


def test_a_name_that_is_no_unicode_is_nobodys(store):
    with pytest.raises(InvalidRequest, match="no valid Unicode"):
        store.add("a\ufffd", "bank", [1.0, 2.0])
    assert not store.knows("a\ufffd")
    assert not store.knows("x" * 300)


def test_one_process_has_the_folder(store, tmp_path):
    with pytest.raises(InvalidOption, match="another process is writing"):
        open_store(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: kept["pairs"][0].update(nats=[1.0]),
        lambda kept: kept["pairs"][0].update(nats=[1.0, float("nan")]),
        lambda kept: kept["pairs"][0].update(time="noon"),
        lambda kept: kept["pairs"][0].pop("time"),
        lambda kept: kept.pop("bank"),
        lambda kept: kept.update(user=3),
    ],
)
def test_a_file_that_somebody_has_changed_is_named(store, tmp_path, change):
    store.add("ada", "bank", [1.0, 2.0])
    [path] = tmp_path.glob("*.json")
    kept = json.loads(path.read_text())
    change(kept)
    path.write_text(json.dumps(kept))
    with pytest.raises(DataError, match=r"is not as it was written .* delete it"):
        store.features("ada", "bank", 2)


def test_a_full_disk_changes_nothing(store, monkeypatch):
    store.add("ada", "bank", [1.0, 2.0])

    def full(*args, **how):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.files.json.dump", full)
    with pytest.raises(OSError, match="No space"):
        store.add("ada", "bank", [3.0, 4.0])
    assert store.features("ada", "bank", 2).tolist() == [[1.0, 2.0]]
