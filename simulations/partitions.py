"""Virtual sites from one image set: who has which patients, and what each site's scanner does to the images.

Every partition takes the ``N`` images of a set and returns ``site_of``, int64 ``[N]`` from 0 to
``sites - 1``. It keeps groups (patients, lesions, smears) whole, leaves no site empty, and gives the same
answer for the same generator state. A group of several classes counts as its most frequent one. Fewer groups
than sites, or numbers that do not fit the set, are refused with a ``DataError``.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from simulations.public import LabelledImages

__all__ = ["by_site", "dirichlet", "iid", "pathological", "quantity", "scanner_shift", "split_by_site"]

_CHUNK_PIXELS = 2**20  # what scanner_shift holds as floats at a time


def by_site(data: LabelledImages) -> NDArray[np.int64]:
    """Return the real source site of every image.

    Raises
    ------
    DataError
        If the set does not know its sites, one of them has no image, or a group lies at two of them.
    """
    if data.sites is None:
        raise DataError("this set does not know its source sites; choose another partition, such as dirichlet.")
    present = np.bincount(data.sites, minlength=len(data.site_names)) > 0
    if not present.all():
        missing = [name for name, here in zip(data.site_names, present, strict=True) if not here]
        raise DataError(f"no image comes from {', '.join(missing)}; take these names out of site_names.")
    group_of, n_groups = _groups(data)
    first = np.full(n_groups, len(data.site_names), dtype=np.int64)
    np.minimum.at(first, group_of, data.sites)
    if split := len(np.unique(group_of[first[group_of] != data.sites])):
        raise DataError(f"{split} groups have images at more than one site; give each group one site in the set.")
    return data.sites.copy()


def iid(data: LabelledImages, *, sites: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Deal the groups at random, the same number to every site (plus or minus one)."""
    group_of, n_groups = _groups(data)
    sizes = _even(n_groups, sites)
    return generator.permutation(np.repeat(np.arange(sites), sizes))[group_of]


