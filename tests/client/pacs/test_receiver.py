"""The storage service: whom it lets in, what it keeps, and what it says (nothing)."""

import errno
import gc
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.uid import (
    BasicTextSRStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)
from pynetdicom import AE, evt
from pynetdicom.association import Association

from client.pacs.receiver import Receiver, Tls, receiver
from common.errors import DataError
from tests.client.pacs.certificate import certificate
from tests.client.pacs.sender import keep_answers
from tests.ports import free_port

# pynetdicom lets go of a socket without closing it where its peer was quicker to hang up.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <(socket|ssl):ResourceWarning")

CANARIES = ("Kowalska", "1.2.840.77")


@pytest.fixture(autouse=True)
def _nothing_is_told(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test of this file may print or log who was received, with every logger at its loudest."""
    caplog.set_level("DEBUG")
    yield
    gc.collect()  # such sockets now, not in the middle of another file's tests
    said = "".join(capfd.readouterr()) + "".join(map(logging.Formatter().format, caplog.get_records("call")))
    assert not any(canary in said for canary in CANARIES)


def image(number: int, *, value: int = 0, syntax: str = ExplicitVRLittleEndian, size: int = 16) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPInstanceUID, dataset.SOPClassUID = f"1.2.840.77.{number}", CTImageStorage
    dataset.PatientName, dataset.PatientID = "Kowalska^Zofia", "Kowalska"
    dataset.Rows = dataset.Columns = size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelData = np.full((size, size), value, np.uint8).tobytes()
    if syntax == RLELossless:
        dataset.compress(RLELossless, generate_instance_uid=False)
    return dataset


def associate(
    running: Receiver,
    *,
    aet: str = "PACS",
    called: str = "WARD",
    kind: str = CTImageStorage,
    tls: tuple[ssl.SSLContext, str] | None = None,
) -> Association:
    entity = AE(aet)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = 60
    for syntax in (ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless):
        entity.add_requested_context(kind, syntax)
    entity.add_requested_context("1.2.840.10008.1.1")
    return keep_answers(entity.associate("127.0.0.1", running.port, ae_title=called, tls_args=tls))


def send(running: Receiver, *images: Dataset) -> list[int]:
    association = associate(running)
    assert association.is_established
    statuses = [association.send_c_store(image).Status for image in images]
    association.release()
    return statuses


def kept(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_bytes_are_kept_as_sent(tmp_path: Path) -> None:
    images = [image(1, value=7), image(2, value=9, syntax=RLELossless)]
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        assert send(running, *images) == [0, 0]
        assert running.report.new == 2
    found = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, kept(tmp_path / "in"))}
    for sent in images:
        got = found.pop(sent.SOPInstanceUID)
        assert got.file_meta.TransferSyntaxUID == sent.file_meta.TransferSyntaxUID
        assert got == sent
        assert got.PixelData == sent.PixelData
    assert not found
    assert not any(canary in str(file) for file in tmp_path.rglob("*") for canary in CANARIES)


@pytest.mark.parametrize(("aet", "called"), [("STRANGER", "WARD"), ("PACS", "OTHER")])
def test_strangers_stay_out(tmp_path: Path, aet: str, called: str) -> None:
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS", "CT1"], port=0) as running:
        assert associate(running, aet=aet, called=called).is_rejected
        friend = associate(running, aet="CT1")
        assert friend.send_c_echo().Status == 0
        friend.release()
        assert running.report.refused == {"sender not on the list": 1}


def test_reports_are_not_accepted(tmp_path: Path) -> None:
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        association = associate(running, kind=BasicTextSRStorage)
        assert [str(c.abstract_syntax) for c in association.accepted_contexts] == ["1.2.840.10008.1.1"]
        association.release()


def test_the_same_again_is_left_alone_and_a_correction_replaces(tmp_path: Path) -> None:
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        send(running, image(1))
        (file,) = kept(tmp_path / "in")
        before = file.stat()
        send(running, image(1))
        assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
        send(running, image(1, value=5))
        report = running.report
        assert (report.new, report.same, report.replaced) == (1, 1, 1)
    assert kept(tmp_path / "in") == [file]
    assert set(pydicom.dcmread(file).PixelData) == {5}


def test_what_is_too_large_is_refused_and_the_next_goes_on(tmp_path: Path) -> None:
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0, max_bytes=300_000) as running:
        assert send(running, image(1, size=1024), image(2)) == [0xA700, 0]
        assert (running.report.new, running.report.refused) == (1, {"too large": 1})
    assert len(kept(tmp_path / "in")) == 1


def test_what_is_too_large_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    store = Receiver.on_store

    def watch(this: Receiver, event: evt.Event) -> int:
        sizes.append(len(event.encoded_dataset(include_meta=False)))
        return store(this, event)

    monkeypatch.setattr(Receiver, "on_store", watch)
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0, max_bytes=300_000) as running:
        send(running, image(1, size=1024))
    assert sizes[0] <= 300_000


def test_a_full_disk_is_answered_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            assert send(running, image(1)) == [0xA700]
        assert [file for file in tmp_path.rglob("*") if file.is_file()] == []
        assert send(running, image(1)) == [0]
        assert (running.report.new, running.report.refused) == (1, {"disk full": 1})


def test_the_end_waits_for_the_image_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writing, go_on = threading.Event(), threading.Event()
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        writing.set()
        go_on.wait(60)
        fsync(descriptor)

    statuses: list[int] = []
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        association = associate(running)
        monkeypatch.setattr(os, "fsync", slow)
        sender = threading.Thread(target=lambda: statuses.append(association.send_c_store(image(1)).Status))
        sender.start()
        assert writing.wait(60)
        threading.Timer(1.5, go_on.set).start()
    sender.join()
    assert statuses == [0]
    assert len(kept(tmp_path / "in")) == 1
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", running.port))


def test_sigterm_ends_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    command = "import typer; from client.pacs.cli import receive; typer.run(receive)"
    arguments = ["--into", str(tmp_path / "in"), "--aet", "WARD", "--port", str(port), "--allow", "PACS, CT1", "--json"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    said = process.stderr.readline()
    assert "not authenticated" in said
    said += process.stderr.readline()
    assert f"listening on 127.0.0.1 port {port}" in said
    there = Receiver.__new__(Receiver)
    there.port = port
    with caplog.at_level(logging.CRITICAL, logger="pynetdicom"):  # the sender here, not the receiver there
        assert send(there, image(1), image(1)) == [0, 0]
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert '"new": 1' in out
    assert '"same": 1' in out
    assert not any(canary in said + out + err for canary in CANARIES)


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ({"aet": "WARD", "allow": []}, "at least one AE title"),
        ({"aet": "MUCH TOO LONG A TITLE", "allow": ["PACS"]}, "1 to 16"),
        ({"aet": "WARD", "allow": ["A" * 17]}, "1 to 16"),
        ({"aet": "WARD", "allow": ["PACS"], "bind": "192.0.2.1"}, "cannot listen"),
        ({"aet": "WARD", "allow": ["PACS"], "tls": Tls(Path("none.pem"), Path("none.key"))}, "TLS"),
    ],
)
def test_what_cannot_be_started(tmp_path: Path, how: dict[str, object], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint), receiver(tmp_path / "in", port=0, **how):  # type: ignore[arg-type]
        pass


def test_tls_lets_in_who_has_a_certificate(tmp_path: Path) -> None:
    ours, friend, stranger = (certificate(tmp_path, name) for name in ("ours", "friend", "stranger"))
    tls = Tls(*ours, ca=friend[0])

    def context(who: tuple[Path, Path] | None) -> tuple[ssl.SSLContext, str]:
        made = ssl.create_default_context(cafile=str(ours[0]))
        if who is not None:
            made.load_cert_chain(*who)
        return made, "localhost"

    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0, tls=tls) as running:
        with socket.create_connection(("127.0.0.1", running.port)):  # says nothing: nobody may have to wait for it
            began = time.monotonic()
            association = associate(running, tls=context(friend))
            assert association.is_established
            assert time.monotonic() - began < 10
            assert association.send_c_store(image(1)).Status == 0
            association.release()
            assert not associate(running, tls=context(stranger)).is_established
            assert not associate(running, tls=context(None)).is_established
        assert not associate(running).is_established
        assert running.report.new == 1


@pytest.mark.parametrize("uid", ["1.2.840.77.Kowalska", "1.2.840.77." + "1" * 80, "1.2.840.77.007"])
def test_odd_uids_are_kept_or_refused_in_silence(tmp_path: Path, uid: str) -> None:
    odd = image(1)
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        odd.SOPInstanceUID = uid
        association = associate(running)
        try:
            association.send_c_store(odd)
        except ValueError:
            association.abort()  # the sender itself would not
        else:
            association.release()
        assert send(running, image(2)) == [0]
    assert 1 <= len(kept(tmp_path / "in")) <= 2


def test_garbage_does_not_end_it(tmp_path: Path) -> None:
    with receiver(tmp_path / "in", aet="WARD", allow=["PACS"], port=0) as running:
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\x00\x00\x00\x44" + bytes(68), b"\x04Kowalska" * 20):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(garbage)
        assert send(running, image(1)) == [0]
