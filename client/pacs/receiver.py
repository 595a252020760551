"""Receive images that a PACS sends: a DICOM storage service (C-STORE SCP) with an allow-list of senders."""

import errno
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from pynetdicom import (
    AE,
    ALL_TRANSFER_SYNTAXES,
    AllStoragePresentationContexts,
    evt,
)
from pynetdicom.association import Association
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import encode_file_meta
from pynetdicom.pdu import P_DATA_TF

from client.pacs.intake import MAX_BYTES, Intake, holds_pixels, open_intake
from common.errors import DataError
from common.quiet import quiet

__all__ = ["ReceiveReport", "Receiver", "Tls", "receiver"]

_VERIFICATION = "1.2.840.10008.1.1"  # C-ECHO
_SUCCESS, _OUT_OF_RESOURCES = 0x0000, 0xA700  # PS3.4 table B.2-1
_PDU_BYTES = 1 << 17  # larger than the usual 16 kB: fewer turns of a slow loop for each image
_HANDSHAKE_SECONDS = 30.0


@dataclass(frozen=True)
class Tls:
    """What the receiver shows, and whom it believes.

    Attributes
    ----------
    certificate, key : Path
        The receiver's own, in PEM form.
    ca : Path, optional
        Only senders with a certificate of this authority may connect. Without it anybody may who knows an
        allowed AE title: the images are encrypted on their way, but the sender is not authenticated.
    """

    certificate: Path
    key: Path
    ca: Path | None = None


@dataclass(frozen=True)
class ReceiveReport:
    """What arrived so far, in images.

    Attributes
    ----------
    new, same, replaced : int
        Images not there before, there with the same bytes (left alone), and there with others (replaced: a PACS
        that corrects a header sends the image again under its old UID, and the last one counts).
    refused : mapping of str to int
        Images answered with a failure, and associations of senders that are not on the list, by reason.
    """

    new: int
    same: int
    replaced: int
    refused: Mapping[str, int]


