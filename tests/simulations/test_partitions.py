"""Partitions: every image once, groups whole, no empty site, and the skew that was asked for."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.errors import DataError
from simulations import partitions
from simulations.figures.partition import draw_partition
from simulations.partitions import scanner_shift, split_by_site
from simulations.public import LabelledImages, load

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"

Partition = Callable[[LabelledImages, int, np.random.Generator], NDArray[np.int64]]

SKEWS: dict[str, Partition] = {
    "iid": lambda data, sites, rng: partitions.iid(data, sites=sites, generator=rng),
    "quantity": lambda data, sites, rng: partitions.quantity(data, sites=sites, alpha=0.3, generator=rng),
    "dirichlet 1e-4": lambda data, sites, rng: partitions.dirichlet(data, sites=sites, alpha=1e-4, generator=rng),
    "dirichlet 1": lambda data, sites, rng: partitions.dirichlet(data, sites=sites, alpha=1, generator=rng),
}


def images_of(groups: NDArray[np.int64], labels: NDArray[np.int64]) -> LabelledImages:
    names = tuple(f"class {k}" for k in range(int(labels.max()) + 2))  # one class without images
    images = np.arange(len(groups) * 4, dtype=np.uint32).astype(np.uint8).reshape(-1, 2, 2)
    return LabelledImages(images, labels, names, groups.astype(np.str_), None, ())


def single(labels: NDArray[np.int64]) -> LabelledImages:
    return images_of(np.arange(len(labels)), labels)


def class_counts(data: LabelledImages, site_of: NDArray[np.int64]) -> NDArray[np.int64]:
    counts = np.zeros((site_of.max() + 1, len(data.label_names)), dtype=np.int64)
    np.add.at(counts, (site_of, data.labels), 1)
    return counts


def numbers(n: int, top: int) -> st.SearchStrategy[NDArray[np.int64]]:
    return st.lists(st.integers(0, top), min_size=n, max_size=n).map(np.array)


@st.composite
def image_sets(draw: st.DrawFn) -> LabelledImages:
    n = draw(st.integers(1, 40))
    return images_of(draw(numbers(n, draw(st.integers(0, 40)))), draw(numbers(n, draw(st.integers(0, 5)))))


def check(data: LabelledImages, site_of: NDArray[np.int64], sites: int) -> None:
    assert site_of.shape == data.labels.shape
    assert site_of.dtype == np.int64
    assert np.unique(site_of).tolist() == list(range(sites))
    assert len(set(zip(data.groups, site_of, strict=True))) == len(set(data.groups))


@pytest.mark.parametrize("skew", SKEWS)
@settings(max_examples=25)
@given(data=image_sets(), sites=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_image_is_at_one_site_with_its_group(skew: str, data: LabelledImages, sites: int, seed: int) -> None:
    def make() -> NDArray[np.int64]:
        return SKEWS[skew](data, sites, np.random.default_rng(seed))

    n_groups = len(set(data.groups))
    if n_groups < sites:
        with pytest.raises(DataError, match=f"at most {n_groups} sites"):
            make()
        return
    site_of = make()
    check(data, site_of, sites)
    assert np.array_equal(site_of, make())


@settings(max_examples=60)
@given(
    labels=st.lists(st.integers(0, 5), min_size=1, max_size=60).map(np.array),
    sites=st.integers(1, 9),
    classes=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_pathological_gives_exactly_so_many_classes_or_says_why_not(
    labels: NDArray[np.int64], sites: int, classes: int, seed: int
) -> None:
    data, sizes = single(labels), np.unique(labels, return_counts=True)[1]
    possible = len(sizes) <= sites * classes <= np.minimum(sizes, sites).sum()
    if len(labels) < sites or not possible:
        with pytest.raises(DataError, match="sites"):
            partitions.pathological(data, sites=sites, classes_per_site=classes, generator=np.random.default_rng(seed))
        return
    site_of, again = (
        partitions.pathological(data, sites=sites, classes_per_site=classes, generator=np.random.default_rng(seed))
        for _ in range(2)
    )
    check(data, site_of, sites)
    assert np.array_equal(site_of, again)
    assert ((class_counts(data, site_of) > 0).sum(axis=1) == classes).all()


def test_pathological_keeps_mixed_groups_whole() -> None:
    rng = np.random.default_rng(0)
    data = images_of(rng.integers(0, 60, 300), rng.integers(0, 4, 300))
    check(data, partitions.pathological(data, sites=6, classes_per_site=2, generator=rng), 6)


def test_balanced_pathological_has_even_shards_as_published() -> None:
    data = single(np.repeat(np.arange(10), 60))  # 10 digits for 100 sites of two: shards of 3, as 300 in 60,000
    site_of = partitions.pathological(data, sites=100, classes_per_site=2, generator=np.random.default_rng(0))
    counts = class_counts(data, site_of)
    assert set(counts[counts > 0]) == {3}


def test_other_seed_gives_another_partition() -> None:
    data = single(np.repeat(np.arange(4), 50))
    for skew in SKEWS.values():
        first, second = (skew(data, 5, np.random.default_rng(seed)) for seed in (0, 1))
        assert not np.array_equal(first, second)


def skew_of(data: LabelledImages, alpha: float) -> float:
    """Return the mean total variation distance between a site's class mix and the whole set's, over seeds."""
    whole = np.bincount(data.labels, minlength=len(data.label_names)) / len(data.labels)
    distances = []
    for seed in range(5):
        counts = class_counts(
            data, partitions.dirichlet(data, sites=6, alpha=alpha, generator=np.random.default_rng(seed))
        )
        mixes = counts / counts.sum(axis=1, keepdims=True)
        distances.append(0.5 * np.abs(mixes - whole).sum(axis=1).mean())
    return float(np.mean(distances))


def test_smaller_alpha_skews_labels_more_also_with_a_dominant_class() -> None:
    data = single(np.repeat(np.arange(5), (714, 186, 326, 282, 92)))
    strong, middle, weak = (skew_of(data, alpha) for alpha in (0.01, 1, 1000))
    assert strong > 0.5
    assert strong > middle > weak
    assert weak < 0.08


def test_mixes_of_dirichlet_are_as_published() -> None:
    """Only the last of many sites meet an empty class; a site's count is else Beta-binomial."""
    data = single(np.repeat(np.arange(2), (3000, 1000)))
    alpha, n, p, shares = 4.0, 4, 0.75, []
    for seed in range(4):
        site_of = partitions.dirichlet(data, sites=1000, alpha=alpha, generator=np.random.default_rng(seed))
        counts = class_counts(data, site_of)[:, :2]
        assert (counts.sum(axis=1) == n).all()
        shares.append(counts[:, 0] / n)
    assert np.var(shares) == pytest.approx(p * (1 - p) / n * (n + alpha) / (1 + alpha), rel=0.1)


