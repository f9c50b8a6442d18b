"""What a sampling job would take, checked before it takes anything: disk, memory, a picture that a viewer can open."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from star_fast.errors import UserError
from star_fast.generation.batch import Drawer
from star_fast.generation.grid import grid_size
from star_fast.generation.render import CUDA_PIECE_IMAGES, PIECE_IMAGES
from star_fast.generation.sample_config import SampleConfig
from star_fast.host_memory import physical_bytes

_MOST_GRID_PIXELS = 2**28  # a picture of them takes 0.8 GB while it is drawn
_LABEL_BYTES = 8 + 8  # of each image while labels are planned


def require_disk(config: SampleConfig, image_shape: tuple[int, int, int], parts: Path) -> None:
    """Raise UserError unless the images that are not in the folder `parts` yet fit on the disk."""
    there = next(folder for folder in parts.absolute().parents if folder.exists())
    # Before the look at what is there: what other ranks write meanwhile counts for the job, not against it
    free = shutil.disk_usage(there).free
    kept = sum(_size(parts / name) for name in _names(parts))
    height, width, channels = image_shape
    needed = config.images * (height * width * channels + 8)
    if needed - kept > free:
        raise UserError(
            f"images: {config.images} of {width} x {height} pixels need {_amount(needed - kept)} at {there}, "
            f"where {_amount(free)} are free; "
            "give fewer --images, smaller --pixels, or an --out on another disk"
        )


def require_memory(drawer: Drawer) -> None:
    """Raise UserError if one batch, with the key-value caches it decodes with, is larger than the device's memory."""
    config, model = drawer.config, drawer.transformer.config
    rows = drawer.images_together * (2 if config.guidance > 1 else 1)
    caches = (
        2
        * rows
        * model.blocks
        * model.positions
        * model.width
        * (1 if config.cache != "model" else 2 if drawer.precision == "bf16" else 4)
    )
    image = drawer.image_shape[0] * drawer.image_shape[1] * 3
    together = CUDA_PIECE_IMAGES if drawer.device.type == "cuda" else PIECE_IMAGES
    pieces = min(together, drawer.images_together) * image * 4 if config.pixels else 0  # float32, while resized
    decoding = caches + 4 * rows * model.vocab + pieces
    kept = drawer.images_together * image + _LABEL_BYTES * config.images  # in the host's memory, whatever the device
    amounts = [(decoding + kept, physical_bytes(), "this machine")]
    if drawer.device.type == "cuda":
        amounts = [
            (decoding, torch.cuda.mem_get_info(drawer.device)[1], str(drawer.device)),
            (kept, physical_bytes(), "this machine"),
        ]
    for needed, most, where in amounts:
        if needed > most:
            raise UserError(
                f"batch_images: {drawer.images_together} images of {drawer.image_shape[1]} x "
                f"{drawer.image_shape[0]} pixels drawn together need "
                f"{_amount(needed)} of memory, {where} has {_amount(most)}; give a smaller --batch-images, "
                "--pixels or --images"
            )


def require_drawable_grid(config: SampleConfig, image_shape: tuple[int, int, int], classes: int) -> None:
    """Raise UserError if the grid picture would be larger than a viewer can open."""
    each = config.images if config.labels == "random" else -(-config.images // classes)
    rows, columns = min(config.grid_rows, classes), min(config.grid_columns, each)
    width, height = grid_size(image_shape, rows, columns)
    if width * height > _MOST_GRID_PIXELS:
        raise UserError(
            f"grid: {rows} rows of {columns} images would be a picture of {width} x {height} pixels, expected at "
            f"most {_MOST_GRID_PIXELS:,}; "
            "give smaller --grid-rows and --grid-columns, or --no-grid"
        )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # it is not there yet, or another rank has done with it
        return []


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # another rank moved it on
        return 0


def _amount(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"
