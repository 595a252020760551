"""`python -m simulations.bench.ingest`: from files to episodes, beside the loop that everybody writes.

Files of 512 x 512 pixels are read, checked, catalogued and prepared by the indexer, and, in turns with it, read and
resized by plain loops in one process. The first is as everybody writes it. The second takes the indexer's decoder,
which need not be pydicom's first choice. The third runs once for each core at the same time: all that this machine can
give. The fourth resizes by the indexer's own code instead of Pillow's. The fifth takes not the stored numbers but what
the header says that a display shows, as the indexer does. Then memory, with ten times as many files; then episodes from
the cache.
"""

import json
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import pydicom
import typer
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless
from rich.console import Console
from rich.table import Table

from client.data.catalogue import Split
from client.data.dicom import TRANSFER_SYNTAXES
from client.data.episodes import draw, make_pool
from client.data.image import Recipe, prepare
from client.data.index import Plan, index
from client.data.labels import Labels
from client.data.store import open_site
from common.console import plain_errors
from common.study import Episodes
from simulations.phantoms import SCANNERS, write_hospital

__all__ = ["app"]

# With so many times the patients that every one takes seconds: starting processes is not what is measured.
_SYNTAXES = {
    "uncompressed": (ExplicitVRLittleEndian, 16),
    "JPEG 2000": (JPEG2000Lossless, 1),
    "JPEG-LS": (JPEGLSLossless, 4),
}
_RECIPE = Recipe(1, 64)
_CLASSES = "abcdefghij"

# In the order in which they are measured, and as they are called; the first two are what the others are set against.
_WAYS = {
    "plain": "loop",
    "same_decoder": "loop, the indexer's decoder",
    "at_once": "loops at once",
    "own_resize": "loop, the indexer's resize",
    "displayed": "loop, as displayed",
    "indexed": "indexer",
}
_BASES = ("plain", "same_decoder")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="wardround-ingest-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plain(archive: Path, *, same_decoder: bool = False, pillow: bool = True, display: bool = False) -> int:
    """Read and resize every file in a loop, as a notebook would.

    Parameters
    ----------
    archive : Path
        Folder of the files.
    same_decoder : bool
        Decode as the indexer does.
    pillow : bool
        Resize by Pillow, which gives what the indexer's `prepare` does, but for rounding; otherwise by that.
    display : bool
        Apply rescale and window, as the header says.
    """
    out = []
    for path in sorted(archive.rglob("*.dcm")):
        dataset = pydicom.dcmread(path)
        if same_decoder:
            dataset.pixel_array_options(decoding_plugin=TRANSFER_SYNTAXES[dataset.file_meta.TransferSyntaxUID])
        pixels = dataset.pixel_array
        if display:
            pixels = apply_voi_lut(apply_modality_lut(pixels, dataset), dataset)
        grey: NDArray[np.float32] = pixels.astype(np.float32)
        grey -= grey.min()
        grey /= grey.max() or 1.0
        if pillow:
            image = Image.fromarray(grey).resize((_RECIPE.size, _RECIPE.size), Image.Resampling.BILINEAR)
            out.append((np.asarray(image) * 255).round().astype(np.uint8))
        else:
            out.append(prepare(grey, _RECIPE))
    return len(out)


def throughput(names: Iterable[str], patients: int, rounds: int, workers: int) -> dict[str, Any]:
    """Return files per second of the plain loops and of the indexer, and their ratios, for some transfer syntaxes."""
    results = {}
    for name in names:
        syntax, times = _SYNTAXES[name]
        spawn = multiprocessing.get_context("spawn")
        with _scratch() as folder, ProcessPoolExecutor(workers, mp_context=spawn) as loops:
            scanner = replace(SCANNERS[0], transfer_syntax=syntax)
            lesions = ("disc", "ring")
            write_hospital(
                folder, scanner=scanner, lesions=lesions, patients_per_lesion=times * patients, seed=0, size=512
            )
            speeds: dict[str, list[float]] = {way: [] for way in _WAYS}
            archive = folder / "dicom"
            for turn in range(rounds + 1):
                site, labels = folder / f"site-{turn}", Labels(folder / "labels.csv", {})
                marks = [time.perf_counter()]
                files = _plain(archive)
                marks.append(time.perf_counter())
                _plain(archive, same_decoder=True)
                marks.append(time.perf_counter())
                list(loops.map(partial(_plain, same_decoder=True), [archive] * workers))
                marks.append(time.perf_counter())
                _plain(archive, pillow=False)
                marks.append(time.perf_counter())
                _plain(archive, display=True)
                marks.append(time.perf_counter())
                counts = index(Plan(site, [archive], [_RECIPE], labels, workers=workers))
                marks.append(time.perf_counter())
                if counts.read != files:
                    raise RuntimeError(f"{counts.refused} of {files} files were refused")
                if turn:  # the first turn warms the page cache and starts the fork server
                    for way, (began, ended) in zip(speeds, pairwise(marks), strict=True):
                        speeds[way].append((workers if way == "at_once" else 1) * files / (ended - began))
            results[name] = {
                "files": files,
                **{f"{way}_per_second": median(rates) for way, rates in speeds.items()},
                **{f"times_{base}": {way: _spread(speeds[way], speeds[base]) for way in _WAYS} for base in _BASES},
            }
    return results


def _spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def memory(files: int, workers: int) -> dict[str, Any]:
    """Index many small files in a process of its own; return seconds and the most memory of it, without its workers."""
    with _scratch() as folder:
        _many(folder / "dicom", files)
        # In a process of its own, for a peak of its own.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            done, seconds, peak = pool.submit(_index_small, folder, workers).result()
        if done != files:
            raise RuntimeError(f"{files - done} of {files} files were refused")
    return {"files": files, "seconds": seconds, "peak_bytes": peak}


