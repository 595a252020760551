"""A pull against a PACS that misbehaves in every way we know of; the well-behaved one is in test_orthanc.py."""

import errno
import json
import logging
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
import typer
from hypothesis import assume, given
from hypothesis import strategies as st
from pydicom import Dataset, dcmwrite
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, EncapsulatedPDFStorage, ExplicitVRLittleEndian
from typer.testing import CliRunner

from client.pacs import cli
from client.pacs.dicomweb import PullReport, Source, pull
from client.pacs.intake import Intake, open_intake
from client.pacs.multipart import MultipartError, only_part
from client.pacs.query import Where
from common.errors import DataError
from tests.client.pacs.certificate import certificate

STUDY, SERIES = "1.2.840.1", "1.2.840.1.1"
CANARIES = ("Kowalska", "1.2.840")


def image(number: int) -> bytes:
    """Return a DICOM file."""
    dataset = Dataset()
    dataset.SOPInstanceUID, dataset.SOPClassUID = f"{SERIES}.{number}", CTImageStorage
    dataset.PatientName = "Kowalska^Zofia"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = BytesIO()
    dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def envelope(content: bytes, *, boundary: bytes = b"=-part", end: bytes = b"--\r\n") -> bytes:
    return b"--" + boundary + b"\r\nContent-Type: application/dicom\r\n\r\n" + content + b"\r\n--" + boundary + end


def attribute(tag: str, *found: object) -> dict[str, Any]:
    return {tag: {"vr": "UI", "Value": list(found)}}


class Pacs(BaseHTTPRequestHandler):
    """Three images; ``wrong`` changes how image 2 is answered, and ``pages`` whether offset is respected."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    asked: ClassVar[list[str]] = []
    pages = True
    modality = "CT"
    kind = CTImageStorage
    wrong: ClassVar[Callable[["Pacs"], None] | None] = None

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.asked.append(self.path)
        query = parse_qs(parts.query)
        names = parts.path.removeprefix("/dicom-web/").split("/")
        if names[0] != "studies":
            self.answer(404)
        elif len(names) == 6:
            number = int(names[5].rsplit(".", 1)[1])
            wrong = type(self).wrong
            if number == 2 and wrong is not None:
                wrong(self)
            else:
                self.give(envelope(image(number)))
        else:
            found = {
                1: [attribute("0020000D", STUDY) | attribute("00080061", "CT", "MR")],
                3: [attribute("0020000E", SERIES) | attribute("00080060", self.modality)],
                5: [attribute("00080018", f"{SERIES}.{n}") | attribute("00080016", self.kind) for n in (1, 2, 3)],
            }[len(names)]
            skip = int(query.get("offset", ["0"])[0]) if self.pages else 0
            self.answer(200, json.dumps(found[skip:]).encode(), "application/dicom+json")

    def give(self, body: bytes) -> None:
        self.answer(200, body, 'multipart/related; type="application/dicom"; boundary="=-part"')

    def answer(self, status: int, body: bytes = b"Kowalska", kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def pacs(*, tls: tuple[Path, Path] | None = None, **how: object) -> Iterator[Source]:
    """Run a PACS."""
    kind = type("Pacs", (Pacs,), how | {"asked": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        server.block_on_close = False  # it would wait for connections that the client has let go of
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            scheme = "http" if tls is None else "https"
            yield Source(f"{scheme}://localhost:{server.server_address[1]}/dicom-web")
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)


@pytest.fixture(autouse=True)
def _nothing_is_told(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test of this file may print or log who was pulled, with every logger at its loudest."""
    caplog.set_level("DEBUG")
    yield
    said = "".join(capfd.readouterr()) + "".join(map(logging.Formatter().format, caplog.get_records("call")))
    assert not any(canary in said for canary in CANARIES)


def files(folder: Path) -> list[bytes]:
    return sorted(file.read_bytes() for file in folder.rglob("*") if file.is_file())


def test_files_are_what_was_sent_byte_by_byte(tmp_path: Path) -> None:
    with pacs() as source:
        report = pull(source, tmp_path / "in", rate=1e6)
        assert (report.new, report.complete) == (3, True)
        assert files(tmp_path / "in") == sorted(image(n) for n in (1, 2, 3))
        assert not any(canary in str(file) for file in tmp_path.rglob("*") for canary in CANARIES)
        assert (tmp_path / "in").stat().st_mode & 0o077 == 0
        again = pull(source, tmp_path / "in", rate=1e6)
        assert (again.new, again.there, again.complete) == (0, 3, True)


def answers(status: int) -> Callable[[Pacs], None]:
    return lambda pacs: pacs.answer(status)


def cut_off(pacs: Pacs) -> None:
    """Close the connection in the middle of an answer without a length."""
    pacs.send_response(200)
    pacs.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary="=-part"')
    pacs.end_headers()
    pacs.wfile.write(envelope(image(2))[:-30])
    pacs.close_connection = True


