"""Public sets: both npz layouts, MedMNIST's checksums, and everything that must be refused."""

import contextlib
import hashlib
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from simulations import medmnist
from simulations.public import LabelledImages, load

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"real images are not beside the checkout: ../shared/data/{name}")
    return path


def class_counts(data: LabelledImages) -> dict[str, int]:
    return dict(zip(data.label_names, np.bincount(data.labels, minlength=len(data.label_names)), strict=True))


@pytest.mark.parametrize(
    ("name", "shape", "counts", "n_groups"),
    [
        (
            "npz/ham10000_vienna_64.npz",
            (2205, 64, 64, 3),
            {"akiec": 11, "bcc": 88, "bkl": 296, "df": 49, "mel": 313, "nv": 1370, "vasc": 78},
            2205,
        ),
        ("npz/bccd_cells3_48.npz", (1431, 48, 48, 3), {"RBC": 698, "WBC": 372, "Platelets": 361}, 364),
        ("npz/pneumoniamnist_reassembled.npz", (5856, 28, 28), {"0": 1583, "1": 4273}, 5856 - 29),
        (
            "npz/mednist_1000x6_64.npz",
            (6000, 64, 64),
            dict.fromkeys(("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT"), 1000),
            6000 - 14,
        ),
    ],
)
def test_real_sets_have_the_published_counts_and_one_group_per_duplicate(
    name: str, shape: tuple[int, ...], counts: dict[str, int], n_groups: int
) -> None:
    data = load(f"npz:{shared(name)}")
    assert data.images.shape == shape
    assert class_counts(data) == counts
    assert len(np.unique(data.groups)) == n_groups


def test_real_sites_are_named_and_counted() -> None:
    data = load(f"npz:{shared('npz/ham10000_vienna_64.npz')}")
    assert data.site_names == ("vidir_modern", "vidir_molemax", "vienna_dias")
    assert data.sites is not None
    assert np.bincount(data.sites).tolist() == [1209, 776, 220]


def test_drawers_of_omniglot_are_no_groups() -> None:
    data = load(f"npz:{shared('fewshot/omniglot_dev5_28.npz')}", size=28)
    assert data.label_names[0] == "Balinese/character01"
    assert data.site_names == ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")
    assert class_counts(data) == dict.fromkeys(data.label_names, 20)
    assert len(np.unique(data.groups)) == len(data.images) == 2720


def test_official_medmnist_file_in_the_cache_is_used_and_not_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(shared("npz/retinamnist.npz"), tmp_path)
    monkeypatch.setenv("WARDROUND_CACHE", str(tmp_path))
    monkeypatch.setattr("pooch.retrieve", None)
    data = load("medmnist:retinamnist")
    assert data.images.shape == (1600, 28, 28, 3)
    assert class_counts(data) == {"0": 714, "1": 186, "2": 326, "3": 282, "4": 92}
    with np.load(tmp_path / "retinamnist.npz") as file:
        assert np.array_equal(data.images[1080:1200], file["val_images"])


