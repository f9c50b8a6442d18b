"""Where the images that are measured come from: a .npz, a folder of files, an image source cut to squares, or a model
that draws them on the way.

Each is an ImageSet: batches of uint8 images, once through, nothing held but a batch or two; and a record of what
decides its pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from star_fast.data.decoding import decode_image, in_channels, reason_of
from star_fast.data.folders import images_below
from star_fast.data.image_source import read_file
from star_fast.data.sources import DataError, ImageSource, UnreadableImage
from star_fast.data.views import make_squares
from star_fast.errors import UserError
from star_fast.evaluation.npz_reading import NpzFile
from star_fast.generation.label_plan import plan_labels
from star_fast.generation.limits import require_memory
from star_fast.generation.npz_file import LABELS_MEMBER
from star_fast.generation.npz_stream import IMAGES_MEMBER
from star_fast.generation.record import read_finished
from star_fast.generation.sample import prepare_drawing
from star_fast.generation.sample_config import SampleConfig
from star_fast.records import to_dict
from star_fast.storage import StorageError

_JPEG = b"\xff\xd8\xff"


class ImageSet(Protocol):
    """Images to measure, in an order of their own."""

    images: int  # how many there are; unreadable ones included
    skipped: list[dict[str, str]]  # what could not be read so far: {"key", "reason"} each
    warnings: list[str]

    def batches(self, size: int) -> Iterator[Tensor]:
        """uint8 (n, C, H, W) on the CPU, all of one shape, n at most `size`."""
        ...

    def record(self) -> dict[str, Any]:
        """Where they come from, for the protocol; complete once all batches have been read."""
        ...


class NpzImages:
    """arr_0 of a .npz, and what its sampler wrote beside it as NAME.json. Raises StorageError where
    it is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.skipped: list[dict[str, str]] = []
        self.warnings: list[str] = []
        with NpzFile(path, f"expected images in {IMAGES_MEMBER}, uint8 (N, H, W, 3)") as file:
            self.images, self.height, self.width = file.image_shape(IMAGES_MEMBER)
            crc = file.header(IMAGES_MEMBER).crc
            self.labels = (
                file.array(LABELS_MEMBER, (self.images,), "iu").astype(np.int64) if LABELS_MEMBER in file else None
            )
        self.sampling: dict[str, Any] | None = None
        record = self.path.with_suffix(".json")
        if not record.exists():
            return
        try:
            plan, checksums = read_finished(record, "it is left out")
        except StorageError as error:
            self.warnings.append(f"not a sampler's record: {error}")
            return
        if int(checksums.images_crc32, 16) == crc:
            self.sampling = to_dict(plan)
        else:
            self.warnings.append(
                f"{record.name} is the record of other images than {self.path.name} holds; it is left out"
            )

    def batches(self, size: int) -> Iterator[Tensor]:
        """As ImageSet.batches."""
        with NpzFile(self.path, "it ends before its last image; make it again") as file:
            for images in file.images(IMAGES_MEMBER, size):
                yield torch.from_numpy(images).permute(0, 3, 1, 2)

    def record(self) -> dict[str, Any]:
        """File, and how it was sampled where that is known."""
        return {"kind": "npz", "file": str(self.path), "sampling": self.sampling, "jpeg_images": 0}


class _Read(NamedTuple):
    """One image as read."""

    key: str
    pixels: np.ndarray  # (C, H, W) uint8
    jpeg: bool


class _ReadImages:
    """Images read one by one, by threads one batch ahead; what cannot be read is skipped and listed."""

    def __init__(self, name: str, images: int, skipped: list[dict[str, str]]) -> None:
        self.name, self.images, self.skipped, self.jpeg_images = name, images, list(skipped), 0
        self.warnings: list[str] = []
        self.advice = "expected images of one size"

    def _image(self, index: int) -> _Read:
        raise NotImplementedError

    def batches(self, size: int) -> Iterator[Tensor]:
        """As ImageSet.batches. Raises DataError at an image of another size than the first."""
        shape = first = None
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            try:
                begun = self._begin(pool, 0, size)
                for start in range(0, self.images, size):
                    begun, now = self._begin(pool, start + size, size), begun
                    good = [read for future in now if (read := future.result()) is not None]
                    for read in good:
                        if shape is None:
                            shape, first = read.pixels.shape, read.key
                        if read.pixels.shape != shape:
                            raise DataError(
                                f"{self.name}: images of two sizes: {first} has {shape[2]} x {shape[1]} pixels, "
                                f"{read.key} "
                                f"{read.pixels.shape[2]} x {read.pixels.shape[1]}; {self.advice}"
                            )
                        self.jpeg_images += read.jpeg
                    if good:
                        yield torch.from_numpy(np.stack([read.pixels for read in good]))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        self.skipped.sort(key=lambda entry: entry["key"])

    def _begin(self, pool: ThreadPoolExecutor, start: int, size: int) -> list[Future[_Read | None]]:
        return [pool.submit(self._attempt, index) for index in range(start, min(start + size, self.images))]

    def _attempt(self, index: int) -> _Read | None:
        try:
            return self._image(index)
        except UnreadableImage as error:
            self.skipped.append({"key": error.key, "reason": error.reason})
            return None


