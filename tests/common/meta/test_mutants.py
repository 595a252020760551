"""Each known way to get a meta-gradient subtly wrong, put into the code on purpose: the comparison must see it."""

from collections.abc import Callable
from contextlib import suppress
from threading import Barrier
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.meta import Engine, anil, autodiff, learner, metasgd, protomaml, reptile
from common.models import norm
from tests.common.meta import oracle
from tests.common.meta.cases import Setting, Variant, relative_error, rows, setting

EXACT = 1e-10
WRONG = 1e-4

Eager = type(autodiff.EAGER)
Functional = type(autodiff.FUNCTIONAL)


class Mutant(NamedTuple):
    """A change to the code, and where it must show."""

    owner: Any
    name: str
    change: Callable[[Any], Any]
    variant: str
    path: str = "loop"
    ragged: str = ""


def _first_order(inner: Any) -> Any:
    return lambda self, loss, at, *, second_order: inner(self, loss, at, second_order=False)


def _detached_gradient(inner: Any) -> Any:
    def mutant(self: Any, loss: Any, at: Any, *, second_order: bool) -> dict[str, Tensor]:
        return {n: g.detach() for n, g in inner(self, loss, at, second_order=second_order).items()}

    return mutant


def _total_derivative(_: Any) -> Any:
    def mutant(self: Any, loss: Any, at: Any, *, second_order: bool) -> dict[str, Tensor]:
        with torch.enable_grad():
            at = at if second_order else {n: t.detach().requires_grad_() for n, t in at.items()}
            grads = torch.autograd.grad(loss(at), list(at.values()), create_graph=second_order)
            return dict(zip(at, grads, strict=True))

    return mutant


def _forget_second(pull: Any) -> Any:
    def mutant(self: Any, function: Any, first: Any, second: Any, cotangent: Any) -> Any:
        one, two = pull(self, function, first, second, cotangent)
        return one, {n: torch.zeros_like(t) for n, t in two.items()}

    return mutant


def _detach_prototypes(prototypes: Any) -> Any:
    def mutant(*inputs: Any) -> tuple[Tensor, Tensor]:
        centres, present = prototypes(*inputs)
        # A leaf of its own: eager autograd refuses to differentiate by a tensor without a history.
        cut = (
            centres.detach()
            if torch._C._functorch.is_gradtrackingtensor(centres)
            else centres.detach().requires_grad_()
        )
        return cut, present

    return mutant


def _no_mask(loss: Any) -> Any:
    return lambda logits, batch: loss(logits, batch._replace(mask=None))


def _zero_cotangent(place: int) -> Any:
    def change(backward: Any) -> Any:
        def mutant(ctx: Any, *cotangents: Tensor) -> Any:
            return backward(ctx, *(torch.zeros_like(c) if i == place else c for i, c in enumerate(cotangents)))

        return staticmethod(mutant)

    return change


def _without_gamma_gradient(backward: Any) -> Any:
    def mutant(ctx: Any, *cotangents: Tensor) -> Any:
        on_v, on_x, on_gamma, *rest = backward(ctx, *cotangents)
        return on_v, on_x, torch.zeros_like(on_gamma), *rest

    return staticmethod(mutant)


def _union_without_mask(union: Any) -> Any:
    return lambda task: union(task)._replace(mask=None)


def _average_padding(_: Any) -> Any:
    return lambda x, gamma, beta, mask: norm.batch_norm(x, gamma, beta)


