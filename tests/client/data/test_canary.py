"""Nobody's name leaves the images: a byte search over everything that the command leaves behind or says."""

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pydicom import DataElement, dcmread, uid
from pydicom.config import disable_value_validation
from pydicom.encaps import encapsulate

from client.data.pool import Failure
from tests.client.data.folders import dicom, grey, png, table

ROOT = Path(__file__).parents[3]

#: What must not be found, and where it stands.
CANARIES = {
    "PatientName": "Zyxwolska",
    "PatientID": "QZ-4711-XQ",
    "AccessionNumber": "ACC99Q77Z",
    "InstitutionName": "Sankt Quibbelhospital",
    "StudyDescription": "Vqx follow-up of Müllerqz",
    "folder": "Qfolderin",
    "file": "Zqfilename",
    "private": "Privqztag",
    "label id": "QZ-0815-ID",
    "extra column": "Xtracolumnqz",
    "uid": "1.2.826.0.1.777.4242",
}
_ENCODINGS = ("utf-8", "latin-1", "utf-16-le", "utf-16-be", "utf-32-le")
CRASHES, RAISES = 9001, 9003  # bytes of the file
_STUDY = ROOT / "simulations" / "studies" / "demo.toml"

# A decoder that prints what it read and crashes on one file, and raises all it knows on another.
_CRASHING = f"""
import ctypes, sys
import client.data.worker as worker

real = worker._reader

def crashing(path, reading):
    size = path.stat().st_size
    if size in ({CRASHES}, {RAISES}):
        held = path.read_bytes()
        print(path, held, flush=True)
        print(path, held, file=sys.stderr, flush=True)
        if size == {CRASHES}:
            ctypes.string_at(0)
        raise RuntimeError(path, held)
    return real(path, reading)

worker._reader = crashing
"""

_BROKEN = """
import client.data.index as index

def broken(self, found):
    path = str(found.path)
    raise RuntimeError("a bug")

index._Job._member = broken
"""


def forms(text: str) -> Iterator[bytes]:
    for variant in {text, text.upper(), text.lower()}:
        yield from (variant.encode(encoding, "ignore") for encoding in _ENCODINGS)


def found_in(data: bytes) -> set[str]:
    return {name for name, text in CANARIES.items() if any(form in data for form in forms(text))}


def archive(folder: Path) -> Path:
    """Write files that are right, damaged in many ways, and of no kind at all, each full of canaries."""
    source = folder / CANARIES["folder"]
    whole = []
    for number in range(8):
        path = dicom(
            source / f"{CANARIES['file']}-{number}.dcm",
            grey(number, 16),
            SpecificCharacterSet="ISO_IR 192" if number % 2 else "ISO_IR 100",
            PatientName=f"{CANARIES['PatientName']}^Anna",
            PatientID=f"{CANARIES['PatientID']}{number}",
            AccessionNumber=f"{CANARIES['AccessionNumber']}{number}",
            InstitutionName=CANARIES["InstitutionName"],
            StudyDescription=CANARIES["StudyDescription"],
            SOPInstanceUID=f"{CANARIES['uid']}.3.{number}",
            StudyInstanceUID=f"{CANARIES['uid']}.1.{number}",
            SeriesInstanceUID=f"{CANARIES['uid']}.2.{number}",
            PatientBirthDate=CANARIES["PatientName"],  # no date at all: pydicom warns and quotes
            PatientAge=CANARIES["PatientName"],
            ImageType=[CANARIES["PatientName"]],
        )
        dataset = dcmread(path)
        block = dataset.private_block(0x0099, CANARIES["private"], create=True)
        block.add_new(1, "LO", CANARIES["private"])
        dataset.save_as(path)
        whole.append(path.read_bytes())
    for at, place in enumerate(np.linspace(10, len(whole[0]) - 10, 12).astype(int)):
        (source / f"{CANARIES['file']}-cut-{at}.dcm").write_bytes(whole[at % 8][:place])
        broken = bytearray(whole[at % 8])
        broken[place : place + 4] = b"\xff\xfe\x00\xff"
        (source / f"{CANARIES['file']}-broken-{at}.dcm").write_bytes(broken)
    name = CANARIES["PatientName"].encode()
    for at, syntax in enumerate(
        (uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEG2000, uid.RLELossless)
    ):
        dataset = dcmread(source / f"{CANARIES['file']}-0.dcm")
        dataset.PixelData = encapsulate([b"\xff\xd8\xff\xe0" + name * 20])
        dataset["PixelData"].VR = "OB"
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.save_as(source / f"{CANARIES['file']}-decoder-{at}.dcm")
    dataset = dcmread(source / f"{CANARIES['file']}-0.dcm")
    for keyword in ("RescaleSlope", "WindowWidth", "NumberOfFrames", "ImagePositionPatient"):
        bad = dataset.copy()
        bad[keyword] = DataElement(keyword, "LO", CANARIES["PatientName"])
        bad.save_as(source / f"{CANARIES['file']}-{keyword}.dcm")
    png(source / f"{CANARIES['file']}.png", grey(50))
    (source / "text.png").write_bytes(b"\x89PNG\r\n\x1a\n" + name * 9)
    (source / f"{CANARIES['file']}.tif").write_bytes(b"II*\0" + name * 9)
    (source / f"{CANARIES['file']}.npz").write_bytes(b"PK\x03\x04" + name * 9)
    np.savez(source / "set.npz", images=np.stack([grey(60), grey(61)]), labels=[0, 1], groups=[*map(str, CANARIES)][:2])
    np.savez(source / "who.npz", images=grey(62)[None], labels=[0], groups=[CANARIES["PatientName"]])
    (source / "notes.txt").write_bytes(name)
    (source / "crash.dcm").write_bytes(whole[0].ljust(CRASHES, b"\0"))
    (source / "raise.dcm").write_bytes(whole[0].ljust(RAISES, b"\0"))
    (source / CANARIES["PatientName"]).symlink_to(source)
    return source


