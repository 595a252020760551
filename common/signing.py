"""Ed25519 signatures (RFC 8032) over canonical JSON."""

from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from common.canonical import canonical_json
from common.errors import SignatureError

__all__ = [
    "generate_key",
    "load_private_key",
    "load_public_key",
    "private_pem",
    "public_pem",
    "sign",
    "signed_bytes",
    "verify",
]

# A signature made for one purpose must not verify for another.
_CONTEXT = b"wardround/1 "


def generate_key() -> Ed25519PrivateKey:
    """Return a new private key from the operating system's generator."""
    return Ed25519PrivateKey.generate()


def private_pem(key: Ed25519PrivateKey) -> bytes:
    """Return a private key as unencrypted PKCS #8 PEM."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Ed25519PublicKey) -> bytes:
    """Return a public key as PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def load_private_key(pem: bytes) -> Ed25519PrivateKey:
    """Read an Ed25519 private key.

    Raises
    ------
    SignatureError
        The bytes are not an unencrypted Ed25519 private key in PEM.
    """
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError("not an unencrypted Ed25519 private key in PEM form")
    return key


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """Read an Ed25519 public key.

    Raises
    ------
    SignatureError
        The bytes are not an Ed25519 public key in PEM.
    """
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError("not an Ed25519 public key in PEM form")
    return key


def sign(key: Ed25519PrivateKey, purpose: str, value: Any) -> bytes:
    """Return the 64-byte signature of a value's canonical JSON, bound to one purpose."""
    return key.sign(signed_bytes(purpose, value))


def verify(key: Ed25519PublicKey, purpose: str, value: Any, signature: bytes) -> None:
    """Check a signature made by `sign`.

    Raises
    ------
    SignatureError
        The signature is not this key's signature of this value for this purpose.
    """
    try:
        key.verify(signature, signed_bytes(purpose, value))
    except InvalidSignature:
        raise SignatureError(
            f"the signature of the {purpose} does not verify: the {purpose} or its signature was changed, "
            "or another key signed it"
        ) from None


def signed_bytes(purpose: str, value: Any) -> bytes:
    """Return what a signature for one purpose is made over."""
    return _CONTEXT + purpose.encode() + b"\n" + canonical_json(value)
