"""The mechanism ``patient-clip``: a site is one task, and its MAML meta-gradient is made of noised sums over patients.

With the support loss ``L_s``, the sum of ``L_p / m_s`` over the support patients p, the query loss ``L_q`` likewise,
and K inner steps at rate a, the meta-gradient is v_0 of

    phi_0 = theta           phi_k+1 = phi_k - a grad L_s(phi_k)
    v_K = grad L_q(phi_K)   v_k = v_k+1 - a hess L_s(phi_k) v_k+1

and every derivative in it is a sum of one term for each patient. Each term is clipped, each sum gets noise, and phi and
v are computed from what the sums gave *with* noise and from nothing else. `docs/privacy.md` has the proof.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from common.errors import ModelError
from common.models.network import Network
from common.privacy.mechanism import SENSITIVITY
from common.study import Study

__all__ = ["Numbers", "Sums", "check_network", "meta_gradient", "sums_of"]

#: A vector ``[D]`` as sums give it.
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Sums:
    """The sums that a site takes of its patients in one round, as a study fixes them.

    Attributes
    ----------
    steps : int
        K: there are as many inner gradients, then a query gradient, then as many Hessian-vector products.
    rate : float
        Of an inner step.
    curved : bool
        Whether the Hessian-vector products are taken: not in first-order MAML.
    support_patients, query_patients : int
        m_s and m_q, what sums are divided by. Public constants: how many patients there were is a secret.
    query_noise : float
        Standard deviation of the noise on the query gradient's sum, in the unit of the clip bound.
    """

    steps: int
    rate: float
    curved: bool
    support_patients: int
    query_patients: int
    query_noise: float

    @property
    def of_a_support_patient(self) -> int:
        """How many sums a support patient is in; a query patient is in one."""
        return self.steps * (2 if self.curved else 1)

    @property
    def support_noise(self) -> float:
        """Standard deviation of the noise on every sum of support patients.

        They move each sum by the clip bound, and all together by its root of n times as much: with root of n times the
        noise a round costs them as much as a query patient.
        """
        return self.query_noise * sqrt(self.of_a_support_patient)

    @property
    def reply_noise(self) -> float:
        """Standard deviation of all noise that is added to what is sent, in the unit of the clip bound."""
        back = self.steps * (self.rate * self.support_noise / self.support_patients) ** 2 if self.curved else 0.0
        return sqrt((self.query_noise / self.query_patients) ** 2 + back)


def sums_of(study: Study) -> Sums:
    """Return the sums of a study's round."""
    plan, inner, classes = study.privacy, study.algorithm, len(study.episodes.class_names)
    return Sums(
        inner.inner_steps,
        inner.inner_rate,
        inner.name == "maml",
        classes * study.episodes.shots,
        classes * study.episodes.queries,
        plan.noise * SENSITIVITY["patient-clip"] * plan.clip,
    )


def meta_gradient(
    sums: Sums,
    theta: Numbers,
    inner: Callable[[Numbers], Numbers],
    query: Callable[[Numbers], Numbers],
    product: Callable[[Numbers, Numbers], Numbers],
) -> Numbers:
    """Return the meta-gradient ``[D]``, computed from what three noised sums give and from nothing else.

    Parameters
    ----------
    theta : ndarray
        ``[D]``.
    inner, query : callable
        From a point ``[D]`` to the gradient of the support or query loss there, with noise.
    product : callable
        From a point and a vector ``[D]`` to the Hessian of the support loss there times the vector, with noise. It is
        asked backwards, at the points where ``inner`` was asked.

    References
    ----------
    Finn, Abbeel and Levine, "Model-Agnostic Meta-Learning", 2017, equation 1, with the site as the only task.
    """
    points = [theta]
    for _ in range(sums.steps):
        points.append(points[-1] - sums.rate * inner(points[-1]))
    vector = query(points.pop())
    if sums.curved:
        for point in reversed(points):
            vector = vector - sums.rate * product(point, vector)
    return vector


def check_network(study: Study, network: Network) -> None:
    """Raise ModelError where a network's loss is not a sum over patients, and the study's mechanism needs that."""
    if study.privacy.mechanism == "patient-clip" and network.body.mixes_rows:
        raise ModelError(
            "privacy.mechanism is 'patient-clip', and the network's prediction for an image depends on the other "
            "images of the batch: choose a network with group norm"
        )
