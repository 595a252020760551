"""Adapting a trained theta at a virtual site, many times: K patients of a class, all methods, patients held out.

``python -m simulations.experiments.adapt RUN --site 1 --shots 5 --draws 50 --out draws.jsonl`` appends a line a draw
and prints the table of all lines; draws that are in the file are not done again, so it can be stopped and several can
run side by side (``--only 0/2`` and ``--only 1/2`` share the draws).

An interval is that of the mean over draws of support patients. Draws share patients, so it does not say how the figures
would be at another site.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.stats import t

from client.adapt.choose import draw_shots
from client.adapt.images import Labelled, from_site
from client.adapt.judge import Judged, judge, one_split
from client.adapt.run import ADAPTED, SCRATCH, SIMPLE, methods_for
from client.adapt.trained import Trained, read_trained
from client.adapt.verdict import no_gain, not_better_than_chance
from client.data.image import Recipe
from client.session import virtual_site
from common.figures import BINS, FIGURES, calibration_gaps, expected_calibration_error
from common.study import names

__all__ = ["half_width", "main", "one_draw", "table"]

_COVERAGE = 0.9
_ERROR, _PERFECT = "expected calibration error", "the same of perfect probabilities"


def one_draw(
    trained: Trained, images: Labelled, shots: int, number: int, *, shuffled: bool = False, alone: bool = False
) -> dict[str, Any]:
    """Return every method's figures on all patients that one draw of support patients leaves, and the verdict.

    ``shuffled`` deals the patients' labels anew first: there is nothing to learn, and the verdict must be no. ``alone``
    leaves the baselines out, and so the verdict.
    """
    generator = np.random.default_rng([number, shots])
    if shuffled:
        images = _shuffled(images, generator)
    splits = one_split(images, draw_shots(images, shots, generator))
    methods = methods_for(trained, images)
    if alone:
        methods = {ADAPTED: methods[ADAPTED]}
    mix = np.array(list(images.patients_per_class().values())) / len(np.unique(images.patients))
    judged = judge(methods, images, splits, _COVERAGE, generator, alike=True, mix=mix.tolist())
    assert judged.mixed is not None
    found = {}
    for name, outcome in judged.outcomes.items():
        figures = {figure: float(judged.value(name, f)) for figure, f in FIGURES.items()}
        covered, size = _covering(judged, name)
        own_covered, own_size = _covering(judged.mixed, name)
        found[name] = {
            **figures,
            _PERFECT: judged.error_of_perfect(name, generator),
            "coverage": covered,
            "set size": size,
            "error in the site's mix": float(judged.mixed.value(name, expected_calibration_error)),
            "the same of perfect ones": judged.mixed.error_of_perfect(name, generator),
            "coverage there": own_covered,
            "set size there": own_size,
            "gaps": calibration_gaps(outcome.probabilities[0], judged.labels, judged.weights).tolist(),
            "tops": _tops(outcome.probabilities[0], judged.weights).tolist(),
            "setting": vars(outcome.settings[0]),
        }
    if alone:
        return {"draw": number, "shots": shots, "methods": found}
    gains = {name: judged.gain(ADAPTED, name, generator) for name in (SCRATCH, SIMPLE)}
    reasons = [*no_gain(gains), *not_better_than_chance(judged.figures(ADAPTED, generator)["AUROC"])]
    return {"draw": number, "shots": shots, "methods": found, "usable": not reasons}


def _covering(judged: Judged, name: str) -> tuple[float, float]:
    """Return how often a method's conformal sets held the truth, and how many classes they held on average."""
    sets = judged.outcomes[name].sets[0]
    hit = sets[np.arange(len(judged.labels)), judged.labels]
    return float(np.average(hit, weights=judged.weights)), float(np.average(sets.sum(-1), weights=judged.weights))