def short(pacs: Pacs) -> None:
    """Promise more than is sent."""
    body = envelope(image(2))
    pacs.answer(200, body[:-30], 'multipart/related; boundary="=-part"', **{"Content-Length": str(len(body))})
    pacs.close_connection = True


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (answers(404), "gone"),
        (answers(406), "refused"),
        (answers(500), "broken answer"),
        (cut_off, "broken answer"),
        (short, "broken answer"),
        (lambda pacs: pacs.give(envelope(image(3))), "another image"),
        (lambda pacs: pacs.give(envelope(b"Kowalska" * 100)), "not DICOM"),
        (lambda pacs: pacs.give(envelope(b"")), "not DICOM"),
        (lambda pacs: pacs.give(envelope(image(2), end=b"\r\n\r\n") + envelope(image(3))), "broken answer"),
        (lambda pacs: pacs.give(envelope(image(2) + bytes(200_000))), "too large"),
        (lambda pacs: pacs.answer(200, b"{}", "application/json"), "broken answer"),
    ],
)
def test_one_bad_image_is_counted_and_the_rest_goes_on(
    tmp_path: Path, wrong: Callable[[Pacs], None], reason: str
) -> None:
    with pacs(wrong=wrong) as source:
        report = pull(source, tmp_path / "in", rate=1e6, max_bytes=100_000)
    assert (report.new, report.failed, report.complete) == (2, {reason: 1}, False)
    assert files(tmp_path / "in") == sorted(image(n) for n in (1, 3))


def test_a_busy_pacs_is_asked_again(tmp_path: Path) -> None:
    tries: list[int] = []

    def busy(pacs: Pacs) -> None:
        tries.append(1)
        pacs.answer(503) if len(tries) < 10 else pacs.give(envelope(image(2)))

    with pacs(wrong=busy) as source:
        assert pull(source, tmp_path / "in", rate=1e6).complete
    assert len(tries) == 10


def test_patience_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    with pacs() as source:
        pass  # it is gone now
    states: list[PullReport] = []
    with pytest.raises(DataError, match="has not answered for 20 s") as error:
        pull(source, tmp_path / "in", patience=20, progress=states.append)
    assert error.value.__suppress_context__  # what requests says holds the address, and with it UIDs
    assert [s.state for s in states] == ["searching"] + ["waiting"] * 5  # after 0.5, 1, 2, 4, 8 s
    assert now[0] == 15.5


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_end_it(tmp_path: Path, status: int) -> None:
    with pacs(wrong=answers(status)) as source, pytest.raises(DataError, match="refuses us") as error:
        pull(source, tmp_path / "in", rate=1e6)
    assert not any(canary in str(error.value) for canary in CANARIES)


def test_certificates_are_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, other = certificate(tmp_path, "ours"), certificate(tmp_path, "other")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(ours[0]))  # must not overrule what the command says
    with pacs(tls=ours) as source:
        for ca in (None, other[0]):
            with pytest.raises(DataError, match="certificate of the PACS is not to be trusted"):
                pull(replace(source, ca=ca), tmp_path / "in", rate=1e6)
        assert pull(replace(source, ca=ours[0]), tmp_path / "in", rate=1e6).complete


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cli.pull)
    with pacs(wrong=answers(404)) as source:
        arguments = [source.url, "--into", str(tmp_path / "in"), "--rate", "1000"]
        as_json = CliRunner().invoke(app, [*arguments, "--json"])
        plain = CliRunner().invoke(app, arguments)
    assert (as_json.exit_code, plain.exit_code) == (1, 1)
    said = json.loads(as_json.stdout)
    assert (said["new"], said["failed"], said["complete"]) == (2, {"gone": 1}, False)
    assert "0 images new, 2 already there\n  failed: 1 (gone)" in plain.stdout
    assert "not everything is there" in plain.stderr
    wrong = CliRunner().invoke(app, [source.url, "--into", str(tmp_path / "in"), "--where", "Kowalska"])
    assert wrong.exit_code == 1
    assert not any(canary in as_json.output + plain.output + wrong.output for canary in CANARIES)


def test_a_redirect_is_not_followed(tmp_path: Path) -> None:
    with (
        pacs(wrong=lambda p: p.answer(302, Location="http://elsewhere.example/Kowalska")) as source,
        pytest.raises(DataError, match="another address"),
    ):
        pull(source, tmp_path / "in", rate=1e6)


def test_an_address_that_is_not_dicomweb(tmp_path: Path) -> None:
    with pacs() as source, pytest.raises(DataError, match="root of its DICOMweb"):
        pull(Source(source.url + "x"), tmp_path / "in")


def test_a_full_disk_ends_it_and_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pacs() as source, monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match="disk is full"):
            pull(source, tmp_path / "in", rate=1e6)
    assert files(tmp_path / "in") == []


