"""Reading certificates: whose they are, who issued them, how long they last. The clock is passed in."""

from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from common.errors import MembershipError

__all__ = [
    "days_left",
    "issued_by",
    "load_certificate",
    "must_be_valid",
    "public_key_pem",
    "same_key",
    "subject",
    "warning",
]

#: Days before a certificate's end from which a warning is given, and again.
_WARN = (30, 7, 1)


def load_certificate(pem: str) -> x509.Certificate:
    """Read one certificate with an elliptic key.

    Raises
    ------
    MembershipError
        The text is not one.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem.encode())
        # Certificates are parsed as they are asked: what cannot be read is to be found out here.
        elliptic = isinstance(certificate.public_key(), EllipticCurvePublicKey)
        plain = certificate.public_bytes(Encoding.PEM).decode() == pem  # and nothing beside it
        readable = elliptic and plain and subject(certificate) != ""
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        readable = False
    if not readable:
        raise MembershipError("not a certificate with an elliptic key in PEM form", "certificate")
    return certificate


def subject(certificate: x509.Certificate) -> str:
    """Return the common name that a certificate is for."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def public_key_pem(certificate: x509.Certificate) -> str:
    """Return a certificate's public key as PEM."""
    return certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def same_key(certificate: x509.Certificate, pem: str) -> bool:
    """Say whether a certificate is for a public key."""
    return public_key_pem(certificate).strip() == pem.strip()


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Say whether an authority issued a certificate itself."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
        return False
    return True


def must_be_valid(certificate: x509.Certificate, now: datetime) -> None:
    """Check a certificate's dates.

    Raises
    ------
    MembershipError
        It has ended, or has not begun.
    """
    name, begin, end = subject(certificate), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now < begin:
        raise MembershipError(
            f"the certificate of {name} begins on {begin:%Y-%m-%d %H:%M} UTC, and the clock here says "
            f"{now:%Y-%m-%d %H:%M}: set this machine's clock",
            "not-yet-valid",
        )
    if now >= end:
        raise MembershipError(
            f"the certificate of {name} ended on {end:%Y-%m-%d %H:%M} UTC: the coordinator runs "
            "`wardround-study renew`, and the site joins with the new kit",
            "expired",
        )


def days_left(certificate: x509.Certificate, now: datetime) -> float:
    """Return the number of days until a certificate's end; negative afterwards."""
    return (certificate.not_valid_after_utc - now).total_seconds() / 86400


def warning(days: float) -> str:
    """Return what to say about a certificate with so many days left; nothing while there is time.

    The sentence changes at 30, 7 and 1 days, so that whoever is told of changes is told three times.
    """
    if days < 0:
        return "has ended"
    steps = [step for step in _WARN if days <= step]
    return f"ends within {min(steps)} day{'s' * (min(steps) > 1)}" if steps else ""