def labels(folder: Path) -> Path:
    rows = [("case", CANARIES["extra column"], "label")]
    rows += [(f"{CANARIES['PatientID']}{number}", CANARIES["extra column"], "ab"[number % 2]) for number in range(8)]
    rows += [(CANARIES["label id"], CANARIES["extra column"], "a"), (CANARIES["label id"], "", "b")]
    return table(folder / f"{CANARIES['file']}.csv", rows)


def command(folder: Path, *arguments: str, hook: str = "") -> subprocess.CompletedProcess[bytes]:
    """Run the real command in an empty folder, where a dump of memory would be allowed and found."""
    work, start = folder / "work", folder / "start"
    for place in (work, start):
        place.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(hook)  # what every process of Python begins with
    call = 'ulimit -c unlimited; exec "$@"'
    run = "from client.cli import app; app()"
    return subprocess.run(
        ["bash", "-c", call, "bash", sys.executable, "-B", "-c", run, *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": f"{start}:{ROOT}", "TMPDIR": str(work), "COLUMNS": "300"},
        capture_output=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hospital")


@pytest.fixture(scope="module")
def ran(folder: Path) -> subprocess.CompletedProcess[bytes]:
    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        source, site = archive(folder), folder / "site"
    assert found_in(b"".join(path.read_bytes() for path in source.iterdir() if path.is_file())) >= {
        "PatientName", "PatientID", "AccessionNumber", "InstitutionName", "StudyDescription", "private", "uid",
    }  # fmt: skip
    arguments = ["--site", str(site), "--labels", str(labels(folder)), "--map", "case=PatientID", "--json"]
    return command(folder, "index", str(source), *arguments, "--study", str(_STUDY), "--workers", "2", hook=_CRASHING)


def everything(folder: Path) -> dict[str, bytes]:
    files = [path for top in ("site", "work", "start") for path in (folder / top).rglob("*") if path.is_file()]
    names = "\n".join(str(path.relative_to(folder)) for path in files).encode()
    return {"names": names} | {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_search_finds_what_is_there() -> None:
    assert found_in("xxZYXWOLSKAxx".encode("utf-16-le")) == {"PatientName"}
    assert found_in("Vqx follow-up of Müllerqz".encode("latin-1")) == {"StudyDescription"}
    assert found_in(b"nobody") == set()


def test_the_run_met_all_of_them(ran: subprocess.CompletedProcess[bytes]) -> None:
    assert ran.returncode == 0, ran.stderr.decode()
    report = json.loads(ran.stdout)
    assert report["run"]["read"] >= 10
    assert report["run"]["refused"] >= 20
    assert report["refused"]["a decoder crashed on it"] == 1
    assert report["run"]["links_not_followed"] == 1
    assert report["labels"]["unmatched"] == 2
    assert report["pictures"] >= 8


def test_nothing_of_anybody_is_left_behind_or_said(folder: Path, ran: subprocess.CompletedProcess[bytes]) -> None:
    places = everything(folder) | {"stdout": ran.stdout, "stderr": ran.stderr}
    assert {"site/catalogue.sqlite", "site/site.key"} <= places.keys()
    assert any(name.endswith("pixels.raw") for name in places)
    assert {name: found for name, data in places.items() if (found := found_in(data))} == {}
    assert not [name for name in places if "core" in Path(name).name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["stats"],
        ["index", "{source}", "--refused-list", "{out}"],
        ["index", "{source}/missing"],
        ["index", "{source}", "--labels", "{bad}"],
    ],
    ids=" ".join,
)
def test_what_the_other_commands_say(
    folder: Path, ran: subprocess.CompletedProcess[bytes], arguments: list[str]
) -> None:
    assert ran.returncode == 0
    bad = table(folder / "bad.csv", [("PatientID", "label"), (CANARIES["PatientName"], "a", CANARIES["PatientID"])])
    places = {"source": str(folder / CANARIES["folder"]), "bad": str(bad), "out": str(folder / "refused.txt")}
    words = [argument.format(**places) for argument in arguments]
    done = command(folder, words[0], *words[1:], "--site", str(folder / "site"))
    assert found_in(done.stdout + done.stderr) == set()
    assert {name: found for name, data in everything(folder).items() if (found := found_in(data))} == {}
    assert done.stdout or done.stderr


def test_an_unexpected_error_quotes_nobody(folder: Path, ran: subprocess.CompletedProcess[bytes]) -> None:
    """A bug in the command itself, with names in reach, must not print them."""
    assert ran.returncode == 0
    done = command(folder, "index", str(folder / CANARIES["folder"]), "--site", str(folder / "site"), hook=_BROKEN)
    assert done.returncode != 0
    assert b"a bug" in done.stderr
    assert found_in(done.stdout + done.stderr) == set()


def test_a_failure_says_nothing_of_its_task() -> None:
    assert vars(Failure("crashed")) == {"kind": "crashed"}