def test_a_pacs_without_pages_does_not_trap_us(tmp_path: Path) -> None:
    with pacs(pages=False) as source:
        assert pull(source, tmp_path / "in", rate=1e6).new == 3


def test_what_holds_no_pixels_stays(tmp_path: Path) -> None:
    with pacs(kind=EncapsulatedPDFStorage) as source:
        report = pull(source, tmp_path / "in", rate=1e6)
    assert (report.new, report.left_out, report.complete) == (0, {"no image": 3}, True)


def test_a_pacs_that_ignores_filters_gives_no_more(tmp_path: Path) -> None:
    with pacs(modality="MR") as source:
        report = pull(source, tmp_path / "in", where={"Modality": "CT"}, rate=1e6)
        assert (report.studies, report.new, report.left_out) == (1, 0, {"not shown to match": 1})
        report = pull(source, tmp_path / "in", where={"PatientID": "Kowalska"}, rate=1e6)
        assert (report.studies, report.new, report.left_out) == (0, 0, {"not shown to match": 1})


def test_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []
    monkeypatch.setattr(time, "sleep", paused.append)
    with pacs() as source:
        pull(source, tmp_path / "in", rate=0.01)
    assert [round(pause, -1) for pause in paused] == [0, 100, 100]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"url": "pacs.example"}, "must look like"),
        ({"url": "ftp://pacs.example/x"}, "must look like"),
        ({"url": "http://pacs.example/x"}, "readable by anyone"),
        ({"url": "https://me:secret@pacs.example/x"}, "password out of the address"),
        ({"url": "http://pacs.example/x", "plain_http": True, "token": "t"}, "not sent over http"),
        ({"url": "https://pacs.example/x", "token": "t", "user": ("u", "p")}, "not both"),
        ({"url": "https://pacs.example/x", "ca": Path("missing.pem")}, "not a file"),
    ],
)
def test_what_no_source_may_be(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as error:
        Source(**given)
    assert "secret" not in str(error.value)


def test_secrets_are_not_shown() -> None:
    assert "ssh!" not in repr(Source("https://pacs.example/x", token="ssh!"))
    assert "ssh!" not in repr(Source("https://pacs.example/x", user=("me", "ssh!")))


@given(content=st.binary(max_size=300), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_any_content_comes_out_of_any_pieces(content: bytes, cuts: list[int]) -> None:
    assume(b"\r\n--=-part" not in content)
    body = envelope(content)
    places = sorted({0, len(body), *(min(cut, len(body)) for cut in cuts)})
    pieces = [body[a:b] for a, b in pairwise(places)]
    assert b"".join(only_part('multipart/related; boundary="=-part"', pieces)) == content


@given(length=st.integers(0, 62 + 300 - 3), size=st.integers(1, 50))
def test_any_cut_is_noticed(length: int, size: int) -> None:
    body = envelope(bytes(300))
    cut = body[: min(length, len(body) - 3)]
    with pytest.raises(MultipartError):
        list(only_part("multipart/related; boundary==-part", [cut[i : i + size] for i in range(0, len(cut), size)]))


@pytest.mark.parametrize(
    ("key", "wanted", "value", "same"),
    [
        ("StudyDate", "20200101-20201231", "20200630", True),
        ("StudyDate", "20200101-", "20191231", False),
        ("StudyDate", "-2020", "20201231", True),
        ("StudyDate", "20200101", "20200102", False),
        ("StudyDescription", "CT * chest", "ct of CHEST", True),
        ("StudyDescription", "CT [a]?", "CT [a]b", True),
        ("StudyDescription", "CT", "CT chest", False),
        ("StudyInstanceUID", "1.2,1.3", "1.3", True),
        ("StudyInstanceUID", "1.2", "1.23", False),
    ],
)
def test_matching(key: str, wanted: str, value: str, same: bool) -> None:
    tag = {"StudyDate": "00080020", "StudyDescription": "00081030", "StudyInstanceUID": "0020000D"}[key]
    assert Where.matches(attribute(tag, value), {key: wanted}) is same


def test_a_name_matches_by_its_letters() -> None:
    assert Where.matches(attribute("00100010", {"Alphabetic": "Kowalska^Zofia"}), {"PatientName": "kowalska*"})


@pytest.mark.parametrize("where", [{"Kowalska": "x"}, {"PatientID": ""}])
def test_a_filter_that_is_none(where: dict[str, str]) -> None:
    with pytest.raises(DataError, match="DICOM keywords") as error:
        Where(where)
    assert "Kowalska" not in str(error.value)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        open_intake(tmp_path / "in"),
        pytest.raises(DataError, match="another pull or receive"),
        open_intake(tmp_path / "in"),
    ):
        pass
    leftover = Intake(tmp_path / "in").partial / "killed"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with open_intake(tmp_path / "in"):
        assert not leftover.exists()
