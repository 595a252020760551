"""What balanced accuracy, AUROC and expected calibration error are, image by image and pair by pair."""

from collections.abc import Sequence
from math import nan
from typing import Any

__all__ = ["plain_figures"]


def plain_figures(probabilities: Any, labels: Any) -> dict[str, float]:
    """Return the three figures of probabilities ``[N, C]`` and labels ``[N]``; not a number where there is none."""
    rows, y = [[float(v) for v in row] for row in probabilities], [int(k) for k in labels]
    top = [row.index(max(row)) for row in rows]
    classes = range(len(rows[0]))
    recalls = [_mean([t == c for t, k in zip(top, y, strict=True) if k == c]) for c in classes if c in y]
    areas = []
    for c in classes:
        pairs = [
            (a[c], b[c]) for a, k in zip(rows, y, strict=True) for b, j in zip(rows, y, strict=True) if k == c != j
        ]
        if pairs:
            areas.append(_mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs]))
    gap = 0.0
    for low in range(10):  # (0, 0.1], (0.1, 0.2], ...
        inside = [i for i, row in enumerate(rows) if low / 10 + 1e-9 < max(row) <= (low + 1) / 10 + 1e-9]
        gap += abs(sum((top[i] == y[i]) - max(rows[i]) for i in inside)) / len(rows)
    return {"balanced": _mean(recalls), "auroc": _mean(areas), "ece": gap}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
