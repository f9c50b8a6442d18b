"""A picture of samples: one row a class, its name in front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from star_fast.generation.fonts import write_with
from star_fast.storage import atomic_write_bytes

_LEAST_TILE = 56  # pixels: smaller images are enlarged by whole factors, so that they can be looked at
GAP = 4
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_grid(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, rows: int = 20, columns: int = 10
) -> Image.Image:
    """The first `columns` images of each of the first `rows` classes, in order of label.

    Args:
        images: (N, H, W, 3) uint8; only those shown are read (a memory map is fine).
        labels: (N,) int64.
        class_names: one a label; letters that no font here has are written as escapes.

    Raises:
        ValueError: a label without a name.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"draw_grid: labels must lie in 0 ... {len(class_names) - 1}, got {labels.min()} ... {labels.max()}"
        )
    shown = {int(label): np.flatnonzero(labels == label)[:columns] for label in np.unique(labels)[:rows]}
    height, width = tile_size(images.shape[1:])
    names = write_with([class_names[label] for label in shown], size=max(12, min(22, height // 4)))
    margin = max(int(font.getlength(name)) for name, font in names) + 3 * GAP
    most = max(len(indices) for indices in shown.values())
    columns_width, picture_height = grid_size(images.shape[1:], len(shown), most)
    picture = Image.new("RGB", (margin + columns_width, picture_height), _PAPER)
    draw = ImageDraw.Draw(picture)
    for row, ((name, font), indices) in enumerate(zip(names, shown.values(), strict=True)):
        top = GAP + row * (height + GAP)
        draw.text((margin - 2 * GAP, top + height // 2), name, _INK, font, anchor="rm")
        for column, index in enumerate(indices):
            tile = Image.fromarray(np.ascontiguousarray(images[index])).resize(
                (width, height), Image.Resampling.NEAREST
            )
            picture.paste(tile, (margin + column * (width + GAP), top))
    return picture


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write a PNG, whole or not at all; of an array (H, W, 3) uint8 or a picture."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format="PNG")
    atomic_write_bytes(path, stream.getvalue())


def grid_size(image_shape: Sequence[int], rows: int, columns: int) -> tuple[int, int]:
    """Width and height in pixels of a grid of images (H, W, 3), without the names in front."""
    height, width = tile_size(image_shape)
    return columns * (width + GAP), GAP + rows * (height + GAP)


def tile_size(image_shape: Sequence[int]) -> tuple[int, int]:
    """Height and width at which an image is shown."""
    factor = max(1, -(-_LEAST_TILE // image_shape[0]))
    return image_shape[0] * factor, image_shape[1] * factor
