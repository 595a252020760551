"""Two tests of "was this patient in the training data", from how sure models with and without them are of them.

Both know a patient by one number: how sure a model is of them, as a logit, log(p / (1 - p)). Reference models say what
that number usually is; the model that is attacked, on which side of it this one lies.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["lira", "rmia"]

Numbers = NDArray[np.float64]

# RMIA's constants: how much more likely than a stranger a member has to be, and how much of the way from what models
# without a patient say to what is certain, models with them are taken to go.
_GAMMA, _A = 1.0, 0.3


def lira(target: Numbers, references: Numbers, inside: NDArray[np.bool_]) -> Numbers:
    """Return ``[P]``: the logarithm of how much more likely the target's logit is with the patient than without.

    Each patient has a normal distribution for models with them and one for models without, with means of their own. The
    deviation is the same for all patients: from few models, a patient's own would be guesswork. It is that of one more
    logit, whose mean was estimated from k: by a factor of 1 + 1 / k in the variance larger.

    Parameters
    ----------
    target : ndarray
        Logits ``[P]`` of the model that is attacked.
    references, inside : ndarray
        Logits ``[R, P]`` of the reference models, and which patients each of them had. Patients whom all had, or none,
        get no score (not a number).

    References
    ----------
    Carlini, Chien, Nasr, Song, Terzis and Tramer, "Membership Inference Attacks From First Principles", 2022, arXiv
    2112.03570, algorithm 1 (online), with the global variance that they advise for few models.
    """
    with_, without = (_log_density(target, references, mask) for mask in (inside, ~inside))
    return with_ - without


def _log_density(at: Numbers, references: Numbers, chosen: NDArray[np.bool_]) -> Numbers:
    count = chosen.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(chosen, references, 0).sum(0) / count  # not a number where there is none
        squares = np.where(chosen, (references - mean) ** 2, 0).sum()
        variance = squares / (count - 1).clip(min=0).sum() * (1 + 1 / count)
        density: Numbers = -((at - mean) ** 2) / (2 * variance) - np.log(variance) / 2
    return density


def rmia(
    target: Numbers, references: Numbers, inside: NDArray[np.bool_], strangers: Numbers, usual: Numbers
) -> Numbers:
    """Return ``[P]``: the share of strangers than whom the patient is more likely to have been there.

    Only reference models without the patient are asked (offline): Pr(x) is ((1 + a) mean + 1 - a) / 2 of what they say.

    Parameters
    ----------
    target, references, inside : ndarray
        As in `lira`.
    strangers, usual : ndarray
        Logits ``[Z]`` and ``[R, Z]``, by the target and by the reference models, of patients whom nobody had.

    References
    ----------
    Zarifzadeh, Liu and Shokri, "Low-Cost High-Power Membership Inference Attacks", 2024, arXiv 2312.03262: the score is
    the share of population points z with (Pr(x | theta) / Pr(x)) / (Pr(z | theta) / Pr(z)) of at least gamma.
    """
    out = ~inside
    with np.errstate(invalid="ignore"):
        mean = np.where(out, _sigmoid(references), 0).sum(0) / out.sum(0)
    ratios = _sigmoid(target) / _evidence(mean)
    others = np.sort(_sigmoid(strangers) / _evidence(_sigmoid(usual).mean(0)))
    share = np.searchsorted(others, ratios / _GAMMA, "right") / len(others)
    return np.where(np.isnan(ratios), np.nan, share)


def _evidence(mean: Numbers) -> Numbers:
    return ((1 + _A) * mean + 1 - _A) / 2


def _sigmoid(logits: Numbers) -> Numbers:
    return np.exp(-np.logaddexp(0, -logits))
