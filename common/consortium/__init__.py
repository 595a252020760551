"""What a consortium's coordinator and its sites exchange before anything else: keys, requests, the manifest, kits.

Pure formats: who makes which key and where it lies is `client.membership`'s and `server.consortium`'s business.
"""

from common.consortium.certificates import (
    days_left,
    issued_by,
    load_certificate,
    must_be_valid,
    public_key_pem,
    same_key,
    subject,
    warning,
)
from common.consortium.fingerprint import fingerprint, matches
from common.consortium.kit import Kit, consortium_fingerprint, serial
from common.consortium.manifest import Manifest, Member, SignedManifest
from common.consortium.request import Request, SignedRequest

__all__ = [
    "Kit",
    "Manifest",
    "Member",
    "Request",
    "SignedManifest",
    "SignedRequest",
    "consortium_fingerprint",
    "days_left",
    "fingerprint",
    "issued_by",
    "load_certificate",
    "matches",
    "must_be_valid",
    "public_key_pem",
    "same_key",
    "serial",
    "subject",
    "warning",
]