def test_quantity_skews_sizes_and_not_labels() -> None:
    data = single(np.tile(np.arange(2), 2000))
    sizes, mixes = {}, []
    for alpha in (0.3, 1000.0):
        site_of = partitions.quantity(data, sites=5, alpha=alpha, generator=np.random.default_rng(3))
        counts = class_counts(data, site_of)
        sizes[alpha] = counts.sum(axis=1)
        mixes += [row[0] / row.sum() for row in counts if row.sum() > 200]
    assert sizes[0.3].max() > 3 * sizes[1000.0].max() / 2
    assert sizes[1000.0].min() > 700
    assert np.allclose(mixes, 0.5, atol=0.1)
    even = partitions.quantity(single(np.arange(23)), sites=5, alpha=1e9, generator=np.random.default_rng(0))
    assert sorted(np.bincount(even)) == [4, 4, 5, 5, 5]


def test_iid_sizes_differ_by_at_most_one() -> None:
    site_of = partitions.iid(single(np.zeros(23, dtype=np.int64)), sites=5, generator=np.random.default_rng(0))
    assert sorted(np.bincount(site_of)) == [4, 4, 5, 5, 5]


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("skew", [partitions.dirichlet, partitions.quantity])
def test_bad_alpha_is_refused(skew: Callable[..., NDArray[np.int64]], alpha: float) -> None:
    with pytest.raises(DataError, match="alpha"):
        skew(single(np.arange(6)), sites=2, alpha=alpha, generator=np.random.default_rng(0))


@pytest.mark.parametrize("skew", SKEWS)
def test_no_sites_are_refused(skew: str) -> None:
    with pytest.raises(DataError, match="at least one"):
        SKEWS[skew](single(np.arange(6)), 0, np.random.default_rng(0))


def with_sites(groups: list[str], sites: list[int], names: tuple[str, ...]) -> LabelledImages:
    n = len(groups)
    images = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2)
    return LabelledImages(images, np.zeros(n, np.int64), ("a",), np.array(groups), np.array(sites), names)


def test_by_site_is_the_natural_column_or_refused() -> None:
    site_of = partitions.by_site(with_sites(["a", "a", "b", "c"], [1, 1, 0, 1], ("p", "q")))
    assert site_of.tolist() == [1, 1, 0, 1]
    with pytest.raises(DataError, match="1 groups"):
        partitions.by_site(with_sites(["a", "a", "b"], [0, 1, 1], ("p", "q")))
    with pytest.raises(DataError, match="from q"):
        partitions.by_site(with_sites(["a", "b"], [0, 2], ("p", "q", "r")))
    with pytest.raises(DataError, match="source sites"):
        partitions.by_site(single(np.arange(3)))


def test_split_returns_every_image_in_order() -> None:
    data = with_sites(["a", "b", "c", "d"], [1, 0, 1, 0], ("p", "q"))
    first, second = split_by_site(data, partitions.by_site(data))
    assert first.groups.tolist() == ["b", "d"]
    assert second.groups.tolist() == ["a", "c"]
    assert np.array_equal(second.images, data.images[[0, 2]])
    assert second.sites is not None
    assert second.sites.tolist() == [1, 1]
    assert second.site_names == data.site_names


