"""What a site can tell of whether images are theta's kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from client.adapt.familiar import Familiar, fit_familiar, grey_share, trained_on_grey
from client.adapt.trained import Trained, read_trained
from client.data.episodes import network_input
from common.meta import Engine, unflatten
from common.meta.episodes import Batch, Episodes
from tests.client.adapt.worlds import images, study, trained, write_run


def after_steps(folder: Path, *, grey: bool) -> Trained:
    """Return a theta of three channels that Adam moved along true meta-gradients, on grey or on colour pictures."""
    plan = study({"model.channels": 3})
    begin = read_trained(write_run(folder / "begin", plan))
    theta = dict(begin.initial)
    flat = [t.clone().requires_grad_() for t in theta.values()]
    optimiser = torch.optim.Adam(flat, lr=0.01)
    for seed in range(3):
        x = network_input(images(4, 1, channels=1 if grey else 3, seed=seed).pixels).expand(-1, 3, -1, -1)
        y = torch.from_numpy(images(4, 1).labels)
        task = Episodes(Batch(x[None, ::2], y[None, ::2], None), Batch(x[None, 1::2], y[None, 1::2], None), y[None, :3])
        now = dict(zip(theta, (t.detach() for t in flat), strict=True))
        gradient = Engine(begin.learner, begin.network).meta_gradient(now, task).gradient
        for t, g in zip(flat, unflatten(gradient, now).values(), strict=True):
            t.grad = g
        optimiser.step()
    moved = dict(zip(theta, (t.detach() for t in flat), strict=True))
    return read_trained(write_run(folder / "end", plan, moved))


@pytest.mark.parametrize("grey", [True, False])
def test_theta_tells_whether_it_was_trained_on_grey(grey: bool, tmp_path: Path) -> None:
    assert trained_on_grey(after_steps(tmp_path, grey=grey)) is grey


def test_one_channel_and_an_untrained_theta_tell_nothing(tmp_path: Path) -> None:
    assert trained_on_grey(trained(tmp_path / "one")) is None
    plan = study({"model.channels": 3})
    initial = read_trained(write_run(tmp_path / "a", plan)).initial
    assert trained_on_grey(read_trained(write_run(tmp_path / "b", plan, initial))) is None


def test_grey_is_where_channels_agree() -> None:
    grey = np.repeat(np.random.default_rng(0).integers(0, 250, (4, 1, 8, 8), dtype=np.uint8), 3, 1)
    assert grey_share(grey) == 1
    nearly, one = grey.copy(), grey.copy()
    nearly[:, 0] += 2
    one[0, 0, 3, 3] += 5
    assert grey_share(nearly) == 1
    assert grey_share(one) == 0.75


def test_distance_is_that_to_the_nearest_class() -> None:
    generator = np.random.default_rng(0)
    precision = np.linalg.inv(np.cov(generator.normal(size=(50, 3)).T))
    centres = generator.normal(size=(2, 3))
    points = generator.normal(size=(5, 3))
    found = Familiar(centres, np.asarray(precision, np.float64), 0.0).distances(points)
    expected = [min(mahalanobis(point, centre, precision) ** 2 for centre in centres) for point in points]
    np.testing.assert_allclose(found, expected)


def test_a_new_patient_is_called_unlike_about_once_in_n_plus_one() -> None:
    """Forty patients of two images with features of many dimensions, some constant."""
    generator, flagged, far = np.random.default_rng(1), [], []
    for _ in range(60):
        people = generator.normal(size=(44, 24))
        labels = np.repeat(np.arange(44) % 2, 2)
        features = np.repeat(people, 2, 0) + 0.3 * generator.normal(size=(88, 24)) + 3 * labels[:, None]
        features[:, 0] = 1.0
        patients = np.repeat(np.arange(44), 2)
        old = patients < 40
        familiar = fit_familiar(features[old], labels[old], patients[old], patients[old] % 5)
        flagged.append(familiar.unlike(features[~old]).mean())
        far.append(familiar.unlike(features[~old] + 6 * generator.normal(size=24)).mean())
    assert np.mean(flagged) < 0.06
    assert np.mean(far) > 0.9
