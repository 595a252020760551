"""Virtual hospitals on disk: one site folder per partition, indexed by the same code as a real hospital's."""

import hashlib
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.catalogue import Split
from client.data.image import Recipe
from client.data.index import Plan, index
from client.data.labels import Labels
from client.data.pool import no_main_module
from client.data.store import Site, open_site
from client.data.worker import read
from client.devices import cpu_cores
from client.session import virtual_site
from common.errors import DataError
from common.study import Study
from simulations import medmnist, partitions
from simulations.phantoms import LESIONS, SCANNERS, write_hospital
from simulations.public import LabelledImages, load

__all__ = ["census", "prepare"]

#: Called with a line of text after every finished site.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Source:
    """A virtual hospital's own files, before they are indexed."""

    origin: str
    images: Path
    labels: Path | None


def prepare(study: Study, progress: Progress = lambda _: None) -> list[Site]:
    """Write the site folders of a study that do not exist yet, and open all of them.

    Raises
    ------
    DataError
        The data source cannot be read, or does not fit the partition or the network.
    """
    recipe = Recipe.of(study.model)
    todo = [i for i in range(study.data.sites) if not virtual_site(study, i).exists()]
    if todo:
        virtual_site(study, 0).parent.mkdir(parents=True, exist_ok=True)
        # Another preparation may be at work: each has a folder of its own, and the first to end wins.
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=virtual_site(study, 0).parent) as name:
            for number, source in _sources_on_disk(study, todo, Path(name)):
                work = Path(name) / f"site-{number}"
                counts = index(
                    Plan(
                        work,
                        [source.images],
                        [recipe],
                        Labels(source.labels, {}) if source.labels else None,
                        split=Split(study.data.validation_fraction, study.data.test_fraction),
                        name=f"hospital-{number}",
                        number=number,
                        key=hashlib.sha256(f"virtual site {study.data_digest} {number}".encode()).digest(),
                        leave_out_shared=True,
                        workers=cpu_cores(),
                    )
                )
                if counts.refused:
                    raise DataError(
                        f"hospital-{number}: {counts.refused} of {counts.files} files were refused "
                        f"({counts.refusals[0][1].value}): check model.dimensions and the data source"
                    )
                site = open_site(work, recipe)
                if not virtual_site(study, number).exists():
                    os.replace(work, virtual_site(study, number))
                progress(f"hospital-{number}: {len(site.labels)} images, {source.origin}")
    return [open_site(virtual_site(study, i), recipe) for i in range(study.data.sites)]


def census(study: Study, sites: list[Site]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the images ``[sites, classes]`` of the study's classes, held-out ones last, and the class names."""
    classes = study.episodes.class_names + study.episodes.held_out_names
    counts = [
        [int((site.labels == site.label_names.index(c)).sum()) if c in site.label_names else 0 for c in classes]
        for site in sites
    ]
    return np.array(counts, np.int64), classes


def _sources_on_disk(study: Study, wanted: list[int], folder: Path) -> Iterator[tuple[int, _Source]]:
    """Yield the virtual hospitals' files, one hospital at a time; they go when the next one is asked for."""
    if study.data.source == "phantoms":
        yield from _phantoms(study, wanted, folder)
        return
    for number, (origin, data) in enumerate(_partition(study)):
        if number not in wanted:
            continue
        path = folder / f"images-{number}.npz"
        label_names = np.array(data.label_names)
        np.savez(path, images=data.images, labels=data.labels, groups=data.groups, label_names=label_names)
        yield number, _Source(origin, path, None)
        path.unlink()


def _phantoms(study: Study, wanted: list[int], folder: Path) -> Iterator[tuple[int, _Source]]:
    """Write hospitals of real DICOM files; the next ones while the first is indexed.

    Each has patients of its own, and a scanner of its own or, with the partition ``iid``, the same one as all others.
    """
    if study.data.partition not in {"natural", "iid"}:
        raise DataError("phantoms have a scanner a hospital, or the same one: data.partition is 'natural' or 'iid'")
    scanners = SCANNERS if study.data.partition == "natural" else SCANNERS[:1]
    lesions = study.episodes.class_names + study.episodes.held_out_names
    if unknown := set(lesions) - set(LESIONS):
        raise DataError(f"no phantom lesion is called {sorted(unknown)}; there are: {', '.join(LESIONS)}")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([read.__module__, write_hospital.__module__])  # the indexer's processes come from it
    with no_main_module(), ProcessPoolExecutor(cpu_cores(), mp_context=context) as pool:
        written: dict[int, Future[int]] = {
            number: pool.submit(
                write_hospital,
                folder / f"archive-{number}",
                scanner=scanners[number % len(scanners)],
                lesions=lesions,
                patients_per_lesion=study.data.patients_per_class,
                seed=study.data.seed + number,
                size=2 * study.model.image_size,
            )
            for number in wanted
        }
        for number, done in written.items():
            done.result()
            scanner, archive = scanners[number % len(scanners)], folder / f"archive-{number}"
            origin = f"{scanner.modality} phantoms ({scanner.name})"
            yield number, _Source(origin, archive / "dicom", archive / "labels.csv")
            shutil.rmtree(archive)


def _partition(study: Study) -> list[tuple[str, LabelledImages]]:
    """Return every site's origin and images."""
    data = study.data
    sets = [(source, _load(source, study.model.image_size)) for source in _sources(study)]
    if data.partition == "natural":
        sites = [part for source, images in sets for part in _natural(source, images)]
        if len(sites) != data.sites:
            raise DataError(
                f"the data have {len(sites)} sites of their own ({', '.join(s for s, _ in sites)}): "
                f"set data.sites = {len(sites)}, or choose another data.partition"
            )
        return sites
    if len(sets) > 1:
        raise DataError("several data sources are one site each: use data.partition = 'natural'")
    (source, images) = sets[0]
    generator = np.random.default_rng([data.seed, 1])
    if data.partition == "dirichlet":
        site_of = partitions.dirichlet(images, sites=data.sites, alpha=data.alpha, generator=generator)
    elif data.partition == "quantity":
        site_of = partitions.quantity(images, sites=data.sites, alpha=data.alpha, generator=generator)
    elif data.partition == "pathological":
        site_of = partitions.pathological(
            images, sites=data.sites, classes_per_site=data.classes_per_site, generator=generator
        )
    else:
        site_of = partitions.iid(images, sites=data.sites, generator=generator)
    parts = partitions.split_by_site(images, site_of)
    if data.partition == "scanner":
        parts = [
            replace(p, images=partitions.scanner_shift(p.images, site=i, strength=data.alpha, generator=generator))
            for i, p in enumerate(parts)
        ]
    return [(f"{source}, {data.partition} part {i}", part) for i, part in enumerate(parts)]


def _sources(study: Study) -> list[str]:
    return [part.strip() for part in study.data.source.split(",") if part.strip()]


def _load(source: str, image_size: int) -> LabelledImages:
    """Load a set; of one that is published in several sizes, the smallest that loses nothing."""
    kind, _, name = source.partition(":")
    if kind != "medmnist" or name not in medmnist.SETS:
        return load(source)
    sizes = sorted(medmnist.SETS[name].md5)
    return load(source, size=next((side for side in sizes if side >= image_size), sizes[-1]))


def _natural(source: str, images: LabelledImages) -> list[tuple[str, LabelledImages]]:
    if images.sites is None:
        return [(source, images)]
    parts = partitions.split_by_site(images, partitions.by_site(images))
    return list(zip(images.site_names, parts, strict=True))