def test_real_sites_of_ham10000() -> None:
    path = SHARED / "npz" / "ham10000_vienna_64.npz"
    if not path.exists():
        pytest.skip("real images are not beside the checkout: ../shared/data/npz/ham10000_vienna_64.npz")
    data = load(f"npz:{path}")
    counts = class_counts(data, partitions.by_site(data))
    assert counts.tolist() == [
        [11, 83, 204, 21, 261, 600, 29],
        [0, 2, 85, 26, 17, 600, 46],
        [0, 3, 7, 2, 35, 170, 3],
    ]
    assert [len(part.images) for part in split_by_site(data, partitions.by_site(data))] == [1209, 776, 220]


# The scanner


@pytest.mark.parametrize("shape", [(5, 28, 30), (5, 28, 30, 3), (2, 12, 14, 16)])
def test_scanner_keeps_shape_and_type_and_differs_between_sites(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    before = images.copy()
    one, same, two = (
        scanner_shift(images, site=site, strength=1, generator=np.random.default_rng(5)) for site in (0, 0, 1)
    )
    assert one.shape == shape
    assert one.dtype == np.uint8
    assert np.array_equal(images, before)
    assert np.array_equal(one, same)
    assert not np.array_equal(one, two)


def test_scanner_of_strength_zero_changes_nothing() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 9, 9), dtype=np.uint8)
    shifted = scanner_shift(images, site=3, strength=0, generator=np.random.default_rng(0))
    assert np.array_equal(shifted, images)
    assert not np.shares_memory(shifted, images)
    faint = scanner_shift(images, site=3, strength=0.001, generator=np.random.default_rng(0))
    assert np.abs(faint.astype(int) - images).max() <= 2


def test_scanner_is_the_same_for_all_images_of_a_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat images have nothing to blur, so that a grey level maps to one level up to the site's noise."""
    monkeypatch.setattr(partitions, "_CHUNK_PIXELS", 3 * 32 * 32)
    flat = np.full((40, 32, 32), 100, dtype=np.uint8)
    shifted = scanner_shift(flat, site=2, strength=1, generator=np.random.default_rng(0)).astype(float)
    means, spreads = shifted.mean(axis=(1, 2)), shifted.std(axis=(1, 2))
    assert np.ptp(means) < 6 * spreads.mean() / 32
    assert np.ptp(spreads) < 0.3 * spreads.mean()
    assert not np.array_equal(shifted[0], shifted[3])  # parameters are the site's, noise is each image's own


def test_blur_keeps_the_sum_and_has_the_given_width() -> None:
    point = np.zeros((1, 61, 61, 3), dtype=np.float32)
    point[:, 30, 30, 0] = 1
    blurred = partitions._blurred(point, 2.5)
    assert blurred.sum(axis=(0, 1, 2)) == pytest.approx([1, 0, 0], abs=1e-5)
    offset = np.arange(61) - 30
    for axis in (1, 2):
        profile = blurred[0, :, :, 0].sum(axis=2 - axis)
        assert (profile * offset**2).sum() == pytest.approx(2.5**2, rel=0.02)
    assert np.array_equal(partitions._blurred(point, 0.0), point)


@pytest.mark.parametrize("strength", [-0.1, np.nan, np.inf])
def test_bad_strength_is_refused(strength: float) -> None:
    with pytest.raises(DataError, match="strength"):
        scanner_shift(np.zeros((1, 4, 4), np.uint8), site=0, strength=strength, generator=np.random.default_rng(0))


# The picture


def test_picture_is_a_png_that_shows_the_counts(tmp_path: Path) -> None:
    path = tmp_path / "partition.png"
    counts = np.array([[0, 5, 1200], [3, 0, 40]])
    names = (r"not $\maths$", "a class with a very long name indeed, cut short"), ("s", "t")
    draw_partition(counts, names[1], (*names[0], "c"), path, title="A title: $alpha = 0.3")
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    draw_partition(counts[:, [1, 0, 2]], names[1], (*names[0], "c"), path, title="A title: $alpha = 0.3")
    assert path.read_bytes() != first
    assert list(tmp_path.iterdir()) == [path]


def test_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "partition.png"
    path.write_bytes(b"old")

    def no_space(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(OSError, match="no space"):
        draw_partition(np.array([[1]]), ("s",), ("a",), path, title="t")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("counts", [np.zeros((1, 2), int), np.array([[1, -1]]), np.ones((2, 2), int)])
def test_counts_that_do_not_fit_are_refused(tmp_path: Path, counts: NDArray[np.int64]) -> None:
    with pytest.raises(DataError, match="counts"):
        draw_partition(counts, ("s",), ("a", "b"), tmp_path / "p.png", title="t")
