"""From a study to its learner."""

from common.meta.anil import Anil
from common.meta.fedavg import FedAvg, FedProx
from common.meta.fomaml import Fomaml
from common.meta.learner import InnerLoop, Learner
from common.meta.local_only import LocalOnly
from common.meta.maml import Maml
from common.meta.metasgd import MetaSgd
from common.meta.protomaml import ProtoMaml
from common.meta.protonet import ProtoNet
from common.meta.reptile import Reptile
from common.study import Algorithm, Episodes

__all__ = ["head_size", "make_learner"]

_INNER_LOOPS: tuple[type[InnerLoop], ...] = (Maml, Fomaml, Anil, ProtoMaml)


def make_learner(algorithm: Algorithm) -> Learner:
    """Return the learner that a study names."""
    a = algorithm
    if a.name == LocalOnly.name:
        return LocalOnly(a.test_rate)
    if a.name == Reptile.name:
        return Reptile(a.inner_steps, a.inner_rate, a.test_rate)
    if a.name == FedAvg.name:
        return FedAvg(a.inner_steps, a.inner_rate, a.test_rate)
    if a.name == FedProx.name:
        return FedProx(a.inner_steps, a.inner_rate, a.test_rate, a.proximal)
    if a.name == MetaSgd.name:
        return MetaSgd(a.inner_steps, a.inner_rate, a.test_rate, a.recompute, a.rates)
    if a.name == ProtoNet.name:
        return ProtoNet(0, a.inner_rate, a.test_rate)  # no inner loop
    kind = next(k for k in _INNER_LOOPS if k.name == a.name)
    return kind(a.inner_steps, a.inner_rate, a.test_rate, a.recompute)


def head_size(algorithm: Algorithm, episodes: Episodes) -> int:
    """Return how many classes the network's head has: ways, or the class list.

    FedAvg trains one classifier over all training classes, also where episodes relabel theirs.
    """
    if episodes.labels == "fixed" or algorithm.name in {FedAvg.name, FedProx.name}:
        return len(episodes.class_names)
    return episodes.ways
