"""The list of thetas and the last one: whole or none, whatever was cut off."""

from pathlib import Path

import numpy as np
import pytest

from client.trail import last_seen, note_join, note_theta, studies_of, thetas_of
from common.errors import StorageError

STUDY = "5" * 64


def test_what_was_noted_is_found(tmp_path: Path) -> None:
    assert last_seen(tmp_path, STUDY, 3, "float32") is None
    note_join(tmp_path, STUDY)
    assert not (tmp_path / "thetas").exists()  # nothing was shown: there is nothing to go back from
    for number, digest in ((1, "a"), (2, "b"), (2, "b"), (2, "c"), (4, "d")):
        note_theta(tmp_path, STUDY, number, digest, np.full(3, number, np.float32))
    seen = last_seen(tmp_path, STUDY, 3, "float32")
    assert seen is not None
    assert (seen.round, seen.theta.tolist(), seen.joined) == (4, [4.0] * 3, False)
    note_join(tmp_path, STUDY)
    note_join(tmp_path, STUDY)
    seen = last_seen(tmp_path, STUDY, 3, "float32")
    assert seen is not None
    assert seen.joined
    note_theta(tmp_path, STUDY, 3, "e", np.zeros(3, np.float32))
    seen = last_seen(tmp_path, STUDY, 3, "float32")
    assert seen is not None
    assert (seen.round, seen.joined) == (3, False)
    assert thetas_of(tmp_path, STUDY) == {1: ["a"], 2: ["b", "c"], 4: ["d"], 3: ["e"]}
    assert studies_of(tmp_path) == [STUDY]


def test_a_damaged_last_theta_is_none(tmp_path: Path) -> None:
    note_theta(tmp_path, STUDY, 7, "a", np.arange(5, dtype=np.float32))
    path = tmp_path / "thetas" / f"{STUDY}.last"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert last_seen(tmp_path, STUDY, 5, "float32") is None
        path.write_bytes(whole[:cut] + bytes([whole[cut] ^ 1]) + whole[cut + 1 :])
        assert last_seen(tmp_path, STUDY, 5, "float32") is None
    path.write_bytes(whole)
    assert last_seen(tmp_path, STUDY, 5, "float32") is not None
    assert last_seen(tmp_path, STUDY, 4, "float32") is None


def test_a_list_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "thetas").write_text("in the way")
    with pytest.raises(StorageError, match="list of thetas"):
        note_theta(tmp_path, STUDY, 1, "a", np.zeros(3, np.float32))
