"""A theta on a task of a site's own: as many classes as there are, gradient steps, plain weights in the end.

Whatever the learner, an adapted model is a body and a linear head (a prototype is a row of such a head), and its norms'
statistics are those of the support set: a prediction depends on one image, and on nothing else that is looked at.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.adapt.trained import Trained
from common.errors import ModelError
from common.meta.autodiff import EAGER
from common.meta.episodes import Batch, cross_entropy
from common.meta.learner import InnerLoop, Learner, State
from common.meta.local_sgd import LocalSgd
from common.meta.protomaml import ABSENT
from common.meta.protonet import ProtoNet
from common.models import build, untrained
from common.models.fixed_norm import fix_statistics, with_fixed_statistics
from common.models.network import Network, Theta

__all__ = [
    "Classifier",
    "Start",
    "as_it_is",
    "from_scratch",
    "learner_begins",
    "start",
    "steps_of_adam",
    "steps_of_learner",
]

#: Images that go through a network at once.
_BATCH = 256


@dataclass(frozen=True)
class Classifier:
    """Plain weights of a network whose statistics are fixed.

    Attributes
    ----------
    network : Network
        Structure only.
    weights : mapping of str to Tensor
        Its body and its head.
    """

    network: Network
    weights: Mapping[str, Tensor]

    def features(self, x: Tensor) -> NDArray[np.float64]:
        """Return the features ``[N, F]`` of images ``[N, C, *]``."""
        device = next(iter(self.weights.values())).device
        with torch.no_grad():
            parts = [self.network.features(self.weights, part.to(device)).cpu() for part in torch.split(x, _BATCH)]
        return torch.cat(parts).double().numpy()

    def head(self, features: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the logits ``[N, C]`` of features."""
        weight, bias = (self.weights[f"head.{name}"].double().cpu().numpy() for name in ("weight", "bias"))
        return np.asarray(features @ weight.T + bias)

    def logits(self, x: Tensor) -> NDArray[np.float64]:
        """Return the logits ``[N, C]`` of images ``[N, C, *]``."""
        return self.head(self.features(x))


@dataclass(frozen=True)
class Start:
    """Where adaptation to a task begins.

    Attributes
    ----------
    network : Network
        With a head of the task's classes.
    theta : mapping of str to Tensor
        The study's, its head's rows being those of the task's classes.
    knows : bool
        Whether theta says something about these classes before it is adapted: a head whose every row it was trained.
    """

    network: Network
    theta: Mapping[str, Tensor]
    knows: bool


def start(trained: Trained, classes: Sequence[str]) -> Start:
    """Return where adaptation of a theta to some classes begins.

    A head over the study's diagnoses gives its rows by name, zeros for a new class. One that was trained on shuffled
    labels gives its rows in order, and their mean to a class beyond them: to that training all rows are alike.
    """
    study = trained.study
    network = build(study.model, classes=len(classes), seed=study.study.seed)
    size = trained.network.head.out_features
    named = size == len(study.episodes.class_names) and (
        study.episodes.labels == "fixed" or study.algorithm.name in {"fedavg", "fedprox"}
    )
    known = study.episodes.class_names if named else ()
    at = [known.index(name) if name in known else -1 for name in classes]

    def rows(t: Tensor) -> Tensor:
        if named:
            return torch.stack([t[i] if i >= 0 else torch.zeros_like(t[0]) for i in at])
        return torch.stack([t[i] if i < size else t.mean(0) for i in range(len(classes))])

    theta = {
        name: rows(t) if name.removeprefix("rate.") in {"head.weight", "head.bias"} and t.dim() else t
        for name, t in trained.theta.items()
    }
    return Start(network, theta, bool(known) and min(at) >= 0 and "head.weight" in theta)


def from_scratch(trained: Trained, classes: int, seed: int) -> Start:
    """Return the same network, untrained."""
    network = build(untrained(trained.study.model), classes=classes, seed=seed)
    return Start(network, network.theta(), knows=False)


