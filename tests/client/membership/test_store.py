"""A site's keys: where they are made, who can read them, and which kit they take."""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from client.files import write_whole
from client.membership import examine, store
from common.consortium import Kit, SignedManifest
from common.consortium.keys import ec_public
from common.errors import MembershipError, StorageError
from server.consortium import members
from server.consortium.issue import issue_site
from tests.server.consortium.founded import NOW, World, enrol, new_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return new_world(tmp_path, "st-mary", "uni-2")


def refused(site: Path, kit: Kit, told: str | None = None) -> str:
    before = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    with pytest.raises(MembershipError) as error:
        store.join(site, kit, told, NOW)
    assert before == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}, (
        "a refused kit changes nothing"
    )
    return error.value.why


def test_private_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store.create(tmp_path / "site", "st-mary", NOW)
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "site").rglob("*.key")}
    assert modes == {"identity.key": 0o600, "tls.key": 0o600, "node.key": 0o600}


def test_flower_reads_the_node_key(world: World) -> None:
    keys = store.joined(world.sites["st-mary"], NOW).keys
    private = load_ssh_private_key((keys / "node.key").read_bytes(), password=None)
    assert (keys / "node.key").read_text().startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
    assert private.public_key() == load_ssh_public_key((keys / "node.pub").read_bytes())


def test_keys_are_never_made_twice(world: World) -> None:
    with pytest.raises(MembershipError):
        store.create(world.sites["st-mary"], "st-mary", NOW)


@pytest.mark.parametrize("name", ["", "St-Mary", "st mary", "../x", "a" * 49, "-x", "x-"])
def test_names_are_plain_and_a_refused_one_leaves_no_keys(tmp_path: Path, name: str) -> None:
    with pytest.raises(MembershipError):
        store.create(tmp_path / "site", name, NOW)
    assert not list((tmp_path / "site").rglob("*.key"))


