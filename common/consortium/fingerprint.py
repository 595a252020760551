"""Fingerprints that two people compare over the telephone."""

import re
from typing import Any

from common.canonical import canonical_json, sha256_hex
from common.errors import MembershipError

__all__ = ["fingerprint", "matches"]

_DIGITS = 40


def fingerprint(value: Any) -> str:
    """Return 160 bits of a value's digest as ten groups of four digits: nobody finds a second value that has them."""
    digits = sha256_hex(b"wardround/1 fingerprint\n" + canonical_json(value))[:_DIGITS]
    return " ".join(digits[i : i + 4] for i in range(0, _DIGITS, 4))


def matches(told: str, found: str) -> bool:
    """Say whether what a person was told is a fingerprint; spaces, colons, dashes and case do not matter.

    Raises
    ------
    MembershipError
        What was told is not a whole fingerprint.
    """
    digits = re.sub(r"[\s:-]", "", told).lower()
    if not re.fullmatch(f"[0-9a-f]{{{_DIGITS}}}", digits):
        raise MembershipError(
            f"a fingerprint has {_DIGITS} digits from 0-9 and a-f; all of them must be compared", "fingerprint"
        )
    return digits == found.replace(" ", "")
