"""The views of an image, in plain PIL and torch: the definition of correct for every faster pipeline.

An image becomes squares first, ADM's centre crops of the sizes that `square_sizes` names; views are cut from these.
'ten-crop': of the square of int(image_size * crop_range) pixels the four corners and the centre, then the same five of
its mirror image (LlamaGen's extraction), for each crop range. 'small-affine': small rotations, shifts and scalings
without mirror of the square of the views' own size, for images such as digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from star_fast.config import ConfigError, DataConfig
from star_fast.data.decoding import RefusedImage, in_channels, reason_of
from star_fast.data.sources import DataError, ImageSource, UnreadableImage, random_bits

TEN_CROP_VIEWS = tuple(
    mirror + place
    for mirror in ("", "mirrored ")
    for place in ("top left", "top right", "bottom left", "bottom right", "centre")
)
MAX_ROTATION_DEGREES = 10.0
MAX_SHIFT_SHARE = 0.07  # of the image's side
MAX_SCALING = 1.1  # scalings lie between 1 / 1.1 and 1.1, evenly in the logarithm
# Of an image brought to the size that views are cut from: the larger of the two
MOST_RESIZED_PIXELS, MOST_RESIZED_SQUARES = 2**24, 8
MOST_VIEWS, MOST_SIDE = 2**12, 2**14  # of one image; pixels of the crop that views are cut from


class ImageViews(NamedTuple):
    """The views of one image of a source."""

    views: np.ndarray  # (A, C, H, W) uint8
    label: int
    key: str


def check_view_settings(data: DataConfig, image_size: int, channels: int) -> None:
    """Raise ConfigError for settings that no image could be cut into views with: then not one image is at fault."""
    if channels not in (1, 3):
        raise ConfigError(f"tokenizer.image_channels: expected 1 (gray) or 3 (RGB), got {channels}")
    if data.views == "small-affine" and data.affine_views > MOST_VIEWS:
        raise ConfigError(f"data.affine_views: expected at most {MOST_VIEWS}, got {data.affine_views}")
    if (most := max(data.crop_ranges)) * image_size > MOST_SIDE and data.views == "ten-crop":
        raise ConfigError(
            f"data.crop_ranges: expected images resized to at most {MOST_SIDE} pixels, got {most!r} times {image_size}"
        )


def view_names(data: DataConfig) -> tuple[str, ...]:
    """One name for each view that `make_views` returns, in its order."""
    if data.views == "ten-crop":
        return ten_crop_names(data.crop_ranges)
    return ("identity", *(f"affine {view}" for view in range(1, data.affine_views)))


def ten_crop_names(crop_ranges: Sequence[float]) -> tuple[str, ...]:
    """Of the ten crops at each range; with several the range is part of the name."""
    if len(crop_ranges) == 1:
        return TEN_CROP_VIEWS
    return tuple(f"{name}, range {crop_range:g}" for crop_range in crop_ranges for name in TEN_CROP_VIEWS)


def plain_view(names: Sequence[str]) -> int:
    """The number of the view that shows an image as it is: the centre crop (of the first range), or the identity; 0
    where none is named so.
    """
    return next(
        (number for number, name in enumerate(names) if name == "identity" or name.split(",")[0] == "centre"), 0
    )


def square_sizes(data: DataConfig, image_size: int) -> tuple[int, ...]:
    """Pixels a side of the centre crops that an image's views are cut from, one for each crop range (LlamaGen: cut to
    whole numbers).
    """
    return (
        tuple(int(image_size * crop_range) for crop_range in data.crop_ranges)
        if data.views == "ten-crop"
        else (image_size,)
    )


def view_settings(data: DataConfig, seed: int) -> dict[str, object]:
    """Everything that the views depend on, for the code store's manifest."""
    if data.views == "ten-crop":
        return {"kind": data.views, "crop_ranges": list(data.crop_ranges)}
    return {
        "kind": data.views,
        "seed": seed,
        "max_rotation_degrees": MAX_ROTATION_DEGREES,
        "max_shift_share": MAX_SHIFT_SHARE,
        "max_scaling": MAX_SCALING,
    }


def read_views(
    source: ImageSource,
    index: int,
    data: DataConfig,
    image_size: int,
    channels: int,
    seed: int = 0,
    only: Sequence[int] | None = None,
) -> ImageViews:
    """The views (see make_views) of image `index` of a source.

    Raises:
        UnreadableImage: the image cannot be decoded or cut into views. DataError: the machine's memory does not hold
            it.
    """
    sample = source[index]
    try:
        return ImageViews(
            make_views(sample.image, index, data, image_size, channels, seed, only), sample.label, sample.key
        )
    except MemoryError as error:
        raise DataError(
            f"{sample.key}: the memory that is free does not hold its views; free some, then run the same command"
        ) from error
    except Exception as error:  # what one odd image does must not end the job
        raise UnreadableImage(sample.key, reason_of(error)) from error