@pytest.mark.parametrize("key", ["identity.key", "tls.key", "node.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_refused_at_start(world: World, key: str, mode: int) -> None:
    site = world.sites["st-mary"]
    (path,) = site.rglob(key)
    path.chmod(mode)
    with pytest.raises(MembershipError) as error:
        store.joined(site, NOW)
    assert error.value.why == "exposed-key"
    (finding,) = examine(site, NOW)
    assert finding.state == "fail"
    assert "chmod 600" in finding.text


def test_a_key_behind_a_link_is_refused(world: World, tmp_path: Path) -> None:
    (path,) = world.sites["st-mary"].rglob("tls.key")
    path.rename(tmp_path / "elsewhere.key")
    path.symlink_to(tmp_path / "elsewhere.key")
    with pytest.raises(MembershipError):
        store.joined(world.sites["st-mary"], NOW)


def test_the_first_kit_needs_a_fingerprint_that_somebody_told(world: World, tmp_path: Path) -> None:
    site = tmp_path / "new"
    kit = enrol(world.authority, store.create(site, "new", NOW))
    other = new_world(tmp_path / "other").authority.fingerprint
    assert refused(site, kit) == "fingerprint"
    assert refused(site, kit, other) == "fingerprint"
    assert refused(site, kit, kit.fingerprint[:9]) == "fingerprint"
    assert store.join(site, kit, kit.fingerprint, NOW).member.site == "new"


def test_a_kit_of_somebody_who_plays_the_coordinator_is_refused(world: World, tmp_path: Path) -> None:
    # The same name, the site's own request, the attacker's keys, and the attacker's fingerprint.
    site = world.sites["st-mary"]
    attacker = new_world(tmp_path / "attacker").authority
    kit = enrol(attacker, store.rotate(site, NOW))
    assert refused(site, kit) == "other-consortium"
    assert refused(site, kit, attacker.fingerprint) == "other-consortium"


def test_a_kit_for_another_site_is_refused(world: World) -> None:
    assert refused(world.sites["uni-2"], world.kits["st-mary"]) == "other-site"


def test_an_older_manifest_is_refused(world: World) -> None:
    site = world.sites["uni-2"]
    manifest = world.authority.manifest()
    old = world.kits["uni-2"]
    public = ec_public(store.joined(site, NOW).member.tls)
    certificate = issue_site(world.authority.issuer, "uni-2", public, NOW)
    new = world.authority.kit(
        "uni-2", certificate, world.authority.publish(members.renew(manifest, "uni-2", certificate, NOW))
    )
    assert store.join(site, new, None, NOW).manifest.epoch == manifest.epoch + 1
    assert refused(site, old) == "epoch"
    assert store.joined(site, NOW).kit == new


def test_rotation_keeps_the_old_keys_until_the_new_kit_is_here(world: World) -> None:
    site = world.sites["st-mary"]
    old = store.joined(site, NOW)
    request = store.rotate(site, NOW + timedelta(seconds=1))
    assert store.joined(site, NOW).keys == old.keys
    assert [finding.what for finding in examine(site, NOW) if finding.state != "ok"] == ["rotation"]
    kit = enrol(world.authority, request, now=NOW)
    new = store.join(site, kit, None, NOW)
    assert new.keys != old.keys
    assert new.member.node != old.member.node
    assert new.member.identity == old.member.identity
    assert not old.keys.exists()
    assert store.joined(site, NOW).member == new.member


def test_a_join_that_breaks_off_leaves_the_old_membership(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    site = world.sites["st-mary"]
    old = store.joined(site, NOW)
    kit = enrol(world.authority, store.rotate(site, NOW + timedelta(seconds=1)))
    fate: list[bool] = []

    def full(path: Path, data: bytes, mode: int = 0o644) -> None:
        if not fate.pop(0):
            raise StorageError("the disk is full")
        write_whole(path, data, mode)

    monkeypatch.setattr(store, "write_whole", full)
    for good in range(3):
        fate[:] = [*[True] * good, False]
        with pytest.raises(StorageError):
            store.join(site, kit, None, NOW)
        assert store.joined(site, NOW).member == old.member
    fate[:] = [True] * 3
    assert store.join(site, kit, None, NOW).member != old.member


def test_keys_that_are_not_those_of_the_manifest_are_refused(world: World) -> None:
    one, two = (store.joined(world.sites[name], NOW).keys for name in ("st-mary", "uni-2"))
    shutil.copy(two / "node.key", one / "node.key")
    with pytest.raises(MembershipError) as error:
        store.joined(world.sites["st-mary"], NOW)
    assert error.value.why == "other-key"


def test_what_is_missing_is_said_in_the_order_of_the_steps(tmp_path: Path) -> None:
    def said() -> str:
        (finding,) = examine(tmp_path / "site", NOW)
        assert finding.state == "fail"
        return finding.text

    assert "wardround-site init" in said()
    store.create(tmp_path / "site", "st-mary", NOW)
    assert "wardround-site join" in said()


@pytest.mark.parametrize(("days", "state", "word"), [
    (40, "ok", "in 40 days"), (29, "warn", "within 30"), (6, "warn", "within 7"), (0.9, "warn", "within 1 day"),
])  # fmt: skip
def test_expiry_is_warned_of(world: World, tmp_path: Path, days: float, state: str, word: str) -> None:
    site = tmp_path / "short"
    kit = enrol(world.authority, store.create(site, "short", NOW), days=days)
    store.join(site, kit, kit.fingerprint, NOW)
    (finding,) = [one for one in examine(site, NOW) if one.what == "certificate"]
    assert finding.state == state
    assert word in finding.text
    assert ("renew" in finding.remedy) == (state == "warn")


def test_a_revoked_site_knows_once_it_sees_the_manifest(world: World) -> None:
    manifest = members.remove(world.authority.manifest(), "st-mary", NOW)
    signed = world.authority.publish(manifest)
    kit = world.kits["st-mary"].model_copy(update={"manifest": signed})
    assert refused(world.sites["st-mary"], kit) == "revoked"


def test_a_newer_manifest_is_taken_and_no_other(world: World, tmp_path: Path) -> None:
    site, authority = world.sites["st-mary"], world.authority
    old = world.kits["st-mary"].manifest
    new = authority.publish(members.allow(authority.manifest(), ["a" * 64], [], NOW))
    joined = store.update(site, new, NOW)
    assert joined.manifest.bundles == ("a" * 64,)
    assert store.joined(site, NOW) == joined
    other = new_world(tmp_path / "other", "st-mary").authority
    gone = authority.publish(members.remove(authority.manifest(), "st-mary", NOW))
    cases = {"epoch": old, "signature": SignedManifest.make(other.manifest(), other.signing), "revoked": gone}
    for why, signed in cases.items():
        with pytest.raises(MembershipError) as error:
            store.update(site, signed, NOW)
        assert error.value.why == why
        assert store.joined(site, NOW) == joined
    with pytest.raises(MembershipError):
        store.update(tmp_path / "none", new, NOW)


def test_files_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old", 0o600)
    monkeypatch.setattr("client.files.os.fsync", _no_space)
    with pytest.raises(StorageError):
        write_whole(path, b"new", 0o600)
    assert path.read_bytes() == b"old"


def _no_space(_: int) -> None:
    raise OSError(28, "No space left on device")
