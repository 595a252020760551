"""Checkpoints: what was stored comes back, what is damaged is found, and no crash costs the ones before."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import StorageError
from server.checkpoint import KEPT, Checkpoint, latest, store

TENSORS = {"theta": torch.arange(6.0).view(2, 3).T, "half": torch.ones((), dtype=torch.float64), "none": torch.zeros(0)}
ABOUT = {"score": 0.1 + 0.2, "roster": {"Sankt Jürgen": {"failures": 3}}}


def filled(folder: Path, rounds: int = 3) -> Path:
    for number in range(rounds):
        store(folder, Checkpoint(number, {**TENSORS, "round": torch.tensor(number)}, {**ABOUT, "round": number}))
    return folder


def test_what_was_stored_comes_back_to_the_bit(tmp_path: Path) -> None:
    found = latest(filled(tmp_path / "new" / "folder"), pytest.fail)
    assert found is not None
    assert (found.round, found.about) == (2, {**ABOUT, "round": 2})
    assert set(found.tensors) == {*TENSORS, "round"}
    for name, tensor in TENSORS.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_the_last_few_are_kept(tmp_path: Path) -> None:
    filled(tmp_path, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{n:06d}" for n in range(7 - KEPT, 7)]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path, pytest.fail) is None
    assert latest(tmp_path / "missing", pytest.fail) is None


@settings(max_examples=60)
@given(file=st.sampled_from(["arrays.safetensors", "state.json"]), data=st.data())
def test_any_damage_is_found_said_and_the_one_before_is_used(
    tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    folder = filled(tmp_path_factory.mktemp("damage"))
    path = folder / "000002" / file
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    else:
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    said: list[str] = []
    found = latest(folder, said.append)
    assert found is not None
    assert found.round == 1
    assert len(said) == 1
    assert "round 2 is damaged" in said[0]
    assert (folder / "damaged-000002").exists()
    again = latest(folder, pytest.fail)  # moved aside: said once
    assert again is not None
    assert again.round == 1


def test_a_missing_file_is_damage(tmp_path: Path) -> None:
    (filled(tmp_path) / "000002" / "state.json").unlink()
    said: list[str] = []
    found = latest(tmp_path, said.append)
    assert found is not None
    assert (found.round, len(said)) == (1, 1)


def test_a_checkpoint_under_another_rounds_name_is_damage(tmp_path: Path) -> None:
    filled(tmp_path)
    os.rename(tmp_path / "000002", tmp_path / "000009")
    said: list[str] = []
    found = latest(tmp_path, said.append)
    assert found is not None
    assert found.round == 1


def test_when_all_are_damaged_the_run_must_start_anew(tmp_path: Path) -> None:
    for path in filled(tmp_path).glob("*/state.json"):
        path.write_text("{}")
    with pytest.raises(StorageError, match=r"every checkpoint in .* is damaged"):
        latest(tmp_path, lambda _: None)


def test_a_later_version_is_not_taken_for_damage(tmp_path: Path) -> None:
    from common.canonical import canonical_json, sha256_hex

    path = filled(tmp_path) / "000002" / "state.json"
    about = json.loads(path.read_bytes())
    del about["sha256"]
    about["format"] = 99
    path.write_bytes(canonical_json({**about, "sha256": sha256_hex(canonical_json(about))}))
    with pytest.raises(StorageError, match="another version of wardround"):
        latest(tmp_path, pytest.fail)
    assert path.exists()


@pytest.mark.parametrize(
    ("function", "call"),
    [("write_durably", 1), ("write_durably", 2), ("rename", 1), *(("fsync", n) for n in (1, 2, 3, 4))],
)
def test_a_write_that_fails_says_what_to_do_and_leaves_the_last_one(
    tmp_path: Path, function: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from server import checkpoint

    filled(tmp_path)
    owner = checkpoint if function == "write_durably" else os
    original, calls = getattr(owner, function), [0]

    def full(*arguments: object) -> object:
        calls[0] += 1
        if calls[0] == call:
            raise OSError(28, "No space left on device")
        return original(*arguments)

    monkeypatch.setattr(owner, function, full)
    with pytest.raises(StorageError) as error:
        store(tmp_path, Checkpoint(3, TENSORS, ABOUT))
    for part in ("round 3 cannot be written", "No space left on device", "is intact: make room there"):
        assert part in str(error.value)
    monkeypatch.undo()
    assert not list(tmp_path.glob(".part-*"))
    found = latest(tmp_path, pytest.fail)
    assert found is not None
    assert found.round in {2, 3}


def test_what_a_crash_left_behind_is_no_checkpoint(tmp_path: Path) -> None:
    filled(tmp_path)
    shutil.copytree(tmp_path / "000002", tmp_path / ".part-000003")
    found = latest(tmp_path, pytest.fail)
    assert found is not None
    assert found.round == 2
    store(tmp_path, Checkpoint(3, TENSORS, ABOUT))
    assert not (tmp_path / ".part-000003").exists()
