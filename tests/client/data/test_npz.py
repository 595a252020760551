"""Image sets in npz files: both layouts, groups honoured, and nothing believed that a header claims."""

import io
import json
import resource
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.catalogue import Split, open_catalogue
from client.data.episodes import Pool, draw, make_pool
from client.data.image import Recipe
from client.data.index import Plan, index
from client.data.labels import Labels
from client.data.npz import read_npz
from client.data.picture import Picture, Reading, Reason, Refused
from client.data.report import contents
from client.data.store import Site, open_site
from common.errors import NotPreparedError
from common.study import Episodes
from tests.client.data.folders import KEY, table

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 7), np.uint8)


def written(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def read(path: Path, reading: Reading = Reading()) -> list[Picture]:  # noqa: B008 - frozen
    return list(read_npz(path, reading))


def refusal(path: Path, reading: Reading = Reading()) -> Reason:  # noqa: B008 - frozen
    with pytest.raises(Refused) as caught:
        read(path, reading)
    return caught.value.reason


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_flat_layout(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "set.npz"
    save(path, images=IMAGES, labels=[0, 1, 2, 0, 1, 2], groups=["p", "p", "q", "q", "r", "r"], label_names=list("abc"))
    found = read(path)
    assert [p.label for p in found] == list("abcabc")
    assert [p.identifiers["PatientID"] for p in found] == list("ppqqrr")
    assert [p.frame for p in found] == list(range(6))
    for picture, image in zip(found, IMAGES, strict=True):
        np.testing.assert_array_equal(picture.values, image)
        np.testing.assert_allclose(picture.shown("header"), image / 255, atol=1e-6)
        assert not picture.volume or image.shape[-1] != 3


def test_the_layout_of_medmnist(tmp_path: Path) -> None:
    parts = {"train": IMAGES[:3], "val": IMAGES[3:4], "test": IMAGES[4:]}
    arrays = {f"{name}_images": part for name, part in parts.items()}
    arrays |= {f"{name}_labels": np.full((len(part), 1), at) for at, (name, part) in enumerate(parts.items())}
    found = read(written(tmp_path / "set.npz", **arrays))
    assert [p.label for p in found] == ["0", "0", "0", "1", "2", "2"]
    assert [p.frame for p in found] == list(range(6))
    assert all(p.identifiers == {} for p in found)
    np.testing.assert_array_equal([p.values for p in found], IMAGES)


def test_colour_and_volumes(tmp_path: Path) -> None:
    colour, solid = np.zeros((2, 4, 4, 3), np.uint8), np.zeros((2, 5, 6, 7), np.uint8)
    assert [p.volume for p in read(written(tmp_path / "c.npz", images=colour, labels=[0, 0]))] == [False] * 2
    found = read(written(tmp_path / "v.npz", images=solid, labels=[0, 0]))
    assert [(p.volume, p.values.shape) for p in found] == [(True, (5, 6, 7))] * 2


def test_names_beside_the_file_come_first(tmp_path: Path) -> None:
    path = written(tmp_path / "set.npz", images=IMAGES, labels=[0, 1, 0, 1, 0, 1], label_names=["x", "y"])
    (tmp_path / "set.json").write_text(json.dumps({"label_names": ["one", "two"]}))
    assert {p.label for p in read(path)} == {"one", "two"}
    for text in ("{", "[]", '{"label_names": ["one"]}', "\0"):
        (tmp_path / "set.json").write_text(text)
        assert refusal(path) is Reason.DAMAGED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"labels": [0, 1, 0, 1, 0, -1], "label_names": ["x", "y"]}, Reason.DAMAGED),
        ({"labels": [0, 1, 0, 1, 0, 2], "label_names": ["x", "y"]}, Reason.DAMAGED),
        ({"labels": [0.5] * 6}, Reason.DAMAGED),
        ({"labels": np.zeros((6, 14), int)}, Reason.DAMAGED),
        ({"labels": [0] * 5}, Reason.NOT_AN_IMAGE),
        ({"groups": ["p"] * 5}, Reason.DAMAGED),
        ({"images": IMAGES.astype(np.float32)}, Reason.NOT_AN_IMAGE),
        ({"images": IMAGES[0]}, Reason.NOT_AN_IMAGE),
        ({"images": np.asfortranarray(IMAGES)}, Reason.NOT_AN_IMAGE),
        ({"images": np.zeros((6, 4, 4, 4), np.uint8)}, Reason.NOT_AN_IMAGE),
        ({"images": IMAGES[:0], "labels": np.zeros(0, int)}, Reason.NOT_AN_IMAGE),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value.name,
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], reason: Reason) -> None:
    assert refusal(written(tmp_path / "x.npz", **{"images": IMAGES, "labels": [0] * 6, **change})) is reason


