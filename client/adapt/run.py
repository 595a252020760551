"""Adapting at a site: choose, judge, calibrate, say whether it may be used."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import torch

from client.adapt.choose import choose, deal, draw_shots, fewest
from client.adapt.classifier import Classifier, Start, as_it_is, from_scratch, start
from client.adapt.familiar import Familiar, fit_familiar, grey_share, trained_on_grey
from client.adapt.folder import AdaptedModel
from client.adapt.images import Labelled
from client.adapt.judge import GAIN, Estimate, Judged, Split, judge, k_fold_splits, one_split, summary
from client.adapt.methods import Adapted, Method, Rows, Scratch, Simple, Unadapted, simple_features
from client.adapt.outlook import Point, enough, learning_curve
from client.adapt.risk import Followed, tenths
from client.adapt.trained import Trained
from client.adapt.verdict import FEWEST, Refusal, no_gain, not_better_than_chance, not_familiar, one_shot, too_few
from client.data.episodes import network_input
from client.devices import local_devices
from common.errors import DataError
from common.figures import balanced_accuracy

__all__ = ["ADAPTED", "SCRATCH", "SIMPLE", "UNADAPTED", "Outcome", "Plan", "adapt", "methods_for"]

ADAPTED, UNADAPTED = "theta, adapted", "theta, as it is"
SCRATCH, SIMPLE = "the same network from scratch", "logistic regression on simple features"

#: Support patients of a class, where nothing else is asked for.
_MOST = 20
_FOLDS = 5
_REPEATS = 2


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes
    ----------
    shots : int or None
        Support patients of every class; None: up to 20.
    everything : bool
        Whether all patients support, however many there are.
    coverage : float
        Of the conformal sets, 0 to 1.
    followed : Followed or None
        Where labels are later outcomes.
    mix : tuple of float or None
        Each class's share of the patients whom the model will see; None: that of the support patients.
    """

    shots: int | None = None
    everything: bool = False
    coverage: float = 0.9
    followed: Followed | None = None
    mix: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes
    ----------
    refusals : tuple of Refusal
        Why not to use it; empty where it may be used.
    report : dict
        As JSON takes it.
    model : AdaptedModel or None
        None where there was nothing to adapt to.
    patients : tuple of str
        Keyed hashes of those who supported.
    """

    refusals: tuple[Refusal, ...]
    report: dict[str, Any]
    model: AdaptedModel | None
    patients: tuple[str, ...]


def methods_for(trained: Trained, images: Labelled) -> dict[str, Method]:
    """Return what is put side by side on a task."""
    device, classes = local_devices(torch.float32)[0], images.classes
    begin = start(trained, classes)
    scratch = from_scratch(trained, len(classes), trained.study.study.seed)
    methods: dict[str, Method] = {ADAPTED: Adapted(trained.learner, begin, trained.study, device)}
    if begin.knows:
        methods[UNADAPTED] = Unadapted(begin, device)
    methods[SCRATCH] = Scratch(scratch, trained.study, device)
    methods[SIMPLE] = Simple(simple_features(images.pixels))
    return methods


def adapt(
    trained: Trained,
    images: Labelled,
    plan: Plan,
    generator: np.random.Generator,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Adapt theta to a site's images, judge it on patients held out, and say whether it may be used."""
    grey, expects_grey = grey_share(images.pixels), trained_on_grey(trained)
    new = np.flatnonzero(images.unseen)
    counts = {
        name: len(np.unique(images.patients[new][images.labels[new] == place]))
        for place, name in enumerate(images.classes)
    }
    few = (*too_few(counts, FEWEST if plan.shots is None else max(FEWEST, plan.shots + 2)), *one_shot(plan.shots))
    about = _about(trained, images, plan)
    if refusals := (*few, *not_familiar(grey, expects_grey, None)):
        return Outcome(refusals, about | {"reasons": [r.text for r in refusals]}, None, ())
    methods = methods_for(trained, images)
    adapted = methods[ADAPTED]
    assert isinstance(adapted, Adapted)
    support, splits = _parts(images, plan, min(counts.values()), generator)
    alike = not plan.everything
    judged = judge(methods, images, splits, plan.coverage, generator, alike=alike, mix=plan.mix, progress=progress)
    progress("the model itself")
    choice = choose(adapted, images, support, plan.coverage, generator, mix=plan.mix, refits=100)
    if choice.calibration is None:
        raise DataError(
            "patients have so many classes in common that support and held-out cannot part: name fewer classes"
        )
    theta, familiar = _familiar(adapted.start, images, support, generator)
    unlike = _unlike(adapted.start, images, splits[0], generator)
    gains = {name: judged.gain(ADAPTED, name, generator) for name in methods if name != ADAPTED}
    baselines = {name: gains[name] for name in (SCRATCH, SIMPLE)}
    refusals = (
        *not_familiar(grey, expects_grey, unlike),
        *no_gain(baselines),
        *not_better_than_chance(judged.figures(ADAPTED, generator)["AUROC"]),
    )
    settings = {name: judged.outcomes[name].settings[0] for name in methods}
    points = learning_curve(methods, settings, images, generator, progress)
    if plan.followed is not None:
        about["followed"]["tenths"] = tenths(judged, ADAPTED, generator)
    report = about | {
        "reasons": [refusal.text for refusal in refusals],
        "judged": {
            "patients": len(np.unique(judged.patients)),
            "images": len(judged.labels),
            "repeats": len(splits),
            "folds": len(splits[0]),
            "classes weigh alike": alike,
        },
        "support": {
            "patients": len(np.unique(images.patients[support])),
            "images": len(support),
            "setting": vars(choice.setting),
            "calibration": _calibration(choice.calibration.json()),
        },
        "methods": summary(judged, generator),
        "best": _best(judged),
        "gains": {name: gain.json() for name, gain in gains.items()},
        "images": {"grey": round(grey, 3), "theta expects grey": expects_grey, "unlike": round(unlike, 3)},
        "learning curve": _curve(points),
        "enough": _enough(points, baselines, min(counts.values())),
    }
    if plan.mix is not None and judged.mixed is not None:
        mix = dict(zip(images.classes, plan.mix, strict=True))
        report["in the mix"] = {"mix": mix, "methods": summary(judged.mixed, generator)}
    facts = {name: about[name] for name in ("study digest", "theta digest", "learner", "date")}
    model = AdaptedModel(
        trained.study.model,
        images.classes,
        adapted.classifier(images, support, choice.setting),
        theta,
        choice.calibration if choice.mixed is None else choice.mixed,
        familiar,
        expects_grey,
        tuple(refusal.text for refusal in refusals),
        facts | {"setting": vars(choice.setting)},
    )
    used = tuple(images.hashes[who] for who in np.unique(images.patients[support]))
    return Outcome(refusals, report, model, used)


