"""What the report and the model card say in sentences. Plain text: names in it come from outside."""

import time
from collections.abc import Iterator, Sequence
from textwrap import shorten

from common.privacy.statement import guarantee
from server.report.facts import Estimate, Evaluation, Facts
from server.units import size

__all__ = [
    "FIGURES",
    "LIMITS",
    "WHY",
    "cell",
    "classes",
    "day",
    "in_words",
    "left_out",
    "listed",
    "meanings",
    "notable",
    "privacy",
    "reproduce",
    "rows",
    "verdict",
]

#: Why a site's reply does not count.
WHY = {
    "no-reply": "no reply before the deadline",
    "unsent": "the message could not be sent: the site had left, or it was too large",
    "error": "the site reported an error; what it was stands in the site's own folder",
    "unreadable": "the reply could not be read",
    "records": "the reply held other records than the contract names",
    "scalars": "the reply held other numbers than the contract names",
    "scalar-type": "a number of the reply had the wrong type",
    "scalar-range": "a number of the reply was out of range",
    "other-instruction": "the reply answered another round, attempt or study",
    "arrays": "the reply held other arrays than the contract names",
    "shape": "the meta-gradient had the wrong shape or type",
    "not-finite": "the meta-gradient held NaN or infinity",
    "zero": "the meta-gradient was zero everywhere",
    "norm": "the meta-gradient was longer than the study allows",
    "contract": "the reply broke the contract",
    "late": "the reply came after its round had ended",
    "duplicate": "the same reply came twice",
}

#: Columns of evaluation tables: heading, factor, digits, sign.
FIGURES = {
    "before": ("before", 100, 1, ""),
    "after": ("adapted", 100, 1, ""),
    "scratch": ("from scratch", 100, 1, ""),
    "gain": ("gain", 100, 1, "+"),
    "balanced": ("balanced accuracy", 100, 1, ""),
    "auroc": ("AUROC", 1, 2, ""),
    "ece": ("ECE", 1, 2, ""),
}

_CLASSES = {"known": "Known classes", "new": "New classes"}
_MEANING = {
    "before": "Before: theta without adaptation.",
    "gain": "Gain: adapted less from scratch, in points, paired by episode.",
    "balanced": "Balanced accuracy: mean over classes.",
    "auroc": "AUROC: how well classes are ranked; 0.5 is chance, 1 is perfect.",
    "ece": "ECE: how far stated confidence is from being right; 0 is best.",
}

LIMITS = (
    "The intervals are over meta-test episodes: they say how much the drawing of scans matters, at these sites. They "
    "say nothing about other hospitals, scanners or years.",
    "One run, one seed. Another seed gives other figures, and how far they spread is not known from this run.",
    "The figures are as the sites sent them. The coordinator cannot check them, and a site could report what it likes.",
    "Labels are taken as the sites have them; nobody has read the images again for this run.",
    "How many patients took part is not known here: no counts leave a site.",
    "A gain over training from scratch is no proof of clinical benefit. Nothing here was tested on the course of care.",
)

#: Rows of a table, beyond which only sites that never trained and those at both ends are shown.
_ROWS, _ENDS = 40, 12
_NOTABLE = {"resumed", "failed-attempt", "damaged", "left", "stopped-early", "failed", "clock"}


def verdict(facts: Facts) -> Iterator[str]:
    """Return the sentences that say how the run ended and what its theta is worth."""
    yield _how_it_ended(facts)
    yield _who_trained(facts)
    final = facts.final
    if facts.study.privacy.figures == "withheld":
        yield (
            "The study withholds figures: no site sent a loss or an accuracy, and none was asked to evaluate. Nothing "
            "can be said here about how good theta is; each site can find out at home."
        )
    elif final is None:
        yield "Nothing was evaluated, so nothing can be said about how good theta is."
    else:
        if final.side == "validation":
            yield "There is no evaluation on test patients; what follows is on validation patients, on the way."
        yield from _worth(facts, final)
    lost, asked = facts.history.lost, facts.history.asked
    if asked:
        share = f"{lost:,} did not count ({100 * lost / asked:.1f} %)" if lost else "all counted"
        yield f"Of {asked:,} replies that its rounds asked for, {share}."
    yield ("Brackets hold 95 % intervals. " * bool(final and final.figures) + _promise(facts))


def _promise(facts: Facts) -> str:
    if facts.study.privacy.guaranteed:
        return f"The study's guarantee: {guarantee(facts.study)}."
    return "The run gives no formal guarantee of privacy."