def test_other_archives_are_no_image_sets(tmp_path: Path) -> None:
    assert refusal(written(tmp_path / "x.npz", weights=IMAGES)) is Reason.NOT_AN_IMAGE
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert refusal(tmp_path / "y.npz") is Reason.NOT_AN_IMAGE
    (tmp_path / "z.npz").write_bytes(b"PK\x03\x04 and no more")
    assert refusal(tmp_path / "z.npz") is Reason.DAMAGED


class Payload:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("name", ["images", "labels", "groups", "label_names"])
def test_pickled_objects_are_not_touched(tmp_path: Path, name: str) -> None:
    evil = np.empty(6, object)
    evil[:] = [Payload()] * 6
    arrays: dict[str, Any] = {"images": IMAGES, "labels": [0] * 6, name: evil}
    assert refusal(written(tmp_path / "x.npz", **arrays)) is Reason.NOT_AN_IMAGE


def claiming(path: Path, shape: tuple[int, ...], held: int, *, name: str = "images", kind: str = "|u1") -> Path:
    """Write a set one of whose arrays claims a shape and holds so many bytes, all zero and well compressed."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": kind, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for other, array in {"images": IMAGES, "labels": np.zeros(6, int)}.items():
            if other != name:
                with archive.open(f"{other}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array))
        with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            file.write(head.getvalue())
            for _ in range(held // 2**20):
                file.write(bytes(2**20))
    return path


@pytest.mark.parametrize(
    ("shape", "name", "reason"),
    [
        ((6, 2**20, 2**20), "images", Reason.TOO_MANY_PIXELS),
        ((6, 2**14, 2**14), "images", Reason.TOO_MANY_PIXELS),
        ((6, -1, 7), "images", Reason.DAMAGED),
        ((-1, 5, 7), "images", Reason.DAMAGED),
        ((2**40,), "labels", Reason.TOO_MANY_PIXELS),
        ((-1,), "labels", Reason.DAMAGED),
        ((6, 2**13, 2**13), "images", Reason.DAMAGED),  # small enough, and not all there
    ],
)
def test_bombs_are_not_inflated(tmp_path: Path, shape: tuple[int, ...], name: str, reason: Reason) -> None:
    path = claiming(tmp_path / "x.npz", shape, 160 * 2**20, name=name, kind="|u1" if name == "images" else "<i8")
    assert path.stat().st_size < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(path) is reason
    if reason is not Reason.DAMAGED or min(shape) < 0:
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # KiB


def test_memory_is_that_of_one_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("labels.npy", "w") as file:
            np.lib.format.write_array(file, np.zeros(64, int))
        with archive.open("images.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (64, 1024, 1024)}
            )
            for number in range(64):
                file.write(bytes([number]) * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [int(p.values[0, 0]) for p in read_npz(tmp_path / "x.npz", Reading())] == list(range(64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15  # KiB


def test_more_data_than_the_header_says_is_damage(tmp_path: Path) -> None:
    assert refusal(claiming(tmp_path / "x.npz", (6, 5, 7), 2**20)) is Reason.DAMAGED


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_changed_byte_in_the_images_is_damage(tmp_path: Path, save: Any) -> None:
    path = tmp_path / "x.npz"
    save(path, images=IMAGES, labels=[0] * 6)
    data = bytearray(path.read_bytes())
    data[300] ^= 1  # within the images, whose header is 128 bytes long
    path.write_bytes(data)
    assert refusal(path) is Reason.DAMAGED


def _whole() -> bytes:
    out = io.BytesIO()
    np.savez_compressed(out, images=IMAGES, labels=[0, 1] * 3, groups=[1, 1, 2, 2, 3, 3], label_names=["a", "b"])
    return out.getvalue()


WHOLE = _whole()


@settings(max_examples=80)
@given(
    cut=st.one_of(st.none(), st.integers(0, len(WHOLE))),
    changes=st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=3),
)
def test_damaged_sets_are_refused_or_right(
    tmp_path_factory: pytest.TempPathFactory, cut: int | None, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE)
    for place, byte in changes:
        data[place] = byte
    path = tmp_path_factory.mktemp("damaged") / "x.npz"
    path.write_bytes(data[:cut])
    try:
        found = read(path)
    except Refused:
        return
    np.testing.assert_array_equal([p.values for p in found], IMAGES)
    # A change of a name in the archive can cost the groups or the names: then there are no patients.
    assert all(p.label in {"a", "b", "0", "1"} for p in found)
    assert [p.identifiers.get("PatientID") for p in found] in ([*"112233"], [None] * 6)


# The real sets.

RECIPE = Recipe(1, 16)


def real_groups(shared_data: Path, tmp_path: Path, name: str) -> Any:
    """Index a real set and return its own groups, or None."""
    source = shared_data / "npz" / f"{name}.npz"
    if not source.exists():
        pytest.skip(f"the real images of {name} are not here: shared/data/npz is incomplete")
    counts = index(Plan(tmp_path / "site", [source], [RECIPE], key=KEY, leave_out_shared=True, split=Split(0.1, 0.3)))
    assert (counts.read, counts.refused, counts.leaks) == (1, 0, 0)
    with np.load(source) as data:
        return data["groups"] if "groups" in data.files else None


def on_two_sides(site: Site, pool: Pool, groups: Any, episodes: int) -> int:
    """Return how many episodes have a group on both sides; a picture is known again by its place in the set."""
    generator = np.random.default_rng(0)
    numbered = np.unique(groups, return_inverse=True)[1] + 1
    # Instead of pixels, images that say which group they are of: what episodes hold is read off them.
    shape = (len(site.cache), *site.cache.shape[1:])
    labelled = np.zeros(shape, np.uint8)
    for digit in range(4):
        labelled[:, 0, 0, digit] = numbered[: len(labelled)] >> (8 * digit) & 255
    object.__setattr__(site, "cache", labelled[:, :, :1, :4])
    spec = Episodes(ways=2, shots=5, queries=10)
    both = 0
    for _ in range(episodes // 500):
        batch = draw(site, pool, spec, 500, generator)
        sides = []
        for side in (batch.support, batch.query):
            digits = (side.x[:, :, 0, 0].numpy() * 63.75 + 127.5).round().astype(np.int64)
            assert (digits[..., :4] >= 0).all()
            found = (digits * 256 ** np.arange(4)).sum(-1)
            assert side.mask is not None
            sides.append(np.where(side.mask.numpy(), found, 0))
        support, query = sides
        assert (support.max(1) > 0).all()
        same = (support[:, :, None] == query[:, None, :]) & (support[:, :, None] > 0)
        both += int(same.any((1, 2)).sum())
    return both


@pytest.mark.parametrize("name", ["bccd_cells3_48", "ham10000_vienna_64"])
def test_real_sets_index_with_their_groups(shared_data: Path, tmp_path: Path, name: str) -> None:
    groups = real_groups(shared_data, tmp_path, name)
    site = open_site(tmp_path / "site", RECIPE)
    with open_catalogue(site.folder / "catalogue.sqlite") as catalogue:
        stored = catalogue.database.execute("SELECT frame, own_patient FROM image").fetchall()
    assert len(stored) == len(groups)
    # One patient for each group, and one group for each patient.
    pairs = {(str(groups[frame]), who) for frame, who in stored}
    assert len(pairs) == len(set(map(str, groups))) == len({who for _, who in pairs})
    pool = make_pool(site, site.label_names, 0, ("train",))
    assert len(pool.classes) >= 2
    assert on_two_sides(site, pool, groups, 10_000) == 0


def test_real_pictures_without_groups_are_in_no_episode(shared_data: Path, tmp_path: Path) -> None:
    assert real_groups(shared_data, tmp_path, "pneumoniamnist_reassembled") is None
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        report = contents(catalogue)
    assert (report["pictures"], report["aside"]) == (0, {"no patient": 4708 + 524 + 624})
    with pytest.raises(NotPreparedError):
        open_site(tmp_path / "site", RECIPE)
    # Said to be of a patient each, they are drawn; equal ones stay together, and once in an episode.
    source = shared_data / "npz" / "pneumoniamnist_reassembled.npz"
    index(Plan(tmp_path / "site", [source], [RECIPE], key=KEY, split=Split(0.1, 0.3), each_a_patient=True))
    site = open_site(tmp_path / "site", RECIPE)
    assert len(site.labels) > 5000
    pool = make_pool(site, site.label_names, 0, ("train",))
    groups = np.full(len(site.cache), -1)
    groups[site.slots] = site.patients
    assert on_two_sides(site, pool, groups, 10_000) == 0


def test_pictures_that_name_no_patient_can_be_patients_of_their_own(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), np.uint8)
    images[1] = images[0]
    labels = np.arange(40) % 2
    labels[1] = labels[0]
    plan = Plan(tmp_path / "site", [written(tmp_path / "x.npz", images=images, labels=labels)], [Recipe(1, 8)], key=KEY)
    index(plan)
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        assert contents(catalogue)["aside"] == {"no patient": 40}
    index(replace(plan, each_a_patient=True))
    index(plan)  # once said, it stays
    site = open_site(tmp_path / "site", Recipe(1, 8))
    assert len(site.labels) == len(set(site.patients)) == 39
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        assert contents(catalogue)["aside"] == {"same picture twice": 1}


def test_the_count_of_groups_on_two_sides_can_fail(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 8, 8), np.uint8)
    path = written(tmp_path / "x.npz", images=images, labels=np.arange(80) % 2, groups=np.arange(80))
    index(Plan(tmp_path / "site", [path], [Recipe(1, 8)], key=KEY, split=Split(0.0, 0.1)))
    site = open_site(tmp_path / "site", Recipe(1, 8))
    pool = make_pool(site, site.label_names, 0, ("train",))
    assert on_two_sides(site, pool, np.arange(80), 500) == 0
    assert on_two_sides(site, pool, np.arange(80) // 40, 500) > 0


def test_labels_of_a_file_and_of_a_table_must_agree(tmp_path: Path) -> None:
    path = written(tmp_path / "x.npz", images=IMAGES, labels=[0, 1] * 3, groups=list("ppqqrr"), label_names=["a", "b"])
    labels = Labels(table(tmp_path / "l.csv", [("PatientID", "label"), ("p", "a"), ("s", "a")]), {})
    index(Plan(tmp_path / "site", [path], [Recipe(1, 8)], labels, key=KEY))
    with open_catalogue(tmp_path / "site" / "catalogue.sqlite") as catalogue:
        report = contents(catalogue)
    assert report["aside"] == {"conflicting labels": 1}
    assert report["labels"] == {"rows": 2, "repeated": 0, "unmatched": 1}
