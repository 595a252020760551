"""The model card: what theta is for, what it was made of, and what is known of it (Mitchell et al. 2019)."""

import re
from collections.abc import Iterable, Iterator, Sequence

from server.report.facts import MOMENTS, STATES, Facts
from server.report.words import (
    FIGURES,
    LIMITS,
    cell,
    classes,
    day,
    in_words,
    left_out,
    meanings,
    privacy,
    reproduce,
    rows,
    verdict,
)
from server.runs import printable

__all__ = ["card"]

_USE = (
    "Meant for hospitals that adapt this initialisation to their own labelled scans, for research. It is no "
    "diagnostic device and has no approval as one.",
    "Not meant for use without adaptation, without labelled scans of the hospital's own to test on, for classes or "
    "kinds of images that are not named here, or for decisions about patients.",
    "Before use, a hospital should adapt theta and test it on patients of its own that the adaptation has not seen, "
    "and compare it with training from scratch.",
)


def card(facts: Facts) -> str:
    """Return the model card in Markdown."""
    return "\n".join(_card(facts)) + "\n"


def _card(facts: Facts) -> Iterator[str]:
    study = facts.study
    yield f"# {_md(study.study.title or study.study.id)}\n"
    yield f"{_md(' '.join(verdict(facts)))}\n"
    yield "## What it is\n"
    kind = "The initialisation (theta) of an image classifier, trained by federated meta-learning."
    there = "It is in `theta.safetensors`" if facts.result else "There is none yet"
    yield f"{kind} {there}; `study.json` says how it is made.\n"
    yield from _list(f"{name}: {value}" for name, value in in_words(facts).items())
    yield "\n## Intended use\n"
    yield from _list(_USE)
    yield "\n## Training data\n"
    yield from _data(facts)
    yield "\n## Evaluation\n"
    yield from _evaluation(facts)
    yield "\n## Limits, and what the numbers do not prove\n"
    yield from _list(LIMITS)
    yield "\n## Privacy\n"
    yield from _list(privacy(facts))
    yield "\n## Digests and versions\n"
    yield f"- study (SHA-256): `{facts.digest}`"
    if "theta" in facts.result:
        yield f"- theta (SHA-256): `{_md(facts.result['theta'])}`"
    yield f"- run: {_md(facts.name)}, {day(facts.began, clock=True)} to {day(facts.ended, clock=True)} (UTC)"
    yield from _list(f"{name} {version}" for name, version in facts.versions.items())
    commands, notes = reproduce(facts)
    yield "\n## How to repeat it\n"
    yield "\n".join(["```", *commands, "```", ""])
    yield from _list(notes)


def _data(facts: Facts) -> Iterator[str]:
    counted = dict(zip(facts.history.sites, (facts.history.state == STATES.index("in")).sum(0).tolist(), strict=True))
    yield "The images stayed at these sites; how many there are, and of whom, no site says.\n"
    yield from _table(
        ["site", "part", "rounds that counted"],
        [
            *([s, "trained", f"{counted.get(s, 0):,}"] for s in facts.training),
            *([s, "never trained", "0"] for s in facts.held_out),
        ],
    )
    data = facts.study.data
    yield (
        f"\nIn a simulation, the sites are parts of the data source {_md(repr(data.source))} (partition "
        f"{data.partition}, see `study.json`); a hospital uses its own images instead."
    )


def _evaluation(facts: Facts) -> Iterator[str]:
    final = facts.final
    if final is None:
        yield "None: no figures were recorded."
        return
    yield (
        f"After round {final.round:,}, on {final.side} patients. Means with 95 % intervals over meta-test episodes; "
        f"accuracies in per cent. A star marks a site that never trained. {meanings(final)}\n"
    )
    for pool in final.pools:
        shown = rows(final, pool, facts.held_out)
        there = [m for m in MOMENTS if any((pool, m) in final.figures[s] for s in shown)]
        yield f"### {classes(final, pool)}\n"
        yield from _table(
            ["site", *(FIGURES[m][0] for m in there)],
            [
                [f"{s} *" if s in facts.held_out else s, *(cell(final.figures[s].get((pool, m)), m) for m in there)]
                for s in shown
            ],
        )
        if more := left_out(final, pool, shown):
            yield f"\n{_md(more)}"
        yield ""
    yield from _list(f"{site} gave no evaluation: {why}" for site, why in final.out.items())


def _list(items: Iterable[str]) -> Iterator[str]:
    return (f"- {_md(item)}" for item in items)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in body:
        yield f"| {' | '.join(map(_md, row))} |"


def _md(value: object) -> str:
    """Return text that Markdown shows as it is: names and reasons come from outside."""
    return re.sub(r"([\\`*_\[\]<>#|~&])", r"\\\1", printable(value))
