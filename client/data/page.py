"""One page that shows what a site has and can offer. It holds patients' images, and so it stays at the site."""

from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from client.data.cache import caches, mapped
from client.data.catalogue import Catalogue
from client.data.html import png, text, write_private
from client.data.image import Recipe
from client.data.report import ADVICE, contents, statement
from client.data.store import SPLITS

__all__ = ["write_page"]

#: Thumbnails of a class, classes that have some, and longest side of one in pixels.
_EACH, _SHOWN, _SIDE = 8, 40, 224
#: Rows of a table whose rows come from what stands in files.
_ROWS = 25

# Nothing is fetched and nothing runs, whatever stood in a file.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>What this site can offer</title>
<style>
:root { color-scheme: light dark; --ink: #22313a; --faint: #55656e; --line: #dfe5e8; --page: #f6f8f9; --card: #fff;
  --train: #0072b2; --validation: #e69f00; --test: #009e73; --bar: #6fa9af; --warn: #fdf1dc; --edge: #d9982b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaed; --faint: #a3b1b8; --line: #2f3d45; --page: #12191d;
  --card: #1b252b; --train: #4aa8e0; --validation: #f0b53c; --test: #2fc096; --bar: #4f8f96; --warn: #33290f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
p { margin: .25rem 0 .5rem; max-width: 48rem; }
section, .figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 1.1rem 1.25rem 1.25rem; margin-top: 1rem; overflow-x: auto; }
.stays { background: var(--warn); border-left: 4px solid var(--edge); border-radius: 4px; padding: .5rem .9rem;
  margin: 0 0 1rem; max-width: none; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem; margin: 1.25rem 0 0; }
