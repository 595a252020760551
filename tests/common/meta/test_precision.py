"""float32 and bfloat16 on the smooth network, where no kink can turn a rounding error into another gradient."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta import Episodes
from tests.common.meta.cases import (
    INNER_LOOPS,
    LOCAL,
    Setting,
    Variant,
    engine,
    make_conv4,
    paths,
    relative_error,
    rows,
    setting,
)


def _in_float32(problem: Setting) -> Setting:
    return problem._replace(theta={n: t.float() for n, t in problem.theta.items()})


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=-1).min())


@pytest.mark.parametrize("variant", INNER_LOOPS + LOCAL, ids=str)
def test_float32_is_float64_rounded(variant: Variant) -> None:
    problem = setting(variant, 2)
    exact = rows(problem).gradient
    for path in paths(variant):
        got = rows(_in_float32(problem), path).gradient
        assert got.dtype == torch.float32
        error = relative_error(got.double(), exact)
        assert 1e-9 < error < 1e-4, path  # not secretly float64, and close
        assert _cosine(got, exact) > 0.999999, path


@pytest.mark.parametrize("path", ["loop", "loop, replayed", "vmap"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_bf16_is_near(norm: str, path: str) -> None:
    problem = _in_float32(setting(Variant("maml"), 2, norm))
    full = rows(problem, path)
    half = _bf16(problem, path)
    error = relative_error(half.double(), full.gradient.double())
    assert 1e-4 < error < 0.5  # it did run in bfloat16
    assert _cosine(half, full.gradient) > 0.9


@pytest.mark.parametrize("path", ["loop", "vmap"])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_bf16_is_finite_on_a_real_network(norm: str, path: str) -> None:
    problem = _in_float32(setting(Variant("protomaml"), 1, norm, build=make_conv4))
    half = _bf16(problem, path)
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert half.norm() > 0


def _bf16(problem: Setting, path: str) -> Tensor:
    run = engine(problem, path, precision="bf16")
    scores = run.scores(problem.theta, problem.episodes, 1)
    assert scores.loss.isfinite().all()
    hits = scores.accuracy * (problem.episodes.query.y.shape[1])
    torch.testing.assert_close(hits, hits.round(), rtol=0, atol=1e-5)  # shares are counted, not rounded
    return run.meta_gradient(problem.theta, problem.episodes, reduce="none").gradient


def test_the_type_of_theta_is_the_type_of_the_computation() -> None:
    problem = setting(Variant("maml"), 1)
    support, query, classes = problem.episodes
    single = Episodes(support._replace(x=support.x.float()), query._replace(x=query.x.float()), classes)
    got = rows(problem._replace(episodes=single))
    assert got.gradient.dtype == got.loss.dtype == got.accuracy.dtype == torch.float64
    assert relative_error(got.gradient, rows(problem).gradient) < 1e-4