def _about(trained: Trained, images: Labelled, plan: Plan) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "study": trained.study.study.title,
        "study digest": trained.study.digest,
        "theta digest": trained.theta_digest,
        "learner": trained.learner.name,
        "classes": {
            name: {"patients": patients, "images": int((images.labels == place).sum())}
            for place, (name, patients) in enumerate(images.patients_per_class().items())
        },
        "asked": {"shots": plan.shots, "all": plan.everything, "coverage": plan.coverage},
        **({} if plan.followed is None else {"followed": plan.followed.json() | {"tenths": []}}),
    }


def _parts(images: Labelled, plan: Plan, rarest: int, generator: np.random.Generator) -> tuple[Rows, list[list[Split]]]:
    """Return the support rows of the model itself, and the splits that it is judged on."""
    if plan.everything:
        return np.arange(len(images.labels)), k_fold_splits(images, _FOLDS, _REPEATS, generator)
    shots = plan.shots or _MOST
    support = draw_shots(images, shots, generator)
    if plan.shots is not None or rarest >= 2 * shots:
        return support, one_split(images, support)
    splits = k_fold_splits(images, _FOLDS, _REPEATS, generator)
    among = [[_some(images, split, shots, generator) for split in folds] for folds in splits]
    return support, among


def _some(images: Labelled, split: Split, shots: int, generator: np.random.Generator) -> Split:
    among = np.zeros(len(images.labels), np.bool_)
    among[split.support] = True
    return Split(draw_shots(images, shots, generator, among=among), split.held_out)


def _familiar(
    begin: Start, images: Labelled, support: Rows, generator: np.random.Generator
) -> tuple[Classifier, Familiar]:
    """Return theta as it is, and where some rows lie in its features."""
    x = network_input(images.pixels[support])
    theta = as_it_is(begin, x)
    fold = deal(images, support, min(_FOLDS, max(2, fewest(images, support))), generator)
    return theta, fit_familiar(theta.features(x), images.labels[support], images.patients[support], fold)


def _unlike(begin: Start, images: Labelled, splits: list[Split], generator: np.random.Generator) -> float:
    """Return the share of held-out images that are unlike their split's support images."""
    found = []
    for split in splits:
        theta, familiar = _familiar(begin, images, split.support, generator)
        found.append(familiar.unlike(theta.features(network_input(images.pixels[split.held_out]))))
    return float(np.concatenate(found).mean())


def _calibration(calibration: dict[str, Any]) -> dict[str, Any]:
    return {name: calibration[name] for name in ("method", "log_loss", "conformal", "patients")}


def _best(judged: Judged) -> str:
    return max(judged.outcomes, key=lambda name: float(judged.value(name, balanced_accuracy)))


def _curve(points: list[Point]) -> list[dict[str, Any]]:
    out = []
    for shots in sorted({point.shots for point in points}):
        here = [point.scores for point in points if point.shots == shots]
        out.append({"shots": shots, GAIN: {n: round(float(np.mean([s[n] for s in here])), 4) for n in here[0]}})
    return out


def _enough(points: list[Point], gains: dict[str, Estimate], patients: int) -> dict[str, int | None]:
    return {name: enough(points, ADAPTED, name, gain, patients) for name, gain in gains.items()}
