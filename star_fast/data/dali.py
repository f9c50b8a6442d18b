"""Batches of encoded images to views by NVIDIA DALI: on the CPU the same bits as views.py and augment.py, on a GPU
nearly the same.

On the CPU DALI decodes (in C++ threads, to Pillow's very pixels) and Pillow cuts: DALI's own resize is slower there and
not exact. On a GPU nvJPEG decodes and DALI resizes; nvJPEG differs from libjpeg by design. Either way DALI gets the
JPEGs that it decodes as Pillow does: whole files of 8-bit gray or YCbCr. All others go to Pillow within the same call,
and so does what DALI refuses: which images are refused, and why, is up to Pillow alone. (What DALI's libraries find
wrong in a file they write to standard error themselves; that cannot be switched off.)
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from star_fast.config import ConfigError
from star_fast.data.augment import Augmentation, augment, crop_box
from star_fast.data.dali_pipelines import (
    ENCODED,
    Device,
    as_tensor,
    crops_pipeline,
    decode_pipeline,
    require_dali,
    square_shape,
    squares_pipeline,
)
from star_fast.data.decoding import decode_image, is_upright, open_image, reason_of, upright
from star_fast.data.jpeg_markers import is_whole_jpeg
from star_fast.data.sources import DataError
from star_fast.data.views import make_squares
from star_fast.errors import UserError

_MOST_PIXELS = 12_000_000  # of an image that DALI decodes; larger ones go to Pillow, one at a time
# Width over height and height over width, of an image that a GPU resizes; Pillow shrinks taller ones rows first
_MOST_WIDE, _MOST_TALL = 16, 2
_MOST_BATCH_PIXELS = 2**25  # decoded at once: 100 MB
# Component numbers and Adobe's transform of a colour JPEG that no decoder can take for another colour space
_YCBCR = ([1, 2, 3], 1)

T = TypeVar("T")
Views = list[np.ndarray] | list[Tensor]  # (C, S, S) uint8 each; tensors on the GPU where that decodes


class Refused(NamedTuple):
    """An image that cannot be decoded or cut; the same reason in every run."""

    reason: str


class DaliViews(ABC):
    """What squares and augmentation share: who decodes what, batches, threads, counts.

    Args:
        device: "cpu", or "mixed": decoded and cut on torch's current GPU.
        batch_images: that DALI decodes at once, at most.
        threads: of DALI and of Pillow each; they take turns.

    Attributes:
        counts: images so far that came from 'dali', from 'pillow', and that were 'refused'.

    Raises:
        UserError: DALI is not installed or does not work, or no GPU is there for "mixed". ConfigError: a device or
            number of channels that there is not.
    """

    _any_key: Any = None  # such as `_views` takes

    def __init__(self, channels: int, device: Device, batch_images: int, threads: int) -> None:
        if channels not in (1, 3):
            raise ConfigError(f"channels: expected 1 (gray) or 3 (RGB), got {channels}")
        if device not in ("cpu", "mixed"):
            raise ConfigError(f"device: expected 'cpu' or 'mixed', got {device!r}")
        require_dali()
        if device == "mixed" and not torch.cuda.is_available():
            raise UserError("device: 'mixed' decodes on a GPU, and none was found; take 'cpu'")
        self.channels, self.device, self.batch_images, self.threads = channels, device, batch_images, threads
        self.counts: Counter[str] = Counter(dali=0, pillow=0, refused=0)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="views")
        self._require_working()

    def _require_working(self) -> None:
        """Decode one sound image: what DALI refuses later is then the image's fault, and Pillow has its say; else all
        would silently go to Pillow.
        """
        file = io.BytesIO()
        Image.new("RGB", (32, 32)).save(file, "JPEG")
        try:
            self._pipeline = self._new_pipeline()
            works = self._by_dali([file.getvalue()], [open_image(file.getvalue())], [self._any_key])[0] is not None
            why = "it refuses a sound JPEG"
        except RuntimeError as error:
            works, why = False, " ".join(str(error).split())[:300]
        if not works:
            raise UserError(
                f"DALI does not work here (device {self.device!r}): {why}; decode with Pillow, or look at its "
                "installation"
            )

    def _new_pipeline(self) -> Any:
        return self._gpu_pipeline() if self.device == "mixed" else decode_pipeline(self.batch_images, self.threads)

    def _views(self, encoded: Sequence[bytes], keys: Sequence[Any]) -> list[Views | Refused]:
        """The views of each file, or why there are none: a matter of its bytes and its key alone, not of its
        neighbours.
        """
        opened = list(self._pool.map(lambda data: _attempt(lambda: open_image(data)), encoded))
        chosen = [
            place
            for place, image in enumerate(opened)
            if not isinstance(image, Refused) and self._suits(image) and is_whole_jpeg(encoded[place])
        ]
        results: dict[int, Future[Views | Refused]] = {}
        for batch in self._batches(chosen, opened):  # the pool cuts one batch while DALI decodes the next
            files, headers = [encoded[place] for place in batch], [opened[place] for place in batch]
            of_batch = [keys[place] for place in batch]
            results |= {
                place: views
                for place, views in zip(batch, self._by_dali(files, headers, of_batch), strict=True)
                if views is not None
            }
        by_dali = set(results)
        for place, image in enumerate(opened):
            if place not in by_dali:
                results[place] = (
                    _done(image)
                    if isinstance(image, Refused)
                    else self._pool.submit(self._by_pillow, encoded[place], keys[place])
                )
        views = [results[place].result() for place in range(len(encoded))]
        self.counts.update(
            "refused" if isinstance(found, Refused) else "dali" if place in by_dali else "pillow"
            for place, found in enumerate(views)
        )
        return views

    def _suits(self, opened: Any) -> bool:
        """Whether DALI is to decode an image that was opened; its file must be whole besides."""
        if opened.format != "JPEG" or opened.mode not in ("L", "RGB") or opened.width * opened.height > _MOST_PIXELS:
            return False
        return (
            opened.mode == "L"
            or ([layer[0] for layer in opened.layer], opened.info.get("adobe_transform", 1)) == _YCBCR
        )

    def _batches(self, places: Sequence[int], opened: Sequence[Any]) -> Iterator[list[int]]:
        batch: list[int] = []
        pixels = 0
        for place in places:
            more = opened[place].width * opened[place].height
            if batch and (len(batch) == self.batch_images or pixels + more > _MOST_BATCH_PIXELS):
                yield batch
                batch, pixels = [], 0
            batch.append(place)
            pixels += more
        if batch:
            yield batch

    def _by_dali(
        self, files: Sequence[bytes], opened: Sequence[Any], keys: Sequence[Any]
    ) -> list[Future[Views | Refused] | None]:
        """What DALI makes of a batch. One image that it refuses ends the whole batch, so each half is tried by itself;
        alone it gives None.
        """
        try:
            self._pipeline.feed_input(ENCODED, [np.frombuffer(data, dtype=np.uint8) for data in files])
            if self.device == "mixed":
                for name, rows in self._gpu_inputs(opened, keys).items():
                    self._pipeline.feed_input(name, rows)
            outputs = self._pipeline.run()
        except RuntimeError:
            self._pipeline = self._new_pipeline()  # DALI calls one that failed invalid
            if len(files) == 1:
                return [None]
            half = len(files) // 2
            return [
                views
                for part in (slice(half), slice(half, None))
                for views in self._by_dali(files[part], opened[part], keys[part])
            ]
        if self.device == "mixed":
            made: list[Future[Views | Refused] | None] = [
                _done([as_tensor(output[place]) for output in outputs]) for place in range(len(files))
            ]
            torch.cuda.current_stream().synchronize()  # DALI uses its memory again
            return made
        # Copies: DALI uses its memory again
        images = [Image.fromarray(np.asarray(outputs[0].at(place))) for place in range(len(files))]
        return [
            self._pool.submit(self._by_decoded, image, header, key)
            for image, header, key in zip(images, opened, keys, strict=True)
        ]

    def _by_decoded(self, image: Image.Image, opened: Image.Image, key: Any) -> Views | Refused:
        return _attempt(lambda: self._cut(upright(image, opened), key))

    def _by_pillow(self, data: bytes, key: Any) -> Views | Refused:
        views = _attempt(lambda: self._cut(decode_image(data), key))
        return (
            views
            if self.device == "cpu" or isinstance(views, Refused)
            else [torch.from_numpy(view).cuda() for view in views]
        )

    @abstractmethod
    def _cut(self, image: Image.Image, key: Any) -> list[np.ndarray]:
        """The views of a decoded image, as Pillow cuts them: the definition of correct."""

    @abstractmethod
    def _gpu_pipeline(self) -> Any:
        """The graph that decodes and cuts on a GPU."""

    @abstractmethod
    def _gpu_inputs(self, opened: Sequence[Any], keys: Sequence[Any]) -> dict[str, list[np.ndarray]]:
        """What that graph must know of each image besides its file."""


class DaliSquares(DaliViews):
    """ADM's centre crops of encoded images (views.make_squares), to several sizes from one decoding.

        squares = DaliSquares((281, 268), 3)
        for views in squares(files): ...      # a list of (C, S, S) uint8, one for each size, or Refused

    On the CPU the arrays are those of `make_squares`, bit for bit. On a GPU images that are turned by EXIF, that ADM
    halves, or that are more than twice as tall as wide go to Pillow.
    """

    def __init__(
        self, sizes: Sequence[int], channels: int, *, device: Device = "cpu", batch_images: int = 16, threads: int = 2
    ) -> None:
        self.sizes = tuple(sizes)
        super().__init__(channels, device, batch_images, threads)

    def __call__(self, encoded: Sequence[bytes]) -> list[Views | Refused]:
        """The squares of each file, or why there are none. Raises DataError where the memory does not hold an image."""
        return self._views(encoded, [None] * len(encoded))

    def _suits(self, opened: Any) -> bool:
        if self.device == "mixed":
            width, height = opened.size
            if (
                min(width, height) >= 2 * min(self.sizes)
                or width > _MOST_WIDE * height
                or height > _MOST_TALL * width
                or not is_upright(opened)
            ):
                return False
        return super()._suits(opened)

    def _cut(self, image: Image.Image, key: Any) -> list[np.ndarray]:
        return make_squares(image, self.sizes, self.channels)

    def _gpu_pipeline(self) -> Any:
        return squares_pipeline(self.sizes, self.channels, self.device, self.batch_images, self.threads)

    def _gpu_inputs(self, opened: Sequence[Any], keys: Sequence[Any]) -> dict[str, list[np.ndarray]]:
        return {
            f"shape {number}": [square_shape(image.width, image.height, size) for image in opened]
            for number, size in enumerate(self.sizes)
        }


class DaliAugment(DaliViews):
    """Random crops of encoded images (augment.augment), the same for the same seed, epoch and image number whatever the
    batch, thread or rank.

    On the CPU the arrays are those of `augment`, bit for bit; on a GPU the crops are the same, their pixels nearly.
    """

    _any_key = (0, 0)

    def __init__(
        self,
        settings: Augmentation,
        views: int,
        image_size: int,
        channels: int,
        seed: int,
        *,
        device: Device = "cpu",
        batch_images: int = 16,
        threads: int = 2,
    ) -> None:
        self.settings, self.views, self.image_size, self.seed = settings, views, image_size, seed
        super().__init__(channels, device, batch_images, threads)

    def __call__(self, encoded: Sequence[bytes], indices: Sequence[int], epoch: int) -> list[Views | Refused]:
        """The M views (C, S, S) uint8 of each file in one epoch, or why there are none.

        Args:
            indices: the number of each image in its source. epoch: from 0 on.

        Raises:
            DataError: the memory does not hold an image.
        """
        return self._views(encoded, [(epoch, int(index)) for index in indices])

    def _suits(self, opened: Any) -> bool:
        return super()._suits(opened) and (self.device == "cpu" or is_upright(opened))

    def _cut(self, image: Image.Image, key: Any) -> list[np.ndarray]:
        return augment(image, self.settings, self.views, self.image_size, self.channels, self.seed, *key)

    def _gpu_pipeline(self) -> Any:
        return crops_pipeline(self.views, self.image_size, self.channels, self.device, self.batch_images, self.threads)

    def _gpu_inputs(self, opened: Sequence[Any], keys: Sequence[Any]) -> dict[str, list[np.ndarray]]:
        return {
            f"crop {view}": [
                np.array(crop_box(self.settings, self.seed, epoch, index, view, image.width, image.height), np.float32)
                for image, (epoch, index) in zip(opened, keys, strict=True)
            ]
            for view in range(self.views)
        }


def _done(result: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(result)
    return future


def _attempt(make: Callable[[], T]) -> T | Refused:
    """What `make` makes of an image, or why not. Raises DataError where the machine's memory, not the image, is at
    fault.
    """
    try:
        return make()
    except MemoryError as error:
        raise DataError(
            "the memory that is free does not hold the pixels of an image; free some, then run the same command"
        ) from error
    except Exception as error:  # Pillow's decoders fail with a dozen exception types on damaged files
        return Refused(reason_of(error))
