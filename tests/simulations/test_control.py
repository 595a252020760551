"""A run is followed to its end, whatever its end is; and processes of ours end with all that they started."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import RoundError
from server.consortium.superlink import write_connection
from simulations.engines import control
from simulations.engines.control import Control, free_ports, running, until
from tests.processes import alive


def test_every_round_is_reported_once_and_the_end_ends_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def progress(line: dict[str, Any]) -> None:
        seen.append(line["round"])
        if line["round"] == 1:  # it goes on, and a line is being written
            (tmp_path / "history.jsonl").write_text('{"round": 1}\n{"round": 2}\n{"roun')
        else:
            (tmp_path / "status.json").write_text(json.dumps({"state": "finished"}))

    (tmp_path / "history.jsonl").write_text('{"round": 1}\n')
    Control(tmp_path).follow(1, tmp_path, progress, since=0.0)
    assert seen == [1, 2]


def test_a_failure_is_told_unless_it_is_an_earlier_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = tmp_path / "failure.txt"
    failure.write_text("too few sites")
    with pytest.raises(RoundError, match="too few sites"):
        Control(tmp_path).follow(1, tmp_path, print, since=0.0)
    monkeypatch.setattr(control, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(Control, "_state", lambda *_: "finished:failed")
    monkeypatch.setattr(Control, "_log", lambda *_: "Killed")
    os.utime(failure, (1, 1))
    with pytest.raises(RoundError, match=r"without a result \(finished:failed\):\nKilled"):
        Control(tmp_path).follow(1, tmp_path, print, since=2.0)


def test_a_serverapp_that_dies_without_a_word_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["running", "finished:failed"])
    asked: list[int] = []

    def state(_: Control, run_id: int) -> str:
        asked.append(run_id)
        return next(answers)

    monkeypatch.setattr(control, "_ASK_SECONDS", 0.0)
    monkeypatch.setattr(Control, "_state", state)
    monkeypatch.setattr(Control, "_log", lambda *_: "")
    (tmp_path / "status.json").write_text(json.dumps({"state": "training"}))
    with pytest.raises(RoundError, match="without a result"):
        Control(tmp_path).follow(7, tmp_path, print, since=0.0)
    assert asked == [7, 7]


def test_a_process_ends_with_what_it_started(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(log, os.environ, "sh", "-c", "sleep 60 & echo $!; wait") as process:
        until(log.read_text, 60.0, str)
    assert process.poll() is not None
    until(lambda: not alive(int(log.read_text())), 60.0, str)


def test_what_does_not_happen_is_said_with_the_reason() -> None:
    began = time.monotonic()
    with pytest.raises(RoundError, match="it is shut"):
        until(lambda: False, 0.1, lambda: "it is shut")
    assert time.monotonic() - began < 5


def test_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20


def test_flower_s_commands_find_the_superlink(tmp_path: Path) -> None:
    import tomllib

    write_connection(tmp_path, "127.0.0.1:1", None)
    assert tomllib.loads((tmp_path / "config.toml").read_text())["superlink"] == {
        "default": "here",
        "here": {"address": "127.0.0.1:1", "insecure": True},
    }
    write_connection(tmp_path, "127.0.0.1:1", Path("/a.pem"))
    here = tomllib.loads((tmp_path / "config.toml").read_text())["superlink"]["here"]
    assert here == {"address": "127.0.0.1:1", "root-certificates": "/a.pem"}
