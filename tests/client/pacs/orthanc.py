"""A real PACS for tests: Orthanc on loopback, with its own ports, storage and users."""

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests
from pydicom import Dataset
from pynetdicom import AE, evt
from pynetdicom.presentation import build_context

from tests.client.pacs.sender import keep_answers
from tests.ports import free_port

__all__ = ["AET", "PASSWORD", "RECEIVER", "USER", "Orthanc", "running_orthanc"]

AET, RECEIVER = "ORTHANC", "WARDROUND"
USER, PASSWORD = "reader", "not-a-secret"
_PLUGINS = [Path(folder, "libOrthancDicomWeb.so") for folder in ("/usr/share/orthanc/plugins", "/usr/lib/orthanc")]


@dataclass
class Orthanc:
    """An Orthanc that can be killed and started again; its images stay."""

    program: str
    folder: Path
    http_port: int
    dicom_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Root of its DICOMweb service."""
        return f"http://127.0.0.1:{self.http_port}/dicom-web"

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([self.program, str(self.folder / "orthanc.json")], stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system")
            except requests.ConnectionError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError((self.folder / "log").read_text())

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def get(self, path: str) -> object:
        """Ask its REST API."""
        answer = requests.get(f"http://127.0.0.1:{self.http_port}{path}", auth=(USER, PASSWORD), timeout=30)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: Mapping[str, Any]) -> object:
        """Tell its REST API."""
        answer = requests.post(
            f"http://127.0.0.1:{self.http_port}{path}", json=body, auth=(USER, PASSWORD), timeout=120
        )
        answer.raise_for_status()
        return answer.json()

    def store(self, images: Iterable[Dataset]) -> None:
        """Send it images by C-STORE."""
        images = list(images)
        entity = AE("SENDER")
        contexts = {(image.SOPClassUID, image.file_meta.TransferSyntaxUID) for image in images}
        association = entity.associate(
            "127.0.0.1",
            self.dicom_port,
            contexts=[build_context(kind, syntax) for kind, syntax in sorted(contexts)],
            ae_title=AET,
            evt_handlers=[(evt.EVT_PDU_SENT, _without_delay)],
        )
        assert keep_answers(association).is_established
        for image in images:
            assert association.send_c_store(image).Status == 0
        association.release()


def _without_delay(event: evt.Event) -> None:
    """Neither wait for acknowledgements nor make wait for them: each image would take 80 ms longer."""
    sender = event.assoc.dul.socket
    connection = sender.socket if sender is not None else None
    if connection is None:
        return
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_QUICKACK"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


@contextmanager
def running_orthanc(folder: Path, receiver_port: int) -> Iterator[Orthanc]:
    """Run an Orthanc that knows our receiver; the test is skipped where Orthanc is not installed."""
    program = shutil.which("Orthanc", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    plugin = next((plugin for plugin in _PLUGINS if plugin.exists()), None)
    if program is None or plugin is None:
        pytest.skip("Orthanc is not here: install the Debian packages orthanc and orthanc-dicomweb (.ci/orthanc)")
    folder.mkdir()
    pacs = Orthanc(program, folder, free_port(), free_port())
    configuration = {
        "Name": "test",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(plugin)],
        "HttpPort": pacs.http_port,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomAet": AET,
        "DicomPort": pacs.dicom_port,
        "DicomModalities": {"receiver": [RECEIVER, "127.0.0.1", receiver_port]},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        "DicomAssociationCloseDelay": 0,
        "SyncStorageArea": False,
    }
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    pacs.start()
    try:
        yield pacs
    finally:
        pacs.kill()
