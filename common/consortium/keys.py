"""The three private keys of a site, as bytes: TLS (P-256), Flower node (P-384), identity (Ed25519).

Keys are made where they are used: nothing here sends or stores one.
"""

from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
    load_ssh_private_key,
)

from common.errors import MembershipError
from common.signing import signed_bytes

__all__ = [
    "ec_public",
    "exposed",
    "load_node_private",
    "load_tls_private",
    "new_node_key",
    "new_tls_key",
    "node_openssh",
    "openssh_public",
    "prove",
    "proven",
    "public_pem",
    "tls_pem",
]

_CURVES = ("secp256r1", "secp384r1")


def new_tls_key() -> EllipticCurvePrivateKey:
    """Return a new P-256 key for TLS."""
    return ec.generate_private_key(ec.SECP256R1())


def new_node_key() -> EllipticCurvePrivateKey:
    """Return a new P-384 key for Flower's authentication of SuperNodes."""
    return ec.generate_private_key(ec.SECP384R1())


def tls_pem(key: EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted PKCS #8 PEM, which every TLS library reads."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_openssh(key: EllipticCurvePrivateKey) -> bytes:
    """Return a private key as unencrypted OpenSSH text: Flower reads no other form."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def openssh_public(pem: str) -> bytes:
    """Return a public key as the line that `flwr supernode register` reads."""
    return ec_public(pem).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n"


def load_tls_private(data: bytes) -> EllipticCurvePrivateKey:
    """Read a private key that `tls_pem` wrote.

    Raises
    ------
    MembershipError
        The bytes are not one.
    """
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise MembershipError("not an unencrypted P-256 or P-384 private key in PEM form", "key")
    return key


def load_node_private(data: bytes) -> EllipticCurvePrivateKey:
    """Read a private key that `node_openssh` wrote.

    Raises
    ------
    MembershipError
        The bytes are not one.
    """
    try:
        key = load_ssh_private_key(data, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or key.curve.name != "secp384r1":
        raise MembershipError("not an unencrypted P-384 private key in OpenSSH form", "key")
    return key


def ec_public(pem: str) -> EllipticCurvePublicKey:
    """Read a P-256 or P-384 public key.

    Raises
    ------
    MembershipError
        The text is not one.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or key.curve.name not in _CURVES or public_pem(key) != pem:
        raise MembershipError("not a P-256 or P-384 public key in PEM form, or more than that", "key")
    return key


def public_pem(key: EllipticCurvePrivateKey | EllipticCurvePublicKey) -> str:
    """Return a public key, or that of a private one, as the one PEM text that is taken for it."""
    public = key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def prove(key: EllipticCurvePrivateKey, purpose: str, value: Any) -> str:
    """Return the ECDSA signature, in hex, by which the holder of a private key says a value."""
    return key.sign(signed_bytes(purpose, value), ec.ECDSA(hashes.SHA384())).hex()


def proven(key: EllipticCurvePublicKey, purpose: str, value: Any, signature: str) -> bool:
    """Say whether a signature is one that `prove` made."""
    try:
        key.verify(bytes.fromhex(signature), signed_bytes(purpose, value), ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def exposed(mode: int) -> bool:
    """Say whether a file's mode lets anybody but its owner read or change it."""
    return mode & 0o077 != 0