def as_it_is(begin: Start, x: Tensor) -> Classifier:
    """Return theta as it is, its statistics fixed to those of some images; a theta without head has one of zeros."""
    network = begin.network
    known = {**network.fixed, **begin.theta}
    theta = {
        name: known[name].to(x) if name in known else torch.zeros_like(p).to(x)
        for name, p in network.named_parameters()
    }
    return _classifier(network, theta, x)


def learner_begins(learner: Learner, begin: Start, support: Batch) -> Start:
    """Return where a learner begins on a support set, as plain weights: theta, or its body and a head of prototypes."""
    if not isinstance(learner, InnerLoop):
        return begin
    theta: Theta = {name: t.to(support.x) for name, t in begin.theta.items()}
    weights = _plain(learner.begin(deepcopy(begin.network), theta, support))
    return replace(begin, theta={name: weights[name].detach() for name in begin.network.theta()})


def steps_of_learner(
    learner: Learner, begin: Start, support: Batch, rate: float, checkpoints: Sequence[int]
) -> Iterator[tuple[int, Classifier]]:
    """Yield the learner's adapted classifier after so many steps, in ascending order.

    The rate is the learner's at meta-test time; one that learned its rates, or takes no step, does not look at it.
    """
    network, done = deepcopy(begin.network), 0
    own = torch.arange(network.head.out_features, device=support.x.device)
    theta: Theta = {name: t.to(support.x) for name, t in begin.theta.items()}
    if isinstance(learner, InnerLoop):
        state = learner.begin(network, theta, support)
        for steps in checkpoints:
            for _ in range(0 if isinstance(learner, ProtoNet) else steps - done):
                fast = learner.step(network, state, support, rate, EAGER, second=False)
                state = State({n: t.detach() for n, t in fast.items()}, state.fixed)
            done = steps
            yield steps, _classifier(network, _plain(state), support.x)
    elif isinstance(learner, LocalSgd):
        fine = replace(learner, test_rate=rate)
        for steps in checkpoints:
            theta = fine.adapt(network, theta, support, own, steps - done, EAGER).fast
            done = steps
            yield steps, _classifier(network, theta, support.x)
    else:
        raise ModelError(f"a study of {learner.name} shares no theta: there is nothing to adapt")


def steps_of_adam(
    begin: Start, support: Batch, rate: float, checkpoints: Sequence[int]
) -> Iterator[tuple[int, Classifier]]:
    """Yield the classifier that Adam reaches after so many steps on the support set, in ascending order."""
    network, done = deepcopy(begin.network), 0
    phi = {name: t.to(support.x, copy=True).requires_grad_() for name, t in begin.theta.items()}
    optimiser = torch.optim.Adam(phi.values(), lr=rate)
    for steps in checkpoints:
        for _ in range(steps - done):
            loss = cross_entropy(network.logits(phi, support.x), support)
            for t, grad in zip(phi.values(), torch.autograd.grad(loss, list(phi.values())), strict=True):
                t.grad = grad
            optimiser.step()
        done = steps
        yield steps, _classifier(network, {name: t.detach().clone() for name, t in phi.items()}, support.x)


def _plain(state: State) -> Theta:
    """Return an inner loop's state as a body and a linear head."""
    if "prototypes" not in state.fixed:
        return {**state.fixed, **state.fast}
    centres, present = state.fixed["prototypes"], state.fixed["present"] > 0
    bias = torch.where(present, -centres.square().sum(-1), ABSENT)
    return {**state.fixed, "head.weight": 2 * centres, "head.bias": bias}


def _classifier(network: Network, weights: Theta, x: Tensor) -> Classifier:
    whole = {**{name: t.to(x) for name, t in network.fixed.items()}, **weights}
    own = {name: whole[name].detach() for name, _ in network.named_parameters()}
    return Classifier(with_fixed_statistics(network), fix_statistics(network, own, x))
