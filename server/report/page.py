"""The report as one self-contained page of HTML."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

import numpy as np

from common.study import Study
from server.report import charts
from server.report.facts import MOMENTS, STATES, Evaluation, Facts
from server.report.style import HEAD
from server.report.words import (
    FIGURES,
    LIMITS,
    WHY,
    cell,
    classes,
    day,
    in_words,
    left_out,
    listed,
    meanings,
    notable,
    privacy,
    reproduce,
    rows,
    verdict,
)
from server.runs import natural, printable
from server.units import duration, size

__all__ = ["render"]

_STATES = {
    "in": "counted",
    "silent": "no reply",
    "error": "error",
    "refused": "refused",
    "resting": "resting",
    "idle": "not drawn",
}
#: Rows of tables of sites; those with the most failures come first.
_ROWS = 40


def render(facts: Facts) -> str:
    """Return the page; everything on it follows from the run's folder, and nothing is loaded or run."""
    return "".join(_page(facts))


def _page(facts: Facts) -> Iterator[str]:
    yield HEAD % f"{_text(facts.study.study.title)}: report"
    yield "<body><main>\n<header>\n"
    yield '<p class="eyebrow">Report of a federated study</p>\n'
    yield f"<h1>{_text(facts.study.study.title or facts.study.study.id)}</h1>\n"
    yield f'<p class="about">{_about(facts)}</p>\n'
    ended = "" if facts.state == "finished" else " ended"
    yield f'<p class="verdict{ended}">{_text(" ".join(verdict(facts)))}</p>\n'
    yield _numbers(facts)
    yield "</header>\n"
    if facts.final is not None:
        yield from _worth(facts, facts.final)
    if len(facts.history.rounds):
        if np.isfinite(facts.history.accuracy).any():
            yield from _learning(facts)
        yield from _roster(facts)
        yield from _failures(facts)
        yield from _cost(facts)
    yield from _privacy(facts)
    yield from _study(facts)
    yield from _reproduce(facts)
    yield "</main></body></html>\n"


def _about(facts: Facts) -> str:
    span = day(facts.began)
    if day(facts.ended) != span:
        span = f"{span} to {day(facts.ended)}"
    parts = [f"Run {facts.name}", f"study {facts.study.study.id}, {facts.digest[:12]}", span]
    if facts.began is not None and facts.ended is not None:
        parts.append(duration(facts.ended - facts.began))
    return " &ensp;·&ensp; ".join(_text(part) for part in parts if part)


def _numbers(facts: Facts) -> str:
    history, study = facts.history, facts.study
    done = int(history.rounds[-1]) if len(history.rounds) else 0
    boxes = [("rounds done", f"{done:,} <small>of {study.study.rounds:,}</small>")]
    boxes.append(("sites that trained", f"{len(facts.training):,}"))
    final = facts.final
    if final is not None:
        for pool in final.pools:
            after, gain = (final.mean(facts.judges, pool, moment) for moment in ("after", "gain"))
            where = "at the site that never trained" if len(facts.judges) == 1 else "on average"
            if not set(facts.judges) <= set(facts.held_out):
                where = "at sites that trained"
            if after:
                words = f"accuracy, {classes(final, pool).lower()}, adapted, {where}"
                boxes.append((words, f"{100 * after.mean:.1f} <small>± {100 * after.half:.1f} %</small>"))
            if gain:
                words = f"points over training from scratch, {classes(final, pool).lower()}"
                boxes.append((words, f"{100 * gain.mean:+.1f} <small>± {100 * gain.half:.1f}</small>"))
    if len(history.rounds):
        boxes.append(("sent up by all sites", _text(size(float(np.nansum(history.scalars["bytes_up"]))))))
        boxes.append(("replies that did not count", f"{history.lost:,} <small>of {history.asked:,}</small>"))
    cells = "".join(f"<div><dt>{_text(name)}</dt><dd>{value}</dd></div>" for name, value in boxes)
    return f'<dl class="numbers">{cells}</dl>\n'


