"""What may run here: bundles that are looked at before they are approved, and the commands that decide."""

import io
import json
import os
import stat
import zipfile
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client.cli import app
from client.gateway import switch
from client.gateway.approvals import (
    approved_study,
    bundle_bytes,
    decide,
    find,
    items,
    must_be_approved,
    note_bundle,
    note_study,
    study_must_be_approved,
)
from client.gateway.bundle import difference, read_bundle, run_config
from common.canonical import sha256_hex
from common.consortium import Manifest
from common.errors import ApprovalError
from common.study import Study
from tests.client.gateway.doubles import STUDY, bundle
from tests.client.hospitals import tiny_study
from tests.server.consortium.founded import NOW


def why(data: bytes) -> str:
    with pytest.raises(ApprovalError) as error:
        read_bundle(data)
    assert error.value.why == "bundle-format"
    return str(error.value)


def archive(*names: str, mode: int = 0, size: int = 1) -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file,
        pytest.warns() if len(names) > len({*names}) else io.BytesIO(),
    ):
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.external_attr, entry.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            file.writestr(entry, bytes(size))
    return out.getvalue()


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.py", "a/../b.py", "a//b.py", "C:/a", "a\\b", "a\x1b[2J", "a\u202eb", "d/"]
)
def test_a_name_that_leads_elsewhere_or_cannot_be_shown_is_refused(name: str) -> None:
    assert "name" in why(archive(name))


