"""Meta-gradients against finite differences: the definition of a derivative, with no second derivative taken.

Whatever an oracle and the engine could both get wrong by differentiating shows here.
"""

import pytest
import torch

from tests.common.meta import finite, oracle
from tests.common.meta.cases import INNER_LOOPS, LOCAL, Variant, engine, paths, relative_error, rows, setting

# Measured: at most 2e-9. The differences of fourth order cannot do better, float64 could.
TOLERANCE = 1e-7

CASES = [
    pytest.param(variant, steps, id=f"{variant}, {steps} steps")
    for variant in INNER_LOOPS + LOCAL
    for steps in (1, 3, 5)
    if variant.name != "protonet" or steps == 1  # it has no inner loop
]


@pytest.mark.parametrize("ragged", ["", "both"], ids=["balanced", "ragged"])
@pytest.mark.parametrize(("variant", "steps"), CASES)
def test_every_path_equals_finite_differences(variant: Variant, steps: int, ragged: str) -> None:
    norm = "group" if (steps == 3) != bool(ragged) else "batch"
    every = paths(variant)
    # Paths take turns: each learner meets each of them twice at least; the plain loops meet them again.
    turn = 3 * (steps // 2 + 3 * bool(ragged))
    some = every if variant.name == "protonet" else {every[(turn + k) % len(every)] for k in range(3)}
    problem = setting(variant, steps, norm, ragged=ragged)
    want = finite.gradient(problem.algorithm, problem.theta, oracle.tasks(problem.episodes), norm)
    for path in some:
        assert relative_error(rows(problem, path).gradient, want) < TOLERANCE, path
        if steps == 1:  # and once for all: the mean of all rows is the other form of the answer
            mean = engine(problem, path).meta_gradient(problem.theta, problem.episodes).gradient
            assert relative_error(mean, want.mean(0)) < TOLERANCE, path


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("variant", [v for v in INNER_LOOPS if v.name == "metasgd"], ids=str)
def test_meta_sgd_rates_get_their_own_true_gradient(variant: Variant, norm: str) -> None:
    problem = setting(variant, 3, norm)
    want = finite.gradient(problem.algorithm, problem.theta, oracle.tasks(problem.episodes), norm)
    weights = sum(t.numel() for name, t in problem.theta.items() if not name.startswith("rate."))
    got = rows(problem).gradient
    assert list(problem.theta)[len(problem.theta) // 2 :] == [n for n in problem.theta if n.startswith("rate.")]
    assert relative_error(got[:, weights:], want[:, weights:]) < TOLERANCE
    assert got[:, weights:].norm() > 0.1  # the rates matter here


def test_meta_sgd_rate_gradient_after_one_step_is_minus_the_product_of_two_gradients() -> None:
    """Li et al., 2017: for theta' = theta - alpha * g, dL/dalpha = -g * dL/dtheta'."""
    problem = setting(Variant("metasgd"), 1)
    half = len(problem.theta) // 2
    for task, got in zip(oracle.tasks(problem.episodes), rows(problem).gradient, strict=True):
        weights = dict(list(problem.theta.items())[:half])
        support = finite.loss_gradient(weights, task.support_x, task.support_y, "batch")
        rates = torch.cat([problem.theta[f"rate.{n}"].reshape(-1) for n in weights])
        moved = torch.cat([t.reshape(-1) for t in weights.values()]) - rates * support
        sizes = [t.numel() for t in weights.values()]
        phi = {n: v.view(t.shape) for (n, t), v in zip(weights.items(), torch.split(moved, sizes), strict=True)}
        query = finite.loss_gradient(phi, task.query_x, task.query_y, "batch")
        assert relative_error(got[sum(sizes) :], -support * query) < TOLERANCE


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_first_order_maml_is_another_gradient(steps: int) -> None:
    """On the smooth network with batch norm, inner rate 0.1, the terms that FOMAML drops are no rounding error."""
    exact = rows(setting(Variant("maml"), steps)).gradient
    first = rows(setting(Variant("fomaml"), steps)).gradient
    assert relative_error(first, exact) > 0.1


def test_finite_differences_adapt_by_a_gradient_that_is_itself_a_finite_difference() -> None:
    """Their inner loop uses autograd's first derivative; here no derivative is autograd's."""
    problem = setting(Variant("maml"), 1)
    task = oracle.tasks(problem.episodes)[0]
    slope = finite.loss_gradient(problem.theta, task.support_x, task.support_y, "batch")
    phi = finite.adapted(problem.algorithm, {n: t[None] for n, t in problem.theta.items()}, task, "batch")
    moved = torch.cat([(problem.theta[n] - t[0]).reshape(-1) for n, t in phi.items()])
    assert relative_error(moved / problem.algorithm.inner_rate, slope) < 1e-9


def test_finite_differences_are_right_where_the_answer_is_known() -> None:
    at = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    got = finite.central_differences(lambda p: p.sin().sum(1) + p[:, 0] * p[:, 1], at)
    want = at.cos() + torch.tensor([at[1], at[0], 0.0], dtype=torch.float64)
    assert relative_error(got, want) < 1e-11
