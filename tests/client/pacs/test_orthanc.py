"""The whole way with a real PACS: sent in, pulled out through its death and return, and sent to us by it."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import typer
from pydicom import Dataset
from pydicom.uid import UID
from typer.testing import CliRunner

from client.data.episodes import draw, make_pool
from client.data.image import Recipe
from client.data.index import Plan, index
from client.data.labels import Labels
from client.data.store import open_site
from client.pacs import cli
from client.pacs.dicomweb import PullReport, Source, pull
from client.pacs.receiver import receiver
from common.study import Episodes
from simulations.phantoms import SCANNERS, write_hospital
from tests.client.pacs.orthanc import AET, PASSWORD, RECEIVER, USER, Orthanc, running_orthanc
from tests.ports import free_port

pytestmark = pytest.mark.slow

CANARIES = ("Kowalska", "ZZID1951", "ZZACC7781", "ZZSTUDY")
STUDIES = 200


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """About 300 images in 200 studies by two scanners, one of which compresses."""
    folder = tmp_path_factory.mktemp("phantoms")
    other = next(s for s in SCANNERS if UID(s.transfer_syntax).is_compressed and s.modality != SCANNERS[0].modality)
    found: dict[str, list[Dataset]] = {}
    for number, scanner in enumerate((SCANNERS[0], other)):
        hospital = folder / str(number)
        write_hospital(hospital, scanner=scanner, lesions=["disc"], patients_per_lesion=80, seed=number, size=32)
        for file in sorted((hospital / "dicom").rglob("*.dcm")):
            image = pydicom.dcmread(file)
            image.PatientName, image.PatientID = f"Kowalska^{image.PatientID}", f"ZZID1951{image.PatientID[-12:]}"
            image.AccessionNumber, image.StudyDescription = "ZZACC7781", "ZZSTUDY of Kowalska"
            found.setdefault(image.StudyInstanceUID, []).append(image)
    assert len(found) >= STUDIES
    studies = list(found.values())
    return [image for study in studies[: STUDIES // 2] + studies[-STUDIES // 2 :] for image in study]


@pytest.fixture(scope="module")
def receiver_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def pacs(images: list[Dataset], receiver_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """An Orthanc that holds all images."""
    with running_orthanc(tmp_path_factory.mktemp("pacs") / "orthanc", receiver_port) as running:
        running.store(images)
        yield running


def pixels(folder: Path) -> dict[str, bytes]:
    """Return what an intake folder holds; its names must say nothing."""
    found: dict[str, bytes] = {}
    for file in folder.rglob("*"):
        if ".partial" in file.parts:
            continue  # what a killed process left; the next one clears it
        assert re.fullmatch(r"([0-9a-f]{32}/?)*(\.dcm)?", str(file.relative_to(folder)))
        if file.is_file():
            image = pydicom.dcmread(file)
            assert image.SOPInstanceUID not in found
            found[image.SOPInstanceUID] = image.PixelData
    return found


def sent(images: list[Dataset]) -> dict[str, bytes]:
    return {image.SOPInstanceUID: image.PixelData for image in images}


def test_a_pull_survives_the_death_of_both_sides(
    pacs: Orthanc, images: list[Dataset], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secret = tmp_path / "user"
    secret.write_text(f"{USER}:{PASSWORD}\n")
    into = tmp_path / "intake"
    command = "import typer; from client.pacs.cli import pull; typer.run(pull)"
    arguments = [pacs.url, "--into", str(into), "--user-file", str(secret), "--rate", "100"]
    puller = subprocess.Popen([sys.executable, "-c", command, *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(into.rglob("*.dcm"))) < len(images) // 4:
        assert puller.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    puller.send_signal(signal.SIGKILL)
    puller.wait()
    there = len(pixels(into))
    assert len(images) // 4 <= there < len(images)

    states: list[str] = []
    half_way = threading.Event()

    def watch(report: PullReport) -> None:
        states.append(report.state)
        if report.there + report.new >= len(images) // 2:
            half_way.set()

    def restart() -> None:
        half_way.wait(60)
        pacs.kill()
        time.sleep(0.5)
        pacs.start()

    nemesis = threading.Thread(target=restart)
    nemesis.start()
    source = Source(pacs.url, user=(USER, PASSWORD))
    report = pull(source, into, rate=100, patience=60, progress=watch)
    nemesis.join()
    assert "waiting" in states
    assert report.complete
    assert (report.studies, report.there, report.new) == (STUDIES, there, len(images) - there)
    assert pixels(into) == sent(images)

    before = {file: file.stat().st_mtime_ns for file in into.rglob("*.dcm")}
    assert pull(source, into, rate=1000).new == 0
    assert before == {file: file.stat().st_mtime_ns for file in into.rglob("*.dcm")}
    assert not any(canary in "".join(capfd.readouterr()) for canary in CANARIES)


def test_filters(pacs: Orthanc, images: list[Dataset], tmp_path: Path) -> None:
    source = Source(pacs.url, user=(USER, PASSWORD))
    modality = images[0].Modality
    of_modality = {image.SOPInstanceUID for image in images if image.Modality == modality}
    assert 0 < len(of_modality) < len(images)
    assert pull(source, tmp_path / "a", where={"Modality": modality}, rate=1000).complete
    assert set(pixels(tmp_path / "a")) == of_modality

    patient, days = images[0].PatientID, sorted({image.StudyDate for image in images})
    assert pull(source, tmp_path / "b", where={"PatientID": patient}, rate=1000).complete
    assert set(pixels(tmp_path / "b")) == {i.SOPInstanceUID for i in images if i.PatientID == patient}
    early = {"StudyDate": f"{days[0]}-{days[9]}"}
    assert pull(source, tmp_path / "c", where=early, rate=1000).complete
    assert set(pixels(tmp_path / "c")) == {i.SOPInstanceUID for i in images if i.StudyDate <= days[9]}


def test_what_it_sends_us_arrives(
    pacs: Orthanc, images: list[Dataset], receiver_port: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    everything = {"Resources": pacs.get("/studies"), "Synchronous": True}
    with receiver(tmp_path / "in", aet=RECEIVER, allow=[AET], port=receiver_port) as running:
        pacs.post("/modalities/receiver/echo", {})
        pacs.post("/modalities/receiver/store", everything)
        assert running.report.new == len(images)
        pacs.post("/modalities/receiver/store", everything)
        assert (running.report.new, running.report.same) == (len(images), len(images))
        assert not running.report.refused
    assert pixels(tmp_path / "in") == sent(images)
    for file in (tmp_path / "in").rglob("*.dcm"):
        kept = pydicom.dcmread(file, stop_before_pixels=True)
        original = next(i for i in images if i.SOPInstanceUID == kept.SOPInstanceUID)
        assert kept.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID
    assert not any(canary in "".join(capfd.readouterr()) for canary in CANARIES)


def test_from_the_pacs_to_episodes(pacs: Orthanc, images: list[Dataset], tmp_path: Path) -> None:
    assert pull(Source(pacs.url, user=(USER, PASSWORD)), tmp_path / "in", rate=1000).complete
    study_of = {image.StudyInstanceUID: image.Modality for image in images}
    rows = "".join(f"{study},{modality}\n" for study, modality in study_of.items())
    (tmp_path / "labels.csv").write_text(f"StudyInstanceUID,label\n{rows}")
    recipe, labels = Recipe(1, 16), Labels(tmp_path / "labels.csv", {})
    counts = index(Plan(tmp_path / "site", [tmp_path / "in"], [recipe], labels, workers=2))
    assert (counts.read, counts.refused, counts.leaks) == (len(images), 0, 0)
    site = open_site(tmp_path / "site", recipe)
    assert len(site.labels) == len(images)
    assert site.label_names == tuple(sorted(set(study_of.values())))
    pool = make_pool(site, site.label_names, 0, ("train",))
    spec = Episodes(classes=",".join(site.label_names), held_out="", ways=2, shots=5, queries=5)
    episodes = draw(site, pool, spec, 20, np.random.default_rng(0))
    assert episodes.support.x.shape == (20, 10, 1, 16, 16)
    assert bool(episodes.query.mask is not None and episodes.query.mask.all())
    stored = b"".join(p.read_bytes() for p in (tmp_path / "site").rglob("*") if p.is_file())
    assert not any(canary.encode() in stored for canary in CANARIES)


def test_command(pacs: Orthanc, images: list[Dataset], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cli.pull)
    secret = tmp_path / "user"
    secret.write_text(f"{USER}:wrong\n")
    patient = images[0].PatientID
    arguments = [pacs.url, "--into", str(tmp_path / "in"), "--user-file", str(secret)]
    arguments += ["--where", f"PatientID={patient}"]
    refused = CliRunner().invoke(app, arguments)
    assert refused.exit_code == 1
    assert "refuses us" in refused.stderr
    secret.write_text(f"{USER}:{PASSWORD}\n")
    result = CliRunner().invoke(app, arguments)
    wanted = sum(image.PatientID == patient for image in images)
    assert result.exit_code == 0
    assert f"{wanted} images new, 0 already there" in result.stdout
    said = refused.output + result.output
    assert not any(private in said for private in (*CANARIES, PASSWORD, images[0].StudyInstanceUID))
