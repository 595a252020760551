"""The rule of a study at work: replies go in, in the order of the sites, and one meta-gradient comes out."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from common.contract import Vector
from common.errors import ContractError, RoundError, StudyError
from common.study import Aggregation
from server.aggregation.clipping import CentredClipping, norm
from server.aggregation.krum import krum, krum_needs, multi_krum
from server.aggregation.mean import Mean
from server.aggregation.trimmed import median, trimmed_mean, trimmed_needs

__all__ = ["Aggregator", "explain_need", "sites_needed"]


def sites_needed(plan: Aggregation) -> int:
    """Return how many replies a round needs for what the rule promises: n as a function of f."""
    if plan.rule == "mean":
        return 1
    if plan.rule in {"krum", "multi-krum"}:
        return krum_needs(plan.tolerated, plan.selected)
    return trimmed_needs(plan.tolerated)


def explain_need(plan: Aggregation) -> str:
    """Return in words how many sites the rule needs, and why."""
    formula = {"krum": "2f + 3", "multi-krum": "the larger of 2f + 3 and aggregation.selected + f + 2"}
    return (
        f"the rule {plan.rule} needs {sites_needed(plan)} to withstand f = {plan.tolerated} hostile ones "
        f"({formula.get(plan.rule, '2f + 1')}; aggregation.tolerated is f)"
    )


class Aggregator:
    """Aggregates the replies of round after round by the rule of a study.

    With ``mean``, memory is one vector, however many sites there are. Every other rule needs all replies at once,
    ``[n, D]`` in float64, which stay allocated between rounds.

    Parameters
    ----------
    plan : Aggregation
        The study's section.
    size : int
        Number of elements D of a reply.
    sites : sequence of str
        The sites that train, in their fixed order.

    Raises
    ------
    StudyError
        The study gives weights, and none to one of the sites.
    RoundError
        There are too few sites for the rule.
    """

    def __init__(self, plan: Aggregation, size: int, sites: Sequence[str]) -> None:
        self._plan, self._size = plan, size
        self._weights = plan.site_weights
        self._rows = np.empty((0, size), np.float64)
        clips = plan.rule == "centred-clipping"
        self._clipping = CentredClipping(
            size if clips else 0, radius=plan.radius, iterations=plan.iterations, momentum=plan.momentum
        )
        self._enough(len(sites))
        self.begin(sites)

    def begin(self, sites: Sequence[str]) -> None:
        """Begin a round or an attempt with the sites that are asked; what was added and not aggregated is forgotten.

        Raises
        ------
        StudyError
            The study gives weights, and none to one of the sites.
        """
        if self._weights and (missing := [site for site in sites if site not in self._weights]):
            raise StudyError(
                f"aggregation.weights gives no weight to {', '.join(missing)}: "
                "name every site that trains, or none for equal weights"
            )
        self._place = {site: i for i, site in enumerate(sites)}
        if self._plan.rule == "mean":
            self._mean = Mean(self._size)
        elif len(self._rows) < len(sites):
            self._rows = np.empty((len(sites), self._size), np.float64)
        self._sites: list[str] = []

    @property
    def count(self) -> int:
        """Number of replies since the round began."""
        return len(self._sites)

    def add(self, site: str, vector: Vector) -> None:
        """Add a site's reply ``[D]``, which passed the contract; sites come in their order, each at most once.

        Raises
        ------
        ContractError
            The reply's norm is above the study's bound: it does not count.
        """
        if self._sites and self._place[site] <= self._place[self._sites[-1]]:
            raise ValueError(f"{site} after {self._sites[-1]}: replies are added in the order of the sites, each once")
        if vector.shape != (self._size,):
            raise ValueError(f"a reply of shape {vector.shape}, where it is ({self._size},): it would be broadcast")
        if self._plan.max_norm and norm(vector) > self._plan.max_norm:
            text = f"the meta-gradient's norm is above aggregation.max-norm, {self._plan.max_norm:g}"
            raise ContractError(text, "norm")
        if self._plan.rule == "mean":
            self._mean.add(vector, self._weights.get(site, 1.0))
        else:
            self._rows[self.count] = vector
        self._sites.append(site)

    def result(self) -> NDArray[np.float64]:
        """Return the round's meta-gradient ``[D]``.

        Raises
        ------
        RoundError
            There are too few replies for the rule; nothing that is kept between rounds has changed.
        """
        self._enough(self.count)
        return self._apply(self._rows[: self.count])

    def _apply(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        plan = self._plan
        match plan.rule:
            case "mean":
                return self._mean.result()
            case "median":
                return median(rows, plan.tolerated)
            case "trimmed-mean":
                return trimmed_mean(rows, plan.tolerated)
            case "krum":
                return krum(rows, plan.tolerated)
            case "multi-krum":
                return multi_krum(rows, plan.tolerated, plan.selected)
            case "centred-clipping":
                return self._clipping.step(self._sites, rows)

    def _enough(self, count: int) -> None:
        if count < sites_needed(self._plan):
            raise RoundError(f"{count} sites are too few: {explain_need(self._plan)}")

    def state(self) -> dict[str, NDArray[np.float64]]:
        """Return what the rule keeps between rounds, arrays by name; empty for all but centred clipping."""
        return self._clipping.state() if self._plan.rule == "centred-clipping" else {}

    def restore(self, state: Mapping[str, NDArray[np.float64]]) -> None:
        """Go on from an earlier `state` of the same study."""
        if self._plan.rule == "centred-clipping":
            self._clipping.restore(state)
