"""Networks of which the head alone learns: every learner's gradient is that of the head over a constant body."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import StudyError
from common.meta import Engine, make_learner
from common.study import Study
from tests.common.meta import oracle
from tests.common.meta.cases import Setting, Variant, engine, paths, random_theta, relative_error, rows, setting

VARIANTS = [Variant(name) for name in ("maml", "fomaml", "anil", "metasgd", "reptile", "fedavg", "fedprox")]


def _head_only(variant: Variant) -> tuple[Setting, oracle.Features]:
    """Return a problem, and the constant body's features."""
    problem = setting(variant, 3, ragged="both")
    body = random_theta(make_learner(Variant("maml").algorithm(1)), problem.network, 5)
    problem.network.double().load_state_dict(body)
    problem.network.fix_body()
    theta = random_theta(make_learner(problem.algorithm), problem.network)
    assert {name.removeprefix("rate.") for name in theta} == {"head.weight", "head.bias"}

    def features(_: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return oracle.smooth("batch")(body, x)

    return problem._replace(theta=theta), features


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_meta_gradient_is_the_heads(variant: Variant) -> None:
    problem, features = _head_only(variant)
    want, losses = oracle.meta_gradients(problem.algorithm, features, problem.theta, problem.episodes)
    for path in paths(variant):
        got = rows(problem, path)
        assert relative_error(got.gradient, want) < 1e-10, path
        assert relative_error(got.loss[:, None], losses[:, None]) < 1e-10, path


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_head_adapts_and_the_body_stays(variant: Variant) -> None:
    problem, features = _head_only(variant)
    got = engine(problem).scores(problem.theta, problem.episodes, 4)
    for t, task in enumerate(oracle.tasks(problem.episodes)):
        logits = oracle.adapted_logits(problem.algorithm, features, problem.theta, task, 4)
        torch.testing.assert_close(got.loss[t], F.cross_entropy(logits, task.query_y), rtol=1e-9, atol=0)


def test_a_patients_terms_are_the_heads() -> None:
    """What `patient-clip` clips: the gradient, and the Hessian times a vector."""
    problem, features = _head_only(Variant("maml"))
    run = Engine(make_learner(problem.algorithm), problem.network)
    along = {name: torch.full_like(t, 0.3) for name, t in problem.theta.items()}
    slopes = [row.gradient for row in run.patient_gradients(problem.theta, problem.episodes)]
    products = list(run.patient_products(problem.theta, along, problem.episodes))
    for t, task in enumerate(oracle.tasks(problem.episodes)):
        at = {name: p.clone().requires_grad_() for name, p in problem.theta.items()}
        logits = features({}, task.support_x) @ at["head.weight"].T + at["head.bias"]
        slope = torch.autograd.grad(F.cross_entropy(logits, task.support_y), list(at.values()), create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in slope])
        product = torch.autograd.grad((0.3 * flat).sum(), list(at.values()))
        torch.testing.assert_close(slopes[t], flat.detach(), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(products[t], torch.cat([g.reshape(-1) for g in product]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["protonet", "protomaml"])
def test_learners_that_share_no_head_are_refused(name: str) -> None:
    with pytest.raises(StudyError, match=f"the head alone learns, but {name} shares no head"):
        Study().override({"algorithm.name": name, "model.name": "head:conv4"})
