"""A few images for people: a list of PIL images that a notebook shows, and the array that they are."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image
from torch import Tensor

from star_fast.generation.grid import GAP, save_png, tile_size


class Images(Sequence[Image.Image]):
    """Images of one size: `images[0]` is a PIL image, `images[2:5]` are Images, `images.pixels` and
    `np.asarray(images)` all of them as numbers.

    In a notebook the object shows itself as a grid.

    Args:
        pixels: (N, H, W, 3) uint8 on the CPU.
        columns: of the grid; 0: about as many as rows, at most 10.
    """

    def __init__(self, pixels: Tensor, columns: int = 0) -> None:
        self.pixels, self.columns = pixels, columns

    def __len__(self) -> int:
        return len(self.pixels)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> Images: ...

    def __getitem__(self, index: int | slice) -> Image.Image | Images:
        """The image of a number, counted from 0, as PIL; or those of a slice."""
        if isinstance(index, slice):
            return Images(self.pixels[index], self.columns)
        return Image.fromarray(self.pixels[index].numpy())

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """(N, H, W, 3) uint8."""
        return np.array(self.pixels.numpy(), dtype=dtype, copy=True if copy else None)

    def __repr__(self) -> str:
        return f"Images of {len(self)} x {self.pixels.shape[2]} x {self.pixels.shape[1]} pixels"

    def grid(self, columns: int = 0) -> Image.Image:
        """All of them in one picture, row by row; small ones enlarged by a whole factor.

        Args:
            columns: images in a row; 0: as the object was told, else about as many as rows.

        Raises:
            ValueError: there are no images, or less than one column.
        """
        columns = columns or self.columns or min(10, math.isqrt(max(len(self) - 1, 0)) + 1)
        if columns < 1 or not len(self):
            raise ValueError(
                f"Images.grid: expected images and columns >= 1, got {len(self)} images and {columns} columns"
            )
        height, width = tile_size(self.pixels.shape[1:])
        columns = min(columns, len(self))
        picture = Image.new(
            "RGB", (columns * (width + GAP) - GAP, -(-len(self) // columns) * (height + GAP) - GAP), (255, 255, 255)
        )
        for index, image in enumerate(self):
            row, column = divmod(index, columns)
            picture.paste(
                image.resize((width, height), Image.Resampling.NEAREST), (column * (width + GAP), row * (height + GAP))
            )
        return picture

    def save(self, path: str | Path, columns: int = 0) -> None:
        """Write the grid as a PNG, whole or not at all. Raises StorageError: the place cannot be written."""
        save_png(self.grid(columns), path)

    def _repr_png_(self) -> bytes | None:
        """What Jupyter shows."""
        if not len(self):
            return None
        stream = io.BytesIO()
        self.grid().save(stream, format="PNG")
        return stream.getvalue()
