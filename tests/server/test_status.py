"""A run's status in every state, for people and for programs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from server.cli import app
from server.runs import find_run
from server.status import Watch, exit_code, page
from tests.server.runs import BEGAN, sites_named, write_lines, write_run

GONE = 2**22 - 3  # above the largest number of a process that Linux gives by default


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["status", *arguments], env={"COLUMNS": "140"})
    return result.exit_code, result.output


def shown(view: dict[str, Any], width: int = 140) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, emoji=False, highlight=False)
    console.print(page(view))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def alive(folder: Path, **changes: Any) -> Path:
    """Make a run's status that of a process that runs."""
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "at": time.time(), "pid": os.getpid(), **changes}))
    return folder


def silent(number: int, site: str) -> str | None:
    return "no-reply" if site == "hospital-1" and number > 2 else None


@pytest.mark.parametrize(
    ("state", "pid", "code", "words"),
    [
        ("finished", GONE, 0, "finished"),
        ("failed", GONE, 1, "failed: too few sites: start more"),
        ("stopped", GONE, 1, "stopped: wardround-study resume 7"),
        ("training", GONE, 1, "interrupted: wardround-study resume 7"),
        ("joining", GONE, 1, "interrupted: wardround-study resume 7"),
        ("training", None, 0, "training   last sign of life"),
        ("evaluating", None, 0, "evaluating   last sign of life"),
    ],
)
def test_every_state_has_its_words_and_exit_code(
    tmp_path: Path, state: str, pid: int | None, code: int, words: str
) -> None:
    folder = write_run(tmp_path / "7", rounds=5, done=5 if state == "finished" else 3, state=state, pid=pid)
    if pid is None:
        alive(folder)
    got, output = run(str(folder))
    assert (got, words in output) == (code, True), output
    got, output = run(str(folder), "--json")
    assert got == code
    assert json.loads(output)["state"] == words.partition(":")[0].split()[0]


def test_no_such_run_is_exit_code_2() -> None:
    code, output = run("no-such-run")
    assert code == 2
    assert "there is no run no-such-run" in output


def test_json_and_watch_exclude_each_other(tmp_path: Path) -> None:
    assert run(str(write_run(tmp_path / "7", rounds=1)), "--json", "--watch")[0] == 2


def test_the_page_says_who_is_in_who_is_out_and_why(tmp_path: Path) -> None:
    folder = alive(write_run(tmp_path / "7", rounds=9, done=4, state="training", faults=silent))
    view = Watch(folder).look()
    text = shown(view)
    assert "4 of 9" in text
    assert "about 20 s left" in text
    (row,) = (line for line in text.splitlines() if line.startswith("hospital-1"))
    assert row.split()[:5] == ["hospital-1", "trains", "out", "2", "2"]
    assert "no reply before the deadline" in row
    assert "held-out" in text
    assert "rejected, round 4: hospital-1, no-reply" in text


def test_whom_it_waits_for_and_how_long(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=9, done=4, state="training")
    alive(folder, waiting_for=["hospital-10", "hospital-2"])
    ended = json.loads((folder / "history.jsonl").read_text().splitlines()[-1])["at"]
    watch = Watch(folder)
    view = watch.look(now=ended + 80)
    assert (view["waiting_for"], view["waiting_seconds"]) == (["hospital-2", "hospital-10"], 80)
    assert "1 min 20 s for hospital-2, hospital-10, at most 10 min" in shown(view)
    # A second attempt asks anew.
    write_lines(folder / "events.jsonl", [{"at": ended + 50, "event": "failed-attempt", "round": 5}], "ab")
    assert watch.look(now=ended + 80)["waiting_seconds"] == 30


def test_an_ended_run_waits_for_nobody(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=9, done=4, state="training", pid=GONE)
    view = Watch(folder).look(now=BEGAN + 1e6)
    assert (view["waiting_for"], view["waiting_seconds"], view["seconds_left"]) == ([], None, None)


def test_sums_means_and_trends_are_those_of_the_rounds(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "7", rounds=60, faults=silent)
    view = Watch(folder).look()
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert view["bytes_up"] == sum(line["bytes_up"] for line in history)
    assert view["bytes_down"] == sum(line["bytes_down"] for line in history)
    losses = [site["loss"] for site in history[-1]["sites"].values()]
    assert view["loss"] == pytest.approx(sum(losses) / len(losses))
    assert len(view["trend"]["loss"]) == 40
    assert view["trend"]["loss"][-1] == view["loss"]


def test_withheld_figures_are_none(tmp_path: Path) -> None:
    view = Watch(write_run(tmp_path / "7", rounds=3, privacy__figures="withheld")).look()
    assert (view["loss"], view["accuracy"]) == (None, None)
    assert "no site sent any" in shown(view)


