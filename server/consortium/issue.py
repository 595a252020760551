"""Issuing certificates. The clock is passed in; keys come as public keys, but for the authority's own."""

import ipaddress
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

__all__ = ["AUTHORITY_DAYS", "SERVER_DAYS", "SITE_DAYS", "issue_authority", "issue_server", "issue_site"]

#: Days that certificates last.
AUTHORITY_DAYS, SITE_DAYS, SERVER_DAYS = 3650, 365, 90

#: Clocks of sites may be behind the coordinator's.
_SKEW = timedelta(minutes=10)


def issue_authority(name: str, key: EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """Return a consortium's own certificate, which can issue certificates for sites and servers and nothing else."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _begin(subject, subject, key.public_key(), key.public_key(), now, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def issue_site(
    authority: tuple[x509.Certificate, EllipticCurvePrivateKey],
    site: str,
    public: EllipticCurvePublicKey,
    now: datetime,
    days: float = SITE_DAYS,
) -> x509.Certificate:
    """Return a certificate with which a site shows the edge who it is; it is of no use to a server."""
    issuer, key = authority
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    return (
        _begin(subject, issuer.subject, public, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .sign(key, hashes.SHA384())
    )


def issue_server(
    authority: tuple[x509.Certificate, EllipticCurvePrivateKey],
    hosts: list[str],
    public: EllipticCurvePublicKey,
    now: datetime,
    days: float = SERVER_DAYS,
) -> x509.Certificate:
    """Return a certificate for a server that answers under some names or addresses."""
    issuer, key = authority
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0])])
    return (
        _begin(subject, issuer.subject, public, key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general(host) for host in hosts]), critical=False)
        .sign(key, hashes.SHA384())
    )


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    public: EllipticCurvePublicKey,
    by: EllipticCurvePublicKey,
    now: datetime,
    days: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
