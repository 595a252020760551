"""The scanners of the phantom hospitals: what each one does to an image and how it stores the pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from simulations.phantoms.anatomy import CONTRAST
from simulations.phantoms.lesions import Plane

__all__ = ["SCANNERS", "Scanner", "acquire"]

_RGB_BLACK = np.array([58, 20, 22], np.float32)
_RGB_WHITE = np.array([252, 214, 190], np.float32)
"""Colours of black and white in the photographs: skin, dark to light."""


@dataclass(frozen=True)
class Scanner:
    """One make of scanner: its physics and its way of writing pixels.

    Parameters
    ----------
    name : str
        Identifies the scanner in a study and in error messages.
    modality : str
        DICOM modality: CT, MR, CR, DX, MG, US or XC.
    manufacturer, model : str
        Stand in the header; no such makers exist.
    transfer_syntax : pydicom.uid.UID
        Transfer syntax of the files.
    noise : float
        Standard deviation of the noise, as a fraction of a lesion's typical contrast.
    blur : float
        Standard deviation of the point spread, in pixels.
    photometric : str
        MONOCHROME1, MONOCHROME2, RGB or PALETTE COLOR.
    bits_stored : int
        Bits of a stored sample; 8 for colour.
    signed : bool
        Whether stored samples are two's complement.
    window : tuple of float or None
        VOI window (centre, width) that shows black to white, in modality units; ``None`` writes no window.
    rescale : tuple of float or None
        Slope and intercept from stored to modality values; ``None`` writes no rescale.
    """

    name: str
    modality: str
    manufacturer: str
    model: str
    transfer_syntax: UID
    noise: float
    blur: float
    photometric: str = "MONOCHROME2"
    bits_stored: int = 12
    signed: bool = False
    window: tuple[float, float] | None = None
    rescale: tuple[float, float] | None = None

    @property
    def bits_allocated(self) -> int:
        """Bits that a stored sample takes."""
        return 8 if self.bits_stored <= 8 else 16

    @property
    def stored_range(self) -> tuple[int, int]:
        """Least and greatest value that a stored sample can take."""
        span = 1 << self.bits_stored
        return (-span // 2, span // 2 - 1) if self.signed else (0, span - 1)


SCANNERS: tuple[Scanner, ...] = (
    Scanner(
        "ct-axis", "CT", "Phantom Imaging", "Axis 64", ExplicitVRLittleEndian, noise=0.2, blur=0.6,
        window=(40, 400), rescale=(1, -1024),
    ),
    Scanner(
        "ct-orbit", "CT", "Figment Medical", "Orbit Low Dose", RLELossless, noise=0.28, blur=1.0,
        bits_stored=16, signed=True, window=(50, 350), rescale=(1, 0),
    ),
    Scanner(
        "mr-polar", "MR", "Figment Medical", "Polar 1.5", ImplicitVRLittleEndian, noise=0.16, blur=0.7,
        window=(600, 1200),
    ),
    Scanner(
        "mr-aurora", "MR", "Phantom Imaging", "Aurora 3", DeflatedExplicitVRLittleEndian, noise=0.08,
        blur=0.4,
    ),
    Scanner(
        "dx-lumen", "DX", "Mockup Radiology", "Lumen", JPEG2000Lossless, noise=0.12, blur=0.5,
        photometric="MONOCHROME1", bits_stored=14, window=(8192, 12000), rescale=(1, 0),
    ),
    Scanner(
        "cr-plate", "CR", "Mockup Radiology", "Plate", JPEGLSLossless, noise=0.22, blur=1.1,
        photometric="MONOCHROME1", bits_stored=10,
    ),
    Scanner(
        "mg-halo", "MG", "Figment Medical", "Halo", JPEGLSLossless, noise=0.1, blur=0.3,
        window=(2047, 3600), rescale=(1, 0),
    ),
    Scanner(
        "us-echo", "US", "Phantom Imaging", "Echo", RLELossless, noise=0.35, blur=0.9,
        photometric="PALETTE COLOR", bits_stored=8,
    ),
    Scanner(
        "xc-lens", "XC", "Mockup Radiology", "Lens", JPEG2000Lossless, noise=0.1, blur=0.8,
        photometric="RGB", bits_stored=8,
    ),
)  # fmt: skip
"""Scanners over seven modalities and six transfer syntaxes; no two store their pixels in the same way."""


def acquire(scanner: Scanner, images: Plane, rng: np.random.Generator) -> NDArray[np.integer]:
    """Return the pixels that a scanner stores of what is in front of it.

    Parameters
    ----------
    scanner : Scanner
        The scanner.
    images : ndarray
        ``[n, S, S]`` float32 in [0, 1]; 0 is black and 1 is white.
    rng : numpy.random.Generator
        Draws the noise.

    Returns
    -------
    ndarray
        Stored samples: ``[n, S, S]``, or ``[n, S, S, 3]`` for RGB; uint8, uint16 or int16.
    """
    seen = _blurred(images, scanner.blur)
    noise = rng.standard_normal(images.shape, np.float32) * np.float32(scanner.noise * CONTRAST)
    # Echoes interfere: speckle grows with the signal. Other noise is about the same everywhere.
    seen = seen + (noise * (seen + np.float32(0.3)) if scanner.modality == "US" else noise)
    if scanner.photometric == "RGB":
        colour = _RGB_BLACK + np.clip(seen, 0, 1)[..., None] * (_RGB_WHITE - _RGB_BLACK)
        return np.rint(colour).astype(np.uint8)
    if scanner.photometric == "MONOCHROME1":
        seen = 1 - seen
    low, high = scanner.stored_range
    black, white = _shown_range(scanner)
    stored = np.clip(np.rint(np.float32(black) + seen * np.float32(white - black)), low, high)
    dtype = np.uint8 if scanner.bits_allocated == 8 else np.int16 if scanner.signed else np.uint16
    pixels: NDArray[np.integer] = stored.astype(dtype)
    return pixels


def _shown_range(scanner: Scanner) -> tuple[float, float]:
    """Return the stored values (not yet rounded) of black and white on a display."""
    if scanner.photometric == "PALETTE COLOR":
        return 0, 255
    if scanner.window is None:
        low, high = scanner.stored_range
        # Room at both ends, so that noise is not cut off.
        return low + 0.1 * (high - low), low + 0.9 * (high - low)
    slope, intercept = scanner.rescale or (1, 0)
    centre, width = scanner.window
    return (centre - width / 2 - intercept) / slope, (centre + width / 2 - intercept) / slope


def _blurred(images: Plane, sigma: float) -> Plane:
    """Return ``[n, S, S]`` images blurred by a Gaussian of ``sigma`` pixels; borders repeat."""
    reach = int(np.ceil(3 * sigma))
    taps = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma)).astype(np.float32)
    taps /= taps.sum()
    size = images.shape[-1]
    for axis in (-2, -1):
        index = np.clip(np.arange(-reach, size + reach), 0, size - 1)
        padded = images.take(index, axis)
        images = np.zeros_like(images)
        for k, tap in enumerate(taps):
            images += tap * (padded[..., k : k + size, :] if axis == -2 else padded[..., k : k + size])
    return images
