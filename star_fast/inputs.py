"""What a caller may give a model: classes by name or number, codes, and pictures in any form that Python has for them,
checked and brought to one form each. Errors begin with the function called.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from star_fast.config import ModelConfig
from star_fast.data.decoding import RefusedImage
from star_fast.data.views import make_squares
from star_fast.errors import UserError
from star_fast.generation.images import Images
from star_fast.generation.label_plan import find_classes
from star_fast.generation.sampling import is_int
from star_fast.model.transformer import Transformer

Classes = str | int | None | Sequence[str | int | None]
Pictures = Image.Image | Sequence[Image.Image] | Images | np.ndarray | Tensor


def labels_of(function: str, classes: Classes, model: Transformer, class_names: Sequence[str]) -> list[int]:
    """One label for each class; None is the null class."""
    wanted = list(classes) if isinstance(classes, Sequence) and not isinstance(classes, str) else [classes]
    if isinstance(classes, (np.ndarray, Tensor)):
        wanted = classes.tolist() if classes.ndim else [classes.item()]
    wanted = [int(one) if isinstance(one, np.integer) else one for one in wanted]
    if not wanted or not all(one is None or isinstance(one, str) or is_int(one) for one in wanted):
        raise UserError(f"{function}: expected classes by name or number, or None, got {classes!r:.80}")
    try:
        known = {
            one: model.null_class if one is None else find_classes([one], class_names)[0]
            for one in dict.fromkeys(wanted)
        }
    except UserError as error:
        raise UserError(f"{function}: {error}") from error
    return [known[one] for one in wanted]


def checked_codes(function: str, codes: object, config: ModelConfig) -> Tensor:
    """(N, T) int64, from that or one image's (T,)."""
    positions, vocab = config.positions, config.vocab
    told = f"{codes.dtype} of shape {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
    if (
        not isinstance(codes, Tensor)
        or codes.dtype != torch.int64
        or codes.ndim not in (1, 2)
        or codes.shape[-1] != positions
        or not codes.numel()
    ):
        raise UserError(f"{function}: expected codes (N, {positions}) int64, got {told}")
    low, high = (int(value) for value in torch.aminmax(codes))
    if low < 0 or high >= vocab:
        raise UserError(f"{function}: codes must lie in 0 ... {vocab - 1}, got {low} ... {high}")
    return codes if codes.ndim == 2 else codes[None]


def checked_counts(function: str, **counts: object) -> None:
    """Raise UserError about the first that is no whole number, 1 or more."""
    for name, value in counts.items():
        if not is_int(value) or value < 1:
            raise UserError(f"{function}: {name} must be a whole number, 1 or more, got {value!r:.80}")


def pixels_of(function: str, images: Pictures, side: int, channels: int) -> Tensor:
    """(N, C, S, S): uint8, or float in [-1, 1] as given."""
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, Images):
        images = images.pixels
    if isinstance(images, (np.ndarray, Tensor)):
        try:
            array = torch.as_tensor(images)
        except TypeError as error:  # of objects or strings
            raise UserError(f"{function}: expected pixels as numbers, got an array of {images.dtype}") from error
        if array.is_floating_point() and array.shape[1:] == (channels, side, side) and len(array):
            return array.float()
        array = array[None] if array.ndim == 3 else array
        if array.dtype != torch.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.numel():
            raise UserError(
                f"{function}: expected PIL images, uint8 (N, H, W, 3), or floating point (N, {channels}, {side}, "
                f"{side}) in [-1, 1], got "
                f"{array.dtype} of shape {tuple(array.shape)}"
            )
        images = Images(array.cpu())
    if (
        not isinstance(images, Sequence)
        or not len(images)
        or not all(isinstance(image, Image.Image) for image in images)
    ):
        raise UserError(
            f"{function}: expected PIL images, or pixels as one array or tensor, got {type(images).__name__}"
            + (f" of {type(images[0]).__name__}" if isinstance(images, Sequence) and len(images) else "")
        )
    squares = []
    for number, image in enumerate(images):
        try:
            squares.append(torch.from_numpy(make_squares(image, (side,), channels)[0]))
        except RefusedImage as error:
            raise UserError(f"{function}: image {number}: {error}") from error
    return torch.stack(squares)
