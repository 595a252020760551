"""Pixels as a study's network takes them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from client.data.image import Recipe, prepare
from common.errors import DataError

GENERATOR = np.random.default_rng(3)


def picture(*shape: int) -> NDArray[np.float32]:
    return GENERATOR.random(shape, np.float32)


def shares(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.astype(np.float32) / np.float32(255)


def constant(value: int, *shape: int) -> NDArray[np.float32]:
    return np.full(shape, value / 255, np.float32)


@pytest.mark.parametrize("shape", [(16, 16), (20, 11), (9, 30), (16, 16, 3), (40, 7, 3), (1, 1), (5, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_picture_gets_the_studys_shape(shape: tuple[int, ...], channels: int) -> None:
    out = prepare(picture(*shape), Recipe(channels, 16))
    assert out.shape == Recipe(channels, 16).shape == (channels, 16, 16)
    assert out.dtype == np.uint8


def test_bytes_of_the_right_shape_come_back() -> None:
    grey = GENERATOR.integers(0, 256, (16, 16), np.uint8)
    colour = GENERATOR.integers(0, 256, (16, 16, 3), np.uint8)
    np.testing.assert_array_equal(prepare(shares(grey), Recipe(1, 16))[0], grey)
    np.testing.assert_array_equal(prepare(shares(colour), Recipe(3, 16)), np.moveaxis(colour, -1, 0))


def test_grey_becomes_colour_by_repetition_and_colour_grey_by_its_mean() -> None:
    grey, colour = picture(16, 16), picture(16, 16, 3)
    np.testing.assert_array_equal(prepare(grey, Recipe(3, 16)), np.stack([prepare(grey, Recipe(1, 16))[0]] * 3))
    mean = prepare(colour, Recipe(1, 16))[0].astype(float)
    assert np.abs(mean - 255 * colour.mean(-1)).max() <= 0.5 + 1e-4


@settings(max_examples=150)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 70), st.sampled_from([2, 256, 4096, 2**24]))
def test_resizing_is_pillows_but_for_rounding(height: int, width: int, size: int, levels: int) -> None:
    image = (np.random.default_rng(height).integers(0, levels, (height, width)) / (levels - 1)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) * np.float64(255)
    assert np.abs(prepare(image, Recipe(1, size))[0] - theirs).max() < 0.5 + 1e-3


def test_wide_pictures_are_resized_in_pieces() -> None:
    image = picture(40, 9000)
    theirs = np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BILINEAR)) * np.float64(255)
    assert np.abs(prepare(image, Recipe(1, 16))[0] - theirs).max() < 0.5 + 1e-3


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_resizing_keeps_a_constant(value: int) -> None:
    assert (prepare(constant(value, 37, 53), Recipe(1, 16)) == value).all()


def test_resizing_keeps_up_up_and_left_left() -> None:
    rows, columns = (axis.astype(np.float32) for axis in np.indices((64, 48)))
    down = prepare(rows / np.float32(64), Recipe(1, 16))[0].astype(int)
    right = prepare(columns / np.float32(48), Recipe(1, 16))[0].astype(int)
    assert (np.diff(down, axis=0) > 0).all()
    assert (np.diff(right, axis=1) > 0).all()
    assert np.abs(np.diff(down, axis=1)).max() <= 1
    assert np.abs(np.diff(right, axis=0)).max() <= 1


def test_shrinking_averages_instead_of_picking() -> None:
    stripes = np.where(np.arange(64) % 4 == 0, 1, 0).astype(np.float32)[:, None].repeat(64, 1)
    for image in (stripes, stripes.T):
        out = prepare(np.ascontiguousarray(image), Recipe(1, 16))
        assert np.abs(out.astype(int) - 64).max() <= 30


@pytest.mark.parametrize("shape", [(16, 16, 16), (12, 20, 9), (3, 16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_volumes(shape: tuple[int, ...], channels: int) -> None:
    out = prepare(picture(*shape), Recipe(channels, 16, 3), volume=True)
    assert out.shape == Recipe(channels, 16, 3).shape == (channels, 16, 16, 16)
    assert (out[0] == out[-1]).all()


def test_a_volume_keeps_its_axes() -> None:
    for axis in range(3):
        ramp = np.moveaxis(np.broadcast_to(np.linspace(0, 1, 24, dtype=np.float32), (24, 24, 24)), -1, axis)
        out = prepare(np.ascontiguousarray(ramp), Recipe(1, 12, 3), volume=True)[0].astype(int)
        assert (np.diff(out, axis=axis) > 0).all()
        assert all((np.diff(out, axis=other) == 0).all() for other in range(3) if other != axis)


def test_a_volume_three_slices_thick_is_not_taken_for_colour() -> None:
    thin = constant(200, 16, 16, 3)
    assert (prepare(thin, Recipe(1, 16, 3), volume=True) == 200).all()
    with pytest.raises(DataError, match="2-D"):
        prepare(thin, Recipe(1, 16), volume=True)
    with pytest.raises(DataError, match="3-D"):
        prepare(thin, Recipe(1, 16, 3))


def test_the_number_of_dimensions_must_be_the_studys() -> None:
    with pytest.raises(DataError, match="2-D"):
        prepare(picture(16, 16, 16), Recipe(1, 16), volume=True)
    with pytest.raises(DataError, match="3-D"):
        prepare(picture(16, 16), Recipe(1, 16, 3))


def test_a_recipes_digest_names_everything_in_it() -> None:
    recipes = [Recipe(1, 16), Recipe(3, 16), Recipe(1, 17), Recipe(1, 16, 3), Recipe(1, 16, window="lung")]
    assert len({recipe.digest for recipe in recipes}) == len(recipes)
    assert Recipe(1, 16).digest == Recipe(1, 16, 2, "header").digest