def _worth(facts: Facts, final: Evaluation) -> Iterator[str]:
    yield "<section>\n<h2>What theta is worth</h2>\n"
    yield (
        "<p>Theta is the starting point that the sites trained together. Here each site adapts it to a few labelled "
        "scans and is tested on other patients; beside it, the same network trained from scratch on those scans.</p>\n"
    )
    for pool in final.pools:
        shown = rows(final, pool, facts.held_out)
        more = left_out(final, pool, shown)
        drawing = charts.figures_chart(final, shown, pool, facts.held_out)
        yield f"<figure><h3>{classes(final, pool)}</h3>{drawing}</figure>\n"
        yield _figures(final, shown, pool, facts.held_out)
        if more:
            yield f'<p class="note">{_text(more)}</p>\n'
    yield (
        '<p class="note">Means with 95 % intervals over meta-test episodes, '
        f"{'test' if final.side == 'test' else 'validation'} patients, round {final.round:,}; accuracies in per cent. "
        f"Bold with *: the site never trained. {meanings(final)}</p>\n"
    )
    for site, why in final.out.items():
        yield f'<p class="note">{_text(site)} gave no evaluation: {_text(why)}.</p>\n'
    sides = [e for e in facts.evaluations if e.side == "validation"] or [*facts.evaluations]
    if len(sides) > 1:
        sites = sorted({site for e in sides for site in e.figures}, key=natural)
        judged = [s for s in facts.held_out if s in sites] if all(e.side == "test" for e in sides) else sites
        best = [e.round for e in sides if e.best]
        yield f"<figure><h3>On the way: accuracy, %</h3>{charts.evaluations_chart(sides, judged or sites)}"
        yield f"<figcaption>Accuracy after adaptation, known classes, {sides[0].side} patients; grey: the mean's 95 % "
        yield "interval." + (f" The best mean was in round {best[-1]:,}." if best else "") + "</figcaption></figure>\n"
    yield "</section>\n"


def _figures(final: Evaluation, shown: Sequence[str], pool: str, held_out: Sequence[str]) -> str:
    there = [m for m in MOMENTS if any((pool, m) in final.figures[s] for s in shown)]
    head = [("site", False), *((FIGURES[m][0], True) for m in there)]
    body = []
    for site in shown:
        cells = [cell(final.figures[site].get((pool, m)), m) for m in there]
        unseen = site in held_out
        body.append(_row([f"{site} *" if unseen else site, *cells], apart=unseen))
    return _table(head, body)


def _learning(facts: Facts) -> Iterator[str]:
    history = facts.history
    window = charts.smoothing(len(history.rounds))
    smooth = f"Moving means over {window} rounds" + ("" if len(history.sites) > 7 else "; faint: round by round")
    yield "<section>\n<h2>How it learned</h2>\n"
    yield '<figure><div class="two">'
    yield f"<div><h3>Query loss</h3>{charts.learning_chart(facts, 'loss')}</div>"
    yield f"<div><h3>Query accuracy, %</h3>{charts.learning_chart(facts, 'accuracy')}</div></div>"
    yield f"<figcaption>{smooth if window > 1 else 'Round by round'}. "
    if len(history.sites) > 7:
        yield f"Grey: each of {len(history.sites)} sites; named: those that end highest and lowest. "
    yield "Each round draws new episodes, of training patients.</figcaption></figure>\n"
    if len(history.sites) > 1:
        yield f"<figure><h3>Worst against mean, query accuracy, %</h3>{charts.worst_chart(history)}"
        yield (
            "<figcaption>The distance between the mean over sites and whichever site is worst at that moment: what the "
            "average hides.</figcaption></figure>\n"
        )
    yield "</section>\n"


