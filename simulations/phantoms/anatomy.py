"""The patients of the phantom hospitals: a body with organs, seen in several views, and the lesion in it."""

from functools import lru_cache

import numpy as np

from simulations.phantoms.lesions import Frame, Plane, draw, texture

__all__ = ["CONTRAST", "render"]

CONTRAST = 0.3
"""Typical brightness of a lesion above its surroundings, where an image spans 0 (black) to 1 (white)."""


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Plane, Plane]:
    """Return the pixels' coordinates x and y, both ``[S, S]`` in (-1, 1)."""
    centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    x, y = np.broadcast_arrays(centres[None, :], centres[:, None])
    return x, y


def _ellipse(x: Plane, y: Plane, centre: complex, axes: complex, turn: float, softness: float) -> Plane:
    """Return ``[n, S, S]`` coverage of an ellipse; its border is ``softness`` wide, in semi-axes."""
    u, v = _turned(x - np.float32(centre.real), y - np.float32(centre.imag), turn)
    radius = np.hypot(u / np.float32(axes.real), v / np.float32(axes.imag))
    coverage: Plane = np.clip((1 - radius) / np.float32(softness) + np.float32(0.5), 0, 1)
    return coverage


def _turned(x: Plane, y: Plane, angle: Plane | float) -> tuple[Plane, Plane]:
    """Return the coordinates on axes that are turned by ``angle`` (radians)."""
    c, s = np.asarray(np.cos(angle), np.float32), np.asarray(np.sin(angle), np.float32)
    return c * x + s * y, c * y - s * x


def _body(x: Plane, y: Plane, rng: np.random.Generator) -> Plane:
    """Return ``[n, S, S]`` views of one patient's body, without a lesion."""
    tissue = np.full_like(x, rng.uniform(0.3, 0.45))
    tissue += np.float32(0.07) * texture(x, y, rng, low=0.8, high=3.0, waves=5)
    tissue += np.float32(0.012) * texture(x, y, rng, low=9.0, high=18.0, waves=6)
    for _ in range(3):
        centre, axes = rng.uniform(-0.7, 0.7, 2), rng.uniform(0.2, 0.5, 2)
        organ = _ellipse(x, y, complex(*centre), complex(*axes), rng.uniform(0, np.pi), 0.35)
        tissue += organ * np.float32(rng.uniform(-0.09, 0.09))
    outline = _ellipse(x, y, 0j, complex(*rng.uniform(0.88, 1.1, 2)), rng.uniform(0, np.pi), 0.1)
    return tissue * outline + np.float32(0.04)


def render(lesion: str, rng: np.random.Generator, *, count: int, size: int) -> Plane:
    """Render views of one patient with one type of lesion, before any scanner has touched them.

    The body, the lesion's usual size and its usual contrast belong to the patient; the view and the lesion's
    position, rotation, exact size and exact contrast belong to the image.

    Parameters
    ----------
    lesion : str
        One of :data:`~simulations.phantoms.lesions.LESIONS`.
    rng : numpy.random.Generator
        Draws the patient and the views.
    count : int
        Number of images.
    size : int
        Rows and columns of an image, in pixels.

    Returns
    -------
    ndarray
        ``[count, size, size]`` float32 in [0, 1]; 0 is black and 1 is white.
    """
    x, y = _grid(size)
    turn = rng.uniform(-0.2, 0.2, (count, 1, 1)).astype(np.float32)
    zoom = rng.uniform(0.9, 1.1, (count, 1, 1)).astype(np.float32)
    shift = rng.uniform(-0.1, 0.1, (2, count, 1, 1)).astype(np.float32)
    images = _body(*_turned(x * zoom + shift[0], y * zoom + shift[1], turn), rng)
    usual_radius, usual_contrast = rng.uniform(0.26, 0.36), CONTRAST * rng.uniform(0.8, 1.2)
    contrasts = usual_contrast * rng.uniform(0.9, 1.1, count)
    for image, contrast in zip(images, contrasts.astype(np.float32), strict=True):
        radius = np.float32(usual_radius * rng.uniform(0.9, 1.1))
        away, bearing = 0.45 * np.sqrt(rng.uniform()), rng.uniform(0, 2 * np.pi)
        u, v = _turned(
            (x - np.float32(away * np.cos(bearing))) / radius,
            (y - np.float32(away * np.sin(bearing))) / radius,
            rng.uniform(0, 2 * np.pi),
        )
        drawn = draw(lesion, Frame(u, v, float(2 / size / radius)), rng)
        np.add(image, contrast * drawn, out=image)
    return np.clip(images, 0, 1, out=images)