.figure { padding: .8rem 1.1rem; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.figure dd { margin: 0; font-size: 1.9rem; font-weight: 650; line-height: 1.2; }
.figure dt, .note { color: var(--faint); font-size: .875rem; }
.columns { columns: 26rem; column-gap: 1rem; margin-top: 1rem; }
.columns section { break-inside: avoid; margin: 0 0 1rem; }
.columns td:last-child { width: 7rem; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-top: 1px solid var(--line); vertical-align: middle; }
thead th, thead td { border: 0; font-weight: 500; color: var(--faint); font-size: .875rem; white-space: nowrap; }
tbody th { font-weight: 500; overflow-wrap: anywhere; min-width: 7rem; }
tfoot th, tfoot td { font-weight: 650; }
td.number, thead .number { white-space: nowrap; text-align: right; width: 4.5rem; padding-right: 1.5rem; }
td.bars { min-width: 8rem; white-space: nowrap; }
td.bars span { display: inline-block; min-width: 3em; }
td.none { color: var(--faint); }
i { display: inline-block; height: .6rem; border-radius: 2px; background: var(--bar); vertical-align: baseline; }
.train i { background: var(--train); } .validation i { background: var(--validation); }
.test i { background: var(--test); }
.class { margin: 0; padding: .7rem 0; border-top: 1px solid var(--line); display: grid; gap: .3rem 1rem;
  grid-template-columns: minmax(7rem, 11rem) 1fr; align-items: center; }
.class figcaption { overflow-wrap: anywhere; font-weight: 500; }
.class div { display: flex; flex-wrap: wrap; gap: .4rem; }
.class img { width: 84px; height: 84px; object-fit: contain; background: #000; border-radius: 4px; }
.class img.small { image-rendering: pixelated; }
code { font-family: ui-monospace, monospace; font-size: .9em; }
@media (max-width: 36rem) { .class { grid-template-columns: 1fr; } }
@media print { section, .figure { break-inside: avoid; } body { background: none; } }
</style>
</head>
"""


def write_page(path: Path, folder: Path, catalogue: Catalogue, figures: Mapping[str, Any]) -> None:
    """Write a site's page: whole or not at all, readable by its owner alone.

    The page needs no network and no script. Nothing on it says who a patient is or where a file lies; but it shows
    pictures, a few of each class, each of another patient, from the site's pixel cache.

    Parameters
    ----------
    path : Path
        Where to write.
    folder : Path
        The site's.
    catalogue : Catalogue
        The site's, open.
    figures : mapping
        As `client.data.report.offer` returns them.

    Raises
    ------
    DataError
        The file cannot be written there, or the pixel cache is damaged.
    """
    write_private(path, "".join(_page(folder, catalogue, figures)))


def _page(folder: Path, catalogue: Catalogue, figures: Mapping[str, Any]) -> Iterator[str]:
    had = contents(catalogue)
    yield _HEAD
    yield "<body><main>\n<h1>What this site can offer</h1>\n"
    yield '<p class="stays"><strong>This page shows patients&rsquo; images. It must stay at this site.</strong></p>\n'
    for sentence in statement(dict(figures)):
        yield f"<p>{_code(sentence)}</p>\n"
    yield _headline(figures)
    if figures["classes"]:
        yield _classes(figures)
        yield from _thumbnails(folder, catalogue, len(figures["classes"]))
    yield '<div class="columns">\n'
    if figures["shots_by_ways"]:
        yield _episodes(figures)
    for title, name in (("Scanners", "scanner"), ("Modalities", "modality")):
        counts = figures["scanners" if name == "scanner" else "modalities"]
        if counts:
            yield f"<section><h2>{title}</h2>{_table((name, 'pictures'), counts)}</section>\n"
    if had["refused"]:
        yield f"<section><h2>Files refused</h2>{_table(('reason', 'files'), had['refused'])}</section>\n"
    if had["aside"]:
        table = _table(("reason", "pictures"), had["aside"], ADVICE)
        yield f"<section><h2>Pictures set aside</h2>{table}</section>\n"
    yield "</div>\n</main></body></html>\n"


def _headline(figures: Mapping[str, Any]) -> str:
    best = str(figures["shots_by_ways"].get("2", "none"))
    headline = {
        "pictures ready": f"{figures['pictures']:,}",
        "patients": f"{sum(figures['patients'].values()):,}",
        "classes": f"{len(figures['classes']):,}",
        "scanners named": f"{sum(map(bool, figures['scanners'])):,}",
        "largest K at 2 ways": best,
    }
    boxes = "".join(f'<div class="figure"><dt>{name}</dt><dd>{value}</dd></div>' for name, value in headline.items())
    return f'<dl class="figures">{boxes}</dl>\n'


def _classes(figures: Mapping[str, Any]) -> str:
    """Return the table of classes; all bars have one scale."""
    classes = figures["classes"]
    most = max(max(about["patients"].values()) for about in classes.values())
    rows = []
    for name, about in classes.items():
        splits = "".join(
            f'<td class="bars {split}"><span>{about["patients"][split]:,}</span>'
            f"{_bar(about['patients'][split], most, 4.5)}</td>"
            for split in SPLITS
        )
        shots = about["largest_shots"]
        largest = f'<td class="number">{shots:,}</td>' if shots else '<td class="number none">none</td>'
        rows.append(
            f'<tr><th scope="row">{text(name)}</th><td class="number">{about["pictures"]:,}</td>{splits}{largest}</tr>'
        )
    sums = "".join(f"<td>{figures['patients'][split]:,}</td>" for split in SPLITS)
    head = (
        '<th scope="col">class</th><th scope="col" class="number">pictures</th><th scope="col">patients: train</th>'
        '<th scope="col">validation</th><th scope="col">test</th><th scope="col" class="number">largest K</th>'
    )
    return (
        '<section><h2>Classes</h2><p class="note">Patients by class and split. Largest K: shots of a training episode, '
        "each of another patient; at most half of a class&rsquo;s training patients support, the others query.</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        f'<tfoot><tr><th scope="row">all</th><td class="number">{figures["pictures"]:,}</td>{sums}<td></td></tr>'
        "</tfoot></table></section>\n"
    )


def _episodes(figures: Mapping[str, Any]) -> str:
    # Of several ways with the same K, the most say it all.
    most = {shots: ways for ways, shots in figures["shots_by_ways"].items()}
    table = _table(("ways", "largest K"), {f"up to {ways}": shots for shots, ways in most.items()})
    return f"<section><h2>Training episodes</h2>{table}</section>\n"


def _table(head: tuple[str, str], counts: Mapping[str, int], advice: Mapping[str, str] | None = None) -> str:
    """Return a table of names, numbers and bars, the first rows of it."""
    top = max(counts.values())
    rows = [
        f'<tr><th scope="row">{text(name) or "not said"}'
        + (f'<br><span class="note">{_code(advice[name])}</span>' if advice and name in advice else "")
        + f'</th><td class="number">{number:,}</td><td>{_bar(number, top, 7)}</td></tr>'
        for name, number in islice(counts.items(), _ROWS)
    ]
    rest = list(counts.values())[_ROWS:]
    more = f'<p class="note">and {len(rest):,} more, together {sum(rest):,}</p>' if rest else ""
    columns = f'<th scope="col">{head[0]}</th><th scope="col" class="number">{head[1]}</th><td></td>'
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}"


def _bar(value: int, most: int, width: float) -> str:
    """Return a bar that is ``width`` em long for ``most``; what is there can be seen."""
    length = max(width * value / most, 0.15) if value else 0
    return f'<i aria-hidden="true" style="width:{length:.2f}em"></i>' if length else ""


def _thumbnails(folder: Path, catalogue: Catalogue, classes: int) -> Iterator[str]:
    recipe = _largest(folder, catalogue)
    yield "<section><h2>Pictures</h2>"
    if recipe is None:
        yield (
            "<p>No pixels are prepared, so there are no thumbnails here: run <code>wardround-site index</code> with "
            "<code>--study</code>, then make this page again.</p></section>\n"
        )
        return
    size = " &times; ".join([str(recipe.size)] * recipe.dimensions)
    yield (
        f'<p class="note">Up to {_EACH} of each class, each of another patient, as a study gets them: {size} pixels'
        + (", the middle slice" if recipe.dimensions > 2 else "")
        + (f"; the first {_SHOWN} of {classes:,} classes" if classes > _SHOWN else "")
        + ".</p>"
    )
    one = catalogue.database.execute
    last = one("SELECT max(slot) FROM cached WHERE recipe = ?", (recipe.digest,)).fetchone()[0]
    pixels = mapped(folder, recipe, last)
    # Patients are keyed hashes: their order is as good as drawn, and the same each time. Training ones come first, so
    # that whoever looks at the page has seen the fewest test pictures.
    rows = one(
        "SELECT label, min(slot) FROM image JOIN cached USING (slot) WHERE recipe = ? AND aside IS NULL "
        "GROUP BY label, patient ORDER BY label, min(split <> 'train'), patient",
        (recipe.digest,),
    )
    small = ' class="small"' if recipe.size < _SIDE // 2 else ""
    for label, chosen in islice(groupby(rows, key=lambda row: str(row[0])), _SHOWN):
        name = text(label)
        images = "".join(
            f'<img{small} alt="{name}, example {number}" src="data:image/png;base64,{png(pixels[slot - 1], _SIDE)}">'
            for number, (_, slot) in enumerate(islice(chosen, _EACH), 1)
        )
        yield f'<figure class="class"><figcaption>{name}</figcaption><div>{images}</div></figure>\n'
    yield "</section>\n"


def _largest(folder: Path, catalogue: Catalogue) -> Recipe | None:
    """Return the recipe of the cache whose pictures show most, or None without one."""
    filled = {name for (name,) in catalogue.database.execute("SELECT DISTINCT recipe FROM cached")}
    there = [r for r in caches(folder) if r.digest in filled and (folder / "cache" / r.digest / "pixels.raw").exists()]
    return max(there, key=lambda r: (-r.dimensions, r.size, r.channels, r.digest), default=None)


def _code(sentence: str) -> str:
    """Return a sentence of ours, in which names from files can stand; what is between backticks is code."""
    parts = text(sentence).split("`")
    return "".join(f"<code>{part}</code>" if k % 2 else part for k, part in enumerate(parts))
