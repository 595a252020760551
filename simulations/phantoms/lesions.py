"""The lesions of the phantom hospitals: what is drawn, from easy to tell apart to hard.

Each lesion is a function of a :class:`Frame`, the plane seen from the lesion: its centre is the origin, its
nominal radius is 1 and its axes are turned with it. It returns how much of the lesion's contrast stands at
each pixel. Edges are soft over one pixel (a signed distance divided by the pixel), so that a lesion looks the
same at every image size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["LESIONS", "Frame", "Plane", "draw", "texture"]

Plane: TypeAlias = NDArray[np.float32]
"""A float32 image, ``[S, S]`` unless said otherwise."""


def _unit(values: NDArray[np.floating]) -> Plane:
    clipped: Plane = np.clip(values, 0, 1)
    return clipped


@dataclass(frozen=True)
class Frame:
    """The plane in a lesion's own coordinates.

    Parameters
    ----------
    u, v : ndarray
        ``[S, S]`` float32, coordinates along the lesion's axes, in lesion radii.
    edge : float
        One pixel, in lesion radii.
    """

    u: Plane
    v: Plane
    edge: float

    @cached_property
    def rho(self) -> Plane:
        """``[S, S]`` distance from the centre, in lesion radii."""
        return np.hypot(self.u, self.v)

    @cached_property
    def phi(self) -> Plane:
        """``[S, S]`` angle about the centre, in radians."""
        return np.arctan2(self.v, self.u)

    def fill(self, distance: Plane) -> Plane:
        """Return ``[S, S]`` coverage in [0, 1] of the region where a signed distance is negative."""
        return _unit(np.float32(0.5) - distance / np.float32(self.edge))

    def dots(self, x: NDArray[np.float32], y: NDArray[np.float32], radius: float) -> Plane:
        """Return ``[S, S]`` coverage of the round dots at ``x`` and ``y`` (both ``[n]``)."""
        away = np.square(self.u - x[:, None, None])
        away += np.square(self.v - y[:, None, None])
        return self.fill(np.sqrt(away.min(axis=0)) - np.float32(radius))

    def segment(self, start: complex, end: complex, width: float) -> Plane:
        """Return ``[S, S]`` coverage of a bar with round ends, ``u + iv``; ``width`` is half its width."""
        along = end - start
        x, y = np.float32(along.real), np.float32(along.imag)
        du, dv = self.u - np.float32(start.real), self.v - np.float32(start.imag)
        t = _unit((du * x + dv * y) / np.float32(abs(along) ** 2))
        return self.fill(np.hypot(du - t * x, dv - t * y) - np.float32(width))


def texture(u: Plane, v: Plane, rng: np.random.Generator, *, low: float, high: float, waves: int) -> Plane:
    """Return random texture within a band of spatial frequencies.

    Parameters
    ----------
    u, v : ndarray
        ``[..., S, S]`` coordinates.
    rng : numpy.random.Generator
        Draws directions, frequencies and phases.
    low, high : float
        Angular frequencies that bound the band, in radians per unit of the coordinates.
    waves : int
        Number of plane waves that are added.

    Returns
    -------
    ndarray
        ``[..., S, S]`` float32 of mean about 0 and variance about 1.
    """
    angle, phase = rng.uniform(0, 2 * np.pi, (2, waves)).astype(np.float32)
    frequency = rng.uniform(low, high, waves).astype(np.float32)
    total = np.zeros_like(u)
    for a, b, p in zip(frequency * np.cos(angle), frequency * np.sin(angle), phase, strict=True):
        total += np.cos(a * u + b * v + p)
    return total * np.float32(np.sqrt(2 / waves))


def _scatter(rng: np.random.Generator, count: int, reach: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ``count`` points, spread evenly over a disc of radius ``reach``."""
    angle = rng.uniform(0, 2 * np.pi, count)
    radius = reach * np.sqrt(rng.uniform(0, 1, count))
    return (radius * np.cos(angle)).astype(np.float32), (radius * np.sin(angle)).astype(np.float32)


def _disc(f: Frame, rng: np.random.Generator) -> Plane:
    return f.fill(f.rho - 1)


def _ring(f: Frame, rng: np.random.Generator) -> Plane:
    return f.fill(np.abs(f.rho - np.float32(0.85)) - np.float32(rng.uniform(0.14, 0.22)))