def _index_small(folder: Path, workers: int) -> tuple[int, float, int]:
    began = time.perf_counter()
    counts = index(Plan(folder / "site", [folder / "dicom"], [Recipe(1, 16)], workers=workers))
    return counts.read, time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _many(folder: Path, count: int) -> None:
    """Write small files that differ in patient, instance and pixels: copies of one with some bytes changed."""
    with _scratch() as scratch:
        write_hospital(scratch, scanner=SCANNERS[0], lesions=("disc",), patients_per_lesion=1, seed=0, size=16)
        path = min((scratch / "dicom").rglob("*.dcm"))
        dataset, whole = pydicom.dcmread(path), path.read_bytes()
    patient, instance = dataset.PatientID.encode(), dataset.SOPInstanceUID.encode()
    end = len(whole) - 8
    for number in range(count):
        if number % 100 == 0:
            place = folder / f"{number // 100:05d}"
            place.mkdir(parents=True)
        data = whole.replace(patient, f"{number // 4:0{len(patient)}d}".encode())
        data = data.replace(instance, instance[:-9] + f"{number + 10**8:09d}".encode())
        (place / f"{number % 100:02d}.dcm").write_bytes(
            data[:end] + (number % 2**24).to_bytes(4, "little") + data[end + 4 :]
        )


def episodes(images: int, rounds: int) -> dict[str, Any]:
    """Return 64 x 64 images per second that come from the cache as episodes, from one process."""
    with _scratch() as folder:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (images, 64, 64), np.uint8)
        path, labels = folder / "set.npz", np.arange(images) % len(_CLASSES)
        groups = [f"{n // 4}" for n in range(images)]
        np.savez(path, images=pixels, labels=labels, groups=groups, label_names=list(_CLASSES))
        index(Plan(folder / "site", [path], [_RECIPE], split=Split(0.0, 0.1)))
        path.unlink()
        site = open_site(folder / "site", _RECIPE)
        (file,) = (folder / "site").glob("cache/*/pixels.raw")
        spec = Episodes(classes=",".join(_CLASSES), held_out="", ways=5, shots=5, queries=15)
        pool = make_pool(site, spec.class_names, 0, ("train",))
        speeds: dict[str, list[float]] = {"cold": [], "warm": []}
        for turn in range(rounds):
            for state in ("cold", "warm"):
                if state == "cold":
                    _forget(file)
                    site = open_site(folder / "site", _RECIPE)
                generator = np.random.default_rng(turn)
                began, drawn = time.perf_counter(), 0
                while drawn < images // 4:
                    batch = draw(site, pool, spec, 8, generator)
                    drawn += batch.support.x.shape[0] * (batch.support.x.shape[1] + batch.query.x.shape[1])
                speeds[state].append(drawn / (time.perf_counter() - began))
    return {s: {"median": median(v), "min": min(v), "max": max(v)} for s, v in speeds.items()}


def _forget(file: Path) -> None:
    """Throw a file out of the page cache."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@app.command(epilog="Example: python -m simulations.bench.ingest --parts throughput,episodes")
@plain_errors
def main(
    parts: Annotated[str, typer.Option(help="Of throughput, memory, episodes.")] = "throughput,memory,episodes",
    syntaxes: Annotated[str, typer.Option(help="For throughput: of uncompressed, JPEG 2000, JPEG-LS.")] = ",".join(
        _SYNTAXES
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Few files: does the benchmark work?")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the indexer.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each measurement.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure indexing against a plain loop, its memory, and how fast episodes come from the cache."""
    measures: dict[str, Callable[[], Any]] = {
        "throughput": lambda: throughput(names, 2 if quick else 60, rounds, workers),
        "memory": lambda: [memory(n, workers) for n in ((20, 60) if quick else (10_000, 100_000))],
        "episodes": lambda: episodes(2_000 if quick else 50_000, rounds),
    }
    chosen = [part.strip() for part in parts.split(",")]
    if unknown := set(chosen) - set(measures):
        raise typer.BadParameter(f"there is no part {sorted(unknown)}: use {', '.join(measures)}")
    names = [name.strip() for name in syntaxes.split(",")]
    if unknown := set(names) - set(_SYNTAXES):
        raise typer.BadParameter(f"there is no syntax {sorted(unknown)}: use {', '.join(_SYNTAXES)}")
    results = {part: measures[part]() for part in chosen}
    console = Console(width=110)
    if rates := results.get("throughput"):
        table = Table("files", "way", "files/s", "times the loop", "times the loop, the indexer's decoder")
        for syntax, r in rates.items():
            for way, name in _WAYS.items():
                spreads = [r[f"times_{base}"][way] for base in _BASES]
                ratios = [f"{s['median']:.2f} ({s['min']:.2f} .. {s['max']:.2f})" for s in spreads]
                table.add_row(syntax, name, f"{r[f'{way}_per_second']:.0f}", *ratios, end_section=way == "indexed")
        console.print(table)
    if sizes := results.get("memory"):
        table = Table("small files", "s", "files/s", "peak MB of the indexer")
        for r in sizes:
            speed = r["files"] / r["seconds"]
            table.add_row(f"{r['files']:,}", f"{r['seconds']:.0f}", f"{speed:.0f}", f"{r['peak_bytes'] / 1e6:.1f}")
        console.print(table)
    if speeds := results.get("episodes"):
        table = Table("page cache", "64 x 64 images/s in episodes", "min .. max")
        for state, r in speeds.items():
            table.add_row(state, f"{r['median']:,.0f}", f"{r['min']:,.0f} .. {r['max']:,.0f}")
        console.print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app()
