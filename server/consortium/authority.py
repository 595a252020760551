"""The consortium's folder at the coordinator: two secret keys, one certificate, one manifest.

::

    authority.key  authority.pem     issues certificates (P-384)
    manifest.key   manifest.json     signs manifests (Ed25519)
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from common.consortium import (
    Kit,
    Manifest,
    SignedManifest,
    consortium_fingerprint,
    load_certificate,
    must_be_valid,
    same_key,
)
from common.consortium.keys import exposed, load_tls_private, new_node_key, public_pem, tls_pem
from common.errors import MembershipError
from common.signing import generate_key, load_private_key, private_pem
from common.signing import public_pem as signing_pem
from server.consortium.issue import issue_authority
from server.files import write_atomic

__all__ = ["Authority", "changing", "found", "open_authority", "read_secret"]


@dataclass(frozen=True)
class Authority:
    """A consortium, as its coordinator holds it.

    Attributes
    ----------
    folder : Path
        Where it is kept.
    certificate : Certificate
        The consortium's own.
    key : EllipticCurvePrivateKey
        Issues certificates.
    signing : Ed25519PrivateKey
        Signs manifests.
    """

    folder: Path
    certificate: x509.Certificate
    key: EllipticCurvePrivateKey
    signing: Ed25519PrivateKey

    @property
    def issuer(self) -> tuple[x509.Certificate, EllipticCurvePrivateKey]:
        """What issues certificates."""
        return self.certificate, self.key

    @property
    def public(self) -> str:
        """The public key (PEM) that manifests are checked with."""
        return signing_pem(self.signing.public_key()).decode()

    @property
    def fingerprint(self) -> str:
        """What sites compare."""
        return consortium_fingerprint(self.certificate, self.public)

    def manifest(self) -> Manifest:
        """Return the current manifest."""
        data = (self.folder / "manifest.json").read_bytes()
        return SignedManifest.read(data).checked(self.signing.public_key())

    def publish(self, manifest: Manifest) -> SignedManifest:
        """Sign a manifest and put it in the place of the current one."""
        signed = SignedManifest.make(manifest, self.signing)
        write_atomic(self.folder / "manifest.json", signed.json_bytes())
        return signed

    def kit(self, site: str, certificate: x509.Certificate, manifest: SignedManifest) -> Kit:
        """Return a site's kit."""
        return Kit(
            site=site,
            authority=self.certificate.public_bytes(Encoding.PEM).decode(),
            key=self.public,
            certificate=certificate.public_bytes(Encoding.PEM).decode(),
            manifest=manifest,
        )


def found(folder: Path, name: str, edge: str, quorum: int, now: datetime) -> Authority:
    """Make a new consortium: its keys, its certificate, and a manifest with nobody in it.

    Parameters
    ----------
    folder : Path
        Where to keep it.
    name : str
        What it is called.
    edge : str
        ``host:port`` that sites will connect to.
    quorum : int
        Least number of sites in any aggregate.
    now : datetime
        The time.

    Raises
    ------
    MembershipError
        There is a consortium already, or a value cannot be.
    """
    if (folder / "manifest.json").exists():
        raise MembershipError(f"there is a consortium in {folder} already: choose another folder", "exists")
    try:
        manifest = Manifest(consortium=name, epoch=1, issued=now.replace(microsecond=0), edge=edge, quorum=quorum)
    except ValidationError as error:
        first = error.errors()[0]
        raise MembershipError(
            f"{first['loc'][0]} cannot be {first['input']!r}: a name has lower-case letters, digits and hyphens, the "
            "edge is HOST:PORT, the quorum at least 1",
            "value",
        ) from None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    key, signing = new_node_key(), generate_key()
    certificate = issue_authority(name, key, now)
    write_atomic(folder / "authority.key", tls_pem(key), 0o600)
    write_atomic(folder / "manifest.key", private_pem(signing), 0o600)
    write_atomic(folder / "authority.pem", certificate.public_bytes(Encoding.PEM))
    authority = Authority(folder, certificate, key, signing)
    authority.publish(manifest)  # last, because it is what says that the consortium is there
    return authority


def open_authority(folder: Path, now: datetime) -> Authority:
    """Open a consortium's folder.

    Raises
    ------
    MembershipError
        There is none, others could have read its keys, or its parts do not belong together.
    """
    if not (folder / "manifest.json").exists():
        raise MembershipError(
            f"there is no consortium in {folder}: make one with `wardround-study found NAME --edge HOST:PORT`, or "
            "say where it is with --consortium",
            "missing",
        )
    key = load_tls_private(read_secret(folder / "authority.key"))
    signing = load_private_key(read_secret(folder / "manifest.key"))
    certificate = load_certificate((folder / "authority.pem").read_text())
    must_be_valid(certificate, now)
    if not same_key(certificate, public_pem(key)):
        raise MembershipError(f"{folder}: authority.pem is not the certificate of authority.key", "other-key")
    return Authority(folder, certificate, key, signing)


def read_secret(path: Path) -> bytes:
    """Read a private key, and refuse one that others could have read.

    Raises
    ------
    MembershipError
        The file is missing, belongs to somebody else, or has a mode other than 0600.
    """
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid == os.geteuid() and not exposed(status.st_mode):
                return file.read()
    except OSError as error:
        raise MembershipError(f"{path} cannot be read: {error.strerror}", "missing-key") from None
    raise MembershipError(
        f"{path} must belong to the user of this process and be readable by nobody else (its mode is "
        f"{status.st_mode & 0o777:04o}): if nobody has read it, `chmod 600` it; otherwise begin a new consortium",
        "exposed-key",
    )


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep other programs from changing the same consortium: two of them would sign two manifests of one epoch.

    Raises
    ------
    MembershipError
        Another one is at work.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise MembershipError("another command is changing this consortium: wait until it has ended") from None
        yield
    finally:
        os.close(descriptor)
