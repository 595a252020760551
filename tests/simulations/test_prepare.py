"""Virtual hospitals on disk: one folder a site, the same again from the same study, from phantoms and from arrays."""

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.data.index import Counts, Plan, index
from client.data.store import Site
from client.session import virtual_site
from common.errors import DataError
from common.study import Study
from simulations.phantoms import SCANNERS
from simulations.prepare import census, prepare

Changes = dict[str, bool | int | float | str]

PHANTOMS: Changes = {
    "model.image-size": 16,
    "episodes.classes": "disc,ring",
    "episodes.held-out": "bar",
    "episodes.ways": 2,
    "data.patients-per-class": 2,
    "data.sites": 2,
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARDROUND_HOME", str(tmp_path / "home"))


def phantoms(changes: Changes | None = None) -> Study:
    return Study.from_run_config({**PHANTOMS, **(changes or {})})


def contents(folder: Path) -> list[object]:
    """Return key, pixels and all that episodes depend on; only the files' own hashes differ from time to time."""
    with closing(sqlite3.connect(folder / "catalogue.sqlite")) as database:
        rows = database.execute(
            "SELECT slot, patient, label, split, aside, content FROM image ORDER BY slot"
        ).fetchall()
    return [(folder / "site.key").read_bytes(), rows, [p.read_bytes() for p in sorted(folder.glob("cache/*/*"))]]


def pixels(site: Site) -> NDArray[np.uint8]:
    return site.pixels(np.arange(len(site.labels)))


# Phantoms


def test_phantom_hospitals_have_a_scanner_each_and_leave_no_files_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    study = phantoms()
    said: list[str] = []
    sites = prepare(study, said.append)
    assert [site.name for site in sites] == ["hospital-0", "hospital-1"]
    assert [site.index for site in sites] == [0, 1]
    assert [site.folder for site in sites] == [virtual_site(study, i) for i in range(2)]
    for number, (site, line) in enumerate(zip(sites, said, strict=True)):
        assert line == f"hospital-{number}: {len(site.labels)} images, CT phantoms ({SCANNERS[number].name})"
        assert site.label_names == ("bar", "disc", "ring")
        assert len(set(site.patients.tolist())) == 6  # two patients a lesion
        assert pixels(site).shape == (len(site.labels), 1, 16, 16)
        assert pixels(site).std() > 10
    assert list(scratch.iterdir()) == []  # the DICOM files go when they are read
    counts, classes = census(study, sites)
    assert classes == ("disc", "ring", "bar")
    assert counts.sum(1).tolist() == [len(site.labels) for site in sites]
    assert (counts >= 2).all()


def test_the_same_study_gives_the_same_bytes_and_nothing_is_written_twice() -> None:
    study = phantoms()
    first = {site.name: contents(site.folder) for site in prepare(study)}
    parent = virtual_site(study, 0).parent
    times = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    said: list[str] = []
    prepare(study, said.append)
    assert said == []
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == times
    # A site that is missing is written again, alone and the same.
    virtual_site(study, 1).rename(parent.with_name("away"))
    again = {site.name: contents(site.folder) for site in prepare(study, said.append)}
    assert [line.split(":")[0] for line in said] == ["hospital-1"]
    assert again == first


def test_what_pixels_and_splits_depend_on_names_the_folders_and_nothing_else_does() -> None:
    study = phantoms()
    same = study.override({"outer.rate": 0.5, "study.rounds": 3, "algorithm.name": "protonet"})
    assert virtual_site(same, 0) == virtual_site(study, 0)
    others: list[Changes] = [
        {"data.seed": 1},
        {"model.image-size": 20},
        {"model.channels": 3},
        {"episodes.held-out": ""},
        {"data.test-fraction": 0.4},
        {"data.patients-per-class": 3},
    ]
    assert len({virtual_site(study.override(change), 0) for change in others} | {virtual_site(study, 0)}) == 7


def test_a_preparation_that_breaks_off_can_be_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    study = phantoms()
    done: list[str] = []

    def interrupted(plan: Plan) -> Counts:
        if done:
            raise KeyboardInterrupt
        done.append(plan.name)
        return index(plan)

    with monkeypatch.context() as patch:
        patch.setattr("simulations.prepare.index", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(study)
    assert [path.name for path in virtual_site(study, 0).parent.iterdir()] == ["site-0"]  # whole, the rest not there
    assert len(prepare(study)) == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_every_scanner_fits_every_network(channels: int) -> None:
    changes: Changes = {
        "data.sites": len(SCANNERS) + 1,
        "data.patients-per-class": 1,
        "episodes.held-out": "",
        "model.channels": channels,
    }
    said: list[str] = []
    sites = prepare(phantoms(changes), said.append)
    assert {pixels(site).shape[1:] for site in sites} == {(channels, 16, 16)}
    assert [scanner.name in line for scanner, line in zip(SCANNERS, said, strict=False)] == [True] * len(SCANNERS)
    assert SCANNERS[0].name in said[-1]  # the scanners come round again, with other patients
    assert not np.array_equal(pixels(sites[0])[:5], pixels(sites[-1])[:5])


def test_alike_hospitals_have_the_same_scanner_and_patients_of_their_own() -> None:
    said: list[str] = []
    sites = prepare(phantoms({"data.partition": "iid", "data.patients-per-class": 1}), said.append)
    assert all(SCANNERS[0].name in line for line in said)
    firsts = {pixels(site)[0].tobytes() for site in sites}
    assert len(firsts) == len(sites) == len(said) > 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"episodes.classes": "disc,wart"}, "no phantom lesion is called .'wart'."),
        ({"data.partition": "dirichlet"}, "data.partition is 'natural' or 'iid'"),
    ],
)
def test_what_phantoms_cannot_be(changes: Changes, words: str) -> None:
    study = phantoms(changes)
    with pytest.raises(DataError, match=words):
        prepare(study)
    assert not virtual_site(study, 0).exists()


