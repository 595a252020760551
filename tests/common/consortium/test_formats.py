"""Requests, manifests and kits: what is taken, and that nothing else is."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from common.consortium import (
    Kit,
    Manifest,
    SignedManifest,
    SignedRequest,
    fingerprint,
    load_certificate,
    matches,
    must_be_valid,
    warning,
)
from common.consortium.keys import ec_public, new_tls_key, public_pem
from common.errors import MembershipError
from common.signing import generate_key
from server.consortium.issue import issue_authority, issue_site
from tests.server.consortium.founded import NOW, World, new_request, new_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return new_world(tmp_path_factory.mktemp("world"), "st-mary", "uni-2")


def changed(data: bytes, *path: str | int, to: Any) -> bytes:
    """Return JSON with one value changed."""
    tree = json.loads(data)
    node = tree
    for step in path[:-1]:
        node = node[step]
    node[path[-1]] = to
    return json.dumps(tree).encode()


def refused(data: bytes, kind: type[Kit] = Kit) -> str:
    with pytest.raises(MembershipError) as error:
        kind.read(data).checked(NOW)
    return error.value.why


def test_what_was_made_is_read_back_the_same(world: World) -> None:
    kit = world.kits["uni-2"]
    assert Kit.read(kit.json_bytes()) == kit
    manifest, member = kit.checked(NOW)
    assert member.site == "uni-2"
    assert manifest.epoch == 3
    assert load_certificate(kit.certificate).public_key() == ec_public(member.tls)


def test_no_file_that_travels_holds_a_private_key(world: World) -> None:
    request, _ = new_request()
    for data in (world.kits["st-mary"].json_bytes(), request.json_bytes()):
        assert b"PRIVATE" not in data
        for folder in (world.authority.folder, *world.sites.values()):
            for key in folder.rglob("*.key"):
                middle = key.read_bytes().splitlines()[1]
                assert middle
                assert middle not in data


@pytest.mark.parametrize("who", ["by_identity", "by_tls", "by_node"])
def test_a_request_proves_that_its_maker_holds_each_key(who: str) -> None:
    request, _ = new_request()
    other, _ = new_request()
    assert request.checked() == request.request
    with pytest.raises(MembershipError) as error:
        request.model_copy(update={who: getattr(other, who)}).checked()
    assert error.value.why == "signature"


@pytest.mark.parametrize("field", ["site", "identity", "tls", "node", "made"])
def test_a_changed_request_is_refused(field: str) -> None:
    request, _ = new_request()
    other, _ = new_request("uni-2", later=timedelta(days=1))
    value = json.loads(other.request.model_dump_json())[field]
    with pytest.raises(MembershipError):
        SignedRequest.read(changed(request.json_bytes(), "request", field, to=value)).checked()


def test_a_key_may_not_carry_anything_beside_the_key() -> None:
    pem = public_pem(new_tls_key())
    assert ec_public(pem)
    for more in (pem + "Doe, Jane\n", pem.replace("\n", "\r\n"), " " + pem):
        with pytest.raises(MembershipError):
            ec_public(more)


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("manifest", "manifest", "epoch"), 99, "signature"),
        (("manifest", "manifest", "sites"), [], "signature"),
        (("manifest", "manifest", "studies"), ["0" * 64], "signature"),
        (("manifest", "signature"), "0" * 128, "signature"),
        (("site",), "uni-2", "name"),
        (("more",), "text", "format"),
        (("manifest", "manifest", "epoch"), "3", "format"),
        (("manifest", "manifest", "sites", 0, "site"), "../x", "format"),
    ],
)
def test_a_changed_kit_is_refused(world: World, path: tuple[str, ...], value: Any, why: str) -> None:
    assert refused(changed(world.kits["st-mary"].json_bytes(), *path, to=value)) == why


def test_parts_of_another_consortium_are_refused(world: World, tmp_path: Path) -> None:
    other = new_world(tmp_path, "st-mary").kits["st-mary"]
    kit = world.kits["st-mary"]
    for field, why in (("authority", "authority"), ("key", "signature"), ("manifest", "signature")):
        assert refused(kit.model_copy(update={field: getattr(other, field)}).json_bytes()) == why
    assert refused(kit.model_copy(update={"certificate": other.certificate}).json_bytes()) == "authority"
    assert kit.fingerprint != other.fingerprint


def test_a_site_cannot_issue_certificates(world: World) -> None:
    # The site's own key signs a certificate in the name of another site.
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "uni-2")])
    key = new_tls_key()
    forged = issue_site((world.authority.certificate, key), "uni-2", key.public_key(), NOW)
    kit = world.kits["uni-2"]
    pem = forged.public_bytes(Encoding.PEM).decode()
    assert forged.subject == name
    assert refused(kit.model_copy(update={"certificate": pem}).json_bytes()) == "authority"


def test_a_kit_is_good_only_while_its_certificate_is(world: World) -> None:
    kit = world.kits["st-mary"]
    kit.checked(NOW + timedelta(days=364))
    for when, why in ((timedelta(days=366), "expired"), (-timedelta(hours=1), "not-yet-valid")):
        with pytest.raises(MembershipError) as error:
            kit.checked(NOW + when)
        assert error.value.why == why


def test_manifests_only_go_forward(world: World) -> None:
    manifest = world.authority.manifest()
    later = manifest.model_copy(update={"epoch": manifest.epoch + 1})
    later.must_follow(manifest)
    manifest.must_follow(manifest)
    other = manifest.model_copy(update={"quorum": 9})
    for first, second in ((later, manifest), (manifest, other)):
        with pytest.raises(MembershipError) as error:
            second.must_follow(first)
        assert error.value.why == "epoch"


def test_a_manifest_has_no_two_sites_with_one_key(world: World) -> None:
    manifest = world.authority.manifest()
    one, two = manifest.sites
    for field in ("site", "identity", "tls", "node", "serial"):
        twin = two.model_copy(update={field: getattr(one, field)})
        tree = manifest.model_dump(mode="json") | {"sites": [one.model_dump(mode="json"), twin.model_dump(mode="json")]}
        with pytest.raises(MembershipError):
            Manifest.read(json.dumps(tree).encode())


def test_a_manifest_signed_by_somebody_else_is_refused(world: World) -> None:
    signed = SignedManifest.make(world.authority.manifest(), generate_key())
    with pytest.raises(MembershipError):
        signed.checked(world.authority.signing.public_key())


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_our_own_error(data: bytes) -> None:
    for kind in (Kit, SignedRequest, SignedManifest):
        with pytest.raises(MembershipError):
            kind.read(data)


@given(st.data())
def test_any_single_change_of_a_kit_is_refused(world: World, data: st.DataObject) -> None:
    raw = world.kits["st-mary"].json_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    new = raw[:at] + bytes([data.draw(st.integers(0, 255).filter(lambda byte: byte != raw[at]))]) + raw[at + 1 :]
    try:
        kit = Kit.read(new)
        kit.checked(NOW)
    except MembershipError:
        return
    assert kit == world.kits["st-mary"] or kit.fingerprint != world.kits["st-mary"].fingerprint


def test_fingerprints_are_compared_whole() -> None:
    found = fingerprint({"a": 1})
    assert len(found) == 49
    assert matches(found.upper().replace(" ", ":"), found)
    assert not matches(fingerprint({"a": 2}), found)
    for told in ("", found[:-1], found[:4], found + "0", "x" * 40):
        with pytest.raises(MembershipError):
            matches(told, found)


def test_warnings_come_at_thirty_seven_and_one_days() -> None:
    said = {days: warning(days) for days in (31, 30, 8, 7, 2, 1, 0.5, -0.1)}
    assert said == {
        31: "",
        30: "ends within 30 days",
        8: "ends within 30 days",
        7: "ends within 7 days",
        2: "ends within 7 days",
        1: "ends within 1 day",
        0.5: "ends within 1 day",
        -0.1: "has ended",
    }


def test_the_authority_cannot_be_used_by_a_site_or_below_it(world: World) -> None:
    key = new_tls_key()
    certificate = issue_authority("testers", key, NOW)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    site = load_certificate(world.kits["uni-2"].certificate)
    assert not site.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = site.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    must_be_valid(site, NOW)
