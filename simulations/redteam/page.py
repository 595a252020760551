"""The red team's page: what each attack reached, setting by setting, and its pictures beside the originals.

It holds images of the sites' patients. Those of virtual hospitals are public or made up.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from client.data.html import png, text, write_private
from simulations.redteam.figures import Figure
from simulations.redteam.reconstruction import CANDIDATES, Picture
from simulations.redteam.released import TARGET
from simulations.redteam.table import outcome, words
from simulations.redteam.team import Result, Row
from simulations.redteam.tricks import Trick

__all__ = ["write_page"]

_SIDE = 112  # pixels of a picture
_PICTURES = 4  # of each attack and role

_ATTACKS = {
    "span": "how much of an image lies in the span of the first layer&rsquo;s meta-gradient: exact where it is linear",
    "gradient cosine": "the angle of an image&rsquo;s own gradient with the meta-gradient",
    "label leakage": "the shares of classes, by the gradient of the head&rsquo;s bias",
    "LiRA, RMIA on theta": "whether theta is surer of a patient than models are that never had them",
    "ratio inversion": "images as ratios of the first layer&rsquo;s rows and its bias",
    "gradient matching": "images whose simulated meta-gradient is the one that was sent",
}

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Red team</title>
<style>
:root { --ink: #1a1a1a; --faint: #5f6368; --line: #e4e6e8; --calm: #0072b2; --loud: #d55e00; color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 2.5rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .2rem; } h3 { font-size: .95rem; margin: 0; }
h4 { font-size: .8rem; margin: 1rem 0 .3rem; color: var(--faint); font-weight: 600; }
p { max-width: 46rem; margin: .5rem 0; } .note { color: var(--faint); font-size: .84rem; }
.verdict { border-left: 4px solid var(--calm); padding: .3rem 0 .3rem 1rem; font-size: 1.08rem; }
.verdict.bad { border-color: var(--loud); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .86rem; margin: 1rem 0; }
th, td { text-align: left; padding: .4rem .8rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom-color: var(--ink); } .told { color: var(--loud); font-weight: 600; }
.defences { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 1fr)); gap: 1.8rem; margin-top: .8rem; }
.defence { border-top: 3px solid var(--ink); padding-top: .5rem; }
.line { display: grid; grid-template-columns: 9.4rem 1fr 3rem; gap: .5rem; align-items: center; font-size: .78rem;
  line-height: 1.25; margin: .35rem 0; }
.line b { text-align: right; font-variant-numeric: tabular-nums; }
.track { position: relative; height: 1rem; background: #f3f4f5; border-radius: 2px; }
.track i, .track u, .track s { position: absolute; top: 0; bottom: 0; display: block; }
.track i { left: 0; background: var(--calm); opacity: .85; border-radius: 2px 0 0 2px; }
.track i.told { background: var(--loud); } .track u { top: 45%; bottom: 45%; background: var(--ink); }
.track s { width: 2px; background: #b00020; top: -3px; bottom: -3px; }
.track.area { background: linear-gradient(90deg, #e9ebed 50%, #f3f4f5 50%); }
.pairs { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; font-size: .72rem; color: var(--faint); }
figure img { width: 3.6rem; height: 3.6rem; image-rendering: pixelated; display: inline-block; background: #000; }
figure img + img { margin-left: 2px; } figcaption { line-height: 1.3; white-space: nowrap; }
figcaption.told { color: var(--loud); } dl { font-size: .84rem; }
dt { font-weight: 600; float: left; margin-right: .6rem; } dd { margin: .2rem 0; color: var(--faint); }
details { margin-top: 1rem; font-size: .84rem; } summary { cursor: pointer; }
@media (max-width: 60rem) { .defences { grid-template-columns: 1fr; } }
</style></head>
"""


def write_page(path: Path, title: str, results: Sequence[Result], tricks: Sequence[Trick]) -> None:
    """Write the page of some results; it needs no network and runs no script.

    Raises
    ------
    DataError
        It cannot be written there.
    """
    write_private(path, "".join(_page(title, results, tricks)))