def quantity(data: LabelledImages, *, sites: int, alpha: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Skew the sizes: deal the groups at random, in shares that are one draw from Dir(alpha, ..., alpha).

    Parameters
    ----------
    data, sites, generator
        The set, the number of virtual sites, and the source of randomness.
    alpha
        Concentration for each site. Below 1, few sites have most of the groups; a large alpha makes sites
        alike.

    References
    ----------
    Li et al. 2022, "Federated Learning on Non-IID Data Silos", arXiv 2102.02079, quantity skew. There, a site
    may stay empty; here, every site has one group first, and the rest is shared out.
    """
    group_of, n_groups = _groups(data)
    spare = n_groups - _even(n_groups, sites).size
    share = generator.dirichlet(np.full(sites, _concentration(alpha))) * spare
    sizes = np.floor(share).astype(np.int64)
    largest_remainders = np.argsort(sizes - share, kind="stable")[: spare - sizes.sum()]
    sizes[largest_remainders] += 1
    return generator.permutation(np.repeat(np.arange(sites), sizes + 1))[group_of]


def dirichlet(data: LabelledImages, *, sites: int, alpha: float, generator: np.random.Generator) -> NDArray[np.int64]:
    """Skew the labels: every site draws its class mix from Dir(alpha * p), with p the mix of the whole set.

    Sites have the same number of groups (plus or minus one). One site after the other, in random order, draws
    groups by its mix; when a class is used up, the rest of the mix counts. So the last sites take what is
    left.

    Parameters
    ----------
    data, sites, generator
        The set, the number of virtual sites, and the source of randomness.
    alpha
        Concentration, summed over the classes as in the paper (other tools give it for each class). At 0.1,
        most sites have nearly one class; at 100, all sites have nearly the mix of the whole set.

    References
    ----------
    Hsu et al. 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
    Classification", section 3, arXiv 1909.06335.
    """
    group_of, n_groups = _groups(data)
    sizes = _even(n_groups, sites)
    pools = _pools(data, group_of, n_groups, generator)
    left = np.array([len(pool) for pool in pools])
    base = _concentration(alpha) * left / n_groups
    site_of_group = np.empty(n_groups, dtype=np.int64)
    for site in generator.permutation(sites):
        wanted, mix = sizes[site], generator.dirichlet(base)
        while wanted > 0:
            mix[left == 0] = 0
            # A small alpha rounds most of a mix to zero; the classes left have a Dirichlet of their own.
            if mix.sum() == 0:
                mix[left > 0] = generator.dirichlet(base[left > 0])
            taken = np.minimum(generator.multinomial(wanted, mix / mix.sum()), left)
            for label in np.flatnonzero(taken):
                site_of_group[pools[label][left[label] - taken[label] : left[label]]] = site
            left -= taken
            wanted -= taken.sum()
    return site_of_group[group_of]


def pathological(
    data: LabelledImages, *, sites: int, classes_per_site: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Give every site the groups of exactly so many classes, as shards of about the same size.

    Parameters
    ----------
    data, sites, generator
        The set, the number of virtual sites, and the source of randomness.
    classes_per_site
        Number of classes at each site.

    References
    ----------
    McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
    section 3, arXiv 1602.05629. There, shards are cut from the sorted set, so that one can straddle two
    classes, and a site can get two of one class; here neither happens, also when classes are of unlike size.
    """
    group_of, n_groups = _groups(data)
    _even(n_groups, sites)
    pools = _pools(data, group_of, n_groups, generator)
    groups = np.array([len(pool) for pool in pools])
    most, places = np.minimum(groups, sites), sites * classes_per_site
    if not len(pools) <= places <= most.sum():
        raise DataError(
            f"{sites} sites of {classes_per_site} classes have {places} places for a class; this set has "
            f"{len(pools)} classes, with groups for at most {most.sum()} places. Change the number of sites "
            "or of classes per site."
        )
    shards = np.ones(len(pools), dtype=np.int64)
    for _ in range(places - len(pools)):  # cut the class of the largest shards once more
        shards[np.argmax(np.where(shards < most, groups / shards, 0.0))] += 1
    free = np.full(sites, classes_per_site)
    site_of_group = np.empty(n_groups, dtype=np.int64)
    for label in generator.permutation(len(pools)):
        # The emptiest sites first, ties at random: free places then differ by one at most, and none is left.
        emptiest = np.lexsort((generator.random(sites), -free))[: shards[label]]
        free[emptiest] -= 1
        for site, shard in zip(emptiest, np.array_split(pools[label], shards[label]), strict=True):
            site_of_group[shard] = site
    return site_of_group[group_of]


def split_by_site(data: LabelledImages, site_of: NDArray[np.int64]) -> list[LabelledImages]:
    """Return each site's part of a set, in the order of the set; ``site_of`` is a partition's answer."""
    parts = [np.flatnonzero(site_of == site) for site in range(int(site_of.max()) + 1)]
    return [
        replace(
            data,
            images=data.images[part],
            labels=data.labels[part],
            groups=data.groups[part],
            sites=None if data.sites is None else data.sites[part],
        )
        for part in parts
    ]


def scanner_shift(
    images: NDArray[np.uint8], *, site: int, strength: float, generator: np.random.Generator
) -> NDArray[np.uint8]:
    """Return one site's images as its own scanner would show them.

    The site has one blur width, noise level, contrast and gamma for all its images; they depend on the
    generator and the site's number alone.

    Parameters
    ----------
    images
        All images of one site, uint8 ``[N, H, W]``, ``[N, H, W, 3]`` or ``[N, D, H, W]``.
    site
        Number of the site. With equal generators, two sites have unlike scanners.
    strength
        0 changes nothing. At 1, the blur's standard deviation is up to 3 % of the image's side, the noise's
        up to 8 % of full scale, contrast (about mid-grey) is 1/1.6 to 1.6, and gamma is 1/2 to 2.
    generator
        Source of randomness; one number is drawn from it.

    Raises
    ------
    DataError
        If strength is negative or not finite.
    """
    if not (np.isfinite(strength) and strength >= 0):
        raise DataError(f"the strength of a scanner shift is {strength}; it must be 0 or more, usually up to 1.")
    own = np.random.default_rng([int(generator.integers(2**63)), site])
    if strength == 0:
        return images.copy()
    blur, noise, contrast, gamma = (own.uniform((0, 0, -1, -1), 1) * strength).tolist()
    sigma = 0.03 * blur * images.shape[2]
    shifted = np.empty_like(images)
    step = max(1, _CHUNK_PIXELS // images[0].size)
    for start in range(0, len(images), step):
        part = _blurred(images[start : start + step].astype(np.float32) / np.float32(255), sigma)
        part += 0.08 * noise * own.standard_normal(part.shape, dtype=np.float32)
        part = np.clip((part - 0.5) * 1.6**contrast + 0.5, 0, 1) ** 2.0**gamma
        shifted[start : start + step] = np.rint(part * 255)
    return shifted


def _blurred(images: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Return the images after a Gaussian of ``sigma`` pixels along every spatial axis, edges repeated."""
    radius = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2).astype(np.float32)
    taps /= taps.sum()
    spatial = images.ndim - (images.ndim == 4 and images.shape[-1] == 3)
    for axis in range(1, spatial):
        edge = [(radius, radius) if k == axis else (0, 0) for k in range(images.ndim)]
        padded = np.moveaxis(np.pad(images, edge, mode="edge"), axis, 0)
        summed = np.zeros_like(padded[: images.shape[axis]])
        for shift, tap in enumerate(taps):
            summed += tap * padded[shift : shift + len(summed)]
        images = np.moveaxis(summed, 0, axis)
    return images


def _groups(data: LabelledImages) -> tuple[NDArray[np.int64], int]:
    """Return the number of every image's group ``[N]``, and how many groups there are."""
    names, group_of = np.unique(data.groups, return_inverse=True)
    return group_of, len(names)


def _pools(
    data: LabelledImages, group_of: NDArray[np.int64], n_groups: int, generator: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Return the groups of every class that has any, in random order."""
    n_classes = len(data.label_names)
    counts = np.bincount(group_of * n_classes + data.labels, minlength=n_groups * n_classes)
    class_of = counts.reshape(n_groups, n_classes).argmax(axis=1)
    return [generator.permutation(np.flatnonzero(class_of == label)) for label in np.unique(class_of)]


def _even(n_groups: int, sites: int) -> NDArray[np.int64]:
    """Return even site sizes in groups ``[sites]``, all at least 1."""
    if sites < 1:
        raise DataError(f"a partition into {sites} sites is not possible; ask for at least one.")
    if n_groups < sites:
        raise DataError(
            f"{n_groups} groups (patients, lesions or smears) cannot fill {sites} sites, as none is split; "
            f"ask for at most {n_groups} sites, or take a larger set."
        )
    return n_groups // sites + (np.arange(sites) < n_groups % sites)


def _concentration(alpha: float) -> float:
    if not (np.isfinite(alpha) and alpha > 0):
        raise DataError(f"alpha is {alpha}; a Dirichlet concentration must be positive, such as 0.3.")
    return alpha
