"""JPEG inside DICOM, decoded by libjpeg-turbo: 8 and 12 bits, lossy and lossless, as a plugin of pydicom's decoders.

pydicom's own plugins for these transfer syntaxes cover a part of them (Pillow, 8 bits), have another licence than this
project (pylibjpeg-libjpeg), or start threads of their own and write to stderr (GDCM).
"""

from imagecodecs import JPEG8, jpeg8_decode
from pydicom import uid
from pydicom.pixels.decoders.base import DecodeRunner

__all__ = ["DECODER_DEPENDENCIES", "decode", "is_available"]

_SYNTAXES = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
#: What pydicom asks of a plugin: its transfer syntaxes, and what it is made of.
DECODER_DEPENDENCIES = dict.fromkeys(_SYNTAXES, ("imagecodecs",))


def is_available(syntax: str) -> bool:
    """Return whether a transfer syntax is one of this plugin's."""
    return syntax in DECODER_DEPENDENCIES


def decode(src: bytes, runner: DecodeRunner) -> bytes:
    """Return a frame's samples as the stream has them; into RGB it is pydicom that turns them.

    Raises
    ------
    ValueError
        The stream has no end: libjpeg-turbo would fill up a picture that was cut off.
    """
    # One byte, whatever it is, makes the length even.
    if not src.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise ValueError("a JPEG stream without an end")
    # From one colour space into the same: it is not for the decoder to guess which one it is.
    same = JPEG8.CS.YCbCr if runner.samples_per_pixel == 3 else None
    values = jpeg8_decode(src, colorspace=same, outcolorspace=same)
    runner.set_option("bits_allocated", 8 * values.dtype.itemsize)
    runner.set_option("planar_configuration", 0)
    samples: bytes = values.tobytes()
    return samples