# MedMNIST's path on a set of our own, so that it runs everywhere.


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Publish a tiny set of volumes under the registry's name ``tiny3d``, and return its file."""
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for split, n in (("train", 4), ("val", 2), ("test", 3)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = rng.integers(0, 2, (n, 1), dtype=np.uint8)
    path = tmp_path / "published" / "tiny3d_64.npz"
    path.parent.mkdir()
    np.savez(path, **arrays)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    facts = medmnist.MedMnistSet("binary-class", 1, "CC BY 4.0", ("benign", "malignant"), {64: md5})
    monkeypatch.setitem(medmnist.SETS, "tiny3d", facts)
    return path


@pytest.fixture
def server(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the folder of ``tiny`` in place of the public record; return the addresses asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tiny.parent))

        def log_message(self, format: str, *args: Any) -> None:
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        monkeypatch.setattr(medmnist, "RECORD", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield asked
        running.shutdown()
        thread.join()


def test_missing_file_is_fetched_once_and_verified(tmp_path: Path, server: list[str]) -> None:
    for _ in range(2):
        data = load("medmnist:tiny3d", size=64, cache=tmp_path / "cache")
        assert data.images.shape == (9, 28, 28, 28)
        assert data.label_names == ("benign", "malignant")
    assert server == ["/tiny3d_64.npz?download=1"]


def test_altered_download_is_refused_and_leaves_nothing(tmp_path: Path, tiny: Path, server: list[str]) -> None:
    damaged = bytearray(tiny.read_bytes())
    damaged[-1] ^= 1
    tiny.write_bytes(damaged)
    with pytest.raises(DataError, match="hash"):
        load("medmnist:tiny3d", size=64, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_unknown_address_is_a_data_error_that_names_the_way_out(tmp_path: Path, tiny: Path, server: list[str]) -> None:
    tiny.unlink()
    with pytest.raises(DataError, match="by hand"):
        load("medmnist:tiny3d", size=64, cache=tmp_path / "cache")


def test_corrupt_cached_file_is_refused_untouched_and_never_replaced(
    tmp_path: Path, tiny: Path, server: list[str]
) -> None:
    cached = tmp_path / tiny.name
    damaged = bytearray(tiny.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    cached.write_bytes(damaged)
    with pytest.raises(DataError, match="checksum"):
        load("medmnist:tiny3d", size=64, cache=tmp_path)
    assert cached.read_bytes() == damaged
    assert server == []


@pytest.mark.parametrize(
    ("source", "size", "reason"),
    [
        ("medmnist:chestmnist", None, "multi-label"),
        ("medmnist:retinamnist", 32, "28, 64, 128, 224"),
        ("medmnist:organmnist3d", 224, "28, 64"),
        ("medmnist:retina", None, "retinamnist"),
        ("folder:x", None, "npz:PATH"),
        ("npz:", None, "npz:PATH"),
        ("npz:missing.npz", None, "no file"),
    ],
)
def test_unusable_sources_are_refused(source: str, size: int | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=reason):
        load(source, size=size, cache=tmp_path)


def test_registry_is_complete() -> None:
    assert len(medmnist.SETS) == 18
    checksums = [md5 for facts in medmnist.SETS.values() for md5 in facts.md5.values()]
    assert len(set(checksums)) == 12 * 4 + 6 * 2
    assert all(len(md5) == 32 and int(md5, 16) >= 0 for md5 in checksums)
    assert medmnist.url("bloodmnist", 28).endswith("/bloodmnist.npz?download=1")


# The flat layout


def save(path: Path, **changes: Any) -> str:
    """Write a correct flat set, with some columns changed or (None) left out; return its source."""
    images = np.zeros((4, 5, 6), dtype=np.uint8)
    images[:, 0, 0] = (1, 2, 1, 3)
    columns = {"images": images, "labels": np.array([0, 1, 1, 2]), **changes}
    np.savez(path / "set.npz", **{key: value for key, value in columns.items() if value is not None})
    return f"npz:{path / 'set.npz'}"


def test_names_come_from_the_description_then_the_file_then_the_numbers(tmp_path: Path) -> None:
    assert load(save(tmp_path)).label_names == ("0", "1", "2")
    source = save(tmp_path, label_names=np.array(["a", "b", "c"]), sites=np.array([0, 0, 1, 1]))
    assert load(source).label_names == ("a", "b", "c")
    assert load(source).site_names == ("0", "1")
    (tmp_path / "set.json").write_text('{"label_names": ["x", "y", "z", "unseen"], "site_names": ["p", "q"]}')
    assert load(source).label_names == ("x", "y", "z", "unseen")
    assert load(source).site_names == ("p", "q")


def test_equal_images_share_a_group_unless_the_set_names_groups(tmp_path: Path) -> None:
    groups = load(save(tmp_path)).groups
    assert groups[0] == groups[2]
    assert len(set(groups)) == 3
    assert load(save(tmp_path, groups=np.array([7, 7, 8, 8]))).groups.tolist() == ["7", "7", "8", "8"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.eye(4, 3, dtype=int)}, "multi-label"),
        ({"labels": None}, "no `labels`"),
        ({"labels": np.array([0.0, 1, 1, 2])}, "integers"),
        ({"labels": np.array([0, 1, -1, 2])}, "from -1"),
        ({"labels": np.array([0, 1, 1])}, "one per image"),
        ({"label_names": np.array(["a", "b"])}, "2 names"),
        ({"sites": np.array([0, 1])}, "one per image"),
        ({"groups": np.array(["a", "b"])}, "one group per image"),
        ({"images": np.zeros((4, 5, 6))}, "float64"),
        ({"images": np.zeros((4, 5, 6, 1), np.uint8)}, "uint8"),
        ({"images": np.zeros((0, 5, 6), np.uint8), "labels": np.zeros(0, int)}, "at least one"),
        ({"images": None}, "train_images"),
        ({"images": np.array([{}], dtype=object)}, "plain arrays"),
    ],
)
def test_sets_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        load(save(tmp_path, **changes))


def test_wrong_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5x6"):
        load(save(tmp_path), size=5)


@pytest.mark.parametrize("text", ["{", '{"label_names": "abc"}', "3"])
def test_broken_description_is_refused(tmp_path: Path, text: str) -> None:
    source = save(tmp_path)
    (tmp_path / "set.json").write_text(text)
    with pytest.raises(DataError, match=r"set\.json"):
        load(source)


def test_any_damaged_file_is_read_or_refused(tmp_path: Path) -> None:
    source = save(tmp_path)
    whole = (tmp_path / "set.npz").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(80):
        damaged = bytearray(whole[: rng.integers(len(whole) + 1)] if rng.random() < 0.2 else whole)
        for at in rng.integers(len(whole), size=3):
            if at < len(damaged):
                damaged[at] = rng.integers(256)
        (tmp_path / "set.npz").write_bytes(damaged)
        with contextlib.suppress(DataError):
            load(source)
