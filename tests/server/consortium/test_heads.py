"""Heads of audit logs that reach the coordinator: kept for good, and a log that was cut contradicts them."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client.cli import app as at_site
from client.gateway.audit import AuditLog, Event
from client.gateway.audit import Head as SiteHead
from client.gateway.cli import audit_path
from client.membership import store
from common.errors import AuditError
from server.cli import app as at_coordinator
from server.consortium.heads import Head, contradictions, heads_in, keep, kept

NOW = datetime(2026, 11, 24, 20, 0, tzinfo=UTC)


def call(app: Any, *arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.output


def line(head: SiteHead | str, site: str = "st-mary") -> bytes:
    return json.dumps({"time": "2026-11-24T20:00:00+00:00", "site": site, "head": str(head)}).encode() + b"\n"


def send(site: Path, count: int, size: int = 1) -> list[SiteHead]:
    with AuditLog(audit_path(site), store.identity(site), NOW) as log:
        return [log.append(Event(outcome="sent", kind="train", size=size), NOW) for _ in range(count)]


def cut(path: Path) -> None:
    """Take the last line away."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("also_continued", [False, True])
def test_a_log_whose_end_was_cut_is_noticed(tmp_path: Path, also_continued: bool) -> None:
    site, consortium, log = tmp_path / "site", tmp_path / "consortium", tmp_path / "access.log"
    consortium.mkdir()
    store.create(site, "st-mary", NOW)
    log.write_bytes(b"".join(map(line, send(site, 3))))
    heads = ("heads", "--consortium", consortium, "--log", log)
    assert "st-mary  3:" in call(at_coordinator, *heads)
    cut(audit_path(site))
    if also_continued:
        (after,) = send(site, 1, size=2)
        log.write_bytes(line(after))  # the edge's own log was rotated away
        assert "its audit log was cut, rewritten" in call(at_coordinator, *heads, code=1)
    call(at_coordinator, *heads, "st-mary", "--to", tmp_path / "st-mary.heads", code=int(also_continued))
    said = call(at_site, "audit", "verify", "--site", site, "--heads", tmp_path / "st-mary.heads", code=1)
    assert ("two different heads were seen" if also_continued else "cut from its end") in said
    call(at_site, "audit", "verify", "--site", site)  # nobody else's word: nothing can be known


def test_a_log_that_is_whole_agrees_with_all_its_heads(tmp_path: Path) -> None:
    site, log = tmp_path / "site", tmp_path / "edge" / "access.log"
    log.parent.mkdir()
    store.create(site, "st-mary", NOW)
    seen = send(site, 2) + send(site, 2)
    log.write_bytes(b"".join(map(line, [seen[0], seen[1], seen[1], seen[3]])))  # sent again, and one that got lost
    answer = json.loads(call(at_coordinator, "heads", "--consortium", tmp_path, "--json"))
    assert answer == {"heads": {"st-mary": str(seen[3])}, "wrong": []}
    call(at_coordinator, "heads", "st-mary", "--consortium", tmp_path, "--to", tmp_path / "out")
    assert (tmp_path / "out").read_text().split() == [str(seen[0]), str(seen[1]), str(seen[3])]
    call(at_site, "audit", "verify", "--site", site, "--heads", tmp_path / "out")


def test_only_a_number_and_a_hash_of_a_known_site_is_a_head() -> None:
    good = f"7:{'a' * 64}"
    lines = [
        *(line(text) for text in ("", "DOE^JANE", good + "x", "x" + good, f"7:{'A' * 64}", f"{'9' * 16}:{'a' * 64}")),
        line(good, site=""), b"", b"{", b"[1]", b'{"site": "st-mary"}', b'{"site": 1, "time": 1, "head": 1}', b"\xff",
        line(good),
    ]  # fmt: skip
    assert [(head.site, str(head)) for head in heads_in(lines)] == [("st-mary", good)]


@pytest.mark.parametrize(
    ("story", "wrong"),
    [
        ([("a", 1), ("b", 5), ("a", 2), ("b", 6)], []),
        ([("a", 3), ("a", 9)], []),  # two studies, or lines of refusals in between
        ([("a", 3), ("b", 9), ("a", 2)], ["a: line 2"]),
        ([("a", 3), ("a", 3), ("b", 1)], ["a: line 3"]),  # another line with this number
    ],
)
def test_heads_of_one_log_only_rise(story: list[tuple[str, int]], wrong: list[str]) -> None:
    heads = [Head(site, "now", seq, f"{number:064x}") for number, (site, seq) in enumerate(story)]
    assert [text[: len(start)] for text, start in zip(contradictions(heads), wrong, strict=True)] == wrong


def test_what_is_kept_stays_and_a_damaged_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "heads.jsonl"
    first, second = (Head("a", "now", seq, "a" * 64) for seq in (1, 2))
    assert keep(path, [first, first]) == [first]
    assert keep(path, [second, first]) == kept(path) == [first, second]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AuditError, match="was damaged"):
        kept(path)
    assert "--log" in call(at_coordinator, "heads", "--consortium", tmp_path / "nowhere", code=1)
