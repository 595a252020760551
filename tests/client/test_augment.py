"""The eight symmetries of a square."""

import numpy as np
import torch

from client.data.augment import SYMMETRIES, transform


def test_eight_distinct_symmetries_that_keep_every_pixel() -> None:
    image = torch.arange(9.0).reshape(1, 1, 1, 3, 3)
    seen = set()
    for element in range(SYMMETRIES):
        x = image.clone()
        transform(x, np.full((1, 1), element))
        assert sorted(x.flatten().tolist()) == list(range(9))
        assert x[..., 1, 1].item() == 4  # the middle stays
        seen.add(tuple(x.flatten().tolist()))
    assert len(seen) == SYMMETRIES


def test_every_image_gets_its_own_element_and_volumes_turn_in_plane() -> None:
    x = torch.rand(2, 3, 1, 4, 5, 5)
    before = x.clone()
    elements = np.array([[0, 1, 4], [2, 0, 0]])
    transform(x, elements)
    torch.testing.assert_close(x[0, 0], before[0, 0])
    torch.testing.assert_close(x[0, 1], torch.rot90(before[0, 1], 1, (-2, -1)))
    torch.testing.assert_close(x[0, 2], before[0, 2].flip(-1))
    torch.testing.assert_close(x[1, 0], before[1, 0].flip((-2, -1)))
    torch.testing.assert_close(x[1, 1:], before[1, 1:])