def _page(title: str, results: Sequence[Result], tricks: Sequence[Trick]) -> Iterator[str]:
    yield f"{_HEAD}<body><h1>What a curious coordinator learns</h1>\n<p class='note'>{text(title)}</p>\n"
    yield from _verdict(results)
    yield (
        "<p>The study ran with the real server and the real clients, and every answer was recorded. The attacks see "
        "what the coordinator sees: the study, theta, and what each site sent; those on theta only what anybody may "
        "see in the end. Who was really in a round is used to "
        "score them, and for nothing else.</p>\n"
    )
    yield from _summary(results)
    yield (
        "<p class='note'>Each cell is the largest over attacks. Orange is proven to be more than what an attacker "
        "reaches who saw nothing. In bars, from 0 to 1, the shade changes at one half, a coin; the black line joins "
        "one-sided 95&nbsp;% limits; the red mark is the most that the guarantee allows.</p>\n"
    )
    for setting in dict.fromkeys(result.setting for result in results):
        yield from _setting([result for result in results if result.setting == setting])
    yield from _tricks(tricks)
    yield (
        "<h2>How to read this</h2><p>AUC is the chance that the attack gives a patient who was there a higher score "
        "than one who was not: one half is a coin. Limits count one trial an answer, and bounds hold whatever "
        "the attack.</p>\n"
        "<p>Attacks on answers ask who was in a round, of patients who are known to be in the data. Attacks on theta "
        "ask who is in the data at all, of what a run publishes. They are made on other runs of the same study, with a "
        "random half of the patients each; a run is a trial, and the bound is that of all rounds together.</p>\n"
        "<p>Gains are over the better of two baselines that saw nothing: the mean image, and what the same attack "
        "makes of another site&rsquo;s answer. A patient is identified where the reconstruction is nearer to their "
        f"image than to {CANDIDATES - 1} others. An attack that fails proves nothing; only the bounds are proven."
        f"</p><dl>{''.join(f'<dt>{name}</dt><dd>{what}</dd>' for name, what in _ATTACKS.items())}</dl>"
        "\n</body></html>\n"
    )


def _verdict(results: Sequence[Result]) -> Iterator[str]:
    broken = [sentence for result in results for sentence in result.broken]
    bounded = sum(f.bound is not None for r in results for row in r.rows for f in row.figures)
    if broken:
        yield "<div class='verdict bad'><strong>The guarantee does not hold. Please report this.</strong><ul>"
        yield "".join(f"<li>{text(sentence)}</li>" for sentence in broken) + "</ul></div>\n"
    elif bounded:
        yield f"<p class='verdict'>None of {bounded} figures is proven to be above the bound of its guarantee.</p>\n"
    else:
        yield "<p class='verdict bad'>No run here has a guarantee: nothing bounds what attacks reach.</p>\n"


def _summary(results: Sequence[Result]) -> Iterator[str]:
    head = "".join(f"<th>{name}</th>" for name in _SUMMARY)
    yield f"<table><thead><tr><th>setting</th><th>defence</th>{head}</tr></thead><tbody>\n"
    last = ""
    for result in results:
        cells = "".join(f"<td>{_cell(result, name)}</td>" for name in _SUMMARY)
        name = "" if result.setting == last else text(result.setting)
        last = result.setting
        yield f"<tr><th>{name}</th><td>{result.defence}</td>{cells}</tr>\n"
    yield "</tbody></table>\n"


#: Columns of the first table: the figure whose largest value they hold, and whether that is over attacks on theta.
_SUMMARY = {
    "who was in a round, by an answer: AUC": ("AUC", False),
    "true positives at 1 % false ones": ("TPR at 1.0% FPR", False),
    "who is in the data, by theta: AUC": ("AUC", True),
    "reconstruction, gain in dB": ("PSNR gain, dB", False),
    f"identified among {CANDIDATES}": (f"identified among {CANDIDATES}", False),
}


def _cell(result: Result, column: str) -> str:
    name, of_theta = _SUMMARY[column]
    found = [
        (figure, row)
        for row in result.rows
        for figure in row.figures
        if figure.name == name and _question(row) == (_IN_THE_DATA if of_theta else _IN_A_ROUND)
    ]
    if not found:
        return "&ndash;"
    figure, row = max(found, key=lambda pair: pair[0].value)
    value = f"{figure.value:+.1f}" if "dB" in figure.name else f"{figure.value:.2f}"
    bound = "" if figure.bound is None else f", at most {figure.bound:.2f}"
    return f"<span{_mark(figure)}>{value}</span> <span class='note'>{text(_name(row))}{bound}</span>"


def _mark(figure: Figure) -> str:
    """Mark what is proven to be more than a guess, or above a bound."""
    nothing = {"AUC": 0.5, f"identified among {CANDIDATES}": 1 / CANDIDATES, "PSNR gain, dB": 0.0}
    told = figure.broken or figure.low > nothing.get(figure.name, 0.01)
    return " class='told'" if told else ""


