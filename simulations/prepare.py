"""Virtual hospitals on disk: one site folder per partition, read by the same code as a real hospital's."""

import csv
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.data.dicom import read_dicom
from client.data.image import Recipe, SourceImage
from client.data.store import Site, create_site, open_site
from client.session import virtual_site
from common.errors import DataError
from common.study import Study
from simulations import medmnist, partitions
from simulations.phantoms import LESIONS, SCANNERS, write_hospital
from simulations.public import LabelledImages, load

__all__ = ["VirtualSite", "census", "prepare"]

#: Called with a line of text after every finished site.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class VirtualSite:
    """A virtual hospital before its folder is written: what it was made from, and its images, one by one."""

    origin: str
    images: Iterator[SourceImage]


def prepare(study: Study, progress: Progress = lambda _: None) -> list[Site]:
    """Write the site folders of a study that do not exist yet, and open all of them.

    Raises
    ------
    DataError
        The data source cannot be read, or does not fit the partition or the network.
    """
    todo = [i for i in range(study.data.sites) if not virtual_site(study, i).exists()]
    if todo:
        recipe = Recipe(study.model.channels, study.model.image_size, study.model.dimensions)
        for index, site in _virtual_sites(study, set(todo)):
            key = hashlib.sha256(f"virtual site {study.data_digest} {index}".encode()).digest()
            count = create_site(
                virtual_site(study, index),
                site.images,
                index=index,
                name=f"hospital-{index}",
                key=key,
                recipe=recipe,
                test_fraction=study.data.test_fraction,
            )
            progress(f"hospital-{index}: {count} images, {site.origin}")
    return [open_site(virtual_site(study, i)) for i in range(study.data.sites)]


def census(study: Study, sites: list[Site]) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the images ``[sites, classes]`` of the study's classes, held-out ones last, and the class names."""
    classes = study.episodes.class_names + study.episodes.held_out_names
    counts = [
        [int((site.labels == site.label_names.index(c)).sum()) if c in site.label_names else 0 for c in classes]
        for site in sites
    ]
    return np.array(counts, np.int64), classes


def _virtual_sites(study: Study, wanted: set[int]) -> Iterator[tuple[int, VirtualSite]]:
    if study.data.source == "phantoms":
        for index in sorted(wanted):
            yield index, _phantom_site(study, index)
        return
    for index, (origin, data) in enumerate(_partition(study)):
        if index in wanted:
            yield index, VirtualSite(origin, _public_images(data))


def _phantom_site(study: Study, index: int) -> VirtualSite:
    """Return a hospital of phantoms: real DICOM files of one scanner, in a folder that goes when they are read."""
    if study.data.partition != "natural":
        raise DataError("phantoms come as one scanner a hospital: use data.partition = 'natural'")
    lesions = study.episodes.class_names + study.episodes.held_out_names
    if unknown := set(lesions) - set(LESIONS):
        raise DataError(f"no phantom lesion is called {sorted(unknown)}; there are: {', '.join(LESIONS)}")
    scanner = SCANNERS[index % len(SCANNERS)]

    def images() -> Iterator[SourceImage]:
        folder = Path(tempfile.mkdtemp(prefix="wardround-phantoms-"))
        try:
            write_hospital(
                folder,
                scanner=scanner,
                lesions=lesions,
                patients_per_lesion=study.data.patients_per_class,
                seed=study.data.seed + index,
                size=2 * study.model.image_size,
            )
            with (folder / "labels.csv").open(newline="") as file:
                labels = {row["SOPInstanceUID"]: row["label"] for row in csv.DictReader(file)}
            for path in sorted((folder / "dicom").rglob("*.dcm")):
                yield read_dicom(path, labels)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return VirtualSite(f"{scanner.modality} phantoms ({scanner.name})", images())


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


def _public_images(data: LabelledImages) -> Iterator[SourceImage]:
    for pixels, label, group in zip(data.images, data.labels, data.groups, strict=True):
        volume = pixels.ndim == 3 and pixels.shape[-1] != 3  # a last axis of 3 is colour
        yield SourceImage(pixels, str(group), data.label_names[label], volume=volume)
