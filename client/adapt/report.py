"""The report of an adaptation, for people: one page of Markdown."""

from collections.abc import Mapping
from typing import Any

from client.adapt.judge import GAIN
from common.figures import BINS

__all__ = ["markdown", "verdict"]

#: Figures of probabilities, not of the one class that is most probable: a rare class seldom is.
_PROPER = ("Brier score", "log loss", "expected calibration error")


def verdict(report: Mapping[str, Any]) -> str:
    """Return in one line whether the model may be used."""
    if not report["reasons"]:
        return "MAY BE USED as far as these held-out patients tell."
    return "DO NOT USE: " + "; ".join(report["reasons"]) + "."


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as text."""
    lines = [f"# {report['study']}, adapted here", "", f"**{verdict(report)}**", ""]
    lines += [f"{report['date']}; learner {report['learner']}; study `{report['study digest'][:16]}`, ", ""]
    lines[-2] += f"theta `{report['theta digest'][:16]}`."
    lines += ["| class | patients | images |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {c['patients']} | {c['images']} |" for name, c in report["classes"].items()]
    risk = _risk(report["followed"]) if "followed" in report else []
    if "methods" not in report:
        return "\n".join([*lines, *risk, "", "Nothing was adapted, so there are no figures.", ""])
    judged, support = report["judged"], report["support"]
    if judged["folds"] > 1:
        how = f"{judged['repeats']} times {judged['folds']}-fold cross-validation by patient"
    else:
        how = "patients held out"
    lines += [
        "",
        f"## On {judged['patients']} patients that the model had not seen",
        "",
        f"{judged['images']} images; {how}. In brackets: 95 % bootstrap intervals over patients. "
        + ("Every class weighs alike. " if judged["classes weigh alike"] else "Every image weighs alike. ")
        + "Steps, rates and calibration were chosen on support patients alone.",
        "",
    ]
    figures = list(next(iter(report["methods"].values()))["figures"])
    lines += ["| | " + " | ".join(figures) + " |", "| --- |" + " ---: |" * len(figures)]
    for name, found in report["methods"].items():
        cells = " | ".join(_estimate(found["figures"][figure]) for figure in figures)
        lines.append(f"| {'**' + name + '**' if name == report['best'] else name} | {cells} |")
    lines += [
        "",
        f"Best by {GAIN}: {report['best']}.",
        "",
        f"| gain of theta, adapted, in {GAIN} over | |",
        "| --- | ---: |",
    ]
    lines += [f"| {name} | {_estimate(gain, '+')} |" for name, gain in report["gains"].items()]
    asked = report["asked"]["coverage"]
    adapted = next(iter(report["methods"].values()))
    lines += [
        "",
        f"Conformal sets: {asked:.0%} coverage asked, {_estimate(adapted['coverage'])} found, "
        f"{adapted['mean set size']:.2f} classes a set on average. On so few images, perfect probabilities would show "
        f"a calibration error of {adapted['calibration error of perfect probabilities']:.3f} too.",
        "",
        f"The model itself: {support['images']} images of {support['patients']} patients, "
        f"{support['setting']['steps']} steps {'of Adam ' if support['setting']['adam'] else ''}at rate "
        f"{support['setting']['rate']:.3g}; "
        f"calibration by {support['calibration']['method']}.",
        "",
        "## More labels",
        "",
        f"{GAIN} by support patients of a class, mean of a few draws, at settings that were chosen with all patients:",
        "",
    ]
    names = list(report["methods"])
    lines += ["| patients a class | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for row in report["learning curve"]:
        lines.append(f"| {row['shots']} | " + " | ".join(f"{row[GAIN][name]:.3f}" for name in names) + " |")
    rarest = min(c["patients"] for c in report["classes"].values())
    for name, needed in report["enough"].items():
        if needed is None:
            lines.append(f"\nA gain over {name} is not in sight with {20 * rarest} patients of a class.")
        elif needed > rarest:
            lines.append(
                f"\nProbably {needed - rarest} more labelled patients of every class would show a gain over {name}, if "
                "the curve goes on as it does."
            )
    lines += risk
    if "in the mix" in report:
        lines += _mix(report["in the mix"])
    lines += [
        "",
        "## What this does not say",
        "",
        "It says nothing about patients unlike these, about another scanner, or about classes that are not in the "
        "list. Cross-validated intervals do not know that folds share patients to learn from. The expected "
        f"calibration error ({BINS} bins of equal width) of so few patients is above zero even for perfect "
        "probabilities. Sensitivity and specificity are read off the held-out patients' own ROC curves. It is no "
        "clinical evaluation.",
        "",
    ]
    return "\n".join(lines)


def _mix(found: Mapping[str, Any]) -> list[str]:
    shares = ", ".join(f"{name} {share:.3g}" for name, share in found["mix"].items())
    lines = [
        "",
        "## Probabilities where classes are not alike",
        "",
        f"Predictions of this model are for patients of this mix: {shares}. The same held-out patients, each class "
        "with its share:",
        "",
        "| | " + " | ".join((*_PROPER, "of perfect probabilities", "coverage", "set size")) + " |",
        "| --- |" + " ---: |" * (len(_PROPER) + 3),
    ]
    for name, method in found["methods"].items():
        cells = [_estimate(method["figures"][figure]) for figure in _PROPER]
        cells += [f"{method['calibration error of perfect probabilities']:.3f}", _estimate(method["coverage"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {method['mean set size']:.2f} |")
    return lines


def _risk(followed: Mapping[str, Any]) -> list[str]:
    rows, dates = followed["rows"], followed["AUROC of dates alone"]
    lines = [
        "",
        "## Risk",
        "",
        f"An image counts if it was taken at least {followed['horizon in days']} days before the outcome showed, or "
        f"before the last day on which it was known not to have. {rows['used']} rows of the labels file do; "
        f"{rows['after the horizon']} came later and {rows['no outcome']} are of patients without an outcome: these "
        "count nowhere.",
        "",
        f"The day of an image alone tells the outcome with an AUROC of {_estimate(dates)}. "
        + (
            "One half is in the interval: days give nothing away that could be shown."
            if dates["low"] is None or dates["low"] <= 0.5 <= dates["high"]
            else "**That is not chance. Cases and controls were not seen in the same years, or not followed as long; a "
            "network may see the years and not the disease.**"
        ),
    ]
    if followed["tenths"]:
        head = "| tenth of the images, by risk | patients | images | predicted | observed |"
        lines += ["", head, "| ---: | ---: | ---: | ---: | ---: |"]
    for place, tenth in enumerate(followed["tenths"], 1):
        counts = f"| {place} | {tenth['patients']} | {tenth['images']} "
        lines.append(f"{counts}| {tenth['predicted']:.3f} | {_estimate(tenth['observed'])} |")
    return lines


def _estimate(e: Mapping[str, float | None], sign: str = "") -> str:
    if e["value"] is None:
        return "-"
    if e["low"] is None or e["high"] is None:
        return f"{e['value']:{sign}.3f}"
    return f"{e['value']:{sign}.3f} [{e['low']:{sign}.3f}, {e['high']:{sign}.3f}]"