def _how_it_ended(facts: Facts) -> str:
    planned, done = facts.study.study.rounds, _done(facts)
    after = f"after {done:,} of {planned:,} rounds"
    if facts.state == "failed":
        reason = shorten(facts.failure, 600, placeholder=" …").rstrip(".")
        return f"The run failed {after} and has no result: {reason or 'no reason was recorded'}."
    if facts.state == "stopped":
        return f"The run was stopped {after} and has no result; 'wardround-study resume {facts.name}' continues it."
    if facts.state != "finished":
        return (
            f"The run had not ended when this was written: it stood {after}. Where it was interrupted, "
            f"'wardround-study resume {facts.name}' continues it."
        )
    if any(event.get("event") == "stopped-early" for event in facts.events):
        ended = (
            f"The run ended early, {after}, as {facts.study.outer.patience} evaluations in a row found no better theta"
        )
    else:
        ended = (
            f"The run finished all {done:,} rounds"
            if done > 1
            else f"The run finished: {('no rounds', 'one round')[done]}"
        )
    if facts.result.get("theta_from") == "best":
        return f"{ended}; the theta that it publishes is the best one, of round {facts.result.get('best_round')}."
    if facts.result.get("theta_from") == "average":
        return f"{ended}; the theta that it publishes is a moving average."
    return f"{ended}."


def _who_trained(facts: Facts) -> str:
    trained, apart = facts.training, facts.held_out
    did = "trained" if _done(facts) else "joined to train"
    first = f"{_counted(len(trained))} {did}" + (f" ({listed(trained)})" if 0 < len(trained) <= 6 else "")
    if apart:
        return f"{first}; {listed(apart)} never did" + (
            ", to show what theta is worth elsewhere." if facts.final else "."
        )
    return f"{first}; none was kept apart, so all figures are about sites that trained, though on other patients."


def _worth(facts: Facts, final: Evaluation) -> Iterator[str]:
    sites, episodes = facts.judges, facts.study.episodes
    pools = [(pool, after) for pool in final.pools if (after := final.mean(sites, pool, "after"))]
    if not pools:
        return
    if len(sites) == 1:
        where = f"At {sites[0]}, which " + ("never trained" if sites[0] in facts.held_out else "trained")
    else:
        where = f"On average over the {len(sites)} sites that "
        where += "never trained" if set(sites) <= set(facts.held_out) else "trained"
    ways = len(episodes.class_names) if episodes.labels == "fixed" else episodes.ways
    kinds = {"known": "", "new": ""} if len(pools) == 1 else {"known": " for known classes", "new": " for new ones"}
    right = [f"{_percent(after)}{kinds[pool]}" for pool, after in pools]
    yield (
        f"{where}, theta adapted to {episodes.shots} labelled scans of each of {ways} "
        f"{'diagnoses' if episodes.labels == 'fixed' else 'classes'} is right in {' and '.join(right)}."
    )
    gains = [(pool, gain) for pool, _ in pools if (gain := final.mean(sites, pool, "gain"))]
    if gains:
        points = [f"{100 * gain.mean:+.1f} points ({_span(gain, '+')}){kinds[pool]}" for pool, gain in gains]
        told = [_tells(gain) for _, gain in gains]
        if len({*told}) == 1:
            than = f"{' and '.join(points)}, {told[0]}"
        else:
            than = "; ".join(f"{point}, {tells}" for point, tells in zip(points, told, strict=True))
        yield f"Against training from scratch on the same scans this is {than}."
    here = {s: f["known", "after"] for s, f in final.figures.items() if ("known", "after") in f}
    if len(here) > 1:
        worst = min(here, key=lambda site: here[site].mean)
        yield f"Of all sites, accuracy is lowest at {worst}: {_percent(here[worst])}."


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.mean:.1f} % ({_span(estimate)})"


def _span(estimate: Estimate, sign: str = "") -> str:
    return f"{100 * estimate.low:{sign}.1f} to {100 * estimate.high:{sign}.1f}"


def _tells(gain: Estimate) -> str:
    if gain.low > 0:
        return "so theta helps"
    if gain.high < 0:
        return "so theta is worse than none"
    return "which cannot be told from no gain"


def _done(facts: Facts) -> int:
    return int(facts.history.rounds[-1]) if len(facts.history.rounds) else 0


def _counted(number: int) -> str:
    return "One site" if number == 1 else f"{number} sites"


def listed(names: Sequence[str], most: int = 6) -> str:
    """Return names as in a sentence."""
    if len(names) > most:
        return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def privacy(facts: Facts) -> Iterator[str]:
    """Return what left the sites, and what that means."""
    numbers = facts.result.get("numbers_up_per_reply")
    vector = f"one vector of {numbers:,} numbers" if isinstance(numbers, int) else "one vector of theta's size"
    if facts.study.privacy.guaranteed:
        yield (
            f"What the study guarantees, if the sites' programs are these: {guarantee(facts.study)}. It covers one "
            "site; someone who is a patient at several pays at each, and other studies at the same site add to it."
        )
    else:
        reason = guarantee(facts.study).partition(" (")[2].removesuffix(")")
        yield (
            f"No formal guarantee of privacy ({reason}). Meta-gradients can reveal who was among the "
            "data and, in part, what the images show; that only gradients leave a site is not privacy."
        )
    figures = "no figure" if facts.study.privacy.figures == "withheld" else "its query loss and query accuracy"
    yield (
        f"What a site sent in a round: {vector} (the meta-gradient), {figures}, and a token that binds the reply to "
        "its question. No images, no names, no counts, no text."
    )
    if facts.evaluations:
        yield "What a site sent for an evaluation: means and standard errors of the figures shown here."
    yield f"Up from all sites together: {size(float(facts.history.scalars['bytes_up'].sum()))}."


