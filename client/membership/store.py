"""A site's keys and its kit on disk. Private keys are made here and never leave.

::

    member/
        identity.key             Ed25519: signs requests, heads of the audit log. Stays the same for ever.
        kit.json                 what the coordinator sent: certificate, authority, manifest. Replaced whole.
        0f3a.../                 one set of keys, named after its TLS key; a rotation makes a second one
            tls.key  node.key    0600
            node.pub             for `flwr supernode register`
            certificate.pem  authority.pem

The set in use is the one whose TLS key the kit's certificate is for: replacing ``kit.json`` changes keys,
certificate and manifest in one step, and a crash before it leaves everything as it was.
"""

import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from client.files import read_secret, write_whole
from common.canonical import sha256_hex
from common.consortium import Kit, Manifest, Member, Request, SignedManifest, SignedRequest, matches
from common.consortium.keys import (
    load_node_private,
    load_tls_private,
    new_node_key,
    new_tls_key,
    node_openssh,
    openssh_public,
    public_pem,
    tls_pem,
)
from common.errors import MembershipError
from common.signing import generate_key, load_private_key, private_pem
from common.signing import public_pem as identity_pem

__all__ = ["Joined", "create", "identity", "join", "joined", "keys_folder", "member_folder", "rotate", "update"]


@dataclass(frozen=True)
class Joined:
    """A site that belongs to a consortium.

    Attributes
    ----------
    kit : Kit
        As pinned.
    manifest, member : Manifest, Member
        Who belongs, and this site's own entry.
    keys : Path
        The folder of the keys and certificates in use.
    """

    kit: Kit
    manifest: Manifest
    member: Member
    keys: Path


def member_folder(site: Path) -> Path:
    """Return where a site keeps its keys and its kit."""
    return site / "member"


def keys_folder(site: Path, tls: str) -> Path:
    """Return the folder of the set of keys whose public TLS key is given (PEM)."""
    return member_folder(site) / sha256_hex(tls.encode())[:16]


def create(site: Path, name: str, now: datetime) -> SignedRequest:
    """Make a site's keys and its first request.

    Raises
    ------
    MembershipError
        The site has keys already, or the name cannot be one.
    """
    folder = member_folder(site)
    if (folder / "identity.key").exists():
        raise MembershipError(
            f"this site has keys already ({folder}): to replace them say `wardround-site rotate`; to begin anew as "
            "another site, choose another folder with --site",
            "exists",
        )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = generate_key()
    request = _request(site, name, key, now)
    # Last, because it is what says that the keys are there.
    write_whole(folder / "identity.key", private_pem(key), 0o600)
    return request


def rotate(site: Path, now: datetime) -> SignedRequest:
    """Make a second set of keys and a request for it; the first stays in use until the site joins with the new kit.

    Raises
    ------
    MembershipError
        The site is not a member, or its keys are not in order.
    """
    pinned = _pinned(site)
    if pinned is None:
        raise MembershipError("this site has not joined yet: there are no keys in use to replace", "not-joined")
    return _request(site, pinned.site, identity(site), now)


def identity(site: Path) -> Ed25519PrivateKey:
    """Return the site's identity.

    Raises
    ------
    MembershipError
        It is missing, or others could have read it.
    """
    path = member_folder(site) / "identity.key"
    if not path.exists():
        raise MembershipError("this site has no keys yet: run `wardround-site init NAME` first", "missing-key")
    return load_private_key(read_secret(path))