def _cross(f: Frame, rng: np.random.Generator) -> Plane:
    width = rng.uniform(0.16, 0.24)
    return np.maximum(f.segment(-1.1, 1.1, width), f.segment(-1.1j, 1.1j, width))


def _bar(f: Frame, rng: np.random.Generator) -> Plane:
    return f.segment(-1.1, 1.1, rng.uniform(0.25, 0.4))


def _crescent(f: Frame, rng: np.random.Generator) -> Plane:
    bite = np.hypot(f.u - np.float32(rng.uniform(0.5, 0.65)), f.v)
    return f.fill(np.maximum(f.rho - 1, np.float32(0.95) - bite))


def _target(f: Frame, rng: np.random.Generator) -> Plane:
    core = f.fill(f.rho - np.float32(rng.uniform(0.35, 0.45)))
    return np.maximum(core, f.fill(np.abs(f.rho - np.float32(1.0)) - np.float32(0.15)))


def _wedge(f: Frame, rng: np.random.Generator) -> Plane:
    u, half = f.u + np.float32(0.8), rng.uniform(0.4, 0.6)
    side = np.abs(f.v) * np.float32(np.cos(half)) - u * np.float32(np.sin(half))
    return f.fill(np.maximum(np.hypot(u, f.v) - np.float32(1.9), side))


def _fluid_level(f: Frame, rng: np.random.Generator) -> Plane:
    fluid = f.fill(f.v + np.float32(rng.uniform(-0.2, 0.2)))
    return f.fill(f.rho - 1) * (fluid * np.float32(1.6) - np.float32(0.6))


def _branching(f: Frame, rng: np.random.Generator) -> Plane:
    tree = f.segment(-1.2, 0, 0.16)
    for side in (1, -1):
        fork = np.exp(1j * side * rng.uniform(0.5, 0.8)) * rng.uniform(0.5, 0.65)
        tree = np.maximum(tree, f.segment(0, fork, 0.14))
        for turn in (0.45, -0.45):
            twig = fork + fork / abs(fork) * np.exp(1j * turn) * rng.uniform(0.5, 0.7)
            tree = np.maximum(tree, f.segment(fork, twig, 0.11))
    return tree


def _striated(f: Frame, rng: np.random.Generator) -> Plane:
    stripes = np.cos(f.u * np.float32(rng.uniform(6.5, 8)) + np.float32(rng.uniform(0, 6)))
    patch = f.fill(f.rho - np.float32(1.1))
    return patch * _unit(np.float32(0.5) + stripes)


def _reticular(f: Frame, rng: np.random.Generator) -> Plane:
    mesh = np.float32(rng.uniform(7.5, 9))
    net = np.maximum(np.cos(f.u * mesh), np.cos(f.v * mesh + np.float32(rng.uniform(0, 6))))
    patch = f.fill(f.rho - np.float32(1.1))
    return patch * _unit(net * 2 - np.float32(0.8))


def _satellites(f: Frame, rng: np.random.Generator) -> Plane:
    angle = rng.uniform(0, 2 * np.pi) + np.arange(4) * np.pi / 2 + rng.uniform(-0.4, 0.4, 4)
    x, y = (1.05 * np.cos(angle)).astype(np.float32), (1.05 * np.sin(angle)).astype(np.float32)
    return np.maximum(f.fill(f.rho - np.float32(0.55)), f.dots(x, y, 0.22))


def _septated(f: Frame, rng: np.random.Generator) -> Plane:
    wall = f.fill(np.abs(f.rho - np.float32(0.95)) - np.float32(0.12))
    inside = f.fill(f.rho - np.float32(0.95))
    below = f.v + np.float32(0.33 + rng.uniform(-0.1, 0.1))
    above = f.v - np.float32(0.33 + rng.uniform(-0.1, 0.1))
    septa = f.fill(np.minimum(np.abs(below), np.abs(above)) - np.float32(0.09))
    return wall + inside * septa * (1 - wall)


def _mural_nodule(f: Frame, rng: np.random.Generator) -> Plane:
    wall = f.fill(np.abs(f.rho - np.float32(0.95)) - np.float32(0.12))
    return np.maximum(wall, f.fill(np.hypot(f.u - np.float32(0.55), f.v) - np.float32(rng.uniform(0.3, 0.4))))


