"""What is attacked: a study, with networks and learners to compare, and with and without a mechanism."""

from collections.abc import Mapping

from common.errors import StudyError
from common.study import Study

__all__ = ["DEFENCES", "SETTINGS", "TRAINED", "attacked", "built_in"]

Changes = Mapping[str, bool | int | float | str]

_LINEAR: Changes = {
    "model.name": "factory:simulations.redteam.networks:linear",
    "model.arguments": '{"width": 128}',
    # What a network is sure of has no gradient, and is not seen. Near the start, and with steps that do not leave it,
    # every image has one.
    "outer.rate": 0.0005,
    "algorithm.inner-rate": 0.005,
}

_CONV4: Changes = {"model.name": "conv4", "model.arguments": "{}"}

# A tiny episode, and a network through which its images can be found: what gradient matching is known to be able to do.
_SMOOTH: Changes = {
    "model.name": "factory:simulations.redteam.networks:smooth",
    "model.arguments": "{}",
    "outer.rate": 0.0005,
    "algorithm.inner-rate": 0.01,
    "episodes.shots": 1,
    "episodes.queries": 1,
}

#: Networks and learners, by the name that the table has.
SETTINGS: Mapping[str, Changes] = {
    "linear, first order": {**_LINEAR, "algorithm.name": "fomaml"},
    "linear, second order": {**_LINEAR, "algorithm.name": "maml"},
    "conv4, first order": {**_CONV4, "algorithm.name": "fomaml"},
    "conv4, second order": {**_CONV4, "algorithm.name": "maml"},
    "sigmoid, first order": {**_SMOOTH, "algorithm.name": "fomaml"},
    "sigmoid, second order": {**_SMOOTH, "algorithm.name": "maml"},
}

#: Those whose theta is attacked. They train with the study's own rates: the others stay near their start, where theta
#: has hardly learned a thing. And theirs are many runs more, which the second order makes longer.
TRAINED = ("conv4, first order",)

#: Mechanisms, ``none`` first.
DEFENCES = ("none", "episode-clip", "patient-clip")

_PHANTOMS: Changes = {
    "study.id": "redteam",
    "study.title": "Two lesion types on three phantom hospitals",
    "study.rounds": 30,
    "episodes.classes": "disc,ring",
    "episodes.shots": 3,
    "episodes.queries": 3,
    "episodes.per-round": 2,
    "data.sites": 3,
    "data.patients-per-class": 60,
}


def built_in() -> Study:
    """Return the study that is attacked where none is named."""
    return Study().override({**_COMMON, "episodes.ways": 2, **_PHANTOMS})


# What every attacked study has: both mechanisms need fixed labels or group norm, and images that are turned in
# training would have to be compared in every position. The loss and accuracy of the mechanism none are not used.
_COMMON: Changes = {
    "sites.held-out": "",
    "model.norm": "group",
    "algorithm.inner-rate": 0.1,
    "episodes.labels": "fixed",
    "episodes.held-out": "",
    "episodes.augment": "none",
    "outer.patience": 0,
    "privacy.figures": "withheld",
}


def attacked(study: Study, setting: str, defence: str, clip: float, noise: float, sampling: float) -> Study:
    """Return a study as it is attacked: with a setting's network and learner, and a mechanism.

    Without a mechanism a round is one episode of the study. With ``episode-clip`` it has ``episodes.per-round`` bins,
    and with ``patient-clip`` sums are divided by as many support and query patients as those episodes have together.

    Raises
    ------
    StudyError
        The study cannot be run that way.
    """
    if setting not in SETTINGS or defence not in DEFENCES:
        known = "; ".join((*SETTINGS, *DEFENCES))
        raise StudyError(f"no setting {setting!r} with the defence {defence!r}; there are: {known}")
    changes: dict[str, bool | int | float | str] = {**_COMMON, **SETTINGS[setting]}
    changes["episodes.ways"] = len(study.episodes.class_names)
    bins = study.episodes.per_round
    if defence != "episode-clip":
        changes["episodes.per-round"] = 1
    if defence == "patient-clip":
        for name, own in (("episodes.shots", study.episodes.shots), ("episodes.queries", study.episodes.queries)):
            changes[name] = bins * int(changes.get(name, own))
    if defence != "none":
        changes |= {
            "privacy.mechanism": defence,
            "privacy.clip": clip,
            "privacy.noise": noise,
            "privacy.sampling": sampling,
            "privacy.delta": 1e-5,
        }
    return study.override(changes)
