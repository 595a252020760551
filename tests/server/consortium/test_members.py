"""How a manifest changes at the coordinator."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from client.membership import store
from common.consortium import Manifest
from common.consortium.keys import ec_public
from common.errors import MembershipError
from common.study import Study
from server.consortium import members
from server.consortium.authority import changing, open_authority
from server.consortium.issue import issue_site
from tests.server.consortium.founded import NOW, World, enrol, new_request, new_world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return new_world(tmp_path, "st-mary")


def test_every_change_raises_the_epoch(world: World) -> None:
    epochs = [world.authority.manifest().epoch]
    study = Study.from_run_config({"sites.quorum": 2})
    changes: list[Callable[[Manifest], Manifest]] = [
        lambda manifest: members.allow(manifest, ["a" * 64], [study], NOW),
        lambda manifest: members.forbid(manifest, ["a" * 64, study.digest], NOW),
        lambda manifest: members.remove(manifest, "st-mary", NOW),
    ]
    for change in changes:
        world.authority.publish(change(world.authority.manifest()))
        epochs.append(world.authority.manifest().epoch)
    assert epochs == [2, 3, 4, 5]
    assert world.authority.manifest().sites == ()


def test_a_name_belongs_to_one_identity(world: World) -> None:
    manifest = world.authority.manifest()
    request, _ = new_request("st-mary")
    with pytest.raises(MembershipError) as error:
        members.is_known(manifest, request.request)
    assert error.value.why == "name-taken"
    assert not members.is_known(members.remove(manifest, "st-mary", NOW), request.request)


def test_a_known_site_may_change_its_keys_but_not_back(world: World) -> None:
    site, manifest = world.sites["st-mary"], world.authority.manifest()
    newer, older = (store.rotate(site, NOW + timedelta(hours=hours)).request for hours in (2, 1))
    assert members.is_known(manifest, newer)
    assert members.is_known(manifest, older)
    certificate = issue_site(world.authority.issuer, "st-mary", ec_public(newer.tls), NOW)
    manifest = members.with_site(manifest, newer, certificate, NOW)
    with pytest.raises(MembershipError) as error:
        members.is_known(manifest, older)
    assert error.value.why == "old-request"


def test_two_sites_cannot_share_a_key(world: World) -> None:
    request, _ = new_request("uni-2")
    enrol(world.authority, request)
    twin = request.request.model_copy(update={"site": "uni-3"})
    certificate = issue_site(world.authority.issuer, "uni-3", world.authority.key.public_key(), NOW)
    with pytest.raises(MembershipError) as error:
        members.with_site(world.authority.manifest(), twin, certificate, NOW)
    assert error.value.why == "conflict"


def test_a_study_of_too_few_sites_is_not_admitted(world: World) -> None:
    with pytest.raises(MembershipError) as error:
        members.allow(world.authority.manifest(), [], [Study.from_run_config({"sites.quorum": 1})], NOW)
    assert error.value.why == "quorum"


def test_nothing_is_taken_out_that_is_not_there(world: World) -> None:
    manifest = world.authority.manifest()
    with pytest.raises(MembershipError):
        members.remove(manifest, "uni-2", NOW)
    with pytest.raises(MembershipError):
        members.forbid(manifest, ["b" * 64], NOW)


def test_the_authoritys_keys_are_its_owners_alone(world: World) -> None:
    folder = world.authority.folder
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.glob("*.key")} == {
        "authority.key": 0o600, "manifest.key": 0o600,
    }  # fmt: skip
    assert open_authority(folder, NOW).fingerprint == world.authority.fingerprint
    for key in ("authority.key", "manifest.key"):
        (folder / key).chmod(0o644)
        with pytest.raises(MembershipError) as error:
            open_authority(folder, NOW)
        assert error.value.why == "exposed-key"
        (folder / key).chmod(0o600)


def test_two_commands_do_not_sign_one_epoch_twice(world: World) -> None:
    with changing(world.authority.folder), pytest.raises(MembershipError), changing(world.authority.folder):
        pass
