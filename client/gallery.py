"""A page of predictions for whoever wants to look: pictures, probabilities, and where a picture's class comes from.

It holds patients' images, and so it stays at the site.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.adapt.folder import AdaptedModel
from client.data.episodes import network_input
from client.data.html import png, text, write_private
from client.predict import judge

__all__ = ["LARGEST", "occlusion", "write_gallery"]

#: Pictures on one page.
LARGEST = 200
#: A square that hides part of a picture has this share of its side, and moves by half of it.
_SHARE = 0.25
_SIDE = 192

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Predictions</title>
<style>
:root { color-scheme: light dark; --line: #8884; --bar: #6fa9af; --warn: #d9982b; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem; font: 15px/1.45 system-ui, sans-serif; }
.stays { border-left: 4px solid var(--warn); padding: .4rem .9rem; }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
figure img { width: 9.2rem; height: 9.2rem; image-rendering: pixelated; background: #000; border-radius: 4px; }
figcaption { overflow-wrap: anywhere; font-size: .8rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: .1rem .3rem; white-space: nowrap; } td:first-child { overflow-wrap: anywhere; white-space: normal; }
td.bar { width: 40%; } i { display: block; height: .6rem; border-radius: 2px; background: var(--bar); }
.unlike { color: var(--warn); font-weight: 600; }
</style></head>
"""


def occlusion(model: AdaptedModel, pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return ``[H, W]``: by how much the top class's probability falls where a square hides the picture, 0 or more.

    The square has the picture's mean colour. A pixel's value is the mean over the squares that hid it.

    Parameters
    ----------
    pixels : ndarray
        One prepared picture ``[C, H, W]``; of a volume ``[C, D, H, W]`` a square hides the same place in all slices.

    References
    ----------
    Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks", 2014, section 4.2.
    """
    x = network_input(pixels[None].copy())
    size = x.shape[-1]
    side = max(1, round(size * _SHARE))
    starts = sorted({*range(0, size - side + 1, max(1, side // 2)), size - side})
    mean = x.mean(tuple(range(2, x.dim())), keepdim=True)
    places = [(row, column) for row in starts for column in starts]
    hidden = x.repeat(len(places), *[1] * (x.dim() - 1))
    for at, (row, column) in enumerate(places):
        hidden[at, ..., row : row + side, column : column + side] = mean[0, ..., 0, 0, None, None]
    p = model.calibration.probabilities(model.classifier.logits(torch.cat([x, hidden])))
    top = int(p[0].argmax())
    total, count = np.zeros((size, size)), np.zeros((size, size))
    for fall, (row, column) in zip(p[0, top] - p[1:, top], places, strict=True):
        total[row : row + side, column : column + side] += fall
        count[row : row + side, column : column + side] += 1
    return np.asarray(np.maximum(total / count, 0))


def write_gallery(path: Path, model: AdaptedModel, named: Sequence[tuple[str, NDArray[np.uint8]]]) -> None:
    """Write the page of up to `LARGEST` named pictures, readable by its owner alone; it needs no network, no script."""
    write_private(path, "".join(_page(model, named[:LARGEST])))


def _page(model: AdaptedModel, named: Sequence[tuple[str, NDArray[np.uint8]]]) -> Iterator[str]:
    yield _HEAD
    yield "<body><h1>Predictions</h1>\n"
    yield '<p class="stays"><strong>This page shows patients&rsquo; images. It must stay at this site.</strong></p>\n'
    if model.refusals:
        yield f'<p class="stays"><strong>DO NOT USE: {text("; ".join(model.refusals))}.</strong></p>\n'
    yield (
        "<p>Left: the picture as the network gets it. Right: where hiding a part of it lowers the probability of its "
        "top class, brightest where it falls most. It shows what the network looks at, not whether that is right.</p>"
        "<main>\n"
    )
    if named:
        records = judge(model, np.stack([pixels for _, pixels in named]))
        for (name, pixels), record in zip(named, records, strict=True):
            yield _figure(model, name, pixels, record)
    yield "</main></body></html>\n"


def _figure(model: AdaptedModel, name: str, pixels: NDArray[np.uint8], record: dict[str, object]) -> str:
    heat = occlusion(model, pixels)
    shade = (255 * heat / (heat.max() or 1)).round().astype(np.uint8)[None]
    images = "".join(
        f'<img alt="{alt}" src="data:image/png;base64,{png(values, _SIDE)}"> '
        for alt, values in (("picture", pixels), ("where it matters", shade))
    )
    rows = "".join(
        f"<tr><td>{text(c)}</td><td>{record[f'p {c}']:.2f} [{record[f'low {c}']:.2f}-{record[f'high {c}']:.2f}]</td>"
        f'<td class="bar"><i style="width:{float(str(record[f"p {c}"])):.0%}"></i></td></tr>'
        for c in sorted(model.classes, key=lambda c: -float(str(record[f"p {c}"])))
    )
    members = str(record["set"]).replace(";", ", ") or "no class"
    unlike = '<p class="unlike">unlike the images that the model was adapted to</p>' if record["unlike"] else ""
    held = f"the {model.calibration.coverage:.0%} set is {{{text(members)}}}"
    return f"<figure>{images}<table>{rows}</table><p>{held}</p>{unlike}<figcaption>{text(name)}</figcaption></figure>\n"
