"""Pixels as a study's network takes them."""

import numpy as np
import pytest

from client.data.image import Recipe, SourceImage, preprocess
from common.errors import DataError

GENERATOR = np.random.default_rng(3)


def source(*shape: int, volume: bool = False) -> SourceImage:
    return SourceImage(GENERATOR.integers(0, 256, shape, np.uint8), "p", "a", volume=volume)


@pytest.mark.parametrize("shape", [(16, 16), (20, 11), (9, 30), (16, 16, 3), (40, 7, 3), (1, 1), (5, 3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_image_gets_the_studys_shape(shape: tuple[int, ...], channels: int) -> None:
    out = preprocess(source(*shape), Recipe(channels, 16))
    assert out.shape == Recipe(channels, 16).shape == (channels, 16, 16)
    assert out.dtype == np.uint8


def test_an_image_of_the_right_shape_is_not_touched() -> None:
    grey, colour = source(16, 16), source(16, 16, 3)
    np.testing.assert_array_equal(preprocess(grey, Recipe(1, 16))[0], grey.pixels)
    np.testing.assert_array_equal(preprocess(colour, Recipe(3, 16)), np.moveaxis(colour.pixels, -1, 0))


def test_grey_becomes_colour_by_repetition_and_colour_grey_by_its_mean() -> None:
    grey, colour = source(16, 16), source(16, 16, 3)
    np.testing.assert_array_equal(preprocess(grey, Recipe(3, 16)), np.stack([grey.pixels] * 3))
    mean = preprocess(colour, Recipe(1, 16))[0].astype(float)
    assert np.abs(mean - colour.pixels.mean(-1)).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_resizing_keeps_a_constant(value: int) -> None:
    image = SourceImage(np.full((37, 53), value, np.uint8), "p", "a")
    assert (preprocess(image, Recipe(1, 16)) == value).all()


def test_resizing_keeps_up_up_and_left_left() -> None:
    rows, columns = np.indices((64, 48))
    down = preprocess(SourceImage((rows * 4).clip(0, 255).astype(np.uint8), "p", "a"), Recipe(1, 16))[0].astype(int)
    right = preprocess(SourceImage((columns * 5).astype(np.uint8), "p", "a"), Recipe(1, 16))[0].astype(int)
    assert (np.diff(down, axis=0) > 0).all()
    assert (np.diff(right, axis=1) > 0).all()
    assert np.abs(np.diff(down, axis=1)).max() <= 1
    assert np.abs(np.diff(right, axis=0)).max() <= 1


def test_shrinking_averages_instead_of_picking() -> None:
    stripes = np.where(np.arange(64) % 4 == 0, 255, 0).astype(np.uint8)[:, None].repeat(64, 1)
    for image in (stripes, stripes.T):
        out = preprocess(SourceImage(image, "p", "a"), Recipe(1, 16))
        assert np.abs(out.astype(int) - 64).max() <= 30


@pytest.mark.parametrize("shape", [(16, 16, 16), (12, 20, 9), (3, 16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_volumes(shape: tuple[int, ...], channels: int) -> None:
    out = preprocess(source(*shape, volume=True), Recipe(channels, 16, 3))
    assert out.shape == Recipe(channels, 16, 3).shape == (channels, 16, 16, 16)
    assert (out[0] == out[-1]).all()


def test_a_volume_three_slices_thick_is_not_taken_for_colour() -> None:
    volume = source(16, 16, 3, volume=True)
    out = preprocess(volume, Recipe(1, 16, 3))
    assert out.shape == (1, 16, 16, 16)
    thick = preprocess(SourceImage(np.full((16, 16, 3), 200, np.uint8), "p", "a", volume=True), Recipe(1, 16, 3))
    assert (thick == 200).all()


def test_the_number_of_dimensions_must_be_the_studys() -> None:
    with pytest.raises(DataError, match="2-D"):
        preprocess(source(16, 16, 16, volume=True), Recipe(1, 16))
    with pytest.raises(DataError, match="3-D"):
        preprocess(source(16, 16), Recipe(1, 16, 3))
