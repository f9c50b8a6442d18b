"""A sampling job of eleven images in three batches: its settings, and its files taken apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from star_fast.generation.sample import SampleConfig
from tests.generation.small_model import images_of

IMAGES, BATCH, IMAGE_BYTES = 11, 4, 16 * 16 * 3
FINISHED = {"images.npz", "images.json", "images.png"}


def settings(model: Path, where: Path, **changes: object) -> SampleConfig:
    return replace(SampleConfig(model=str(model), out=str(where / "images.npz"), images=IMAGES, batch_images=BATCH, precision="fp32", top_k=20), **changes)


def first_pixel(npz: Path) -> int:
    return npz.read_bytes().index(images_of(npz)[0].tobytes())


def flip(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x20
    file.write_bytes(data)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
