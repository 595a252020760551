"""PNG, JPEG and TIFF files: every mode shown as it is meant, and what is no whole picture refused."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client.data.picture import Picture, Reading, Reason, Refused
from client.data.pictures import read_picture

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)


def saved(path: Path, image: Image.Image, form: str, **options: Any) -> Path:
    image.save(path, form, **options)
    return path


def read(path: Path, reading: Reading = Reading()) -> list[Picture]:  # noqa: B008 - frozen
    return list(read_picture(path, reading))


def shown(path: Path) -> NDArray[np.float32]:
    [picture] = read(path)
    out = picture.shown("header")
    assert out.dtype == np.float32
    assert picture.identifiers == {}
    assert not picture.volume
    return out


def refusal(path: Path, reading: Reading = Reading()) -> Reason:  # noqa: B008 - frozen
    with pytest.raises(Refused) as caught:
        read(path, reading)
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_grey_of_eight_bits(tmp_path: Path, form: str) -> None:
    options: dict[str, Any] = {"quality": 100} if form == "JPEG" else {}
    out = shown(saved(tmp_path / "x", Image.fromarray(RAMP), form, **options))
    np.testing.assert_allclose(out, RAMP / 255, atol=0.02 if form == "JPEG" else 1e-6)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_black_and_white(tmp_path: Path, form: str) -> None:
    bits = RAMP % 3 == 0
    out = shown(saved(tmp_path / "x", Image.fromarray(bits), form))
    np.testing.assert_array_equal(out, bits.astype(np.float32))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_colour_and_what_becomes_colour(tmp_path: Path, form: str) -> None:
    colour = Image.fromarray(COLOURS)
    np.testing.assert_allclose(shown(saved(tmp_path / "rgb", colour, form)), COLOURS / 255, atol=1e-6)
    clear = colour.copy()
    clear.putalpha(Image.fromarray(RAMP))
    np.testing.assert_allclose(shown(saved(tmp_path / "rgba", clear, form)), COLOURS / 255, atol=1e-6)
    grey = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(RAMP.T)])
    np.testing.assert_allclose(shown(saved(tmp_path / "la", grey, form)), RAMP / 255, atol=1e-6)
    palette = colour.quantize(16)
    np.testing.assert_allclose(
        shown(saved(tmp_path / "p", palette, form)), np.asarray(palette.convert("RGB")) / 255, atol=1e-6
    )


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_printing_colours(tmp_path: Path, form: str) -> None:
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    image = Image.fromarray(flat).convert("CMYK")
    options: dict[str, Any] = {"quality": 100} if form == "JPEG" else {}
    np.testing.assert_allclose(shown(saved(tmp_path / "x", image, form, **options)), flat / 255, atol=0.02)


def png16(values: NDArray[np.uint16]) -> bytes:
    """Return a PNG of 16-bit grey, by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def tiff(
    values: NDArray[Any], *, big: bool = False, kind: int = 1, black: int = 1, shape: tuple[int, int] | None = None
) -> bytes:
    """Return a TIFF of one strip, by hand: ``kind`` is SampleFormat, ``black`` PhotometricInterpretation."""
    order: Literal["<", ">"] = ">" if big else "<"
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = shape or values.shape
    tags = [
        (256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1), (262, 3, black),
        (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data)), (339, 3, kind),
    ]  # fmt: skip
    entries = b"".join(
        struct.pack(order + "HHI", tag, form, 1) + struct.pack(order + ("I" if form == 4 else "H2x"), value)
        for tag, form, value in tags
    )
    head = (b"MM" if big else b"II") + struct.pack(order + "HI", 42, 8 + len(data))
    return head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4)


WIDE = (RAMP.astype(np.uint16) * 200 + 100).astype(np.uint16)


@pytest.mark.parametrize("file", [png16(WIDE), tiff(WIDE), tiff(WIDE, big=True)], ids=["png", "little", "big"])
def test_grey_of_sixteen_bits_over_its_whole_range(tmp_path: Path, file: bytes) -> None:
    (tmp_path / "x").write_bytes(file)
    np.testing.assert_allclose(shown(tmp_path / "x"), WIDE / 65535, atol=1e-6)


def test_grey_of_twelve_bits_over_its_whole_range(tmp_path: Path) -> None:
    values = np.arange(16 * 16).reshape(16, 16) * 16 + 15  # up to 4095
    first, second = values.ravel()[::2], values.ravel()[1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8)
    data = bytearray(tiff(packed.reshape(16, 24), shape=(16, 16)))
    bits = struct.pack("<HHIH", 258, 3, 1, 8)
    assert data.count(bits) == 1
    (tmp_path / "x").write_bytes(data.replace(bits, struct.pack("<HHIH", 258, 3, 1, 12)))
    np.testing.assert_allclose(shown(tmp_path / "x"), values / 4095, atol=1e-6)