def join(site: Path, kit: Kit, told: str | None, now: datetime) -> Joined:
    """Check a kit and pin it.

    Parameters
    ----------
    site : Path
        The site's folder.
    kit : Kit
        From the coordinator.
    told : str or None
        The consortium's fingerprint, as the coordinator told it. Needed the first time only: afterwards the site
        takes kits of the consortium that it has pinned, and of no other.
    now : datetime
        The time.

    Raises
    ------
    MembershipError
        The kit is not for this site and its keys, is older than what was seen, or of a consortium that nobody has
        compared the fingerprint of.
    """
    manifest, member = kit.checked(now)
    own = identity_pem(identity(site).public_key()).decode()
    if member.identity != own:
        raise MembershipError(
            f"the kit is for {kit.site} with another identity: it answers a request that was not made here",
            "other-site",
        )
    pinned = _pinned(site)
    if pinned is None or told is not None:
        if told is None:
            raise MembershipError(
                "this is the first kit of this consortium: ask the coordinator for its fingerprint (`wardround-study "
                "sites` shows it), by another way than the kit came, and say it with --fingerprint",
                "fingerprint",
            )
        if not matches(told, kit.fingerprint):
            raise MembershipError(
                "the kit is not of the consortium with this fingerprint: somebody may have made it in the "
                "coordinator's name; nothing was joined",
                "fingerprint",
            )
    if pinned is not None:
        if pinned.fingerprint != kit.fingerprint:
            raise MembershipError(
                f"this site belongs to {pinned.manifest.manifest.consortium}, and the kit is of a consortium with "
                "other keys: to change over, begin anew in another folder with `wardround-site init`",
                "other-consortium",
            )
        manifest.must_follow(pinned.manifest.manifest)
    keys = _keys(site, member)
    write_whole(keys / "certificate.pem", kit.certificate.encode())
    write_whole(keys / "authority.pem", kit.authority.encode())
    write_whole(member_folder(site) / "kit.json", kit.json_bytes())
    for old in member_folder(site).iterdir():  # keys that the manifest no longer names
        if old.is_dir() and old != keys:
            shutil.rmtree(old)
    return Joined(kit, manifest, member, keys)


def update(site: Path, signed: SignedManifest, now: datetime) -> Joined:
    """Take a newer manifest of the consortium that the site belongs to; keys and certificate stay.

    Raises
    ------
    MembershipError
        The site is not a member, or with this manifest no longer; or the manifest is of another consortium, or older.
    """
    pinned = joined(site, now)
    new = Kit.model_validate({name: getattr(pinned.kit, name) for name in Kit.model_fields} | {"manifest": signed})
    manifest, member = new.checked(now)
    manifest.must_follow(pinned.manifest)
    keys = _keys(site, member)
    write_whole(member_folder(site) / "kit.json", new.json_bytes())
    return Joined(new, manifest, member, keys)


def joined(site: Path, now: datetime) -> Joined:
    """Return the site's membership, checked as at every start: dates, signatures, and the keys' modes.

    Raises
    ------
    MembershipError
        The site is not a member, or something is not in order.
    """
    kit = _pinned(site)
    if kit is None:
        identity(site)  # says what is missing, where it is the keys
        raise MembershipError(
            "this site has not joined yet: send its request to the coordinator, then `wardround-site join KIT`",
            "not-joined",
        )
    manifest, member = kit.checked(now)
    if identity_pem(identity(site).public_key()).decode() != member.identity:
        raise MembershipError("identity.key is not the identity that the manifest names", "other-site")
    return Joined(kit, manifest, member, _keys(site, member))


def _request(site: Path, name: str, key: Ed25519PrivateKey, now: datetime) -> SignedRequest:
    tls, node = new_tls_key(), new_node_key()
    try:
        request = Request(
            site=name,
            identity=identity_pem(key.public_key()).decode(),
            tls=public_pem(tls),
            node=public_pem(node),
            made=now.replace(microsecond=0),
        )
    except ValidationError:
        raise MembershipError(
            f"{name!r} cannot be a site's name: 1 to 48 lower-case letters, digits and hyphens", "name"
        ) from None
    folder = keys_folder(site, request.tls)
    folder.mkdir(mode=0o700)
    write_whole(folder / "tls.key", tls_pem(tls), 0o600)
    write_whole(folder / "node.key", node_openssh(node), 0o600)
    write_whole(folder / "node.pub", openssh_public(request.node))
    return SignedRequest.make(request, key, tls, node)


def _pinned(site: Path) -> Kit | None:
    try:
        data = (member_folder(site) / "kit.json").read_bytes()
    except FileNotFoundError:
        return None
    return Kit.read(data)


def _keys(site: Path, member: Member) -> Path:
    """Return the folder of the keys that the manifest names, having read them."""
    folder = keys_folder(site, member.tls)
    if not folder.exists():
        raise MembershipError(
            "the manifest names keys that are not here: they were made in another folder, or deleted; run "
            "`wardround-site rotate` and have the new request enrolled",
            "missing-key",
        )
    tls, node = load_tls_private(read_secret(folder / "tls.key")), load_node_private(read_secret(folder / "node.key"))
    if (public_pem(tls), public_pem(node)) != (member.tls, member.node):
        raise MembershipError(f"the keys in {folder} are not those that the manifest names", "other-key")
    return folder
