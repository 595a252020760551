"""How the figures grow with the number of labelled patients, and how many more would probably do."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt

import numpy as np

from client.adapt.choose import deal, draw_shots, fewest
from client.adapt.images import Labelled
from client.adapt.judge import Estimate
from client.adapt.methods import Method, Setting
from common.figures import balanced_accuracy

__all__ = ["Point", "enough", "learning_curve"]

_SHOTS = (1, 2, 3, 5, 8, 12, 20)
_DRAWS = 3
#: Nobody labels more than so many times what there is because of a straight line.
_REACH = 20


@dataclass(frozen=True)
class Point:
    """Balanced accuracy of every method with so many support patients of every class, one draw."""

    shots: int
    scores: Mapping[str, float]


def learning_curve(
    methods: Mapping[str, Method],
    settings: Mapping[str, Setting],
    images: Labelled,
    generator: np.random.Generator,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """Return points for 1, 2, 3, 5, ... support patients a class, as far as two thirds of the patients go.

    The settings stay those that were chosen with all patients: the curve is a guide, and nothing is reported from it
    but the guide.
    """
    points = []
    rows = np.flatnonzero(images.unseen)
    most = fewest(images, rows) * 2 // 3
    for _ in range(_DRAWS):
        held = rows[deal(images, rows, 3, generator) == 0]
        kept = ~np.isin(images.patients, images.patients[held])
        for shots in (k for k in _SHOTS if k <= most):
            support = draw_shots(images, shots, generator, among=kept)
            progress("learning curve")
            scores = {}
            for name, method in methods.items():
                (_, predict), *_ = method.fit(images, support, [settings[name]])
                scores[name] = float(balanced_accuracy(predict(held), images.labels[held]))
            points.append(Point(shots, scores))
    return points


def enough(points: Sequence[Point], method: str, over: str, gain: Estimate, patients: int) -> int | None:
    """Return with how many patients a class the gain's interval would probably lie above zero; None: not in reach.

    The gain is taken to go on along a straight line over log K, fitted to the learning curve and moved to pass through
    the gain that was measured; the half width of its interval to fall with the square root of the patients. Both are
    assumptions.

    Parameters
    ----------
    gain : Estimate
        As measured with ``patients`` patients of the rarest class.
    """
    half = (gain.high - gain.low) / 2
    shots = np.array([log(point.shots) for point in points])
    gains = np.array([point.scores[method] - point.scores[over] for point in points])
    slope = float(np.polyfit(shots, gains, 1)[0]) if len(set(shots)) > 1 else 0.0
    for more in range(patients, _REACH * patients + 1):
        if gain.value + slope * log(more / patients) > half * sqrt(patients / more):
            return more
    return None
