"""The guarantee of a study, in numbers and in the one sentence that every report prints."""

from math import ceil, inf

from common.privacy.accounting import Rounds, epsilon
from common.study import Study

__all__ = ["guarantee", "rounded_up", "rounds_of"]


def rounds_of(study: Study, count: int | None = None) -> Rounds:
    """Return what ``count`` rounds of a study release, all that it plans by default."""
    plan = study.privacy
    return Rounds(plan.sampling, plan.noise, study.study.rounds if count is None else count)


def guarantee(study: Study) -> str:
    """Return what a study promises to every patient of a site that trains."""
    plan = study.privacy
    if plan.mechanism == "none":
        return "no formal guarantee (privacy.mechanism = 'none')"
    if plan.research:
        return "no formal guarantee (privacy.research: the noise is seeded, and figures may be sent)"
    cost = rounded_up(epsilon([rounds_of(study)], plan.delta))
    return (
        f"epsilon {cost} at delta {plan.delta:g} for every patient of a site over {study.study.rounds:,} rounds "
        f"({plan.mechanism}, patients added or removed)"
    )


def rounded_up(cost: float) -> str:
    """Return an epsilon with two decimals, never smaller than it is."""
    return "infinite" if cost == inf else f"{ceil(cost * 100) / 100:.2f}"
