"""From a study to its learner."""

from collections.abc import Callable

from common.meta.anil import Anil
from common.meta.fedavg import FedAvg, FedProx
from common.meta.fomaml import Fomaml
from common.meta.learner import Learner
from common.meta.local_only import LocalOnly
from common.meta.maml import Maml
from common.meta.metasgd import MetaSgd
from common.meta.protomaml import ProtoMaml
from common.meta.protonet import ProtoNet
from common.meta.reptile import Reptile
from common.study import Algorithm, Episodes

__all__ = ["head_size", "make_learner"]


def make_learner(algorithm: Algorithm) -> Learner:
    """Return the learner that a study names."""
    a = algorithm
    local = (a.inner_steps, a.inner_rate, a.test_rate)
    inner = (*local, a.recompute)
    makers: dict[str, Callable[[], Learner]] = {
        "maml": lambda: Maml(*inner),
        "fomaml": lambda: Fomaml(*inner),
        "anil": lambda: Anil(*inner),
        "metasgd": lambda: MetaSgd(*inner, a.rates),
        "protomaml": lambda: ProtoMaml(*inner),
        "protonet": lambda: ProtoNet(0, a.inner_rate, a.test_rate),  # no inner loop
        "reptile": lambda: Reptile(*local),
        "fedavg": lambda: FedAvg(*local),
        "fedprox": lambda: FedProx(*local, a.proximal),
        "local-only": lambda: LocalOnly(a.test_rate),
    }
    return makers[a.name]()


def head_size(algorithm: Algorithm, episodes: Episodes) -> int:
    """Return how many classes the network's head has: ways, or the class list.

    FedAvg trains one classifier over all training classes, also where episodes relabel theirs. Prototypes fill a head
    of any size: it has room for training episodes and for test episodes.
    """
    if episodes.labels == "fixed" or algorithm.name in {FedAvg.name, FedProx.name}:
        return len(episodes.class_names)
    return max(episodes.ways, episodes.train_ways)
