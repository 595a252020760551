"""Processes that are kept running, and that nobody outlives: with real ones, small and quick."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ServiceError
from deploy import supervise as supervising
from deploy.addresses import must_be_free
from deploy.supervise import House, Part, printer, supervise
from simulations.engines.control import until
from tests import processes
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
SECONDS = 60.0

Events = list[tuple[str, str, str]]


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_PAUSES", (0.02, 0.04))


def shell(name: str, script: str, **more: str) -> Part:
    return Part(name, ["sh", "-c", script], os.environ, **more)


def alive(file: Path) -> bool:
    """Say whether the process whose number is in a file still runs."""
    return processes.alive(int(file.read_text()))


def seen(path: Path, lines: int = 1) -> bool:
    return path.exists() and path.read_text().count("\n") >= lines


async def once(path: Path, lines: int = 1) -> None:
    async with asyncio.timeout(SECONDS):
        while not seen(path, lines):
            await asyncio.sleep(0.01)


def kept(parts: list[Part], path: Path, lines: int = 1) -> Events:
    """Keep parts until a file has some lines, and return what happened."""
    events: Events = []
    supervise(parts, lambda *event: events.append(event), lambda _: once(path, lines))
    return events


def words(events: Events, part: str) -> list[str]:
    return [event for name, event, _ in events if name == part]


def test_a_part_that_ends_is_started_again(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    script = f"echo >> {runs}; [ $(wc -l < {runs}) = 3 ] && exec sleep 100; exit 3"
    events = kept([shell("one", script)], runs, 3)
    assert words(events, "one") == ["started", "ended", "started", "ended", "started", "stopped"]
    assert [text for _, event, text in events if event == "ended"] == [
        "exit code 3; it is started again in 0.02 s",
        "exit code 3; it is started again in 0.04 s",
    ]


def test_one_that_keeps_ending_ends_all_with_its_last_lines(tmp_path: Path) -> None:
    events: Events = []
    other = shell("other", f"echo $$ > {tmp_path}/other; exec sleep 100")
    one = shell("one", f"until [ -s {tmp_path}/other ]; do :; done; echo it cannot be; kill -9 $$")
    with pytest.raises(ServiceError, match=r"one ends whenever it is started \(signal 9\).*\nit cannot be$"):
        supervise([other, one], lambda *event: events.append(event))
    assert words(events, "one") == ["started", "ended"] * 2 + ["started", "failed"]
    assert words(events, "other") == ["started", "stopped"]
    assert not alive(tmp_path / "other")
    with pytest.raises(ServiceError, match="no-such-program cannot be started: No such file"):
        supervise([Part("one", ["no-such-program"], os.environ)], lambda *_: None)


def test_one_that_lasted_begins_anew_with_the_shortest_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_LASTING_SECONDS", 0.0)
    runs = tmp_path / "runs"
    events = kept([shell("one", f"echo >> {runs}; exit 1")], runs, 5)
    assert {text for _, event, text in events if event == "ended"} == {"exit code 1; it is started again in 0.02 s"}


def test_a_part_waits_for_the_one_that_it_needs(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    script = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(100)"
    first = Part("first", [sys.executable, "-I", "-S", "-c", script], os.environ, listens=f"127.0.0.1:{port}")
    events = kept([first, shell("second", f"echo >> {tmp_path}/up; exec sleep 100", after="first")], tmp_path / "up")
    assert [event[:2] for event in events][:3] == [("first", "started"), ("first", "ready"), ("second", "started")]


def test_what_does_not_end_when_it_is_told_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervising, "_STOP_SECONDS", 0.1)
    script = f"trap '' TERM; echo $$ > {tmp_path}/one; while :; do sleep 0.1; done"
    events = kept([shell("one", script)], tmp_path / "one")
    assert words(events, "one") == ["started", "killed"]
    assert not alive(tmp_path / "one")


def test_what_a_part_leaves_behind_is_told_to_end(tmp_path: Path) -> None:
    left = f"trap 'echo told > {tmp_path}/told; exit' TERM; echo $$ > {tmp_path}/left; while :; do sleep 0.05; done"
    (tmp_path / "left.sh").write_text(left)
    script = (
        f"setsid sh {tmp_path}/left.sh & until [ -s {tmp_path}/left ]; do :; done; echo $$ > {tmp_path}/one; exit 1"
    )
    kept([shell("one", script)], tmp_path / "told")
    assert not alive(tmp_path / "left")


def test_one_whose_leash_was_killed_is_not_left_alone(tmp_path: Path) -> None:
    events: Events = []
    script = f"[ -e {tmp_path}/one ] && exec sleep 100; echo $$ > {tmp_path}/one; exec sleep 100"

    async def kill(house: House) -> None:
        await once(tmp_path / "one")
        house.processes["one"].kill()
        while words(events, "one").count("started") < 2:
            await asyncio.sleep(0.01)
        assert not alive(tmp_path / "one")

    supervise([shell("one", script)], lambda *event: events.append(event), kill)
    assert ("one", "ended", "signal 9; it is started again in 0.02 s") in events


def test_a_part_can_be_hung_up(tmp_path: Path) -> None:
    async def hang_up(house: House) -> None:
        await once(tmp_path / "up")
        house.hang_up("one")
        house.hang_up("another")  # does not run
        await once(tmp_path / "heard")

    script = f"trap 'echo >> {tmp_path}/heard' HUP; echo >> {tmp_path}/up; while :; do sleep 0.05; done"
    supervise([shell("one", script)], lambda *_: None, hang_up)


def test_what_parts_say_is_shown_and_moves_no_cursor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = f"printf 'a\\033[2Jb\\nno end'; echo >&2 c; head -c 40000 /dev/zero | tr '\\0' x; echo >> {tmp_path}/up"
    kept([shell("one", f"{script}; exec sleep 100")], tmp_path / "up")
    shown = capsys.readouterr().err.splitlines()
    assert shown[:2] == ["one | a [2Jb", "one | no endc"]
    assert {line.strip("x") for line in shown[2:]} == {"one | "}


@pytest.fixture
def house(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Two parts, kept by a process of their own; the second one has a child in another session."""
    script = (
        "import os, sys\n"
        "from deploy.supervise import Part, printer, supervise\n"
        "at = sys.argv[1]\n"
        "ends = lambda name: f\"trap 'echo {name} >> {at}/ends; exit' TERM; echo $$ > {at}/{name}\"\n"
        "wait = 'while :; do sleep 0.05; done'\n"
        "second = f'setsid sleep 100 & echo $! > {at}/child; {ends(\"second\")}; {wait}'\n"
        "parts = [Part('first', ['sh', '-c', f'{ends(\"first\")}; {wait}'], os.environ)]\n"
        "supervise([*parts, Part('second', ['sh', '-c', second], os.environ)], printer(True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            until(lambda: all(seen(tmp_path / name) for name in ("first", "second", "child")), SECONDS, str)
            yield process
        finally:
            process.kill()


def gone(folder: Path) -> bool:
    return not any(alive(folder / name) for name in ("first", "second", "child"))


def test_told_to_end_it_ends_the_last_part_first(house: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    house.send_signal(signal.SIGTERM)
    out, _ = house.communicate(timeout=SECONDS)
    assert house.returncode == 0
    assert (tmp_path / "ends").read_text() == "second\nfirst\n"
    assert [(line["part"], line["event"]) for line in map(json.loads, out.splitlines())] == [
        *(("first", "started"), ("second", "started"), ("second", "stopped"), ("first", "stopped"))
    ]
    assert gone(tmp_path)


def test_killed_it_leaves_nobody(house: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
    assert not gone(tmp_path)
    house.kill()
    until(lambda: gone(tmp_path), SECONDS, str)


def test_addresses_that_are_taken_are_known_before(tmp_path: Path) -> None:
    (free,) = free_ports(1)
    must_be_free({"--a": f"127.0.0.1:{free}", "--b": f"{tmp_path}/none"})
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"{tmp_path}/s")
        must_be_free({"--a": f"{tmp_path}/s"})  # left behind by somebody who was killed
        unix.listen()
        for address in (
            f"127.0.0.1:{server.getsockname()[1]}",
            f"{tmp_path}/s",
            f"/{'long' * 50}",
            "nowhere",
            "a:99999",
        ):
            with pytest.raises(ServiceError, match="--a takes another"):
                must_be_free({"--a": address})


def test_events_are_for_people_or_programs(capsys: pytest.CaptureFixture[str]) -> None:
    printer(False)("edge", "ready", "it listens")
    printer(True)("edge", "started", "")
    person, program = capsys.readouterr().out.splitlines()
    assert person.endswith("Z edge ready: it listens")
    assert {**json.loads(program), "time": ""} == {"time": "", "part": "edge", "event": "started", "text": ""}
