"""An adapted model on any number of images: one record an image, written as it goes, then one a patient.

Records are written in whole batches of whole files, so that a run that is stopped loses one batch, and the next run
goes on where it ended. Memory grows with nothing but the names of the files that are done, and the patients.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapt.familiar import grey_share
from client.adapt.folder import AdaptedModel
from client.data.episodes import network_input
from client.data.keys import keyed
from client.data.picture import Reading, Reason
from client.data.pool import TOO_SLOW, Failure, run_in_workers
from client.data.walk import walk
from client.data.worker import Entry, Task, Work, read
from client.records import KINDS, Table

__all__ = ["Counts", "judge", "pictures", "predict", "reports", "write_patients"]

#: Images that are predicted and written at once.
_BATCH = 256


@dataclass
class Counts:
    """How far a run is, in files."""

    done: int = 0
    before: int = 0
    refused: int = 0
    images: int = 0


def predict(
    model: AdaptedModel,
    key: bytes,
    paths: Sequence[Path],
    out: Path,
    *,
    skip: Path,
    workers: int,
    seconds: float = 60.0,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Counts:
    """Append a record for every image under some folders that has none yet.

    Parameters
    ----------
    key : bytes
        The site's: patients are keyed hashes in the records.
    out : Path
        ``.csv``, or ``.jsonl``.
    skip : Path
        A folder that is not looked into: the site's own.
    workers, seconds
        Processes that read, and the longest time for one file.
    progress : callable
        Called after every batch.
    """
    table = Table(out, model.classes, model.digest)
    counts = Counts(before=len(table.files))
    todo = (path for path in _files(paths, skip) if not table.has(str(path)))
    with _reading(model, key, todo, workers, seconds) as results:
        for batch in _batches(results):
            table.append(_records(model, batch))
            counts.done += len(batch)
            counts.refused += sum(isinstance(found, Reason) for _, found in batch)
            counts.images += sum(len(found) for _, found in batch if isinstance(found, list))
            progress(counts)
    return counts


def pictures(
    model: AdaptedModel,
    key: bytes,
    paths: Sequence[Path],
    *,
    skip: Path,
    most: int,
    workers: int,
    seconds: float = 60.0,
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Return the first images under some folders by name, prepared; files that cannot be read are left out."""
    out: list[tuple[str, NDArray[np.uint8]]] = []
    with _reading(model, key, _files(paths, skip), workers, seconds) as results:
        for task, entries in results:
            found = _found(entries)
            for entry in found if isinstance(found, list) else []:
                values = np.frombuffer(entry.pixels[0] or b"", np.uint8).reshape(model.recipe.shape)
                out.append((task.name if entry.frame == 0 else f"{task.name}, frame {entry.frame}", values))
            if len(out) >= most:
                break
    return out[:most]


def reports(
    model: AdaptedModel,
    key: bytes,
    paths: Sequence[Path],
    out: Path,
    *,
    skip: Path,
    workers: int,
    seconds: float = 60.0,
    progress: Callable[[Counts], None] = lambda _: None,
) -> Counts:
    """Write a DICOM structured report into ``out`` for every DICOM file under some folders that has none yet.

    A report is named by the keyed hash of its file's path. Files that are no DICOM, or cannot be read, count as
    refused.
    """
    import pydicom

    from client.structured import structured_report, write_report

    out.mkdir(parents=True, exist_ok=True, mode=0o700)

    def target(path: str) -> Path:
        return out / f"{keyed(key, 'path', path).hex()}.dcm"

    counts = Counts()
    found = list(_files(paths, skip))
    counts.before = sum(target(str(path)).exists() for path in found)
    todo = (path for path in found if not target(str(path)).exists())
    with _reading(model, key, todo, workers, seconds) as results:
        for batch in _batches(results):
            records = list(_records(model, batch))
            for name, entries in batch:
                counts.done += 1
                own = [record for record in records if record["file"] == name and not record["reason"]]
                try:
                    source = pydicom.dcmread(name, stop_before_pixels=True) if own else None
                except (pydicom.errors.InvalidDicomError, OSError):
                    source = None
                if source is None or isinstance(entries, Reason):
                    counts.refused += 1
                else:
                    write_report(target(name), structured_report(model, source, own))
                    counts.images += len(own)
            progress(counts)
    return counts


