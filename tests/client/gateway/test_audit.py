"""The audit log: nothing can be changed unseen, and nothing is let out that is not in it."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

from client.cli import app
from client.gateway.audit import AuditLog, Entry, Event, Head, check, read_lines
from client.gateway.cli import audit_path
from client.membership import store
from common.errors import AuditError, StorageError
from common.signing import generate_key, private_pem, sign

NOW = datetime(2026, 11, 24, 20, 0, tzinfo=UTC)
KEY = generate_key()
SENT = Event(outcome="sent", kind="train", study="a" * 64, digest="b" * 64, run=2**63, round=3, size=1234, norm=0.5)


def written(path: Path, count: int) -> list[Head]:
    with AuditLog(path, KEY, NOW) as log:
        return [log.append(SENT.model_copy(update={"round": i}), NOW) for i in range(count)]


def checked(lines: list[bytes], *seen: Head) -> list[Entry]:
    return [entry for entry, _ in check(lines, KEY.public_key(), seen)]


def why(lines: list[bytes], *seen: Head) -> str:
    with pytest.raises(AuditError) as error:
        checked(lines, *seen)
    return error.value.why


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    heads = written(tmp_path / "a" / "log", 3)
    heads += written(tmp_path / "a" / "log", 2)  # opened anew
    lines, torn = read_lines(tmp_path / "a" / "log")
    assert not torn
    found = list(check(lines, KEY.public_key(), heads))
    assert [head for _, head in found] == heads
    assert [entry.event.round for entry, _ in found] == [0, 1, 2, 0, 1]
    assert (tmp_path / "a" / "log").stat().st_mode & 0o777 == 0o600


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[bytes], list[Head]]:
    path = tmp_path_factory.mktemp("audit") / "log"
    heads = written(path, 5)
    return read_lines(path)[0], heads


Change = Callable[[list[bytes]], list[bytes]]
CHANGES: dict[str, tuple[Change, str]] = {
    "a line is deleted": (lambda lines: lines[:2] + lines[3:], "chain"),
    "the first is deleted": (lambda lines: lines[1:], "chain"),
    "two are swapped": (lambda lines: [lines[1], lines[0], *lines[2:]], "chain"),
    "one is repeated": (lambda lines: [*lines, lines[-1]], "chain"),
    "a number is changed": (lambda lines: [lines[0].replace(b":1234", b":1235"), *lines[1:]], "signature"),
    "a blank is added": (lambda lines: [lines[0] + b" ", *lines[1:]], "format"),
    "a field is added": (lambda lines: [lines[0].replace(b"{", b'{"a":1,', 1), *lines[1:]], "format"),
    "an empty line is added": (lambda lines: [*lines[:2], b"", *lines[2:]], "format"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found(five: tuple[list[bytes], list[Head]], name: str) -> None:
    change, reason = CHANGES[name]
    lines, _ = five
    assert change(lines) != lines
    assert why(change(lines)) == reason


def test_a_line_of_somebody_else_is_found(tmp_path: Path, five: tuple[list[bytes], list[Head]]) -> None:
    # Signed with another key, chained properly.
    lines, _ = five
    entry = Entry.model_validate_json(lines[-1])
    other = generate_key()
    forged = entry.model_copy(update={"signature": sign(other, "audit", entry.unsigned()).hex()})
    assert why([*lines[:-1], forged.line()]) == "signature"
    with pytest.raises(AuditError):
        list(check(lines, other.public_key()))


def test_a_cut_end_is_found_by_whoever_has_seen_a_later_head(five: tuple[list[bytes], list[Head]]) -> None:
    lines, heads = five
    assert len(checked(lines[:3])) == 3, "without a head nobody can know"
    assert why(lines[:3], heads[4]) == "cut"
    assert why(lines[:4], heads[4]) == "cut"
    assert why([], heads[0]) == "cut"
    assert len(checked(lines, heads[1], heads[4])) == 5


def test_a_log_that_was_written_anew_is_found_by_an_older_head(
    tmp_path: Path, five: tuple[list[bytes], list[Head]]
) -> None:
    _, heads = five
    with AuditLog(tmp_path / "log", KEY, NOW) as log:
        for _ in range(9):
            log.append(SENT.model_copy(update={"size": 1}), NOW)
    lines, _ = read_lines(tmp_path / "log")
    assert why(lines, heads[1]) == "rewritten"
    assert why(lines, heads[1], Head(heads[1].seq, "0" * 64)) == "rewritten"


@given(st.data())
def test_any_change_of_a_byte_is_found(five: tuple[list[bytes], list[Head]], data: st.DataObject) -> None:
    lines, heads = five
    raw = bytearray(b"\n".join(lines) + b"\n")
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(AuditError):
        checked(bytes(raw).split(b"\n")[:-1], heads[-1])


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_any_bytes_are_refused_with_our_own_error(lines: list[bytes]) -> None:
    if lines:
        assert why(lines) == "format"


@pytest.mark.parametrize("value", [
    {"kind": "DOE^JANE"}, {"why": "no such file: /data/DOE"}, {"study": "Doe"}, {"norm": float("nan")},
    {"norm": float("inf")}, {"size": -1}, {"kind": "x" * 41}, {"more": "x"}, {"outcome": "lost"},
])  # fmt: skip
def test_there_is_no_room_for_text(value: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Event.model_validate(SENT.model_dump() | value)


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_a_full_disk_lets_nothing_through_until_the_log_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "log"
    written(path, 2)
    with AuditLog(path, KEY, NOW) as log:
        before = log.head
        real = os.write

        def full(file: int, data: bytes) -> int:
            if failing == "fsync" or len(data) <= 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, data[:40])  # a part of a line fits still

        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full if failing == "write" else lambda file: full(file, b""))
            with pytest.raises(StorageError):
                log.append(SENT, NOW)
        with pytest.raises(StorageError):  # there is space again, and nobody knows what the disk holds
            log.append(SENT, NOW)
        assert log.head == before
    assert len(checked(read_lines(path)[0])) == 2
    assert written(path, 1)[0].seq == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_disk_that_is_really_full_is_an_error(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log", KEY, NOW)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file)
    os.close(full)
    with log, pytest.raises(StorageError, match="No space left"):
        log.append(SENT, NOW)


@pytest.mark.parametrize("keep", [1, 40, -2, -1])
def test_a_line_that_was_not_finished_is_removed_and_that_is_recorded(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "log"
    written(path, 3)
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    path.write_bytes(whole[:start] + whole[start:][:keep])
    assert read_lines(path)[1]
    with AuditLog(path, KEY, NOW) as log:
        assert log.head.seq == 3
    lines, torn = read_lines(path)
    assert not torn
    assert [entry.event.outcome for entry in checked(lines)] == ["sent", "sent", "repaired"]


def test_a_log_whose_end_is_not_ours_is_not_written_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    written(path, 2)
    data = path.read_bytes()
    for end in (data + b"garbage\n", data.replace(b'"round":1', b'"round":7'), data + b"x" * 20000, b"x" * 20000):
        path.write_bytes(end)
        with pytest.raises(AuditError):
            AuditLog(path, KEY, NOW)
        assert path.read_bytes() == end


def test_one_process_writes(tmp_path: Path) -> None:
    with AuditLog(tmp_path / "log", KEY, NOW), pytest.raises(AuditError) as error:
        AuditLog(tmp_path / "log", KEY, NOW)
    assert error.value.why == "busy"
    written(tmp_path / "log", 1)


def test_whatever_moment_it_is_killed_at_every_line_it_reported_is_there(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(private_pem(KEY))
    program = (
        "import sys\nfrom datetime import UTC, datetime\nfrom pathlib import Path\n"
        "from client.gateway.audit import AuditLog, Event\nfrom common.signing import load_private_key\n"
        "log = AuditLog(Path('log'), load_private_key(Path('key').read_bytes()), datetime.now(UTC))\n"
        "while True:\n print(log.append(Event(outcome='sent', kind='train'), datetime.now(UTC)), flush=True)\n"
    )
    last = 0
    for reports in (1, 7, 30):
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(reports)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
        process.wait()
        process.stdout.close()
        heads = [Head.parse(line) for line in said if line.endswith("\n")]
        with AuditLog(tmp_path / "log", KEY, NOW):
            pass
        found = checked(read_lines(tmp_path / "log")[0], *heads)
        assert len(found) >= heads[-1].seq > last
        last = heads[-1].seq


def call(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_commands_show_check_and_export(tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert "init" in call("verify", "--site", site, code=1)
    store.create(site, "st-mary", NOW)
    assert "audit log" in call("show", "--site", site, code=1)
    with AuditLog(audit_path(site), store.identity(site), NOW) as log:
        first = log.append(SENT, NOW)
        log.append(Event(outcome="refused", kind="train", why="not-finite"), NOW)
    shown = call("show", "--site", site)
    assert "1234 bytes  norm 0.5" in shown
    assert "because not-finite" in shown
    (refused,) = json.loads(call("show", "--site", site, "--refused", "--json"))
    assert refused["event"]["why"] == "not-finite"
    found = json.loads(call("verify", "--site", site, "--head", str(first), "--json"))
    assert found["lines"] == 2

    call("export", "--site", site, "--to", tmp_path / "out.json")
    again = json.loads(call("verify", "--export", tmp_path / "out.json", "--head", found["head"], "--json"))
    assert again == found
    assert "PRIVATE" not in (tmp_path / "out.json").read_text()

    path = audit_path(site)
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    assert "cut from its end" in call("verify", "--site", site, "--head", found["head"], code=1)
    (tmp_path / "out.json").write_text((tmp_path / "out.json").read_text().replace("1234", "1235"))
    assert "line 1" in call("verify", "--export", tmp_path / "out.json", code=1)
    call("verify", "--export", tmp_path / "none.json", code=1)
    call("verify", "--site", site, "--head", "17", code=1)


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: wardround-site audit {command}" in " ".join(call(command, "--help").split())
