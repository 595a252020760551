"""Risk over time: which images count for a later outcome, what their dates give away, and calibration in tenths."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.adapt.judge import Estimate, Judged
from client.data.labels import Labels, dated_rows
from client.data.outcome import OUTCOMES
from common.errors import DataError
from common.figures import auroc, bootstrap, interval

__all__ = ["Followed", "follow", "tenths"]

_TENTHS = 10
_REPLICATES = 1000
_KINDS = ("used", "after the horizon", "no outcome")


@dataclass(frozen=True)
class Followed:
    """What a labels file with dates and an outcome file say together; no date and nobody is in it.

    Attributes
    ----------
    days : int
        The horizon.
    rows : mapping of str to int
        How many rows count, come after the horizon, or are of a patient without outcome.
    dates_alone : Estimate
        AUROC of the date on which an image was taken, for its outcome, interval over patients: one half where dates
        give nothing away.
    """

    days: int
    rows: dict[str, int]
    dates_alone: Estimate

    def json(self) -> dict[str, Any]:
        """Return it as JSON takes it."""
        return {"horizon in days": self.days, "rows": self.rows, "AUROC of dates alone": self.dates_alone.json()}


def follow(labels: Labels, generator: np.random.Generator) -> Followed:
    """Return what becomes of the rows of a labels file with outcomes.

    Where cases were looked at earlier or later than controls, whatever changed with the years tells them apart: a
    camera, a protocol, how long patients were followed. A network sees that in the pixels, and no horizon prevents it.
    """
    if labels.outcomes is None:
        raise DataError("there are no outcomes to follow: give --outcome and --horizon")
    rows = list(dated_rows(labels, labels.outcomes))
    counts = Counter("after the horizon" if r.label is None else "used" if r.label else "no outcome" for r in rows)
    used = [row for row in rows if row.label]
    alone = Estimate(float("nan"), float("nan"), float("nan"))
    if used:
        when = np.array([row.taken.toordinal() for row in used], float)
        scores, truth = np.stack([-when, when], -1), np.array([OUTCOMES.index(row.label or "") for row in used])
        value = float(auroc(scores, truth))
        drawn = bootstrap(lambda w: auroc(scores, truth, w), [row.patient for row in used], _REPLICATES, generator)
        alone = Estimate(value, *interval(drawn))
    return Followed(labels.outcomes.horizon.days, {k: counts[k] for k in _KINDS}, alone)


def tenths(judged: Judged, method: str, generator: np.random.Generator) -> list[dict[str, Any]]:
    """Return, for each tenth of the held-out images by predicted risk, the mean risk and how often it came true.

    Of several repeats, an image's risk is the mean. A tenth's interval is over patients.

    References
    ----------
    Hosmer and Lemeshow, "Goodness of fit tests for the multiple logistic regression model", 1980 (deciles of risk).
    """
    risk = judged.outcomes[method].probabilities[..., 1].mean(0)
    happened = (judged.labels == 1).astype(float)
    out = []
    for tenth in np.array_split(np.argsort(risk, kind="stable"), _TENTHS):
        if not len(tenth):
            continue
        member = np.zeros(len(risk))
        member[tenth] = 1

        def share(weights: Any, member: Any = member) -> Any:
            w = member if weights is None else weights * member
            with np.errstate(invalid="ignore"):
                return np.asarray(w @ happened / w.sum(-1))

        low, high = interval(bootstrap(share, judged.patients, _REPLICATES, generator))
        out.append(
            {
                "images": len(tenth),
                "patients": len(np.unique(judged.patients[tenth])),
                "predicted": round(float(risk[tenth].mean()), 4),
                "observed": Estimate(float(share(None)), low, high).json(),
            }
        )
    return out
