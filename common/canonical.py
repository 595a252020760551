"""One byte form for every value that is hashed or signed."""

import hashlib
import json
from typing import Any

__all__ = ["canonical_json", "sha256_hex"]


def canonical_json(value: Any) -> bytes:
    """Return UTF-8 JSON with sorted keys and no white space; NaN and infinities are refused.

    Two equal values give the same bytes on every platform: floats are written in their shortest form that
    reads back exactly.

    Raises
    ------
    ValueError
        The value holds NaN, an infinity, or text that is not Unicode.
    TypeError
        The value holds something that JSON cannot express.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of some bytes as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