def _tops(probabilities: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``[2, bins]``: each bin's share of the images (see `calibration_gaps`), and that times its mean top."""
    top = probabilities.max(-1)
    where = np.clip(np.ceil(top * BINS - 1e-9).astype(int) - 1, 0, BINS - 1)
    sums = np.stack([np.bincount(where, w, BINS) for w in (weights, weights * top)])
    return np.asarray(sums / weights.sum())


def _shuffled(images: Labelled, generator: np.random.Generator) -> Labelled:
    people, first = np.unique(images.patients, return_index=True)
    label_of = np.zeros(people.max() + 1, np.int64)
    label_of[people] = generator.permutation(images.labels[first])
    return replace(images, labels=label_of[images.patients])


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return the mean of every figure over the draws of each K, its 95 % interval, and the gains of theta, adapted."""
    out = []
    for shots in sorted({line["shots"] for line in lines}):
        own = [line["methods"] for line in lines if line["shots"] == shots]
        figures = [name for name in next(iter(own[0].values())) if name not in {"setting", "gaps", "tops"}]
        usable = sum(line.get("usable", False) for line in lines if line["shots"] == shots)
        out += [
            f"K = {shots}, {len(own)} draws, {usable} of them called usable",
            "",
            "| | " + " | ".join(figures) + " |",
        ]
        out.append("| --- |" + " ---: |" * len(figures))
        for name in own[0]:
            out.append(f"| {name} | " + " | ".join(_mean([m[name][f] for m in own]) for f in figures) + " |")
        for name in own[0]:
            if name != ADAPTED:
                gains = (_mean([m[ADAPTED][f] - m[name][f] for m in own], "+") for f in figures)
                out.append(f"| gain over {name} | " + " | ".join(gains) + " |")
        excess = _mean([m[ADAPTED][_ERROR] - m[ADAPTED][_PERFECT] for m in own], "+")
        out += ["", f"Calibration error of {ADAPTED} beyond that of perfect probabilities: {excess}"]
        pooled = float(np.abs(np.mean([m[ADAPTED]["gaps"] for m in own], 0)).sum())
        out += [f"Calibration error of {ADAPTED} over all draws together: {pooled:.3f}", ""]
    return "\n".join(out)


def _mean(values: Sequence[float], sign: str = "") -> str:
    return f"{np.mean(values):{sign}.3f} ± {half_width(values):.3f}"


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean (Student); not a number for fewer than two values."""
    count = len(values)
    return float(t.ppf(0.975, count - 1) * np.std(values, ddof=1)) / sqrt(count) if count > 1 else float("nan")


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="File that lines are appended to.")],
    site: Annotated[int, typer.Option(help="Number of the virtual site.")] = 0,
    shots: Annotated[int, typer.Option(help="K.")] = 5,
    draws: Annotated[int, typer.Option(help="How many draws there shall be.")] = 50,
    task: Annotated[str, typer.Option(help="Classes; without it, the study's training classes.")] = "",
    shuffled: Annotated[bool, typer.Option("--shuffled", help="Deal the patients' labels anew.")] = False,
    alone: Annotated[bool, typer.Option("--alone", help="Without the baselines: much faster.")] = False,
    only: Annotated[str, typer.Option(help="I/N: the draws whose number leaves I when divided by N.")] = "0/1",
    seconds: Annotated[float, typer.Option(help="Begin no draw after so long.")] = 1e9,
) -> None:
    """Measure, and print the table of all that was measured so far."""
    trained, began = read_trained(run), time.monotonic()
    classes = names(task) or trained.study.episodes.class_names
    folder = virtual_site(trained.study, site)
    images = from_site(folder, Recipe.of(trained.study.model), classes, took_part=False)
    part, parts = map(int, only.split("/"))
    for number in range(part, draws, parts):
        if (number, shots) in {(line["draw"], line["shots"]) for line in _read(out)}:
            continue
        if time.monotonic() - began > seconds:
            break
        line = json.dumps(one_draw(trained, images, shots, number, shuffled=shuffled, alone=alone))
        with out.open("a") as file:
            file.write(line + "\n")
    print(table(_read(out)))


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    typer.run(main)
