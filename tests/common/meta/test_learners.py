"""What each learner is at meta-test time, and what it promises about classes, heads and rates."""

from typing import Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta import Batch, Engine, Episodes, head_size, make_learner
from common.meta.autodiff import EAGER
from common.meta.learner import InnerLoop
from common.study import ALGORITHMS, Algorithm
from common.study import Episodes as StudyEpisodes
from tests.common.meta import oracle
from tests.common.meta.cases import (
    INNER_LOOPS,
    LOCAL,
    Setting,
    Variant,
    engine,
    make_conv4,
    make_episodes,
    make_tiny,
    random_theta,
    relative_error,
    rows,
    setting,
)
from tests.common.plain import plain_figures

ALL = (*INNER_LOOPS, *LOCAL, Variant("local-only"))


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("variant", ALL, ids=str)
def test_scores_equal_a_plain_loop(variant: Variant, steps: int) -> None:
    """Meta-test has its own number of steps and its own rate, which is not the one of training."""
    problem = setting(variant, 3, ragged="both", tasks=3)
    got = engine(problem).scores(problem.theta, problem.episodes, steps)
    for t, task in enumerate(oracle.tasks(problem.episodes)):
        logits = oracle.adapted_logits(problem.algorithm, oracle.smooth("batch"), problem.theta, task, steps)
        torch.testing.assert_close(got.loss[t], F.cross_entropy(logits, task.query_y), rtol=1e-9, atol=0)
        assert got.accuracy[t] == (logits.argmax(1) == task.query_y).double().mean()
        for name, value in plain_figures(logits.softmax(1), task.query_y).items():
            assert float(getattr(got, name)[t]) == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("present", [(0, 2), (1,)])
def test_figures_know_padding_and_missing_classes(present: tuple[int, ...]) -> None:
    """The query images that are left have these classes alone; the rest is padding, which holds the label 0."""
    problem = setting(Variant("maml"), 1)
    query = problem.episodes.query
    mask = torch.isin(query.y, torch.tensor(present))
    padded = problem.episodes._replace(query=Batch(query.x, torch.where(mask, query.y, 0), mask))
    got = engine(problem).scores(problem.theta, padded, 2)
    for t, task in enumerate(oracle.tasks(padded)):
        logits = oracle.adapted_logits(problem.algorithm, oracle.smooth("batch"), problem.theta, task, 2)
        assert set(task.query_y.tolist()) == set(present)
        for name, value in plain_figures(logits.softmax(1), task.query_y).items():
            assert float(getattr(got, name)[t]) == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert bool(got.auroc.isnan().all()) == (len(present) == 1)