def _setting(results: Sequence[Result]) -> Iterator[str]:
    first = results[0]
    yield f"<section><h2>{text(first.setting[0].upper() + first.setting[1:])}</h2>\n"
    yield f"<p class='note'>{first.numbers:,} numbers an answer.</p>\n"
    yield f"<div class='defences' style='--n:{len(results)}'>"
    for result in results:
        yield f"<div class='defence'><h3>{result.defence}</h3><p class='note'>{text(result.guarantee)}; "
        yield f"{result.releases} answers</p>"
        yield from _bars(result)
        yield f"<p class='note'>{_ranks(result)}</p>"
        for attack, role in dict.fromkeys((p.attack, p.role) for p in result.pictures):
            some = [p for p in result.pictures if (p.attack, p.role) == (attack, role)][:_PICTURES]
            yield f"<h4>{text(attack)}: {text(role)}</h4><div class='pairs'>{''.join(map(_pair, some))}</div>"
        yield "</div>\n"
    yield "</div>\n<details><summary>All figures, with limits and bounds</summary><table><thead><tr><th>defence</th>"
    yield "<th>attack</th><th>on</th><th>figures</th></tr></thead><tbody>"
    for result in results:
        for row in result.rows:
            figures = "<br>".join(f"{text(f.name)} {text(words(f))}" for f in row.figures)
            yield f"<tr><td>{result.defence}</td><td>{text(row.attack)}</td><td>{text(row.target)}</td>"
            yield f"<td>{figures}</td></tr>\n"
    yield "</tbody></table></details></section>\n"


def _tricks(tricks: Sequence[Trick]) -> Iterator[str]:
    yield "<section><h2>A malicious coordinator</h2>\n<p>These messages went to the real client of a virtual hospital. "
    yield "What no honest coordinator sends is refused before any of the site&rsquo;s data are opened.</p>\n<table>"
    yield "<thead><tr><th>it sends</th><th>answer</th></tr></thead><tbody>\n"
    for trick in tricks:
        told = "" if trick.refused else " class='told'"
        yield f"<tr><td>{text(trick.name)}</td><td{told}>{text(outcome(trick))}</td></tr>\n"
    yield "</tbody></table></section>\n"


def _ranks(result: Result) -> str:
    ranks = result.ranks
    if ranks.equal:
        return f"Rank of the first layer = number of images in it: {ranks.equal} of {ranks.releases} answers."
    return f"Rank of the first layer: {ranks.median_rank:g}; images in it: {ranks.median_seen:g} (medians)."


# What attacks that have an AUC ask.
_IN_A_ROUND, _IN_THE_DATA = "who was in a round, by one answer", "who is in the data, by theta"
_CLASSES = "which classes were in a round more often"


def _bars(result: Result) -> Iterator[str]:
    """Yield a bar for every AUC, under what it asks and the most that the guarantee allows of that."""
    by_answer, by_theta = result.areas or (None, None)
    for question, most in {_IN_A_ROUND: by_answer, _IN_THE_DATA: by_theta, _CLASSES: None}.items():
        rows = [row for row in result.rows if row.figures[0].name == "AUC" and _question(row) == question]
        if rows:
            bound = "" if most is None else f", {most:.2f} at most"
            yield f"<h4>AUC of {question}{bound}</h4>"
            yield from map(_bar, rows)


def _question(row: Row) -> str:
    if row.attack == "label leakage":
        return _CLASSES
    return _IN_THE_DATA if row.target == TARGET else _IN_A_ROUND


def _name(row: Row) -> str:
    """Return an attack and whom it looks for, where that can differ."""
    return f"{row.attack}, {row.target}" if _question(row) == _IN_A_ROUND else row.attack


def _bar(row: Row) -> str:
    figure = row.figures[0]
    bound = "" if figure.bound is None else f"<s style='left:{figure.bound:.1%}' title='bound'></s>"
    limits = f"<u style='left:{figure.low:.1%};width:{figure.high - figure.low:.1%}'></u>"
    bar = f"<i{_mark(figure)} style='width:{figure.value:.1%}'></i>"
    return (
        f"<div class='line'><span>{text(_name(row))}</span><div class='track area'>{bar}{limits}{bound}</div>"
        f"<b>{figure.value:.2f}</b></div>\n"
    )


def _pair(picture: Picture) -> str:
    images = "".join(
        f"<img alt='{alt}' src='data:image/png;base64,{png(pixels, _SIDE)}'>"
        for alt, pixels in (("original", picture.original), ("reconstruction", picture.found))
    )
    told = " class='told'" if picture.gain > 3 else ""
    return f"<figure>{images}<figcaption{told}>{picture.psnr:.0f} dB, gain {picture.gain:+.0f}</figcaption></figure>"