def reproduce(facts: Facts) -> tuple[Sequence[str], Sequence[str]]:
    """Return the commands that repeat the run, and what to know about them."""
    commands = [
        "wardround-study check study.toml      # the study file printed here; shows the digest",
        "wardround-lab simulate study.toml     # on virtual hospitals",
    ]
    notes = [
        f"The digest of the study must be {facts.digest}.",
        "On virtual hospitals the same study, with the same versions on the same kind of machine, gives the same theta "
        "to the bit, if the same replies count.",
        "Hospitals' images and their randomness stay with them: a run at hospitals can be repeated only by the same "
        "sites.",
    ]
    return commands, notes


def in_words(facts: Facts) -> dict[str, str]:
    """Return the study in a few lines."""
    study = facts.study
    episodes, outer, aggregation = study.episodes, study.outer, study.aggregation
    shots = f"{episodes.shots} labelled scans each to adapt, {episodes.queries} each to score"
    if episodes.labels == "fixed":
        task = f"{len(episodes.class_names)} diagnoses that are the same in every episode; {shots}"
    else:
        task = f"{episodes.ways} classes drawn anew in every episode; {shots}"
    rule = aggregation.rule + (f", withstands {aggregation.tolerated} hostile sites" if aggregation.tolerated else "")
    out = {
        "Task": task,
        "Classes": listed(episodes.class_names, 60),
        "New classes, for testing alone": listed(episodes.held_out_names, 60),
        "Network": f"{study.model.name}, images of {study.model.image_size} pixels, "
        f"{'in colour' if study.model.channels > 1 else 'grey values'}",
        "Learner": f"{study.algorithm.name}, inner steps: {study.algorithm.inner_steps}, "
        f"when it is used: {study.algorithm.test_steps}",
        "Outer optimiser": f"{outer.optimiser}, rate {outer.rate:g}, {outer.schedule}",
        "Aggregation": rule,
        "A round counts with": f"{_counted(study.sites.quorum).lower()} or more, within "
        f"{study.sites.deadline_seconds:g} s",
        "Figures of the sites": study.privacy.figures,
    }
    return {name: value for name, value in out.items() if value}


def rows(evaluation: Evaluation, pool: str, held_out: Sequence[str]) -> list[str]:
    """Return the sites that a table of an evaluation shows; of very many, those at both ends."""
    sites = [s for s, figures in evaluation.figures.items() if (pool, "after") in figures]
    if len(sites) <= _ROWS:
        return sites
    ranked = sorted(sites, key=lambda site: evaluation.figures[site][pool, "after"].mean)
    chosen = {*ranked[:_ENDS], *ranked[-_ENDS:], *(s for s in sites if s in held_out)}
    return [s for s in sites if s in chosen]


def left_out(evaluation: Evaluation, pool: str, shown: Sequence[str]) -> str:
    """Return a sentence about the sites that a table leaves out, empty where it shows all."""
    rest = [s for s, figures in evaluation.figures.items() if (pool, "after") in figures and s not in set(shown)]
    mean = evaluation.mean(rest, pool, "after")
    if mean is None:
        return ""
    return (
        f"Shown are sites that never trained and the {_ENDS} lowest and highest; the other {len(rest)} have "
        f"{100 * mean.mean:.1f} % on average after adaptation. All are in evaluations.jsonl."
    )


def classes(final: Evaluation, pool: str) -> str:
    """Return the name of a pool of classes, where there are several."""
    return _CLASSES[pool] if len(final.pools) > 1 else "All classes"


def meanings(final: Evaluation) -> str:
    """Return what the columns of an evaluation's tables mean."""
    there = {moment for figures in final.figures.values() for _, moment in figures}
    return " ".join(meaning for moment, meaning in _MEANING.items() if moment in there)


def cell(estimate: Estimate | None, moment: str) -> str:
    """Return an estimate with its 95 % interval, as tables show it."""
    if estimate is None:
        return "-"
    _, factor, digits, sign = FIGURES[moment]
    return f"{factor * estimate.mean:{sign}.{digits}f} ± {factor * estimate.half:.{digits}f}"


def notable(facts: Facts, most: int = 30) -> list[tuple[str, str]]:
    """Return (when, what) of the events that a reader should know; of very many, the last."""
    out = []
    for event in facts.events:
        if event.get("event") in _NOTABLE:
            what = str(event["event"]).replace("-", " ")
            what += f" in round {event['round']}" if event.get("round") else ""
            what += f": {event['site']}" if event.get("site") else ""
            what += f" ({event['reason']})" if event.get("reason") else ""
            out.append((day(event.get("at"), clock=True), what))
    return out[-most:]


def day(at: float | None, *, clock: bool = False) -> str:
    """Return a time in UTC, as a date or with the time of day."""
    if at is None:
        return ""
    moment = time.gmtime(at)
    date = f"{moment.tm_mday} {_MONTHS[moment.tm_mon - 1]} {moment.tm_year}"
    return f"{date}, {moment.tm_hour:02}:{moment.tm_min:02}" if clock else date


_MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