def _roster(facts: Facts) -> Iterator[str]:
    history = facts.history
    yield "<section>\n<h2>Who took part</h2>\n"
    yield f"<figure>{charts.roster_chart(history)}"
    rounds = len(history.rounds)
    if rounds > 2 * charts.CELLS:
        many = f"{rounds / charts.CELLS:.0f}"
        yield f"<figcaption>Each column stands for about {many} rounds; the height of a colour is its share of them, "
        yield "rounded up to a quarter.</figcaption>"
    if facts.held_out:
        never = _text(listed(facts.held_out))
        yield f"<figcaption>Not asked in any round, as the study keeps them from training: {never}.</figcaption>"
    yield "</figure>\n"
    counts = {
        site: [int((history.state[:, k] == s).sum()) for s in range(len(STATES))]
        for k, site in enumerate(history.sites)
    }
    there = [k for k in range(len(STATES)) if any(c[k] for c in counts.values())]
    order = sorted(counts, key=lambda site: counts[site][0] - sum(counts[site]))[:_ROWS]
    head = [("site", False), *((_STATES[STATES[k]], True) for k in there)]
    body = [[site, *(f"{counts[site][k]:,}" for k in there)] for site in sorted(order, key=natural)]
    if facts.failures:
        head.append(("last failure", False))
        body = [[*row, _last_failure(facts, row[0])] for row in body]
    yield _table(head, map(_row, body))
    yield '<p class="note">Rounds that a site spent in each state, in the attempt that completed the round.'
    yield _others(len(counts), "fewer absences")
    yield "</p>\n</section>\n"


def _last_failure(facts: Facts, site: str) -> str:
    for event in reversed(facts.events):
        if event.get("site") == site and event.get("event") == "rejected":
            return f"round {event.get('round')}: {event.get('reason') or event.get('why')}"
    return ""


def _failures(facts: Facts) -> Iterator[str]:
    if not facts.failures:
        return
    whys = [w for w in WHY if any(w in c for c in facts.failures.values())]
    whys += sorted({w for c in facts.failures.values() for w in c} - set(whys))
    total = {site: sum(c.values()) for site, c in facts.failures.items()}
    order = sorted(sorted(total, key=lambda site: -total[site])[:_ROWS], key=natural)
    yield "<section>\n<h2>What went wrong</h2>\n"
    head = [("site", False), *((why, True) for why in whys), ("all", True)]
    body = [_row([s, *(f"{facts.failures[s].get(w, 0) or '·'}" for w in whys), f"{total[s]:,}"]) for s in order]
    yield _table(head, body)
    meaning = "; ".join(f"{why}: {WHY.get(why) or facts.reasons.get(why, '')}" for why in whys)
    yield f'<p class="note">{_text(meaning)}. Attempts that were tried again are included.'
    yield f"{_others(len(total), 'fewer failures')}</p>\n"
    events = notable(facts)
    if events:
        yield "<h3>Notable events</h3>"
        yield _table([("when (UTC)", False), ("what", False)], [_row(list(e)) for e in events])
    yield "</section>\n"


def _others(number: int, what: str) -> str:
    return f" The other {number - _ROWS:,} sites have {what}." if number > _ROWS else ""


def _cost(facts: Facts) -> Iterator[str]:
    history = facts.history
    totals = {name: float(np.nansum(values)) for name, values in history.scalars.items()}
    rounds = len(history.rounds)
    yield "<section>\n<h2>What it cost</h2>\n"
    yield '<figure><div class="two">'
    yield f"<div><h3>Megabytes a round, all sites</h3>{charts.bytes_chart(history)}</div>"
    yield f"<div><h3>Seconds a round</h3>{charts.seconds_chart(history)}</div></div></figure>\n"
    replies = max(1, int((history.state == 0).sum()))
    lines = [
        ("sent up by sites", size(totals["bytes_up"]), f"{size(totals['bytes_up'] / replies)} a reply"),
        ("sent down to sites", size(totals["bytes_down"]), f"{size(totals['bytes_down'] / rounds)} a round"),
        ("all rounds", duration(totals["seconds"]), f"{duration(totals['seconds'] / rounds)} a round"),
    ]
    for name in ("compute", "transport", "waiting"):
        seconds = totals[f"{name}_seconds"]
        share = f"{100 * seconds / totals['seconds']:.0f} %" if totals["seconds"] else ""
        lines.append((f"of it {name}", duration(seconds), share))
    lines.append(("attempts", f"{history.attempts:,}", f"rounds: {rounds:,}"))
    yield _words({name: f"{value}; {more}" if more else value for name, value, more in lines})
    yield "</section>\n"


