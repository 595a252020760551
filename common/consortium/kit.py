"""A kit: what a site gets back for its request. It holds no secret, and may travel by e-mail."""

from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.canonical import sha256_hex
from common.consortium.certificates import issued_by, load_certificate, must_be_valid, same_key, subject
from common.consortium.fingerprint import fingerprint
from common.consortium.format import Name, Pem, Strict
from common.consortium.manifest import Manifest, Member, SignedManifest
from common.errors import MembershipError, SignatureError
from common.signing import load_public_key

__all__ = ["Kit", "consortium_fingerprint", "serial"]


def serial(certificate: x509.Certificate) -> str:
    """Return a certificate's serial number as nginx and OpenSSL print it: hex, whole bytes."""
    digits = f"{certificate.serial_number:X}"
    return digits.zfill(len(digits) + len(digits) % 2)


def consortium_fingerprint(authority: x509.Certificate, key: str) -> str:
    """Return what a site trusts a consortium by: who issues its certificates, and who signs its manifests."""
    return fingerprint({"authority": sha256_hex(authority.public_bytes(Encoding.DER)), "key": key})


class Kit(Strict):
    """What makes a site a member.

    Attributes
    ----------
    site : str
        Whom the kit is for.
    authority : str
        The consortium's own certificate (PEM), which issues all others.
    key : str
        The public key (PEM) that signs manifests.
    certificate : str
        The site's certificate (PEM).
    manifest : SignedManifest
        Who belongs, and what may run.
    """

    site: Name
    authority: Pem
    key: Pem
    certificate: Pem
    manifest: SignedManifest

    @property
    def fingerprint(self) -> str:
        """What the site's administrator and the coordinator compare."""
        return consortium_fingerprint(load_certificate(self.authority), self.key)

    def checked(self, now: datetime) -> tuple[Manifest, Member]:
        """Return the manifest, and the site's entry in it.

        Raises
        ------
        MembershipError
            The parts do not belong together, or the certificate does not count (any more).
        """
        try:
            manifest = self.manifest.checked(load_public_key(self.key.encode()))
        except SignatureError as error:
            raise MembershipError(f"the kit's key that signs manifests is {error}", "key") from None
        authority, certificate = load_certificate(self.authority), load_certificate(self.certificate)
        if not issued_by(authority, authority) or subject(authority) != manifest.consortium:
            raise MembershipError("the kit's authority is not the consortium's own", "authority")
        must_be_valid(authority, now)
        if not issued_by(certificate, authority):
            raise MembershipError("the kit's certificate was issued by another authority", "authority")
        if subject(certificate) != self.site:
            raise MembershipError(f"the kit's certificate is for {subject(certificate)}, not {self.site}", "name")
        must_be_valid(certificate, now)
        member = manifest.member(self.site)
        if member is None:
            raise MembershipError(
                f"{self.site} is not in the manifest (epoch {manifest.epoch}): the coordinator has revoked it",
                "revoked",
            )
        if member.serial != serial(certificate) or not same_key(certificate, member.tls):
            raise MembershipError(
                "the kit's certificate is not the one in the manifest: it was replaced by a newer one", "revoked"
            )
        return manifest, member
