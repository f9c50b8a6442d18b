"""generation.images: what a model draws is a list, an array and a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from star_fast import Images


def test_images_are_a_list_an_array_and_a_picture(tmp_path: Path) -> None:
    pixels = torch.arange(5 * 8 * 8 * 3, dtype=torch.int64).view(5, 8, 8, 3).remainder(251).to(torch.uint8)
    images = Images(pixels)
    assert (
        len(images) == 5
        and repr(images) == "Images of 5 x 8 x 8 pixels"
        and repr(images[1:3]) == "Images of 2 x 8 x 8 pixels"
    )
    assert [np.array_equal(np.asarray(image), pixels[index].numpy()) for index, image in enumerate(images)] == [
        True
    ] * 5
    assert np.array_equal(np.asarray(images[-1]), pixels[4].numpy()) and np.array_equal(
        np.asarray(images), pixels.numpy()
    )
    with pytest.raises(IndexError):
        images[5]
    grid = np.asarray(images.grid(columns=2))
    assert grid.shape == (3 * 56 + 2 * 4, 2 * 56 + 4, 3)
    for index in range(5):  # every seventh pixel of its tile
        top, left = index // 2 * 60, index % 2 * 60
        assert np.array_equal(grid[top : top + 56 : 7, left : left + 56 : 7], pixels[index].numpy())
    assert (grid[120:, 60:] == 255).all() and images.grid().size == (3 * 56 + 8, 2 * 56 + 4)
    images.save(tmp_path / "grid.png", columns=2)
    with (
        Image.open(tmp_path / "grid.png") as saved,
        Image.open(io.BytesIO(Images(pixels, columns=2)._repr_png_())) as shown,
    ):
        assert np.array_equal(np.asarray(saved), grid) and np.array_equal(np.asarray(shown), grid)
    assert images[:0]._repr_png_() is None
    with pytest.raises(ValueError, match=r"Images\.grid: expected images and columns >= 1, got 0 images"):
        images[:0].grid()