def test_the_same_picture_has_the_same_values_in_either_byte_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(tiff(WIDE))
    (tmp_path / "b").write_bytes(tiff(WIDE, big=True))
    [a], [b] = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.values.dtype == b.values.dtype == np.uint16
    np.testing.assert_array_equal(a.values, b.values)


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    "values", [(WIDE.astype(np.float32) - 900) / 7, WIDE.astype(np.int32) - 5000], ids=["float", "integer"]
)
def test_wide_grey_from_its_least_to_its_greatest(tmp_path: Path, values: NDArray[Any], big: bool) -> None:
    (tmp_path / "x").write_bytes(tiff(values, big=big, kind=3 if values.dtype == np.float32 else 2))
    expected = (values - values.min().astype(float)) / (float(values.max()) - float(values.min()))
    np.testing.assert_allclose(shown(tmp_path / "x"), expected, atol=1e-5)


def test_flat_wide_grey_is_black(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(tiff(np.full((4, 4), 7, np.float32), kind=3))
    assert not shown(tmp_path / "x").any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(tmp_path: Path, bad: float) -> None:
    values = WIDE.astype(np.float32)
    values[3, 3] = bad
    (tmp_path / "x").write_bytes(tiff(values, kind=3))
    assert refusal(tmp_path / "x") is Reason.NOT_DECODED


@pytest.mark.parametrize(
    ("values", "kind"),
    [(RAMP, 1), (WIDE, 1), (WIDE.astype(np.int16), 2), (WIDE.astype(np.float32), 3), (WIDE.astype(np.int32), 2)],
    ids=["8", "16", "signed 16", "float", "32"],
)
def test_white_is_zero_is_never_shown_as_its_negative(tmp_path: Path, values: NDArray[Any], kind: int) -> None:
    (tmp_path / "x").write_bytes(tiff(values, black=0, kind=kind))
    try:
        out = shown(tmp_path / "x")
    except Refused:
        return
    assert np.corrcoef(out.ravel(), values.ravel())[0, 1] < -0.99


def test_signed_grey_keeps_its_order(tmp_path: Path) -> None:
    values = WIDE.astype(np.int16)
    values -= 9000
    (tmp_path / "x").write_bytes(tiff(values, kind=2))
    try:
        out = shown(tmp_path / "x")
    except Refused:
        return
    assert np.corrcoef(out.ravel(), values.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("frames", "chosen"), [("all", [0, 1, 2, 3]), ("middle", [2]), ("3", [0, 3])])
def test_pages(tmp_path: Path, frames: str, chosen: list[int]) -> None:
    pages = [Image.fromarray(np.full((4, 5 + n), n, np.uint8)) for n in range(4)]
    path = saved(tmp_path / "x", pages[0], "TIFF", save_all=True, append_images=pages[1:])
    found = read(path, Reading(frames=frames))
    assert [(p.frame, int(p.values.max()), p.values.shape) for p in found] == [(n, n, (4, 5 + n)) for n in chosen]


def test_orientation_tags_are_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    out = shown(saved(tmp_path / "x", Image.fromarray(RAMP[:, :8]), "PNG", exif=exif))
    assert out.shape == (16, 8)


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_bombs_are_refused_by_their_header(tmp_path: Path, side: int) -> None:
    data = bytearray(png16(WIDE))
    data[16:24] = struct.pack(">II", side, side)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "x.png").write_bytes(data)
    assert refusal(tmp_path / "x.png") is Reason.TOO_MANY_PIXELS
    (tmp_path / "x.tif").write_bytes(tiff(RAMP, shape=(side, side)))
    assert refusal(tmp_path / "x.tif") is Reason.TOO_MANY_PIXELS


def test_a_later_page_may_be_the_bomb(tmp_path: Path) -> None:
    pages = [Image.fromarray(RAMP), Image.fromarray(np.zeros((64, 64), np.uint8))]
    path = saved(tmp_path / "x", pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert refusal(path, Reading(max_values=300)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("data", [b"", b"text", b"GIF89a" + bytes(50), b"BM" + bytes(60), b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_no_images(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    assert refusal(tmp_path / "x") is Reason.NOT_AN_IMAGE


def encoded(form: str) -> bytes:
    out = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(out, form, **({"compression": "tiff_lzw"} if form == "TIFF" else {}))
    return out.getvalue()


FILES = {form: encoded(form) for form in ("PNG", "JPEG", "TIFF")}


@settings(max_examples=60)
@given(form=st.sampled_from(sorted(FILES)), share=st.floats(0, 1))
def test_what_is_cut_off_is_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, form: str, share: float) -> None:
    data = FILES[form]
    path = tmp_path_factory.mktemp("cut") / "x"
    path.write_bytes(data)
    [whole] = read(path)
    path.write_bytes(data[: int(share * len(data))])
    try:
        found = read(path)
    except Refused:
        return
    [picture] = found
    np.testing.assert_array_equal(picture.values, whole.values)


@settings(max_examples=60)
@given(
    form=st.sampled_from(sorted(FILES)),
    changes=st.lists(st.tuples(st.integers(8, 400), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_changed_headers_give_pictures_or_refusals(
    tmp_path_factory: pytest.TempPathFactory, form: str, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(FILES[form])
    for place, byte in changes:
        data[-place if form == "TIFF" else place] = byte  # a TIFF's tags are at its end
    path = tmp_path_factory.mktemp("changed") / "x"
    path.write_bytes(data)
    try:
        for picture in read(path):
            out = picture.shown("header")
            assert np.isfinite(out).all()
            assert ((out >= 0) & (out <= 1)).all()
    except Refused:
        pass
