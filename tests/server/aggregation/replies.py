"""Replies for aggregation rules: of honest sites, and with hostile ones among them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.study import Aggregation

__all__ = ["PLANS", "ROBUST", "Rows", "a_plan", "majority", "some_rows", "spoilt"]

Rows = NDArray[np.float64]


#: A plan of each rule that withstands one hostile site.
PLANS: Mapping[str, Mapping[str, Any]] = {
    "mean": {},
    "median": {"tolerated": 1},
    "trimmed-mean": {"tolerated": 1},
    "krum": {"tolerated": 1},
    "multi-krum": {"tolerated": 1, "selected": 2},
    "centred-clipping": {"tolerated": 1, "radius": 0.25, "iterations": 8, "momentum": 0.5},
}
ROBUST = [rule for rule in PLANS if rule != "mean"]


def a_plan(rule: str, **changes: Any) -> Aggregation:
    return Aggregation.model_validate({"rule": rule, **PLANS[rule], **changes})


@st.composite
def some_rows(
    draw: st.DrawFn, *, least: Callable[[int], int], whole: bool = True, most_hostile: int = 3
) -> tuple[Rows, int]:
    """Return ``[n, D]`` and f, n at least ``least(f)``; of whole numbers, with which oracles and ours are exact."""
    tolerated = draw(st.integers(1, most_hostile))
    count = draw(st.integers(least(tolerated), least(tolerated) + 4))
    width = draw(st.integers(1, 4))
    number = st.integers(-9, 9).map(float) if whole else st.floats(-1e6, 1e6)
    rows = draw(st.lists(st.lists(number, min_size=width, max_size=width), min_size=count, max_size=count))
    return np.array(rows), tolerated


def majority(tolerated: int) -> int:
    return 2 * tolerated + 1


def spoilt(draw: Callable[[Any], Any], rows: Rows, tolerated: int) -> tuple[Rows, list[int]]:
    """Return a copy in which f of the sites hold anything at all, and who the others are."""
    hostile = draw(st.lists(st.integers(0, len(rows) - 1), min_size=tolerated, max_size=tolerated, unique=True))
    anything = st.floats(-1e300, 1e300) | st.sampled_from([1e6, -1e6, 0.0, 1e300, -1e300])
    same = draw(st.booleans())  # together, all of them in one place
    first = draw(st.lists(anything, min_size=rows.shape[1], max_size=rows.shape[1]))
    rows = rows.copy()
    for site in hostile:
        rows[site] = first if same else draw(st.lists(anything, min_size=rows.shape[1], max_size=rows.shape[1]))
    return rows, [site for site in range(len(rows)) if site not in hostile]
