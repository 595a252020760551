"""Take the one image out of a WADO-RS answer, byte by byte as sent, without holding it in memory.

dicomweb-client would give a decoded dataset: other bytes than the PACS sent once written again, the whole image in
memory, and a deflated file inflated without a limit.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from email.message import Message
from itertools import chain, islice

__all__ = ["MultipartError", "only_part"]

_LONGEST_HEAD = 1 << 16  # bytes


class MultipartError(Exception):
    """An answer is not one whole image."""


def only_part(content_type: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of the only part of a ``multipart/related`` message (RFC 2046).

    Parameters
    ----------
    content_type : str
        The answer's Content-Type. Some servers send ``application/dicom`` without an envelope.
    pieces : iterable of bytes
        The answer's body.

    Raises
    ------
    MultipartError
        There is no part, more than one, or the closing delimiter is missing: the answer was cut off.
    """
    header = Message()
    header["Content-Type"] = content_type
    boundary = header.get_boundary()
    body = iter(pieces)
    if header.get_content_type() == "application/dicom":
        yield from body
        return
    if header.get_content_type() != "multipart/related" or not boundary:
        raise MultipartError("no image")
    delimiter = b"\r\n--" + boundary.encode("latin-1", "replace")
    held = _after_head(delimiter, body)
    overlap = len(delimiter) - 1  # a delimiter may lie across two pieces
    for piece in chain((b"",), body):
        held += piece
        end = held.find(delimiter)
        if end >= 0:
            yield held[:end]
            _expect_end(held[end + len(delimiter) :], body)
            return
        if len(held) > overlap:
            yield held[:-overlap]
            held = held[-overlap:]
    raise MultipartError("broken answer")


def _after_head(delimiter: bytes, body: Iterator[bytes]) -> bytes:
    """Read up to the part's content and return what of the content has been read."""
    held = b"\r\n"  # the first delimiter may stand at the very beginning
    for piece in body:
        held += piece
        begin = held.find(delimiter)
        end = held.find(b"\r\n\r\n", begin + len(delimiter)) if begin >= 0 else -1
        if end >= 0:
            return held[end + 4 :]
        if len(held) > _LONGEST_HEAD:
            break
    raise MultipartError("broken answer")


def _expect_end(rest: bytes, body: Iterator[bytes]) -> None:
    for piece in body:
        rest += piece
        if len(rest) >= 2:
            break
    if not rest.startswith(b"--"):
        raise MultipartError("broken answer" if len(rest) < 2 else "several images")
    deque(islice(body, 4), maxlen=0)  # read to the end, or the connection could not be used again