def make_views(
    image: Image.Image,
    image_index: int,
    data: DataConfig,
    image_size: int,
    channels: int,
    seed: int = 0,
    only: int | Sequence[int] | None = None,
) -> np.ndarray:
    """All views of one image, or view number `only`, or those numbers.

    Args:
        image: as decoded; made gray (channels 1) or RGB (channels 3) first, as LlamaGen does: transparency is dropped;
            16-bit gray is scaled to 8 bits.
        image_index: the image's number in its source: with `seed` and the view it determines a small-affine view.
        image_size: pixels of a view's side.

    Returns:
        (A, C, H, W) uint8; A = 10 for each crop range of ten-crop, data.affine_views for small-affine, or the number of
        those asked for; (C, H, W) with a single `only`.

    Raises:
        DataError: channels other than 1 or 3. RefusedImage: a strip so long and thin that resizing it would take
            gigabytes, or no known white level.
    """
    squares = make_squares(image, square_sizes(data, image_size), channels)
    return cut_views(squares, image_index, data, image_size, seed, only)


def make_squares(image: Image.Image, sizes: Sequence[int], channels: int) -> list[np.ndarray]:
    """ADM's centre crop of an image to each size: (C, S, S) uint8 each. Raises as `make_views`."""
    if channels not in (1, 3):
        raise DataError(f"tokenizer.image_channels: expected 1 (gray) or 3 (RGB), got {channels}")
    for size in sizes:
        require_shape(image.size, size)
    image = in_channels(image, channels)
    return [_to_array(centre_crop(image, size)) for size in sizes]


def cut_views(
    squares: Sequence[np.ndarray],
    image_index: int,
    data: DataConfig,
    image_size: int,
    seed: int = 0,
    only: int | Sequence[int] | None = None,
) -> np.ndarray:
    """The views of one image from its squares (C, S, S) uint8, one for each of `square_sizes`; arguments and result as
    of `make_views`.
    """
    wanted = range(len(view_names(data))) if only is None else (only,) if isinstance(only, int) else only
    if data.views == "ten-crop":
        views = [_ten_crop(squares[view // 10], image_size, view % 10) for view in wanted]
    else:
        views = [squares[0] if view == 0 else small_affine(squares[0], image_index, view, seed) for view in wanted]
    return np.ascontiguousarray(views[0]) if isinstance(only, int) else np.stack(views)


def require_shape(shape: tuple[int, int], size: int) -> None:
    """Refuse an image of (width, height) that the resize to a shorter side of `size` would blow up: of a 100000 x 1
    strip it makes 100000 squares.
    """
    longer, shorter = max(shape), max(1, min(shape))
    if size * size * longer > max(MOST_RESIZED_PIXELS, MOST_RESIZED_SQUARES * size * size) * shorter:
        raise RefusedImage(f"{shape[0]} x {shape[1]} pixels: too long and thin to be cut into squares of {size} pixels")


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve by box filter while both sides are at least 2 * size, bring the shorter side to `size`
    by bicubic, cut the middle out.

    Source: guided-diffusion (Dhariwal and Nichol 2021), center_crop_arr; used by LlamaGen.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _ten_crop(square: np.ndarray, size: int, crop: int) -> np.ndarray:
    """Crop number 0 ... 9 of a square (C, S, S): top left, top right, bottom left, bottom right, centre; then the same
    five of the mirrored square.

    So crop 5 is the mirror of crop 1, 6 of 0, 7 of 3 and 8 of 2. The centre starts at round(margin / 2), halves to the
    even neighbour (as torchvision does); where the margin is odd (281 - 256 = 25) crop 9 is the mirror of a crop one
    pixel beside crop 4.
    """
    margin = square.shape[-1] - size
    x, y = ((0, 0), (margin, 0), (0, margin), (margin, margin), (round(margin / 2),) * 2)[crop % 5]
    mirrored = square if crop < 5 else square[:, :, ::-1]
    return mirrored[:, y : y + size, x : x + size]


def affine_parameters(seed: int, image_index: int, view: int) -> tuple[float, float, float, float]:
    """Rotation (radians), scaling, and shift right and down (shares of the side) of one small-affine view: a function
    of these three numbers alone.
    """
    # Each in [-1, 1)
    a, b, c, d = ((int(bits) >> 11) * 2.0**-52 - 1 for bits in random_bits(4, seed, image_index, view))
    return math.radians(MAX_ROTATION_DEGREES) * a, MAX_SCALING**b, MAX_SHIFT_SHARE * c, MAX_SHIFT_SHARE * d


def small_affine(image: np.ndarray, image_index: int, view: int, seed: int) -> np.ndarray:
    """Image (C, H, W) uint8 rotated, scaled and shifted a little about its centre; bicubic, edges repeated outwards;
    view 0 would be the identity.
    """
    angle, scaling, right, down = affine_parameters(seed, image_index, view)
    cos, sin = math.cos(angle) / scaling, math.sin(angle) / scaling
    # Where each output place (x, y) in [-1, 1] comes from: shift back, rotate back, scale back. A share of the side is
    # twice that in [-1, 1].
    x, y = -2 * right, -2 * down
    inverse = torch.tensor([[[cos, sin, cos * x + sin * y], [-sin, cos, -sin * x + cos * y]]], dtype=torch.float64)
    pixels = torch.from_numpy(image).double()[None]
    grid = F.affine_grid(inverse, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
    return moved.round().clamp(0, 255).to(torch.uint8).numpy()


def _to_array(image: Image.Image) -> np.ndarray:
    """(C, H, W) uint8."""
    array = np.array(image)  # a copy: Pillow hands out read-only memory
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))
