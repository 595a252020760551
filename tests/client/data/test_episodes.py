"""Episodes over random small sites: whatever the site has, no patient is ever on both sides."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.data.episodes import Pool, draw, make_pool
from client.data.store import SPLITS, Site
from common.errors import DataError
from common.meta import Batch, Episodes
from common.study import Episodes as Spec

NAMES = ("a", "b", "c", "d", "e")


def make_site(patients: list[int], labels: list[int], is_test: list[bool] | None = None) -> Site:
    """Return a site of images that carry their own slot in their pixels."""
    slots = np.arange(len(labels))
    pixels = np.stack([slots // 256, slots % 256], axis=1).astype(np.uint8).reshape(-1, 1, 1, 2)
    present = sorted({NAMES[label] for label in labels})
    index = np.array([present.index(NAMES[label]) for label in labels])
    split = 2 * np.array(is_test if is_test is not None else [False] * len(labels), np.int8)
    keys = tuple(bytes([patient]) * 16 for patient in range(max(patients) + 1))
    return Site(Path("nowhere"), 0, "hospital-0", pixels, slots, index, tuple(present), np.array(patients), split, keys)


@st.composite
def sites(draw: st.DrawFn, *, one_class_each: bool = False) -> Site:
    """Draw a site; unless told otherwise a patient's images may show several classes."""
    patients, labels = [], []
    for patient in range(draw(st.integers(1, 12))):
        own = draw(st.integers(0, len(NAMES) - 1))
        for _ in range(draw(st.integers(1, 4))):
            patients.append(patient)
            labels.append(own if one_class_each else draw(st.sampled_from([own, draw(st.integers(0, 4))])))
    order = draw(st.permutations(range(len(labels))))
    return make_site([patients[i] for i in order], [labels[i] for i in order])


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    fixed = draw(st.booleans())
    return Spec(
        labels="fixed" if fixed else "shuffled",
        classes=",".join(NAMES),
        held_out="",
        ways=draw(st.integers(2, 5)),
        shots=draw(st.integers(1, 4)),
        queries=draw(st.integers(1, 4)),
    )


@given(sites(), st.data())
def test_a_pool_among_some_patients_is_that_of_a_site_without_the_others(site: Site, data: st.DataObject) -> None:
    among = np.array([data.draw(st.booleans()) for _ in site.keys])
    keep = among[site.patients]
    fewer = Site(**{**vars(site), **{k: vars(site)[k][keep] for k in ("slots", "labels", "patients", "split")}})
    one, other = make_pool(site, NAMES, 0, ("train",), among=among), make_pool(fewer, NAMES, 0, ("train",))
    assert one.classes == other.classes
    for ours, theirs in zip(one.images, other.images, strict=True):
        assert np.array_equal(ours.patients, theirs.patients)
        assert np.array_equal(site.slots[ours.slots], fewer.slots[theirs.slots])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def slots_of(batch: Batch, task: int) -> NDArray[np.int64]:
    """Return the slots of a task's images, padding left out."""
    assert batch.mask is not None
    bytes_ = (batch.x[task] * 63.75 + 127.5).round().to(torch.int64).reshape(-1, 2)
    return (bytes_ @ torch.tensor([256, 1]))[batch.mask[task]].numpy()


def check_episodes(site: Site, pool: Pool, spec: Spec, episodes: Episodes, count: int) -> None:
    """Check everything that must hold of any episodes."""
    fixed = spec.labels == "fixed"
    ways = len(NAMES) if fixed else spec.ways
    assert episodes.classes.shape == (count, ways)
    for task in range(count):
        classes = episodes.classes[task].tolist()
        offered = [place for place in classes if place >= 0]
        if fixed:
            assert classes == list(range(len(NAMES)))
            expected = set(pool.classes)
        else:
            assert len(offered) == len(set(offered)) == min(ways, len(pool.classes))
            assert set(offered) <= set(pool.classes)
            assert set(classes) - set(offered) <= {-1}
            expected = set(offered)
        sides = []
        for batch, limit in ((episodes.support, spec.shots), (episodes.query, spec.queries)):
            assert batch.mask is not None
            assert batch.x.shape == (count, ways * limit, 1, 1, 2)
            assert batch.y.shape == batch.mask.shape == (count, ways * limit)
            slots, labels = slots_of(batch, task), batch.y[task][batch.mask[task]].numpy()
            assert not batch.y[task][~batch.mask[task]].any()
            true = [NAMES.index(site.label_names[site.labels[slot]]) for slot in slots]
            assert [classes[label] for label in labels] == true
            counts = Counter(true)
            assert set(counts) == expected
            assert max(counts.values()) <= limit
            sides.append(slots)
        both = np.concatenate(sides)
        assert len(set(both)) == len(both)
        support, query = (set(site.patients[slots].tolist()) for slots in sides)
        assert not support & query


