"""What some rounds cost a patient: epsilon at a delta, exactly where that can be, and the noise for a wanted epsilon.

`Rounds` say what was released. Privacy loss distributions give the epsilon that is reported; Renyi's divergence gives
an upper bound by other means, and without sampling there is a closed form. ``dp_accounting`` is imported where it is
needed: a hospital that counts nothing does not load it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, inf, log10, sqrt
from typing import Any, Literal

from common.privacy.gaussian import delta_of, epsilon_of, mu_of

__all__ = ["Relation", "Rounds", "deltas", "epsilon", "noise_for", "renyi_epsilon"]

#: What "the same data but for one patient" means: there or not, or another patient in the place.
Relation = Literal["add-remove", "replace"]

#: Beyond this, privacy loss distributions grow long and the digits mean nothing: Renyi's bound is given instead.
_PLENTY = 100.0
# Whole orders are quick; between them, for few rounds, lies the best one. Below 2 the series does not always converge.
_ORDERS = (*(tenths / 10 for tenths in range(20, 110)), *range(11, 65), 80, 128, 256, 512)


@dataclass(frozen=True)
class Rounds:
    """Some rounds of the sampled Gaussian mechanism.

    Attributes
    ----------
    sampling : float
        The probability with which a patient is in a round.
    noise : float
        Standard deviation of the noise, in sensitivities (how far one patient more or less moves the sum).
    count : int
        How many rounds.
    """

    sampling: float
    noise: float
    count: int


def epsilon(rounds: Sequence[Rounds], delta: float, relation: Relation = "add-remove") -> float:
    """Return the epsilon of some rounds together: an upper bound, tight to about 1e-3.

    Under ``replace``, a patient's place moves the sum by up to twice what adding one does: this is assumed of every
    mechanism, and so bounds those for which it is less.

    References
    ----------
    Doroshenko, Ghazi, Kamath, Kumar and Manurangsi, "Connect the dots: tighter discrete approximations of privacy loss
    distributions", PoPETs 2022. Without sampling: `common.privacy.gaussian`.
    """
    rounds = tuple(part for part in rounds if part.count and part.sampling)
    if any(part.noise <= 0 for part in rounds):
        return inf
    if all(part.sampling == 1 for part in rounds):
        mu = sqrt(sum(part.count / part.noise**2 for part in rounds))
        return epsilon_of(delta, mu if relation == "add-remove" else 2 * mu)
    return _epsilon(rounds, delta, relation, 1e-4)


def deltas(rounds: Rounds, epsilons: Sequence[float]) -> list[float]:
    """Return the delta that some rounds have at each of some epsilons, patients added or removed: upper bounds.

    Where the epsilons that are worth a digit lie far apart, sampling is left out of the account.
    """
    if rounds.noise <= 0:
        return [1.0] * len(epsilons)
    if rounds.sampling == 1 or renyi_epsilon([rounds], 1e-5) > _PLENTY:
        mu = sqrt(rounds.count) / rounds.noise
        return [delta_of(at, mu) for at in epsilons]
    accountant = _losses((rounds,), "add-remove", 1e-3)
    return [float(delta) for delta in accountant.get_delta(list(epsilons))]


def renyi_epsilon(rounds: Sequence[Rounds], delta: float) -> float:
    """Return an upper bound on the epsilon of some rounds by Renyi's divergence, for patients added or removed.

    References
    ----------
    Mironov, Talwar and Zhang, "Renyi differential privacy of the sampled Gaussian mechanism", 2019; Canonne, Kamath and
    Steinke, "The discrete Gaussian for differential privacy", 2020, proposition 12.
    """
    import dp_accounting
    from dp_accounting import rdp

    accountant: Any = rdp.RdpAccountant(_ORDERS)
    for part in rounds:
        accountant.compose(_event(dp_accounting, part), part.count)
    return float(accountant.get_epsilon(delta))


def noise_for(wanted: float, delta: float, sampling: float, count: int) -> float:
    """Return the noise, in sensitivities, with which ``count`` rounds cost at most the ``wanted`` epsilon.

    It is rounded up to four digits. Patients are added or removed.
    """
    high = sqrt(count) / mu_of(wanted, delta)  # enough without sampling, and sampling costs nothing
    if sampling == 1:
        return _rounded_up(high)

    def enough(noise: float) -> bool:
        return _epsilon((Rounds(sampling, noise, count),), delta, "add-remove", 1e-3) <= wanted

    low = high / 2
    while enough(low):
        low, high = low / 2, low
    while high / low > 1.0005:
        middle = sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return _rounded_up(high)


@lru_cache(maxsize=256)
def _epsilon(rounds: tuple[Rounds, ...], delta: float, relation: Relation, step: float) -> float:
    bound = renyi_epsilon(rounds, delta)
    if bound > _PLENTY:
        mu = sqrt(sum(part.count / part.noise**2 for part in rounds))
        return bound if relation == "add-remove" else epsilon_of(delta, 2 * mu)
    return float(_losses(rounds, relation, step).get_epsilon(delta))


def _losses(rounds: Sequence[Rounds], relation: Relation, step: float) -> Any:
    """Return an accountant of some rounds' privacy losses, discretised in steps."""
    import dp_accounting
    from dp_accounting import pld

    one = dp_accounting.NeighboringRelation
    neighbours = {"add-remove": one.ADD_OR_REMOVE_ONE, "replace": one.REPLACE_ONE}
    accountant: Any = pld.PLDAccountant(neighbours[relation], step)
    for part in rounds:
        accountant.compose(_event(dp_accounting, part), part.count)
    return accountant


def _event(library: Any, part: Rounds) -> Any:
    return library.PoissonSampledDpEvent(part.sampling, library.GaussianDpEvent(part.noise))


def _rounded_up(value: float) -> float:
    digits = 4 - ceil(log10(value))
    return round(ceil(value * 10.0**digits) / 10.0**digits, max(0, digits))
