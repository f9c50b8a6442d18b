"""Random crops of an image, in plain PIL: the definition of correct for every faster pipeline.

A view is a cut of random area and aspect ratio at a random place, resized, and mirrored half of the time: what
torchvision calls RandomResizedCrop. It is a function of (seed, epoch, image number, view) and of the image's own size
alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from star_fast.data.decoding import in_channels
from star_fast.data.sources import random_bits
from star_fast.records import require

_STREAM = 0xA06  # first word of the key, so that these numbers are not those of another choice
_TRIES = 10  # to find a cut that fits into the image, as torchvision
_WORDS_A_TRY = 4


@dataclass(frozen=True)
class Augmentation:
    """How random crops are drawn."""

    area: tuple[float, float] = (0.08, 1.0)  # share of the image's area, evenly between these (torchvision)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width over height, evenly in the logarithm (torchvision)
    mirror: bool = True  # half of the views

    def __post_init__(self) -> None:
        for name, most in (("area", 1.0), ("aspect", 1e3)):
            low, high = getattr(self, name)
            require(0 < low <= high <= most, name, (low, high), f"rising numbers above 0, up to {most:g}")


class Crop(NamedTuple):
    """A cut, in pixels, and whether it is mirrored."""

    left: int
    top: int
    width: int
    height: int
    mirrored: bool


def crop_box(
    settings: Augmentation, seed: int, epoch: int, image_index: int, view: int, width: int, height: int
) -> Crop:
    """The cut of one view of an image of `width` x `height` pixels.

    Where no try fits (a strip, or ratios that the image cannot hold), the largest middle part whose ratio is allowed.
    """
    words = random_bits(_TRIES * _WORDS_A_TRY + 1, _STREAM, seed, epoch, image_index, view)
    shares = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53  # in [0, 1)
    mirrored = settings.mirror and bool(shares[-1] < 0.5)
    narrow, wide = (math.log(ratio) for ratio in settings.aspect)
    for area_share, ratio_share, left_share, top_share in shares[:-1].reshape(_TRIES, _WORDS_A_TRY).tolist():
        area = width * height * (settings.area[0] + area_share * (settings.area[1] - settings.area[0]))
        ratio = math.exp(narrow + ratio_share * (wide - narrow))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= w <= width and 1 <= h <= height:
            return Crop(int(left_share * (width - w + 1)), int(top_share * (height - h + 1)), w, h, mirrored)
    w = min(width, max(1, round(height * settings.aspect[1])))
    h = min(height, max(1, round(width / settings.aspect[0])))
    return Crop((width - w) // 2, (height - h) // 2, w, h, mirrored)


def augment(
    image: Image.Image,
    settings: Augmentation,
    views: int,
    image_size: int,
    channels: int,
    seed: int,
    epoch: int,
    image_index: int,
) -> list[np.ndarray]:
    """`views` random crops of a decoded image, (channels, image_size, image_size) uint8 each; cut first, then resized
    by bicubic.
    """
    image = in_channels(image, channels)
    made = []
    for view in range(views):
        left, top, width, height, mirrored = crop_box(settings, seed, epoch, image_index, view, *image.size)
        cut = image.crop((left, top, left + width, top + height)).resize(
            (image_size, image_size), Image.Resampling.BICUBIC
        )
        if mirrored:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(cut).reshape(image_size, image_size, channels)
        made.append(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    return made