def _privacy(facts: Facts) -> Iterator[str]:
    yield "<section>\n<h2>Privacy</h2>\n"
    first, *others = privacy(facts)
    yield f"<p><strong>{_text(first)}</strong></p>\n"
    yield from (f"<p>{_text(sentence)}</p>\n" for sentence in others)
    yield "<h2>What the numbers do not prove</h2>\n<ul>"
    yield "".join(f"<li>{_text(sentence)}</li>" for sentence in LIMITS)
    yield "</ul>\n</section>\n"


def _study(facts: Facts) -> Iterator[str]:
    yield "<section>\n<h2>The study</h2>\n"
    yield _words(in_words(facts))
    yield "<h3>The study file, every value</h3>\n"
    yield f'<pre class="study">{"".join(_toml(facts.study))}</pre>\n'
    yield '<p class="note">Bold: not the default. Copied into a file, this is study.toml.</p>\n</section>\n'


def _toml(study: Study) -> Iterator[str]:
    """Return the study file group by group; what is not the default is bold."""
    values, usual = study.run_config(), Study().run_config()
    for part in study.toml().split("\n\n"):
        head, *rest = part.strip().splitlines()
        group = head.strip("[]")
        yield f"<span>{_text(head)}\n"
        for line in rest:
            key = f"{group}.{line.partition(' = ')[0]}"
            yield f"<b>{_text(line)}</b>\n" if values[key] != usual[key] else f"{_text(line)}\n"
        yield "\n</span>"


def _reproduce(facts: Facts) -> Iterator[str]:
    commands, notes = reproduce(facts)
    yield "<section>\n<h2>How to repeat it</h2>\n"
    yield f'<pre class="commands">{_text_lines(commands)}</pre>\n'
    yield "<ul>" + "".join(f"<li>{_text(note)}</li>" for note in notes) + "</ul>\n"
    yield "<h3>Digests and versions</h3>\n"
    digests = {"study (SHA-256)": facts.digest}
    if "theta" in facts.result:
        digests["theta (SHA-256)"] = str(facts.result["theta"])
    yield _words({**digests, **{name: str(version) for name, version in facts.versions.items()}}, "words digests")
    yield "</section>\n"


def _words(pairs: Mapping[str, str], kind: str = "words") -> str:
    items = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in pairs.items())
    return f'<dl class="{kind}">{items}</dl>\n'


def _table(head: Sequence[tuple[str, bool]], body: Iterable[str]) -> str:
    top = "".join(f'<th scope="col"{_N if number else ""}>{_text(name)}</th>' for name, number in head)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>\n'


_N = ' class="n"'


def _row(cells: Sequence[str], *, apart: bool = False) -> str:
    first, *others = cells
    numbers = "".join(f"<td{_N if _NUMBER.fullmatch(c) else ''}>{_text(c)}</td>" for c in others)
    return f'<tr{" class=apart" if apart else ""}><th scope="row">{_text(first)}</th>{numbers}</tr>'


_NUMBER = re.compile(r"[+-]?[0-9][0-9.,]*( ± [0-9.]+)?|-|·")


def _text(value: object) -> str:
    """Return text as it may stand in HTML and its attributes; names and reasons come from outside."""
    return escape(printable(value), quote=True).replace(" %", "&nbsp;%")


def _text_lines(parts: Iterable[str]) -> str:
    return "\n".join(_text(line) for line in parts)
