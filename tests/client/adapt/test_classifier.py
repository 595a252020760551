"""Adaptation step by step, against the learners themselves; what is left alone; what a head begins as."""

from pathlib import Path

import numpy as np
import pytest
import torch

from client.adapt.classifier import (
    Start,
    as_it_is,
    from_scratch,
    learner_begins,
    start,
    steps_of_adam,
    steps_of_learner,
)
from client.adapt.trained import Trained
from client.data.episodes import network_input
from common.errors import ModelError
from common.meta.autodiff import EAGER
from common.meta.episodes import Batch
from common.meta.local_only import LocalOnly
from tests.client.adapt.worlds import images, trained

LEARNERS = ("maml", "fomaml", "anil", "metasgd", "protonet", "protomaml", "reptile", "fedavg", "fedprox")


def batch(classes: int = 3) -> Batch:
    those = images(4, 1, classes)
    return Batch(network_input(those.pixels), torch.from_numpy(those.labels), None)


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_every_checkpoint_says_what_the_learner_says(name: str, norm: str, tmp_path: Path) -> None:
    """Of the support images themselves, whose statistics are the fixed ones."""
    run = trained(tmp_path, {"algorithm.name": name, "model.norm": norm})
    begin, support = start(run, ("a", "b", "c")), batch()
    found = dict(steps_of_learner(run.learner, begin, support, run.study.algorithm.test_rate, [0, 1, 3]))
    assert list(found) == [0, 1, 3]
    for steps, classifier in found.items():
        with torch.no_grad():
            state = run.learner.adapt(run.network, run.theta, support, torch.arange(3), steps, EAGER)
            expected = run.learner.predict(run.network, state, support).double().numpy()
        got = classifier.logits(support.x)
        # Logits are the same up to a constant of each image, which no softmax sees.
        got, expected = (x - x.mean(-1, keepdims=True) for x in (got, expected))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", LEARNERS)
def test_adam_goes_on_from_where_the_learner_begins(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path, {"algorithm.name": name})
    begin, support = start(run, ("a", "b", "c")), batch()
    (_, expected), *_ = steps_of_learner(run.learner, begin, support, 0.1, [0])
    found = dict(steps_of_adam(learner_begins(run.learner, begin, support), support, 0.01, [0, 20]))
    np.testing.assert_allclose(found[0].logits(support.x), expected.logits(support.x), rtol=1e-5, atol=1e-5)

    def loss(logits: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
        return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), support.y))

    assert loss(found[20].logits(support.x)) < 0.9 * loss(found[0].logits(support.x))


@pytest.mark.parametrize("name", ["maml", "anil", "metasgd", "reptile", "fedavg"])
def test_where_the_head_alone_learned_the_head_alone_adapts(name: str, tmp_path: Path) -> None:
    run = trained(tmp_path, {"algorithm.name": name, "model.name": "head:conv4"})
    begin, support = start(run, ("a", "b", "c")), batch()
    ((_, zero), (_, adapted)) = steps_of_learner(run.learner, begin, support, 0.1, [0, 3])
    assert zero.weights.keys() == adapted.weights.keys() == {*run.network.fixed, "head.weight", "head.bias"}
    for key, t in adapted.weights.items():
        assert torch.equal(t, zero.weights[key]) == key.startswith("body.")
    for further in (as_it_is(begin, support.x), dict(steps_of_adam(begin, support, 0.01, [0]))[0]):
        np.testing.assert_allclose(further.logits(support.x), zero.logits(support.x), rtol=1e-5, atol=1e-5)
    (_, later), *_ = steps_of_adam(learner_begins(run.learner, begin, support), support, 0.01, [20])
    assert torch.equal(later.weights["body.convolutions.0.weight"], zero.weights["body.convolutions.0.weight"])
    assert len(from_scratch(run, 3, seed=1).theta) == len(run.network.fixed) + 2  # by itself, all of it learns


def test_training_from_scratch_is_that_of_the_comparison_and_changes_nothing_else(tmp_path: Path) -> None:
    run, support = trained(tmp_path), batch()
    begin = from_scratch(run, 3, seed=1)
    before = {name: t.clone() for name, t in begin.theta.items()}
    for _ in range(2):  # the second call begins where the first one did
        found = dict(steps_of_adam(begin, support, 0.02, [2, 4]))
        state = LocalOnly(0.02).adapt(begin.network, before, support, torch.arange(3), 4, EAGER)
        expected = begin.network.logits(state.fast, support.x).detach().double().numpy()
        np.testing.assert_allclose(found[4].logits(support.x), expected, rtol=1e-3, atol=1e-3)
        assert not np.allclose(found[2].logits(support.x), found[4].logits(support.x))
    for name, t in before.items():
        torch.testing.assert_close(begin.theta[name], t, rtol=0, atol=0)
        assert not begin.theta[name].requires_grad


def test_a_prediction_depends_on_one_image_alone(tmp_path: Path) -> None:
    run, support = trained(tmp_path), batch()
    _, classifier = next(steps_of_learner(run.learner, start(run, ("a", "b", "c")), support, 0.1, [2]))
    x = network_input(images(6, 1, seed=5).pixels)
    np.testing.assert_allclose(
        classifier.logits(x), np.concatenate([classifier.logits(row[None]) for row in x]), rtol=1e-4, atol=1e-4
    )


def rows(begin: Start) -> list[list[float]]:
    return [row.tolist() for row in begin.theta["head.weight"]]


def test_a_head_of_diagnoses_gives_its_rows_by_name(tmp_path: Path) -> None:
    run = trained(tmp_path)
    weight = run.theta["head.weight"]
    begin = start(run, ("c", "a"))
    assert rows(begin) == [weight[2].tolist(), weight[0].tolist()]
    assert begin.knows
    new = start(run, ("c", "z"))
    assert rows(new) == [weight[2].tolist(), [0.0] * weight.shape[1]]
    assert not new.knows


def test_a_head_of_shuffled_labels_gives_its_rows_in_order(tmp_path: Path) -> None:
    run = trained(tmp_path, {"episodes.labels": "shuffled", "episodes.ways": 2, "algorithm.name": "metasgd"})
    weight = run.theta["head.weight"]
    begin = start(run, ("x", "y", "z"))
    assert rows(begin)[:2] == [weight[0].tolist(), weight[1].tolist()]
    torch.testing.assert_close(begin.theta["head.weight"][2], weight.mean(0))
    assert begin.theta["rate.head.weight"].shape == begin.theta["head.weight"].shape
    assert not begin.knows


def test_theta_as_it_is_takes_its_statistics_from_the_support_images(tmp_path: Path) -> None:
    run, support = trained(tmp_path), batch()
    got = as_it_is(start(run, ("a", "b", "c")), support.x).logits(support.x)
    expected = run.network.logits(run.theta, support.x).detach().double().numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)


def test_a_theta_that_nobody_shared_cannot_be_adapted(tmp_path: Path) -> None:
    run: Trained = trained(tmp_path, {"algorithm.name": "local-only"})
    with pytest.raises(ModelError, match="shares no theta"):
        next(steps_of_learner(run.learner, start(run, ("a", "b", "c")), batch(), 0.1, [1]))