@settings(max_examples=120)
@given(sites(), specs(), st.integers(0, 2**32))
def test_no_patient_is_on_both_sides(site: Site, spec: Spec, seed: int) -> None:
    pool = make_pool(site, NAMES, 0, ("train",))
    assume(len(pool.classes) >= 2)
    try:
        episodes = draw(site, pool, spec, 2, rng(seed))
    except DataError:
        reject()  # allowed, but only where patients show several classes: see the next test
    check_episodes(site, pool, spec, episodes, 2)


@settings(max_examples=60)
@given(sites(one_class_each=True), specs(), st.integers(0, 2**32))
def test_patients_of_one_class_each_always_give_episodes(site: Site, spec: Spec, seed: int) -> None:
    pool = make_pool(site, NAMES, 0, ("train",))
    assume(len(pool.classes) >= 2)
    episodes = draw(site, pool, spec, 3, rng(seed))
    check_episodes(site, pool, spec, episodes, 3)
    for place, images in zip(pool.classes, pool.images, strict=True):
        for task in range(3):
            for batch, limit in ((episodes.support, spec.shots), (episodes.query, spec.queries)):
                labels = [NAMES.index(site.label_names[site.labels[s]]) for s in slots_of(batch, task)]
                # As many images as were asked for, or all that the patients of this side have.
                if place in labels and labels.count(place) < limit:
                    sides = {int(site.patients[s]) for s in slots_of(batch, task)} & set(images.patients.tolist())
                    assert labels.count(place) == np.isin(site.patients[images.slots], list(sides)).sum()


@settings(max_examples=40)
@given(sites(), specs())
def test_fewer_than_two_classes_are_refused(site: Site, spec: Spec) -> None:
    pool = make_pool(site, NAMES[:1], 0, ("train",))
    assert len(pool.classes) <= 1
    with pytest.raises(DataError, match=f"this site offers {len(pool.classes)} here"):
        draw(site, pool, spec, 1, rng())


@settings(max_examples=40)
@given(sites(), st.data())
def test_a_pool_holds_exactly_the_images_of_its_split(site: Site, data: st.DataObject) -> None:
    side = data.draw(st.lists(st.integers(0, 2), min_size=12, max_size=12))
    split = Site(**{**vars(site), "split": np.array([side[p] for p in site.patients], np.int8)})
    for splits in (*[(name,) for name in SPLITS], SPLITS[:2], SPLITS):
        pool = make_pool(split, NAMES[1:], 1, splits)
        assert set(pool.classes) <= set(range(1, len(NAMES)))
        for place in range(1, len(NAMES)):
            there = [
                slot
                for slot in range(len(split.labels))
                if split.label_names[split.labels[slot]] == NAMES[place] and SPLITS[split.split[slot]] in splits
            ]
            if len({int(split.patients[slot]) for slot in there}) < 2:
                assert place not in pool.classes
                continue
            images = pool.images[pool.classes.index(place)]
            assert sorted(images.slots.tolist()) == there
            for number, patient in enumerate(images.patients.tolist()):
                assert images.place(patient) == number
                assert len(images.of(number)) == (split.patients[there] == patient).sum()
                assert (split.patients[images.of(number)] == patient).all()
            assert images.place(99) is images.place(-1) is None


def test_every_patient_and_image_is_as_likely_as_the_others() -> None:
    site = plenty()
    pool = make_pool(site, NAMES, 0, ("train",))
    episodes = draw(site, pool, spec(ways=5, shots=3, queries=3), 600, rng())
    for batch in (episodes.support, episodes.query):
        drawn = Counter(int(slot) for task in range(600) for slot in slots_of(batch, task))
        assert len(drawn) == len(site.labels)
        # 3 of 24 images of a class each time: 75 times on average, standard deviation 8.
        assert 40 < min(drawn.values()) <= max(drawn.values()) < 115


