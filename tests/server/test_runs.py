"""Finding a run and reading its folder while the run writes there."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.canonical import canonical_json, sha256_hex
from common.errors import StudyError
from common.paths import home
from common.study import Study
from server.runs import Tail, find_run, is_gone, lines, natural, printable, read_json, recorded_study
from tests.server.runs import write_run


def test_a_run_is_found_by_id_by_path_and_as_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    with pytest.raises(StudyError, match="no run in"):
        find_run("latest")
    old, new = (write_run(home() / "runs" / name, rounds=1) for name in ("900", "17"))
    os.utime(old / "study.json", (1, 1))
    assert find_run("900") == old
    assert find_run(str(new)) == new
    assert find_run("latest") == new
    (tmp_path / "runs" / "empty").mkdir()
    for nothing in ("18", "empty", str(tmp_path), ""):
        with pytest.raises(StudyError, match="there is no run"):
            find_run(nothing)


def test_a_half_written_line_is_left_for_later_and_a_broken_one_left_out(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    tail = Tail(file)
    assert [*tail] == []  # not there yet
    file.write_bytes(b'{"round": 1}\nnull\n{"rou\n\xff\n{"round": 2}\n{"round')
    assert [*tail] == [{"round": 1}, {"round": 2}]
    assert [*tail] == []
    with file.open("ab") as more:
        more.write(b'": 3}\n')
    assert [*tail] == [{"round": 3}]
    assert [line["round"] for line in lines(file)] == [1, 2, 3]


def test_a_file_that_was_cut_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(b'{"round": 1}\n{"round": 2}\n')
    tail = Tail(file)
    assert len([*tail]) == 2
    file.write_bytes(b'{"round": 1}\n')
    assert [*tail] == [{"round": 1}]


@settings(max_examples=30)
@given(st.lists(st.dictionaries(st.text(), st.integers())), st.data())
def test_reading_in_any_pieces_gives_every_line_once(values: list[dict[str, int]], data: st.DataObject) -> None:
    whole = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    cut = data.draw(st.integers(0, len(whole)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "x.jsonl")
        file.write_bytes(whole[:cut])
        tail = Tail(file)
        first = [*tail]
        file.write_bytes(whole)
        assert [*first, *tail] == values


def test_a_process_that_is_gone_is_known_on_its_own_host_alone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    status = {"pid": process.pid, "host": socket.gethostname(), "at": time.time() + 1}
    try:
        assert not is_gone(status)
        # The process of that number started long after the status was written: it is another one.
        assert is_gone({**status, "at": time.time() - 1000}) == sys.platform.startswith("linux")
    finally:
        process.kill()
        process.wait()
    assert is_gone(status)
    assert not is_gone({**status, "host": "elsewhere"})
    assert not is_gone({})


def test_a_study_that_was_changed_or_is_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "1", rounds=3)
    assert recorded_study(folder).study.rounds == 3
    record = read_json(folder / "study.json")
    record["study"]["study.rounds"] = 4
    (folder / "study.json").write_text(json.dumps(record))
    with pytest.raises(StudyError, match="does not match its own digest"):
        recorded_study(folder)
    record["study"]["study.colour"] = "red"
    record["digest"] = sha256_hex(canonical_json(record["study"]))
    (folder / "study.json").write_text(json.dumps(record))
    with pytest.raises(StudyError, match="another version of wardround"):
        recorded_study(folder)
    (folder / "study.json").write_text("{")
    with pytest.raises(StudyError, match="damaged"):
        recorded_study(folder)
    assert Study().digest  # and a good one has one


@given(st.text(), st.text())
def test_any_two_names_have_an_order(one: str, other: str) -> None:
    assert sorted([one, other], key=natural) == sorted([other, one], key=natural) or natural(one) == natural(other)


def test_numbers_in_names_count() -> None:
    assert sorted(["h10", "h9", "h", "h²"], key=natural) == ["h", "h9", "h10", "h²"]


def test_what_steers_a_terminal_or_hides_is_made_visible() -> None:
    assert printable("a\x1b[2J\u202eb\nc ü") == "a\ufffd[2J\ufffdb\ufffdc ü"
