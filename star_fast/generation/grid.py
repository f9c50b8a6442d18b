"""A picture of samples: one row a class, its name in front."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from star_fast.storage import atomic_write_bytes

_LEAST_TILE = 56  # pixels: smaller images are enlarged by whole factors, so that they can be looked at
_GAP = 4
_INK, _PAPER = (20, 20, 20), (255, 255, 255)


def draw_grid(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str], *, rows: int = 20, columns: int = 10) -> Image.Image:
    """The first `columns` images of each of the first `rows` classes, in order of label.

    Args:
        images: (N, H, W, 3) uint8; only those shown are read (a memory map is fine).
        labels: (N,) int64.
        class_names: one a label.
    """
    shown = {int(label): np.flatnonzero(labels == label)[:columns] for label in np.unique(labels)[:rows]}
    factor = max(1, -(-_LEAST_TILE // images.shape[1]))
    height, width = images.shape[1] * factor, images.shape[2] * factor
    font = ImageFont.load_default(size=max(12, min(22, height // 4)))
    names = {label: _shortened(class_names[label]) for label in shown}
    margin = max(int(font.getlength(name)) for name in names.values()) + 3 * _GAP
    most = max(len(indices) for indices in shown.values())
    picture = Image.new("RGB", (margin + most * (width + _GAP), _GAP + len(shown) * (height + _GAP)), _PAPER)
    draw = ImageDraw.Draw(picture)
    for row, (label, indices) in enumerate(shown.items()):
        top = _GAP + row * (height + _GAP)
        draw.text((margin - 2 * _GAP, top + height // 2), names[label], _INK, font, anchor="rm")
        for column, index in enumerate(indices):
            tile = Image.fromarray(np.ascontiguousarray(images[index])).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(tile, (margin + column * (width + _GAP), top))
    return picture


def save_png(image: Image.Image | np.ndarray, path: str | Path) -> None:
    """Write a PNG, whole or not at all; of an array (H, W, 3) uint8 or a picture."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, format="PNG")
    atomic_write_bytes(path, stream.getvalue())


def _shortened(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else name[: longest - 1] + "…"