def plenty() -> Site:
    """Five classes, eight patients each, three images each."""
    number = np.arange(5 * 8 * 3)
    return make_site((number // 3).tolist(), (number // 24).tolist())


def spec(**values: object) -> Spec:
    plan = {"classes": ",".join(NAMES), "held_out": "", "ways": 3, "shots": 2, "queries": 4}
    return Spec.model_validate({**plan, **values})


def test_where_there_is_plenty_nothing_is_padding() -> None:
    site = plenty()
    episodes = draw(site, make_pool(site, NAMES, 0, ("train",)), spec(), 5, rng())
    for batch, limit in ((episodes.support, 2), (episodes.query, 4)):
        assert batch.mask is not None
        assert batch.mask.all()
        for task in range(5):
            assert Counter(batch.y[task].tolist()) == {0: limit, 1: limit, 2: limit}
            patients = site.patients[slots_of(batch, task)]
            assert len(set(patients.tolist())) == 3 * limit  # one image of every patient before a second one


def test_every_class_gets_every_label_and_every_patient_every_side() -> None:
    site = plenty()
    episodes = draw(site, make_pool(site, NAMES, 0, ("train",)), spec(), 200, rng())
    places = {(way, int(c)) for row in episodes.classes for way, c in enumerate(row)}
    assert places == {(way, place) for way in range(3) for place in range(5)}
    for batch in (episodes.support, episodes.query):
        seen = {int(slot) for task in range(200) for slot in slots_of(batch, task)}
        assert seen == set(range(len(site.labels)))


def test_fixed_labels_are_the_places_in_the_class_list() -> None:
    site = make_site([0, 0, 1, 2, 3, 3], [1, 1, 1, 3, 3, 3])  # only b and d
    pool = make_pool(site, NAMES, 0, ("train",))
    assert pool.classes == (1, 3)
    episodes = draw(site, pool, spec(labels="fixed", shots=1, queries=1), 4, rng())
    for batch in (episodes.support, episodes.query):
        assert batch.mask is not None
        for task in range(4):
            assert set(batch.y[task][batch.mask[task]].tolist()) == {1, 3}


def test_new_classes_come_after_the_known_ones() -> None:
    site = plenty()
    pool = make_pool(site, ("d", "missing", "e"), 7, ("train",))
    assert pool.classes == (7, 9)
    episodes = draw(site, pool, spec(), 3, rng())
    assert {int(c) for c in episodes.classes.flatten()} == {7, 9, -1}  # fewer classes than ways


def test_patients_that_share_everything_are_refused_in_words() -> None:
    site = make_site([0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2])
    pool = make_pool(site, NAMES, 0, ("train",))
    episodes = draw(site, pool, spec(), 2, rng())  # two patients: one on each side in every class
    check_episodes(site, pool, spec(), episodes, 2)
    # Three classes from three pairs of patients: whoever goes where, one class has one side only.
    ring = make_site([0, 1, 1, 2, 2, 0], [0, 0, 1, 1, 2, 2])
    with pytest.raises(DataError, match="use fewer ways or add patients"):
        draw(ring, make_pool(ring, NAMES, 0, ("train",)), spec(), 1, rng())


def test_the_same_generator_gives_the_same_episodes() -> None:
    site = plenty()
    pool = make_pool(site, NAMES, 0, ("train",))
    one, two, other = (draw(site, pool, spec(), 3, rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(one.support.x, two.support.x)
    assert torch.equal(one.classes, two.classes)
    assert not torch.equal(one.support.x, other.support.x)


def test_pixels_are_scaled_to_about_zero_mean_and_unit_spread() -> None:
    site = plenty()
    episodes = draw(site, make_pool(site, NAMES, 0, ("train",)), spec(), 3, rng())
    assert episodes.support.x.dtype == torch.float32
    levels = torch.arange(256) / 255
    assert set(episodes.query.x.flatten().tolist()) <= set(((levels * 255 - 127.5) / 63.75).tolist())


@pytest.mark.parametrize("mode", ["image", "class"])
def test_augmentation_is_for_training_only_and_keeps_labels(mode: str) -> None:
    site = plenty()
    generator = np.random.default_rng(1)
    square = Site(**{**vars(site), "cache": generator.integers(0, 256, (len(site.labels), 1, 4, 4), np.uint8)})
    pool, plan = make_pool(square, NAMES, 0, ("train",)), spec(augment=mode)
    plain, turned = (draw(square, pool, plan, 4, rng(), augment=augment) for augment in (False, True))
    assert torch.equal(plain.support.y, turned.support.y)
    assert torch.equal(plain.classes, turned.classes)
    assert not torch.equal(plain.support.x, turned.support.x)
    assert torch.equal(plain.query.x.flatten(2).sort(-1).values, turned.query.x.flatten(2).sort(-1).values)
    elements = torch.stack(
        [torch.rot90(x, turns, (-2, -1)) for x in (plain.query.x, plain.query.x.flip(-1)) for turns in range(4)]
    )
    same = (elements == turned.query.x).flatten(3).all(-1)  # [8, T, N]
    assert same.any(0).all()
    which = same.to(torch.int64).argmax(0)
    assert len(set(which.flatten().tolist())) > 2
    for task in range(4):
        alike = all(len(set(which[task][turned.query.y[task] == label].tolist())) == 1 for label in range(3))
        assert alike == (mode == "class")