def test_a_second_look_reads_what_is_new_and_a_half_line_is_no_line(tmp_path: Path) -> None:
    folder = alive(write_run(tmp_path / "7", rounds=9, done=3, state="training"))
    watch = Watch(folder)
    assert watch.look()["round"] == 3
    line = (folder / "history.jsonl").read_text().splitlines()[-1].replace('"round":3', '"round":4')
    with (folder / "history.jsonl").open("a") as history:
        history.write(line[:40])
    assert watch.look()["round"] == 3
    with (folder / "history.jsonl").open("a") as history:
        history.write(line[40:] + "\n")
    assert watch.look()["round"] == 4


def test_rounds_that_a_resumed_run_does_again_count_once(tmp_path: Path) -> None:
    folder = alive(write_run(tmp_path / "7", rounds=9, done=5, state="training"))
    once = Watch(folder).look()["bytes_up"]
    history = (folder / "history.jsonl").read_text().splitlines(keepends=True)
    (folder / "history.jsonl").write_text("".join([*history, history[2]]))  # back to round 3
    view = Watch(folder).look()
    assert view["round"] == 3
    assert view["bytes_up"] == once * 3 / 5


def test_a_run_that_ends_between_two_reads_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "7", rounds=5, done=5, state="reporting", pid=GONE)

    def ends(status: dict[str, Any]) -> bool:
        alive(folder, state="finished", pid=GONE)
        return True

    monkeypatch.setattr("server.status.is_gone", ends)
    assert Watch(folder).look()["state"] == "finished"


def test_a_folder_without_status_is_read_by_what_is_there(tmp_path: Path) -> None:
    for state, wanted in (("finished", "finished"), ("failed", "failed"), ("training", "joining")):
        folder = write_run(tmp_path / state, rounds=3, state=state)
        (folder / "status.json").unlink()
        view = Watch(folder).look()
        assert view["state"] == wanted
        assert "3 of 3" in shown(view)


def test_names_and_reasons_are_text(tmp_path: Path) -> None:
    hostile = "[red]x[/]\x1b[2Jy"
    folder = alive(
        write_run(tmp_path / "7", rounds=9, done=4, state="training", sites=[hostile, *sites_named(4)]),
        waiting_for=[hostile],
    )
    text = shown(Watch(folder).look())
    assert "\x1b" not in text
    assert text.count("[red]x[/]\ufffd[2Jy") >= 2


def test_of_very_many_sites_those_that_need_a_look_are_shown(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "7", rounds=3, sites=sites_named(200), faults=lambda n, s: "norm" if s == "hospital-150" else None
    )
    text = shown(Watch(folder).look(), width=100)
    assert "hospital-150" in text
    assert "and 176 more; of all: 198 in, 1 out, 1 resting" in text or "and 176 more; of all: 199 in" in text
    assert len(text.splitlines()) < 50


def test_exit_codes() -> None:
    codes = {state: exit_code({"state": state}) for state in ("joining", "training", "reporting", "finished")}
    assert {*codes.values()} == {0}
    assert exit_code({"state": "interrupted"}) == exit_code({"state": "failed"}) == exit_code({"state": "stopped"}) == 1


def command(folder: Path, *more: str) -> "subprocess.Popen[str]":
    # Where the tests run in the background, a shell may have told them to ignore Ctrl-C, and they hand that on.
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from server.cli import app\n"
        "import server.watching\n"
        "class Time:\n"
        "    def sleep(seconds): os.write(1, b'looked\\n'); time.sleep(seconds)\n"
        "server.watching.time = Time\n"
        "app()"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program, "status", str(folder), *more], text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def looks(process: "subprocess.Popen[str]", times: int) -> None:
    """Wait until it has looked so often."""
    assert process.stdout
    for _ in range(times):
        while not (line := process.stdout.readline()).endswith("looked\n"):
            assert line, process.communicate()


@pytest.mark.slow
def test_watch_ends_with_the_run(tmp_path: Path) -> None:
    folder = alive(write_run(tmp_path / "7", rounds=3, done=3, state="reporting"))
    with command(folder, "--watch") as process:
        try:
            looks(process, 3)
            assert process.poll() is None
            alive(folder, state="finished")
            output, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (0, "")
    assert "finished" in output


@pytest.mark.slow
def test_ctrl_c_ends_watching_cleanly(tmp_path: Path) -> None:
    folder = alive(write_run(tmp_path / "7", rounds=5, done=3, state="training"))
    with command(folder, "--watch") as process:
        try:
            looks(process, 2)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, errors) == (130, "stopped\n")


def test_the_newest_run_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path))
    write_run(tmp_path / "runs" / "7", rounds=2)
    assert find_run("latest").name == "7"
    code, output = run("latest")
    assert code == 0
    assert "run 7" in output