def test_what_no_honest_bundle_has_is_refused() -> None:
    assert "link" in why(archive("a.py", mode=stat.S_IFLNK | 0o777))
    assert "twice" in why(archive("a.py", "a.py"))
    assert "files" in why(archive(*(f"{i}.py" for i in range(2001))))
    assert "unpacked" in why(archive("a.py", "b.py", size=2**25 + 1))
    assert "bytes" in why(bytes(13 * 2**20))
    assert "zip" in why(b"")
    good = bundle()
    assert "zip" in why(good[: len(good) // 2])


@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_are_a_bundle_or_our_own_error(noise: bytes, at: int) -> None:
    good = bundle()
    for data in (noise, good[:at] + noise + good[at + len(noise) :]):
        try:
            files = read_bundle(data)
        except ApprovalError:
            continue
        assert all(isinstance(body, bytes) for body in files.values())


def test_the_configuration_is_the_one_that_flower_makes() -> None:
    from flwr.common.config import get_fused_config_from_fab
    from flwr.supercore.run import Run

    override: dict[str, bool | int | float | str] = {"study.rounds": 3, "sites.held-out": "a"}
    run = Run.create_empty(1)
    run.override_config = override
    ours = run_config(read_bundle(bundle()), override)
    assert ours == get_fused_config_from_fab(bundle(), run)
    assert Study.from_run_config(ours) == STUDY.override(override)
    for bad in ({"pyproject.toml": b"x"}, {}, {"pyproject.toml": b"\xff"}, {"pyproject.toml": b"[tool]\nflwr = 3"}):
        with pytest.raises(ApprovalError):
            run_config(bad, {})
    with pytest.raises(ApprovalError):
        run_config(read_bundle(bundle()), {"a.key.that.is.not.there": 1})


def test_a_difference_shows_every_change_and_cannot_hide_one() -> None:
    old = {"a.py": b"one\ntwo\n", "b.py": b"same\n", "c.py": b"gone\n"}
    new = {"a.py": b"one\n\x1b[1A\x1b[2Kevil() \xe2\x80\xae\n", "b.py": b"same\n", "d.bin": b"\xff\x00"}
    lines = list(difference(old, new))
    assert lines[0] == "3 of 4 files differ"
    text = "\n".join(lines)
    for part in (
        "changed  a.py",
        "removed  c.py",
        "added    d.bin  2 bytes",
        "-two",
        "+<U+001B>[1A<U+001B>[2Kevil()",
        "-gone",
    ):
        assert part in text
    assert "<U+202E>" in text
    assert "d.bin is not shown" in text
    assert all(line.replace("\t", "").isprintable() for line in lines)
    assert list(difference(old, old)) == ["0 of 3 files differ"]


def manifest(*, bundles: tuple[str, ...] = (), studies: tuple[str, ...] = ()) -> Manifest:
    return Manifest(consortium="c", epoch=1, issued=NOW, edge="edge:1", quorum=1, bundles=bundles, studies=studies)


def state_of(site: Path, listed: Mapping[str, tuple[str, ...]], study: Study = STUDY) -> str:
    try:
        must_be_approved(site, manifest(**listed), sha256_hex(bundle()), study, NOW)
    except ApprovalError as error:
        return error.why
    return "ok"


def test_only_what_site_and_coordinator_approved_may_run(tmp_path: Path) -> None:
    listed = {"bundles": (sha256_hex(bundle()),), "studies": (STUDY.digest,)}
    assert state_of(tmp_path, listed) == "bundle-waiting"
    one, two = note_bundle(tmp_path, bundle(), NOW), note_study(tmp_path, STUDY, NOW)
    assert state_of(tmp_path, listed) == "bundle-waiting"
    decide(tmp_path, one, "approved", NOW)
    assert note_bundle(tmp_path, bundle(), NOW).state == "approved", "it waits once"
    assert state_of(tmp_path, listed) == "study-waiting"
    decide(tmp_path, two, "approved", NOW, 50)
    assert state_of(tmp_path, listed) == "ok"
    assert approved_study(tmp_path, STUDY.digest) == (STUDY, 50)
    assert state_of(tmp_path, {"bundles": listed["bundles"]}) == "study-not-admitted"
    assert state_of(tmp_path, {"studies": listed["studies"]}) == "bundle-not-admitted"
    decide(tmp_path, find(tmp_path, one.digest[:8]), "rejected", NOW)
    assert state_of(tmp_path, listed) == "bundle-rejected"


def test_a_study_ends_on_its_day(tmp_path: Path) -> None:
    for days, expected in ((0, "ok"), (-1, "study-expired")):
        study = STUDY.override({"study.expires": f"{NOW + timedelta(days=days):%Y-%m-%d}"})
        decide(tmp_path, note_bundle(tmp_path, bundle(), NOW), "approved", NOW)
        decide(tmp_path, note_study(tmp_path, study, NOW), "approved", NOW, 50)
        listed = {"bundles": (sha256_hex(bundle()),), "studies": (study.digest,)}
        assert state_of(tmp_path, listed, study) == expected


def test_what_was_changed_in_the_store_is_not_used(tmp_path: Path) -> None:
    one, two = note_bundle(tmp_path, bundle(), NOW), note_study(tmp_path, STUDY, NOW)
    kept = tmp_path / "gateway"
    (kept / "bundles" / f"{one.digest}.fab").write_bytes(bundle(client__more_py=b"evil"))
    (kept / "studies" / f"{two.digest}.toml").write_text(STUDY.override({"study.rounds": 9}).toml())
    for use in (bundle_bytes, approved_study):
        with pytest.raises(ApprovalError, match="changed"):
            use(tmp_path, one.digest if use is bundle_bytes else two.digest)
    (kept / "approvals" / f"bundle-{one.digest}.json").write_text("{}")
    with pytest.raises(ApprovalError, match="damaged"):
        items(tmp_path)


def test_whoever_may_enter_the_folder_may_read_what_was_decided_and_reading_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ApprovalError, match="waits"):
        study_must_be_approved(tmp_path, STUDY, NOW)
    assert not items(tmp_path)
    assert not list(tmp_path.iterdir())
    before = os.umask(0o077)  # of the gateway's unit
    decide(tmp_path, note_study(tmp_path, STUDY, NOW), "approved", NOW)
    os.umask(before)
    (file,) = (tmp_path / "gateway" / "approvals").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700, "until an administrator lets somebody in"
    study_must_be_approved(tmp_path, STUDY, NOW)
    file.unlink()
    file.mkdir()
    with pytest.raises(ApprovalError, match="cannot be read: Is a directory"):
        study_must_be_approved(tmp_path, STUDY, NOW)


def test_only_so_many_wait(tmp_path: Path) -> None:
    for number in range(20):
        note_study(tmp_path, STUDY.override({"study.rounds": number}), NOW)
    with pytest.raises(ApprovalError) as error:
        note_study(tmp_path, STUDY.override({"study.rounds": 20}), NOW)
    assert error.value.why == "queue-full"
    note_bundle(tmp_path, bundle(), NOW)


def call(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def test_the_commands_show_compare_and_decide(tmp_path: Path) -> None:
    site = ("--site", tmp_path / "site")
    assert "0 waiting" in call("approvals", *site)
    (tmp_path / "one.fab").write_bytes(bundle())
    (tmp_path / "two.fab").write_bytes(bundle(client__app_py=b"print('hello')\nprint('more')\n"))
    study = tiny_study()
    (tmp_path / "study.toml").write_text(study.toml())
    first = json.loads(call("approve", tmp_path / "one.fab", *site, "--json"))
    assert first["state"] == "approved"
    assert "every" not in call("diff", tmp_path / "two.fab", *site)
    second = sha256_hex((tmp_path / "two.fab").read_bytes())
    text = call("diff", second[:8], *site)
    assert first["digest"] in text
    assert "+print('more')" in text
    assert "waiting   bundle" in call("approvals", *site)
    assert "rejected: bundle" in call("reject", second[:10], *site)
    third = json.loads(call("approve", tmp_path / "study.toml", *site, "--json"))
    from server.rounds import initial_theta

    assert third["size"] == sum(tensor.numel() for tensor in initial_theta(study).values())
    assert "rounds = 2" in call("diff", study.digest, *site)
    assert [one["state"] for one in json.loads(call("approvals", *site, "--json"))] == [
        "approved",
        "rejected",
        "approved",
    ]
    for wrong in ("12345678", study.digest[:4], str(tmp_path / "none.fab")):
        call("approve", wrong, *site, code=1)


def test_the_switch(tmp_path: Path) -> None:
    assert switch.paused(tmp_path), "as long as nobody has opened it"
    call("pause", "--site", tmp_path)
    switch.prepare_switch(tmp_path)
    assert switch.paused(tmp_path)
    call("resume", "--site", tmp_path)
    assert not switch.paused(tmp_path)
    (tmp_path / "gateway" / "switch").write_bytes(b"open")
    assert switch.paused(tmp_path)


@pytest.mark.parametrize("command", ["gateway", "approvals", "approve", "reject", "diff", "pause", "resume"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    assert f"Example: wardround-site {command}" in " ".join(call(command, "--help").split())
