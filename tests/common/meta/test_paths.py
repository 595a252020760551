"""Every learner on the real networks, along every path through the engine, against a plain autograd loop."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.meta import Episodes, flatten, make_learner, unflatten
from common.models.network import Network
from tests.common.meta import oracle
from tests.common.meta.cases import (
    INNER_LOOPS,
    LOCAL,
    PATHS,
    Variant,
    engine,
    make_conv4,
    make_resnet12,
    make_tiny,
    paths,
    random_theta,
    relative_error,
    rows,
    setting,
)

TOLERANCE = 1e-9
VARIANTS = INNER_LOOPS + LOCAL

NETWORKS: dict[str, tuple[Callable[[str, int], Network], Callable[[str], oracle.Features]]] = {
    "conv4": (make_conv4, oracle.conv4),
    "resnet12": (make_resnet12, oracle.resnet12),
}


class Case(NamedTuple):
    """One learner on one network, and the paths to try."""

    variant: Variant
    network: str
    norm: str
    ragged: str
    steps: int
    paths: tuple[str, ...]

    def __str__(self) -> str:
        shape = "ragged" if self.ragged else "balanced"
        return f"{self.variant}, {self.network}, {self.norm} norm, {shape}, {self.steps} steps"


def _cases() -> list[Case]:
    """Return every learner on both networks, both norms, balanced and ragged, with every number of steps.

    Paths take turns, so that each learner meets each path on Conv4; all products of all choices would take
    minutes.
    """
    out = []
    for v, variant in enumerate(VARIANTS):
        every = paths(variant)
        one, other = ("", "both") if v % 2 else ("both", "")
        shapes = {
            "conv4": [("batch", one, 5), ("batch", other, 1), ("group", one, 1), ("group", other, 3)],
            "resnet12": [("batch", one, 1), ("batch", other, 3), ("group", one, 5)],
        }
        for name, some in shapes.items():
            turn = v
            for norm, ragged, steps in some:
                count = 1 if (name, steps) == ("resnet12", 5) else 2
                ways = tuple(dict.fromkeys(every[(turn + k) % len(every)] for k in range(count)))
                out.append(Case(variant, name, norm, ragged, steps, ways))
                turn += count
    return out


CASES = _cases()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_path_equals_a_plain_loop(case: Case) -> None:
    build, features = NETWORKS[case.network]
    tasks = 3 if case.network == "conv4" else 2
    problem = setting(case.variant, case.steps, case.norm, ragged=case.ragged, tasks=tasks, build=build)
    want, losses = oracle.meta_gradients(problem.algorithm, features(case.norm), problem.theta, problem.episodes)
    for path in case.paths:
        got = rows(problem, path)
        assert relative_error(got.gradient, want) < TOLERANCE, path
        assert relative_error(got.loss[:, None], losses[:, None]) < TOLERANCE, path


def test_the_cases_meet_every_path_and_every_number_of_steps() -> None:
    met = {(c.variant, path) for c in CASES for path in c.paths if c.network == "conv4"}
    assert met == {(v, path) for v in VARIANTS for path in paths(v)}
    assert {path for c in CASES for path in c.paths if c.network == "resnet12"} == set(PATHS)
    met_steps = {(c.variant, c.network, c.steps) for c in CASES}
    assert met_steps == {(v, name, steps) for v in VARIANTS for name in NETWORKS for steps in (1, 3, 5)}


@pytest.mark.parametrize("ragged", ["support", "query"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_padding_in_one_of_the_two_sets(variant: Variant, ragged: str) -> None:
    """A set without padding has no mask: whoever joins the two must not forget the other's."""
    problem = setting(variant, 2, "batch", ragged=ragged)
    want, losses = oracle.meta_gradients(problem.algorithm, oracle.smooth("batch"), problem.theta, problem.episodes)
    for path in set(paths(variant)) & {"loop, 2 cores", "vmap", "vmap, replayed"} or {"loop"}:
        got = rows(problem, path)
        assert relative_error(got.gradient, want) < TOLERANCE, path
        assert relative_error(got.loss[:, None], losses[:, None]) < TOLERANCE, path


@pytest.mark.parametrize("path", PATHS)
def test_mean_is_the_mean_of_the_rows(path: str) -> None:
    problem = setting(Variant("protomaml"), 3, ragged="both", tasks=3)
    many = rows(problem, path)
    mean = engine(problem, path).meta_gradient(problem.theta, problem.episodes)
    assert mean.gradient.shape == (flatten(problem.theta).numel(),)
    assert relative_error(mean.gradient, many.gradient.mean(0)) < 1e-13
    for one, each in ((mean.loss, many.loss), (mean.accuracy, many.accuracy)):
        assert each.shape == (3,)
        torch.testing.assert_close(one, each.mean(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if make_learner(v.algorithm(1)).per_episode], ids=str)
def test_sites_that_share_the_episodes_reach_the_same_mean(variant: Variant) -> None:
    """Federated equals centralised: the mean over sites, weighted by episodes, is the mean over the union."""
    problem = setting(variant, 3, tasks=4)
    together = engine(problem).meta_gradient(problem.theta, problem.episodes).gradient
    apart = [
        (count, engine(problem).meta_gradient(problem.theta, problem.episodes.take(part)).gradient)
        for count, part in ((1, slice(0, 1)), (3, slice(1, 4)))
    ]
    weighted = torch.stack([count * gradient for count, gradient in apart]).sum(0) / 4
    assert relative_error(weighted, together) < 1e-14


class VolumeBody(nn.Module):
    """One block for images with three spatial axes."""

    takes_mask = mixes_rows = False
    channels_last = True

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv3d(1, 2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features ``[N, 32]`` of images ``[N, 1, 6, 6, 3]``."""
        return torch.tanh(0.1 * self.convolution(x)).flatten(1)


@pytest.mark.parametrize("variant", [*INNER_LOOPS, Variant("reptile")], ids=str)
def test_volumes_go_the_same_ways(variant: Variant) -> None:
    problem = setting(variant, 2)
    support, query, classes = problem.episodes
    support, query = (b._replace(x=torch.stack([b.x, 2 * b.x, b.x.square()], -1)) for b in (support, query))
    network = Network(VolumeBody(), 32, 3)
    theta = random_theta(make_learner(problem.algorithm), network)
    problem = problem._replace(network=network, theta=theta, episodes=Episodes(support, query, classes))

    def features(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return torch.tanh(0.1 * F.conv3d(x, w["body.convolution.weight"])).flatten(1)

    want, _ = oracle.meta_gradients(problem.algorithm, features, theta, problem.episodes)
    for path in ("loop", "vmap"):
        assert relative_error(rows(problem, path).gradient, want) < TOLERANCE, path


def test_flatten_and_unflatten_are_inverse() -> None:
    theta = setting(Variant("metasgd", "tensor"), 1).theta
    vector = flatten(theta)
    again = unflatten(vector, theta)
    assert list(again) == list(theta)
    assert all(torch.equal(again[n], t) and again[n].shape == t.shape for n, t in theta.items())
    names = [n for n, t in theta.items() for _ in range(t.numel())]
    assert names.index("head.weight") == sum(t.numel() for n, t in theta.items() if n.startswith("body."))
    assert make_tiny("batch").theta().keys() <= theta.keys()