MUTANTS = {
    "no second order": Mutant(Eager, "inner", _first_order, "maml"),
    "no second order under vmap": Mutant(Functional, "inner", _first_order, "maml", "vmap"),
    "inner gradient detached": Mutant(Eager, "inner", _detached_gradient, "metasgd"),
    "inner gradient detached under vmap": Mutant(Functional, "inner", _detached_gradient, "anil", "vmap"),
    "total derivative for a partial one": Mutant(Eager, "inner", _total_derivative, "protomaml"),
    "prototypes detached": Mutant(protomaml, "prototypes", _detach_prototypes, "protomaml"),
    "prototypes detached under vmap": Mutant(protomaml, "prototypes", _detach_prototypes, "protomaml", "vmap"),
    "prototypes detached in replay": Mutant(protomaml, "prototypes", _detach_prototypes, "protomaml", "loop, replayed"),
    "rates detached": Mutant(metasgd.MetaSgd, "rate", lambda rate: lambda *a: rate(*a).detach(), "metasgd"),
    "replay forgets the rates": Mutant(Eager, "pull", _forget_second, "metasgd", "loop, replayed"),
    "replay forgets the features": Mutant(Functional, "pull", _forget_second, "anil", "vmap, replayed"),
    "norm: nothing through gamma's gradient": Mutant(norm._Backward, "backward", _zero_cotangent(1), "maml"),
    "norm: nothing through beta's gradient": Mutant(norm._Backward, "backward", _zero_cotangent(2), "maml"),
    "norm: gamma a constant in the backward": Mutant(norm._Backward, "backward", _without_gamma_gradient, "maml"),
    "padding counts in the inner loss": Mutant(anil, "cross_entropy", _no_mask, "anil", "vmap", "support"),
    "padding counts in the query loss": Mutant(learner, "cross_entropy", _no_mask, "protonet", "vmap", "query"),
    "padding counts in the norm": Mutant(norm, "masked_batch_norm", _average_padding, "maml", "vmap", "both"),
    "padding counts in local SGD": Mutant(reptile, "union", _union_without_mask, "reptile", "vmap", "support"),
}


def _wanted(problem: Setting) -> Tensor:
    return oracle.meta_gradients(problem.algorithm, oracle.smooth("batch"), problem.theta, problem.episodes)[0]


def _error(problem: Setting, path: str) -> float:
    return relative_error(rows(problem, path).gradient, _wanted(problem))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_the_comparison_sees_a_wrong_gradient(mutant: Mutant, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = setting(Variant(mutant.variant), 2, ragged=mutant.ragged)
    assert _error(problem, mutant.path) < EXACT
    monkeypatch.setattr(mutant.owner, mutant.name, mutant.change(getattr(mutant.owner, mutant.name)))
    assert _error(problem, mutant.path) > WRONG


def _gradient_of_vmap(problem: Setting) -> Tensor:
    """Return the mean meta-gradient in the order that looks natural: the gradient outside the ``vmap``."""
    network, rate = problem.network, problem.algorithm.inner_rate

    def task_loss(theta: dict[str, Tensor], sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        inner = torch.func.grad(lambda w: F.cross_entropy(network.logits(w, sx), sy))(theta)
        return F.cross_entropy(network.logits({n: w - rate * inner[n] for n, w in theta.items()}, qx), qy)

    def mean_loss(theta: dict[str, Tensor]) -> Tensor:
        s, q = problem.episodes.support, problem.episodes.query
        return torch.vmap(task_loss, (None, 0, 0, 0, 0))(theta, s.x, s.y, q.x, q.y).mean()

    return torch.cat([g.reshape(-1) for g in torch.func.grad(mean_loss)(problem.theta).values()])


def test_pytorch_batch_norm_is_wrong_under_a_gradient_of_vmap_and_ours_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = setting(Variant("maml"), 1)
    want = _wanted(problem)
    assert relative_error(_gradient_of_vmap(problem), want.mean(0)) < EXACT

    def theirs(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, gamma, beta, training=True)

    monkeypatch.setattr(norm, "batch_norm", theirs)
    assert relative_error(_gradient_of_vmap(problem), want.mean(0)) > WRONG
    for path in (
        "loop",
        "vmap",
        "vmap, replayed",
    ):  # the engine takes gradients inside the vmap: right with either
        assert relative_error(rows(problem, path).gradient, want) < EXACT, path


def test_two_workers_in_one_module_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a copy of its own a worker computes with the parameters of another."""
    problem = setting(Variant("reptile"), 3)
    want = _wanted(problem)
    own_forward = type(problem.network.body).forward
    both_are_inside = Barrier(2)

    def forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        both_are_inside.wait(timeout=30)
        out: Tensor = own_forward(self, x, mask)
        return out

    monkeypatch.setattr(type(problem.network.body), "forward", forward)
    assert relative_error(rows(problem, "loop, 2 cores").gradient, want) < EXACT
    monkeypatch.setattr(Engine, "_structure", lambda engine: engine.network)
    with suppress(RuntimeError):  # the swap may notice by itself that the module changed under it
        assert relative_error(rows(problem, "loop, 2 cores").gradient, want) > WRONG