def write_patients(out: Path, model: AdaptedModel) -> Path:
    """Write one record a patient beside the images' records: the mean of its images' probabilities and bounds.

    The conformal set is that of the mean probability; its coverage was calibrated for single images.
    """
    sums: dict[str, _Sum] = {}
    for record in Table(out, model.classes, model.digest).records():
        if record["patient"] and not record["reason"]:
            values = np.array([[float(record[f"{kind} {name}"]) for name in model.classes] for kind in KINDS])
            own = sums.setdefault(record["patient"], _Sum(np.zeros_like(values)))
            own.values += values
            own.images += 1
            own.unlike += int(str(record["unlike"]) in {"True", "true", "1"})
    path = out.with_name(f"{out.stem}.patients{out.suffix}")
    path.unlink(missing_ok=True)
    table = Table(path, model.classes, model.digest, first=("patient", "images"))
    table.append(
        {
            "patient": who,
            "images": own.images,
            **_judged(model, own.values / own.images),
            "unlike": own.unlike * 2 > own.images,
        }
        for who, own in sums.items()
    )
    return path


@dataclass
class _Sum:
    values: np.ndarray[Any, np.dtype[np.float64]]
    images: int = 0
    unlike: int = 0


Found = list[Entry] | Reason


def _files(paths: Sequence[Path], skip: Path) -> Iterator[Path]:
    return (found.path for path in paths for found in walk(path.resolve(), skip=skip))


def _reading(
    model: AdaptedModel, key: bytes, files: Iterable[Path], workers: int, seconds: float
) -> "closing[Generator[tuple[Task, Iterator[Any]]]]":
    """Return what processes of their own read from some files, prepared for the model."""
    work = partial(read, Work(key, Reading(), (model.recipe,)))
    tasks = (Task((path,), str(path)) for path in files)
    return closing(run_in_workers(work, tasks, workers=workers, seconds=seconds, preload=[read.__module__]))


def _batches(results: Iterable[tuple[Task, Iterator[Any]]]) -> Iterator[list[tuple[str, Found]]]:
    """Yield whole files, with about so many images at a time."""
    batch: list[tuple[str, Found]] = []
    images = 0
    for task, entries in results:
        found = _found(entries)
        batch.append((task.name, found))
        images += 1 if isinstance(found, Reason) else len(found)
        if images >= _BATCH:
            yield batch
            batch, images = [], 0
    if batch:
        yield batch


def _found(entries: Iterator[Any]) -> Found:
    kept: list[Entry] = []
    reason: Reason | None = None
    for entry in entries:  # to its end, whatever it holds
        if isinstance(entry, Failure):
            reason = Reason.TOO_SLOW if entry.kind == TOO_SLOW else Reason.CRASHED
        elif isinstance(entry, Reason):
            reason = entry
        else:
            kept.append(entry)
    return kept if reason is None else reason


def _records(model: AdaptedModel, batch: Sequence[tuple[str, Found]]) -> Iterator[dict[str, Any]]:
    pixels = [entry.pixels[0] or b"" for _, found in batch if isinstance(found, list) for entry in found]
    images = np.frombuffer(b"".join(pixels), np.uint8).reshape(len(pixels), *model.recipe.shape)
    judged = iter(judge(model, images))
    for name, found in batch:
        if isinstance(found, Reason):
            yield {"file": name, "frame": 0, "patient": "", "reason": found.value}
            continue
        for entry in found:
            who = entry.identifiers.get("PatientID", b"").hex()
            yield {"file": name, "frame": entry.frame, "patient": who, **next(judged), "reason": ""}


def judge(model: AdaptedModel, images: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Return what the records of prepared images ``[N, C, *]`` say of them."""
    if not len(images):
        return []
    x = network_input(images.copy())
    logits = model.classifier.logits(x)
    values = np.concatenate([model.calibration.probabilities(logits)[None], model.calibration.intervals(logits)])
    unlike = model.familiar.unlike(model.theta.features(x))
    if model.grey is not None:
        unlike |= np.array([(grey_share(image[None]) == 1) is not model.grey for image in images])
    return [{**_judged(model, values[:, i]), "unlike": bool(unlike[i])} for i in range(len(images))]


def _judged(model: AdaptedModel, values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Return the fields of probabilities, lower and upper bounds ``[3, C]``."""
    members = 1 - values[0] <= np.asarray(model.calibration.thresholds)
    fields = {
        f"{kind} {name}": round(float(v), 4)
        for row, kind in zip(values, KINDS, strict=True)
        for v, name in zip(row, model.classes, strict=True)
    }
    held = ";".join(name for name, member in zip(model.classes, members, strict=True) if member)
    return {"class": model.classes[int(values[0].argmax())], "set": held, **fields}