class Receiver:
    """A running receiver; made by :func:`receiver`.

    Attributes
    ----------
    port : int
        The TCP port it listens on.
    """

    def __init__(self, intake: Intake, max_bytes: int) -> None:
        self.port = 0
        self._intake, self._max_bytes = intake, max_bytes
        self._state = threading.Condition()
        self._count: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._receiving: dict[object, int] = {}  # association -> bytes of the image under way

    @property
    def report(self) -> ReceiveReport:
        """What arrived so far."""
        with self._state:
            count = self._count
            return ReceiveReport(count["new"], count["same"], count["replaced"], dict(self._refused))

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until no image is under way, or until the time is over."""
        with self._state:
            self._state.wait_for(lambda: not self._receiving, timeout=seconds)

    def on_data(self, event: evt.Event) -> None:
        """Count the bytes of an image as they arrive, and drop those over the limit before they take memory."""
        if not isinstance(event.pdu, P_DATA_TF):
            return
        for item in event.pdu.presentation_data_value_items:
            data = item.presentation_data_value or b"\x01"  # its first byte says what follows: a command or an image
            is_image = not data[0] & 1
            with self._state:
                size = self._receiving.get(event.assoc, 0) + is_image * (len(data) - 1)
                self._receiving[event.assoc] = size
            if size > self._max_bytes and is_image:
                item.presentation_data_value = data[:1]

    def on_answer(self, event: evt.Event) -> None:
        """Note that an image, or an echo, has been answered."""
        if isinstance(event.pdu, P_DATA_TF):
            _acknowledge(event.assoc)
            self.on_end(event)

    def on_end(self, event: evt.Event) -> None:
        """Note that nothing is under way in this association any more."""
        with self._state:
            self._receiving.pop(event.assoc, None)
            self._state.notify_all()

    def on_stranger(self, _event: evt.Event) -> None:
        """Count an association that was not accepted."""
        with self._state:
            self._refused["sender not on the list"] += 1

    def on_store(self, event: evt.Event) -> int:
        """Write one image and return the status to answer."""
        with self._state:
            size = self._receiving.get(event.assoc, 0)
        if size > self._max_bytes:
            outcome = "too large"
        else:
            try:
                outcome = self._keep(event)
            except OSError as error:
                outcome = "disk full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "cannot write"
            except Exception:
                outcome = "malformed"  # pynetdicom would log what went wrong, header values and all
        with self._state:
            kept = outcome in {"new", "same", "replaced"}
            (self._count if kept else self._refused)[outcome] += 1
        return _SUCCESS if kept else _OUT_OF_RESOURCES

    def _keep(self, event: evt.Event) -> str:
        request = cast(C_STORE, event.request)
        uid = str(request.AffectedSOPInstanceUID)
        path = self._intake.path(uid[-2:].rjust(2, "0"), uid)
        head = b"\x00" * 128 + b"DICM" + encode_file_meta(event.file_meta)
        image = cast(BytesIO, request.DataSet).getbuffer()  # not decoded, and not copied either
        existed = path.exists()
        if existed and _holds(path, head, image):
            return "same"
        with self._intake.writing(path) as file:
            file.write(head)
            file.write(image)
        return "replaced" if existed else "new"


@contextmanager
def receiver(
    into: Path,
    *,
    aet: str,
    allow: Collection[str],
    port: int,
    bind: str = "127.0.0.1",
    tls: Tls | None = None,
    max_bytes: int = MAX_BYTES,
    grace: float = 30.0,
) -> Iterator[Receiver]:
    """Receive images for as long as the context lasts.

    Images are written byte by byte as sent, in any transfer syntax, without being decoded; an image has been
    written durably before the sender hears of success. The end waits for images under way.

    Parameters
    ----------
    into : Path
        Folder for ``<shard>/<image>.dcm``, names being hashes; made if missing.
    aet : str
        This receiver's AE title; senders must call it by this name.
    allow : collection of str
        AE titles that may send.
    port : int
        TCP port; 0 for any free one.
    bind : str
        Address to listen on.
    tls : Tls, optional
        Encrypt, and authenticate senders where it names an authority. An AE title by itself proves nothing.
    max_bytes : int
        Largest image, in bytes; what is larger is refused and takes no memory.
    grace : float
        Seconds that the end waits for images under way.

    Raises
    ------
    DataError
        The folder, the address, an AE title or a certificate cannot be used.
    """
    if not allow:
        raise DataError("nobody may send: name at least one AE title")
    with open_intake(into) as intake, quiet("pynetdicom"):
        this = Receiver(intake, max_bytes)
        try:
            entity = AE(aet)
            entity.require_called_aet = True
            entity.require_calling_aet = list(allow)
        except (TypeError, ValueError):
            raise DataError("an AE title is 1 to 16 ASCII characters without a backslash") from None
        entity.maximum_pdu_size = _PDU_BYTES
        entity.add_supported_context(_VERIFICATION)
        for context in AllStoragePresentationContexts:
            if holds_pixels(str(context.abstract_syntax)):
                entity.add_supported_context(str(context.abstract_syntax), ALL_TRANSFER_SYNTAXES)
        server = _start(entity, this, (bind, port), tls)
        this.port = server.server_address[1]
        try:
            yield this
        finally:
            server.shutdown()
            this.wait_until_idle(grace)
            entity.shutdown()


def _start(entity: AE, this: Receiver, address: tuple[str, int], tls: Tls | None) -> Any:
    handlers: list[evt.EventHandlerType] = [
        (evt.EVT_C_STORE, this.on_store),
        (evt.EVT_PDU_RECV, this.on_data),
        (evt.EVT_PDU_SENT, this.on_answer),
        (evt.EVT_CONN_CLOSE, this.on_end),
        (evt.EVT_REJECTED, this.on_stranger),
    ]
    try:
        context = None if tls is None else _tls_context(tls)
    except OSError:  # ssl.SSLError is one
        raise DataError("the TLS certificate, key or authority cannot be used: they must be PEM, and fit") from None
    try:
        return entity.start_server(address, block=False, ssl_context=context, evt_handlers=handlers)
    except OSError as error:
        raise DataError(f"cannot listen on {address[0]} port {address[1]}: {error.strerror}") from None


def _acknowledge(association: Association) -> None:
    """Acknowledge at once what comes next.

    Senders write an image in pieces and hold the second back until the first is acknowledged (Nagle's algorithm);
    the kernel takes 40 ms over that, for every image, unless it is told anew every time.
    """
    connection = association.dul.socket
    if connection is not None and connection.socket is not None and hasattr(socket, "TCP_QUICKACK"):
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


class _Context(ssl.SSLContext):
    """Leaves the handshake to each connection's own thread: else one silent peer would hold up all others."""

    def wrap_socket(self, sock: socket.socket, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        sock.settimeout(_HANDSHAKE_SECONDS)
        return super().wrap_socket(sock, *args, **kwargs | {"do_handshake_on_connect": False})


def _tls_context(tls: Tls) -> ssl.SSLContext:
    context = _Context(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(tls.certificate, tls.key)
    if tls.ca is not None:
        context.load_verify_locations(tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _holds(path: Path, head: bytes, image: memoryview) -> bool:
    if path.stat().st_size != len(head) + len(image):
        return False
    with path.open("rb") as file:
        if file.read(len(head)) != head:
            return False
        return all(file.read(1 << 20) == image[at : at + (1 << 20)] for at in range(0, len(image), 1 << 20))
