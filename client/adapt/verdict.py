"""Whether an adapted model may be used: the reasons against it, each with an exit code of its own."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

from client.adapt.judge import Estimate

__all__ = ["FEWEST", "Exit", "Refusal", "no_gain", "not_better_than_chance", "not_familiar", "one_shot", "too_few"]

#: Patients that a class needs: fewer cannot be parted into folds for adapting and judging.
FEWEST = 5
#: Share of held-out images that may be unlike the support ones before something is wrong with all of them.
_UNLIKE = 0.2


class Exit(IntEnum):
    """Exit codes of ``wardround-site adapt``; 1 and 2 are errors, as everywhere."""

    USABLE = 0
    NO_GAIN = 10
    TOO_FEW = 11
    UNFAMILIAR = 12
    CHANCE = 13
    NO_IMAGES = 14


@dataclass(frozen=True)
class Refusal:
    """One reason not to use a model."""

    code: Exit
    text: str


def too_few(patients: Mapping[str, int], needed: int = FEWEST) -> list[Refusal]:
    """Return a refusal where a class has too few patients."""
    short = {name: count for name, count in patients.items() if count < needed}
    if not short:
        return []
    named = ", ".join(f"{name} ({count})" for name, count in list(short.items())[:5])
    return [
        Refusal(
            Exit.TOO_FEW,
            f"too few patients to adapt and to judge: {named}; label at least {needed} of each class",
        )
    ]


def one_shot(shots: int | None) -> list[Refusal]:
    """Return a refusal where one patient of a class shall support."""
    if shots != 1:
        return []
    text = "one support patient of a class can be neither cross-validated nor calibrated: use two at least"
    return [Refusal(Exit.TOO_FEW, text)]


def not_familiar(grey: float, expects_grey: bool | None, unlike: float | None) -> list[Refusal]:
    """Return refusals where images are not what theta was trained on.

    Parameters
    ----------
    grey : float
        Share of the images that are grey.
    expects_grey : bool or None
        Whether theta was trained on grey pictures; None where it cannot be told.
    unlike : float or None
        Share of held-out images unlike the support ones; None where it was not measured.
    """
    out = []
    if expects_grey is False and grey > 0.5:
        out.append(f"{grey:.0%} of the images are grey, and this theta was trained on colour: another kind of image")
    if expects_grey is True and grey < 0.5:
        out.append(f"{1 - grey:.0%} of the images are in colour, and this theta was trained on grey ones")
    if unlike is not None and unlike > _UNLIKE:
        out.append(f"{unlike:.0%} of the held-out images are unlike the support images in theta's features")
    return [Refusal(Exit.UNFAMILIAR, text) for text in out]


def no_gain(gains: Mapping[str, Estimate]) -> list[Refusal]:
    """Return a refusal for every baseline whose gain's interval includes zero, or that is better."""
    return [
        Refusal(
            Exit.NO_GAIN,
            f"no gain in balanced accuracy over {name} is shown: {gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]",
        )
        for name, gain in gains.items()
        if not gain.low > 0
    ]


def not_better_than_chance(auroc: Estimate) -> list[Refusal]:
    """Return a refusal where the AUROC's interval includes one half."""
    if auroc.low > 0.5:
        return []
    return [Refusal(Exit.CHANCE, f"AUROC {auroc.value:.2f} [{auroc.low:.2f}, {auroc.high:.2f}] may be chance")]