def _spiculated(f: Frame, rng: np.random.Generator) -> Plane:
    spokes = np.cos(f.phi * np.float32(rng.integers(7, 11)) + np.float32(rng.uniform(0, 6)))
    reach = np.float32(0.6) + np.float32(rng.uniform(0.75, 0.95)) * np.square(np.maximum(spokes, 0))
    # A spicule is a narrow cone: steep in the angle, so the distance is scaled down to keep its edge soft.
    return f.fill((f.rho - reach) * np.float32(0.5))


def _lobulated(f: Frame, rng: np.random.Generator) -> Plane:
    lobes = np.cos(f.phi * np.float32(rng.integers(3, 6)) + np.float32(rng.uniform(0, 6)))
    return f.fill(f.rho - np.float32(0.9) - np.float32(rng.uniform(0.22, 0.3)) * lobes)


def _haze(f: Frame, rng: np.random.Generator) -> Plane:
    return np.exp(np.square(f.rho) * np.float32(-rng.uniform(1.3, 1.8))) * np.float32(0.9)


def _part_solid(f: Frame, rng: np.random.Generator) -> Plane:
    x, y = _scatter(rng, 1, 0.35)
    core = f.dots(x, y, rng.uniform(0.28, 0.38))
    return np.maximum(np.exp(np.square(f.rho) * np.float32(-1.1)) * np.float32(0.55), core)


def _cluster(f: Frame, rng: np.random.Generator) -> Plane:
    return f.dots(*_scatter(rng, int(rng.integers(9, 14)), 0.8), 0.12) * np.float32(1.3)


def _linear_calcifications(f: Frame, rng: np.random.Generator) -> Plane:
    x = np.linspace(-1.5, 1.5, 8) + rng.uniform(-0.1, 0.1, 8)
    y = 0.25 * np.sin(x * rng.uniform(1, 2) + rng.uniform(0, 6)) + rng.uniform(-0.06, 0.06, 8)
    return f.dots(x.astype(np.float32), y.astype(np.float32), 0.12) * np.float32(1.3)


def _miliary(f: Frame, rng: np.random.Generator) -> Plane:
    return f.dots(*_scatter(rng, int(rng.integers(16, 24)), 1.9), 0.13) * np.float32(1.2)


def _mottled(f: Frame, rng: np.random.Generator) -> Plane:
    grain = np.clip(texture(f.u, f.v, rng, low=4.5, high=6.5, waves=8), -1.5, 1.5)
    return f.fill(f.rho - np.float32(1.15)) * (np.float32(0.35) + np.float32(0.4) * grain)


def _granular(f: Frame, rng: np.random.Generator) -> Plane:
    grain = np.clip(texture(f.u, f.v, rng, low=8.5, high=11, waves=8), -1.5, 1.5)
    return f.fill(f.rho - np.float32(1.15)) * (np.float32(0.35) + np.float32(0.4) * grain)


_LESIONS: dict[str, Callable[[Frame, np.random.Generator], Plane]] = {
    # Plain shapes.
    "disc": _disc,
    "ring": _ring,
    "cross": _cross,
    "bar": _bar,
    "crescent": _crescent,
    "target": _target,
    "wedge": _wedge,
    # Inner structure.
    "fluid_level": _fluid_level,
    "branching": _branching,
    "striated": _striated,
    "reticular": _reticular,
    "satellites": _satellites,
    "septated": _septated,
    "mural_nodule": _mural_nodule,
    # Margins.
    "spiculated": _spiculated,
    "lobulated": _lobulated,
    "haze": _haze,
    "part_solid": _part_solid,
    # Small dots and texture.
    "cluster": _cluster,
    "linear_calcifications": _linear_calcifications,
    "miliary": _miliary,
    "mottled": _mottled,
    "granular": _granular,
}

LESIONS: tuple[str, ...] = tuple(_LESIONS)
"""Names of the lesion types, from easy to hard."""


def draw(lesion: str, frame: Frame, rng: np.random.Generator) -> Plane:
    """Draw one lesion.

    Parameters
    ----------
    lesion : str
        One of :data:`LESIONS`.
    frame : Frame
        The plane in the lesion's coordinates.
    rng : numpy.random.Generator
        Draws what differs between two lesions of a type.

    Returns
    -------
    ndarray
        ``[S, S]`` float32: what is added to the image, in units of the lesion's contrast (about -1 to 1.6).
    """
    return _LESIONS[lesion](frame, rng)