def test_what_has_diverged_scores_as_chance() -> None:
    problem = setting(Variant("maml"), 1)
    theta = {name: torch.full_like(t, torch.nan) for name, t in problem.theta.items()}
    got = engine(problem).scores(theta, problem.episodes, 1)
    third = torch.full((2,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(got[2:], (third, torch.full_like(third, 0.5), torch.zeros_like(third)))
    torch.testing.assert_close(got.accuracy, third)


@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "metasgd", "reptile", "local-only"])
def test_no_steps_is_the_network_itself(name: str) -> None:
    problem = setting(Variant(name), 3, build=make_conv4)
    got = engine(problem).scores(problem.theta, problem.episodes, 0)
    for t in range(2):
        query = problem.episodes.task(t).query
        logits = problem.network.logits(problem.theta, query.x)
        torch.testing.assert_close(got.loss[t], F.cross_entropy(logits, query.y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ALL, ids=str)
def test_theta_starts_as_the_network_with_what_the_learner_adds(variant: Variant) -> None:
    network = make_tiny("batch")
    theta = make_learner(variant.algorithm(2, inner_rate=0.07)).theta(network)
    own = dict(network.named_parameters())
    weights = {n: t for n, t in theta.items() if not n.startswith("rate.")}
    with_head = variant.name not in {"protonet", "protomaml"}
    assert list(weights) == [n for n in own if with_head or n.startswith("body.")]
    for name, t in weights.items():
        assert torch.equal(t, own[name])
        assert t.data_ptr() != own[name].data_ptr()
    rates = {n.removeprefix("rate."): t for n, t in theta.items() if n not in weights}
    assert list(rates) == (list(own) if variant.name == "metasgd" else [])
    for name, t in rates.items():
        assert t.shape == (own[name].shape if variant.rates == "element" else ())
        assert torch.equal(t, torch.full_like(t, 0.07))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_of_a_study_has_its_learner(name: str) -> None:
    learner = make_learner(Algorithm(name=name, inner_steps=3, inner_rate=0.2, test_rate=0.4, recompute=True))
    assert learner.name == name
    assert learner.per_episode == (name not in {"fedavg", "fedprox"})
    assert learner.test_rate == 0.4  # type: ignore[attr-defined]
    if isinstance(learner, InnerLoop):
        assert (learner.inner_steps, learner.inner_rate) == (0 if name == "protonet" else 3, 0.2)
        assert learner.recompute == (name != "protonet")


@pytest.mark.parametrize(
    ("name", "labels", "size"),
    [("maml", "shuffled", 2), ("maml", "fixed", 4), ("fedavg", "shuffled", 4), ("fedprox", "fixed", 4)],
)
def test_the_head_has_the_size_of_the_ways_or_of_the_list(
    name: str, labels: Literal["shuffled", "fixed"], size: int
) -> None:
    episodes = StudyEpisodes(labels=labels, classes="a,b,c,d", ways=2, held_out="")
    assert head_size(Algorithm(name=name), episodes) == size


@pytest.mark.parametrize(("train_ways", "size"), [(0, 2), (3, 3)])
def test_a_head_of_prototypes_has_room_for_training_and_for_test(train_ways: int, size: int) -> None:
    episodes = StudyEpisodes(classes="a,b,c,d", ways=2, train_ways=train_ways)
    assert head_size(Algorithm(name="protonet"), episodes) == size
    assert episodes.in_training.ways == (train_ways or 2)


def _with_one_class_absent() -> tuple[Setting, Setting]:
    """Return a site without class 1 of a fixed head of three, and the same images as a head of two."""
    full = make_episodes(2, shots=3)

    def without(batch: Batch, relabel: dict[int, int]) -> Batch:
        keep = [[i for i in range(len(y)) if y[i] != 1] for y in batch.y]
        x = torch.stack([images[rows] for images, rows in zip(batch.x, keep, strict=True)])
        y = torch.stack([labels[rows] for labels, rows in zip(batch.y, keep, strict=True)])
        return Batch(x, torch.tensor([[relabel[int(k)] for k in row] for row in y]), None)

    def problem(ways: int, relabel: dict[int, int]) -> Setting:
        support, query = without(full.support, relabel), without(full.query, relabel)
        base = setting(Variant("protonet"), 3)
        classes = torch.arange(ways).repeat(2, 1)
        return base._replace(network=make_tiny("batch", ways), episodes=Episodes(support, query, classes))

    return problem(3, {0: 0, 2: 2}), problem(2, {0: 0, 2: 1})


@pytest.mark.parametrize("path", ["loop", "vmap", "loop, replayed", "vmap, replayed"])
@pytest.mark.parametrize("name", ["protonet", "protomaml"])
def test_a_class_without_support_might_as_well_not_be_there(name: str, path: str) -> None:
    absent, removed = (p._replace(algorithm=Variant(name).algorithm(3)) for p in _with_one_class_absent())
    got, want = rows(absent, path), rows(removed, path)
    assert got.gradient.isfinite().all()
    assert got.loss.isfinite().all()
    assert relative_error(got.gradient, want.gradient) < 1e-12
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    for steps in (0, 5):
        with_it, without = (engine(p, path).scores(p.theta, p.episodes, steps) for p in (absent, removed))
        torch.testing.assert_close(with_it, without, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["protonet", "protomaml"])
def test_a_class_without_support_is_never_predicted(name: str) -> None:
    problem, _ = _with_one_class_absent()
    learner = make_learner(Variant(name).algorithm(3))
    task = problem.episodes.task(0)
    anything = Batch(
        torch.randn(200, 1, 6, 6, generator=torch.Generator().manual_seed(0)).double() * 10,
        task.query.y,
        None,
    )
    for steps in (0, 5):
        state = learner.adapt(problem.network, problem.theta, task.support, task.classes, steps, EAGER)
        predicted = set(learner.predict(problem.network, state, anything).argmax(1).tolist())
        assert predicted == {0, 2}


def _head(classes: list[int], variant: str = "fedavg", steps: int = 0) -> tuple[dict[str, Tensor], Setting]:
    problem = setting(Variant(variant), 1)  # a head of five
    task = problem.episodes.task(0)
    learner = make_learner(problem.algorithm)
    state = learner.adapt(problem.network, problem.theta, task.support, torch.tensor(classes), steps, EAGER)
    return dict(state.fast), problem


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_fedavg_takes_the_rows_of_the_classes_and_zeros_for_new_ones(name: str) -> None:
    fast, problem = _head([4, 7, 0], name)
    weight, bias = problem.theta["head.weight"], problem.theta["head.bias"]
    assert torch.equal(fast["head.weight"], torch.stack([weight[4], torch.zeros_like(weight[0]), weight[0]]))
    assert torch.equal(fast["head.bias"], torch.stack([bias[4], torch.zeros_like(bias[0]), bias[0]]))
    body = [n for n in problem.theta if n.startswith("body.")]
    assert body
    assert all(torch.equal(fast[n], problem.theta[n]) for n in body)


def test_fedavg_fine_tunes_a_new_class_away_from_zero() -> None:
    fast, _ = _head([4, 7, 0], steps=3)
    assert fast["head.weight"][1].norm() > 0.01


def test_local_only_learns_its_support_set_by_itself() -> None:
    problem = setting(Variant("local-only"), 1, tasks=3)
    learner = make_learner(problem.algorithm.model_copy(update={"test_rate": 0.01}))
    run = Engine(learner, problem.network)
    own = problem._replace(episodes=problem.episodes._replace(query=problem.episodes.support))
    losses = [run.scores(own.theta, own.episodes, steps).loss for steps in (0, 10, 40)]
    assert (losses[1] < losses[0]).all()
    assert (losses[2] < 0.7 * losses[1]).all()


@pytest.mark.parametrize("variant", [v for v in ALL if v.name not in {"protonet", "local-only"}], ids=str)
def test_adapting_descends_the_support_loss(variant: Variant) -> None:
    problem = setting(variant, 1, tasks=3)
    own = problem.episodes._replace(query=problem.episodes.support)
    few, many = (engine(problem).scores(problem.theta, own, steps).loss for steps in (0, 10))
    assert (many < few).all()


def test_a_meta_gradient_step_lowers_the_query_loss() -> None:
    """What it is all for: following minus the gradient helps the adapted network."""
    problem = setting(Variant("maml"), 3, tasks=3)
    run = engine(problem)
    at = run.meta_gradient(problem.theta, problem.episodes)
    slope = at.gradient.norm() ** 2
    move, out = 1e-4, {}
    start = 0
    for name, t in problem.theta.items():
        out[name] = t - move * at.gradient[start : start + t.numel()].view(t.shape)
        start += t.numel()
    after = run.meta_gradient(out, problem.episodes)
    torch.testing.assert_close(at.loss - after.loss, move * slope, rtol=0.02, atol=0)


def test_random_theta_is_the_same_for_every_learner_that_has_the_tensors() -> None:
    """The settings of these tests can be compared across learners."""
    network = make_tiny("batch")
    one, two = (random_theta(make_learner(Variant(n).algorithm(1)), network) for n in ("maml", "fomaml"))
    assert all(torch.equal(one[n], two[n]) for n in one)