class FolderImages(_ReadImages):
    """Every image file below a folder, in the order of their paths, as RGB: as they are, all of one size, or cut to
    squares of `image_size` as ADM does.

    Raises:
        DataError: no image there; while reading: two sizes.
    """

    def __init__(self, folder: str | Path, image_size: int = 0) -> None:
        self.folder, self.image_size = Path(folder), image_size
        sizes, skipped = images_below(str(folder))
        super().__init__(str(folder), len(sizes), skipped)
        self.keys, self.advice = sorted(sizes), "give --image-size N to cut all to squares as ADM does"
        if not self.keys:
            raise DataError(
                f"{folder}: no images in it; expected image files; a .npz is read too, and a model draws with "
                "--draw.model"
            )

    def _image(self, index: int) -> _Read:
        key = self.keys[index]
        data = read_file(self.folder, key)
        return _Read(
            key, _pixels(lambda: decode_image(data), key, self.name, self.image_size, 3), data.startswith(_JPEG)
        )

    def record(self) -> dict[str, Any]:
        """Folder and cut."""
        return {"kind": "folder", "folder": self.name, "jpeg_images": self.jpeg_images, "cut": _cut(self.image_size)}


class SourceImages(_ReadImages):
    """Images of a source (data/sources.py), each cut to a square of `image_size` as ADM does, in gray (channels 1) or
    RGB (3).
    """

    def __init__(self, source: ImageSource, name: str, image_size: int, channels: int = 3) -> None:
        super().__init__(name, len(source), source.skipped)
        self.source, self.image_size, self.channels = source, image_size, channels

    def _image(self, index: int) -> _Read:
        sample = self.source[index]
        return _Read(
            sample.key, _pixels(lambda: sample.image, sample.key, self.name, self.image_size, self.channels), False
        )

    def record(self) -> dict[str, Any]:
        """Source and cut."""
        return {
            "kind": "source",
            "source": self.name,
            "description": self.source.description(),
            "cut": _cut(self.image_size),
            "channels": self.channels,
        }


class DrawnImages:
    """Images that a model draws while they are measured: the same, in the same order, that `star-fast sample` would
    write with these settings.
    """

    def __init__(self, config: SampleConfig, device: torch.device) -> None:
        for name in ("out", "grid", "png_folder"):
            if getattr(config, name) != getattr(SampleConfig(), name):
                raise UserError(
                    f"--draw.{name.replace('_', '-')}: no file of images is written here; leave it out, or use "
                    "star-fast sample"
                )
        self.config, self.images = config, config.images
        self.skipped: list[dict[str, str]] = []
        self.warnings: list[str] = []
        self.drawing = prepare_drawing(config, device)
        require_memory(self.drawing.drawer)
        self.labels = plan_labels(config.images, self.drawing.classes, config.labels, config.seed)

    def batches(self, size: int) -> Iterator[Tensor]:
        """As ImageSet.batches. The next images are begun before the last ones are waited for; `size` cuts what is drawn
        together.
        """
        waiting = None
        for first in range(0, self.images, self.config.batch_images):
            begun = self.drawing.drawer.start(first, min(first + self.config.batch_images, self.images), self.labels)
            if waiting is not None:
                yield from waiting.wait().permute(0, 3, 1, 2).split(size)
            waiting = begun
        assert waiting is not None, "at least one image is drawn"
        yield from waiting.wait().permute(0, 3, 1, 2).split(size)

    def record(self) -> dict[str, Any]:
        """The plan of the same sampling job."""
        return {"kind": "drawn", "model": self.config.model, "sampling": to_dict(self.drawing.plan), "jpeg_images": 0}


def _pixels(decode: Callable[[], Image.Image], key: str, place: str, size: int, channels: int) -> np.ndarray:
    """(C, H, W) uint8: cut to a square of `size`, or as it is with 0. Raises UnreadableImage; DataError where the
    memory does not hold it.
    """
    try:
        if size:
            return make_squares(decode(), (size,), channels)[0]
        pixels = np.array(in_channels(decode(), channels))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    except MemoryError as error:
        raise DataError(
            f"{place}/{key}: the memory that is free does not hold its pixels; free some, then run the same command"
        ) from error
    except Exception as error:  # Pillow fails in a dozen ways, and what one odd image does must not end the job
        raise UnreadableImage(key, reason_of(error)) from error


def _cut(size: int) -> str:
    return f"ADM centre crop to {size} pixels" if size else "none"
