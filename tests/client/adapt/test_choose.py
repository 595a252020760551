"""Folds keep patients whole; a choice sees support images and nothing else."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from client.adapt.choose import choose, deal, draw_shots, fewest
from client.adapt.images import Labelled
from client.adapt.judge import k_fold_splits, one_split
from client.adapt.methods import Predict, Rows, Setting, Simple, simple_features
from tests.client.adapt.worlds import images


class Told:
    """A method whose settings are how sure it is of the truth; it notes which rows it was given."""

    settings = (Setting(0.0, 0), Setting(2.0, 0), Setting(1.0, 0))

    def __init__(self) -> None:
        self.fitted: list[set[int]] = []
        self.asked: list[set[int]] = []

    def fit(self, images: Labelled, support: Rows, settings: Sequence[Setting]) -> Iterator[tuple[Setting, Predict]]:
        self.fitted.append(set(support.tolist()))
        for setting in settings:

            def predict(rows: Rows, sure: float = setting.rate) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
                self.asked.append(set(rows.tolist()))
                noise = np.random.default_rng(1).normal(size=(len(images.labels), len(images.classes)))
                return sure * np.eye(len(images.classes))[images.labels[rows]] + noise[rows]

            yield setting, predict


@pytest.mark.parametrize("folds", [2, 4])
def test_folds_keep_patients_whole_and_classes_spread(folds: int) -> None:
    those = images(7, 3)
    fold = deal(those, np.arange(len(those.labels)), folds, np.random.default_rng(0))
    for who in np.unique(those.patients):
        assert len(np.unique(fold[those.patients == who])) == 1
    for label in range(3):
        sizes = [len(np.unique(those.patients[(those.labels == label) & (fold == k)])) for k in range(folds)]
        assert max(sizes) - min(sizes) <= 1


def test_a_patient_with_two_classes_is_in_one_fold_and_counts_for_both() -> None:
    those = images(4, 2, 2)
    both = Labelled(**{**vars(those), "patients": np.where(those.patients == 7, 0, those.patients)})
    assert both.patients_per_class() == {"a": 4, "b": 4}
    for seed in range(20):
        fold = deal(both, np.arange(16), 4, np.random.default_rng(seed))
        assert len(np.unique(fold[both.patients == 0])) == 1
        assert fewest(both, np.flatnonzero(fold != 0)) >= 3
        drawn = draw_shots(both, 2, np.random.default_rng(seed))
        assert fewest(both, drawn) == 2


def test_shots_are_patients_with_all_their_images() -> None:
    those = images(6, 3)
    rows = draw_shots(those, 2, np.random.default_rng(0))
    assert fewest(those, rows) == 2
    assert len(rows) == 3 * 2 * 3
    among = those.patients % 6 < 3
    only = draw_shots(those, 5, np.random.default_rng(0), among=among)
    assert set(only) == set(np.flatnonzero(among))


def test_a_choice_takes_the_best_setting_and_looks_at_support_alone() -> None:
    those, method = images(8, 2), Told()
    support = draw_shots(those, 4, np.random.default_rng(0))
    choice = choose(method, those, support, 0.9, np.random.default_rng(0))
    assert choice.setting == Setting(2.0, 0)
    assert choice.calibration is not None
    assert set.union(*method.fitted, *method.asked) == set(support.tolist())
    assert method.fitted[-1] == set(support.tolist())
    for fitted, asked in zip(method.fitted[:-1], method.asked[:: len(method.settings)], strict=True):
        assert not {those.patients[row] for row in fitted} & {those.patients[row] for row in asked}


MIX = (0.7, 0.2, 0.1)


def test_one_patient_a_class_leaves_the_first_setting_and_no_calibration() -> None:
    those = images(4, 2)
    support = draw_shots(those, 1, np.random.default_rng(0))
    choice = choose(Told(), those, support, 0.9, np.random.default_rng(0))
    assert choice.setting == Setting(0.0, 0)
    assert choice.calibration is None


def test_a_mix_changes_probabilities_and_sets_but_not_what_is_chosen() -> None:
    those = images(8, 1)
    support = draw_shots(those, 6, np.random.default_rng(0))
    plain, mixed = (choose(Told(), those, support, 0.9, np.random.default_rng(0), mix=mix) for mix in (None, MIX))
    assert plain.mixed is None
    assert mixed.mixed is not None
    assert plain.setting == mixed.setting
    assert plain.calibration == mixed.calibration
    np.testing.assert_allclose(mixed.mixed.odds, 3 * np.array(MIX))


def test_splits_judge_only_patients_that_theta_has_not_seen() -> None:
    those = images(10, 2)
    seen = Labelled(**{**vars(those), "unseen": those.patients % 10 >= 4})
    splits = k_fold_splits(seen, 3, 2, np.random.default_rng(0))
    assert [len(folds) for folds in splits] == [3, 3]
    for folds in splits:
        held = np.concatenate([split.held_out for split in folds])
        np.testing.assert_array_equal(np.sort(held), np.flatnonzero(seen.unseen))
        for split in folds:
            assert not set(seen.patients[split.support]) & set(seen.patients[split.held_out])
            assert set(np.flatnonzero(~seen.unseen)) <= set(split.support)
    [[split]] = one_split(seen, draw_shots(seen, 3, np.random.default_rng(0)))
    assert not set(seen.patients[split.support]) & set(seen.patients[split.held_out])
    assert seen.unseen[split.held_out].all()


def test_simple_features_are_what_they_say() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 32, 32), dtype=np.uint8)
    found = simple_features(pixels)
    assert found.shape == (3, 2 * 256 + 2 + 2 + 2 * 5)
    image = pixels[1, 1] / 255
    np.testing.assert_allclose(found[1, 256:512], image.reshape(16, 2, 16, 2).mean((1, 3)).ravel(), atol=1e-6)
    np.testing.assert_allclose(found[1, 513], image.mean(), atol=1e-6)
    np.testing.assert_allclose(found[1, 515], image.std(ddof=1), atol=1e-6)
    np.testing.assert_allclose(found[1, -5:], np.quantile(image, [0.05, 0.25, 0.5, 0.75, 0.95]), atol=1e-6)


def test_the_simple_model_learns_what_is_simple() -> None:
    those = images(8, 2, noise=20)
    method = Simple(simple_features(those.pixels))
    support = draw_shots(those, 4, np.random.default_rng(0))
    held = np.setdiff1d(np.arange(len(those.labels)), support)
    choice = choose(method, those, support, 0.9, np.random.default_rng(0))
    assert (choice.predict(held).argmax(-1) == those.labels[held]).mean() > 0.9
