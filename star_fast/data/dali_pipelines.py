"""The DALI graphs, one for each thing that is made of encoded images. The same graph runs on the CPU and, decoding
included, on a GPU.

DALI's resize keeps what lies between its two passes in float; Pillow rounds it to 8 bits and cuts off what bicubic
throws beyond 0 and 255. Next to hard edges that makes up to 10 levels. So an image is resized here by two calls, first
its columns, then its rows, each to 8 bits: 99 % of the values are then Pillow's, nearly all others one level beside
them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from star_fast.errors import UserError

Device = Literal["cpu", "mixed"]
ENCODED = "encoded"  # the input that takes the files


def require_dali() -> None:
    """Raise UserError, with what to install, where DALI is not installed."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        raise UserError(
            "DALI is not installed; install it with pip install 'star_fast[data]' (scripts/setup.sh --tests "
            "does), or decode with Pillow"
        )


def dali_version() -> str:
    """Of the DALI that is installed."""
    import nvidia.dali

    return nvidia.dali.__version__


def decode_pipeline(batch_images: int, threads: int) -> Any:
    """Files -> pixels, (H, W, 3) uint8 RGB, on the CPU. Its pixels are Pillow's, bit for bit, as far as both take a
    file.
    """
    pipeline = _pipeline("cpu", batch_images, threads)
    with pipeline:
        pipeline.set_outputs(_decode("cpu", 3))
    return _built(pipeline)


def squares_pipeline(sizes: Sequence[int], channels: int, device: Device, batch_images: int, threads: int) -> Any:
    """Files -> ADM's centre crop to each size, (S, S, channels) uint8 each, without the halving of large images.

    Inputs: `ENCODED`, and 'shape 0', 'shape 1' ... of each size: `square_shape`.
    """
    from nvidia.dali import fn

    pipeline = _pipeline(device, batch_images, threads)
    with pipeline:
        pixels, squares = _decode(device, channels), []
        for number, size in enumerate(sizes):
            shape = _numbers(f"shape {number}")
            squares.append(
                fn.crop(_resized(pixels, shape[0], shape[1], shape[2]), crop=(size, size), rounding="truncate")
            )
        pipeline.set_outputs(*squares)
    return _built(pipeline)


def crops_pipeline(views: int, size: int, channels: int, device: Device, batch_images: int, threads: int) -> Any:
    """Files -> `views` cuts of each image, resized to (size, size, channels) uint8 and mirrored where asked.

    Inputs: `ENCODED`, and 'crop 0', 'crop 1' ... of each view: (left, top, width, height, 1 to mirror) as float32.
    """
    from nvidia.dali import fn, types

    pipeline = _pipeline(device, batch_images, threads)
    with pipeline:
        pixels, made = _decode(device, channels), []
        for view in range(views):
            crop = _numbers(f"crop {view}")
            place = fn.cast(crop, dtype=types.INT32)
            # Cut first: what lies outside must not reach in over the edge.
            cut = fn.slice(pixels, fn.stack(place[1], place[0]), fn.stack(place[3], place[2]), axes=[0, 1])
            made.append(fn.flip(_resized(cut, crop[3], size, size), horizontal=place[4]))
        pipeline.set_outputs(*made)
    return _built(pipeline)


def square_shape(width: int, height: int, size: int) -> np.ndarray:
    """What `squares_pipeline` must know of an image: its height, and width and height when its shorter side is `size`;
    (3,) float32.
    """
    scale = size / min(width, height)
    return np.array([height, round(width * scale), round(height * scale)], dtype=np.float32)


def as_tensor(view: Any) -> Tensor:
    """An image (S, S, C) of an output as a tensor (C, S, S) of its own, where it lies."""
    return torch.from_dlpack(view).permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _pipeline(device: Device, batch_images: int, threads: int) -> Any:
    require_dali()
    from nvidia.dali import Pipeline

    gpu = None if device == "cpu" else torch.cuda.current_device()
    return Pipeline(
        batch_size=batch_images, num_threads=threads, device_id=gpu, prefetch_queue_depth=1, exec_dynamic=True
    )


def _built(pipeline: Any) -> Any:
    pipeline.build()
    return pipeline


def _decode(device: Device, channels: int) -> Any:
    """Fancy upsampling and the exact cosine transform are what Pillow asks libjpeg for. Turning upright is left to us:
    DALI and Pillow read EXIF apart.
    """
    from nvidia.dali import fn, types

    files = fn.external_source(name=ENCODED, dtype=types.UINT8, ndim=1)
    pixels = fn.decoders.image(
        files,
        device=device,
        output_type=types.RGB,
        jpeg_fancy_upsampling=True,
        use_fast_idct=False,
        adjust_orientation=False,
    )
    # Gray of what RGB can show, as Pillow makes it: the file's own luma differs where a colour lies outside.
    return pixels if channels == 3 else fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)


def _numbers(name: str) -> Any:
    from nvidia.dali import fn, types

    return fn.external_source(name=name, dtype=types.FLOAT, ndim=1)


def _resized(pixels: Any, height: Any, new_width: Any, new_height: Any) -> Any:
    """`pixels`, `height` rows of them, with bicubic and Pillow's two passes; 8 bits after each."""
    from nvidia.dali import fn, types

    how = {"interp_type": types.INTERP_CUBIC, "antialias": True, "subpixel_scale": False}
    return fn.resize(
        fn.resize(pixels, resize_x=new_width, resize_y=height, **how), resize_x=new_width, resize_y=new_height, **how
    )