# Arrays


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    """Two real sites, four classes, 48 patients with two images each; every image tells its patient."""
    path = tmp_path / "set.npz"
    patient = np.repeat(np.arange(48), 2)
    images = np.zeros((96, 16, 16), np.uint8)
    images[:, :, :] = (5 * patient)[:, None, None]
    images[1::2, 0, 0] ^= 1
    np.savez(
        path,
        images=images,
        labels=patient % 4,
        sites=patient // 24,
        groups=patient.astype(str),
        label_names=["a", "b", "c", "d"],
        site_names=["north", "south"],
    )
    return path


def from_arrays(source: str, changes: Changes | None = None) -> Study:
    base: Changes = {
        "model.image-size": 16,
        "episodes.classes": "a,b",
        "episodes.held-out": "c,d",
        "episodes.ways": 2,
        "data.source": source,
        "data.sites": 2,
        "sites.held-out": "",
    }
    return Study.from_run_config({**base, **(changes or {})})


def test_natural_sites_are_the_sets_own(arrays: Path) -> None:
    study = from_arrays(f"npz:{arrays}")
    said: list[str] = []
    north, south = prepare(study, said.append)
    assert said == ["hospital-0: 48 images, north", "hospital-1: 48 images, south"]
    assert set(np.unique(pixels(north)[:, 0, 8, 8])) == {5 * p for p in range(24)}
    assert set(np.unique(pixels(south)[:, 0, 8, 8])) == {5 * p for p in range(24, 48)}
    counts, classes = census(study, [north, south])
    assert classes == ("a", "b", "c", "d")
    assert counts.tolist() == [[12] * 4] * 2
    for site in (north, south):
        for patient in range(24):
            assert len(set(pixels(site)[site.patients == patient][:, 0, 8, 8].tolist())) == 1


def test_images_of_another_size_are_resized(arrays: Path) -> None:
    north, _ = prepare(from_arrays(f"npz:{arrays}", {"model.image-size": 20}))
    assert pixels(north).shape == (48, 1, 20, 20)
    assert set(np.unique(pixels(north)[:, 0, 10, 10])) == {5 * p for p in range(24)}


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "pathological", "quantity", "scanner"])
def test_every_partition_deals_out_the_images_and_keeps_patients_whole(arrays: Path, partition: str) -> None:
    study = from_arrays(f"npz:{arrays}", {"data.partition": partition, "data.sites": 3, "data.alpha": 1.0})
    said: list[str] = []
    sites = prepare(study, said.append)
    assert [line.split(", ")[1:] for line in said] == [[f"npz:{arrays}", f"{partition} part {i}"] for i in range(3)]
    counts, _ = census(study, sites)
    assert counts.sum() == 96
    assert (counts.sum(1) > 0).all()
    if partition != "scanner":  # whose sites' images are changed
        patients = [set(pixels(site)[:, 0, 8, 8].tolist()) for site in sites]
        assert sum(map(len, patients)) == len(set.union(*patients)) == 48
    if partition == "pathological":
        assert ((counts > 0).sum(1) <= study.data.classes_per_site).all()
    # One missing site is made from the same partition again.
    before = contents(sites[1].folder)
    sites[1].folder.rename(sites[1].folder.with_name("away"))
    assert contents(prepare(study)[1].folder) == before


def test_several_sources_are_a_site_each(arrays: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        with np.load(arrays) as whole:
            np.savez(tmp_path / f"{name}.npz", **{k: whole[k] for k in ("images", "labels", "groups", "label_names")})
    source = f"npz:{tmp_path / 'one.npz'}, npz:{tmp_path / 'two.npz'}"
    one, two = prepare(from_arrays(source))
    assert len(one.labels) == len(two.labels) == 96
    with pytest.raises(DataError, match="several data sources are one site each"):
        prepare(from_arrays(source, {"data.partition": "iid"}))


def test_volumes(tmp_path: Path) -> None:
    volumes = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 16), np.uint8)
    np.savez(tmp_path / "volumes.npz", images=volumes, labels=np.arange(12) % 2, label_names=["a", "b"])
    changes: Changes = {
        "model.dimensions": 3,
        "model.name": "monai:ResNet",
        "data.partition": "iid",
        "episodes.held-out": "",
    }
    sites = prepare(from_arrays(f"npz:{tmp_path / 'volumes.npz'}", changes))
    assert {pixels(site).shape[1:] for site in sites} == {(1, 16, 16, 16)}
    with pytest.raises(DataError, match=r"model\.dimensions"):
        prepare(from_arrays(f"npz:{tmp_path / 'volumes.npz'}", {"data.partition": "iid", "episodes.held-out": ""}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.sites": 3}, "set data.sites = 2"),
        ({"data.source": "npz:nowhere.npz"}, "nowhere.npz"),
        ({"data.source": "minst"}, "the data source 'minst' is not known"),
    ],
)
def test_what_does_not_fit_is_said(arrays: Path, changes: Changes, words: str) -> None:
    study = from_arrays(f"npz:{arrays}", changes)
    with pytest.raises(DataError, match=words):
        prepare(study)
    assert not virtual_site(study, 0).exists()
